"""Argument checks of quantised calls, shared by every implementation. All raise ContractError before any launch.

Shapes, dtypes and devices are looked at in every call. The values of a scale are read once for each tensor, because that waits
for the GPU: a layer's scales are made when its weights are loaded, and later calls see the same tensors.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from moeproof.reference.contract.errors import ContractError, check
from moeproof.reference.contract.formats import FORMATS, Format, format_of
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.schemes import ALL, Quantiser, QuantScheme

Tensor = torch.Tensor


def _exactly(name: str, t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, why: str) -> None:
    if t is None:
        raise ContractError(f"{name} is None, must be {shape} {dtype}: {why}")
    hint = ""
    if tuple(t.shape) != shape and t.dim() >= 2 and (*t.shape[:-2], t.shape[-1], t.shape[-2]) == shape:
        hint = "; its last two dims are swapped"
    check(tuple(t.shape) == shape, f"{name} is {tuple(t.shape)}, must be {shape}: {why}{hint}")
    check(t.dtype == dtype, f"{name} is {t.dtype}, must be {dtype}: {why}")
    check(t.device == device, f"{name} is on {t.device}, must be on {device}")


def _absent(name: str, t: Tensor | None, why: str) -> None:
    check(t is None, f"{name} was given, must be None: {why}")


def check_weight_tensors(
    name: str,
    quantiser: Quantiser | None,
    shape: tuple[int, int, int],
    w: Tensor,
    scale: Tensor | None,
    zp: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Codes, scales and zero points of w1 or w2, whose unquantised shape is `shape`, in a problem of `dtype`."""
    if quantiser is None:
        _absent(f"{name}_scale", scale, "the weights are not quantised")
        _absent(f"{name}_zp", zp, "the weights are not quantised")
        return
    q = quantiser
    why = f"{q.fmt} weights {shape} with scales for groups of {_group(q)}"
    q.check_columns(name, shape[-1])
    _exactly(name, w, q.code_shape(*shape), q.format.dtype, w.device, why)
    form = q.scale_format(format_of(dtype))
    _exactly(f"{name}_scale", scale, q.scale_shape(*shape), form.dtype, w.device, why)
    _check_values_once(f"{name}_scale", scale, form)
    if q.zero_points:
        e, rows, groups = q.scale_shape(*shape)
        check(rows % 2 == 0, f"{name} has {rows} rows; zero points pack two rows to a byte")
        _exactly(f"{name}_zp", zp, (e, rows // 2, groups), torch.uint8, w.device, why)
    else:
        _absent(f"{name}_zp", zp, f"{q.fmt} weights are symmetric")


def check_static_scale(
    name: str, quantiser: Quantiser | None, scale: Tensor | None, experts: int, device: torch.device
) -> None:
    """a1_scale or a2_scale: float32 (1, 1); `experts` > 0 where a global scale is one per expert: (experts, 1, 1)."""
    if quantiser is None or not quantiser.static:
        _absent(name, scale, "activations are not quantised" if quantiser is None else "the scheme is dynamic")
        return
    shape = (experts, 1, 1) if quantiser.two_level and experts else (1, 1)
    _exactly(name, scale, shape, torch.float32, device, "the scheme's activation scale is static")
    _check_values_once(name, scale, FORMATS["fp32"])


def check_activation(
    name: str, quantiser: Quantiser | None, codes: Tensor, scale: Tensor | None, columns: int, dtype: torch.dtype
) -> None:
    """Quantised rows (.., rows, columns) and their scales, as prepare hands them to apply: see as_received."""
    if quantiser is None:
        _absent(f"{name}_scale", scale, "activations are not quantised")
        check(codes.dtype == dtype, f"{name} is {codes.dtype}, must be {dtype}")
        return
    q = as_received(quantiser, scale)
    shape = (*codes.shape[:-1], columns)
    why = f"{q.fmt} activations with scales for groups of {_group(q)}"
    _exactly(name, codes, q.code_shape(*shape), q.format.dtype, codes.device, why)
    _exactly(f"{name}_scale", scale, q.scale_shape(*shape), q.scale_format(format_of(dtype)).dtype, codes.device, why)


def as_received(quantiser: Quantiser, scale: Tensor | None) -> Quantiser:
    """How the scales of dispatched rows lie. A dynamic scale of a whole tensor comes once, (1, 1), or beside each row,
    (rows, 1): rows of several ranks, each quantised as a tensor of its own, have the scales of several tensors."""
    one = quantiser.by_token or quantiser.static or scale is None or scale.dim() < 2 or scale.size(-2) == 1
    return quantiser if one else replace(quantiser, group=(1, ALL))


def check_quantised(
    scheme: QuantScheme,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    w1: Tensor,
    w2: Tensor,
    w1_scale: Tensor | None,
    w2_scale: Tensor | None,
    w1_zp: Tensor | None,
    w2_zp: Tensor | None,
    a2_scale: Tensor | None,
) -> None:
    """Everything quantised that `apply` gets, except its rows: sizes is (e, N, K, I)."""
    e, N, K, I = sizes  # noqa: E741  (the project's letter)
    check_weight_tensors("w1", scheme.w, (e, N, K), w1, w1_scale, w1_zp, dtype)
    check_weight_tensors("w2", scheme.w, (e, K, I), w2, w2_scale, w2_zp, dtype)
    check_static_scale("a2_scale", scheme.a2, a2_scale, e, w1.device)


def check_global(name: str, quantiser: Quantiser | None, scale: Tensor | None, experts: int, device: torch.device) -> None:
    """w1_global or w2_global: float32 (e, 1, 1) where the weights' scales have two levels, else None."""
    if quantiser is None or not quantiser.two_level:
        _absent(name, scale, "the weights' scales have one level")
    else:
        _exactly(name, scale, (experts, 1, 1), torch.float32, device, "the weights' scales have two levels")
        _check_values_once(name, scale, FORMATS["fp32"])


def check_inputs(inputs: Inputs) -> None:
    """Everything quantised of a whole layer's call."""
    i, p, scheme, e = inputs, inputs.problem, inputs.problem.quant, inputs.w1.size(0)
    sizes = (e, p.N, p.hidden, p.I)
    check_static_scale("a1_scale", scheme.a1, i.a1_scale, 0, i.device)
    check_quantised(scheme, p.fmt.dtype, sizes, i.w1, i.w2, i.w1_scale, i.w2_scale, i.w1_zp, i.w2_zp, i.a2_scale)
    check_global("w1_global", scheme.w, i.w1_global, e, i.device)
    check_global("w2_global", scheme.w, i.w2_global, e, i.device)


_seen = WeakTensorKeyDictionary()
"""Scales whose values were found good."""


def _check_values_once(name: str, scale: Tensor | None, fmt: Format) -> None:
    """check_scale_values at the first sight of a tensor; not while a CUDA graph is captured, when nothing can be read."""
    if scale is None or scale.is_meta or scale in _seen:
        return
    if scale.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    check_scale_values(name, scale, fmt)
    _seen[scale] = True


def check_scale_values(name: str, scale: Tensor | None, fmt: Format) -> None:
    """Refuse a scale that is zero, negative, infinite or NaN, naming the first. Reads the tensor, and so waits for the GPU."""
    if scale is None:
        return
    if fmt.name == "e8m0":
        bad = scale == 255
        words, allowed = "code 255 (NaN)", "codes 0..254"
    else:
        value = scale.float()
        bad = ~(value.isfinite() & (value > 0))
        words, allowed = "", "positive and finite"
    if bool(bad.any()):
        at = tuple(int(i) for i in bad.nonzero()[0])
        got = words or float(scale.float()[at])
        raise ContractError(f"{name}{list(at)} is {got}; scales must be {allowed}")


def _group(q: Quantiser) -> str:
    return " x ".join("all" if n == 0 else str(n) for n in q.group)
