"""Write the table in docs/models.md from harness.presets: `PYTHONPATH=src python -m tests.families.page`."""

from __future__ import annotations

from pathlib import Path

from moeproof.harness.cases.presets import PRESETS, Preset

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
HEAD = "| model | E | K | H | I | shared | activation | router | further | source | released in | note |"


def _row(p: Preset) -> str:
    q = p.problem
    names = ("expert_bias", "weight_on_input", "shared_gate", "latent_norm")
    further = [n.replace("_", " ") for n in names if getattr(q, n)]
    further += [f"latent {q.latent}"] if q.latent else []
    further += ["KN storage"] if q.storage == "KN" else []
    further += [f"ep {q.ep}"] if q.ep > 1 else []
    source = p.source if p.verified else f"{p.source} (not verified)"
    cells = (p.name, q.E, q.K, q.H, q.I, q.shared or "-", f"`{q.act}`", f"`{q.router}`", ", ".join(further) or "-", source)
    return "| " + " | ".join(str(c) for c in (*cells, p.released, p.note or "-")) + " |"


def table() -> str:
    """The presets as one Markdown table."""
    rule = "|" + " --- |" * HEAD.count(" | ") + " --- |"
    return "\n".join([HEAD, rule, *(_row(p) for p in PRESETS.values())]) + "\n"


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
