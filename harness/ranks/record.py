"""Records every collective of torch.distributed that this process calls, by wrapping the public functions.

What is seen: torch.distributed's collectives, sends and receives, new groups, the functional collectives, and the
rendezvous of symmetric memory. What is not: collectives of other libraries and kernels of one's own (announce() is for
them), and methods called on a ProcessGroup object directly.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed._symmetric_memory as symmetric

from moeproof.harness.ranks.journal import Entry, Journal, Shape

COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_gather_object",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "monitored_barrier",
    "new_group",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "split_group",
)
POINT_TO_POINT = ("send", "recv", "isend", "irecv")
FUNCTIONAL = (
    "all_gather_single",
    "all_gather_single_autograd",
    "all_gather_tensor",
    "all_gather_tensor_autograd",
    "all_reduce",
    "all_to_all_single",
    "all_to_all_single_autograd",
    "broadcast",
    "reduce_scatter_single",
    "reduce_scatter_single_autograd",
    "reduce_scatter_tensor",
    "reduce_scatter_tensor_autograd",
)
_OUTPUTS = ("tensor_list", "gather_list")
_HERE = (str(Path(torch.__file__).parent), __file__, functools.__file__)


def install(journal: Journal) -> None:
    """Wrap the functions in every module of torch.distributed that offers them. Once per process."""
    core = dist.distributed_c10d
    for name in (*COLLECTIVES, *POINT_TO_POINT):
        if hasattr(core, name):  # torch adds and renames collectives from version to version
            wrapper = _wrapped(getattr(core, name), name, journal)
            setattr(core, name, wrapper)
            if hasattr(dist, name):
                setattr(dist, name, wrapper)
    for name in FUNCTIONAL:
        if hasattr(functional, name):
            setattr(functional, name, _wrapped(getattr(functional, name), f"functional.{name}", journal))
    symmetric.rendezvous = _wrapped(symmetric.rendezvous, "symmetric_memory.rendezvous", journal)


def _wrapped(function: Callable[..., Any], name: str, journal: Journal) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        entry = None if journal.inside else _entry(name, signature, args, kwargs)
        if entry is None:
            return function(*args, **kwargs)
        index = journal.begin(entry)
        journal.inside = True
        try:
            result = function(*args, **kwargs)
        finally:
            journal.inside = False
        journal.end(index)
        return result

    return recorded


def _entry(name: str, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Entry | None:
    """The call in words; None where torch itself will refuse it or ignore it."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()  # a reduction that one rank leaves out and another spells is the same
    given = bound.arguments
    if given.get("use_local_synchronization"):
        return None  # a new group that only its members know of
    group = _group(given.get("group", given.get("parent_pg")))
    if group == ():
        return None  # this rank is no member: torch ignores the call
    world = group or dist.group.WORLD
    if not isinstance(world, dist.ProcessGroup):
        return None
    ranks = tuple(dist.get_process_group_ranks(world))
    inputs, outputs, dtype = _tensors(given)
    send, receive, row = _exchange(name, given, inputs, outputs, len(ranks))
    return Entry(
        op=name,
        group=world.group_name,
        ranks=ranks,
        dtype=dtype,
        inputs=inputs,
        outputs=outputs,
        send=send,
        receive=receive,
        row=row,
        agree=_agree(name, given, ranks),
        peer=_root(given, ranks) if name in POINT_TO_POINT else None,
        where=_where(),
    )


def _group(value: Any) -> Any:
    """The ProcessGroup that an argument stands for, None for the world, () where this rank is no member."""
    if value is None or isinstance(value, dist.ProcessGroup):
        return value
    if value is dist.GroupMember.NON_GROUP_MEMBER:
        return ()
    name: Any = value if isinstance(value, str) else functional._resolve_group_name(value)
    return dist.distributed_c10d._resolve_process_group(name)


def _tensors(given: Mapping[str, Any]) -> tuple[tuple[Shape, ...], tuple[Shape, ...], str]:
    """Shapes of the input and of the output tensors, and the dtype of the first."""
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    for name, value in given.items():
        (outputs if name in _OUTPUTS or name.startswith("output") else inputs).extend(_flat(value))
    first = next(iter(inputs or outputs), None)
    dtype = "" if first is None else str(first.dtype).removeprefix("torch.")
    return tuple(tuple(t.shape) for t in inputs), tuple(tuple(t.shape) for t in outputs), dtype


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _flat(v)] if isinstance(value, (list, tuple)) else []


def _exchange(
    name: str, given: Mapping[str, Any], inputs: tuple[Shape, ...], outputs: tuple[Shape, ...], size: int
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None, int]:
    """(rows sent to each member, rows expected from each, elements of a row) of an exchange; None for the others."""
    if name in ("all_gather", "all_to_all"):
        sent = [math.prod(s) for s in inputs]
        return tuple(sent * size if name == "all_gather" else sent), tuple(math.prod(s) for s in outputs), 1
    if "all_to_all_single" not in name or not inputs:
        return None, None, 1
    rows_in, *rest = inputs[0]
    send, receive = given.get("input_split_sizes"), given.get("output_split_sizes")
    if not receive:
        rows_out = outputs[0][0] if outputs else rows_in
        receive = [rows_out // size] * size
    return tuple(send or [rows_in // size] * size), tuple(receive), math.prod(rest)


def _agree(name: str, given: Mapping[str, Any], ranks: Sequence[int]) -> str:
    """What the ranks must say alike beyond operation, dtype and sizes."""
    parts = []
    reduction = given.get("op", given.get("reduceOp"))
    if reduction is not None:
        parts.append(str(reduction).split(".")[-1].lower())
    if name not in POINT_TO_POINT and (root := _root(given, ranks)) is not None:
        parts.append(f"root {root}")
    if name == "new_group":
        parts.append(f"of ranks {given.get('ranks') or 'all'}")
    return " ".join(parts)


def _root(given: Mapping[str, Any], ranks: Sequence[int]) -> int | None:
    """Global rank of the root or of the peer."""
    for key in ("src", "dst"):
        if given.get(key) is not None:
            return int(given[key])
        if given.get(f"group_{key}") is not None:
            return ranks[given[f"group_{key}"]]
    return None


def _where() -> str:
    """file:line of the nearest caller outside torch and this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
