"""What `moeproof bench --ranks` prints and writes: a table, JSON lines, one results file."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moeproof.harness.ranks import command
from moeproof.harness.ranks.bench import TOKENS, Options, Phase, Reading, Sizes, measure
from moeproof.harness.reports import results
from moeproof.reference.contract.errors import check

ON_A_CPU = (
    "These are wall times between processes of one CPU. They show that candidates run, agree with the oracle and deliver "
    "every row at this size, and what the harness itself costs; they say nothing about a GPU, a network or a kernel."
)
ON_GPUS = (
    "Microseconds are of device events around each call, after a barrier on the stream; some 60 us of launches are hidden by "
    "the wait before it. `replayed` is the same call captured in a CUDA graph: without the host. Everything a call does on the "
    "device is in both: counts, ids, scales, checks."
)
BYTES = (
    "GB/s count, of the busiest rank's busier direction, the rows that must move between ranks: for each token one to every "
    "other rank that holds an expert of it (standard layout) or one for every slot (batched); for a bare collective what it "
    "moves."
)
COLUMNS = "{:>6} {:<35} {:>26} {:>9} {:>26} {:>9} {:>26} {:>9}"


def device_of(transport: str) -> str:
    return "cpu" if transport == "gloo" else "cuda"


def lines(readings: Sequence[Reading]) -> Iterator[str]:
    """The table."""
    head = ("tokens", "candidate", "dispatch us", "GB/s", "combine us", "GB/s", "both us", "tokens/s")
    yield COLUMNS.format(*head)
    for r in readings:
        if r.dispatch is None or r.combine is None or r.both is None:
            yield f"{r.T:>6} {r.candidate:<36} {r.reason}"
            continue
        yield COLUMNS.format(r.T, r.candidate, *_cells(r.dispatch, r.combine, r.both), f"{r.tokens_per_s:.3g}")
        if r.replayed:
            rate = r.ranks * r.T / r.replayed.both.us * 1e6
            yield COLUMNS.format("", "  replayed", *_cells(**vars(r.replayed)), f"{rate:.3g}")


def _cells(dispatch: Phase, combine: Phase, both: Phase) -> tuple[str, ...]:
    return _spread(dispatch), f"{dispatch.gbs:.3g}", _spread(combine), f"{combine.gbs:.3g}", _spread(both)


def _spread(phase: Phase) -> str:
    return f"{phase.us:.0f} ({phase.us_min:.0f}-{phase.us_max:.0f})"


def summary(readings: Sequence[Reading], transport: str) -> dict[str, object]:
    """The last line of --json."""
    on = ON_A_CPU if device_of(transport) == "cpu" else ON_GPUS
    return {
        "points": len(readings),
        "timed": sum(r.both is not None for r in readings),
        "wrong": sum(r.reason.startswith("wrong") for r in readings),
        "transport": transport,
        "note": f"{on} {BYTES}",
    }


def refuse(given: Mapping[str, object]) -> None:
    """Raise ContractError where an option was given that says nothing about ranks."""
    for name, value in given.items():
        check(not value, f"{name} does not go with --ranks: between ranks no expert is multiplied with")


def main(
    names: Sequence[str],
    tokens: Sequence[int],
    sizes: Sizes,
    ranks: int,
    transport: str,
    options: Options,
    json: bool,
    output: Path | None,
) -> int:
    """The body of `bench --ranks`. Exit code: 0 all right, 1 a candidate was wrong somewhere, 3 nothing was timed."""
    transport = command.choose(transport, ranks)
    command.settle(transport, "auto")
    device = device_of(transport)
    found: list[Reading] = []
    for reading in measure(command.named(names), tokens or TOKENS[device], sizes, ranks, transport, options):
        found.append(reading)
        if json:
            sys.stdout.write(jsonlib.dumps(reading.record()) + "\n")
            sys.stdout.flush()
        else:
            sys.stderr.write(f"T={reading.T} {reading.candidate}: {_outcome(reading)}\n")
    last = summary(found, transport)
    page = sys.stderr if json else sys.stdout
    page.write("\n".join([*lines(found), str(last["note"])]) + "\n")
    if json:
        sys.stdout.write(jsonlib.dumps(last) + "\n")
    if output:
        # Ranks on one CPU share it with whatever else runs there.
        made = results.origin(device, output) | {"load_average": round(os.getloadavg()[0], 1)}
        results.write(output, made | last | {"readings": [r.record() for r in found]})
    if last["wrong"]:
        return 1
    return 0 if last["timed"] else 3


def _outcome(reading: Reading) -> str:
    return reading.reason or (f"{reading.both.us:.0f} us" if reading.both else "")
