"""Verify every plan that the fused layer can choose, and every tile and strip the search may try, not only today's choice.

    PYTHONPATH=src python ci/every_plan.py [--scheme fp8_block] [--only table|kinds] [--jobs 1] [--output RESULTS.json]

Small cases with ragged sizes around the tiles' edges, through the judge. --only table leaves out what only the search tries,
--only kinds takes one plan of each kind beside the table. With --scheme the fused layers of that scheme; `-fast` at its end
means the tensor core's own sums of fp8 products. Exit code 0 when every verdict is PASS.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
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
QUANT_TILE_CASES = (
    "T=33,H=416,I=160,E=5,K=3",
    "T=70,H=160,I=288,E=2,K=1,routing=minus1",
    "T=9,H=288,I=128,E=4,K=2,act=swigluoai,expert_bias=1,routing=dup",
    "T=16,H=256,I=256,E=6,K=2,values=pin,routing=empty",
)
QUANT_STRIP_CASES = (
    "T=3,H=160,I=288,E=4,K=2,routing=dup",
    "T=1,H=288,I=160,E=4,K=1",
    "T=2,H=128,I=416,E=4,K=3,act=swigluoai,expert_bias=1,routing=minus1",
)
"""Widths of whole groups of 32, but not of 128; the exact probe of a scheme."""
ROLES_CASES = (
    "T=300,H=384,I=256,E=3,K=2",
    "T=70,H=256,I=128,E=2,K=1,routing=minus1",
    "T=90,H=256,I=640,E=5,K=3,routing=dup",
    "T=150,H=256,I=384,E=6,K=2,values=pin,routing=empty",
)
"""Warps have roles only where strips of 128 rows lie in one block of scales. Rings of copies that end in any stage."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="")
    parser.add_argument("--only", choices=("table", "kinds"))
    parser.add_argument("--plan", action="append", default=[], help="only this plan; may be repeated")
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    _start(options.mode)
    start = time.monotonic()
    scheme = options.scheme
    texts = options.plan or (quant_plans(scheme, options.only) if scheme else plans(options.only))
    work = [(text, line, scheme) for text in texts for line in cases(text, scheme)]
    if options.jobs == 1:
        verdicts = _verify(work)
    else:
        # A plan's cases stay together, in shares small enough to even out.
        shares = [[one for one in work if texts.index(one[0]) % (4 * options.jobs) == i] for i in range(4 * options.jobs)]
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


def _verify(work: Sequence[tuple[str, str, str]]) -> list[tuple[str, Verdict]]:
    return [(text, judge(candidate(text, scheme), parse_case(line))) for text, line, scheme in work]


def cases(text: str, scheme: str) -> list[str]:
    """Case lines of a plan."""
    if not scheme:
        return [*(STRIP_CASES if text.startswith("v") else TILE_CASES), *(ROLES_CASES if "roles" in text else ())]
    own = QUANT_STRIP_CASES if text.startswith("v") else QUANT_TILE_CASES
    own += ROLES_CASES if "roles" in text else ()
    return [f"{line},scheme={scheme.removesuffix('-fast')}" for line in own]


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


def quant_plans(scheme: str, only: str | None) -> list[str]:
    """Of the fused layers of one scheme: the table and the rule, and without `only` every tile and strip of the search."""
    from moeproof.optimized.plans import Plan, fit, selectable
    from moeproof.optimized.quant import search

    plain, fast = scheme.removesuffix("-fast"), scheme.endswith("-fast")
    found = [plan for plan in selectable("sm90", scheme) if plain != "mxfp4_w4a16" or "v" not in str(plan)]
    if only is None:
        for height in (16, 32, 64, 128, 256):
            first, second = (
                [t for t in search.tiles(plain, p) if t.block_m == height and (fast or not t.fast)] for p in ("first", "second")
            )
            longest = max(len(first), len(second)) if first and second else 0
            found += [Plan(first[i % len(first)], second[i % len(second)]) for i in range(longest)]
        if plain != "mxfp4_w4a16":
            found += [Plan(strip, strip, overlap) for strip in search.strips() for overlap in (False, True)]
    device = torch.device(modes.default_device())
    return list(dict.fromkeys(str(fit(plan, device)) for plan in found))


def candidate(text: str, scheme: str = "") -> Candidate:
    from moeproof.optimized.candidates import CLAIMS, TUNING

    if scheme:
        from moeproof.optimized.quant.candidates import quant_candidates

        name = "triton-mxfp4" if scheme.startswith("mxfp4") else "triton-fp8-fast" if "-fast" in scheme else "triton-fp8-fused"
        found = next(c for c in quant_candidates() if isinstance(c, Candidate) and c.name == name)
        tuning = found.tuning
        assert tuning is not None
        return replace(found, run=lambda inputs: tuning.run(inputs, text), tuning=None)
    return Candidate(name="triton-fused", run=lambda inputs: TUNING.run(inputs, text), claims=CLAIMS, backend="triton")


if __name__ == "__main__":
    sys.exit(main())
