"""e2m1 codes whose ties are rounded away from zero, or toward it: 2.5 becomes 3, or 2, where to even it is 2 and 3.5 is 4.

    python docs/examples/quantisers/e2m1_ties.py

The OCP MX formats round ties to even, as the hardware's conversion does. Both other rules are live in libraries that users mix
(docs/tolerances.md): with 8 bits of bf16 under a power of two, one value in 64 or so lies on a tie.
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
from moeproof.reference.eager.quantise import quantise

CASE = "T=9,H=256,I=128,E=3,K=2,scheme=mxfp4_w4a4,seed=1"
RULE = RULES["FlashInfer trtllm-gen"]


class RoundsTies(QuantPipeline):
    """The healthy layer, but that x is moved by less than any step of bf16 before it is rounded to codes."""

    def __init__(self, outward: bool) -> None:
        self.nudge = 1 + (2.0**-20 if outward else -(2.0**-20))

    def quant1(self, x: torch.Tensor, q: Quantiser, given: torch.Tensor | None) -> Coded:
        right = super().quant1(x, q, given)
        return Coded(quantise(x.double() * self.nudge, q, x.dtype, given)[0], right.scales)


HERE = "docs/examples/quantisers/e2m1_ties.py"
away = replace(quant_candidate(RoundsTies(outward=True), "ties-away"), source=f"{HERE}:away")
toward_zero = replace(quant_candidate(RoundsTies(outward=False), "ties-toward-zero"), source=f"{HERE}:toward_zero")

if __name__ == "__main__":
    case = parse_case(CASE)
    inputs = make_inputs(case)
    want = QuantPipeline()(inputs)["out"].double()
    for candidate, outward in ((away, True), (toward_zero, False)):
        accepted = RULE.accept(RoundsTies(outward)(inputs)["out"].double(), want, torch.bfloat16)
        print(f"{RULE.name}, {RULE.source}: {'accepted' if accepted else 'rejected'}")
        print(judge(candidate, case))
