"""Products of codes, every scheme in both layouts, against float64 products of values that are decoded number by number."""

from __future__ import annotations

import math

import pytest
import torch
from plain_layer import DEVICE, check_close, local_index, random_ids
from plain_quant import decode

from moeproof.optimized.align import align
from moeproof.optimized.quant.gemm import Rows, Weights, batched_scaled_gemm, grouped_scaled_gemm
from moeproof.optimized.quant.multiply import MULTIPLIERS, multiplier
from moeproof.optimized.quant.tiles import quant_tile
from moeproof.optimized.slots import Slots
from moeproof.reference.contract import FORMATS, SCHEMES, ContractError, Quantiser, QuantScheme
from moeproof.reference.contract.formats import Format
from moeproof.reference.contract.layouts import pack_nibbles

Tensor = torch.Tensor
QUANTISED = {name: s for name, s in SCHEMES.items() if s.quantised}
every_scheme = pytest.mark.parametrize("scheme", QUANTISED.values(), ids=QUANTISED)
e, N, T, K = 3, 38, 9, 2
IDS = random_ids(1, T, K, e)


def length(scheme: QuantScheme) -> int:
    """Columns: more than one group, ragged where allowed, and packed bytes that end inside a step."""
    assert scheme.w is not None
    size = max(q.group[1] for q in (scheme.a1, scheme.w) if q is not None)
    ragged = all(q.ragged for q in (scheme.a1, scheme.w) if q is not None)
    return 200 if ragged else 3 * size if size > 16 else 144


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(seed: int, fmt: Format, *shape: int) -> Tensor:
    """Unpacked codes, uint8: all of them except NaN, and int8 -128."""
    codes = torch.randint(0, 2**fmt.width, shape, generator=generator(seed), dtype=torch.uint8)
    if fmt.specials == "fn":
        codes = torch.where(codes & 127 == 127, 126, codes)
    return torch.where(codes == 128, 127, codes) if fmt.name == "int8" else codes


def stored(codes: Tensor, fmt: Format) -> Tensor:
    return (pack_nibbles(codes) if fmt.per_byte == 2 else codes.view(fmt.dtype)).to(DEVICE)


def values(codes: Tensor, fmt: Format) -> Tensor:
    table = torch.tensor([decode(c, fmt.name) for c in range(2**fmt.width)], dtype=torch.float64)
    return table[codes.long()]


def random_scales(seed: int, q: Quantiser, dtype: Format, exact: bool, *shape: int) -> tuple[Tensor, Tensor]:
    """(stored, float64): powers of two over 8 binades, else any mantissa as well."""
    g, fmt = generator(seed), q.scale_format(dtype)
    shape = q.scale_shape(*shape)
    power = torch.randint(-4, 5, shape, generator=g)
    if fmt.name == "e8m0":
        return (power + 127).to(torch.uint8).to(DEVICE), 2.0 ** power.double()
    if fmt.name == "e4m3fn":
        codes = ((power + 7) << 3) + (0 if exact else torch.randint(0, 8, shape, generator=g))
        codes = codes.to(torch.uint8)
        return codes.view(torch.float8_e4m3fn).to(DEVICE), values(codes, fmt)
    scale = 2.0 ** power.double() * (1 if exact else 1 + torch.rand(shape, generator=g).double())
    kept = scale.to(fmt.dtype)
    return kept.to(DEVICE), kept.double()


def expand(s: Tensor, q: Quantiser, rows: int, cols: int) -> Tensor:
    """(.., rows, cols): each element's own scale."""
    r, c = (
        torch.arange(n) // size if size else torch.zeros(n, dtype=torch.int64)
        for n, size in zip((rows, cols), q.group, strict=True)
    )
    return s[..., r, :][..., c]


def levels(q: Quantiser | None, experts: int, start: float) -> tuple[Tensor | None, Tensor]:
    """(second levels, what they multiply decoded values by), each of shape (experts or 1, 1, 1)."""
    if q is None or not q.two_level:
        return None, torch.ones(1, 1, 1, dtype=torch.float64)
    level = (start * 2.0 ** torch.arange(max(experts, 1))).view(-1, 1, 1).float()
    factor = level.double() if q.rule == "two_level_decode" else 1 / level.double()
    return (level if experts else level[0]).to(DEVICE), factor


class Made:
    """Operands of one product and their decoded values: x (R, A) or (e, C, A), w (e, N, A)."""

    def __init__(self, scheme: QuantScheme, dtype: str, exact: bool, batched: bool) -> None:
        A, fmt = length(scheme), FORMATS[dtype]
        shape = (e, 20, A) if batched else (T, A)
        q, w = scheme.a1, scheme.w
        assert w is not None
        codes = random_codes(1, w.format, e, N, A)
        scale, scales = random_scales(2, w, fmt, exact, e, N, A)
        zp, decoded = None, values(codes, w.format)
        if w.zero_points:
            zeros = torch.randint(0, 16, (e, N, A // w.group[1]), generator=generator(3), dtype=torch.uint8)
            zp = pack_nibbles(zeros.transpose(1, 2)).transpose(1, 2).to(DEVICE)
            decoded = decoded - expand(zeros.double(), w, N, A)
        level, factor = levels(w, e, 0.25)
        bias = torch.randint(-8, 9, (e, N), generator=generator(4)).to(fmt.dtype)
        self.bias = bias.double()
        self.w = decoded * expand(scales, w, N, A) * factor
        self.weights = Weights(stored(codes, w.format), w, scale, zp, level, bias.to(DEVICE))
        if q is None:
            x = torch.randint(-8, 9, shape, generator=generator(5)).double()
            self.rows, self.x = Rows(x.to(fmt.dtype).to(DEVICE)), x
            return
        codes = random_codes(5, q.format, *shape)
        scale, scales = random_scales(6, q, fmt, exact, *shape)
        level, factor = levels(q, e if batched else 0, 4.0)
        self.rows = Rows(stored(codes, q.format), q, scale, level)
        self.x = values(codes, q.format) * expand(scales, q, *shape[-2:]) * (factor if batched else factor[0])


def check(got: Tensor, x: Tensor, w: Tensor, bias: Tensor, exact: bool) -> None:
    """Bit for bit where the operands allow no rounding before the last, else within float32's."""
    want, magnitude = x @ w.T + bias, x.abs() @ w.abs().T + bias.abs()
    if exact:
        assert torch.equal(got.double().cpu(), want.to(got.dtype).double())
    else:
        check_close(got.cpu(), want, magnitude)


def compare(scheme: QuantScheme, dtype: str, exact: bool, batched: bool) -> None:
    """Operands of a problem in `dtype`. Results in float32 for fp16, whose range products of codes leave."""
    made, fmt = Made(scheme, dtype, exact, batched), FORMATS[dtype]
    kept = torch.float32 if dtype == "fp16" else fmt.dtype
    if batched:
        counts = torch.tensor([7, 0, 20], dtype=torch.int32, device=DEVICE)
        out = torch.full((e, 20, N), 7.0, dtype=kept, device=DEVICE)
        batched_scaled_gemm(made.rows, made.weights, out, counts, fmt)
        for i, count in enumerate(counts.tolist()):
            check(out[i, :count], made.x[i, :count], made.w[i], made.bias[i], exact)
            assert bool((out[i, count:] == 7).all())
        return
    out = torch.full((T * K, N), 7.0, dtype=kept, device=DEVICE)
    slots = Slots(IDS, e, e)
    grouped_scaled_gemm(made.rows, made.weights, out, align(slots, 16), K, fmt)
    for slot, expert in enumerate(i for row in local_index(IDS, e, None) for i in row):
        if expert < 0:
            assert bool((out[slot] == 7).all())
        else:
            check(out[slot : slot + 1], made.x[slot // K : slot // K + 1], made.w[expert], made.bias[expert], exact)


@every_scheme
@pytest.mark.parametrize("batched", [False, True], ids=["standard", "batched"])
def test_scales_of_any_mantissa(scheme: QuantScheme, batched: bool) -> None:
    """Over 8 binades, another one for every row, channel, block, group and expert; the result in float32 and with a bias."""
    compare(scheme, "fp32", False, batched)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("fp8_block", "bf16"), ("int8_token", "bf16"), ("mxfp4_w4a8", "bf16"), ("int4_w4a16_zp_g32", "bf16")),
        *(("int8_w8a16", "fp16"), ("int4_w4a16_zp_g32", "fp16"), ("nvfp4_w4a16", "fp16")),
    ],
)
def test_operands_and_results_of_16_bits(name: str, dtype: str) -> None:
    compare(SCHEMES[name], dtype, False, False)


@pytest.mark.parametrize(
    "name", ["int8_w8a16", "int4_w4a16_g32", "int4_w4a16_zp_g64", "mxfp4_w4a16", "nvfp4_w4a16", "int8_token"]
)
@pytest.mark.parametrize("batched", [False, True], ids=["standard", "batched"])
def test_powers_of_two_bit_for_bit(name: str, batched: bool) -> None:
    """Integers and power-of-two scales: no sum rounds, in whatever order."""
    compare(SCHEMES[name], "fp32", True, batched)


def test_the_step_s_scale_is_its_own_group_s() -> None:
    """A group that is longer than a step, and one whose last step is short: each row has one column that is not zero."""
    q = SCHEMES["fp8_block"]
    assert q.a1 is not None and q.w is not None
    A = 300
    x = torch.zeros(A, A, dtype=torch.uint8)
    x[torch.arange(A), torch.arange(A)] = 0x38  # 1.0
    xs = 2.0 ** torch.arange(3).float().repeat(A, 1)
    w = torch.full((1, N, A), 0x38, dtype=torch.uint8)
    ws = torch.tensor([[[1.0, 16.0, 256.0]]])
    out = torch.empty(1, A, N, device=DEVICE)
    rows = Rows(x.view(torch.float8_e4m3fn)[None].to(DEVICE), q.a1, xs[None].to(DEVICE))
    weights = Weights(w.view(torch.float8_e4m3fn).to(DEVICE), q.w, ws.to(DEVICE))
    batched_scaled_gemm(rows, weights, out, torch.tensor([A], dtype=torch.int32, device=DEVICE), FORMATS["fp32"])

    assert torch.equal(out[0].cpu(), (2.0 ** (5 * (torch.arange(A) // 128)))[:, None].expand(A, N))


def test_e8m0_codes_at_the_ends() -> None:
    """Code 0 is 2^-127 and not 0; code 254 is 2^127; 255 is NaN."""
    q = SCHEMES["mxfp4_w4a4"]
    assert q.a1 is not None and q.w is not None
    rows, one = torch.zeros(1, 3, 16, dtype=torch.uint8), torch.full((1, 1, 16), 0x22, dtype=torch.uint8)
    rows[:, :, 5] = 2  # 1.0 in column 10
    scale = torch.tensor([0, 254, 255], dtype=torch.uint8).view(1, 3, 1)
    for other, want in ((254, [1.0, math.inf, math.nan]), (0, [0.0, 1.0, math.nan])):
        out, count = torch.empty(1, 3, 1, device=DEVICE), torch.tensor([3], dtype=torch.int32, device=DEVICE)
        w = Weights(one.to(DEVICE), q.w, torch.tensor([[[other]]], dtype=torch.uint8, device=DEVICE))
        batched_scaled_gemm(Rows(rows.to(DEVICE), q.a1, scale.to(DEVICE)), w, out, count, FORMATS["fp32"])

        assert out.flatten().tolist() == pytest.approx(want, rel=0, nan_ok=True)


def test_integers_that_float32_would_round() -> None:
    """The int32 sum is exact; it is rounded once, when it is scaled."""
    q, A = SCHEMES["int8_token"], 4096
    assert q.a1 is not None and q.w is not None
    x = torch.full((1, 1, A), 127, dtype=torch.int8)
    w = torch.full((1, 2, A), 127, dtype=torch.int8)
    w[0, 1, :4] = torch.tensor([126, 125, 124, -127], dtype=torch.int8)
    out = torch.empty(1, 1, 2, device=DEVICE)
    weights = Weights(w.to(DEVICE), q.w, torch.ones(1, 2, 1, device=DEVICE))
    given = Rows(x.to(DEVICE), q.a1, torch.ones(1, 1, 1, device=DEVICE))
    batched_scaled_gemm(given, weights, out, torch.ones(1, dtype=torch.int32, device=DEVICE), FORMATS["fp32"])

    assert out.flatten().tolist() == (x[0].long() @ w[0].long().T).float().flatten().tolist()


def test_strided_and_transposed_operands() -> None:
    for name in ("fp8_token", "int4_w4a16_zp_g32", "mxfp8"):
        made, fmt = Made(QUANTISED[name], "fp32", False, False), FORMATS["fp32"]
        w = made.weights
        bytes_ = w.codes.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2)
        turned = Weights(
            bytes_.view(w.codes.dtype), w.quantiser, w.scale.transpose(1, 2).contiguous().transpose(1, 2), w.zp, w.level, w.bias
        )
        straight, crooked = (torch.zeros(T * K, N, device=DEVICE) for _ in range(2))
        for weights, out in ((w, straight), (turned, crooked)):
            grouped_scaled_gemm(made.rows, weights, out, align(Slots(IDS, e, e), 16), K, fmt)

        assert torch.equal(straight, crooked)


def test_every_scheme_has_a_multiplier_that_says_why() -> None:
    used = {(s.a1.fmt if s.a1 else None, s.w.fmt) for s in QUANTISED.values() if s.w}

    assert used == set(MULTIPLIERS)
    assert all(m.why for m in MULTIPLIERS.values())
    with pytest.raises(ContractError, match="int8 activations and e2m1 weights"):
        multiplier(SCHEMES["int8_token"].a1, SCHEMES["nvfp4"].w)  # type: ignore[arg-type]


def test_tiles_fit() -> None:
    """Powers of two that a tensor core takes, steps that stay inside a scale group."""
    for block_m, n, k, step in ((16, 1, 1, 0), (32, 50, 7168, 128), (64, 300, 32, 32), (128, 4096, 200, 0)):
        for operand in ("e4m3fn", "int8", "bf16", "dtype"):
            for dtype in ("fp32", "bf16"):
                t = quant_tile(block_m, n, k, operand, FORMATS[dtype], step)
                assert all(v & (v - 1) == 0 for v in (t.block_m, t.block_n, t.block_k))
                assert t.block_n >= 16 and t.block_k >= (16 if (operand, dtype) == ("dtype", "fp32") else 32)
                assert not step or step % t.block_k == 0


def test_refusals() -> None:
    q = SCHEMES["int8_token"]
    assert q.a1 is not None and q.w is not None
    long = torch.zeros(1, 1, 2**17, dtype=torch.int8, device=DEVICE)
    one, count = torch.ones(1, 1, 1, device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ContractError, match="at most 131071"):
        batched_scaled_gemm(Rows(long, q.a1, one), Weights(long, q.w, one), torch.empty(1, 1, 1), count, FORMATS["fp32"])
    with pytest.raises(ContractError, match="expert_num_tokens"):
        batched_scaled_gemm(Rows(long, q.a1, one), Weights(long, q.w, one), torch.empty(1, 1, 1), count.long(), FORMATS["fp32"])
