"""Every pair for several ranks on random worlds of 2 to 64 simulated ranks: no false alarm, every refusal with its reason.

    python ci/simulated_ranks.py [--count 300] [--output docs/results/simulated-ranks.json]

One call of a pair on one world is one judgement; all ranks' tensors are judged (harness.ranks.checks). tests/ranks runs a part.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.world_sample import world_sample
from moeproof.harness.cases.worlds import make_world_inputs, whole_case
from moeproof.harness.ranks.checks import WorldExpectation, judge_world
from moeproof.harness.ranks.pairs import run_rank, support
from moeproof.harness.registry import find_rank_pairs
from moeproof.harness.reports import results
from moeproof.reference.contract import ContractError, RankPair
from moeproof.reference.eager.ranks_link import on_threads

TIMEOUT = 120.0


def judge(pair: RankPair, case: Case) -> tuple[str, int, float, str]:
    """(outcome, facts checked, worst ratio, reason)."""
    reason = support(pair, case.world, "simulated")
    if reason:
        return "unsupported", 0, 0.0, reason
    inputs = make_world_inputs(case)
    shown = on_threads(case.ranks, lambda link: run_rank(pair, [inputs[link.rank]], case.world, link), TIMEOUT)
    if case.routing == "beyond" and any(isinstance(r, ContractError) for r in shown):
        return "unsupported", 0, 0.0, "refuses ids >= E, as it may"
    errors = [f"{type(r).__name__}: {r}" for r in shown if isinstance(r, Exception)]
    if errors:
        return "error", 0, 0.0, errors[0]
    expect = WorldExpectation(case.world, make_inputs(whole_case(case)), pair.claims, pair.quant1)
    judged = judge_world(expect, [rank[0] for rank in shown])
    checked, ratio = sum(c.checked for c in judged.values()), max(c.ratio for c in judged.values())
    findings = [str(f) for c in judged.values() for f in c.findings]
    return ("fail", checked, ratio, findings[0]) if findings else ("pass", checked, ratio, "")


def traits(case: Case) -> list[str]:
    """What is unusual about a world."""
    grid, p = case.world.grid, case.problem
    found = {
        "experts not divisible by groups": grid.experts % grid.ep > 0,
        "round robin": p.placement == "round_robin",
        "linear": p.placement == "linear",
        "redundant experts": case.redundant > 0,
        "tensor-parallel": case.tp > 1 and not case.sp,
        "sequence-parallel": case.tp > 1 and bool(case.sp),
        "data x expert x tensor parallel": case.tp > 1 and grid.ep > 1,
        "batched": p.layout == "batched",
        "quantised": p.quant.quantised,
        "a rank without tokens": 0 in case.world.tokens,
    }
    return [name for name, holds in found.items() if holds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [pair for pair in find_rank_pairs() if pair.backend == "torch" and "simulated" in pair.transports]
    outcomes, reasons, ranks, covered = Counter[str](), Counter[str](), Counter[int](), Counter[str]()
    checked, worst, start = 0, 0.0, time.perf_counter()
    for case in world_sample(options.count, options.start):
        for pair in pairs:
            outcome, facts, ratio, reason = judge(pair, case)
            outcomes[outcome] += 1
            checked, worst = checked + facts, max(worst, ratio)
            if outcome == "unsupported":
                reasons[reason.split(":")[0].split(",")[0]] += 1
            else:
                ranks[case.ranks] += 1
                covered.update(traits(case))
                covered.update(f"{trait}, 64 ranks" for trait in traits(case) if case.ranks == 64)
            if outcome in ("fail", "error"):
                print(f"{outcome} {pair.name} on {case}: {reason}", flush=True)
    record = results.origin("cpu", options.output) | {
        "worlds": options.count,
        "pairs": [pair.name for pair in pairs],
        **{name: outcomes[name] for name in ("pass", "fail", "error", "unsupported")},
        "facts_checked": checked,
        "worst_ratio": round(worst, 4),
        "judged_by_ranks": {str(n): ranks[n] for n in sorted(ranks)},
        "judged_with": dict(covered.most_common()),
        "unsupported_because": dict(reasons.most_common()),
        "seconds": round(time.perf_counter() - start, 1),
        "threads_per_rank": 1,
    }
    print(json.dumps(record, indent=1))
    if options.output:
        results.write(options.output, record)
    return 1 if outcomes["fail"] or outcomes["error"] or not outcomes["pass"] else 0


if __name__ == "__main__":
    sys.exit(main())
