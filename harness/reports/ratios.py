"""`moeproof ratios`: how close the bounds of every scheme sit to the errors of healthy candidates.

Two figures a stage. `stored` is observed/allowed of what a candidate stores, as every verdict reports it: near 1 by nature,
because half an ulp of the output is both allowed and common. `sum` leaves that rounding out: float32 sums of the eager
stages over the bound A of the sum alone. Far below 1 means room for hardware that truncates, and for faults. `sum_exact`
counts the elements beside them that are proved exact and compared bit for bit: nearly all, where codes have few bits.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from moeproof.harness import modes, workers
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.quant_sample import QUANTISED, draw_quantised
from moeproof.harness.judging.judge import judge
from moeproof.harness.registry import load_candidates
from moeproof.harness.reports import results
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract.candidate import Candidate, Claims
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.eager import quant_layer
from moeproof.reference.oracle.experts import input_rows, live_slots, local_ids
from moeproof.reference.oracle.products import decoded, grouped, plain
from moeproof.reference.oracle.quant_stages import quant1, quant1_input

LAYOUTS = ("standard", "batched")


def sum_ratio(inputs: Inputs) -> tuple[float, int, int]:
    """(largest |float32 sum - exact| / A over GEMM1, elements with a bound, elements proved exact), before any rounding."""
    p = inputs.problem
    wide = replace(inputs, problem=replace(p, dtype="fp32"))
    if not bool(live_slots(inputs).any()):
        return 0.0, 0, 0
    x = plain(input_rows(inputs, inputs.hidden_states), p.fmt)
    if p.quant.a1 is not None:
        x = decoded(quant1(inputs)).in_slots(inputs.topk_ids.shape[1])
    exact, error = grouped(inputs, "w1", x, inputs.b1, Claims(), p.N)
    got = quant_layer.run(wide, quant1_input(inputs).float(), local_ids(inputs))["gate_up"].double()
    live = live_slots(inputs)[..., None]
    bounded = (error > 0) & live
    ratio = torch.where(bounded, (got - exact).abs() / error.clamp(min=1e-300), 0.0)
    return float(ratio.max()), int(bounded.sum()), int(((error == 0) & live).sum())


def measure(candidates: list[Candidate], scheme: str, cases: int) -> dict[str, object]:
    """Outcomes and worst ratios of the candidates over `cases` random cases of a scheme in each layout."""
    outcomes: Counter[str] = Counter()
    stored: dict[str, float] = {}
    worst_sum, elements, proved, pins = 0.0, 0, 0, 0
    failures: list[str] = []
    for layout in LAYOUTS:
        for seed in range(cases):
            # Every fifth case is the exact probe: there the ratio must be 0, so it is counted and not mixed in.
            pin = seed % 5 == 4
            case = draw_quantised(seed, scheme, layout, "pin" if pin else None)
            pins += pin
            for candidate in candidates:
                verdict = judge(candidate, case)
                outcomes[verdict.outcome.value] += 1
                for name, ratio in verdict.worst.items():
                    stored[name] = max(stored.get(name, 0.0), ratio)
                if verdict.outcome not in (Outcome.PASS, Outcome.UNSUPPORTED):
                    failures.append(f"{candidate.name}: {case}")
            ratio, count, exact = sum_ratio(make_inputs(case)) if layout == "standard" else (0.0, 0, 0)
            worst_sum, elements, proved = max(worst_sum, ratio), elements + count, proved + exact
    return {
        "scheme": scheme,
        "cases": cases * len(LAYOUTS),
        "probes": pins,
        "outcomes": dict(sorted(outcomes.items())),
        "stored": {name: round(ratio, 4) for name, ratio in sorted(stored.items())},
        "sum": round(worst_sum, 4),
        "sum_elements": elements,
        "sum_exact": proved,
        "failures": failures,
    }


def main(names: list[str], schemes: list[str], cases: int, output: Path | None, mode: str, as_json: bool) -> int:
    """Measure, print one line a scheme, and write the table. Exit code 1 where a healthy candidate did not pass."""
    modes.choose(mode)
    check(cases >= 1, f"cases={cases} must be at least 1")
    candidates = load_candidates(workers.resolve(names))
    start = time.perf_counter()
    rows, failed = [], 0
    for scheme in schemes or QUANTISED:
        row = measure(candidates, scheme, cases)
        rows.append(row)
        failed += bool(row["failures"])
        line = json.dumps(row) if as_json else f"{scheme:<20} {row['outcomes']} sum {row['sum']} stored {row['stored']}"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    summary = results.origin(modes.default_device(), output) | {
        "seconds": round(time.perf_counter() - start, 1),
        "schemes": len(rows),
        "schemes_with_failures": failed,
    }
    if output is not None:
        results.write(output, summary | {"rows": rows})
    sys.stdout.write(json.dumps(summary) + "\n")
    return 1 if failed else 0
