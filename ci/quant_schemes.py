"""Judge the quantised Triton candidates on every scheme in both layouts: random cases and exact probes, one results file.

    python ci/quant_schemes.py docs/results/quant-schemes-h100.json [--cases 48] [--seconds 200] [--jobs 8] [--schemes ..]

Random cases have scales that differ by 8 binades and more between rows, channels, groups and experts; probes must match bit
for bit. Exit code 0 when every verdict is PASS. With a GPU the compiled kernels run, without one the interpreter.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from moeproof.harness import modes, workers
from moeproof.harness.cases.case import Case
from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.quant_sample import QUANTISED
from moeproof.harness.judging.judge import judge
from moeproof.harness.registry import load_candidates
from moeproof.harness.reports import results
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract import SCHEMES, Activation, Problem
from moeproof.reference.contract.problem import LAYOUTS

T = TypeVar("T")
CANDIDATES = (
    *("triton-fp8", "triton-fp8-modular", "triton-fp8-batched"),
    *("triton-quant", "triton-quant-modular", "triton-quant-batched", "torch-scaled-grouped"),
)
SIZES = ((128, 136), (200, 64), (384, 256))
"""(H, I), rounded up to what the scheme's groups allow. Few, because each is compiled for."""
TOKENS = (1, 7, 33, 130)
ACTIVATIONS = ("silu", "silu", "silu", "swigluoai", "relu2_no_mul")
VALUES = ("groups", "groups", "edges", "ties", "hetero", "normal")
KEPT = 5
"""Failures written out for each scheme, layout and candidate."""


def _pick(s: Stream, options: Sequence[T]) -> T:
    return options[int(s.integers(0, len(options), 1))]


def _unit(scheme: str) -> int:
    """Columns that H and I must be multiples of."""
    row = SCHEMES[scheme]
    return max([8, *(q.group[1] for q in (row.a1, row.a2, row.w) if q is not None and not q.ragged)])


def draw(scheme: str, layout: str, seed: int, probe: bool) -> Case:
    """The case of this seed. Every axis is drawn whatever the others are, so that schemes see the same ones."""
    s, unit = Stream(seed, "quant_schemes"), _unit(scheme)
    H, I = (-(-size // unit) * unit for size in _pick(s, SIZES))  # noqa: E741  (the project's letter)
    tokens, experts, slots = _pick(s, TOKENS), _pick(s, (4, 7)), _pick(s, (1, 2, 3))
    dtype, act = _pick(s, ("bf16", "bf16", "fp16", "fp32")), _pick(s, ACTIVATIONS)
    routing = _pick(s, ("uniform", "hot", "minus1", "dup", "zipf"))
    weighted, bias, kn = (bool(s.integers(0, 4, 1)[0] == 0) for _ in range(3))
    problem = Problem(
        T=tokens,
        H=H,
        I=I,
        E=experts,
        K=slots,
        dtype="bf16" if probe and dtype == "fp16" else dtype,
        scheme=scheme,
        act=Activation.parse("silu" if probe else act),
        expert_bias=bias,
        weight_on_input=weighted and slots == 1 and not probe,
        layout=layout,
        storage="KN" if kn else "NK",
    )
    values = "pin" if probe else _pick(s, VALUES)
    return Case(problem, values=values, routing=routing, strided=bool(s.integers(0, 8, 1)[0] == 0), seed=seed)


def run(scheme: str, layout: str, count: int, budget: float) -> list[dict[str, object]]:
    """One row for each candidate that supports the scheme in this layout. Every fourth case is a probe.

    After `budget` seconds no further case is begun: a row says how many there were.
    """
    start = time.perf_counter()
    verdicts: dict[str, list[Verdict]] = {}
    for seed in range(count):
        if seed >= 4 and time.perf_counter() - start > budget:
            break
        case = draw(scheme, layout, seed, seed % 4 == 3)
        for candidate in load_candidates(CANDIDATES):
            verdict = judge(candidate, case)
            if verdict.outcome is not Outcome.UNSUPPORTED:
                verdicts.setdefault(candidate.name, []).append(verdict)
    seconds = round(time.perf_counter() - start, 1)
    return [{"scheme": scheme, "layout": layout, "candidate": n, "seconds": seconds, **_row(v)} for n, v in verdicts.items()]


def _row(verdicts: list[Verdict]) -> dict[str, object]:
    bad = [v for v in verdicts if v.outcome is not Outcome.PASS]
    worst: dict[str, float] = {}
    for verdict in verdicts:
        for name, ratio in verdict.worst.items():
            worst[name] = max(worst.get(name, 0.0), round(ratio, 4))
    return {
        "of": len(verdicts),
        "probes": sum(v.case.values == "pin" for v in verdicts),
        "outcomes": dict(Counter(v.outcome.value for v in verdicts)),
        "checked": sum(v.checked for v in verdicts),
        "worst": worst,
        "claims": verdicts[0].claims,
        "failures": [str(v) for v in bad[:KEPT]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--cases", type=int, default=48, help="for each scheme and layout; every fourth is a probe")
    parser.add_argument("--seconds", type=float, default=200, help="about as long as it may take; fewer cases then")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--mode", default="auto", choices=modes.MODES)
    parser.add_argument("--schemes", nargs="+", default=QUANTISED, choices=QUANTISED)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")  # a process in which Triton is not yet imported
    rows: list[dict[str, object]] = []
    start = functools.partial(workers.settle, options.mode)
    budget = options.seconds * options.jobs / (len(options.schemes) * len(LAYOUTS))
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=start) as pool:
        waiting = [pool.submit(run, scheme, layout, options.cases, budget) for scheme in options.schemes for layout in LAYOUTS]
        for future in as_completed(waiting):
            for row in future.result():
                rows.append(row)
                words = (row["scheme"], row["candidate"], row["outcomes"], row["worst"], f"{row['seconds']} s")
                print(*words, *row["failures"], sep="  ", flush=True)  # type: ignore[misc]
    rows.sort(key=lambda row: (QUANTISED.index(str(row["scheme"])), str(row["layout"]), str(row["candidate"])))
    judged = sum(int(str(row["of"])) for row in rows)
    passed = sum(row["outcomes"].get("PASS", 0) for row in rows)  # type: ignore[attr-defined]
    device = "cpu" if options.mode == "interpret" else modes.default_device()
    results.write(options.output, results.origin(device, options.output) | {"pass": passed, "of": judged, "rows": rows})
    print(f"{passed} of {judged} PASS")
    return 0 if judged and passed == judged else 1


if __name__ == "__main__":
    sys.exit(main())
