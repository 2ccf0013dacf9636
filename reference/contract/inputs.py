"""What a candidate is given: the tensors of one case."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch

from moeproof.reference.contract.problem import Problem


@dataclass(frozen=True)
class Inputs:
    """All tensors of one call, on one device. None where the problem has no such tensor.

    Floating tensors are in the problem's dtype unless said otherwise. `e` counts the experts whose weights this rank
    holds (all of them for ep=1); ids are always global.
    """

    problem: Problem
    hidden_states: torch.Tensor
    """(T, H)."""
    topk_ids: torch.Tensor
    """(T, K) int32 by default; [0, E) global, -1 = not routed, [E, E+Z) identity experts. Duplicates are legal."""
    topk_weights: torch.Tensor
    """(T, K) float32, any sign and scale; undefined (may be NaN) where the id is -1."""
    w1: torch.Tensor
    """(e, N, H); gate rows first, or interleaved where the activation says so. Strided where storage=KN.

    Quantised: the codes, in the dtype of the scheme's format and shape scheme.w.code_shape(e, N, H): float8 and int8 one
    per element; e2m1, int4 and uint4 as uint8 (e, N, H/2), low nibble = even column; e3m2 and e2m3 as uint8 (e, N, H),
    in the low six bits. int4 is offset binary (code - 8); uint4 has a zero point.
    """
    w2: torch.Tensor
    """(e, H, I), quantised as w1 is: scheme.w.code_shape(e, H, I)."""
    b1: torch.Tensor | None = None
    """(e, N)."""
    b2: torch.Tensor | None = None
    """(e, H)."""
    expert_map: torch.Tensor | None = None
    """int32 (E,): local index or -1. None for ep=1."""
    logits: torch.Tensor | None = None
    """(T, E + zero experts) float32: the input of ROUTE."""
    correction_bias: torch.Tensor | None = None
    """(E + zero experts,) float32."""
    expert_scale: torch.Tensor | None = None
    """(E,) float32."""
    table_ids: torch.Tensor | None = None
    """(T, K) int32: the ids that a token-id table gives."""
    shared_w1: torch.Tensor | None = None
    """(2S or S, H): the shared expert's gate/up rows, packed like w1."""
    shared_w2: torch.Tensor | None = None
    """(H, S)."""
    shared_gate: torch.Tensor | None = None
    """(H,)."""
    latent_up: torch.Tensor | None = None
    """(H, latent): the up-projection after the experts."""
    latent_down: torch.Tensor | None = None
    """(latent, H): the down-projection before the experts."""
    latent_norm: torch.Tensor | None = None
    """(latent,): weight of the RMSNorm of the routed sum."""
    w1_scale: torch.Tensor | None = None
    """Scales of w1, multiplicative, scheme.w.scale_shape(e, N, H): tensor (e, 1, 1), channel (e, N, 1), block
    (e, ceil(N/128), ceil(H/128)), group g (e, N, H/g). float32; the problem's dtype for int4 groups; uint8 (e8m0 codes) for
    mx; float8_e4m3fn for nvfp4."""
    w2_scale: torch.Tensor | None = None
    """The same of w2: scheme.w.scale_shape(e, H, I)."""
    w1_zp: torch.Tensor | None = None
    """uint8 (e, N/2, G): zero points 0..15 of w1, two along N (low nibble = even row), w = (q - zp) * scale. Only *_zp_*."""
    w2_zp: torch.Tensor | None = None
    """uint8 (e, H/2, G)."""
    w1_global: torch.Tensor | None = None
    """float32 (e, 1, 1): the second level of a two-level scale; multiplies where the rule is two_level_decode, divides where
    it is two_level_encode. The seed's `apply` has no argument for it: constructors take it from here."""
    w2_global: torch.Tensor | None = None
    """float32 (e, 1, 1)."""
    a1_scale: torch.Tensor | None = None
    """float32 (1, 1): the static scale of x, or its global scale where the rule is two-level. None = dynamic."""
    a2_scale: torch.Tensor | None = None
    """float32 (1, 1): the static scale of h, or (e, 1, 1), one per local expert, its global scale. None = dynamic."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every tensor that this case has."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor):
                yield f.name, value

    def map(self, change: dict[str, torch.Tensor]) -> Inputs:
        """A copy with some tensors replaced."""
        return replace(self, **change)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return self.hidden_states.device
