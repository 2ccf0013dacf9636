"""S15: the seed's `activation` method, which every experts class has."""

import math

import pytest
import torch
from contract_kit import DEVICE, case, every_part

from moeproof.reference.contract import Pair

GATES = (-4.0, -2.7, -1.0, 0.0, 0.5, 3.0)
UPS = (1.0, -2.0, 4.0, 0.5, -1.0, 8.0)


def run(part: Pair, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    experts = part.experts(case(part.layout))
    x = torch.tensor([GATES + UPS, UPS + GATES], device=DEVICE).to(dtype)
    kept = x.clone()
    output = torch.full((2, 6), float("nan"), dtype=dtype, device=DEVICE)

    assert experts.activation(name, output, x) is None
    assert torch.equal(x, kept)
    return output.double().cpu()


@every_part
def test_s15_silu_of_the_first_half_times_the_second(part: Pair) -> None:
    want = [g / (1 + math.exp(-g)) * u for g, u in zip(GATES, UPS, strict=True)]

    assert run(part, "silu")[0].tolist() == pytest.approx(want, rel=2.0**-20)


@every_part
def test_s15_gelu_is_the_erf_form(part: Pair) -> None:
    """The tanh form is 4.7e-4 away at -2.7."""
    want = [0.5 * g * math.erfc(-g / math.sqrt(2)) * u for g, u in zip(GATES, UPS, strict=True)]

    assert run(part, "gelu")[0].tolist() == pytest.approx(want, rel=2.0**-20, abs=2.0**-20)


@every_part
def test_s15_the_result_is_rounded_once_to_the_outputs_dtype(part: Pair) -> None:
    exact = torch.tensor([torch.tensor(g).bfloat16().double().item() for g in GATES], dtype=torch.float64)
    ups = torch.tensor(UPS, dtype=torch.float64)
    want = (exact / (1 + torch.exp(-exact)) * ups).bfloat16().double()

    assert torch.equal(run(part, "silu", torch.bfloat16)[0], want)


@every_part
@pytest.mark.parametrize("name", ["gelu_tanh", "relu2", "silu_no_mul", "swigluoai", "", "SILU"])
def test_s15_any_other_name_is_a_value_error(part: Pair, name: str) -> None:
    with pytest.raises(ValueError, match="activation"):
        run(part, name)


@every_part
@pytest.mark.parametrize("width", [5, 7, 12])
def test_s15_input_must_be_twice_as_wide_as_output(part: Pair, width: int) -> None:
    experts = part.experts(case(part.layout))
    with pytest.raises(ValueError, match=f"output has {width} columns and input 12"):
        experts.activation("silu", torch.empty(2, width, device=DEVICE), torch.zeros(2, 12, device=DEVICE))


@every_part
def test_s15_a_strided_output_is_written_where_it_lies(part: Pair) -> None:
    experts = part.experts(case(part.layout))
    wide = torch.full((2, 9), 5.0, device=DEVICE)

    experts.activation("silu", wide[:, 1:7], torch.zeros(2, 12, device=DEVICE))

    assert (wide[:, 1:7] == 0).all()
    assert (wide[:, 0] == 5).all()
    assert (wide[:, 7:] == 5).all()
