"""`moeproof shrink`: steps on standard error as they are accepted, the replay line last."""

from __future__ import annotations

import json as jsonlib
import sys

from moeproof.harness import workers
from moeproof.harness.cases.case import parse_case
from moeproof.harness.ranks import command
from moeproof.harness.shrinking.shrink import Step, shrink
from moeproof.reference.contract.errors import check


def main(line: str, candidate: str, seconds: float, runs: int, mode: str, transport: str, json: bool) -> int:
    """Exit code 1: the small case fails, as the large one did. Raises ContractError where nothing fails."""
    check(seconds > 0 and runs > 0, "the limits must be positive")
    case = parse_case(line)
    if case.ranks > 1:
        transport = command.choose(transport, case.ranks)
        command.settle(transport, mode)
    else:
        workers.settle(mode)
        workers.resolve([candidate])
    found = shrink(candidate, case, max_runs=runs, max_seconds=seconds, on_step=_print_step, transport=transport)
    print(str(found.verdict), file=sys.stderr)
    end = "" if found.complete else "; the limit ended it, more may be possible"
    print(f"{found.tokens} tokens after {found.runs} runs, {found.seconds:.1f} s{end}", file=sys.stderr)
    print(jsonlib.dumps(found.as_dict()) if json else found.replay)
    return 1


def _print_step(step: Step) -> None:
    print(step, file=sys.stderr, flush=True)
