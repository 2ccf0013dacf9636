"""Formats and schemes as data: rows that agree with the standards and cannot contradict themselves."""

from __future__ import annotations

import pytest

from moeproof.reference.contract import FORMATS, SCHEMES, ContractError, Problem
from moeproof.reference.contract.schemes import ALL, Quantiser

STANDARD = {
    # name: (max, least positive, smallest normal, bias), read off the standards
    "fp16": (65504.0, 2.0**-24, 2.0**-14, 15),
    "bf16": (3.3895313892515355e38, 2.0**-133, 2.0**-126, 127),
    "e4m3fn": (448.0, 2.0**-9, 2.0**-6, 7),
    "e4m3fnuz": (240.0, 2.0**-10, 2.0**-7, 8),
    "e5m2": (57344.0, 2.0**-16, 2.0**-14, 15),
    "e8m0": (2.0**127, 2.0**-127, 2.0**-127, 127),
    "e2m1": (6.0, 0.5, 1.0, 1),
    "e3m2": (28.0, 2.0**-4, 2.0**-2, 3),
    "e2m3": (7.5, 0.125, 1.0, 1),
}


@pytest.mark.parametrize("name", STANDARD)
def test_formats_state_what_the_standard_states(name: str) -> None:
    f = FORMATS[name]

    assert (f.max, f.least, 2.0**f.emin, f.bias) == STANDARD[name]


def test_integers_are_formats_with_an_ulp_of_one() -> None:
    assert {n: (FORMATS[n].min, FORMATS[n].max, FORMATS[n].least) for n in ("int8", "int4", "uint4")} == {
        "int8": (-128.0, 127.0, 1.0),
        "int4": (-8.0, 7.0, 1.0),
        "uint4": (0.0, 15.0, 1.0),
    }


def test_every_scale_shape_of_the_contract() -> None:
    """docs/contract.md S08 and S19."""
    shapes = {
        "fp8_tensor": ((1, 1), (3, 1, 1)),
        "fp8_token": ((5, 1), (3, 300, 1)),
        "fp8_block": ((5, 3), (3, 3, 3)),
    }
    for name, (activation, weight) in shapes.items():
        s = SCHEMES[name]
        assert s.a1 is not None and s.w is not None
        assert s.a1.scale_shape(5, 260) == activation
        assert s.w.scale_shape(3, 300, 260) == weight
    assert SCHEMES["mxfp4_w4a4"].w.code_shape(3, 300, 64) == (3, 300, 32)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"H": 96, "I": 64, "scheme": "int4_w4a16_g64"}, "w1 has 96 columns, which groups of 64 do not divide"),
        ({"H": 64, "I": 40, "scheme": "mxfp8"}, "h has 40 columns, which groups of 32 do not divide"),
        ({"H": 64, "I": 64, "scheme": "fp7"}, "scheme 'fp7' is not known"),
        ({"H": 64, "I": 64, "scheme": "fp8_token", "latent": 32}, "latent with scheme=fp8_token"),
    ],
)
def test_sizes_that_a_scheme_cannot_hold_are_refused(line: dict[str, object], words: str) -> None:
    with pytest.raises(ContractError, match=words):
        Problem(T=4, E=4, K=2, **line)  # type: ignore[arg-type]


def test_a_static_scale_for_groups_is_refused() -> None:
    with pytest.raises(ContractError, match="static"):
        Quantiser("e4m3fn", (1, ALL), static=True)
