"""Planted faults as a library: would your suite have caught this?

    from moeproof.harness.faults import ask
    print("\\n".join(str(a) for a in ask(my_check) if not a.caught))

`my_check(moe)` runs your test on a layer with the usual signature, and raises (or returns False) where it rejects it; see
docs/plugging-in.md. `moeproof faults --ask tests.py:my_check` does the same from the command line.
"""

from moeproof.harness.faults.ask import Answer, ask, ask_candidates, ask_router, route_of, usual
from moeproof.harness.faults.catalogue import CATALOGUE, by_id
from moeproof.harness.faults.fault import Fault, Witness, plant
from moeproof.harness.faults.pipeline import Pipeline, candidate

__all__ = [
    "CATALOGUE",
    "Answer",
    "Fault",
    "Pipeline",
    "Witness",
    "ask",
    "ask_candidates",
    "ask_router",
    "by_id",
    "candidate",
    "plant",
    "route_of",
    "usual",
]
