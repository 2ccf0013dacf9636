"""The contract of every pair for several ranks over one transport: each routing and spread, histories, relations, dtypes.

    python ci/rank_contract.py [--transport gloo] [--ranks 1 ..] [--schemes] [--output docs/results/rank-contract-gloo.json]

A pair for quantised layers alone has them in the first scheme of FIRST that it can. With --schemes also a case of every scheme
that quantises, with uneven and empty ranks by turns. Each is a whole judgement: poisoned memory, guard bands, repeats, the
oracle on every rank. Exit code 0 where all passed.
tests/ranks/test_rank_judge.py runs a part.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.ranks import command
from moeproof.harness.ranks.session import RankSession
from moeproof.harness.registry import find_crossed_pairs, find_rank_pairs
from moeproof.harness.reports import results
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import SCHEMES, ContractError, RankPair

SIZES = "T=9,H=20,I=13,E=7,K=3"
CASES = {
    "uniform": "values=sat",
    "all to one expert": "values=sat,routing=hot",
    "holes": "values=sat,routing=minus1,spread=uneven",
    "an expert named twice": "values=sat,routing=dup,spread=uneven",
    "nothing routed": "values=sat,routing=none",
    "a rank without tokens": "values=sat,spread=empty",
    "all tokens on one rank": "values=sat,routing=minus1,spread=one",
    "no token anywhere": "values=sat,T=0",
    "round robin": "values=sat,placement=round_robin,spread=uneven",
    "replicas": "values=sat,routing=zipf,redundant=4",
    "fp16": "values=hetero,dtype=fp16,spread=uneven",
    "fp32": "dtype=fp32,routing=dup",
    "strided, in place": "strided=1,inplace=1,spread=uneven",
    "weight on the input": "K=1,weight_on_input=1,spread=uneven",
    "biases": "expert_bias=1,spread=uneven",
    "other calls in between, a late rank": "values=sat,history=interleave,spread=uneven",
    "replayed with other inputs": "values=sat,history=graph",
    "tokens on other ranks": "values=sat,relation=ranks,routing=minus1,spread=uneven",
    "tensor-parallel shards": "tp=2,routing=minus1,spread=uneven",
    "sequence-parallel shards": "tp=2,sp=1,routing=minus1,spread=uneven",
}


FIRST = ("none", "fp8_token", "int8_token")
GROUPS = "T=9,H=72,I=40,E=7,K=3"
"""Sizes for those: codes in pairs, and shards of I that a group divides."""
SPREADS = ("routing=minus1,spread=uneven", "routing=dup,spread=empty", "routing=hot,spread=one")


def cases(pair: RankPair, ranks: int, schemes: bool) -> dict[str, Case]:
    """Those that so many ranks can have."""
    found: dict[str, Case] = {}
    possible = [s for s in FIRST if (case := _case(pair, ranks, f"scheme={s}", GROUPS)) and pair.supports(case.world) is None]
    first = possible[0] if possible else "none"
    for reason, extra in CASES.items():
        quantised = f"{extra},scheme={first}".replace("values=sat", "values=hetero")
        if case := _case(pair, ranks, extra) if first == "none" else _case(pair, ranks, quantised, GROUPS):
            found[reason] = case
    for number, (name, scheme) in enumerate(SCHEMES.items() if schemes else ()):
        width = max(scheme.w.group[1], 64) if scheme.quantised else 0
        extra = f"scheme={name},values=groups,seed={number},{SPREADS[number % len(SPREADS)]}"
        if scheme.quantised and (case := _case(pair, ranks, extra, f"T=33,H={width},I={width},E=9,K=3")):
            found[f"scheme {name}"] = case
    return found


def _case(pair: RankPair, ranks: int, extra: str, sizes: str = SIZES) -> Case | None:
    """None where so many ranks cannot have it: replicas with shards that do not divide, and the like."""
    options = {"layout": pair.layout, "ranks": str(ranks), "seed": "5"}
    options |= dict(part.split("=", 1) for part in f"{sizes},{extra}".split(","))
    try:
        case = parse_case(",".join(f"{key}={value}" for key, value in options.items()))
        case.world  # noqa: B018  (raises where the ranks cannot share the problem)
    except ContractError:
        return None
    return case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", default="gloo")
    parser.add_argument("--ranks", type=int, action="append", help="may be repeated; 2, 3 and 4 by default")
    parser.add_argument("--deadline", type=float, default=30.0)
    parser.add_argument("--backend", default="", help="only pairs of this backend: torch, triton or cuda")
    parser.add_argument("--layout", default="", help="only pairs of this layout: standard or batched")
    parser.add_argument("--pairs", nargs="+", default=[], help="only pairs of these names")
    parser.add_argument("--crossed", action="store_true", help="each pair with each single-rank pair's experts instead")
    parser.add_argument("--schemes", action="store_true", help="also a case of every scheme that quantises")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    command.settle(options.transport, "auto")
    pairs = find_crossed_pairs() if options.crossed else find_rank_pairs()
    pairs = [p for p in pairs if options.backend in ("", p.backend) and options.layout in ("", p.layout)]
    pairs = [p for p in pairs if not options.pairs or p.name in options.pairs]
    if options.crossed:
        pairs = [p for p in pairs if options.transport in p.transports]
    outcomes: dict[str, Counter[str]] = {}
    not_run, wrong = Counter[str](), []
    checked, longest, start = 0, 0.0, time.monotonic()
    for ranks in options.ranks or (2, 3, 4):
        session = RankSession(ranks, options.transport, options.deadline)
        for pair in pairs:
            tally = outcomes.setdefault(f"{pair.name}, {ranks} ranks", Counter())
            for reason, case in cases(pair, ranks, options.schemes).items():
                verdict = session.judge(pair.name, pair, case)
                tally[str(verdict.outcome)] += 1
                checked, longest = checked + verdict.checked, max(longest, verdict.seconds)
                if verdict.outcome is Outcome.UNSUPPORTED:
                    not_run[f"{reason}: {verdict.reason.splitlines()[0]}"] += 1
                elif verdict.outcome is not Outcome.PASS:
                    wrong.append({"reason": reason, "verdict": str(verdict)})
                    print(f"{reason}: {verdict}"[:1500], file=sys.stderr, flush=True)
            print(f"{pair.name}, {ranks} ranks: {dict(tally)}", file=sys.stderr, flush=True)
        session.close()
    total = sum(outcomes.values(), Counter[str]())
    device = "cpu" if options.transport in ("simulated", "gloo") else "cuda"
    record: dict[str, Any] = results.origin(device, options.output) | {
        "transport": options.transport,
        "gpus": torch.cuda.device_count() if device == "cuda" else 0,
        "verdicts": dict(total),
        "facts_checked": checked,
        "longest_verdict_s": round(longest, 3),
        "by_pair": {name: dict(tally) for name, tally in outcomes.items()},
        "not_run": dict(not_run.most_common()),
        "wrong": wrong,
        "seconds": round(time.monotonic() - start, 1),
    }
    print(json.dumps({k: v for k, v in record.items() if k not in ("by_pair", "not_run")}, indent=1))
    if options.output:
        results.write(options.output, record)
    return 0 if total["PASS"] and not wrong else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
