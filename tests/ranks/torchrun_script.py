"""What test_torchrun.py has torchrun start: three runs, the last of which hangs on rank 1."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import rank_functions as functions

from moeproof.harness.ranks.torchrun import TorchrunWorld, launched

if __name__ == "__main__":
    assert launched()
    world = TorchrunWorld("gloo", deadline=20.0)
    runs = [world.run(functions.total, 3.0), world.run(functions.all_raise), world.run(functions.exchange, 2, 3)]
    if world.rank == 0:
        text = json.dumps([{"ending": r.ending.name, "results": r.results, "reason": r.reason} for r in runs])
        Path(sys.argv[1]).write_text(text)
    world.run(functions.stalls, 1, deadline=1.0)
