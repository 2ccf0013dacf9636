"""Verify every plan that the fused layer can choose, and every tile and strip the search may try, not only today's choice.

    PYTHONPATH=src python ci/every_plan.py [--only table|kinds] [--mode auto] [--jobs 1] [--output docs/results/every-plan.json]

Small cases with ragged sizes around the tiles' edges, through the judge. --only table leaves out what only the search tries,
--only kinds takes one plan of each kind beside the table. Exit code 0 when every verdict is PASS.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from moeproof.harness import modes
from moeproof.harness.cases.case import parse_case
from moeproof.harness.judging.judge import judge
from moeproof.harness.reports import results
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract.candidate import Candidate

TILE_CASES = (
    "T=33,H=136,I=72,E=5,K=3",
    "T=70,H=72,I=136,E=2,K=1,routing=minus1",
    "T=9,H=80,I=40,E=4,K=2,dtype=fp16,act=swigluoai,expert_bias=1,routing=dup",
    "T=16,H=64,I=64,E=6,K=2,values=sat,routing=empty",
)
"""Rows, columns and steps that end inside a tile; one slot a token, written at once; biases; exact arithmetic."""
STRIP_CASES = (
    "T=3,H=72,I=40,E=4,K=2,routing=dup",
    "T=1,H=40,I=72,E=4,K=1",
    "T=2,H=24,I=16,E=4,K=3,dtype=fp16,act=swigluoai,expert_bias=1,routing=minus1",
)
"""For few tokens, as they are chosen."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("table", "kinds"))
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    _start(options.mode)
    start = time.monotonic()
    texts = plans(options.only)
    work = [(text, line) for text in texts for line in (STRIP_CASES if text.startswith("v") else TILE_CASES)]
    if options.jobs == 1:
        verdicts = _verify(work)
    else:
        # A plan's cases stay together, in shares small enough to even out.
        shares = [
            [(text, line) for text, line in work if texts.index(text) % (4 * options.jobs) == i]
            for i in range(4 * options.jobs)
        ]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=_start, initargs=(options.mode,)) as pool:
            verdicts = [found for some in pool.map(_verify, shares) for found in some]
    for text, verdict in verdicts:
        if verdict.outcome is not Outcome.PASS:
            print(f"{text}\n{verdict}"[:600], flush=True)
    passed = sum(v.outcome is Outcome.PASS for _, v in verdicts)
    print(f"{len(texts)} plans: {passed} of {len(verdicts)} verdicts pass, {time.monotonic() - start:.0f} s")
    if options.output:
        record = results.origin(modes.default_device(), options.output) | {
            "plans": len(texts),
            "pass": passed,
            "of": len(verdicts),
        }
        results.write(options.output, record | {"verdicts": [_as_dict(text, v) for text, v in verdicts]})
    return 0 if verdicts and passed == len(verdicts) else 1


def _start(mode: str) -> None:
    torch.set_num_threads(1)
    modes.choose(mode)


def _verify(work: Sequence[tuple[str, str]]) -> list[tuple[str, Verdict]]:
    return [(text, judge(candidate(text), parse_case(line))) for text, line in work]


def _as_dict(text: str, v: Verdict) -> dict[str, object]:
    return {"plan": text, "case": str(v.case), "outcome": v.outcome.value, "worst_ratio": round(v.worst_ratio, 4)}


def plans(only: str | None) -> list[str]:
    """Lines of plans, overlapping launches included where the device has them."""
    from moeproof.optimized import search
    from moeproof.optimized.plans import Plan, fit, selectable

    found = selectable("sm90")
    if only == "kinds":
        found += [Plan.parse(f"{text} {text}") for texts in search.STARTS.values() for text in texts]
        found += [Plan(search.STRIPS[2], search.STRIPS[2], True), Plan.parse("16x64x128-g1-w4-s4 16x64x128-g1-w4-s4 overlap")]
        found.append(Plan.parse("16x64x128-g1-w4-s4-tma 16x64x128-g1-w4-s4-tma"))
        found.append(Plan.parse("128x256x64-g8-w8-s3-tma-p1-flat 128x256x64-g8-w8-s3-tma-p1-flat"))
    elif only is None:
        found += [Plan(tile, tile, overlap) for tile in search.TILES for overlap in (False, True)]
        found += [Plan(strip, strip, overlap) for strip in search.STRIPS for overlap in (False, True)]
    device = torch.device(modes.default_device())
    return list(dict.fromkeys(str(fit(plan, device)) for plan in found))


def candidate(text: str) -> Candidate:
    from moeproof.optimized.candidates import CLAIMS, TUNING

    return Candidate(name="triton-fused", run=lambda inputs: TUNING.run(inputs, text), claims=CLAIMS, backend="triton")


if __name__ == "__main__":
    sys.exit(main())
