"""No rank, and nothing that a rank started, outlives the pool or the pool's process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_functions as functions

from moeproof.harness.ranks import Ending, RankPool

SCRIPT = """
import sys
import rank_functions as functions
from moeproof.harness.ranks import RankPool
if __name__ == "__main__":
    RankPool(2, deadline=600.0).run(functions.leaves_a_child, sys.argv[1])
"""


def alive(pid: int) -> bool:
    """A zombie, whoever should bury it, is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def survivors(pids: list[int], seconds: float) -> list[int]:
    """Those of the processes that live after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(alive(pid) for pid in pids):
        time.sleep(0.02)
    return [pid for pid in pids if alive(pid)]


def pids_of(folder: Path, ranks: int, seconds: float = 60.0) -> list[int]:
    """Pids of the ranks and of their children, once all are written."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        texts = [(folder / f"rank{r}").read_text() if (folder / f"rank{r}").exists() else "" for r in range(ranks)]
        if all(len(t.split()) == 2 for t in texts):
            return [int(pid) for t in texts for pid in t.split()]
        time.sleep(0.05)
    pytest.fail("the ranks did not start")


def test_a_hung_pool_takes_along_what_its_ranks_started(tmp_path: Path) -> None:
    with RankPool(2, deadline=1.0) as pool:
        run = pool.run(functions.leaves_a_child, str(tmp_path))

        assert run.ending is Ending.HUNG
        assert survivors(pids_of(tmp_path, 2), 5.0) == []


def test_closing_ends_idle_ranks() -> None:
    pool = RankPool(3)
    pool.warm_up()
    pids = pool.pids
    folder = pool._members[0].folder
    assert all(alive(pid) for pid in pids) and folder.exists()
    pool.close()

    assert survivors(pids, 5.0) == []
    assert not folder.exists()


def test_a_forgotten_pool_ends_its_ranks() -> None:
    pool = RankPool(2)
    pool.warm_up()
    pids = pool.pids
    del pool

    assert survivors(pids, 5.0) == []


def test_ranks_end_with_the_process_of_their_pool(tmp_path: Path) -> None:
    """Rank 0 holds the interpreter's lock for ever, rank 1 waits in a barrier, both have started a child."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    pids = pids_of(tmp_path, 2)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    ranks, children = pids[::2], pids[1::2]

    assert survivors(ranks, 10.0) == []
    assert survivors(children, 10.0) == []
