"""Ranks that torchrun starts: the same results, and at the deadline every rank says where it is."""

from __future__ import annotations

import json
import os
import shlex
import socket
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


def recipe() -> list[str]:
    """The words of docs/ranks.md's line for several hosts."""
    page = (HERE.parents[1] / "docs" / "ranks.md").read_text(encoding="utf-8")
    block = page[page.index("torchrun --nnodes") :]
    return shlex.split(block[: block.index("```")].replace("\\\n", " "))


def test_the_recipe_of_the_page_with_two_agents() -> None:
    """Each agent stands for a host, here on one machine over gloo: rank 0 reports, the other's output is empty."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = {"HOST:29500": f"localhost:{port}", "8": "1", "nccl": "gloo"}
    words = [here.get(word, word) for word in recipe()]
    case = "T=16,H=32,I=16,E=5,K=2,ranks=2,spread=uneven,seed=3"
    tools = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "PATH": os.pathsep.join([tools, os.environ.get("PATH", "")]),
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [*words, "--case", case]
    hosts = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    ended = [host.communicate(timeout=170) for host in hosts]

    assert [host.returncode for host in hosts] == [0, 0], [err[-2000:] for _, err in ended]
    outputs = [out for out, _ in ended if out.strip()]
    assert len(outputs) == 1, "rank 0 alone reports"
    *verdicts, summary = map(json.loads, outputs[0].splitlines())
    assert {v["case"] for v in verdicts} == {case}
    assert summary["pass"] == sum(v["outcome"] == "PASS" for v in verdicts) > 0
    assert {v["outcome"] for v in verdicts} <= {"PASS", "UNSUPPORTED"}
