"""Time and fraction of the roof over M, a column of panels for each model. Needs matplotlib (the `report` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moeproof.harness.timing.bench import Peers, Reading
from moeproof.reference.contract.errors import ContractError


def draw(readings: Sequence[Reading], peers: Peers, path: Path) -> None:
    """Write the picture to `path`; its suffix chooses the format."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ContractError("--plot needs matplotlib: pip install 'moeproof[report]'") from None
    timed = [r for r in readings if r.us == r.us and r.routing == "uniform"]
    models = list(dict.fromkeys(r.model for r in timed))
    if not models:
        raise ContractError("--plot: no point with uniform routing was timed, so there is nothing to draw")
    figure = Figure(figsize=(3.4 * len(models), 6), layout="constrained")
    panels = figure.subplots(2, len(models), sharex=True, squeeze=False)
    for column, model in enumerate(models):
        top, bottom = panels[0][column], panels[1][column]
        for name in dict.fromkeys(r.candidate for r in timed):
            own = sorted((r for r in timed if r.model == model and r.candidate == name), key=lambda r: r.M)
            M = [r.M for r in own]
            top.plot(M, [r.us for r in own], marker="o", markersize=3, label=name)
            bottom.plot(M, [r.fraction_of_roof for r in own], marker="o", markersize=3)
        best = sorted(
            (r.M, r.roof_us, peers.get((r.kind, model, "uniform", r.M), {}).get("best")) for r in timed if r.model == model
        )
        known = [(m, roof, us) for m, roof, us in dict.fromkeys(best) if us]
        if known:
            top.plot([m for m, *_ in known], [us for *_, us in known], "k--", linewidth=1, label="best stored peer")
            bottom.plot([m for m, *_ in known], [roof / us for _, roof, us in known], "k--", linewidth=1)
        top.set(title=model, xscale="log", yscale="log")
        bottom.set(xlabel="tokens M", ylim=(0, 1.1))
    panels[0][0].set_ylabel("us a call")
    panels[1][0].set_ylabel("fraction of roof")
    panels[0][0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
