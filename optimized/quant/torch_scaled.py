"""The fp8_token layer on torch's own scaled grouped product (CUTLASS): plain torch from quantisation to combine.

An independent second implementation: it shares no code with the Triton path.
"""

from __future__ import annotations

import torch

from moeproof.optimized.torch_grouped import ALIGNMENT, _local_experts, activation, finish
from moeproof.reference.contract.formats import FORMATS
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.quant_checks import check_inputs

Tensor = torch.Tensor
SCHEME = "fp8_token"
E4M3, FLOOR = FORMATS["e4m3fn"], 1e-10

_scaled_grouped_mm = getattr(torch, "_scaled_grouped_mm", None)


def unsupported(problem: Problem) -> str | None:
    """Why torch's scaled grouped product cannot do this problem on this machine, or None."""
    p = problem
    if p.scheme != SCHEME:
        return f"torch's scaled grouped product scales rows and channels: scheme {SCHEME} only"
    if _scaled_grouped_mm is None:
        return "this torch has no _scaled_grouped_mm"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "torch's scaled grouped product needs an NVIDIA GPU of compute capability 9.0"
    if p.dtype != "bf16":
        return f"torch's scaled grouped product gives bf16 only, not {p.dtype}"
    if p.layout != "standard":
        return "this candidate works in the standard layout"
    if p.expert_bias:
        return "torch's scaled grouped product adds no bias before it rounds"
    if p.weight_on_input:
        return "torch rounds a float64 product to bf16 twice, so weighted codes would sometimes be the wrong ones"
    for name, width in (("H", p.H), ("I", p.I), ("N", p.N)):
        if width % ALIGNMENT:
            return f"torch's scaled grouped product needs rows of whole {ALIGNMENT} bytes; {name}={width} codes are not"
    if p.storage != "NK":
        return "torch's scaled grouped product needs weights whose columns are neighbours"
    if p.ep > 1 and (p.shared or p.router.zero_experts):
        return "with ep > 1 the shared and identity terms would enter the sum on every rank; only routed experts are split"
    return None


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes (R, C) and float32 scales (R, 1) of rows: max(amax, 1e-10) / 448, and x / scale.

    448 as a tensor: by a Python number torch divides on CUDA with a product by its reciprocal, which rounds twice.
    """
    wide = x.float()
    amax = wide.abs().amax(dim=1, keepdim=True).clamp(min=FLOOR)
    scale = amax / torch.full_like(amax, E4M3.max)
    return (wide / scale).clamp(-E4M3.max, E4M3.max).to(E4M3.dtype), scale


def run(inputs: Inputs) -> dict[str, Tensor]:
    """xq, xs, gate_up, h, hq, hs, y and out. Rows of dead slots are zeros."""
    p, x = inputs.problem, inputs.hidden_states
    (T, K), e = inputs.topk_ids.shape, inputs.w1.size(0)
    check_inputs(inputs)
    assert inputs.w1_scale is not None and inputs.w2_scale is not None
    local_TK = _local_experts(inputs)
    live_TK = local_TK < e
    # Dead slots sort behind the last group; the products ignore what lies beyond the last offset.
    order = torch.argsort(local_TK.flatten(), stable=True)
    offsets = torch.searchsorted(local_TK.flatten()[order], torch.arange(e, device=x.device), right=True).to(torch.int32)

    def product(codes: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
        return _scaled_grouped_mm(  # type: ignore[misc]
            codes.contiguous(),
            w.contiguous().transpose(-2, -1),
            scale.flatten().contiguous(),
            w_scale.flatten(1).contiguous(),
            offs=offsets,
            out_dtype=x.dtype,
            use_fast_accum=False,
        )

    def by_slot(rows: Tensor) -> Tensor:
        kept = torch.where(live_TK.flatten()[order][:, None], rows.float(), 0.0).to(rows.dtype)
        out = torch.empty_like(kept)
        out.view(_bits(out))[order] = kept.view(_bits(out))
        return out.view(T, K, out.size(1))

    weights = torch.where(live_TK, inputs.topk_weights.float(), 0.0)
    xq, xs = quantise(x)
    token = order // K
    gate_up = product(_rows(xq, token), xs[token], inputs.w1, inputs.w1_scale) if T else x.new_empty(0, p.N)
    h = activation(gate_up.float(), p.act).to(x.dtype)
    hq, hs = quantise(h)
    y = product(hq, hs, inputs.w2, inputs.w2_scale) if T else x.new_empty(0, p.H)
    gate_up, h, hq, hs, y = (by_slot(t) for t in (gate_up, h, hq, hs, y))
    shown = {"xq": xq, "xs": xs, "gate_up": gate_up, "h": h, "hq": hq, "hs": hs, "y": y}
    return shown | {"out": finish(inputs, weights, y)}


def _bits(t: Tensor) -> torch.dtype:
    """Indexed stores and loads are not implemented for every narrow dtype: they move bytes."""
    return torch.uint8 if t.dtype.itemsize == 1 else t.dtype


def _rows(codes: Tensor, index: Tensor) -> Tensor:
    return codes.view(torch.uint8)[index].view(codes.dtype)
