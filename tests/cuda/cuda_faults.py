"""Faults about device code, each one exact substitution in a CUDA source. What must see them is the harness, on a case.

`stands_for` names the class of docs/faults.md. The unchanged sources pass every case here.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from moeproof.optimized.cuda import toolkit

PLAIN = "T=9,H=50,I=50,E=40,K=4,seed=1"
QUANT = "T=9,H=160,I=96,E=5,K=2"
WIDE = "wide"
"""Instead of a case: cuda_strides.py, whose tensors need offsets of more than 32 bits."""


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str
    new: str
    case: str = PLAIN
    stands_for: str = ""
    candidate: str = "cuda-triton-gemm"
    tool: str = ""
    """Of compute-sanitizer, that must report it too."""
    judged: bool = True
    """False: the values may come out right all the same, so that only the tool can be asked."""

    @property
    def stage(self) -> str:
        """The library that is changed."""
        return {"slots.cuh": "align", "scan.cuh": "align", "encode.cuh": "quantise", "activation.cuh": "activation"}.get(
            self.file, self.file.removesuffix(".cu")
        )


FAULTS = (
    # COMBINE
    Fault("combine.tail_dropped", "combine.cu", "h >= a.H) return;", "h + 1 >= a.H) return;", stands_for="P66"),
    Fault(
        "combine.past_end",
        "combine.cu",
        "h >= a.H) return;",
        "h > a.H) return;",
        stands_for="P39",
        tool="memcheck",
    ),
    Fault(
        "combine.sums_unwritten",
        "combine.cu",
        "return slots.local_of(id) >= 0 ? slot : DEAD;",
        "return slot;",
        "T=17,H=56,I=48,E=60,K=6,routing=minus1",
        "P65",
        "cuda",
    ),
    Fault(
        "combine.next_weight",
        "combine.cu",
        "+ k * a.stride_wk];",
        "+ (k + 1) % K * a.stride_wk];",
        stands_for="P67",
    ),
    Fault(
        "combine.eight_slots",
        "combine.cu",
        "base + first < K; first += AHEAD",
        "base + first < 8; first += AHEAD",
        "T=5,H=50,I=24,E=12,K=10",
        "P68",
    ),
    Fault(
        "combine.int32_offset",
        "combine.cu",
        "y + static_cast<uint64_t>(static_cast<unsigned>(at[j])) * pitch;",
        "y + static_cast<unsigned>(at[j] * pitch);",
        WIDE,
        "P64",
    ),
    # ACT
    Fault("act.tail_dropped", "activation.cu", "i >= a.I ||", "i + 1 >= a.I ||", f"{PLAIN},act=relu2_no_mul", "P54"),
    Fault(
        "act.past_end",
        "activation.cu",
        "i >= a.I ||",
        "i > a.I ||",
        f"{PLAIN},act=gelu_no_mul",
        "P39",
    ),
    Fault(
        "act.clamp_two_sided",
        "activation.cuh",
        "g = at_most(g, a.limit);  // from above only",
        "g = within(g, a.limit);",
        f"{PLAIN},act=silu:limit=1",
        "P55",
    ),
    Fault(
        "act.interleave_mismatch",
        "activation.cuh",
        "const bool pairs = a.kind < SILU_NO_MUL && a.interleaved;\n    Columns<T, N> c = {};\n    c.first = load",
        "const bool pairs = false;\n    Columns<T, N> c = {};\n    c.first = load",
        "T=17,H=50,I=48,E=60,K=6,act=swigluoai",
        "P52",
    ),
    Fault(
        "act.int32_offset",
        "activation.cuh",
        "+ row * a.stride_xr;\n    const long long step",
        "+ static_cast<int>(row * a.stride_xr);\n    const long long step",
        WIDE,
        "P40",
    ),
    # PERMUTE
    Fault(
        "align.scan_width",
        "scan.cuh",
        "int total = sums[threadIdx.x / WARP] + upto - sum;",
        "int total = upto - sum;",
        stands_for="P33",
    ),
    Fault(
        "align.padding_slot_0",
        "align.cu",
        "p < last; p += THREADS) a.target[p] = a.num_slots;",
        "p < last; p += THREADS) a.target[p] = 0;",
        stands_for="P34",
    ),
    Fault(
        "align.duplicates_collide",
        "align.cu",
        "at = position + __popc(peers & ((1u << lane) - 1));",
        "at = position;",
        stands_for="P29",
    ),
    Fault(
        "align.last_slot_lost",
        "slots.cuh",
        "if (first + j * step < end) r[j] = raw_at(",
        "if (first + j * step < end - 1) r[j] = raw_at(",
        stands_for="P35",
    ),
    Fault(
        "align.block_map_shifted",
        "align.cu",
        "if (end[middle] <= b * a.block_m)",
        "if (end[middle] < b * a.block_m)",
        "T=1100,H=16,I=8,E=60,K=8",
        "P30",
    ),
    Fault(
        "align.minus_one_wraps",
        "slots.cuh",
        "own < 0 || own >= num_experts ? -1 : static_cast<int>(own);",
        "own >= num_experts ? -1 : static_cast<int>(own < 0 ? own + num_experts : own);",
        "T=17,H=56,I=48,E=60,K=6,routing=minus1",
        "P19",
        "cuda",
    ),
    Fault(
        "align.no_warp_barrier",
        "align.cu",
        "__popc(peers & earlier);\n        __syncwarp();",
        "__popc(peers & earlier);",
        "T=1100,H=16,I=8,E=60,K=8",
        "P36",
        tool="racecheck",
        judged=False,
    ),
    Fault(
        "align.no_count_barrier",
        "align.cu",
        "        if (lane == 0) before[x * NUM_WARPS + warp] = sum;\n    }\n    __syncthreads();",
        "        if (lane == 0) before[x * NUM_WARPS + warp] = sum;\n    }\n",
        stands_for="P36",
        tool="racecheck",
        judged=False,
    ),
    Fault(
        "align.barrier_unmet",
        "align.cu",
        "        if (lane == 0) before[x * NUM_WARPS + warp] = sum;\n    }\n    __syncthreads();",
        "        if (lane == 0) before[x * NUM_WARPS + warp] = sum;\n    }\n    __syncthreads();\n"
        "    if (thread < e) __syncthreads();",
        stands_for="P36",
        tool="synccheck",
        judged=False,
    ),
    Fault(
        "align.histogram_unwritten",
        "align.cu",
        "a.histogram[static_cast<long long>(blockIdx.x) * e + i] = bins[i];",
        ";",
        "T=1100,H=16,I=8,E=60,K=8",
        "P65",
        tool="initcheck",
    ),
    Fault(
        "align.earlier_blocks",
        "align.cu",
        "part += c < static_cast<int>(blockIdx.x) ? bin : 0;",
        "part += c <= static_cast<int>(blockIdx.x) ? bin : 0;",
        "T=1100,H=16,I=8,E=60,K=8",
        "P35",
    ),
    Fault("slots.int32_offset", "slots.cuh", "const long long at = flat()", "const int at = flat()", WIDE, "P40"),
    # DISPATCH
    Fault(
        "dispatch.weight_dropped",
        "dispatch.cu",
        "    if (a.weights != nullptr) {",
        "    if (false) {",
        "T=9,H=72,I=16,E=8,K=1,weight_on_input=1",
        "P67",
        "cuda",
    ),
    Fault(
        "dispatch.live_cleared",
        "dispatch.cu",
        "|| a.slots.local(slot) >= 0) return;",
        "|| a.slots.local(slot) > 0) return;",
        "T=17,H=56,I=48,E=8,K=6,routing=minus1",
        "P65",
        "cuda-modular",
    ),
    Fault("dispatch.int32_offset", "dispatch.cu", "+ t * a.stride_xt", "+ static_cast<int>(t * a.stride_xt)", WIDE, "P40"),
    # gather and scatter around the grouped product
    Fault(
        "rows.double_divide",
        "rows.cu",
        "static_cast<unsigned>(slot) / a.slots_per_row,",
        "static_cast<unsigned>(slot) / a.slots_per_row / a.slots_per_row,",
        "T=17,H=56,I=48,E=60,K=6",
        "P31",
        "cuda",
    ),
    Fault(
        "rows.padding_scattered",
        "rows.cu",
        "    if (padding && a.scatter) return;\n",
        "",
        "T=17,H=56,I=48,E=60,K=6",
        "P39",
        "cuda",
    ),
    Fault(
        "rows.ends_unpadded",
        "rows.cu",
        "ends[i] = round_up(counts[i], block_m);",
        "ends[i] = counts[i];",
        "T=17,H=56,I=48,E=60,K=6",
        "P30",
        "cuda",
    ),
    Fault(
        "rows.int32_offset", "rows.cu", "+ from * a.stride_sr", "+ static_cast<int>(from * a.stride_sr)", WIDE, "P40", "cuda"
    ),
    # QUANT1 and QUANT2
    Fault(
        "quantise.e8m0_rounding",
        "quantise.cu",
        "& 0x7fffffu) > a.top_bits) ++e;",
        "& 0x7fffffu) >= a.top_bits) ++e;",
        f"{QUANT},scheme=mxfp8_up,values=pin",
        "P13",
        "cuda-quant-triton-gemm",
    ),
    Fault(
        "quantise.group_tail",
        "quantise.cu",
        "last = min(first + a.group, a.C), start",
        "last = first + a.group, start",
        f"{QUANT},scheme=fp8_block",
        "P38",
        "cuda-quant-triton-gemm",
    ),
    Fault(
        "quantise.scale_shift",
        "quantise.cu",
        "a.scales[group] = s;",
        "a.scales[group ^ 1] = s;",
        f"{QUANT},scheme=fp8_block,values=hetero",
        "P58",
        "cuda-quant-triton-gemm",
    ),
    Fault(
        "quantise.past_end",
        "quantise.cu",
        "if (j * PER_BYTE < count) to[j]",
        "if (j < N) to[j]",
        "T=9,H=50,I=50,E=5,K=2,scheme=fp8_token",
        "P39",
        "cuda-quant-triton-gemm",
    ),
    Fault(
        "quantise.ties_away",
        "encode.cuh",
        "const unsigned magnitude = x & 0x7fff7fffu;",
        "const unsigned magnitude = (x & 0x7fff7fffu) + 0x00010001u;",
        f"{QUANT},scheme=mxfp4_w4a4",
        "P13",
        "cuda-quant-triton-gemm",
    ),
    Fault(
        "quantise.reciprocal",
        "quantise.cu",
        "ratio[j] = scale.divisor.divides(x.get(j));",
        "ratio[j] = __fmul_rn(x.get(j), scale.divisor.reciprocal);",
        "T=65,H=1152,I=48,E=5,K=1,scheme=fp8_token",
        "P13",
        "cuda-quant-triton-gemm",
    ),
    Fault(
        "quantise.int32_offset",
        "quantise.cu",
        "static_cast<const T*>(a.act.x) + row * a.act.stride_xr;",
        "static_cast<const T*>(a.act.x) + static_cast<int>(row * a.act.stride_xr);",
        WIDE,
        "P40",
        "cuda-quant-triton-gemm",
    ),
    # ROUTE
    Fault(
        "router.tie_order",
        "router.cu",
        "for (int i = PER - 1; i >= 0; --i)\n        if (keys[i] == best)",
        "for (int i = 0; i < PER; ++i)\n        if (keys[i] == best)",
        "T=17,H=56,I=48,E=60,K=6,logits=ties",
        "P08",
        "cuda",
    ),
    Fault(
        "router.bias_in_weight",
        "router.cu",
        "scores[e] = score;",
        "scores[e] = score + bias[i];",
        "T=17,H=56,I=48,E=60,K=6,router=sigmoid:bias",
        "P01",
        "cuda",
    ),
    Fault(
        "router.nan_wins",
        "router.cu",
        "(x != x ? -INFINITY : fminf(x, LARGEST))",
        "fminf(x, LARGEST)",
        "T=17,H=56,I=48,E=60,K=6,logits=nan",
        "P06",
        "cuda",
    ),
    Fault(
        "router.renorm_zero_div",
        "router.cu",
        "a.renorm == FLOOR ? a.renorm_value : 1e-20f",
        "a.renorm == FLOOR ? a.renorm_value : 0.0f",
        "T=17,H=56,I=48,E=6,K=6,router=sigmoid:renorm=sum,logits=deep",
        "P07",
        "cuda",
    ),
    Fault(
        "router.scaling_nested",
        "router.cu",
        "    w *= a.scale;",
        "    if (a.renorm != NONE) w *= a.scale;",
        "T=17,H=56,I=48,E=60,K=6,router=sigmoid:scale=2.5",
        "P05",
        "cuda",
    ),
    Fault(
        "router.expert_tail",
        "router.cu",
        "            keys[i] = TAKEN;\n        }\n    }\n    __syncwarp();",
        "            keys[i] = key(1.0f);\n        }\n    }\n    __syncwarp();",
        "T=17,H=56,I=48,E=60,K=6",
        "P10",
        "cuda",
    ),
    Fault(
        "router.int32_offset",
        "router.cu",
        "const long long row = t * a.stride_t;",
        "const int row = t * a.stride_t;",
        WIDE,
        "P40",
        "cuda",
    ),
)


def plant(fault: Fault, folder: Path) -> Path:
    """A copy of the sources in `folder` with the fault in it. Raises where its text is not there exactly once."""
    for path in (*toolkit.SOURCES.glob("*.cu"), *toolkit.SOURCES.glob("*.cuh")):
        shutil.copy(path, folder / path.name)
    path = folder / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"fault {fault.name}: its text stands {text.count(fault.old)} times in {fault.file}, must be once")
    path.write_text(text.replace(fault.old, fault.new))
    return folder
