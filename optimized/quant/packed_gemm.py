"""Both products on mxfp4 weights and 16-bit rows, for few rows an expert: four-bit codes become bf16 on their way to the tensor
core, at two instructions and a half a code.

A 32-bit word holds eight codes of one weight row, columns 8j .. 8j + 7. Plane r of a tile is code r of every word: eight planes
make eight products, each with the columns 8j + r of the rows. Rows are stored so that these lie together (`permute`, and
GEMM1's epilogue): within 128 columns, column 8j + r is at 16 r + j. No code ever moves between threads: a word goes to the
thread that multiplies it.

A pair of codes becomes a pair of bf16 by moving sign and magnitude to their places. What the magnitude's exponent and mantissa
bit then mean is the value times 2^-126, subnormal codes as subnormal numbers; a product with 2^126 and one with the group's
power of two put that right, both exact (bf16 has float32's range). Where all scales of a tensor are 2 at most, as trained ones
are, it is one product.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from moeproof.optimized.align import Alignment
from moeproof.optimized.fused_gemm import _activation
from moeproof.optimized.grouped_gemm import _swizzle
from moeproof.optimized.overlap import after_previous, launch_options
from moeproof.optimized.quant.codes import decode
from moeproof.optimized.tiles import Tile, interpreted, processors
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.formats import FORMATS

Tensor = torch.Tensor
CODES = tl.constexpr(8)
"""In a word."""
CHUNK = tl.constexpr(128)
GROUP = tl.constexpr(32)


def _assembly(r: int, low: bool) -> str:
    """Two words and a pair of bf16 factors -> plane r of both words, as a pair of bf16. With `low`, 2^126 is in the factors.

    prmt takes the halves that hold code r. One product moves it to two places at once, 6 bits apart, without a carry: in one
    its sign is bit 15, in the other its magnitude bits 8..6.
    """
    down, even = 8 * (r % 4 // 2), r % 2 == 0
    return f"""{{
        .reg .b32 t, one;
        mov.b32 one, 0x7E807E80;
        prmt.b32 t, $1, $2, {"0x5410" if r < 4 else "0x7632"};
        shr.b32 t, t, {down};
        and.b32 t, t, {"0x000F000F" if even else "0x00F000F0"};
        mul.lo.u32 t, t, {"0x1040" if even else "0x104"};
        and.b32 t, t, 0x81C081C0;
        {"" if low else "mul.rn.bf16x2 t, t, one;"}
        mul.rn.bf16x2 $0, t, $3;
    }}"""


ASSEMBLY = tl.constexpr(tuple(_assembly(r, False) for r in range(8)))
ASSEMBLY_LOW = tl.constexpr(tuple(_assembly(r, True) for r in range(8)))


@triton.jit
def _plane(words, factor, r: tl.constexpr, LOW: tl.constexpr, FMT: tl.constexpr):
    """bf16 of code r of each word, times its group's factor (bf16). FMT: the codes' format in the interpreter, which knows no
    assembly."""
    if FMT is not None:
        value = (decode((words >> (4 * r)) & 15, FMT) * (2.0**-126 if LOW else 1.0)).to(tl.bfloat16) * factor
    else:
        value = tl.inline_asm_elementwise(
            ASSEMBLY_LOW[r] if LOW else ASSEMBLY[r], "=r,r,r,r", [words, factor], dtype=tl.bfloat16, is_pure=True, pack=2
        )  # fmt: skip
    return value


@triton.jit
def _planes(words, factor, LOW: tl.constexpr, FMT: tl.constexpr):
    """(rows, 8 C) of words (rows, C): plane 0, plane 1, .. Views only, so that a thread keeps what it decoded."""
    first = tl.join(
        tl.join(_plane(words, factor, 0, LOW, FMT), _plane(words, factor, 1, LOW, FMT)),
        tl.join(_plane(words, factor, 2, LOW, FMT), _plane(words, factor, 3, LOW, FMT)),
    )
    second = tl.join(
        tl.join(_plane(words, factor, 4, LOW, FMT), _plane(words, factor, 5, LOW, FMT)),
        tl.join(_plane(words, factor, 6, LOW, FMT), _plane(words, factor, 7, LOW, FMT)),
    )
    return tl.reshape(tl.permute(tl.join(first, second), [0, 4, 3, 2, 1]), [words.shape[0], 8 * words.shape[1]])


@triton.jit
def _power(code, LOW: tl.constexpr):
    """bf16 2^(code - 127) of e8m0 codes: 0 is a subnormal number, 255 NaN. LOW: 2^(code - 1), of codes up to 128."""
    wide = code.to(tl.int16)
    if LOW:
        bits = (wide + 126) << 7
    else:
        bits = tl.where(code == 0, 0x40, tl.where(code == 255, 0x7FC0, wide << 7))
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _unpacked(low, high, shift):
    """(rows, 4 C) bytes as int32, of (rows, C) words: of `low` from bit `shift` on, the rest of `high`."""
    word = low.to(tl.uint32, bitcast=True)
    if high is not None:
        left = high.to(tl.uint32, bitcast=True) << ((32 - shift) % 32)[:, None]
        word = (word >> shift[:, None]) | tl.where(shift[:, None] > 0, left, 0)
    word = word.to(tl.int32, bitcast=True)
    even = tl.join(word & 255, (word >> 16) & 255)
    odd = tl.join((word >> 8) & 255, (word >> 24) & 255)
    return tl.reshape(tl.join(even, odd), [low.shape[0], 4 * low.shape[1]])


@triton.jit
def _step(
    acc, a_m, live, w_n, s_n, shift, inside, first, left,
    SCALES: tl.constexpr, LOW: tl.constexpr, SWAP: tl.constexpr, APART: tl.constexpr,
    STEP: tl.constexpr, EVEN_N: tl.constexpr, FULL: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """acc and the products of STEP columns from `first` on, of which `left` groups exist; FULL: all of them.

    Between a word's load and its product stand only operations on elements and views, so that Triton loads it where it is
    multiplied. Swapped, weights come from registers and all planes make one product, whose pieces Triton keeps in flight while
    it decodes the next step; unswapped they would have to pass through shared memory. Scales come four to a word as well, which
    can be copied asynchronously (bytes cannot); `shifted` ones begin at bit `shift` of a row's first word.
    """
    BLOCK_N: tl.constexpr = inside.shape[0]
    WORDS: tl.constexpr = STEP // CODES
    GROUPS: tl.constexpr = STEP // GROUP
    j = tl.arange(0, WORDS)
    # Whole groups: four words are there or are not, and are copied together.
    real = j // (GROUP // CODES) < left
    w_at = w_n[:, None] + (j + first // CODES)[None, :]
    if EVEN_N and FULL:
        words = tl.load(w_at)
    elif FULL:
        words = tl.load(w_at, mask=inside[:, None], other=0)
    else:
        words = tl.load(w_at, mask=inside[:, None] & real[None, :], other=0)
    if SCALES == "bytes":
        g = tl.arange(0, GROUPS)
        code = tl.load(s_n[:, None] + (g + first // GROUP)[None, :], mask=inside[:, None] & (g < left)[None, :], other=127)
    else:
        g = tl.arange(0, GROUPS // 4)
        s_at = s_n[:, None] + (g + first // (4 * GROUP))[None, :]
        here = inside[:, None]
        low = tl.load(s_at, mask=here if FULL else here & (4 * g < left)[None, :], other=0)
        if SCALES == "shifted":
            here = here & (shift > 0)[:, None]
            more = (4 * g + 4)[None, :] - (shift // 8)[:, None] < left
            code = _unpacked(low, tl.load(s_at + 1, mask=here if FULL else here & more, other=0), shift)
            if not FULL:
                # What lies behind a row's last scale is not its own.
                code = tl.where((tl.arange(0, GROUPS) < left)[None, :], code, 127)
        else:
            code = _unpacked(low, None, shift)
    factor = tl.broadcast_to(_power(code, LOW)[:, :, None], [BLOCK_N, GROUPS, GROUP // CODES])
    factor = tl.reshape(factor, [BLOCK_N, WORDS])
    if SWAP:
        # All planes, one behind the other: where their columns lie in a permuted row.
        k = tl.arange(0, STEP)
        j = k % WORDS
        at = k // WORDS * (CHUNK // CODES) + j // (CHUNK // CODES) * CHUNK + j % (CHUNK // CODES)
        at = tl.max_contiguous(tl.multiple_of(at, CHUNK // CODES), CHUNK // CODES) + first
        mask = live[:, None]
        if not FULL:
            mask = mask & tl.max_constancy(j // (GROUP // CODES) < left, GROUP // CODES)[None, :]
        rows = tl.load(a_m[:, None] + at[None, :], mask=mask, other=0.0)
        if APART:
            # By an fma, which the compiler does not take for an accumulator.
            acc = tl.fma(tl.dot(_planes(words, factor, LOW, FMT), rows.T), 1.0, acc)
        else:
            acc = tl.dot(_planes(words, factor, LOW, FMT), rows.T, acc)
    else:
        # Where column 8j of a step lies in a permuted row.
        a = a_m[:, None] + (j // (CHUNK // CODES) * CHUNK + j % (CHUNK // CODES) + first)[None, :]
        mask = live[:, None] if FULL else live[:, None] & real[None, :]
        for r in tl.static_range(CODES):
            rows = tl.load(a + r * (CHUNK // CODES), mask=mask, other=0.0)
            acc = tl.dot(rows, _plane(words, factor, r, LOW, FMT).T, acc)
    return acc


@triton.jit
def _product(
    a_m, live, w_n, s_n, shift, inside, K, SCALES: tl.constexpr, LOW: tl.constexpr, SWAP: tl.constexpr, APART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr, WHOLE: tl.constexpr, TAIL: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """float32 (BLOCK_M, BLOCK_N). a_m, w_n, s_n: pointers to each row's first column, word and scale; columns are neighbours.

    WHOLE steps, where there is one, need no mask on columns; what remains is one shorter step of TAIL columns, 0 = nothing.
    """
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    whole = K // BLOCK_K * BLOCK_K
    if WHOLE:
        if SWAP:
            # No path around the loop: sums that are defined on it would keep products from overlapping.
            tl.assume(whole > 0)
        for first in range(0, whole, BLOCK_K):
            acc = _step(
                acc, a_m, live, w_n, s_n, shift, inside, first, BLOCK_K // GROUP,
                SCALES, LOW, SWAP, APART, BLOCK_K, EVEN_N, True, FMT,
            )  # fmt: skip
    if TAIL > 0:
        acc = _step(
            acc, a_m, live, w_n, s_n, shift, inside, whole, (K - whole) // GROUP,
            SCALES, LOW, SWAP, APART, TAIL, EVEN_N, False, FMT,
        )  # fmt: skip
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def _tile(
    tile, num_m, num_n, a, w, w_scale, bias_eN, out, weights, sorted_slots, block_expert, num_slots, slots_per_row, N, K,
    stride_ar, stride_we, stride_wn, stride_se, stride_sn, stride_be, stride_bn, stride_or, stride_oc, stride_weight,
    NAME: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr,
    SCALES: tl.constexpr, LOW: tl.constexpr, SWAP: tl.constexpr, APART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M,
    EVEN_N: tl.constexpr, WHOLE: tl.constexpr, TAIL: tl.constexpr, UNIT: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    FIRST: tl.constexpr = NAME != ""
    block, column = _swizzle(tile, num_m, num_n, GROUP_M)
    expert = tl.load(block_expert + block).to(tl.int64)
    position = block * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.load(sorted_slots + position)
    live = slot < num_slots
    row = slot // slots_per_row if FIRST else position
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    weight_row = (n // 2 + n % 2 * (N // 2) if GATED and PACKED else n).to(tl.int64)
    offset = expert * stride_se + weight_row * stride_sn
    if SCALES == "bytes":
        s_n = w_scale + offset
    else:
        s_n = w_scale + offset // 4
    acc = _product(
        a + row.to(tl.int64) * stride_ar, live, w + (expert * stride_we + weight_row * stride_wn) * UNIT,
        s_n, (offset % 4 * 8).to(tl.int32), inside, K, SCALES, LOW, SWAP, APART,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, WHOLE, TAIL, FMT,
    )  # fmt: skip
    if bias_eN is not None:
        at = bias_eN + expert * stride_be + weight_row * stride_bn
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
    if weights is not None:
        acc *= tl.load(weights + slot.to(tl.int64) * stride_weight, mask=live, other=0.0).to(tl.float32)[:, None]
    if FIRST:
        h = _activation(acc, NAME, ALPHA, BETA, LIMIT, LINEAR_BETA, GATED)
        c = column * h.shape[1] + tl.arange(0, h.shape[1])
        place = c // CHUNK * CHUNK + c % CODES * (CHUNK // CODES) + c % CHUNK // CODES
        at = out + position.to(tl.int64)[:, None] * stride_or + place[None, :] * stride_oc
        tl.store(at, h.to(out.dtype.element_ty), mask=(c < (N // 2 if GATED else N))[None, :])
    else:
        at = out + slot.to(tl.int64)[:, None] * stride_or + n.to(tl.int64)[None, :] * stride_oc
        tl.store(at, acc.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit(
    do_not_specialize=[
        "num_slots",
        "slots_per_row",
        "stride_we",
        "stride_wn",
        "stride_se",
        "stride_sn",
        "stride_weight",
        "GROUP_M",
    ]
)
def _fused_packed(
    a, w, w_scale, bias_eN, out, weights, sorted_slots, block_expert, num_padded, num_slots, slots_per_row, N, K,
    stride_ar, stride_we, stride_wn, stride_se, stride_sn, stride_be, stride_bn, stride_or, stride_oc, stride_weight,
    NAME: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr,
    SCALES: tl.constexpr, LOW: tl.constexpr, SWAP: tl.constexpr, APART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M,
    EVEN_N: tl.constexpr, WHOLE: tl.constexpr, TAIL: tl.constexpr, PROGRAMS: tl.constexpr, OVERLAP: tl.constexpr,
    UNIT: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """GEMM1 where NAME is an activation, else GEMM2. PROGRAMS > 0: a persistent grid of that size."""
    after_previous(OVERLAP)
    num_m = tl.load(num_padded) // BLOCK_M
    num_n = tl.cdiv(N, BLOCK_N)
    if PROGRAMS == 0:
        if tl.program_id(0) < num_m * num_n:
            _tile(
                tl.program_id(0), num_m, num_n, a, w, w_scale, bias_eN, out, weights, sorted_slots, block_expert, num_slots,
                slots_per_row, N, K, stride_ar, stride_we, stride_wn, stride_se, stride_sn, stride_be, stride_bn,
                stride_or, stride_oc, stride_weight, NAME, GATED, PACKED, ALPHA, BETA, LIMIT, LINEAR_BETA,
                SCALES, LOW, SWAP, APART, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, EVEN_N, WHOLE, TAIL, UNIT, FMT,
            )  # fmt: skip
    else:
        for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS):
            _tile(
                tile, num_m, num_n, a, w, w_scale, bias_eN, out, weights, sorted_slots, block_expert, num_slots,
                slots_per_row, N, K, stride_ar, stride_we, stride_wn, stride_se, stride_sn, stride_be, stride_bn,
                stride_or, stride_oc, stride_weight, NAME, GATED, PACKED, ALPHA, BETA, LIMIT, LINEAR_BETA,
                SCALES, LOW, SWAP, APART, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, EVEN_N, WHOLE, TAIL, UNIT, FMT,
            )  # fmt: skip


@triton.jit
def _permute(x, out, T, H, stride_xt, stride_xh, stride_o, BLOCK_T: tl.constexpr, CHUNKS: tl.constexpr, OVERLAP: tl.constexpr):
    after_previous(OVERLAP)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * CHUNKS * CHUNK + tl.arange(0, CHUNKS * CHUNK)
    mask = (t < T)[:, None] & (column < H)[None, :]
    tile = tl.load(x + t.to(tl.int64)[:, None] * stride_xt + column[None, :] * stride_xh, mask=mask, other=0.0)
    place = column // CHUNK * CHUNK + column % CODES * (CHUNK // CODES) + column % CHUNK // CODES
    tl.store(out + t.to(tl.int64)[:, None] * stride_o + place[None, :], tile, mask=mask)


def room(rows: int, columns: int, like: Tensor) -> Tensor:
    """Uninitialised permuted rows: whole chunks of columns."""
    return torch.empty(rows, triton.cdiv(columns, CHUNK.value) * CHUNK.value, dtype=like.dtype, device=like.device)


def permute(x_TH: Tensor, overlap: bool = False, first: bool = False) -> Tensor:
    """x with the columns of each plane together: (T, H), H rounded up to a multiple of 128; what is beyond is undefined."""
    T, H = x_TH.shape
    out = room(T, H, x_TH)
    block_t = min(triton.next_power_of_2(T), 64 if interpreted() else 4)
    _permute[(triton.cdiv(T, block_t), triton.cdiv(H, 512))](
        x_TH, out, T, H, *x_TH.stride(), out.stride(0), BLOCK_T=block_t, CHUNKS=4, **launch_options(overlap, first)
    )
    return out


def words(w: Tensor) -> Tensor:
    """Codes (e, N, K / 2) as int32 words (e, N, K / 8): a view."""
    good = w.stride(2) == 1 and w.stride(1) % 4 == 0 and w.stride(0) % 4 == 0 and w.data_ptr() % 4 == 0
    check(good, f"four-bit weights must have neighbours in the last dim and rows that start at words, not strides {w.stride()}")
    return w.view(torch.int32)


_lows = WeakTensorKeyDictionary()
"""Tensor of scales -> (its version, whether all of its codes are LARGEST_LOW at most)."""
LARGEST_LOW = 128
"""2^(128 - 1) is the largest power of two in bf16."""


def _low(scale: Tensor) -> bool:
    """Whether the kernel for low scales will do: looked up once for each version of a tensor, since it waits for the GPU.

    Scales that change behind torch's back, or between replays of a graph, must stay low: higher ones give inf and NaN.
    """
    if scale.is_inference():
        return False
    if scale not in _lows or _lows[scale][0] != scale._version:
        if scale.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        _lows[scale] = scale._version, bool((scale <= LARGEST_LOW).all())
    return bool(_lows[scale][1])


def _scale_words(scale: Tensor, K: int) -> tuple[str, Tensor]:
    """How a row's scales are read, and from what: as words where every row begins at one and fills its last, as words from some
    byte on where the tensor is contiguous, or byte by byte. Strides are those of bytes in each case."""
    if scale.data_ptr() % 4 == 0 and scale.numel() % 4 == 0 and scale.is_contiguous():
        return "words" if K % 128 == 0 else "shifted", scale.view(-1).view(torch.int32)
    return "bytes", scale


def _tail(K: int, step: int) -> int:
    """Columns of a last, shorter step: a multiple of a chunk."""
    rest = triton.cdiv(K % step, CHUNK.value) * CHUNK.value
    return triton.next_power_of_2(rest) if rest else 0


def _launch(
    a: Tensor,
    w: tuple[Tensor, Tensor],
    out: Tensor,
    alignment: Alignment,
    tile: Tile,
    sizes: tuple[int, int],
    slots_per_row: int,
    num_slots: int,
    act: Activation | None,
    bias_eN: Tensor | None,
    weights: Tensor | None,
    overlap: bool,
) -> None:
    (N, K), (codes, scale) = sizes, w
    check(a.dtype == torch.bfloat16, f"rows are {a.dtype}; the scales of mxfp4 need the range of torch.bfloat16")
    check(tile.block_m == alignment.block_m, f"tile {tile} does not fit blocks of {alignment.block_m} rows")
    check(tile.block_k % 128 == 0, f"tile {tile}: a step is a multiple of 128 columns")
    check(a.stride(1) == 1 and scale.stride(2) == 1, "rows and scales must have neighbours in the last dim")
    packed = words(codes)
    how, scale_words = _scale_words(scale, K)
    # Rows that begin at multiples of 16 bytes are copied 16 bytes at a time, but the compiler has to know of it.
    unit = 4 if packed.data_ptr() % 16 == 0 and all(s % 4 == 0 for s in packed.stride()[:2]) else 1
    num_n = triton.cdiv(N, tile.block_n)
    tiles = alignment.num_blocks * num_n
    programs = min(tile.per_sm * processors(a.device), tiles) if tile.per_sm else 0
    _fused_packed[(programs or tiles,)](
        a, packed, scale_words, bias_eN, out, weights,
        alignment.sorted_slots, alignment.block_expert, alignment.num_padded, num_slots, slots_per_row, N, K,
        a.stride(0), *(s // unit for s in packed.stride()[:2]), *scale.stride()[:2],
        *(bias_eN.stride() if bias_eN is not None else (0, 0)),
        *out.stride(), weights.stride(0) if weights is not None else 0,
        NAME=act.name if act else "", GATED=act is not None and act.gated, PACKED=act is not None and not act.interleaved,
        ALPHA=(act and act.alpha) or 0.0, BETA=(act and act.beta) or 0.0,
        LIMIT=(act and act.limit) or 0.0, LINEAR_BETA=(act and act.linear_beta) or 0.0,
        SCALES=how, LOW=_low(scale), SWAP=tile.swap, APART=tile.apart, EVEN_N=N % tile.block_n == 0,
        WHOLE=K // tile.block_k > 0, TAIL=_tail(K, tile.block_k),
        PROGRAMS=tile.per_sm * processors(a.device), UNIT=unit, FMT=FORMATS["e2m1"] if interpreted() else None,
        **launch_options(overlap), **tile.options,
    )  # fmt: skip


def gate_up_act(
    x: Tensor,
    w1: tuple[Tensor, Tensor],
    h: Tensor,
    alignment: Alignment,
    tile: Tile,
    sizes: tuple[int, int],
    slots_per_row: int,
    act: Activation,
    b1_eN: Tensor | None = None,
    overlap: bool = False,
) -> None:
    """h[position] = act(x[slot // slots_per_row] @ w1[expert].T (+ b1)) of each sorted position; sizes = (N, H).

    x and h are permuted (`permute`, `room`); w1 is codes and scales as the contract stores them.
    """
    num_slots = x.size(0) * slots_per_row
    _launch(x, w1, h, alignment, tile, sizes, slots_per_row, num_slots, act, b1_eN, None, overlap)


def down(
    h: Tensor,
    w2: tuple[Tensor, Tensor],
    out_SH: Tensor,
    alignment: Alignment,
    tile: Tile,
    I: int,  # noqa: E741  (the project's letter)
    b2_eH: Tensor | None = None,
    weights_S: Tensor | None = None,
    overlap: bool = False,
) -> None:
    """out[slot] = weight[slot] * (h[position of slot] @ w2[expert].T (+ b2)), for live slots; other rows are not touched."""
    sizes = (out_SH.size(1), I)
    _launch(h, w2, out_SH, alignment, tile, sizes, 1, out_SH.size(0), None, b2_eH, weights_S, overlap)
