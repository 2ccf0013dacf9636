"""Each memory rule with a kernel that breaks it and a healthy twin: bounds, holes, assertions."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from interpreter_faults import fault_of, shift
from triton.runtime.interpreter import InterpreterError

from moeproof.harness import interpreter
from moeproof.harness.interpreter import KernelFault

interpreter.install()

# Bounds.


@triton.jit
def shift_store(x_ptr, out_ptr, n, offset, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out_ptr + i + offset, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.float64])
def test_bounds_past_the_end(dtype: torch.dtype) -> None:
    x, out, size = torch.zeros(100).to(dtype), torch.zeros(100).to(dtype), dtype.itemsize

    with interpreter.sanitized() as log:
        shift[(4,)](x, out, 100, 0, 32)
    fault = fault_of(shift, (4,), x, out, 100, 3, 32)

    assert log.launches[0] == interpreter.LaunchReport("shift", (4, 1, 1), 100, 100, 0, None)
    assert (fault.kernel, fault.operation, fault.tensor) == ("shift", "load", "x_ptr")
    assert (fault.byte_offset, fault.element, fault.program) == (100 * size, 100, (3, 0, 0))


def test_bounds_before_the_start() -> None:
    x, out = torch.zeros(100), torch.zeros(100)

    fault = fault_of(shift, (4,), x, out, 100, -1, 32)

    assert (fault.operation, fault.tensor, fault.byte_offset, fault.element) == ("load", "x_ptr", -4, -1)
    assert fault.program == (0, 0, 0)
    assert "element -1 of 'x_ptr' (byte -4" in fault.message


@pytest.mark.parametrize("offset", [1, -5, 10**6, -(10**6)])
def test_a_bad_store_is_not_executed(offset: int) -> None:
    """A guarded view: the memory around it, and the view itself in that block, keep their bits."""
    whole = torch.full((96,), 7.0)

    fault = fault_of(shift_store, (1,), torch.zeros(32), whole[32:64], 32, offset, 32)

    assert (fault.operation, fault.tensor) == ("store", "out_ptr")
    assert (whole == 7.0).all()


def test_an_overrun_into_another_argument_is_still_an_overrun() -> None:
    """Two halves of one allocation: what lies behind the first half is the second argument, and yet not allowed."""
    whole = torch.zeros(64)

    fault = fault_of(shift, (1,), whole[:32], whole[32:], 32, 1, 32)

    assert (fault.tensor, fault.element) == ("x_ptr", 32)
    with interpreter.sanitized():
        shift[(1,)](whole[:32], whole[32:], 32, 0, 32)


def test_empty_tensor() -> None:
    assert fault_of(shift, (1,), torch.empty(0), torch.zeros(4), 1, 0, 4).tensor == "x_ptr"
    shift[(1,)](torch.empty(0), torch.empty(0), 0, 0, 4)


@triton.jit
def read_columns(x_ptr, out_ptr, stride, step, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * stride + n[None, :] * step)
    tl.store(out_ptr + m[:, None] * N + n[None, :], x)


def test_holes_of_a_strided_view() -> None:
    """Columns 0 to 3 of 8: the kernel that forgets the stride reads what is not its own."""
    view, out = torch.arange(64.0).view(8, 8)[:, :4], torch.empty(8, 4)

    read_columns[(1,)](view, out, 8, 1, 8, 4)
    fault = fault_of(read_columns, (1,), view, out, 4, 1, 8, 4)

    assert torch.equal(out, view)
    assert (fault.operation, fault.tensor, fault.byte_offset, fault.element) == ("load", "x_ptr", 16, 4)


def test_holes_of_a_view_that_also_repeats() -> None:
    """Four positions, four elements, and yet only the first and the last are the view's own."""
    view = torch.arange(4.0).as_strided((2, 2), (0, 3))

    assert fault_of(shift, (1,), view, torch.zeros(4), 4, 0, 4).byte_offset == 4


def test_transposed_and_expanded_views_have_no_holes() -> None:
    x, out = torch.arange(32.0).view(4, 8), torch.empty(8, 4)

    read_columns[(1,)](x.T, out, 1, 8, 8, 4)
    assert torch.equal(out, x.T)
    read_columns[(1,)](x[:1].expand(8, 8)[:, :4], out, 0, 1, 8, 4)
    assert torch.equal(out, x[:1, :4].expand(8, 4))


@triton.jit
def read_words(x_ptr, out_ptr, start):
    tl.store(out_ptr, tl.load((x_ptr + start).to(tl.pointer_type(tl.int32))))


def test_pointer_casts_keep_bounds_and_must_be_aligned() -> None:
    x, out = torch.arange(9, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)

    read_words[(1,)](x, out, 4)
    assert out.item() == 0x07060504
    assert "misaligned" in fault_of(read_words, (1,), x, out, 2).message
    assert fault_of(read_words, (1,), x, out, 8).byte_offset == 8


@triton.jit
def add_all(tensors, out_ptr, n, B: tl.constexpr):
    i = tl.arange(0, B)
    total = tl.load(tensors[0] + i, mask=i < n) + tl.load(tensors[1][0] + i, mask=i < n)
    tl.store(out_ptr + i, total, mask=i < n)


def test_tensors_in_tuples_are_named() -> None:
    a, b, out = torch.ones(8), torch.ones(6), torch.zeros(8)

    add_all[(1,)]((a, (b,)), out, 6, 8)

    assert out.tolist() == [2.0] * 6 + [0.0] * 2
    assert fault_of(add_all, (1,), (a, (b,)), out, 8, 8).tensor == "tensors[1][0]"


@triton.jit
def lie_about_shape(x_ptr, out_ptr, M, B: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [M, B], [B, 1], [B, B])
    tl.store(out_ptr + tl.arange(0, B), tl.sum(x.load([B, 0]), axis=0))


def test_descriptors_are_checked_against_their_tensor() -> None:
    x, out = torch.ones(24, 16), torch.zeros(16)

    lie_about_shape[(1,)](x, out, 24, 16)
    assert out.tolist() == [8.0] * 16
    assert fault_of(lie_about_shape, (1,), x, out, 25, 16).tensor == "x_ptr"


@triton.jit
def through_table(table_ptr, out_ptr, n, B: tl.constexpr):
    p, i = tl.program_id(0), tl.arange(0, B)
    target = tl.load(table_ptr + p).to(tl.pointer_type(tl.float32))
    tl.store(out_ptr + p * B + i, tl.load(target + i, mask=i < n, other=0.0), mask=i < n)


def test_pointer_tables_need_their_targets_registered() -> None:
    experts = [torch.full((8,), float(e)) for e in range(3)]
    table, out = torch.tensor([e.data_ptr() for e in experts]), torch.zeros(3, 8)

    assert "interpreter.register" in fault_of(through_table, (3,), table, out, 8, 8).message
    with interpreter.sanitized():
        for index, expert in enumerate(experts):
            interpreter.register(expert, f"expert {index}")
        through_table[(3,)](table, out, 8, 8)
        assert torch.equal(out, torch.stack(experts))
        with pytest.raises(KernelFault) as caught:
            through_table[(3,)](table, torch.zeros(3, 16), 16, 16)
    assert (caught.value.tensor, caught.value.byte_offset) == ("expert 0", 32)
    with pytest.raises(RuntimeError, match="sanitized"):
        interpreter.register(table, "too late")


@triton.jit
def widen(x_ptr, out_ptr, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32), mask=i < n)


def test_reinterpreted_tensors() -> None:
    """fp8 that is stored as bytes, the common idiom of kernels that must run on older torch."""
    x, out = torch.tensor([0x38, 0x40, 0x7E], dtype=torch.uint8), torch.zeros(3)

    widen[(1,)](triton.reinterpret(x, tl.float8e4nv), out, 3, 4)

    assert out.tolist() == [1.0, 2.0, 448.0]
    assert fault_of(widen, (1,), triton.reinterpret(x, tl.float8e4nv), out, 4, 4).byte_offset == 3


@triton.jit
def choose(a_ptr, b_ptr, out_ptr, n_b, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out_ptr + i, tl.load(tl.where(i % 2 == 0, a_ptr, b_ptr) + i, mask=i < n_b))


def test_one_load_may_touch_two_tensors() -> None:
    a, b, out = torch.zeros(8), torch.ones(6), torch.zeros(8)

    choose[(1,)](a, b, out, 6, 8)

    assert out.tolist() == [0, 1, 0, 1, 0, 1, 0, 0]
    fault = fault_of(choose, (1,), a, b, out, 8, 8)
    assert (fault.tensor, fault.element) == ("b_ptr", 7)


# Assertions.


@triton.jit
def asserts(x_ptr, limit, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.device_assert(tl.load(x_ptr + i) < limit, "value above the limit", mask=i < 3)


@triton.jit
def assumes(n):
    tl.assume(n > 0)


@triton.jit
def overflows(out_ptr, n):
    tl.store(out_ptr, n * 65536)


def test_device_assert_fires() -> None:
    x = torch.tensor([1, 2, 3, 99])

    asserts[(1,)](x, 4, 4)
    fault = fault_of(asserts, (2,), x, 3, 4)

    assert (fault.operation, fault.tensor, fault.program) == ("assert", None, (0, 0, 0))
    assert "value above the limit" in fault.message


def test_assume_is_checked() -> None:
    assumes[(1,)](1)
    assert fault_of(assumes, (1,), 0).operation == "assert"


def test_integers_wrap_silently_as_on_the_device() -> None:
    """Assertions are on, Triton's own overflow assertions are not: a wrapped offset shows as a memory fault."""
    out = torch.zeros(1, dtype=torch.int32)

    overflows[(1,)](out, 65536 + 3)

    assert out.item() == 3 * 65536


# Reports.


@triton.jit
def inner(x_ptr, i):
    return tl.load(x_ptr + i)


@triton.jit
def outer(x_ptr, out_ptr, i):
    tl.store(out_ptr, inner(x_ptr, i))


@triton.jit
def broken(out_ptr):
    tl.store(out_ptr, tl.zeros([3], tl.float32))


def test_a_fault_in_a_device_function_comes_out_as_itself() -> None:
    x, out = torch.arange(4.0), torch.zeros(1)

    outer[(1,)](x, out, 3)
    assert fault_of(outer, (1,), x, out, 4).kernel == "outer"
    outer[(1,)](x, out, 2)
    assert out.item() == 2.0


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(InterpreterError):
        broken[(1,)](torch.zeros(4))


def test_a_fault_can_be_sent_to_another_process() -> None:
    fault = fault_of(outer, (1,), torch.arange(4.0), torch.zeros(1), 9)

    copy = pickle.loads(pickle.dumps(fault))

    assert vars(copy) == vars(fault)
    assert str(copy) == str(fault)


@pytest.mark.parametrize(
    ("mode", "code", "want"),
    [
        ("0", "from moeproof.harness import interpreter; import sys; assert 'triton' not in sys.modules", ""),
        ("0", "from moeproof.harness import interpreter; interpreter.install()", "TRITON_INTERPRET=1"),
        ("0", "import triton, os; os.environ['TRITON_INTERPRET'] = '1'; "
              "from moeproof.harness import interpreter; interpreter.install()", "before triton is imported"),
        ("1", "from moeproof.harness import interpreter; interpreter.install(); interpreter.install()", ""),
    ],
)  # fmt: skip
def test_install_refuses_a_process_that_compiles(mode: str, code: str, want: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": mode, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)

    assert (done.returncode == 0) == (want == ""), done.stderr
    assert want in done.stderr
