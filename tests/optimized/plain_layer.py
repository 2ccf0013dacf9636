"""The layer as plain float64 loops over tokens and slots: what these tests hold the kernels to. Shares no code with them."""

from __future__ import annotations

import math

import torch

from moeproof.harness import modes
from moeproof.reference.contract import Activation, Router

Tensor = torch.Tensor
DEVICE = modes.default_device()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float32: 2.0**-120, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-120}
ACTIVATIONS = [
    *("silu", "silu:limit=1", "silu:interleaved", "gelu", "gelu_tanh", "gelu:interleaved"),
    *("swigluoai", "swigluoai:packed", "swigluoai:alpha=1:beta=0:limit=2", "swigluoai_uninterleave:limit=7"),
    *("swiglustep", "swiglustep:limit=1", "situ:beta=4", "situ:beta=4:linear_beta=25"),
    *("silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul", "relu_no_mul"),
]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Reproducible normal values on the test's device."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return x.to(dtype).to(DEVICE)


def random_ids(seed: int, T: int, K: int, E: int, dtype: torch.dtype = torch.int32, dead: float = 0.2) -> Tensor:
    """Ids with duplicates, and a share of -1."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, E, (T, K), generator=g)
    return torch.where(torch.rand(T, K, generator=g) < dead, -1, ids).to(dtype).to(DEVICE)


def strided(x: Tensor, poison: float = float("nan")) -> Tensor:
    """The same values as a view into a poisoned buffer: no two elements are neighbours."""
    wide = torch.full([2 * n + 1 for n in x.shape], poison, device=x.device).to(x.dtype)
    view = wide[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    return view.copy_(x)


def check_close(got: Tensor, want: Tensor, magnitude: Tensor | float = 0.0, roundings: float = 48.0) -> None:
    """One rounding to got's dtype, and `roundings` of float32 on the magnitude of the terms."""
    allowed = UNIT[got.dtype] * want.abs() * 1.01 + roundings * 2.0**-24 * magnitude + TINY[got.dtype]
    error = (got.double() - want).abs()

    assert got.shape == want.shape
    assert not bool((~(error <= allowed)).any()), f"worst error / allowed: {float((error / allowed).max())}"


def activation(x: Tensor, act: Activation) -> Tensor:
    """float64 (.., N) -> (.., I), by the formulas of docs/contract.md."""
    name = act.name

    def one(g: Tensor) -> Tensor:
        if name.startswith("silu") or name == "swiglustep":
            return g * torch.sigmoid(g)
        if name.startswith("gelu_tanh"):
            return 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
        if name.startswith("gelu"):
            return 0.5 * g * torch.erfc(-g / math.sqrt(2))
        return torch.relu(g) ** (2 if name == "relu2_no_mul" else 1)

    if not act.gated:
        return one(x)
    half = x.shape[-1] // 2
    g, u = (x[..., 0::2], x[..., 1::2]) if act.interleaved else (x[..., :half], x[..., half:])
    if name.startswith("swigluoai"):
        g, u = torch.clamp(g, max=act.limit), torch.clamp(u, -act.limit, act.limit)  # type: ignore[operator]
        return g * torch.sigmoid(act.alpha * g) * (u + act.beta)  # type: ignore[operator]
    if name == "swiglustep":
        return torch.clamp(one(g), max=act.limit) * torch.clamp(u, -act.limit, act.limit)  # type: ignore[operator]
    if name == "situ":
        beta, linear = act.beta, act.linear_beta
        return beta * torch.tanh(g / beta) * torch.sigmoid(g) * (linear * torch.tanh(u / linear) if linear else u)  # type: ignore[operator]
    if act.limit:
        g, u = torch.clamp(g, max=act.limit), torch.clamp(u, -act.limit, act.limit)
    return one(g) * u


def local_index(ids: Tensor, num_experts: int, expert_map: Tensor | None) -> list[list[int]]:
    """Local expert of each slot, -1 where dead."""
    table = list(range(num_experts)) if expert_map is None else expert_map.tolist()
    return [[table[i] if 0 <= i < num_experts else -1 for i in row] for row in ids.tolist()]


def products(rows_TKA: Tensor, w_eBA: Tensor, local: list[list[int]], bias_eB: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(value, magnitude) float64 (T, K, B): each live slot's row times its expert's weights, plus bias; 0 elsewhere."""
    T, K = len(local), rows_TKA.shape[1]
    value = torch.zeros(T, K, w_eBA.shape[1], dtype=torch.float64, device=w_eBA.device)
    magnitude = torch.zeros_like(value)
    for t in range(T):
        for k in range(K):
            if (e := local[t][k]) < 0:
                continue
            row, w = rows_TKA[t, k].double(), w_eBA[e].double()
            bias = bias_eB[e].double() if bias_eB is not None else torch.zeros(w.shape[0], dtype=torch.float64, device=w.device)
            value[t, k] = w @ row + bias
            magnitude[t, k] = w.abs() @ row.abs() + bias.abs()
    return value, magnitude


def weighted_sum(y_TKH: Tensor, weights: Tensor | None, local: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(value, magnitude) float64 (T, H) over live slots; weights None = 1."""
    value = torch.zeros(y_TKH.shape[0], y_TKH.shape[2], dtype=torch.float64, device=y_TKH.device)
    magnitude = torch.zeros_like(value)
    for t, row in enumerate(local):
        for k, e in enumerate(row):
            if e >= 0:
                term = y_TKH[t, k].double() * (1.0 if weights is None else float(weights[t, k]))
                value[t] += term
                magnitude[t] += term.abs()
    return value, magnitude


def layer(
    x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor | None, local: list[list[int]], act: Activation,
    b1: Tensor | None = None, b2: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, magnitude) float64 (T, H), with gate_up, h and y rounded to x's dtype as the kernels store them."""
    K = len(local[0]) if local else 1
    rows = x[:, None, :].expand(x.shape[0], K, x.shape[1])
    h = activation(products(rows, w1, local, b1)[0].to(x.dtype).double(), act).to(x.dtype)
    y, magnitude = products(h, w2, local, b2)
    return weighted_sum(y, weights, local)[0], weighted_sum(magnitude, None if weights is None else weights.abs(), local)[0]


def route(
    logits: Tensor, router: Router, K: int, bias: Tensor | None, expert_scale: Tensor | None, table: Tensor | None
) -> tuple[list[list[int]], list[list[float]]]:
    """Ids in order of choice and weights, row by row in Python floats. Finite logits, and NaN counted as -inf."""
    width, all_ids, all_weights = logits.shape[1], [], []
    for t, row in enumerate(logits.double().tolist()):
        x = [-math.inf if math.isnan(v) else min(v, 3.4028234663852886e38) * router.multiplier for v in row]
        if router.softcap:
            x = [router.softcap * math.tanh(v / router.softcap) for v in x]
        score = _score(x, router.score)
        choice = [s + (float(bias[e]) if bias is not None else 0.0) for e, s in enumerate(score)]
        choice = [-math.inf if x[e] == -math.inf else c for e, c in enumerate(choice)]
        ids = table[t].tolist() if table is not None else _select(choice, router, K)
        if router.score == "sparsemixer":
            ids, weights = _sparsemixer(x, router.jitter_eps)
        elif router.score == "softmax_topk":
            weights = _score([x[e] for e in ids], "softmax")
        else:
            weights = [0.0 if x[e] == -math.inf else score[e] for e in ids]
        weights = _renormalise(weights, router)
        weights = [
            w * router.scale * (float(expert_scale[e]) if expert_scale is not None else 1.0)
            for w, e in zip(weights, ids, strict=True)
        ]
        all_ids.append(ids + [width + j for j in range(router.fused_shared)])
        all_weights.append(weights + [1.0] * router.fused_shared)
    return all_ids, all_weights


def _score(x: list[float], name: str) -> list[float]:
    best = max(x)
    if name == "softmax":
        e = [math.exp(v - best) if best > -math.inf else 0.0 for v in x]
        return [v / (sum(e) or 1.0) for v in e]
    if name == "sigmoid":
        return [1 / (1 + math.exp(-v)) if v > -700 else 0.0 for v in x]
    if name == "sqrtsoftplus":
        return [math.sqrt(max(v, 0) + math.log1p(math.exp(-abs(v)))) for v in x]
    return x


def _select(choice: list[float], router: Router, K: int) -> list[int]:
    order = sorted(range(len(choice)), key=lambda e: (-choice[e], e))
    if not router.groups:
        return order[:K]
    size = len(choice) // router.groups
    groups = [choice[g * size : (g + 1) * size] for g in range(router.groups)]
    if not router.keep:
        quota, used = K // router.groups, [0] * router.groups
        ids = []
        for e in order:
            if used[e // size] < quota:
                used[e // size] += 1
                ids.append(e)
        return ids
    best = 1 if router.group_score == "max" else 2
    value = [sum(sorted(group, reverse=True)[:best]) for group in groups]
    kept = sorted(range(router.groups), key=lambda g: (-value[g], g))[: router.keep]
    lost = -math.inf if router.rejected == "neginf" else 0.0
    masked = [c if e // size in kept or c == -math.inf else lost for e, c in enumerate(choice)]
    return sorted(range(len(choice)), key=lambda e: (-masked[e], e))[:K]


def _renormalise(w: list[float], router: Router) -> list[float]:
    value = router.renorm_value
    if router.renorm == "none":
        return w
    if router.renorm == "lp":
        return [v / max(sum(abs(u) ** value for u in w) ** (1 / value), 1e-20) for v in w]
    norm = sum(w) + value if router.renorm == "eps" else max(sum(w), value if router.renorm == "floor" else 1e-20)
    return [v / norm for v in w]


def _sparsemixer(x: list[float], eps: float) -> tuple[list[int], list[float]]:
    ids, weights, rest = [], [], dict(enumerate(x))
    for _ in range(2):
        best = max(rest.values())
        pick = min(e for e in rest if rest[e] == best)
        near = [v for v in rest.values() if best - v <= 2 * eps * max(abs(v), best)]
        ids.append(pick)
        weights.append(1 / sum(math.exp(v - best) for v in near))
        del rest[pick]
    return ids, weights
