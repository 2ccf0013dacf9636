"""Find cases that cover every pair of values of two axes (harness/cases/axes.py), and store them. Takes some minutes.

    python ci/cover.py [harness/cases/covering.json]

Run it after a change to the axes; the cases follow from them alone. Pairs that one rank without a GPU can run come first, in
cases that it can run, and of these none that the vacuity gate refuses: a pair that only such a case has is no pair covered.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from moeproof.harness.cases.axes import ANYWHERE, AXES, build, possible, row_of
from moeproof.harness.cases.case import Case
from moeproof.harness.cases.pairwise import cover
from moeproof.harness.faults.pipeline import Pipeline, candidate
from moeproof.harness.faults.quant_pipeline import QuantPipeline, quant_candidate
from moeproof.harness.judging.checks import vacuity, values
from moeproof.harness.judging.judge import judge
from moeproof.harness.judging.memory import PATTERNS
from moeproof.harness.verdict import Outcome

TURNS = 5
"""Searches for other cases in place of those that cannot see, before a pair is left to one of them."""


def blind(case: Case) -> bool:
    """Whether the gate refuses the case to a healthy layer that shows everything."""
    thing = quant_candidate(QuantPipeline()) if case.problem.quant.quantised else candidate(Pipeline())
    return judge(thing, case, "cpu", PATTERNS[:1], (values, vacuity)).outcome is Outcome.VACUOUS


def main(output: Path) -> int:
    start = time.perf_counter()
    here: list[Case] = []
    tried = 0
    with ProcessPoolExecutor() as pool:
        for turn in range(TURNS):
            rows, hopeless = cover(ANYWHERE, possible, turn, map(row_of, here))
            found = [build(row, tried + number) for number, row in enumerate(rows)]
            tried += len(found)
            here += found if turn == TURNS - 1 else [c for c, no in zip(found, pool.map(blind, found), strict=True) if not no]
            print(f"{len(here)} of {tried} cases for one rank without a GPU, {time.perf_counter() - start:.0f} s", flush=True)
    rows, rest = cover(AXES, possible, TURNS, map(row_of, here))
    more = [build(row, tried + number) for number, row in enumerate(rows)]
    print(f"{len(more)} more after {time.perf_counter() - start:.0f} s; no case for {[*hopeless, *rest]}")
    output.write_text(json.dumps([str(case) for case in [*here, *more]], indent=0) + "\n", encoding="utf-8")
    return int(bool(hopeless or rest))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "harness/cases/covering.json")))
