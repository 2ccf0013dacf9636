"""Four processes over gloo for the whole session: groups of 1, 2, 3 and 4 of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rank_worker

DEADLINE = 30.0


class GlooPool:
    """run(function, ranks, *arguments) -> what each rank answered: ("ok", result) or (exception's name, its text)."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=rank_worker.serve, args=(rank, size, str(folder / "store"), theirs), daemon=True, name=f"rank{rank}"
            )
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)
        assert [self._receive(rank) for rank in range(size)] == ["ready"] * size

    def run(self, function: Callable[..., Any], ranks: int, *arguments: Any) -> list[tuple[str, Any]]:
        for pipe in self.pipes[:ranks]:
            pipe.send((function, ranks, arguments))
        return [self._receive(rank) for rank in range(ranks)]

    def results(self, function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
        answers = self.run(function, ranks, *arguments)
        failed = [(rank, answer) for rank, answer in enumerate(answers) if answer[0] != "ok"]
        assert not failed, failed
        return [result for _, result in answers]

    def _receive(self, rank: int) -> Any:
        assert self.pipes[rank].poll(DEADLINE), f"rank {rank} gave no answer within {DEADLINE} s"
        return self.pipes[rank].recv()

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(DEADLINE)
            if process.is_alive():
                process.kill()
        assert [p.exitcode for p in self.processes] == [0] * len(self.processes)
