"""Bad scales, codes and zero points: refused before anything runs, naming the tensor, what it is and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moeproof.harness import interpreter
from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.judging.pairs import as_candidate
from moeproof.optimized.quant.candidates import quant_candidates
from moeproof.reference.contract import Candidate, ContractError, Inputs, Pair
from moeproof.reference.eager import candidates

Change = Callable[[Inputs], dict[str, torch.Tensor | None]]


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


@pytest.mark.parametrize("layout", ["standard", "batched"])
@pytest.mark.parametrize("name", BAD)
def test_bad_quantised_arguments_are_refused_by_name(name: str, layout: str) -> None:
    scheme, change, words = BAD[name]
    inputs = _case(scheme, layout)
    bad = replace(inputs, **change(inputs))  # type: ignore[arg-type]
    for entry in _entries(scheme, layout):
        with interpreter.sanitized() as log, pytest.raises(ContractError, match=words):
            entry.run(bad)

        # A pair's prepare counts, moves and quantises rows of x before `apply` is given the weights.
        assert {launch.kernel for launch in log.launches} <= {"_quantise", "_largest", "_count", "_place", "_move"}, entry.name


def _entries(scheme: str, layout: str) -> list[Candidate]:
    """Everything that takes this scheme in this layout: the eager stages, the Triton layer, the Triton pair."""
    every = [as_candidate(c) for c in (*candidates(), *quant_candidates()) if isinstance(c, (Candidate, Pair))]
    able = [c for c in every if "out" in c.shows and c.supports(_case(scheme, layout).problem) is None]
    assert len(able) >= 2
    return able
