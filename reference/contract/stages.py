"""The stage table: the order of the pipeline, the tensors each stage hands on, and how each is judged.

Canonical coordinates: row (t, k) is "token t in its k-th slot", whatever the memory order was. Legend: T tokens, K slots,
E experts, e local experts, H hidden, N = 2I or I, I intermediate, P padded rows, B blocks.
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
            {"rows": "eCH", "expert_num_tokens": "e"},
            "bits and bijection: each live slot exactly once, nothing else",
        ),
        StageRow(
            Stage.PERMUTE,
            ("topk_ids",),
            {"sorted_slots": "P", "block_expert": "B", "num_padded": "1"},
            "exact invariants: each live slot once, each block one expert",
        ),
        StageRow(Stage.GEMM1, ("hidden_states", "w1"), {"gate_up": "TKN"}, "bounded"),
        StageRow(Stage.ACT, ("gate_up",), {"h": "TKI"}, "bounded"),
        StageRow(Stage.QUANT2, ("h",), {"hq": "TKI", "hs": "TKG"}, "bits given h"),
        StageRow(Stage.GEMM2, ("h", "w2"), {"y": "TKH"}, "bounded"),
        StageRow(Stage.COMBINE, ("y", "topk_weights"), {"out": "TH"}, "bounded"),
    )
}

TENSORS: dict[str, Stage] = {name: row.stage for row in STAGES.values() for name in row.shows}
"""Every canonical tensor name and the stage that makes it."""
