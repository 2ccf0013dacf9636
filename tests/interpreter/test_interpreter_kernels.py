"""Whole kernels: dots, reductions, sorts, scans, atomics and masked loads, on every float type they take."""

import itertools
from typing import Any

import interpreter_spec as spec
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from moeproof.harness import interpreter

interpreter.install()

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
NAME = {torch.float16: "fp16", torch.bfloat16: "bf16", E4M3: "fp8e4nv", E5M2: "fp8e5"}
FP8 = [E4M3, E5M2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


def rounded(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """float64 rounded once to a torch type, by the specification."""
    if dtype is torch.float32:
        return torch.from_numpy(values.astype(np.float32))
    codes = spec.nearest(values, NAME[dtype]).astype(f"uint{8 * dtype.itemsize}")
    return torch.from_numpy(codes).view(dtype)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit."""
    return a.dtype == b.dtype and bool((a.view(torch.uint8) == b.view(torch.uint8)).all())


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, top: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-top, top + 1, shape, generator=generator).to(dtype)


# Dots.


@triton.jit
def dot(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TYPE: tl.constexpr, HOW: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, y, input_precision=HOW, out_dtype=TYPE))


def run_dot(a: torch.Tensor, b: torch.Tensor, out_type: torch.dtype, how: str | None = None) -> torch.Tensor:
    out = torch.empty(a.shape[0], b.shape[1], dtype=out_type)
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.float64: tl.float64, torch.int32: tl.int32}
    dot[(1,)](a, b, out, a.shape[0], b.shape[1], a.shape[1], types[out_type], how)
    return out


@pytest.mark.parametrize(
    ("left", "right"),
    [*itertools.product(FP8, FP8), *((d, d) for d in (*FLOATS, torch.float64, torch.int8))],
)
def test_dot_of_every_pair_is_exact_on_integers(left: torch.dtype, right: torch.dtype) -> None:
    a, b = integers((16, 32), left), integers((32, 16), right, seed=1)
    out = {torch.int8: torch.int32, torch.float64: torch.float64}.get(left, torch.float32)

    got = run_dot(a, b, out)

    assert torch.equal(got.double(), a.double() @ b.double())


@pytest.mark.parametrize("dtype", [*FLOATS, *FP8])
def test_dot_accumulates_in_float32(dtype: torch.dtype) -> None:
    """|err| <= gamma_(K+1) * |a| @ |b| with float32 roundoff, which no narrower accumulator meets."""
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.rand(shape, generator=generator).to(dtype) for shape in ((16, 256), (256, 16)))

    got = run_dot(a, b, torch.float32)

    exact, u = a.double() @ b.double(), 257 * 2.0**-24
    assert ((got.double() - exact).abs() <= u / (1 - u) * exact).all()


@pytest.mark.parametrize("dtype", [torch.float16, E4M3])
def test_dot_to_fp16_rounds_once(dtype: torch.dtype) -> None:
    a, b = integers((16, 64), dtype, top=8), integers((64, 16), dtype, seed=1, top=8)

    got = run_dot(a * 1.0 if dtype is torch.float16 else a, b, torch.float16)

    assert equal(got, rounded((a.double() @ b.double()).numpy(), torch.float16))


@pytest.mark.parametrize(
    ("tf32", "how", "want"), [(False, None, 1 + 2.0**-11), (True, None, 1.0), (True, "tf32", 1.0),
                              (True, "ieee", 1 + 2.0**-11), (True, "tf32x3", 1 + 2.0**-11)],
)  # fmt: skip
def test_tf32_is_an_option(tf32: bool, how: str | None, want: float) -> None:
    """The low 13 bits of a float32 operand count, unless the option and the kernel both say tf32."""
    a = torch.full((16, 16), 1 + 2.0**-11)

    with interpreter.sanitized(tf32=tf32):
        got = run_dot(a, torch.eye(16), torch.float32, how)

    assert (got == want).all()


@triton.jit
def dot_scaled(a, sa, b, sb, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KA: tl.constexpr,
               KB: tl.constexpr, FA: tl.constexpr, FB: tl.constexpr):  # fmt: skip
    m, n, g = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K // 32)
    ka, kb = tl.arange(0, KA), tl.arange(0, KB)
    x = tl.load(a + m[:, None] * KA + ka[None, :])
    y = tl.load(b + kb[:, None] * N + n[None, :])
    scale_x = tl.load(sa + m[:, None] * (K // 32) + g[None, :])
    scale_y = tl.load(sb + n[:, None] * (K // 32) + g[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot_scaled(x, scale_x, FA, y, scale_y, FB))


def mx_operand(form: str, rows: int, K: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Random codes of a format [rows, K] (FP4: two a byte along K) and their exact values."""
    rng = np.random.default_rng(seed)
    if form == "e2m1":
        half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        codes = rng.integers(0, 16, (rows, K))
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
        return torch.from_numpy(packed), np.concatenate([half, -half])[codes]
    if form == "bf16":
        values = integers((rows, K), torch.bfloat16, seed)
        return values, values.double().numpy()
    name = {"e4m3": "fp8e4nv", "e5m2": "fp8e5"}[form]
    codes = spec.nearest(rng.integers(-16, 17, (rows, K)) / 4, name).astype(np.uint8)
    return torch.from_numpy(codes), spec.value_of(codes, name)


@pytest.mark.parametrize(("left", "right"), [("e4m3", "e2m1"), ("e5m2", "e4m3"), ("e2m1", "e2m1"), ("bf16", "e2m1")])
def test_dot_scaled(left: str, right: str) -> None:
    """Also on 3.6 and 3.7, whose own interpreters lack it. Small scales keep the float32 sum exact."""
    M, N, K = 16, 16, 64
    a, a_values = mx_operand(left, M, K, 3)
    b, b_values = mx_operand(right, N, K, 4)
    b = b.T.contiguous()
    rng = np.random.default_rng(5)
    scales = [rng.integers(125, 130, (rows, K // 32)).astype(np.uint8) for rows in (M, N)]
    out = torch.empty(M, N)

    dot_scaled[(1,)](
        a, torch.from_numpy(scales[0]), b, torch.from_numpy(scales[1]), out, M, N, K, a.shape[1], b.shape[0], left, right
    )

    factors = [np.repeat(2.0 ** (scale.astype(float) - 127), 32, axis=1) for scale in scales]
    assert np.array_equal(out.numpy(), (a_values * factors[0]) @ (b_values * factors[1]).T)


# Reductions, scans, sorts.


@triton.jit
def larger(x, y):
    return tl.where(x > y, x, y)


@triton.jit
def fold(x_ptr, out_ptr, index_ptr, M: tl.constexpr, N: tl.constexpr, OP: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    if OP == "sum":
        tl.store(out_ptr + m, tl.sum(x, axis=1).to(tl.float32))
    elif OP == "max":
        best, where = tl.max(x, axis=1, return_indices=True)
        tl.store(out_ptr + m, best.to(tl.float32))
        tl.store(index_ptr + m, where)
    elif OP == "min":
        best, where = tl.min(x, axis=1, return_indices=True)
        tl.store(out_ptr + m, best.to(tl.float32))
        tl.store(index_ptr + m, where)
    elif OP == "max_only":
        tl.store(out_ptr + m, tl.max(x, axis=1).to(tl.float32))
    elif OP == "argmax":
        tl.store(index_ptr + m, tl.argmax(x, axis=1))
    elif OP == "argmin":
        tl.store(index_ptr + m, tl.argmin(x, axis=1))
    elif OP == "custom":
        tl.store(out_ptr + m, tl.reduce(x, 1, larger).to(tl.float32))
    elif OP == "all":
        tl.store(out_ptr + m, tl.zeros([M], tl.float32) + tl.sum(x).to(tl.float32))


def run_fold(x: torch.Tensor, op: str) -> tuple[np.ndarray, np.ndarray]:
    out, index = torch.full((x.shape[0],), -99.0), torch.full((x.shape[0],), -99, dtype=torch.int32)
    fold[(1,)](x, out, index, *x.shape, op)
    return out.double().numpy(), index.numpy()


@pytest.mark.parametrize("dtype", FLOATS)
def test_reductions(dtype: torch.dtype) -> None:
    x = integers((8, 32), dtype, top=100)
    values = x.double().numpy()

    assert np.array_equal(run_fold(x, "sum")[0], rounded(values.sum(1), dtype).double().numpy())
    assert np.array_equal(run_fold(x, "all")[0], [rounded(values.sum(keepdims=True), dtype).double().item()] * 8)
    for op, value, index in (("max", values.max(1), values.argmax(1)), ("min", values.min(1), values.argmin(1))):
        got = run_fold(x, op)
        assert np.array_equal(got[0], value)
        assert np.array_equal(got[1], index)
        assert np.array_equal(run_fold(x, "arg" + op)[1], index)
    assert np.array_equal(run_fold(x, "max_only")[0], values.max(1))
    assert np.array_equal(run_fold(x, "custom")[0], values.max(1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_reductions_leave_nan_to_those_who_have_nothing_else(dtype: torch.dtype) -> None:
    """As on the device, max ignores NaN; a row of NaN gives NaN and its first index, without a warning."""
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[nan, 1, 3, 3], [nan, nan, nan, nan], [-inf, nan, -inf, -inf], [inf, 2, nan, inf]]).to(dtype)

    value, index = run_fold(x, "max")

    assert np.array_equal(value, [3, nan, -inf, inf], equal_nan=True)
    assert index.tolist() == [2, 0, 0, 0]


@triton.jit
def scan(x_ptr, out_ptr, N: tl.constexpr, OP: tl.constexpr, REVERSE: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if OP == "cumsum":
        y = tl.cumsum(x, 0, reverse=REVERSE)
    elif OP == "cumprod":
        y = tl.cumprod(x, 0, reverse=REVERSE)
    elif OP == "custom":
        y = tl.associative_scan(x, 0, larger, reverse=REVERSE)
    elif OP == "sort":
        y = tl.sort(x, descending=REVERSE)
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", ["cumsum", "cumprod", "custom", "sort"])
def test_scans_and_sorts(op: str, dtype: torch.dtype, reverse: bool) -> None:
    x = integers((32,), dtype, seed=5, top=4)
    x = 2 ** (x % 2) if op == "cumprod" else x * 0.375
    out = torch.empty_like(x)

    scan[(1,)](x, out, 32, op, reverse)

    values = x.double().numpy()
    if op == "sort":
        want = np.sort(values)[::-1] if reverse else np.sort(values)
    else:
        along = {"cumsum": np.cumsum, "cumprod": np.cumprod, "custom": np.maximum.accumulate}[op]
        want = along(values[::-1])[::-1] if reverse else along(values)
    assert np.array_equal(out.double().numpy(), rounded(want, dtype).double().numpy())


@triton.jit
def top(x_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, K), tl.topk(tl.load(x_ptr + tl.arange(0, N)), K))


@pytest.mark.parametrize("dtype", FLOATS)
def test_topk(dtype: torch.dtype) -> None:
    x, out = integers((64,), dtype, top=1000), torch.empty(8, dtype=dtype)

    top[(1,)](x, out, 64, 8)

    assert torch.equal(out, x.sort(descending=True).values[:8])


# Element-wise code as kernels write it.


@triton.jit
def pointwise(x_ptr, y_ptr, out_ptr, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "scaled":
        z = tl.where(x > y, x * 1.5, y - x)
    elif OP == "count":
        z = (x < y).to(tl.float32).to(x.dtype) + (x == y).to(x.dtype)
    elif OP == "full":
        z = tl.full([N], 0.1, x.dtype) + x
    elif OP == "minus":
        z = -x + tl.abs(y)
    elif OP == "clamp":
        z = tl.clamp(x, -1.0, 2.0).to(x.dtype)
    elif OP == "bounds":
        z = tl.minimum(tl.maximum(x, y), 2.0).to(x.dtype)
    elif OP == "fma":
        z = tl.fma(x, y, x)
    elif OP == "quotient":
        z = (x / (y + 9.0)).to(x.dtype)
    elif OP == "silu":
        wide = x.to(tl.float32)
        z = (wide / (1 + tl.exp(-wide))).to(x.dtype)
    tl.store(out_ptr + i, z)


def pointwise_spec(op: str, x: np.ndarray, y: np.ndarray, r: Any) -> np.ndarray:
    """What float64 says, with `r` rounding to the type after each operation of the kernel's type."""
    if op == "scaled":
        return np.where(x > y, r(x * 1.5), r(y - x))
    if op == "quotient":
        return r(x / r(y + 9.0))
    return {
        "count": lambda: (x <= y).astype(float),
        "full": lambda: r(r(np.full_like(x, 0.1)) + x),
        "minus": lambda: r(-x + abs(y)),
        "clamp": lambda: np.clip(x, -1, 2),
        "bounds": lambda: np.minimum(np.maximum(x, y), 2.0),
        "fma": lambda: r(x * y + x),
        "silu": lambda: r(x / (1 + np.exp(-x))),
    }[op]()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", ["scaled", "count", "full", "minus", "clamp", "bounds", "fma", "quotient", "silu"])
def test_pointwise(op: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    x, y = ((8 * torch.rand(256, generator=generator) - 4).to(dtype) for _ in range(2))
    y[::9] = x[::9]
    out = torch.empty_like(x)

    pointwise[(1,)](x, y, out, 256, op)

    want = pointwise_spec(op, x.double().numpy(), y.double().numpy(), lambda v: rounded(v, dtype).double().numpy())
    want = rounded(want, dtype)
    if op == "silu" and dtype is torch.float32:
        assert torch.allclose(out, want, rtol=1e-6, atol=0)
    else:
        assert equal(out + 0.0, want + 0.0)  # zeros of one sign


@triton.jit
def masked(x_ptr, out_ptr, N: tl.constexpr, OTHER: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < 3, other=OTHER))


@pytest.mark.parametrize("other", [0.0, 1.5, -0.0625])
@pytest.mark.parametrize("dtype", [*FLOATS, *FP8])
def test_masked_lanes_get_other(dtype: torch.dtype, other: float) -> None:
    x, out = torch.tensor([1.0, 2.0, -4.0]).to(dtype), torch.zeros(8).to(dtype)

    masked[(1,)](x, out, 8, other)

    assert out.float().tolist() == [1.0, 2.0, -4.0, *[other] * 5]


@triton.jit
def loops(n, out_ptr):
    total = 0
    for i in range(n):
        total += i
    for i in tl.range(0, n, 2):
        total += i
    i = 0
    while i < n:
        i += 1
        total += 100
    tl.store(out_ptr, total)


def test_loops_over_runtime_values() -> None:
    """Stock Triton 3.6 raises here with numpy 2.4."""
    out = torch.zeros(1, dtype=torch.int32)

    loops[(1,)](5, out)

    assert out.item() == 10 + 6 + 500


# Atomics and descriptors.


@triton.jit
def scatter_add(x_ptr, where_ptr, out_ptr, old_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    old = tl.atomic_add(out_ptr + tl.load(where_ptr + i), tl.load(x_ptr + i), mask=i < n)
    tl.store(old_ptr + i, old, mask=i < n)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.int32])
def test_atomic_add_with_collisions(dtype: torch.dtype) -> None:
    """Lane after lane: each sees the sum of those before it, rounded each time."""
    x = integers((16,), dtype, top=50)
    where = torch.tensor([0, 1, 0, 2, 0, 1, 3, 3, 0, 0, 2, 1, 0, 0, 0, 0])
    out, old = torch.full((4,), 200).to(dtype), torch.zeros(16, dtype=dtype)

    scatter_add[(1,)](x, where, out, old, 12, 16)

    want, seen = torch.full((4,), 200).to(dtype), torch.zeros(16, dtype=dtype)
    for lane in range(12):
        seen[lane] = want[where[lane]]
        want[where[lane]] += x[lane]
    assert torch.equal(out, want)
    assert torch.equal(old, seen)


@triton.jit
def other_atomics(f_ptr, i_ptr):
    p = tl.program_id(0)
    tl.atomic_max(f_ptr, (p - 3).to(tl.float32))
    tl.atomic_min(f_ptr + 1, (p - 3).to(tl.float32))
    tl.atomic_xchg(i_ptr, p)
    tl.atomic_cas(i_ptr + 1, p, p + 1)
    tl.atomic_or(i_ptr + 2, 1 << p)


def test_other_atomics() -> None:
    f, i = torch.tensor([-9.0, 9.0]), torch.zeros(3, dtype=torch.int32)

    other_atomics[(5,)](f, i)

    assert f.tolist() == [1.0, -3.0]
    assert i.tolist() == [4, 5, 31]


@triton.jit
def copy_by_descriptor(x_ptr, out_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BM, BN])
    out = tl.make_tensor_descriptor(out_ptr, [M, N], [N, 1], [BM, BN])
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    out.store([m, n], x.load([m, n]) + 1.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_device_descriptors(dtype: torch.dtype) -> None:
    x = integers((24, 40), dtype)
    out = torch.zeros_like(x)

    copy_by_descriptor[(2, 3)](x, out, 24, 40, 16, 16)

    assert torch.equal(out, x + 1)


@triton.jit
def copy_by_host_descriptor(x, out, BM: tl.constexpr, BN: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    out.store([m, n], x.load([m, n]) + 1.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_host_descriptors(dtype: torch.dtype) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = integers((24, 40), dtype)
    out = torch.zeros_like(x)

    copy_by_host_descriptor[(2, 3)](*(TensorDescriptor.from_tensor(t, [16, 16]) for t in (x, out)), 16, 16)

    assert torch.equal(out, x + 1)
