"""The fused quantised layers' tables, from the times of single products that ci/quant_probe.py measured.

    PYTHONPATH=src python ci/quant_plans.py PROBE.json .. [--older PROBE.json ..] [--folder optimized]

Probes of one kernel are taken together, an older one only for points that no other timed. A plan is the pair of tiles of one
height whose times, with the pass that quantises h where GEMM1 cannot, add up to the least. One file a scheme, and one a scheme
with the tensor core's own sums (`-fast`), in the form that `moeproof tune` writes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeproof.harness.reports import results
from moeproof.harness.timing.points import SIZES
from moeproof.optimized.quant.fused_gemm import requantises
from moeproof.optimized.quant.search import SHORT, tiles
from moeproof.optimized.tiles import Tile
from moeproof.reference.contract import Activation

BYTES_A_US = 2.5e6
"""Of the pass that quantises h, at large sizes; LAUNCH is what it takes at small ones. Measured on an H100."""
LAUNCH = 3.0
Found = Iterable[dict[str, Any]]


def quantises_apart(scheme: str, tile: Tile, model: str, M: int) -> float:
    """Microseconds of the pass over h between the products."""
    E, K, _, I = SIZES[model]  # noqa: E741
    if scheme.startswith("mxfp4") or requantises(tile, Activation(), 128 if scheme == "fp8_block" else 0):
        return 0.0
    rows = M * K + min(M * K, E) * tile.block_m / 2
    return max(LAUNCH, 3.0 * rows * I / BYTES_A_US)


def best_pair(found: Found, scheme: str, model: str, M: int, fast: bool) -> tuple[str, float] | None:
    """(plan, microseconds of its products) at one point."""
    times: dict[str, dict[Tile, float]] = {"first": {}, "second": {}}
    known = {product: {replace(t, group_m=1) for t in tiles(scheme, product)} for product in times}
    for f in found:
        if (f["model"], f["scheme"], f["M"]) == (model, scheme, M) and f.get("us", math.nan) == f.get("us"):
            tile = Tile.parse(f["tile"])
            if replace(tile, group_m=1) in known[f["product"]] and (fast or not tile.fast):
                own = f["us"] + (quantises_apart(scheme, tile, model, M) if f["product"] == "first" else 0.0)
                times[f["product"]][tile] = min(own, times[f["product"]].get(tile, math.inf))
    pairs = []
    for height in (16, 32, 64, 128, 256):
        one, two = ({t: us for t, us in times[p].items() if t.block_m == height} for p in ("first", "second"))
        if one and two:
            first, second = min(one, key=one.__getitem__), min(two, key=two.__getitem__)
            pairs.append((one[first] + two[second], f"{first} {second}{' overlap' if height <= SHORT else ''}"))
    return None if not pairs else min(pairs)[::-1]


def best_strips(found: Found, scheme: str, model: str) -> tuple[str, float] | None:
    times: dict[str, dict[str, float]] = {"first": {}, "second": {}}
    for f in found:
        if (f["model"], f["scheme"], f["M"]) == (model, scheme, 1) and f["product"] in times and "us" in f:
            times[f["product"]][f["tile"].split()[0]] = f["us"]
    if not times["first"] or not times["second"]:
        return None
    first, second = (min(own, key=own.__getitem__) for own in times.values())
    return f"{first} {second} overlap", times["first"][first] + times["second"][second]


def tables(found: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """File's scheme -> {"plans": .., "measured": ..}."""
    made: dict[str, dict[str, dict[str, Any]]] = {}
    for scheme in dict.fromkeys(f["scheme"] for f in found):
        for fast in (False, True) if scheme.startswith("fp8") else (False,):
            name = scheme + "-fast" * fast
            table = made.setdefault(name, {"plans": {}, "measured": {}})
            for model, M in sorted({(f["model"], f["M"]) for f in found if f["scheme"] == scheme}):
                timed = [f for f in found if "us" in f and not f["tile"].startswith("v")]
                best = best_strips(found, scheme, model) if M == 1 else best_pair(timed, scheme, model, M, fast)
                if best is not None:
                    E, K, H, I = SIZES[model]  # noqa: E741
                    table["plans"].setdefault(f"{name} e={E} K={K} H={H} I={I}", {})[str(M)] = best[0]
                    table["measured"][f"{model} M={M} products"] = {"us": round(best[1], 2), "plan": best[0]}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("probe", type=Path, nargs="+")
    parser.add_argument("--older", type=Path, action="append", default=[])
    parser.add_argument("--folder", type=Path, default=Path("optimized"))
    options = parser.parse_args()
    probes, older = (
        [json.loads(path.read_text(encoding="utf-8")) for path in paths] for paths in (options.probe, options.older)
    )
    how = {key: probes[0][key] for key in ("command", "device", "versions", "date")}
    found = [f for probe in probes for f in probe["found"]]
    known = {(f["model"], f["scheme"], f["M"]) for f in found}
    found += [
        f
        for probe in older
        for f in (*probe["found"], *probe.get("strips", {}).get("found", ()))
        if (f["model"], f["scheme"], f["M"]) not in known
    ]
    for name, table in tables(found).items():
        results.write(options.folder / f"plans_sm90_{name}.json", table | {"made": how})
        print(name, sum(len(row) for row in table["plans"].values()), "plans")


if __name__ == "__main__":
    main()
