"""Programs of one launch that disturb each other: races, and results that depend on the order of programs."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter_faults import fault_of, shift

from moeproof.harness import interpreter

# Races.


@triton.jit
def write(out_ptr, value_step, stride, B: tl.constexpr):
    p = tl.program_id(0)
    tl.store(out_ptr + p * stride + tl.arange(0, B), tl.zeros([B], tl.float32) + p * value_step)


def test_two_programs_write_one_element() -> None:
    out = torch.zeros(32)

    write[(4,)](out, 1, 8, 8)
    fault = fault_of(write, (4,), out, 1, 7, 8)

    assert (fault.operation, fault.tensor, fault.byte_offset, fault.element) == ("race", "out_ptr", 28, 7)
    assert (fault.program, fault.other_program) == ((1, 0, 0), (0, 0, 0))
    assert "(1, 0, 0) stores what program (0, 0, 0) stored" in fault.message


def test_equal_values_are_a_race_unless_allowed() -> None:
    out = torch.zeros(32)

    assert fault_of(write, (4,), out, 0, 7, 8).operation == "race"
    with interpreter.sanitized(allow_double_writes=True):
        write[(4,)](out, 0, 7, 8)
    assert fault_of(write, (4,), out, 1, 7, 8, allow_double_writes=True).operation == "race"


@triton.jit
def write_twice(out_ptr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out_ptr + i, i)
    tl.store(out_ptr + i, tl.load(out_ptr + i) + 1)


def test_a_program_may_rewrite_its_own_elements() -> None:
    out = torch.zeros(16, dtype=torch.int32)

    write_twice[(4,)](out, 4)

    assert out.tolist() == list(range(1, 17))


@triton.jit
def write_by_lane(out_ptr, value_ptr, divisor, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out_ptr + i // divisor, tl.load(value_ptr + i))


def test_two_lanes_of_one_store() -> None:
    """Different values: nobody knows which one lands. Equal values are harmless."""
    out = torch.zeros(8)

    fault = fault_of(write_by_lane, (1,), out, torch.arange(8.0), 2, 8)

    assert (fault.operation, fault.program, fault.other_program) == ("race", (0, 0, 0), (0, 0, 0))
    write_by_lane[(1,)](out, torch.arange(8.0), 1, 8)
    write_by_lane[(1,)](out, torch.arange(8.0) // 2, 2, 8)
    assert out.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@triton.jit
def neighbour(x_ptr, step, n, B: tl.constexpr):
    p, i = tl.program_id(0), tl.arange(0, B)
    there = ((p + step) * B + i) % n
    value = tl.load(x_ptr + there)
    tl.store(x_ptr + p * B + i, value + 1)


@pytest.mark.parametrize(
    ("step", "verb"), [(3, "loads what program (0, 0, 0) stored"), (1, "stores what program (0, 0, 0) loaded")]
)
def test_read_and_write_between_programs(step: int, verb: str) -> None:
    """In place from a neighbour: the one before, which has written, or the one behind, which will write."""
    x = torch.zeros(16)

    neighbour[(4,)](x, 0, 16, 4)
    fault = fault_of(neighbour, (4,), x, step, 16, 4)

    assert (fault.operation, fault.program, fault.other_program) == ("race", (1, 0, 0), (0, 0, 0))
    assert verb in fault.message


@triton.jit
def split_k(x_ptr, out_ptr, K, B: tl.constexpr, HOW: tl.constexpr):
    p, i = tl.program_id(0), tl.arange(0, B)
    part = tl.load(x_ptr + p * B + i)
    if HOW == "atomic":
        tl.atomic_add(out_ptr + i, part)
    elif HOW == "relaxed":
        tl.atomic_add(out_ptr + i, part, sem="relaxed")
    elif HOW == "store":
        tl.store(out_ptr + i, part)
    elif HOW == "read_modify_write":
        tl.store(out_ptr + i, tl.load(out_ptr + i) + part)
    elif HOW == "atomic_then_load":
        tl.atomic_add(out_ptr + i, part)
        tl.store(x_ptr + p * B + i, tl.load(out_ptr + i))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["atomic", "relaxed"])
def test_split_k_with_atomics_is_healthy(how: str, dtype: torch.dtype) -> None:
    x, out = torch.arange(32).view(4, 8).to(dtype), torch.zeros(8, dtype=dtype)

    for seed in range(3):
        with interpreter.sanitized(shuffle_seed=seed):
            split_k[(4,)](x, out.zero_(), 4, 8, how)
        assert torch.equal(out, x.sum(0))


@pytest.mark.parametrize("how", ["store", "read_modify_write", "atomic_then_load"])
def test_split_k_without_atomics_is_a_race(how: str) -> None:
    fault = fault_of(split_k, (4,), torch.ones(4, 8), torch.zeros(8), 4, 8, how)

    assert (fault.operation, fault.tensor, fault.program) == ("race", "out_ptr", (1, 0, 0))
    assert fault.other_program == (0, 0, 0)


@triton.jit
def last_one_sums(x_ptr, parts_ptr, count_ptr, out_ptr, P: tl.constexpr, B: tl.constexpr, SEM: tl.constexpr):
    p, i = tl.program_id(0), tl.arange(0, B)
    tl.store(parts_ptr + p * B + i, tl.load(x_ptr + p * B + i))
    arrived = tl.atomic_add(count_ptr, 1, sem=SEM)
    if arrived == P - 1:
        total = tl.zeros([B], tl.float32)
        for q in range(P):
            total += tl.load(parts_ptr + q * B + i)
        tl.store(out_ptr + i, total)


def test_an_arrival_counter_orders_programs() -> None:
    """The last to arrive reads what the others wrote before they arrived. A relaxed counter does not order."""
    x, parts, out = torch.arange(32.0).view(4, 8), torch.zeros(4, 8), torch.zeros(8)

    with interpreter.sanitized(shuffle_seed=3):
        last_one_sums[(4,)](x, parts, torch.zeros(1, dtype=torch.int32), out, 4, 8, "acq_rel")

    assert torch.equal(out, x.sum(0))
    counter = torch.zeros(1, dtype=torch.int32)
    fault = fault_of(last_one_sums, (4,), x, parts, counter, out, 4, 8, "relaxed")
    assert (fault.operation, fault.tensor, fault.program) == ("race", "parts_ptr", (3, 0, 0))


@triton.jit
def ticket_then_write(count_ptr, out_ptr, B: tl.constexpr):
    tl.atomic_add(count_ptr, 1)
    tl.store(out_ptr + tl.arange(0, B), tl.zeros([B], tl.float32))


def test_what_follows_a_flag_is_not_ordered_by_it() -> None:
    """Taking a ticket first makes later writes no safer."""
    fault = fault_of(ticket_then_write, (2,), torch.zeros(1, dtype=torch.int32), torch.zeros(8), 8)

    assert (fault.operation, fault.tensor, fault.other_program) == ("race", "out_ptr", (0, 0, 0))


@triton.jit
def bytes_of_words(x_ptr, B: tl.constexpr):
    p = tl.program_id(0)
    tl.store(x_ptr + p, p)
    if p > 0:
        tl.store(x_ptr.to(tl.pointer_type(tl.uint8)) + 4 * p - 1, tl.full([], 1, tl.uint8))


def test_races_between_accesses_of_different_size() -> None:
    """Program 1 writes the last byte of the word of program 0."""
    fault = fault_of(bytes_of_words, (2,), torch.zeros(4, dtype=torch.int32), 1)

    assert (fault.operation, fault.byte_offset, fault.element) == ("race", 3, 0)


if hasattr(tl, "atomic_load"):  # Triton 3.9

    @triton.jit
    def atomic_copy(x_ptr, out_ptr):
        tl.atomic_store(out_ptr, tl.atomic_load(x_ptr) + tl.program_id(0))
        tl.atomic_add(x_ptr, 0)

    def test_atomic_loads_and_stores_do_not_race() -> None:
        x, out = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

        with interpreter.sanitized() as log:
            atomic_copy[(3,)](x, out)

        assert out.item() == 3
        assert log.launches[0].atomics == 9

    @triton.jit
    def pass_on(data_ptr, flag_ptr, out_ptr, SEM: tl.constexpr):
        if tl.program_id(0) == 0:
            tl.store(data_ptr, 42)
            tl.atomic_store(flag_ptr, 1)
        else:
            tl.atomic_poll(flag_ptr, 1, sem=SEM)
            tl.store(out_ptr, tl.load(data_ptr))

    def test_a_released_flag_orders_the_data_behind_it() -> None:
        data, flag, out = (torch.zeros(1, dtype=torch.int32) for _ in range(3))

        pass_on[(2,)](data, flag, out, "acquire")

        assert out.item() == 42
        fault = fault_of(pass_on, (2,), data, flag, out, "relaxed")
        assert (fault.operation, fault.tensor) == ("race", "data_ptr")


# Order.


@triton.jit
def last_wins(out_ptr, order_ptr, count_ptr):
    p = tl.program_id(0) * 6 + tl.program_id(1) * 2 + tl.program_id(2)
    tl.atomic_xchg(out_ptr, p)
    tl.store(order_ptr + tl.atomic_add(count_ptr, 1), p)


def test_programs_run_in_the_seeded_order() -> None:
    """Natural for seed 0, otherwise a permutation that the seed repeats: an order-dependent result differs."""

    def run(seed: int) -> tuple[int, list[int]]:
        out, order, count = (torch.zeros(n, dtype=torch.int32) for n in (1, 24, 1))
        with interpreter.sanitized(shuffle_seed=seed):
            last_wins[(4, 3, 2)](out, order, count)
        return out.item(), order.tolist()

    natural = list(range(24))
    assert run(0) == (23, natural)
    assert run(7) == run(7)
    assert run(7)[1] != natural
    assert sorted(run(7)[1]) == natural
    assert len({run(seed)[0] for seed in range(5)}) > 1


def test_a_healthy_kernel_does_not_depend_on_the_order() -> None:
    x = torch.randint(-9, 9, (1000,)).to(torch.bfloat16)
    outs = [torch.zeros_like(x) for _ in range(4)]

    for seed, out in enumerate(outs):
        with interpreter.sanitized(shuffle_seed=seed):
            shift[(32,)](x, out, 1000, 0, 32)

    assert all(torch.equal(out, x) for out in outs)
