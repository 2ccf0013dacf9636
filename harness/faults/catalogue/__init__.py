"""The public fault classes, one row each, in the order of docs/faults.md."""

from moeproof.harness.faults.catalogue import (
    act,
    collective,
    combine,
    config,
    dispatch,
    gemm,
    graph,
    memory,
    permute,
    quantise,
    router,
)
from moeproof.harness.faults.fault import Fault
from moeproof.reference.contract.errors import known

_FILES = (router, quantise, dispatch, permute, gemm, act, combine, collective, memory, graph, config)
CATALOGUE: tuple[Fault, ...] = tuple(sorted((f for m in _FILES for f in m.FAULTS), key=lambda f: int(f.id[1:])))


def by_id(name: str) -> Fault:
    """The class of this id (`P41`) or name (`gemm1.scale_window`)."""
    rows = {f.id: f for f in CATALOGUE} | {f.name: f for f in CATALOGUE}
    known("fault class", name, rows)
    return rows[name]


__all__ = ["CATALOGUE", "by_id"]
