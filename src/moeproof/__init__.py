"""moeproof: proves Mixture-of-Experts kernels right. The front door is `verify(my_moe).raise_for_failures()`."""

from typing import TYPE_CHECKING, Any

from moeproof._version import __version__

if TYPE_CHECKING:
    from moeproof.harness.api import Report, verify
    from moeproof.harness.cases.case import Case, parse_case
    from moeproof.reference.contract import Candidate, Claims, ContractError, Inputs, Pair, Problem

__all__ = [
    "Candidate",
    "Case",
    "Claims",
    "ContractError",
    "Inputs",
    "Pair",
    "Problem",
    "Report",
    "__version__",
    "parse_case",
    "verify",
]

_HOME = {
    "verify": "moeproof.harness.api",
    "Report": "moeproof.harness.api",
    "Case": "moeproof.harness.cases.case",
    "parse_case": "moeproof.harness.cases.case",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: the pytest plugin imports this package in every pytest run of a user, who may not want torch.
    if name not in __all__:
        raise AttributeError(f"module 'moeproof' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME.get(name, "moeproof.reference.contract")), name)
