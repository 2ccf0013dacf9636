"""Find cases that cover every pair of values of two axes (harness/cases/axes.py), and store them. Takes some minutes.

    python ci/cover.py [harness/cases/covering.json]

Run it after a change to the axes; the cases follow from them alone. Pairs that one rank without a GPU can run come first, in
cases that it can run.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from moeproof.harness.cases.axes import ANYWHERE, AXES, build, possible
from moeproof.harness.cases.pairwise import cover


def main(output: Path) -> int:
    start = time.perf_counter()
    here, hopeless = cover(ANYWHERE, possible)
    print(f"{len(here)} cases for one rank without a GPU after {time.perf_counter() - start:.0f} s", flush=True)
    more, rest = cover(AXES, possible, seed=1, given=here)
    print(f"{len(more)} more after {time.perf_counter() - start:.0f} s; no case for {[*hopeless, *rest]}")
    lines = [str(build(row, seed)) for seed, row in enumerate([*here, *more])]
    output.write_text(json.dumps(lines, indent=0) + "\n", encoding="utf-8")
    return int(bool(hopeless or rest))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "harness/cases/covering.json")))
