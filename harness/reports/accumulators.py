"""Measured accumulation of a GPU against the constants that judging uses: ci/accumulators.py measures, this gives verdicts.

A row is one product on one kind of data at one length. Its allowed error and expected misroundings come from the oracle
itself (reference/oracle/products.py, typical.py); nothing of them is typed here. Beside them stands what a simulation of the
same tensor cores had led to expect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moeproof.reference.oracle.products import ACCUMULATIONS

Row = Mapping[str, Any]
KINDS = ("gauss", "outlier", "one sign")
LENGTHS = (512, 2048, 7168)
NEAR = 5.0
"""A constant is kept where some product on some data came within this factor of it: beyond, it would be a guess."""
NEAR_COUNT, LUCK = 8.0, 5e-5
"""The same for expected misroundings, which other cores that cut in shorter steps have more of; and a share of a handful of
results, which are misrounded or not by chance."""
SIMULATED: Mapping[str, Mapping[int, tuple[float, float, float]]] = {
    "16-bit": {512: (2.0, 7.4, 21.7), 2048: (5.9, 13.2, 107.6), 7168: (8.1, 21.7, 515.8)},
    "fp8_promoted": {512: (0.26, 3.6, 8.0), 2048: (0.14, 1.7, 6.2), 7168: (0.07, 0.45, 5.6)},
    "fp8_unpromoted": {512: (1.2, 4.8, 60.0), 2048: (1.7, 3.8, 302.0), 7168: (1.3, 6.1, 1014.0)},
    "fp32": {512: (0.51, 2.0, 2.8), 2048: (0.38, 1.5, 5.3), 7168: (0.38, 1.4, 11.3)},
}
"""|error| / (u S) by KINDS, u = 2^-24, for fp8 2^-13: a simulated Hopper with the constants of microsoft/MMA-Sim (arXiv
2511.10909); float32 in tiles, rounded to nearest. Its operands are bf16 and have fewer bits to lose than fp16's."""
SIMULATED_MISROUNDED = {"16-bit": 0.0054, "fp8_promoted": 0.104, "fp32": 0.0005}
"""Share of GEMM1 results that bf16 rounds the wrong way at K = 7168, of healthy products in the same simulation."""


@dataclass(frozen=True)
class Constant:
    """One class of accumulator on one kind of data at one length: the product that came nearest to what is allowed."""

    accumulator: str
    """`16-bit` and `fp32` by their operands, or the claim."""
    data: str
    K: int
    simulated_over_uS: float | None
    measured_over_uS: float
    """Largest of all products."""
    used_over_uS: float
    """Largest that the code allows an element."""
    nearest: str
    """Operands and product of the largest observed/allowed."""
    times: float
    """Allowed over observed, there."""
    verdict: str


@dataclass(frozen=True)
class Misrounding:
    """The same for the share of results that 16 bits round the wrong way: what the misrounding count expects."""

    accumulator: str
    data: str
    K: int
    simulated: float | None
    measured: float
    expected: float
    nearest: str
    times: float
    verdict: str


def class_of(row: Row) -> str:
    """Which constant bounds the product: float32 accumulation has one for float32 operands, and one for all narrower ones."""
    claim = str(row["claim"])
    if claim != "fp32":
        return claim
    return "fp32" if row["operands"] == "fp32" else "16-bit"


def constants(rows: Sequence[Row]) -> list[Constant]:
    """Verdicts on the bounds; `holds` needs every element of every product within its own."""
    found = []
    for (name, data, K), mine in _groups(rows):
        worst = max(mine, key=lambda row: row["observed_over_allowed"])
        times = 1 / max(worst["observed_over_allowed"], 1e-12)
        simulated = SIMULATED.get(name, {}).get(K)
        found.append(
            Constant(
                name,
                data,
                K,
                simulated[KINDS.index(data)] if simulated else None,
                max(row["worst_over_uS"] for row in mine),
                max(row["used_over_uS"] for row in mine),
                f"{worst['operands']} {worst['product']}",
                times,
                _verdict(times, NEAR, sharp=data == "one sign"),
            )
        )
    return found


def misroundings(rows: Sequence[Row]) -> list[Misrounding]:
    """Verdicts on the counts; `holds` needs no product misrounded more often than expected, beyond what is allowed for luck."""
    found = []
    for (name, data, K), mine in _groups(rows):
        worst = max(mine, key=lambda row: row["misrounded_16bit"] / max(row["expected_misrounded_16bit"], 1e-12))
        measured, expected = worst["misrounded_16bit"], worst["expected_misrounded_16bit"]
        times = expected / max(measured, 1e-12)
        verdict = _verdict(max((expected - LUCK) / max(measured, 1e-12), 1.0), NEAR_COUNT, sharp=True)
        if max(row["misrounded_over_allowed"] for row in mine) > 1:
            verdict = "BROKEN"
        simulated = SIMULATED_MISROUNDED.get(name) if LENGTHS[-1] == K else None
        nearest = f"{worst['operands']} {worst['product']}"
        found.append(Misrounding(name, data, K, simulated, measured, expected, nearest, times, verdict))
    return found


def _groups(rows: Sequence[Row]) -> Iterable[tuple[tuple[str, str, int], list[Row]]]:
    for name in dict.fromkeys(class_of(row) for row in rows):
        for data in KINDS:
            for K in LENGTHS:
                mine = [r for r in rows if (class_of(r), r["data"], r["K"]) == (name, data, K) and "error" not in r]
                if mine:
                    yield (name, data, K), mine


def _verdict(times: float, near: float, sharp: bool) -> str:
    """`sharp`: the data is what the constant is about, so it must also be near."""
    if times < 1:
        return "BROKEN"
    if times <= near:
        return f"holds, within {near:g} times"
    return f"WIDE: {times:.0f} times" if sharp else "holds; other data is what sets it"


def sound(verdicts: Iterable[Constant | Misrounding]) -> bool:
    return all(v.verdict.startswith("holds") for v in verdicts)


def page(record: Mapping[str, Any]) -> str:
    """docs/accumulators.md, from a results file alone."""
    rows = record["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# Accumulators, measured",
        "",
        f"Written by `python ci/accumulators.py docs/results/accumulators-h100.json --page docs/accumulators.md`: "
        f"{record['device']}, {versions}.",
        "",
        "Largest error of a product over u S, S = sum |x||w|, u = 2^-24 (2^-13 for fp8 operands): simulated, measured on the",
        "worst product of its class, and the most that the bounds allow an element. `times` is allowed over observed where the",
        "two came nearest, element by element. A constant has to hold everywhere, and to be near on data of one sign, which",
        "is what sets it.",
        "",
        *_formulas(),
        "",
        "| class | data | K | simulated | measured | used | nearest product | times | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in constants(rows):
        cells = (c.accumulator, c.data, c.K, _number(c.simulated_over_uS), _number(c.measured_over_uS), _number(c.used_over_uS))
        lines.append("| " + " | ".join(map(str, (*cells, c.nearest, f"{c.times:.2g}", c.verdict))) + " |")
    lines += [
        "",
        "Share of results that 16 bits (fp16 for fp16 operands, else bf16) round another way than the exact result: simulated,",
        "measured, and what the misrounding count expects (reference/oracle/typical.py).",
        "",
        "| class | data | K | simulated | measured | expected | nearest product | times | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for m in misroundings(rows):
        cells = (m.accumulator, m.data, m.K, _number(m.simulated), _number(m.measured), _number(m.expected))
        lines.append("| " + " | ".join(map(str, (*cells, m.nearest, f"{m.times:.2g}", m.verdict))) + " |")
    lines += [
        "",
        f"Every product by itself, K = {', '.join(map(str, LENGTHS))}: largest error over u S, share misrounded and expected,",
        "and the mean relative error on data of one sign, where truncation always goes toward zero. `holds` says by how many",
        "times its bound and its count are above it at least; a product may be better than what its class may do.",
        "",
        "| operands | product | claims | data | error / u S | misrounded | expected | bias | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for operands, product, claim, data in dict.fromkeys(
        tuple(row[k] for k in ("operands", "product", "claim", "data")) for row in rows
    ):
        mine = [r for r in rows if (r["operands"], r["product"], r["data"]) == (operands, product, data)]
        lines.append("| " + " | ".join((operands, product, claim, data, *_figures(mine))) + " |")
    return "\n".join(lines) + "\n"


def _figures(rows: Sequence[Row]) -> list[str]:
    """The cells of one product on one kind of data, a figure for each length."""
    if errors := [str(row["error"]) for row in rows if "error" in row]:
        return ["-", "-", "-", "-", errors[0]]
    keys = ("worst_over_uS", "misrounded_16bit", "expected_misrounded_16bit", "relative_bias")
    cells = [", ".join(_number(row[key]) for row in rows) if rows[0][key] is not None else "-" for key in keys]
    return [*cells, min((row_verdict(row) for row in rows), key=lambda v: v[0])[1]]


def row_verdict(row: Row) -> tuple[float, str]:
    """(times, words): how far the nearer of bound and count is above what was measured."""
    times = 1 / max(row["observed_over_allowed"], row["misrounded_over_allowed"], 1e-12)
    return times, f"holds, {times:.2g} times" if times >= 1 else "BROKEN"


def _formulas() -> list[str]:
    """The code's own words for what it uses."""
    return [f"* `accumulate={name}`: {row.formula}" for name, row in ACCUMULATIONS.items() if name not in ("int32", "dtype")]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def as_record(rows: Sequence[Row]) -> dict[str, object]:
    """What the results file says beside its rows."""
    return {
        "constants": [asdict(c) for c in constants(rows)],
        "misroundings": [asdict(m) for m in misroundings(rows)],
    }
