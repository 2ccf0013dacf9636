"""The stage table: the order of the pipeline, the tensors each stage hands on, and how each is judged.

Canonical coordinates: row (t, k) is "token t in its k-th slot", whatever the memory order was. Legend: T tokens, K slots,
E experts, e local experts, H hidden, N = 2I or I, I intermediate, P padded rows, B blocks, C rows per expert, G scale groups.

Quantised tensors, with q1 = scheme.a1 and q2 = scheme.a2 (reference.contract.schemes):

    xq  q1.code_shape(T, H)      codes of x, in q1's dtype (the columns halve where two codes share a byte)
    xs  q1.scale_shape(T, H)     tensor (1, 1), token (T, 1), group (T, G); float32, uint8 (e8m0) or float8_e4m3fn
    hq  q2.code_shape(T, K, I)   codes of h
    hs  tensor (1, 1, 1), token (T, K, 1), group (T, K, G)

What QUANT1 quantises is hidden_states, all T rows of it, weighted (and rounded to the problem's dtype) where the weight is on
the input. QUANT2 quantises h as it is shown: in the problem's dtype, or float32 where a kernel never rounds it. A dynamic
scale for a whole tensor takes the amax of all T rows of x, and of the live (token, slot) rows of h on this rank. In the
batched layout `rows` holds the codes and `row_scales` the scales of the same rows: (e, 1, 1), (e, C, 1) or (e, C, G). On
several ranks the words above hold for each of them: where QUANT1 stands is a word of candidate.QUANT1, h is what the rank
computes of the pairs it received, and with tensor-parallel shards a scale of a token of h is that of the shard's columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Stage(str, Enum):
    ROUTE = "ROUTE"
    QUANT1 = "QUANT1"
    DISPATCH = "DISPATCH"
    PERMUTE = "PERMUTE"
    GEMM1 = "GEMM1"
    ACT = "ACT"
    QUANT2 = "QUANT2"
    GEMM2 = "GEMM2"
    COMBINE = "COMBINE"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class StageRow:
    stage: Stage
    takes: tuple[str, ...]
    """What it reads; unquantised, xq is hidden_states and hq is h."""
    shows: dict[str, str]
    """Canonical tensors of the stage, by name, with their dims."""
    judged: str


STAGES: dict[Stage, StageRow] = {
    r.stage: r
    for r in (
        StageRow(
            Stage.ROUTE,
            ("logits",),
            {"topk_ids": "TK", "topk_weights": "TK"},
            "ids as a set with a tie margin, weights bounded",
        ),
        StageRow(Stage.QUANT1, ("hidden_states",), {"xq": "TH", "xs": "TG"}, "bits"),
        StageRow(
            Stage.DISPATCH,
            ("hidden_states", "topk_ids"),
            {"rows": "eCH", "row_scales": "eCG", "expert_num_tokens": "e"},
            "bits and bijection: each live slot exactly once, nothing else",
        ),
        StageRow(
            Stage.PERMUTE,
            ("topk_ids",),
            {"sorted_slots": "P", "block_expert": "B", "num_padded": "1"},
            "exact invariants: each live slot once, each block one expert",
        ),
        StageRow(Stage.GEMM1, ("xq", "xs", "w1"), {"gate_up": "TKN"}, "bounded"),
        StageRow(Stage.ACT, ("gate_up",), {"h": "TKI"}, "bounded"),
        StageRow(Stage.QUANT2, ("h",), {"hq": "TKI", "hs": "TKG"}, "bits given h"),
        StageRow(Stage.GEMM2, ("hq", "hs", "w2"), {"y": "TKH"}, "bounded"),
        StageRow(Stage.COMBINE, ("y", "topk_weights"), {"out": "TH"}, "bounded"),
    )
}

TENSORS: dict[str, Stage] = {name: row.stage for row in STAGES.values() for name in row.shows}
"""Every canonical tensor name and the stage that makes it."""
