"""Three spellings of one fp8 formula: x / (amax / 448), x * (1 / (amax / 448)) and x * (448 / amax).

    python docs/examples/quantisers/fp8_spellings.py

The same in exact arithmetic; in float32 up to one code in a thousand differs by a whole step, 12.5% of its value. A scheme
names its spelling (`moeproof policies`), and its codes are compared as bits.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.faults.quant_pipeline import Coded, QuantPipeline, quant_candidate
from moeproof.harness.faults.rules import RULES
from moeproof.harness.judging.judge import judge
from moeproof.reference.contract import Quantiser

CASE = "T=65,H=256,I=128,E=3,K=2,scheme=fp8_token,seed=1"
RULE = RULES["DeepGEMM fp8"]
SPELLINGS = {"reciprocal": "x * (1 / (amax / 448))", "inverse": "x * (448 / amax)"}
"""Of the scheme table's quotients; fp8_token says `divide`, x / (amax / 448)."""


class Spells(QuantPipeline):
    """The healthy layer, but for the spelling of QUANT1's quotient."""

    def __init__(self, quotient: str) -> None:
        self.quotient = quotient

    def quant1(self, x: torch.Tensor, q: Quantiser, given: torch.Tensor | None) -> Coded:
        return super().quant1(x, replace(q, quotient=self.quotient), given)


HERE = "docs/examples/quantisers/fp8_spellings.py"
reciprocal, inverse = (replace(quant_candidate(Spells(q), q), source=f"{HERE}:{q}") for q in SPELLINGS)

if __name__ == "__main__":
    case = parse_case(CASE)
    inputs = make_inputs(case)
    right = QuantPipeline()(inputs)
    for candidate, (quotient, formula) in zip((reciprocal, inverse), SPELLINGS.items(), strict=True):
        got = Spells(quotient)(inputs)
        other = (got["xq"].view(torch.uint8) != right["xq"].view(torch.uint8)).double().mean()
        accepted = RULE.accept(got["out"].double(), right["out"].double(), torch.bfloat16)
        print(f"{formula}: {float(other):.2%} of the codes differ")
        print(f"{RULE.name}, {RULE.source}: {'accepted' if accepted else 'rejected'}")
        print(judge(candidate, case))
