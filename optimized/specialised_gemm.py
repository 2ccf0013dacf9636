"""Both products for many rows, warp-specialised (Hopper): one warp copies tiles to shared memory, two warpgroups multiply.

For 16-bit rows and weights, and for e4m3 codes of the schemes fp8_token and fp8_block. What `_fused_scaled` cannot do is to
multiply while it scales: every thread of a program does the same thing at the same time, and the tensor core stands still while
partial sums are scaled. Here each warpgroup has 64 of a block's 128 rows and goes at its own pace: while one scales its partial
sum, the other one's is multiplied. Shared memory is a ring of stages; `full` barriers say that the copies of a stage have
landed, `empty` ones that both warpgroups have read it.

A program takes two strips of 128 weight rows at once, `left` and `right`: gate and up rows of the same columns in GEMM1, so
that the activation is a matter of one thread, and neighbours in GEMM2. The two sums and one partial sum fill a thread's
registers.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moeproof.optimized.align import Alignment
from moeproof.optimized.fused_gemm import _quickly_gated
from moeproof.optimized.grouped_gemm import _swizzle
from moeproof.optimized.quant.rows import e4m3_codes, scale_of
from moeproof.optimized.tiles import Tile, interpreted, processors
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import check

Tensor = torch.Tensor
STRIP = gl.constexpr(128)
"""Rows of a block, weight rows of a strip, and bytes of a step: of codes, one group of scales in each direction."""
HALF = gl.constexpr(64)
"""Rows of a warpgroup."""
LOADER_REGISTERS, WORKER_REGISTERS = gl.constexpr(24), gl.constexpr(240)


@gluon.jit
def _strips(column, N, FIRST: gl.constexpr):
    """First weight rows of the left and the right strip of a column of tiles."""
    if FIRST:
        left, right = column * STRIP, N // 2 + column * STRIP
    else:
        left, right = 2 * column * STRIP, 2 * column * STRIP + STRIP
    return left, right


@gluon.jit
def _load(
    a_rows, w_rows, a_ring, left_ring, right_ring, full, empty, block_expert, num_m, num_n, group_m, N, K,
    FIRST: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, PROGRAMS):
        block, column = _swizzle(tile, num_m, num_n, group_m)
        first_row = gl.load(block_expert + block) * N
        left, right = _strips(column, N, FIRST)
        for k in range(0, K, STEP):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), 3 * STRIP * STRIP)
            tma.async_copy_global_to_shared(a_rows, [block * STRIP, k], full.index(stage), a_ring.index(stage))
            tma.async_copy_global_to_shared(w_rows, [first_row + left, k], full.index(stage), left_ring.index(stage))
            tma.async_copy_global_to_shared(w_rows, [first_row + right, k], full.index(stage), right_ring.index(stage))
            step += 1


@gluon.jit
def _rows(block, sorted_slots, num_slots, HIGH: gl.constexpr, LAYOUT: gl.constexpr):
    """(position, slot, live) of the low or HIGH half of a block's rows."""
    position = block * STRIP + HIGH * HALF + gl.arange(0, HALF, LAYOUT)
    slot = gl.load(sorted_slots + position)
    return position, slot, slot < num_slots


@gluon.jit
def _store(
    value, at, stride, place, rows_live, column, width, LAYOUT: gl.constexpr,
):  # fmt: skip
    """(HALF, STRIP) to rows `place` of a matrix, 16 bytes a thread."""
    value = gl.convert_layout(value, LAYOUT)
    place = gl.convert_layout(place, gl.SliceLayout(1, LAYOUT))
    rows_live = gl.convert_layout(rows_live, gl.SliceLayout(1, LAYOUT))
    c = column + gl.arange(0, STRIP, gl.SliceLayout(0, LAYOUT))
    gl.store(at + place.to(gl.int64)[:, None] * stride + c[None, :], value, mask=rows_live[:, None] & (c < width)[None, :])


@gluon.jit
def _multiply(
    a_ring, left_ring, right_ring, full, empty, a_scale, w_scale, out, out_scale, weights, sorted_slots, block_expert,
    num_m, num_n, group_m, num_slots, slots_per_row, N, K,
    stride_xr, stride_xg, stride_se, stride_sn, stride_sg, stride_or, stride_weight,
    HIGH: gl.constexpr, NAME: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr, LIMIT: gl.constexpr,
    LINEAR_BETA: gl.constexpr, DTYPE: gl.constexpr, BLOCKED: gl.constexpr, FAST: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The low or HIGH half of each block's rows."""
    FIRST: gl.constexpr = NAME != ""
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, STEP // 4])
    ROWS: gl.constexpr = gl.SliceLayout(1, SUM)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SUM)
    WORDS: gl.constexpr = 16 if out_scale is not None else 8
    OUT: gl.constexpr = gl.BlockedLayout([1, WORDS], [32 * WORDS // STRIP, STRIP // WORDS], [4, 1], [1, 0])
    part = gl.zeros([HALF, STRIP], gl.float32, SUM)
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, PROGRAMS):
        block, column = _swizzle(tile, num_m, num_n, group_m)
        expert = gl.load(block_expert + block).to(gl.int64)
        left_row, right_row = _strips(column, N, FIRST)
        left = gl.zeros([HALF, STRIP], gl.float32, SUM)
        right = gl.zeros([HALF, STRIP], gl.float32, SUM)
        if BLOCKED:
            position, slot, live = _rows(block, sorted_slots, num_slots, HIGH, ROWS)
            xs_m = a_scale + (slot // slots_per_row if FIRST else position).to(gl.int64) * stride_xr
            # Rows of padding exist between the products, and their scales with them.
            scaled = live if FIRST else position >= 0
            own = w_scale + expert * stride_se
            left_at = own + (left_row // STRIP).to(gl.int64) * stride_sn
            # A last strip may lie beyond the last row. What it gives is not stored.
            right_at = own + (gl.minimum(right_row, N - 1) // STRIP).to(gl.int64) * stride_sn
            xs = gl.load(xs_m, mask=scaled, other=1.0)
            left_s = gl.load(left_at)
            right_s = gl.load(right_at)
        for k in range(0, K, STEP):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            a = a_ring.index(stage).slice(HIGH * HALF, HALF)
            w_left = left_ring.index(stage).permute((1, 0))
            w_right = right_ring.index(stage).permute((1, 0))
            if FAST:
                left = warpgroup_mma(a, w_left, left, is_async=True)
                right = warpgroup_mma(a, w_right, right, is_async=True)
                # This step's two products run on; those of the last step, maybe another tile's, are done.
                left, right = warpgroup_mma_wait(2, [left, right])
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
            else:
                part = warpgroup_mma(a, w_left, part, use_acc=False, is_async=True)
                if BLOCKED:
                    # The last step reads its own group again: what it would read ahead does not exist.
                    ahead = gl.minimum(k + STRIP, K - 1) // STRIP
                    xs_next = gl.load(xs_m + ahead * stride_xg, mask=scaled, other=1.0)
                    left_next = gl.load(left_at + ahead * stride_sg)
                    right_next = gl.load(right_at + ahead * stride_sg)
                part = warpgroup_mma_wait(0, [part])
                if BLOCKED:
                    left += part * (xs * left_s)[:, None]
                else:
                    left += part
                # Waits for nothing, but nothing moves across: the next product overwrites what was scaled.
                left = warpgroup_mma_wait(0, [left])
                part = warpgroup_mma(a, w_right, part, use_acc=False, is_async=True)
                part = warpgroup_mma_wait(0, [part])
                mbarrier.arrive(empty.index(stage), count=1)
                if BLOCKED:
                    right += part * (xs * right_s)[:, None]
                    xs, left_s, right_s = xs_next, left_next, right_next
                else:
                    right += part
            step += 1
        left, right = warpgroup_mma_wait(0, [left, right])
        # Again, because nothing but sums stays in registers during the loop.
        position, slot, live = _rows(block, sorted_slots, num_slots, HIGH, ROWS)
        c = gl.arange(0, STRIP, COLUMNS)
        if w_scale is not None and not BLOCKED:
            xs_m = a_scale + (slot // slots_per_row if FIRST else position).to(gl.int64) * stride_xr
            token = gl.load(xs_m, mask=live if FIRST else position >= 0, other=0.0)[:, None]
            own = w_scale + expert * stride_se
            left *= token * gl.load(own + left_row + c, mask=left_row + c < N, other=0.0)[None, :]
            right *= token * gl.load(own + right_row + c, mask=right_row + c < N, other=0.0)[None, :]
        if FIRST:
            h = _quickly_gated(left, right, NAME, ALPHA, BETA, LIMIT, LINEAR_BETA).to(DTYPE)
            if out_scale is not None:
                value = h.to(gl.float32)
                scale = scale_of(gl.max(gl.abs(value), 1))
                groups = gl.cdiv(N // 2, STRIP)
                gl.store(out_scale + position.to(gl.int64) * groups + column, scale)
                _store(e4m3_codes(value, scale[:, None]), out, stride_or, position, position >= 0, column * STRIP, N // 2, OUT)
            else:
                _store(h, out, stride_or, position, position >= 0, column * STRIP, N // 2, OUT)
        else:
            if weights is not None:
                factor = gl.load(weights + slot.to(gl.int64) * stride_weight, mask=live, other=0.0).to(gl.float32)[:, None]
                left *= factor
                right *= factor
            _store(left.to(DTYPE), out, stride_or, slot, live, left_row, N, OUT)
            _store(right.to(DTYPE), out, stride_or, slot, live, right_row, N, OUT)


@gluon.jit(do_not_specialize=["num_slots", "slots_per_row", "stride_xr", "stride_se", "stride_sn", "stride_weight", "group_m"])
def _specialised(
    a_rows, w_rows, a_scale, w_scale, out, out_scale, weights, sorted_slots, block_expert, num_padded,
    num_slots, slots_per_row, N, K, group_m,
    stride_xr, stride_xg, stride_se, stride_sn, stride_sg, stride_or, stride_weight,
    NAME: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr, LIMIT: gl.constexpr, LINEAR_BETA: gl.constexpr,
    DTYPE: gl.constexpr, BLOCKED: gl.constexpr, FAST: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr,
):  # fmt: skip
    """GEMM1 where NAME is an activation, else GEMM2."""
    FIRST: gl.constexpr = NAME != ""
    num_m = gl.load(num_padded) // STRIP
    num_n = gl.cdiv(N, 2 * STRIP)
    a_ring = gl.allocate_shared_memory(a_rows.dtype, [STAGES, STRIP, STEP], a_rows.layout)
    left_ring = gl.allocate_shared_memory(w_rows.dtype, [STAGES, STRIP, STEP], w_rows.layout)
    right_ring = gl.allocate_shared_memory(w_rows.dtype, [STAGES, STRIP, STEP], w_rows.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (_multiply, (
                a_ring, left_ring, right_ring, full, empty, a_scale, w_scale, out, out_scale, weights, sorted_slots,
                block_expert, num_m, num_n, group_m, num_slots, slots_per_row, N, K,
                stride_xr, stride_xg, stride_se, stride_sn, stride_sg, stride_or, stride_weight,
                gl.constexpr(0), NAME, ALPHA, BETA, LIMIT, LINEAR_BETA, DTYPE, BLOCKED, FAST, STEP, STAGES, PROGRAMS,
            )),
            (_multiply, (
                a_ring, left_ring, right_ring, full, empty, a_scale, w_scale, out, out_scale, weights, sorted_slots,
                block_expert, num_m, num_n, group_m, num_slots, slots_per_row, N, K,
                stride_xr, stride_xg, stride_se, stride_sn, stride_sg, stride_or, stride_weight,
                gl.constexpr(1), NAME, ALPHA, BETA, LIMIT, LINEAR_BETA, DTYPE, BLOCKED, FAST, STEP, STAGES, PROGRAMS,
            )),
            (_load, (
                a_rows, w_rows, a_ring, left_ring, right_ring, full, empty, block_expert, num_m, num_n, group_m, N, K,
                FIRST, STEP, STAGES, PROGRAMS,
            )),
        ],
        [4, 1],
        [WORKER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


ROW_BYTES = 128
"""Of a step: the swizzle of shared memory that products read without conflicts."""
TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def unable(w_eNK: Tensor, w_scale: Tensor | None, act: Activation | None, bias_eN: Tensor | None) -> str:
    """Why this kernel cannot multiply by these weights on this device, or an empty string."""
    _, N, K = w_eNK.shape
    if interpreted() or (w_eNK.is_cuda and torch.cuda.get_device_capability(w_eNK.device)[0] != 9):
        return "warps have roles on Hopper only"
    if not w_eNK.is_contiguous() or w_eNK.data_ptr() % 16 or K * w_eNK.element_size() % 16:
        return "a descriptor names contiguous weights whose rows are whole steps of 16 bytes"
    if bias_eN is not None or (act is not None and (not act.gated or act.interleaved)):
        return "gate and up rows are halves of the weights, and there are no biases"
    if w_scale is not None and _blocked(w_scale, N):
        apart = act is not None and N // 2 % STRIP.value > 0
    else:
        apart = w_scale is not None and w_scale.stride(1) != 1
    if apart:
        return "a strip of rows lies in one block of scales, and scales of channels are neighbours"
    return ""


def _blocked(w_scale: Tensor, N: int) -> bool:
    return w_scale.size(1) != N or w_scale.size(2) > 1


def _described(matrix: Tensor) -> TensorDescriptor:
    size = matrix.element_size()
    layout = NVMMASharedLayout(swizzle_byte_width=ROW_BYTES, element_bitwidth=8 * size, rank=2)
    return TensorDescriptor(
        matrix, list(matrix.shape), list(matrix.stride()), [STRIP.value, ROW_BYTES // size], layout
    )  # fmt: skip


def _launch(
    a: tuple[Tensor, Tensor | None],
    w: tuple[Tensor, Tensor | None],
    out: Tensor,
    out_scale: Tensor | None,
    alignment: Alignment,
    tile: Tile,
    slots_per_row: int,
    num_slots: int,
    dtype: torch.dtype,
    act: Activation | None,
    weights: Tensor | None,
) -> None:
    (rows, scale), (w_eNK, w_scale) = a, w
    e, N, K = w_eNK.shape
    check(rows.size(1) == K, f"rows have {rows.size(1)} columns; the weights {tuple(w_eNK.shape)} need {K}")
    step = ROW_BYTES // w_eNK.element_size()
    sizes = (tile.block_m, tile.block_n, tile.block_k, alignment.block_m, tile.warps)
    check(sizes == (128, 256, step, 128, 4), f"tile {tile}: with roles, tiles are 128x256x{step} and sums belong to 4 warps")
    blocked = w_scale is not None and _blocked(w_scale, N)
    programs = max(tile.per_sm, 1) * processors(rows.device)
    _specialised[(min(programs, alignment.num_blocks * triton.cdiv(N, tile.block_n)),)](
        _described(rows), _described(w_eNK.view(e * N, K)), scale, w_scale, out, out_scale, weights,
        alignment.sorted_slots, alignment.block_expert, alignment.num_padded, num_slots, slots_per_row, N, K, tile.group_m,
        *(scale.stride() if scale is not None else (0, 0)), *(w_scale.stride() if w_scale is not None else (0, 0, 0)),
        out.stride(0), weights.stride(0) if weights is not None else 0,
        NAME=act.name if act else "", ALPHA=(act and act.alpha) or 0.0, BETA=(act and act.beta) or 0.0,
        LIMIT=(act and act.limit) or 0.0, LINEAR_BETA=(act and act.linear_beta) or 0.0,
        DTYPE=TYPES[dtype], BLOCKED=blocked, FAST=(tile.fast and not blocked) or w_scale is None, STEP=step,
        STAGES=tile.stages, PROGRAMS=programs, num_warps=tile.warps,
    )  # fmt: skip


def gate_up_act(
    x: tuple[Tensor, Tensor | None],
    w1: tuple[Tensor, Tensor | None],
    h: tuple[Tensor, Tensor | None],
    alignment: Alignment,
    tile: Tile,
    slots_per_row: int,
    num_slots: int,
    act: Activation,
    dtype: torch.dtype,
) -> None:
    """As the fused layers' gate_up_act, on rows in sorted order (`sort_rows`); scales of x stay in the order of its rows.

    x and w1 are 16-bit values, or codes with their scales; h likewise, codes where it has room for their scales."""
    _launch(x, w1, *h, alignment, tile, slots_per_row, num_slots, dtype, act, None)


def down(
    h: tuple[Tensor, Tensor | None],
    w2: tuple[Tensor, Tensor | None],
    out_SH: Tensor,
    alignment: Alignment,
    tile: Tile,
    weights_S: Tensor | None = None,
) -> None:
    """As the fused layers' down."""
    _launch(h, w2, out_SH, None, alignment, tile, 1, out_SH.size(0), out_SH.dtype, None, weights_S)
