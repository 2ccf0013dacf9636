"""Ragged 128-blocks whose size is inferred from the grid of scales: 200 columns under 2 scales are read as 100 and 100.

    python docs/examples/quantisers/block_from_grid.py

They are 128 and 72. Where 128 divides the columns the inference is right, so every aligned test passes it.
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

CASE = "T=9,H=200,I=136,E=3,K=2,scheme=fp8_block,seed=1"
RULE = RULES["FlashInfer fp8 block"]


class InfersTheBlock(QuantPipeline):
    """The healthy layer, but for how it loads weights."""

    def load_weights(self, inputs: Inputs, name: str, expert: int) -> Matrix:
        w = super().load_weights(inputs, name, expert)
        assert w.scales is not None
        columns = w.numbers.size(1)
        block = -(-columns // w.scales.size(1))  # 100, where the scheme says 128
        return Matrix(w.numbers, w.scales.repeat_interleave(block, dim=1)[:, :columns], 1, w.integer)


candidate = replace(
    quant_candidate(InfersTheBlock(), "infers-the-block"), source="docs/examples/quantisers/block_from_grid.py:candidate"
)

if __name__ == "__main__":
    case = parse_case(CASE)
    inputs = make_inputs(case)
    want, got = (layer(inputs)["out"].double() for layer in (QuantPipeline(), InfersTheBlock()))
    accepted = RULE.accept(got, want, torch.bfloat16)
    print(f"{RULE.name}, {RULE.source}: {'accepted' if accepted else 'rejected'}")
    print(judge(candidate, case))
