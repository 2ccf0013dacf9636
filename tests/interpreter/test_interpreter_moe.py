"""A grouped GEMM as fused MoE kernels have it: right to the bit when healthy, and four planted faults reported."""

from dataclasses import dataclass, replace

import interpreter_spec as spec
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from moeproof.harness import interpreter
from moeproof.harness.interpreter import KernelFault

interpreter.install()


@triton.jit
def grouped_gemm(x_ptr, w_ptr, out_ptr, sorted_ids_ptr, expert_ids_ptr, num_slots, N, K, top_k,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FAULT: tl.constexpr):  # fmt: skip
    """out[slot] = x[slot // top_k] @ w[expert of the block].T; sorted ids are padded with num_slots."""
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    rows = pid_m * BM + tl.arange(0, BM)
    if FAULT == "ids off by one":
        rows += 1
    slot = tl.load(sorted_ids_ptr + rows)
    is_token = slot < num_slots
    expert = tl.load(expert_ids_ptr + pid_m).to(tl.int64)
    n = pid_n * BN + tl.arange(0, BN)
    n_ok = n < N
    if FAULT == "column not masked":
        w_ok = n >= 0
    else:
        w_ok = n_ok
    acc = tl.zeros((BM, BN), tl.float32)
    for k_block in range(tl.cdiv(K, BK)):
        k = k_block * BK + tl.arange(0, BK)
        x = tl.load(x_ptr + (slot // top_k)[:, None] * K + k[None, :], mask=is_token[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(w_ptr + expert * N * K + n[None, :] * K + k[:, None], mask=w_ok[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc)
    out_ok = is_token[:, None] & n_ok[None, :]
    if FAULT == "no token mask":
        out_ok = n_ok[None, :] & (rows >= 0)[:, None]
    tl.store(out_ptr + slot[:, None] * N + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=out_ok)


@dataclass(frozen=True)
class Problem:
    """Small integers, so that every sum is exact; `topk_ids` has no token for some experts."""

    x_TK: torch.Tensor
    w_ENK: torch.Tensor
    topk_ids: torch.Tensor
    sorted_ids: torch.Tensor
    expert_ids: torch.Tensor
    block: int

    @property
    def want(self) -> torch.Tensor:
        """float64, then one rounding to bf16 by the specification."""
        slots = self.topk_ids.flatten()
        rows = self.x_TK.double().repeat_interleave(self.topk_ids.shape[1], 0)
        exact = torch.einsum("sk,snk->sn", rows, self.w_ENK.double()[slots])
        return torch.from_numpy(spec.nearest(exact.numpy(), "bf16").astype(np.uint16)).view(torch.bfloat16)


def problem(tokens: int = 13, top_k: int = 2, experts: int = 5, n: int = 40, k: int = 72, block: int = 16) -> Problem:
    generator = torch.Generator().manual_seed(tokens)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator).to(torch.bfloat16)

    # Expert 1 gets nothing, the last expert something; a token's experts differ.
    used = torch.tensor([e for e in range(experts) if e != 1])
    topk_ids = torch.stack([used[torch.randperm(len(used), generator=generator)[:top_k]] for _ in range(tokens)])
    topk_ids[0, 0] = experts - 1
    sorted_ids, expert_ids = [], []
    for expert in range(experts):
        mine = (topk_ids.flatten() == expert).nonzero().flatten().tolist()
        mine += [tokens * top_k] * (-len(mine) % block)
        sorted_ids += mine
        expert_ids += [expert] * (len(mine) // block)
    ids = (torch.tensor(values, dtype=torch.int32) for values in (sorted_ids, expert_ids))
    return Problem(integers(tokens, k), integers(experts, n, k), topk_ids, *ids, block)


def run(p: Problem, fault: str = "", bn: int = 32, bk: int = 32) -> torch.Tensor:
    slots, n, k = p.topk_ids.numel(), p.w_ENK.shape[1], p.x_TK.shape[1]
    out = torch.full((slots, n), float("nan"), dtype=torch.bfloat16)
    grid = (len(p.expert_ids), triton.cdiv(n, bn))
    grouped_gemm[grid](p.x_TK, p.w_ENK, out, p.sorted_ids, p.expert_ids, slots, n, k, p.topk_ids.shape[1],
                       p.block, bn, bk, fault)  # fmt: skip
    return out


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("shape", [(13, 2, 5, 40, 72), (1, 1, 3, 16, 32), (64, 4, 8, 64, 64), (7, 3, 6, 33, 17)])
def test_healthy_is_right_to_the_bit_in_any_order(shape: tuple[int, ...], seed: int) -> None:
    p = problem(*shape)

    with interpreter.sanitized(shuffle_seed=seed) as log:
        out = run(p)

    assert torch.equal(out.view(torch.int16), p.want.view(torch.int16))
    assert log.launches[0].fault is None
    assert log.launches[0].stores == out.numel()


def fault_in(p: Problem, fault: str = "") -> KernelFault:
    with interpreter.sanitized(), pytest.raises(KernelFault) as caught:
        run(p, fault)
    return caught.value


def test_store_without_token_mask() -> None:
    """A padding row goes to row num_slots of the output, one past its end."""
    p = problem()

    fault = fault_in(p, "no token mask")

    slots, n = p.want.shape
    assert (fault.operation, fault.tensor, fault.program) == ("store", "out_ptr", (0, 0, 0))
    assert (fault.element, fault.byte_offset) == (slots * n, 2 * slots * n)


def test_sorted_ids_off_by_one() -> None:
    p = problem()

    fault = fault_in(p, "ids off by one")

    last = len(p.expert_ids) - 1
    assert (fault.operation, fault.tensor, fault.program) == ("load", "sorted_ids_ptr", (last, 0, 0))
    assert fault.byte_offset == 4 * p.sorted_ids.numel()


def test_column_index_not_masked() -> None:
    """Columns past N are rows of the next expert: harmless looking, except for the last expert."""
    p = problem()

    fault = fault_in(p, "column not masked")

    assert p.expert_ids[-1] == 4
    assert (fault.operation, fault.tensor) == ("load", "w_ptr")
    assert fault.program == (int((p.expert_ids == 4).nonzero()[0]), 1, 0)
    assert fault.byte_offset == p.w_ENK.numel() * 2


def test_two_slots_to_one_row_in_two_programs() -> None:
    p = problem()
    first, second = p.sorted_ids[0], p.sorted_ids[p.block]

    fault = fault_in(replace(p, sorted_ids=torch.where(p.sorted_ids == second, first, p.sorted_ids)))

    assert (fault.operation, fault.tensor, fault.byte_offset) == ("race", "out_ptr", int(first) * 40 * 2)
    assert (fault.program, fault.other_program) == ((1, 0, 0), (0, 0, 0))


@triton.jit
def scatter_rows(x_ptr, ids_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + tl.load(ids_ptr + i), tl.load(x_ptr + i))


def test_two_slots_to_one_row_in_one_program() -> None:
    """The same within one store: which of the two rows lands is not defined."""
    x, ids, out = torch.arange(16.0), torch.arange(16, dtype=torch.int32), torch.zeros(16)

    scatter_rows[(1,)](x, ids, out, 16)
    ids[5] = 3
    with pytest.raises(KernelFault) as caught:
        scatter_rows[(1,)](x, ids, out, 16)

    assert torch.equal(out, x)
    assert (caught.value.operation, caught.value.tensor, caught.value.element) == ("race", "out_ptr", 3)
