"""Bad scales, codes and zero points: refused before anything runs, naming the tensor, what it is and what is allowed."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from moeproof.harness import interpreter
from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.quant_sample import QUANTISED
from moeproof.harness.judging.pairs import as_candidate
from moeproof.harness.judging.quant_campaign import CANDIDATES
from moeproof.optimized.cuda import toolkit
from moeproof.optimized.cuda.candidates import candidates as cuda_candidates
from moeproof.optimized.quant.candidates import quant_candidates
from moeproof.optimized.quant.prepare import QuantNoEPPrepareFinalize
from moeproof.reference.contract import SCHEMES, Candidate, Claims, ContractError, Inputs, Pair, Quantiser
from moeproof.reference.contract.schemes import ALL
from moeproof.reference.eager import candidates
from moeproof.reference.oracle import chain

Change = Callable[[Inputs], dict[str, torch.Tensor | None]]
Entry = Callable[[Inputs], object]


@functools.lru_cache
def _case(scheme: str, layout: str) -> Inputs:
    return make_inputs(parse_case(f"T=5,H=128,I=256,E=3,K=2,scheme={scheme},layout={layout},seed=1"))


def _filled(t: torch.Tensor | None, value: float) -> torch.Tensor:
    assert t is not None
    return torch.full_like(t, value)


BAD: dict[str, tuple[str, Change, str]] = {
    "shape": ("fp8_block", lambda i: {"w1_scale": i.w1_scale[:, :1]}, r"w1_scale is \(3, 1, 1\), must be \(3, 4, 1\)"),
    "majorness": (
        "mxfp8",
        lambda i: {"w2_scale": i.w2_scale.transpose(1, 2).contiguous()},
        r"w2_scale is \(3, 8, 128\), must be \(3, 128, 8\).*swapped",
    ),
    "dtype": ("fp8_token", lambda i: {"w1_scale": i.w1_scale.double()}, "w1_scale is torch.float64, must be torch.float32"),
    "mx dtype": ("mxfp8", lambda i: {"w1_scale": i.w1_scale.float()}, "w1_scale is torch.float32, must be torch.uint8"),
    "device": ("fp8_token", lambda i: {"w1_scale": i.w1_scale.to("meta")}, "w1_scale is on meta, must be on cpu"),
    "zero": ("fp8_token", lambda i: {"w1_scale": _filled(i.w1_scale, 0.0)}, r"w1_scale\[0, 0, 0\] is 0.0; scales must be pos"),
    "negative": ("int8_token", lambda i: {"w2_scale": _filled(i.w2_scale, -1.0)}, "w2_scale.* is -1.0; scales must be"),
    "nan": ("fp8_block", lambda i: {"w1_scale": _filled(i.w1_scale, float("nan"))}, "w1_scale.* is nan; scales must be"),
    "e8m0 nan": ("mxfp4_w4a16", lambda i: {"w1_scale": _filled(i.w1_scale, 255)}, "w1_scale.* is code 255"),
    "missing": ("fp8_token", lambda i: {"w1_scale": None}, r"w1_scale is None, must be \(3, 512, 1\) torch.float32"),
    "static missing": ("fp8_tensor_static", lambda i: {"a1_scale": None}, "a1_scale is None, must be"),
    "second static missing": ("fp8_tensor_static2", lambda i: {"a2_scale": None}, "a2_scale is None, must be"),
    "static zero": ("fp8_tensor_static", lambda i: {"a1_scale": _filled(i.a1_scale, 0.0)}, "a1_scale.* is 0.0"),
    "static and dynamic": ("fp8_token", lambda i: {"a1_scale": torch.ones(1, 1)}, "a1_scale was given.*the scheme is dynamic"),
    "per expert": ("nvfp4", lambda i: {"a2_scale": torch.ones(1, 1)}, r"a2_scale is \(1, 1\), must be \(3, 1, 1\)"),
    "global missing": ("nvfp4", lambda i: {"w1_global": None}, "w1_global is None, must be"),
    "zero points missing": ("int4_w4a16_zp_g32", lambda i: {"w1_zp": None}, "w1_zp is None, must be"),
    "zero points unpacked": (
        "int4_w4a16_zp_g32",
        lambda i: {"w1_zp": i.w1_zp.repeat_interleave(2, 1)},
        r"w1_zp is \(3, 512, 4\), must be \(3, 256, 4\)",
    ),
    "zero points of symmetric": (
        "int4_w4a16_g32",
        lambda i: {"w1_zp": torch.zeros(3, 256, 4, dtype=torch.uint8)},
        "w1_zp was given, must be None: int4 weights are symmetric",
    ),
    "unpacked codes": (
        "mxfp4_w4a16",
        lambda i: {"w1": i.w1.repeat_interleave(2, 2)},
        r"w1 is \(3, 512, 128\), must be \(3, 512, 64\)",
    ),
    "wrong fp8": ("fp8_token", lambda i: {"w1": i.w1.float().to(torch.float8_e5m2)}, "w1 is torch.float8_e5m2, must be"),
}  # fmt: skip


BEFORE_APPLY = {"_quantise", "_largest", "_count", "_place", "_move"}
"""A pair's prepare counts, moves and quantises rows of x before `apply` is given the weights."""


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates say what they would take on an H100 with a compiler: refusing needs neither."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(toolkit, "missing", lambda _: None)
    monkeypatch.setattr(toolkit, "architecture", lambda _: "sm90")


@pytest.mark.parametrize("layout", ["standard", "batched"])
@pytest.mark.parametrize("name", BAD)
def test_bad_quantised_arguments_are_refused_by_name(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, change, words = BAD[name]
    inputs = _case(scheme, layout)
    _all_refuse(_entries(scheme, layout, monkeypatch), replace(inputs, **change(inputs)), words)  # type: ignore[arg-type]


def _all_refuse(entries: dict[str, Entry], bad: Inputs, words: str) -> None:
    for entry in entries.values():
        with interpreter.sanitized() as log, pytest.raises(ContractError, match=words):
            entry(bad)

        assert {launch.kernel for launch in log.launches} <= BEFORE_APPLY


def _entries(scheme: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Entry]:
    """Everything that takes this scheme in this layout: oracle, eager, Triton's layers and pairs, fused, torch's, CUDA's."""
    problem = _case(scheme, layout).problem
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, "is_available", lambda: True)
        installed = [*candidates(), *quant_candidates(), *cuda_candidates()]
        every = [as_candidate(_on_a_laptop(c)) for c in installed if isinstance(c, (Candidate, Pair))]
        able = {c.name: c.run for c in every if "out" in c.shows and c.supports(problem) is None}
    return {"oracle": lambda inputs: chain(inputs, Claims()), **able}


def _on_a_laptop(c: Candidate | Pair) -> Candidate | Pair:
    """CUDA's experts behind Triton's prepare, which the interpreter runs."""
    if not isinstance(c, Pair) or c.backend != "cuda":
        return c
    return replace(c, prepare_finalize=lambda inputs: QuantNoEPPrepareFinalize(inputs.problem.quant))


@pytest.mark.parametrize("layout", ["standard", "batched"])
@pytest.mark.parametrize("scheme", QUANTISED)
def test_every_bad_scale_is_refused_by_every_entry(scheme: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, entries = _case(scheme, layout), _entries(scheme, layout, monkeypatch)
    for name in ("w1_scale", "w2_scale", "w1_global", "w2_global", "a1_scale", "a2_scale"):
        scale = getattr(inputs, name)
        # CUDA's experts do no scheme of two levels, and have no argument for global scales.
        asked = {n: e for n, e in entries.items() if scale is not None or "global" not in name or n != "cuda-fp8-modular"}
        for wrong, words in _wrong(name, scale) if scale is not None else _unasked(name):
            _all_refuse(asked, replace(inputs, **{name: wrong}), words)  # type: ignore[arg-type]

    assert len(entries) >= (4 if layout == "standard" else 3)


def _wrong(name: str, scale: torch.Tensor) -> Iterator[tuple[torch.Tensor | None, str]]:
    """(scale, words of the refusal) of every kind: missing, shape, majorness, dtype, device, values."""
    shape = tuple(scale.shape)
    yield None, f"{name} is None, must be {re.escape(str(shape))}"
    yield scale[:, :0], f"{name} is .*, must be {re.escape(str(shape))}"
    if scale.dim() > 1 and scale.size(-1) != scale.size(-2):
        yield scale.transpose(-1, -2).contiguous(), f"{name} is .* must be .*its last two dims are swapped"
    yield scale.float().double(), f"{name} is torch.float64, must be {scale.dtype}"
    yield scale.to("meta"), f"{name} is on meta, must be on cpu"
    last = (-1,) * scale.dim()
    for value in (255,) if scale.dtype == torch.uint8 else (0.0, -1.0, math.nan, math.inf):
        if scale.dtype == torch.float8_e4m3fn and value == math.inf:
            continue  # the format has none
        bad = scale.clone()
        bad[last] = value
        yield bad, rf"{name}\[.*\] is .*; scales must be"


def _unasked(name: str) -> Iterator[tuple[torch.Tensor | None, str]]:
    yield torch.ones(1, 1), f"{name} was given, must be None"


def test_entries_are_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each kind of candidate refuses is asked of all that there are."""
    entries = {name for s in QUANTISED for layout in ("standard", "batched") for name in _entries(s, layout, monkeypatch)}

    assert entries == {"oracle", "eager", "eager-stages", "eager-batched", *CANDIDATES}


@pytest.mark.parametrize("layout", ["standard", "batched"])
@pytest.mark.parametrize("scheme", ["fp8_token", "fp8_block", "int8_token", "mxfp8", "mxfp4_w4a4", "nvfp4"])
def test_scales_of_rows_that_prepare_should_not_hand_over_are_refused(scheme: str, layout: str) -> None:
    """Missing, or of another shape, majorness, dtype or device. Their values come from the rows, and are not read."""
    inputs = _case(scheme, layout)
    pairs = [_on_a_laptop(c) for c in (*candidates(), *quant_candidates(), *cuda_candidates()) if isinstance(c, Pair)]
    able = [c for c in pairs if isinstance(c, Pair) and c.supports(inputs.problem) is None]
    for pair in able:
        for kind in range(5):
            prepare_finalize, made = pair.prepare_finalize(inputs), []

            def altered(*arguments: Any, kind: int = kind, healthy: Any = prepare_finalize.prepare, made: Any = made) -> Any:
                codes, scale, *rest = healthy(*arguments)
                wrong = [w for w in _wrong("(hidden_states|a1q)_scale", scale) if "scales must be" not in w[1]]
                made.append(wrong[kind % len(wrong)])
                return (codes, made[0][0], *rest)

            prepare_finalize.prepare = altered  # type: ignore[method-assign]
            entry = as_candidate(replace(pair, prepare_finalize=lambda _, ours=prepare_finalize: ours))
            with pytest.raises(ContractError) as refused:
                entry.run(inputs)
            assert re.search(made[0][1], str(refused.value)), (pair.name, made[0][1], refused.value)

    assert len(able) >= 2


@pytest.mark.parametrize(("fmt", "columns"), [("int4", 33), ("uint4", 1), ("e2m1", 15)])
def test_odd_sizes_of_packed_formats_are_refused(fmt: str, columns: int) -> None:
    with pytest.raises(ContractError, match=f"w1 has {columns} columns; {fmt} packs 2 to a byte"):
        Quantiser(fmt, (1, ALL)).check_columns("w1", columns)


def test_groups_that_do_not_divide_are_refused_where_no_group_may_be_short() -> None:
    for scheme in QUANTISED:
        q = SCHEMES[scheme].w
        assert q is not None
        if q.ragged or q.group[1] == ALL:
            q.check_columns("w1", 200)
            continue
        with pytest.raises(ContractError, match=f"w1 has 200 columns, which groups of {q.group[1]} do not divide"):
            q.check_columns("w1", 200)
