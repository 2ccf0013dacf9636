"""`moeproof faults --ask tests.py:check_moe`: a team's own check against the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from moeproof.harness.faults.ask import Answer, ask
from moeproof.harness.faults.catalogue import CATALOGUE, by_id
from moeproof.harness.registry import load_function
from moeproof.harness.reports.report import console, print_json


def main(check: str, classes: Sequence[str], json: bool) -> int:
    """Print what the check lets through. 0 where nothing was, 1 where something was, 3 where it triggered nothing."""
    chosen = [by_id(name) for name in classes] or CATALOGUE
    answers = []
    for answer in ask(load_function(check, "check"), chosen):
        answers.append(answer)
        if json:
            print_json(asdict(answer))
        elif not answer.caught:
            console(json).print(str(answer), markup=False)
    found = summary(answers)
    if json:
        print_json(found)
    else:
        console(json).print(", ".join(f"{key.replace('_', ' ')} {n}" for key, n in found.items()), markup=False)
    return 1 if found["let_through"] else 0 if found["caught"] else 3


def summary(answers: Sequence[Answer]) -> dict[str, object]:
    return {
        "asked": len(answers),
        "caught": sum(a.caught for a in answers),
        "let_through": sum(a.fired and not a.caught for a in answers),
        "never_triggered": sum(not a.fired for a in answers),
    }
