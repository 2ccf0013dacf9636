"""`moeproof ratios`: how close the bounds of every scheme sit to the errors of healthy candidates.

Three figures. `stored` is observed/allowed of what candidates store, as every verdict reports it: near 1 by nature, because
half an ulp of the output is both allowed and common. `sums` are those of the products gate_up and y in the same cases as fp32
problems, for each candidate with the accumulator that it claims: there the output's rounding hides nothing. `sum` is that of
float32 sums (the eager stages, operands of the problem's dtype) over the bound of the default claim. Far below 1 means room
for hardware that truncates, and for faults. `sum_exact` counts the elements beside them that are proved exact and compared
bit for bit: nearly all, where codes have few bits.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moeproof.harness import modes, workers
from moeproof.harness.cases.case import Case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.quant_sample import QUANTISED
from moeproof.harness.judging.judge import judge_lean
from moeproof.harness.judging.quant_campaign import PRODUCTS, draw
from moeproof.harness.registry import load_candidates
from moeproof.harness.reports import results
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract.candidate import Candidate, Claims
from moeproof.reference.contract.errors import check, known
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import LAYOUTS
from moeproof.reference.eager import quant_layer
from moeproof.reference.oracle.experts import input_rows, live_slots, local_ids
from moeproof.reference.oracle.products import decoded, grouped, plain
from moeproof.reference.oracle.quant_stages import quant1, quant1_input

MOST_JOBS = 16
"""On a GPU: each worker has a context of its own there."""


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


def _cases(scheme: str, layout: str, count: int, mode: str) -> Iterator[tuple[str, Case]]:
    """(what it is for, case): `stored` and `sums` of each random case, and each probe once: there the ratio must be 0.

    The campaign's, which share what a kernel is compiled for; dtype and width come in two kinds only.
    """
    for seed in range(count):
        case = draw(scheme, layout, seed, mode)
        if case.values == "pin":
            yield "probe", case
            continue
        for what, dtype in (("stored", "bf16"), ("sums", "fp32")):
            yield what, replace(case, problem=replace(case.problem, dtype=dtype))


def measure(candidates: list[Candidate], scheme: str, layout: str, cases: int, mode: str) -> dict[str, Any]:
    """Outcomes and worst ratios over `cases` random cases of a scheme in a layout, of the candidates that do them."""
    outcomes: Counter[str] = Counter()
    stored: dict[str, float] = {}
    sums: dict[str, dict[str, float]] = {}
    worst_sum, elements, proved, pins = 0.0, 0, 0, 0
    failures: list[str] = []
    for what, case in _cases(scheme, layout, cases, mode):
        pins += what == "probe"
        for candidate in candidates:
            verdict = judge_lean(candidate, case)
            if verdict.outcome is Outcome.UNSUPPORTED:
                continue
            outcomes[verdict.outcome.value] += 1
            for name, ratio in verdict.worst.items():
                own = sums.setdefault(candidate.name, {}) if what == "sums" and name in PRODUCTS else stored
                own[name] = max(own.get(name, 0.0), round(ratio, 4))
            if verdict.outcome not in (Outcome.PASS, Outcome.VACUOUS):
                failures.append(f"{candidate.name}: {case}")
        if what == "stored" and layout == "standard":
            ratio, count, exact = sum_ratio(make_inputs(case))
            worst_sum, elements, proved = max(worst_sum, round(ratio, 4)), elements + count, proved + exact
    row = {"scheme": scheme, "layout": layout, "cases": cases, "probes": pins, "outcomes": dict(sorted(outcomes.items()))}
    row |= {"stored": dict(sorted(stored.items())), "sums": sums}
    if layout == "standard":
        row |= {"sum": worst_sum, "sum_elements": elements, "sum_exact": proved}
    return row | {"failures": failures}


def page(records: Sequence[dict[str, Any]]) -> str:
    """docs/ratios.md, from results files alone: per scheme and layout the sums of each candidate, largest of gate_up and y."""
    names = [str(record["device"]) for record in records]
    rows: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for row in record["rows"]:
            best = {name: max(sums.values(), default=0.0) for name, sums in row["sums"].items()}
            text = ", ".join(f"{name} {ratio:.2g}" for name, ratio in best.items())
            rows.setdefault((row["scheme"], row["layout"]), []).append(text or "-")
    assert all(len(texts) == len(records) for texts in rows.values())
    lines = [f"| {scheme} | {layout} | {' | '.join(texts)} |" for (scheme, layout), texts in rows.items()]
    head = ["scheme", "layout", *names]
    return "\n".join([*PAGE, f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *lines]) + "\n"


PAGE = (
    "# How close the bounds sit",
    "",
    "Largest observed/allowed of the sums of GEMM1 and GEMM2, healthy candidates on fp32 problems (where no rounding of the",
    "output hides them), each under the accumulator that it claims. Written from results/quant_ratios_cpu.json and",
    "results/quant_ratios_h100.json, which `moeproof ratios` makes. 0: all elements were proved exact and agreed bit for bit.",
    "1 would be a false alarm waiting to happen. What is stored in 16 bits stands at 0.99 and more of its bound in every",
    "scheme, because half an ulp is both allowed and common.",
    "",
    "Float32 sums in any order stand at 0.02 to 0.3: their bound is that of tensor cores, which truncate, always toward zero,",
    "and reach 0.74 of it (accumulators.md). Sums of fp8 below 0.001 are those of small blocks under the claim of promotion,",
    "which they no longer make (tolerances.md).",
    "",
)


_candidates: list[Candidate] = []


def _start(names: list[str], mode: str, turns: Any) -> None:
    """In each worker: its mode, its GPU, the candidates."""
    if workers.settle(mode) == "device":
        torch.cuda.set_device(turns.get())
    _candidates[:] = load_candidates(names)


def _measure(scheme: str, layout: str, cases: int, mode: str) -> dict[str, Any]:
    return measure(_candidates, scheme, layout, cases, mode)


def rows(names: list[str], schemes: list[str], cases: int, mode: str, jobs: int) -> Iterator[dict[str, Any]]:
    """A row for each scheme and layout, as they come."""
    work = [(scheme, layout, cases, mode) for scheme in schemes for layout in LAYOUTS]
    if jobs == 1:
        candidates = load_candidates(names)
        yield from (measure(candidates, *item) for item in work)
        return
    context = multiprocessing.get_context("spawn")  # a process in which Triton is not yet imported
    turns = context.SimpleQueue()
    for job in range(jobs):
        turns.put(job % max(torch.cuda.device_count(), 1))
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(names, mode, turns)) as pool:
        yield from (future.result() for future in as_completed([pool.submit(_measure, *item) for item in work]))


def main(names: list[str], schemes: list[str], cases: int, output: Path | None, mode: str, jobs: int, as_json: bool) -> int:
    """Measure, print one line a row, and write the table as it grows. Exit code 1 where a healthy candidate did not pass."""
    mode = modes.choose(mode)
    check(cases >= 1, f"cases={cases} must be at least 1")
    for scheme in schemes:
        known("quantised scheme", scheme, QUANTISED)
    jobs = jobs or min(os.cpu_count() or 1, MOST_JOBS)
    start, origin = time.perf_counter(), results.origin(modes.default_device(), output)
    order = [(scheme, layout) for scheme in schemes or QUANTISED for layout in LAYOUTS]
    found: list[dict[str, Any]] = []
    summary: dict[str, object] = {}
    for row in rows(workers.resolve(names), schemes or list(QUANTISED), cases, mode, min(jobs, len(order))):
        found.append(row)
        name = f"{row['scheme']} {row['layout']}"
        line = json.dumps(row) if as_json else f"{name:<26} {row['outcomes']} sums {row['sums']} stored {row['stored']}"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        failed = [r["scheme"] for r in found if r["failures"]]
        summary = origin | {"seconds": round(time.perf_counter() - start, 1), "measured": len(found), "failed": len(failed)}
        if output is not None:
            table = sorted(found, key=lambda r: order.index((r["scheme"], r["layout"])))
            results.write(output, summary | {"rows": table})
    sys.stdout.write(json.dumps(summary) + "\n")
    return 1 if summary["failed"] else 0
