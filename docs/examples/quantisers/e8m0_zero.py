"""e8m0 code 0 decoded as 0: a float32 made by shifting the code into the exponent field. It means 2^-127; e8m0 has no zero.

    python docs/examples/quantisers/e8m0_zero.py

Random normals never get that scale, so no tolerance sees it. The probe `values=least` has groups of x and of both weights that
do, beside operands large enough to make 1 of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.faults.quant_pipeline import QuantPipeline, quant_candidate
from moeproof.harness.faults.rules import RULES
from moeproof.harness.judging.judge import judge
from moeproof.reference.contract import Inputs
from moeproof.reference.eager.quantise import Matrix

USUAL, CASE = (f"T=9,H=128,I=96,E=3,K=2,scheme=mxfp8,{values}seed=1" for values in ("", "values=least,"))
RULE = RULES["triton_kernels mx"]


class ShiftsTheCode(QuantPipeline):
    """The healthy layer, but for how it decodes the scales of weights."""

    def load_weights(self, inputs: Inputs, name: str, expert: int) -> Matrix:
        w, stored = super().load_weights(inputs, name, expert), getattr(inputs, f"{name}_scale")[expert]
        return replace(w, scales=(stored.to(torch.int32) << 23).view(torch.float32))


candidate = replace(
    quant_candidate(ShiftsTheCode(), "shifts-the-code"), source="docs/examples/quantisers/e8m0_zero.py:candidate"
)

if __name__ == "__main__":
    inputs = make_inputs(parse_case(USUAL))
    want, got = (layer(inputs)["out"].double() for layer in (QuantPipeline(), ShiftsTheCode()))
    accepted = RULE.accept(got, want, torch.bfloat16)
    print(f"{RULE.name}, {RULE.source}, on random normals: {'accepted' if accepted else 'rejected'}")
    print(judge(candidate, parse_case(CASE)))
