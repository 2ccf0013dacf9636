"""P11-P18 and P56-P59: faults of QUANT1 and QUANT2. None is planted before the oracle has quantised schemes."""

from __future__ import annotations

from moeproof.harness.faults.fault import Fault
from moeproof.reference.contract.stages import Stage

NO_SCHEME = "the plain pipeline quantises nothing; planted scheme by scheme in tests/harness/test_quant_faults.py instead"
_Q1, _Q2 = (Stage.QUANT1,), (Stage.QUANT2,)


def _row(number: str, name: str, stands_for: str, trigger: str, blame: tuple[Stage, ...]) -> Fault:
    return Fault(number, name, stands_for, trigger, blame, why_not=NO_SCHEME)


FAULTS = (
    _row("P11", "quant.zero_block_nan", "kernels-community#681, lmdeploy#3652", "an all-zero group or row", _Q1),
    _row("P12", "quant.scale_order", "vllm#53338, flashinfer#1358, vllm#43277", ">= 2 rows and groups, scales differ", _Q1),
    _row("P13", "quant.e8m0_rounding", "mlx#4353, vllm#43557, sglang#31210, ao#4725", "amax at or next to 2^k", _Q1),
    _row("P14", "quant.granularity_collapse", "vllm#39022", "rows of different magnitude", _Q1),
    _row("P15", "quant.max_constant", "ROCm/TransformerEngine#485, sgl-kernel-npu#600", "any", _Q1),
    _row("P16", "quant.padding_in_amax", "vllm#50511", "padding rows with garbage", _Q1),
    _row("P17", "quant.global_scale_lost", "flashinfer#3548", "global scale != 1", _Q1),
    _row("P18", "quant.scale_dtype_reinterpreted", "sglang#26306", "packed exponents against float32", _Q1),
    _row("P56", "requant.static_scale_ignored", "vllm#52868", "static scale far from amax", _Q2),
    _row("P57", "requant.padded_row_nan", "sgl-project/DeepGEMM#63", "padding rows", _Q2),
    _row("P58", "requant.row_scale_shift", "class of vllm#53338", "rows of different magnitude", _Q2),
    _row("P59", "requant.scheme_by_m", "aiter#3741", "M across the threshold", _Q2),
)
