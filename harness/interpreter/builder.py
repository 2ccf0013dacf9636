"""The repaired builder: Triton's interpreter with numbers rounded as the hardware does and every access checked.

Imported by `interpreter.install` only, because the import of triton fixes the process to interpreting or compiling.
Each class extends the stock class of the same role; what is not mentioned here is stock. Checked with Triton 3.6.0,
3.7.1, 3.8.0 and 3.9.0; tests/interpreter fails when a newer one adds an operation that no one has looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

from moeproof.harness.interpreter import numerics as numerics
from moeproof.harness.interpreter import speed as interpreter_speed
from moeproof.harness.interpreter.memory import KernelFault, Launch, sessions

Handle = Any  # triton.runtime.interpreter.TensorHandle
Array = numerics.Array
_numpy_type = functools.cache(stock._get_np_dtype)  # the stock function builds a table on each call


def _is_narrow(handle: Handle) -> bool:
    """Whether the data are bare codes of bf16 or fp8. (The stock code tags some boolean results with a float type.)"""
    name = handle.dtype.scalar.name
    return name in numerics.NARROW and handle.data.dtype == numerics.FORMATS[name].dtype


def _values(handle: Handle) -> Array:
    """The data as numbers that numpy can compute with."""
    return numerics.decode(handle.data, handle.dtype.scalar.name) if _is_narrow(handle) else handle.data


def _is_small(handle: Handle) -> bool:
    return _is_narrow(handle) or handle.data.dtype == np.float16


def _handle(values: Array, dtype: Any, toward_zero: bool = False) -> Handle:
    """Numbers converted to a Triton type, with one rounding."""
    if dtype.name in numerics.NARROW or (toward_zero and dtype.name in numerics.FORMATS):
        floats = values if values.dtype.kind == "f" else values.astype(np.float32)  # as the hardware: int, fp32, bf16
        data = numerics.encode(floats, dtype.name, toward_zero).view(_numpy_type(dtype))
    else:
        data = values.astype(_numpy_type(dtype))
    return stock.TensorHandle(data, dtype)


def _widely(compute: Callable[..., Handle], *handles: Handle) -> Handle:
    """Compute on float32 copies of 16-bit and 8-bit operands and round the result once; other types pass unchanged."""
    small = next((handle.dtype.scalar for handle in handles if _is_small(handle)), None)
    if small is not None:
        handles = tuple(_widened(handle) for handle in handles)
    result = compute(*handles)
    if result.data.dtype == np.bool_:
        return stock.TensorHandle(result.data, tl.int1)
    return result if small is None else _handle(result.data, small)


def _widened(handle: Handle) -> Handle:
    return stock.TensorHandle(_values(handle).astype(np.float32), tl.float32) if _is_small(handle) else handle


class Builder(stock.InterpreterBuilder):
    """What a kernel's operations turn into."""

    launch: Launch | None = None
    patched: frozenset[str] = frozenset()  # names of the modules that speak the interpreter's language in this launch
    _atomic: bool | None = None  # inside an atomic load, store or poll: whether it orders programs

    # Programs. The executor walks the grid in its natural order; the launch says which program stands there.

    def set_grid_dim(self, *grid: int) -> None:
        super().set_grid_dim(*grid)
        if self.launch is not None:
            self.launch.begin_grid(grid)

    def set_grid_idx(self, *position: int) -> None:
        super().set_grid_idx(*(position if self.launch is None else self.launch.begin_program(position)))

    # Memory.

    def _checked(self, pointers: Handle, mask: Any, size: int, operation: str, **more: Any) -> Handle:
        if self.launch is None:
            return pointers
        lanes = np.asarray(getattr(mask, "data", mask))  # a handle or, from some stock code, a bare array
        if self._atomic is not None:
            operation, more["flag"] = "atomic", self._atomic
        return stock.TensorHandle(self.launch.access(pointers.data, lanes, size, operation, **more), pointers.dtype)

    def _atomically(self, compute: Callable[..., Any], *args: Any) -> Any:
        """Triton 3.9 builds atomic loads, stores and polls from plain ones; their last arguments are sem and scope."""
        self._atomic = _orders(args[-2])
        try:
            return compute(*args)
        finally:
            self._atomic = None

    def create_masked_load(self, pointers: Handle, mask: Any, *rest: Any, **more: Any) -> Handle:
        size = _numpy_type(pointers.get_element_ty()).itemsize
        return super().create_masked_load(self._checked(pointers, mask, size, "load"), mask, *rest, **more)

    def create_masked_store(self, pointers: Handle, value: Handle, mask: Any, *rest: Any, **more: Any) -> Any:
        checked = self._checked(pointers, mask, value.data.itemsize, "store", values=value.data)
        return super().create_masked_store(checked, value, mask, *rest, **more)

    def create_atomic_load(self, *args: Any) -> Handle:
        return self._atomically(super().create_atomic_load, *args)

    def create_atomic_store(self, *args: Any) -> Any:
        return self._atomically(super().create_atomic_store, *args)

    def create_atomic_poll(self, *args: Any) -> Handle:
        return self._atomically(super().create_atomic_poll, *args)

    def create_atomic_cas(self, pointers: Handle, compare: Handle, value: Handle, sem: Any, scope: Any) -> Handle:
        checked = self._checked(pointers, True, value.data.itemsize, "atomic", flag=_orders(sem))
        return super().create_atomic_cas(checked, compare, value, sem, scope)

    def create_atomic_rmw(self, op: Any, pointers: Handle, value: Handle, mask: Handle, sem: Any, scope: Any) -> Handle:
        checked = self._checked(pointers, mask, value.data.itemsize, "atomic", flag=_orders(sem))
        if _is_narrow(value) and op == stock._ir.ATOMIC_OP.FADD:
            return _narrow_atomic_add(checked, value, mask)
        return super().create_atomic_rmw(op, checked, value, mask, sem, scope)

    def create_assert(self, condition: Handle, message: str) -> None:
        if self.launch is not None and not np.all(condition.data):
            self.launch.failed_assertion(message)

    def create_assume(self, condition: Handle) -> None:
        self.create_assert(condition, "tl.assume")

    # Numbers.

    def get_bf16(self, value: float) -> Handle:
        return _handle(np.array([value], dtype=np.float64), tl.bfloat16)

    def get_all_ones_value(self, type: Any) -> Handle:
        return stock.TensorHandle(np.full(1, -1).astype(_numpy_type(type)), type.scalar)

    def cast_impl(self, src: Handle, dst_type: Any) -> Handle:
        return _handle(_values(src), dst_type.scalar)

    def create_fp_to_fp(self, src: Handle, dst_type: Any, rounding_mode: Any) -> Handle:
        if tl.float8e4b15 in (src.dtype.scalar, dst_type.scalar):
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        return _handle(_values(src), dst_type.scalar, rounding_mode == stock._ir.ROUNDING_MODE.RTZ)

    def binary_op(self, lhs: Handle, rhs: Handle, op: Any) -> Handle:
        return _widely(lambda x, y: super(Builder, self).binary_op(x, y, op), lhs, rhs)

    def unary_op(self, arg: Handle, op: Any) -> Handle:
        return _widely(lambda x: super(Builder, self).unary_op(x, op), arg)

    def create_minnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg: Handle, lo: Handle, hi: Handle, propagate_nans: Any) -> Handle:
        if propagate_nans == stock._ir.PROPAGATE_NAN.NONE:
            return self.create_minnumf(self.create_maxnumf(arg, lo), hi)
        return self.create_minimumf(self.create_maximumf(arg, lo), hi)

    def create_erf(self, arg: Handle) -> Handle:
        return _widely(super().create_erf, arg)

    def create_rsqrt(self, arg: Handle) -> Handle:
        return _widely(super().create_rsqrt, arg)

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        if z.dtype.scalar.name == "fp64":
            return super().create_fma(x, y, z)
        return _handle(numerics.fused_multiply_add(_values(x), _values(y), _values(z)), z.dtype.scalar)

    def create_dot(self, a: Handle, b: Handle, d: Handle, input_precision: Any, max_num_imprecise_acc: int) -> Handle:
        if d.dtype.scalar.name in ("fp64", "int32"):
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        lhs, rhs = (_values(operand).astype(np.float32) for operand in (a, b))
        if sessions[-1].tf32 and a.dtype.scalar.name == "fp32" and input_precision == stock._ir.INPUT_PRECISION.TF32:
            lhs, rhs = numerics.drop_to_tf32(lhs), numerics.drop_to_tf32(rhs)
        return _handle(np.matmul(lhs, rhs) + _values(d), d.dtype.scalar)

    def create_dot_scaled(self, lhs: Handle, lhs_scale: Handle | None, lhs_format: Any, rhs: Handle,
                          rhs_scale: Handle | None, rhs_format: Any, fast_math: bool, lhs_k_pack: bool,
                          rhs_k_pack: bool, acc: Handle) -> Handle:  # fmt: skip
        left = _scaled_operand(lhs, lhs_scale, lhs_format, -1 if lhs_k_pack else -2)
        # The right scales come as [N, K / group]: work on the transposed operand.
        turned = stock.TensorHandle(np.swapaxes(rhs.data, -1, -2), rhs.dtype)
        right = _scaled_operand(turned, rhs_scale, rhs_format, -1 if rhs_k_pack else -2)
        return _handle(np.matmul(left, np.swapaxes(right, -1, -2)) + _values(acc), acc.dtype.scalar)

    def create_histogram(self, data: Handle, bins: int, mask: Handle | None) -> Handle:
        counted = (data.data >= 0) & (data.data < bins) & (True if mask is None else mask.data)
        counts = np.bincount(data.data[counted].astype(np.int64), minlength=bins)
        return stock.TensorHandle(counts.astype(np.int32), tl.int32)

    def create_print(self, prefix: str, hex: bool, values: list[Handle], is_signed: Any) -> None:
        super().create_print(prefix, hex, values if hex else [_widened(value) for value in values], is_signed)


def _orders(sem: Any) -> bool:
    """Whether an atomic orders the accesses around it."""
    return bool(sem != stock._ir.MEM_SEMANTIC.RELAXED)


def _scaled_operand(operand: Handle, scale: Handle | None, form: Any, packed_axis: int) -> Array:
    """float32 [.., rows, K] values of an MX operand times their block scales [.., rows, K / group]."""
    is_fp4 = form == stock._ir.ScaleDotElemTypeTY.E2M1
    values = numerics.decode_e2m1(operand.data, packed_axis) if is_fp4 else _values(operand).astype(np.float32)
    if scale is None:
        return values
    factors = _values(scale) if _is_narrow(scale) else numerics.decode_e8m0(scale.data)
    return values * np.repeat(factors, values.shape[-1] // factors.shape[-1], axis=-1)


def _narrow_atomic_add(pointers: Handle, value: Handle, mask: Handle) -> Handle:
    """Atomic addition on bf16, lane after lane where lanes share an element; returns the old values."""
    addresses, active = pointers.data.ravel(), np.flatnonzero(np.broadcast_to(mask.data, pointers.data.shape))
    old, dtype = np.zeros(addresses.size, dtype=value.data.dtype), value.dtype.scalar
    addend = np.broadcast_to(_values(value), pointers.data.shape).ravel()
    while active.size:
        # One lane per element a round: the first of each.
        now = active[np.unique(addresses[active], return_index=True)[1]]
        on = np.ones(now.shape, dtype=bool)
        old[now] = stock._interpreter.load(addresses[now], on, old[now], old.dtype)
        total = _handle(numerics.decode(old[now], dtype.name) + addend[now], dtype)
        stock._interpreter.store(addresses[now], total.data, on)
        active = np.setdiff1d(active, now, assume_unique=True)
    return stock.TensorHandle(old.reshape(pointers.data.shape), dtype)


class Reduce(stock.ReduceOps):
    """Reductions: small floats in float32 with one rounding; NaN loses against numbers, as in the device's max."""

    def apply_impl(self, input: tuple[Any, ...]) -> Any:
        library = tl.standard
        values, dtype, how = _widened(input[0].handle).data, input[0].dtype, {"axis": self.axis, "keepdims": self.keep_dims}
        if self.combine_fn is library._sum_combine:
            return self._result(np.sum(values, **how), dtype)
        if self.combine_fn in (library._elementwise_max, library._elementwise_min):
            best = np.fmax if self.combine_fn is library._elementwise_max else np.fmin
            return self._result(best.reduce(values, **how), dtype)
        largest = (library._argmax_combine_tie_break_left, library._argmax_combine_tie_break_fast)
        smallest = (library._argmin_combine_tie_break_left, library._argmin_combine_tie_break_fast)
        if self.combine_fn in largest + smallest:
            best = np.fmax if self.combine_fn in largest else np.fmin
            found = best.reduce(values, axis=self.axis, keepdims=True)
            index = self._result(np.argmax(values == found, **how), tl.int32)
            return self._result(best.reduce(values, **how), dtype), index
        return super().apply_impl(input)

    def _result(self, values: Any, dtype: Any) -> Any:
        return self.to_tensor(_handle(np.asarray(values), dtype).data, dtype)


class Scan(stock.ScanOps):
    """Running sums and products of small floats in float32, rounded where they are handed out."""

    def apply_impl(self, input: tuple[Any, ...]) -> Any:
        plain = self.combine_fn in (tl.standard._sum_combine, tl.standard._prod_combine)
        if not (plain and _is_small(input[0].handle)):
            return super().apply_impl(input)
        dtype = input[0].dtype
        wide = self.to_tensor(_widened(input[0].handle).data, tl.float32)
        return [self.to_tensor(_handle(ret.handle.data, dtype).data, dtype) for ret in super().apply_impl((wide,))]


class Executor(stock.GridExecutor):
    """One launch: take the tensors it was given, run it, and let its fault out as it is."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        arguments = inspect.getcallargs(self.fn, *args, **kwargs)
        stock.interpreter_builder.launch = Launch(self.fn.__name__, arguments, sessions[-1])
        stock.interpreter_builder.patched = frozenset()
        return args, kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        fault: KernelFault | None = None
        try:
            with np.errstate(all="ignore"):  # a device does not warn about infinities either
                super().__call__(*args, **kwargs)
        except Exception as error:
            fault = _fault_behind(error)
            if fault is None:
                raise
        finally:
            launch, stock.interpreter_builder.launch = stock.interpreter_builder.launch, None
            if launch is not None and len(sessions) > 1:
                sessions[-1].launches.append(launch.report(fault))
        if fault is not None:
            raise fault


def _fault_behind(error: BaseException | None) -> KernelFault | None:
    """The stock interpreter wraps every exception, once for each nested device function."""
    while error is not None and not isinstance(error, KernelFault):
        error = error.__cause__
    return error


@functools.cache
def _languages(fn: Any) -> frozenset[str]:
    """Which of triton.language and its core a device function sees in its globals."""
    return frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)


class _FormatName(str):
    """A dot_scaled format: Triton 3.6 and 3.7 ask for its `.value`, which the plain string of a kernel lacks."""

    @property
    def value(self) -> str:
        return str(self)


def install() -> None:
    """Put these classes in place of the stock ones. The global builder keeps its identity: kernels hold on to it."""
    builder = stock.interpreter_builder
    if isinstance(builder, Builder):
        return
    builder.__class__ = Builder
    # `debug` lets device_assert through; integers wrap around silently, as on the device.
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=False)
    stock.ReduceOps, stock.ScanOps, stock.GridExecutor = Reduce, Scan, Executor
    _repair_language(builder)
    interpreter_speed.install()


def _repair_language(builder: Builder) -> None:
    """Wrap the functions that connect kernels to the builder."""
    stock_convert, stock_tensor, stock_core = stock._implicit_cvt, stock._patch_lang_tensor, stock._patch_lang_core
    stock_dot_scaled = stock.TritonSemantic.dot_scaled

    def convert(argument: Any) -> Any:
        """A tensor becomes a pointer into its own address window."""
        value = stock_convert(argument)
        pointer = builder.launch.pointer(argument) if builder.launch is not None else None
        if pointer is not None:
            value.handle.data = np.array([pointer], dtype=np.uint64)
        return value

    def patch_tensor(tensor: Any, scope: Any) -> None:
        """Triton 3.6 with numpy 2.4 cannot use a runtime value in `range`."""
        stock_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patch_core(lang: Any, scope: Any) -> None:
        """Triton 3.6 and 3.7 do not know the fnuz types here."""
        stock_core(lang, scope)
        known, fnuz = lang.dtype.to_ir, (tl.float8e4b8, tl.float8e5b16)
        scope.set_attr(lang.dtype, "to_ir", lambda self, ir: self if self in fnuz else known(self, ir))

    def dot_scaled(self: Any, *args: Any, **more: Any) -> Any:
        args = tuple(_FormatName(arg) if isinstance(arg, str) else arg for arg in args)
        return stock_dot_scaled(self, *args, **more)

    stock_lang = stock._patch_lang

    def patch_lang(fn: Any) -> Any:
        """Once for each launch. The stock code does it again at every call of a device function: a third of all time."""
        languages = _languages(fn)
        if builder.launch is not None and languages and languages <= builder.patched:
            return stock._LangPatchScope()
        builder.patched |= languages
        return stock_lang(fn)

    stock._patch_lang = patch_lang
    stock._implicit_cvt, stock._patch_lang_tensor, stock._patch_lang_core = convert, patch_tensor, patch_core
    stock.TritonSemantic.dot_scaled = dot_scaled
