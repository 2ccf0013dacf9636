"""P11-P18 and P56-P59: faults of QUANT1 and QUANT2, in every scheme that they can happen in."""

from __future__ import annotations

from moeproof.harness.faults.catalogue import scales as s
from moeproof.harness.faults.fault import Edit, Fault
from moeproof.reference.contract.stages import Stage

X, H, G1, G2 = (Stage.QUANT1,), (Stage.QUANT2,), (Stage.GEMM1,), (Stage.GEMM2,)


def quant_fault(
    number: str,
    name: str,
    stands_for: str,
    trigger: str,
    blame: tuple[Stage | None, ...],
    variants: dict[str, tuple[Edit, tuple[str, ...]]],
    not_in: dict[str, tuple[str, ...]],
    note: str = "",
) -> Fault:
    """A row whose variants each name their schemes, and that says why the others have none."""
    edits = {variant: edit for variant, (edit, _) in variants.items()}
    names = {variant: schemes for variant, (_, schemes) in variants.items()}
    return Fault(number, name, stands_for, trigger, blame, edits, "quant", schemes=names, not_in=not_in, note=note)


FAULTS = (
    quant_fault(
        "P11",
        "quant.zero_block_nan",
        "kernels-community#681, lmdeploy#3652",
        "an all-zero group or row",
        X,
        {
            "": ({"quant1": s.zero_block_nan}, s.in_x(lambda q: q.rule == "amax" and q.by_token)),
            "groups of powers of two and of two levels": ({"quant1": s.zero_group_nan}, s.in_x(lambda q: q.rule != "amax")),
        },
        s.X_PLAIN
        | {"one scale for x: only an x of zeros has an amax of 0, and then nothing can be judged": s.in_x(s.one_scale)},
    ),
    quant_fault(
        "P12",
        "quant.scale_order",
        "vllm#53338, flashinfer#1358, vllm#43277",
        ">= 2 rows and groups, scales differ",
        (*X, *G1),
        {
            "x": ({"quant1": s.scale_order}, s.in_x(s.grouped)),
            "weights": ({"load_weights": s.weight_scale_order}, s.in_w(s.grouped)),
        },
        {"one scale to a row or to the tensor, of x and of weights: there is one order": s.schemes(s.ungrouped)},
    ),
    quant_fault(
        "P13",
        "quant.e8m0_rounding",
        "mlx#4353, vllm#43557, sglang#31210, ao#4725",
        "a, b: ordinary data; c, d: amax at or next to 2^k",
        X,
        {
            "a nearest": ({"quant1": s.power_rule(s.nearest_exponent)}, s.in_x(s.is_mx)),
            "b floor of the ratio": ({"quant1": s.power_rule(s.floor_of_ratio)}, s.in_x(s.is_mx)),
            "c one off at a power": (
                {"quant1": s.power_rule(s.one_off_at_a_power)},
                s.in_x(lambda q: q.rule == "round_up"),
            ),
            "d amax in few bits": ({"quant1": s.power_rule(s.amax_in_few_bits)}, s.in_x(s.is_mx)),
        },
        s.X_PLAIN | {"the scales of x are no powers of two": s.in_x(lambda q: not s.is_mx(q))},
        note="scales of weights are made when they are loaded, by the harness: no stage of a candidate quantises them",
    ),
    quant_fault(
        "P14",
        "quant.granularity_collapse",
        "vllm#39022",
        "rows of different magnitude",
        X,
        {"": ({"quant1": s.granularity_collapse}, s.in_x(lambda q: q.by_token))},
        s.X_PLAIN | {"one scale for x already": s.in_x(s.one_scale)},
    ),
    quant_fault(
        "P15",
        "quant.max_constant",
        "ROCm/TransformerEngine#485, sgl-kernel-npu#600",
        "any",
        X,
        {
            "": ({"quant1": s.other_maximum}, s.in_x(lambda q: not q.static or q.two_level)),
            "clamped to it": ({"quant1": s.clamped_early}, s.in_x(lambda q: q.static and not q.two_level)),
        },
        s.X_PLAIN,
    ),
    quant_fault(
        "P16",
        "quant.padding_in_amax",
        "vllm#50511",
        "slots of -1 and dirty memory",
        H,
        {"": ({"clear_dead": lambda right, _, h, live: h}, s.in_h(lambda q: not q.by_token and not q.static))},
        {
            "h is not quantised": s.schemes(lambda q: q.a2 is None),
            "a scale of h serves one row, and padding rows are rows of their own": s.in_h(lambda q: q.by_token),
            "the scale of h is given": s.in_h(lambda q: q.static and not q.by_token),
        },
        note="planted in QUANT2, whose rows of dead slots nobody writes; all rows of x are written",
    ),
    quant_fault(
        "P17",
        "quant.global_scale_lost",
        "flashinfer#3548",
        "global scale != 1",
        G1,
        {
            "": ({"load_rows": s.without_global}, s.in_x(lambda q: q.two_level)),
            "weights": ({"load_weights": s.weights_without_global}, s.in_w(lambda q: q.two_level)),
        },
        {"scales have one level": s.in_w(lambda q: not q.two_level)},
        note="the codes are right; GEMM1, which divides them back, is not",
    ),
    quant_fault(
        "P18",
        "quant.scale_dtype_reinterpreted",
        "sglang#26306",
        "packed exponents read as numbers, or numbers as exponents",
        G1,
        {
            "exponents as numbers": ({"load_rows": s.rows_scaled("gemm1", s.exponents_as_numbers)}, s.in_x(s.is_mx)),
            "numbers as exponents": (
                {"load_rows": s.rows_scaled("gemm1", s.numbers_as_exponents)},
                s.in_x(lambda q: q.scale == "fp32"),
            ),
            "weights, exponents as numbers": ({"load_weights": s.weights_scaled(s.exponents_as_numbers)}, s.in_w(s.is_mx)),
            "weights, numbers as exponents": (
                {"load_weights": s.weights_scaled(s.numbers_as_exponents)},
                s.in_w(lambda q: not s.is_mx(q)),
            ),
        },
        {},
        note="the scales are right as they are stored; GEMM1 reads them as something else",
    ),
    quant_fault(
        "P56",
        "requant.static_scale_ignored",
        "vllm#52868",
        "static scale far from amax",
        H,
        {"": ({"quant2": s.dynamic}, s.in_h(lambda q: q.static))},
        s.H_PLAIN | {"the scale of h is dynamic": s.in_h(lambda q: not q.static)},
    ),
    quant_fault(
        "P57",
        "requant.padded_row_nan",
        "sgl-project/DeepGEMM#63",
        "rows of zeros",
        H,
        {"": ({"quant2": s.zero_rows_nan}, s.in_h(lambda q: q.by_token))},
        s.H_PLAIN | {"one scale for h: a padded row has no amax of its own": s.in_h(s.one_scale)},
    ),
    quant_fault(
        "P58",
        "requant.row_scale_shift",
        "class of vllm#53338",
        "rows of different magnitude",
        G2,
        {"": ({"load_rows": s.rows_scaled("gemm2", lambda t: t.roll(1, 0))}, s.in_h(lambda q: q.by_token))},
        s.H_PLAIN | {"one scale for h: no row has its own": s.in_h(s.one_scale)},
        note="the scales are stored right and read one row off: GEMM2 is the stage that is wrong",
    ),
    quant_fault(
        "P59",
        "requant.scheme_by_m",
        "aiter#3741",
        f"fewer than {s.FEW_ROWS} rows",
        H,
        {
            "": ({"quant2": s.by_tensor_if_small}, s.in_h(lambda q: q.by_token and q.rule == "amax")),
            "the other rule of powers of two": ({"quant2": s.other_rule_if_small}, s.in_h(s.is_mx)),
            "a dynamic global scale": ({"quant2": s.dynamic_if_small}, s.in_h(lambda q: q.two_level)),
            "codes by token": ({"quant2": s.by_token_if_small}, s.in_h(s.one_scale)),
        },
        s.H_PLAIN,
    ),
)
