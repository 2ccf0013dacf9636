"""Every float operation of the interpreter's builder x every float type, against exact arithmetic.

`test_every_builder_method_is_accounted_for` fails when a new Triton version adds an operation that is neither tested
here nor listed as safe, so that a fault cannot come in unseen.
"""

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import interpreter_spec as spec
import numpy as np
import pytest
from triton import language as tl
from triton.runtime import interpreter as stock

from moeproof.harness import interpreter

interpreter.install()

NAMES = ["fp32", "fp16", "bf16", "fp8e4nv", "fp8e5", "fp8e4b8", "fp8e5b16"]
NARROW = [name for name in NAMES if name != "fp32"]
TL = {name: tl.str_to_ty(f"*{name}", None).element_ty for name in NAMES}
NUMPY = {"fp32": np.float32, "fp16": np.float16}
BUILDER = stock.interpreter_builder


def handle(codes: np.ndarray, name: str) -> Any:
    data = codes.astype(f"uint{spec.SPECS[name].bits}")
    return stock.TensorHandle(data.view(NUMPY[name]) if name in NUMPY else data, TL[name])


def codes_of(result: Any, name: str) -> np.ndarray:
    assert result.dtype.scalar == TL[name]
    assert result.data.dtype == NUMPY.get(name, np.dtype(f"uint{spec.SPECS[name].bits}"))
    return result.data.view(f"uint{spec.SPECS[name].bits}")


def some_codes(name: str, count: int, seed: int) -> np.ndarray:
    """Codes of finite nonzero values of either sign, with exponents near zero for the wide formats."""
    form, rng = spec.SPECS[name], np.random.default_rng(seed)
    if form.bits == 8:
        codes = rng.integers(1, spec.number_of_finite(name), count)
    else:
        codes = (rng.integers(form.bias - 6, form.bias + 6, count) << form.m) | rng.integers(0, 1 << form.m, count)
    return codes | (rng.integers(0, 2, count) << (form.bits - 1))


def specials(name: str) -> np.ndarray:
    """Zeros, the extremes, one, infinities and NaN, as far as the format has them."""
    form, finite = spec.SPECS[name], spec.number_of_finite(name)
    positive = [0, 1, form.bias << form.m, finite - 1, *([finite] if form.infinity else [])]
    half = 1 << (form.bits - 1)
    nan = half if form.negative_zero_is_nan else half - 1
    return np.array([*positive, *(half + code for code in positive if code), nan])


def check(got: np.ndarray, want: list[int] | np.ndarray, name: str) -> None:
    """Equal codes; zeros of either sign are equal, as NaNs are."""
    want = np.asarray(want)
    zeros = (spec.value_of(got, name) == 0) & (spec.value_of(np.maximum(want, 0), name) == 0) & (want >= 0)
    ok = spec.same(got, want, name) | zeros
    assert ok.all(), [(hex(g), hex(w)) for g, w in zip(got[~ok][:5], want[~ok][:5], strict=True)]


def exacts(codes: np.ndarray, name: str) -> list[Fraction]:
    return [spec.exact(value) for value in spec.value_of(codes, name)]


def fraction_rem(a: Fraction, b: Fraction) -> Fraction:
    return a - b * math.trunc(a / b)


BINARY: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "create_fadd": operator.add,
    "create_fsub": operator.sub,
    "create_fmul": operator.mul,
    "create_fdiv": operator.truediv,
    "create_precise_divf": operator.truediv,
    "create_approx_divf": operator.truediv,
    "create_frem": fraction_rem,
    "create_minimumf": min,
    "create_maximumf": max,
    "create_minnumf": min,
    "create_maxnumf": max,
}
COMPARE = {
    "create_fcmpOLT": np.less,
    "create_fcmpOLE": np.less_equal,
    "create_fcmpOGT": np.greater,
    "create_fcmpOGE": np.greater_equal,
    "create_fcmpOEQ": np.equal,
    "create_fcmpUNE": np.not_equal,
}
EXACT_UNARY: dict[str, Callable[[Fraction], Fraction]] = {
    "create_fabs": abs,
    "create_fneg": operator.neg,
    "create_floor": lambda x: Fraction(math.floor(x)),
    "create_ceil": lambda x: Fraction(math.ceil(x)),
}
LIBRARY_UNARY: dict[str, Callable[[float], float]] = {
    "create_sqrt": math.sqrt,
    "create_precise_sqrt": math.sqrt,
    "create_rsqrt": lambda x: 1 / math.sqrt(x),
    "create_exp": math.exp,
    "create_exp2": lambda x: 2.0**x,
    "create_log": math.log,
    "create_log2": math.log2,
    "create_sin": math.sin,
    "create_cos": math.cos,
    "create_erf": math.erf,
}
# Tested by name below or through kernels in the other files of this folder.
ELSEWHERE = """
    create_fma create_clampf create_select create_dot create_dot_scaled create_histogram create_print get_bf16
    get_all_ones_value binary_op unary_op ternary_op cast_impl
    create_fp_to_fp create_fp_trunc create_fp_ext create_si_to_fp create_ui_to_fp create_fp_to_si create_fp_to_ui
    create_load create_store create_masked_load create_masked_store create_atomic_rmw create_atomic_cas
    create_atomic_load create_atomic_store create_assert create_assume create_descriptor_load create_descriptor_store
    create_make_tensor_descriptor set_grid_dim set_grid_idx create_bitcast
"""
SAFE = {
    "moves bits and does not look at them": """
        create_broadcast create_cat create_expand_dims create_gather create_join create_reshape create_splat
        create_split create_trans create_unsplat get_null_value""",
    "integers only": """
        create_add create_sub create_mul create_sdiv create_udiv create_idiv create_srem create_urem create_shl
        create_lshr create_ashr create_and create_or create_xor create_iabs create_umulhi create_int_cast
        create_minsi create_minui create_maxsi create_maxui create_icmpEQ create_icmpNE create_icmpSGE create_icmpSGT
        create_icmpSLE create_icmpSLT create_icmpUGE create_icmpUGT create_icmpULE create_icmpULT create_make_range
        get_int1 get_int8 get_int16 get_int32 get_int64 get_uint8 get_uint16 get_uint32 get_uint64""",
    "numpy has the type": "get_fp16 get_fp32 get_fp64",
    "tl never emits it": "create_fcmpONE create_fcmpUEQ create_fcmpUGE create_fcmpUGT create_fcmpULE create_fcmpULT",
    "names a type": """
        get_bf16_ty get_block_ty get_double_ty get_float_ty get_half_ty get_int16_ty get_int1_ty get_int32_ty
        get_int64_ty get_int8_ty get_ptr_ty get_uint16_ty get_uint32_ty get_uint64_ty get_uint8_ty get_fp8e4b15_ty
        get_fp8e4b8_ty get_fp8e4nv_ty get_fp8e5_ty get_fp8e5b16_ty""",
    "pointer arithmetic, checked where memory is touched": """
        create_addptr create_int_to_ptr create_ptr_to_int create_make_block_ptr create_advance""",
    "goes through masked load or store": """
        create_tensor_pointer_load create_tensor_pointer_store create_descriptor_gather create_descriptor_scatter
        create_atomic_poll""",
    "refused by the interpreter": "create_extern_elementwise create_inline_asm",
    "no numbers": """
        create_barrier create_get_num_programs create_get_program_id get_cache_policy ir_rmw_op_to_interpreter_rmw_op
        ir_sem_to_interpreter_sem""",
}


def present(*tables: dict[str, Any]) -> list[str]:
    """Methods of these tables that this Triton version has."""
    return [name for table in tables for name in table if hasattr(stock.InterpreterBuilder, name)]


def test_every_builder_method_is_accounted_for() -> None:
    """A method that is new in this Triton version must get a test or a reason."""
    known = {*BINARY, *COMPARE, *EXACT_UNARY, *LIBRARY_UNARY, *" ".join([ELSEWHERE, *SAFE.values()]).split()}

    new = {name for name in dir(stock.InterpreterBuilder) if not name.startswith("_")} - known

    assert not new, f"untested operations of Triton's interpreter: {sorted(new)}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", present(BINARY))
def test_binary(method: str, name: str) -> None:
    """The exact result, rounded once."""
    a, b = some_codes(name, 400, 3), some_codes(name, 400, 4)

    with np.errstate(all="ignore"):
        got = codes_of(getattr(BUILDER, method)(handle(a, name), handle(b, name)), name)

    results = [BINARY[method](x, y) for x, y in zip(exacts(a, name), exacts(b, name), strict=True)]
    check(got, [spec.nearest_exact(result, name) for result in results], name)


@pytest.mark.parametrize("name", ["fp8e4nv", "fp8e5", "fp8e4b8", "fp8e5b16"])
@pytest.mark.parametrize(("method", "compute"), [("create_fadd", np.add), ("create_fmul", np.multiply)])
def test_fp8_sums_and_products_of_all_pairs(method: str, compute: Any, name: str) -> None:
    a, b = (grid.ravel() for grid in np.meshgrid(np.arange(256), np.arange(256)))

    with np.errstate(all="ignore"):
        got = codes_of(getattr(BUILDER, method)(handle(a, name), handle(b, name)), name)
        want = spec.nearest(compute(spec.value_of(a, name), spec.value_of(b, name)), name)

    check(got, want, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("method", "compute"),
    [("create_fadd", np.add), ("create_fmul", np.multiply), ("create_minimumf", np.minimum),
     ("create_maximumf", np.maximum), ("create_minnumf", np.fmin), ("create_maxnumf", np.fmax)],
)  # fmt: skip
def test_binary_on_special_values(method: str, compute: Any, name: str) -> None:
    """Infinities and NaN as IEEE says; minnum and maxnum prefer numbers to NaN."""
    a, b = (grid.ravel() for grid in np.meshgrid(specials(name), specials(name)))

    with np.errstate(all="ignore"):
        got = codes_of(getattr(BUILDER, method)(handle(a, name), handle(b, name)), name)
        values = compute(spec.value_of(a, name), spec.value_of(b, name))
        want = spec.nearest(values, name) if name in NARROW else as_fp32_codes(values)

    check(got, want, name)


def as_fp32_codes(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), -1, values.astype(np.float32).view(np.uint32).astype(np.int64))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", present(COMPARE))
def test_comparison(method: str, name: str) -> None:
    """Results are booleans and are tagged so: the stock tag is a float type, which later casts would believe."""
    values = np.concatenate([specials(name), some_codes(name, 20, 5)])
    a, b = (grid.ravel() for grid in np.meshgrid(values, values))

    result = getattr(BUILDER, method)(handle(a, name), handle(b, name))

    assert result.dtype == tl.int1
    assert np.array_equal(result.data, COMPARE[method](spec.value_of(a, name), spec.value_of(b, name)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", present(EXACT_UNARY))
def test_exact_unary(method: str, name: str) -> None:
    a = some_codes(name, 400, 6)

    got = codes_of(getattr(BUILDER, method)(handle(a, name)), name)

    check(got, [spec.nearest_exact(EXACT_UNARY[method](x), name) for x in exacts(a, name)], name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", present(LIBRARY_UNARY))
def test_library_unary(method: str, name: str) -> None:
    """Computed in float32 and rounded once: next to a tie the last place may differ, elsewhere not."""
    a = some_codes(name, 400, 7)
    if method in ("create_sqrt", "create_precise_sqrt", "create_rsqrt", "create_log", "create_log2"):
        a &= (1 << (spec.SPECS[name].bits - 1)) - 1
    values = spec.value_of(a, name)
    a, values = a[np.abs(values) < 80], values[np.abs(values) < 80]

    with np.errstate(all="ignore"):
        got = codes_of(getattr(BUILDER, method)(handle(a, name)), name).astype(np.int64)

    want = np.array([spec.nearest_exact(spec.exact(LIBRARY_UNARY[method](x)), name) for x in values])
    places = 4 if name == "fp32" else 1
    assert (np.abs(got - want) <= places).all()
    assert name == "fp32" or (got == want).mean() > 0.98


@pytest.mark.parametrize("name", NAMES)
def test_fma_rounds_once(name: str) -> None:
    form = spec.SPECS[name]
    x, y, z = (some_codes(name, 400, seed) for seed in (8, 9, 10))
    if form.bits > 8:
        # (1 + 2^-k)^2 = 1 + 2^(1-k) + 2^-2k, a tie for 2k = m + 1; z far below it decides.
        one = form.bias << form.m
        k = (form.m + 1) // 2
        tie = [one + (1 << (form.m - k))] * 2
        tiny = [(form.bias - 2 * form.m) << form.m] if form.bias > 2 * form.m else [1]
        tiny.append(tiny[0] | 1 << (form.bits - 1))
        x, y, z = np.append(x, tie), np.append(y, tie), np.append(z, tiny)

    got = codes_of(BUILDER.create_fma(handle(x, name), handle(y, name), handle(z, name)), name)

    terms = zip(exacts(x, name), exacts(y, name), exacts(z, name), strict=True)
    check(got, [spec.nearest_exact(a * b + c, name) for a, b, c in terms], name)


@pytest.mark.parametrize("propagate", ["ALL", "NONE"])
@pytest.mark.parametrize("name", NAMES)
def test_clamp(name: str, propagate: str) -> None:
    x = np.concatenate([some_codes(name, 200, 11), specials(name)])
    low, high = (np.full(x.size, spec.nearest_exact(Fraction(bound), name)) for bound in (-1, 2))
    mode = getattr(stock._ir.PROPAGATE_NAN, propagate)

    got = codes_of(BUILDER.create_clampf(handle(x, name), handle(low, name), handle(high, name), mode), name)

    values = spec.value_of(x, name)
    want = np.clip(values, -1, 2) if propagate == "ALL" else np.fmin(np.fmax(values, -1), 2)
    check(got, spec.nearest(want, name) if name in NARROW else as_fp32_codes(want), name)


@pytest.mark.parametrize("name", NAMES)
def test_select_keeps_bits(name: str) -> None:
    a, b = some_codes(name, 64, 12), some_codes(name, 64, 13)
    condition = stock.TensorHandle(np.arange(64) % 3 == 0, tl.int1)

    got = codes_of(BUILDER.create_select(condition, handle(a, name), handle(b, name)), name)

    assert np.array_equal(got, np.where(condition.data, a, b))


@pytest.mark.parametrize("value", [1.0, -0.3, 1 + 2.0**-8 + 2.0**-40])
def test_bf16_constant(value: float) -> None:
    got = codes_of(BUILDER.get_bf16(value), "bf16")

    assert got[0] == spec.nearest_exact(spec.exact(value), "bf16")


@pytest.mark.parametrize("kind", [tl.int8, tl.uint8, tl.uint32, tl.int64, tl.uint64])
def test_all_ones(kind: tl.dtype) -> None:
    """Stock 3.6 to 3.8 with numpy 2 cannot build it for unsigned types."""
    (got,) = BUILDER.get_all_ones_value(kind).data

    assert got.dtype == stock._get_np_dtype(kind)
    assert ~got == 0


def test_histogram_drops_what_is_out_of_range() -> None:
    data = stock.TensorHandle(np.array([0, 1, 3, 3, 4, 7, -1], dtype=np.int32), tl.int32)

    assert BUILDER.create_histogram(data, 4, None).data.tolist() == [1, 1, 0, 2]


def test_print_shows_values(capsys: pytest.CaptureFixture[str]) -> None:
    BUILDER.grid_idx = (0, 0, 0)

    BUILDER.create_print("x", False, [handle(np.array([0x3FC0]), "bf16")], [True])

    assert "[1.5]" in capsys.readouterr().out
