"""`moeproof policies`: how every stage is judged, for each dtype and scheme, in the words of the data that judging uses."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

from moeproof.reference.contract.candidate import DECODES, Claims
from moeproof.reference.contract.errors import known
from moeproof.reference.contract.formats import FORMATS, Format
from moeproof.reference.contract.problem import DTYPES
from moeproof.reference.contract.schemes import ALL, QUOTIENTS, RULES, SCHEMES, Quantiser, QuantScheme
from moeproof.reference.contract.stages import STAGES, Stage
from moeproof.reference.oracle.chain import SIGMAS
from moeproof.reference.oracle.products import ACCUMULATIONS, SCALING, accumulator_class


@dataclass(frozen=True)
class Policy:
    """How one stage is judged in problems of this dtype and scheme."""

    scheme: str
    dtype: str
    stage: str
    judged: str
    formula: str
    why: str


def _group(q: Quantiser) -> str:
    names = {(ALL, ALL): "tensor", (1, ALL): "row"}
    return names.get(q.group, " x ".join("all" if n == ALL else str(n) for n in q.group))


def quantiser_words(q: Quantiser) -> str:
    """The arithmetic of a quantiser, spelled out."""
    how = "static scale, verbatim" if q.static and not q.two_level else RULES[q.rule]
    if q.static and q.two_level:
        how += " (S is given)"
    floor = f", floor = {q.floor:g}" if q.floor and not q.static else ""
    return f"{q.fmt} per {_group(q)}: {how}{floor}; q = round(clamp({QUOTIENTS[q.quotient]})), scale in {q.scale}"


def _product(x: Quantiser | None, w: Quantiser | None, dtype: Format, claims: Claims) -> tuple[str, str]:
    """(formula, why) of a GEMM under these claims."""
    left, right = (dtype if q is None else q.format for q in (x, w))
    row = ACCUMULATIONS[accumulator_class(left, right, claims)]
    scales = f" + {SCALING} u S" if any(q is not None and q.group[1] != ALL for q in (x, w)) else ""
    why = row.why
    if w is not None:
        why += "; the values are those that codes and scales stand for, so rounding to codes is no part of it"
    if w is not None and x is None:
        why += f"; decode={claims.decode}: {DECODES[claims.decode]}"
    return f"|got - y| <= ulp/2 + A, A = {row.formula}{scales} + 6 u |y|; A = 0 where every sum is exact", why


def _stage(stage: Stage, scheme: QuantScheme, dtype: Format, claims: Claims) -> tuple[str, str, str] | None:
    """(judged, formula, why), None where the scheme has no such stage."""
    judged = STAGES[stage].judged
    if stage in (Stage.QUANT1, Stage.QUANT2):
        q = scheme.a1 if stage is Stage.QUANT1 else scheme.a2
        if q is None:
            return None
        why = "every step is named, so codes and scales are facts; against an unquantised oracle most faults here are invisible"
        return judged, quantiser_words(q), why
    if stage in (Stage.GEMM1, Stage.GEMM2):
        x = scheme.a1 if stage is Stage.GEMM1 else scheme.a2
        return judged, *_product(x, scheme.w, dtype, claims)
    rows = {
        Stage.ROUTE: (
            "weights within a relative u per operation; ids as a set, ties within the margin",
            "a tie may go either way",
        ),
        Stage.DISPATCH: (
            "bytes of each row, with its scales",
            "rows are matched by bytes: order inside an expert is free",
        ),
        Stage.PERMUTE: ("each live slot once; each block one expert", "a map is right or wrong"),
        Stage.ACT: (
            "|got - h| <= ulp/2 + 12 u |h|, and what clamps allow",
            "correctly rounded or 2-ulp exp, tanh, erf",
        ),
        Stage.COMBINE: (
            "|got - out| <= ulp/2 + (K + 3) u sum |w y|; from the inputs alone: ulp/2 + 7 sigma",
            f"float32 sum, one rounding; end to end: variances of every rounding and code flip, {SIGMAS:g} standard deviations",
        ),
    }
    return judged, *rows[stage]


def policies(scheme: str = "", dtype: str = "", claims: Claims | None = None) -> list[Policy]:
    """The table, for all schemes and dtypes or for those named. Raises ContractError for an unknown name."""
    if scheme:
        known("scheme", scheme, SCHEMES)
    if dtype:
        known("dtype", dtype, DTYPES)
    table = []
    for name in [scheme] if scheme else SCHEMES:
        for fmt in [dtype] if dtype else DTYPES:
            for stage in Stage:
                row = _stage(stage, SCHEMES[name], FORMATS[fmt], claims or Claims())
                if row is not None:
                    table.append(Policy(name, fmt, stage.value, *row))
    return table


def main(scheme: str, dtype: str, accumulate: str, decode: str, as_json: bool) -> int:
    """Print the table: JSON lines, or grouped by scheme and dtype."""
    claims = Claims(accumulate=accumulate, decode=decode)
    table = policies(scheme, dtype, claims)
    if as_json:
        for row in table:
            sys.stdout.write(json.dumps(asdict(row)) + "\n")
        sys.stdout.write(json.dumps({"policies": len(table), "claims": str(claims)}) + "\n")
        return 0
    last = ("", "")
    for row in table:
        if (row.scheme, row.dtype) != last:
            sys.stdout.write(f"\nscheme {row.scheme}, dtype {row.dtype}\n")
            last = (row.scheme, row.dtype)
        sys.stdout.write(f"  {row.stage:<9} {row.judged}\n            {row.formula}\n            why: {row.why}\n")
    sys.stdout.write(f"\n{len(table)} policies; u = 2^-24, S = sum |x||w|, ulp of the stored format; claims: {claims}\n")
    return 0
