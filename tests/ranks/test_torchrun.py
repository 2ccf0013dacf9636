"""Ranks that torchrun starts: the same results, and at the deadline every rank says where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from moeproof.harness.ranks import Ending, Entry
from moeproof.harness.ranks.journal import Story
from moeproof.harness.ranks.runner import Reply
from moeproof.harness.ranks.torchrun import _concluded
from moeproof.harness.ranks.wire import dumps

HERE = Path(__file__).parent
REDUCE = Entry("all_reduce", "0", (0, 1), "float32", ((4,),), agree="sum", finished=True)


def test_runs_and_the_end_of_a_hang(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    start = time.monotonic()
    done = subprocess.run(
        [*command, str(HERE / "torchrun_script.py"), str(tmp_path / "runs.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    seconds = time.monotonic() - start
    total, raised, exchange = json.loads((tmp_path / "runs.json").read_text())

    assert (total["ending"], total["results"]) == ("DONE", [7.0, 7.0])
    assert raised["ending"] == "RAISED"
    assert raised["reason"].startswith("rank 0 raised: ValueError: no such scheme on rank 0")
    assert "rank 1 (pid " in raised["reason"]
    assert (exchange["ending"], exchange["results"]) == ("DONE", [[0.0, 1.0]] * 2), "they were still in step"
    assert done.returncode != 0
    assert "moeproof: TIMEOUT on" in done.stderr
    assert "no end within the deadline of 1 s" in done.stderr
    assert seconds < 110


def test_all_replies_in_hand_conclude_as_in_a_pool() -> None:
    returned = [(11 + r, Reply(result=dumps(r)), Story("COMBINE", (REDUCE,))) for r in (0, 1)]
    run = _concluded(returned, [5, 6], 0.1)
    assert (run.ending, run.results, run.seeds) == (Ending.DONE, (0, 1), (5, 6))

    other = (12, returned[1][1], Story("COMBINE", (replace(REDUCE, agree="max"),)))
    run = _concluded([returned[0], other], [5, 6], 0.1)
    assert (run.ending, run.rank) == (Ending.MISMATCH, 1)
    assert "'max' against 'sum'" in run.reason

    refusals = [
        (11, Reply(error="ContractError: rank 1 refused: too many tokens", refused=True), Story()),
        (12, Reply(error="ContractError: too many tokens", refused=True), Story()),
    ]
    run = _concluded(refusals, [5, 6], 0.1)
    assert (run.ending, run.rank, run.refused) == (Ending.RAISED, 1, True)
    assert run.headline == "rank 1 refused its arguments: ContractError: too many tokens"
