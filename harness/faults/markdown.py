"""docs/faults.md: the campaign as a readable page."""

from __future__ import annotations

from collections.abc import Sequence

from moeproof.harness.faults.campaign import FEW_TOKENS, Campaign
from moeproof.harness.faults.fault import GROUNDS, Fault
from moeproof.harness.faults.hunt import TWINS, Hunt
from moeproof.harness.faults.nulls import NULLS, Taken
from moeproof.harness.faults.side_by_side import SINGLE, Row


def page(campaign: Campaign, environment: str, on_gpu: Sequence[str]) -> str:
    """The whole page; `on_gpu` is its section about what only a GPU can trigger."""
    lines = [*_head(campaign, environment), *_classes(campaign), *_not_planted(campaign), *_not_in(campaign), *_notes(campaign)]
    lines += on_gpu
    if campaign.ours:
        lines += ["", "## The same faults under public rules, on our inputs", ""]
        lines += [
            "One call with the inputs and the memory on which the harness caught the fault; the whole output is judged, as",
            "these suites do. Hangs, races and histories are left out. Every rule is asked about every scheme here, whatever",
            "its suite uses it for; `false alarms` are inputs on which it rejects the healthy pipeline, and whose faults are",
            "not counted.",
            "",
            *_rule_table([_own_row(campaign), *campaign.ours]),
        ]
    if campaign.theirs:
        lines += ["", "## The same faults under public suites' own recipes", ""]
        lines += [
            "Their inputs and rule, clean memory, one call (harness/faults/suites.py); quantised suites on the faults of their",
            "scheme. A fault that a recipe cannot trigger passes: nobody would have seen it. The last column is what our own",
            "bounds let through on the same single calls, every stage shown.",
            "",
            *_rule_table(campaign.theirs, with_ours=True),
        ]
    if campaign.nulls:
        lines += ["", "## Null kernels", ""]
        lines += [
            "Kernels that compute nothing of the layer, under each policy: `taken` where it takes them for right. Ours judges",
            "them as black boxes that show only their output, on every case of the default tier whose right result they are",
            "not.",
            "",
            *_null_table(campaign.nulls),
        ]
    return "\n".join(lines) + "\n"


def _figures(figures: dict[str, object]) -> str:
    return ", ".join(f"{k} {v}" for k, v in figures.items())


def _head(c: Campaign, environment: str) -> list[str]:
    tier, small = c.default_tier, c.shrinking
    missed = f" (not {', '.join(c.default_tier['missed'])})" if c.default_tier["missed"] else ""  # type: ignore[arg-type]
    return [
        "# Planted faults",
        "",
        "Written by `moeproof faults --rules --output docs`; figures as JSON in results/faults-cpu.json.",
        f"{environment}, {c.jobs} processes.",
        "",
        f"- Classes: {_figures(c.summary)}.",
        f"- Single plantings (variant, scheme, chance): {_figures(c.plantings)}.",  # type: ignore[arg-type]
        f"- The default tier ({tier['cases']} cases) catches {tier['caught']} of {tier['classes']} classes{missed} in "
        f"{tier['seconds']} s ({tier['cpu_seconds']} s of processor time in all), twins included; the full tier is for the "
        "rest.",
        f"- Shrunk to at most {FEW_TOKENS} tokens, or the fewest that can trigger the class: {small['small_enough']} of "
        f"{small['classes']}; median {small['median_tokens']} tokens in {small['median_seconds']} s "
        f"({small['median_cpu_seconds']} s of processor time), longest {small['longest_seconds']} s.",
        f"- Cases that the vacuity gate refuses: {c.well.vacuous}; a case counts as a catch only where the twin PASSes it, "
        "gate included.",
        "",
        f"Each of the {len(c.chosen)} public fault classes is a small edit of a plain or quantised MoE pipeline",
        "(harness/faults): one step replaced by one that is wrong. A witness counts only calls in which the faulty step gave",
        "another value, address or order; a neutral twin runs the same edit and keeps the healthy result, and must never raise",
        f"an alarm: it is judged on the case that caught its fault, and on {TWINS} at least where so many fit. A class counts",
        "as caught where all its plantings are. `cases` is how far into the list (default tier, then full) each variant had to",
        "go, of its schemes the furthest; `calls` is the same for faults that fire by chance, p = 0.3, 0.03 and 0.003, median",
        "of five seeds. `place` says whether the token, slot, expert or rank that the first finding names is one that the",
        "fault changed; a dash where it changed all of them. `shrunk` is the tokens that the first planting shrinks to, and",
        "the time that takes.",
        "",
        "Grounds: " + "; ".join(f"*{k}*: {v}" for k, v in GROUNDS.items()) + ".",
        "",
    ]


def _classes(c: Campaign) -> list[str]:
    lines = [
        "| class | stands for | trigger | ground | caught | stage blamed | place | cases | shrunk |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return lines + [_class_row(c, f) for f in c.planted]


def _class_row(c: Campaign, f: Fault) -> str:
    own = c.of(f)
    caught = f"{sum(h.caught for h in own)} of {len(own)}" if len(own) > 1 else ("yes" if own and own[0].caught else "no")
    stages = "right" if all(h.right_stage for h in own) else "wrong"
    places = [h.place for h in own if h.place is not None]
    place = "-" if not places else "right" if all(places) else "wrong"
    needed = ", ".join(_needed(own, h) for h in _first_of_kind(own)) + (" calls" if f.random else "")
    small = next((s for s in c.smalls if s.id == f.id), None)
    shrunk = "-" if small is None else small.error or f"{small.tokens} in {small.seconds:.1f} s"
    cells = (f"{f.id} {f.name}", f.stands_for, f.trigger, f.ground, caught, f"{stages}: {_blamed(own)}", place, needed, shrunk)
    return "| " + " | ".join(cells) + " |"


def _first_of_kind(own: Sequence[Hunt]) -> list[Hunt]:
    """One planting of each variant and chance."""
    return list({(h.variant, h.chance): h for h in own}.values())


def _needed(own: Sequence[Hunt], kind: Hunt) -> str:
    alike = [h for h in own if (h.variant, h.chance) == (kind.variant, kind.chance)]
    return str(max(h.needed for h in alike)) if all(h.caught for h in alike) else "-"


def _blamed(own: Sequence[Hunt]) -> str:
    """Stages of the findings, in words: an error of the call, or damage around it, names none."""
    words = (h.finding.split(" ")[0] if h.outcome != "ERROR" else "error of the call" for h in own if h.caught)
    return ", ".join(dict.fromkeys("damage around the call" if w == "CALL" else w for w in words))


def _not_planted(c: Campaign) -> list[str]:
    rows = [f"| {f.id} {f.name} | {f.stands_for} | {f.why_not} |" for f in c.chosen if not f.planted]
    return ["", "## Not planted", "", "| class | stands for | why not |", "| --- | --- | --- |", *rows] if rows else []


def _notes(c: Campaign) -> list[str]:
    notes = [f"- {f.id} {f.name}: {f.note}." for f in c.planted if f.note]
    return ["", "## Notes", "", *notes] if notes else []


def _not_in(c: Campaign) -> list[str]:
    rows = [
        f"| {f.id} {f.name} | {reason} | {', '.join(schemes)} |"
        for f in c.planted
        for reason, schemes in f.not_in.items()
        if schemes
    ]
    head = ["| class | why it cannot happen | schemes |", "| --- | --- | --- |"]
    words = [
        "In every other quantised scheme the class is planted, in one variant at least. A class that forgets a scheme, or",
        "gives a reason where it is planted, is refused when the catalogue is read.",
    ]
    return ["", "## Quantised schemes without a planting", "", *words, "", *head, *rows] if rows else []


def _own_row(c: Campaign) -> Row:
    """The harness itself on the same faults."""
    own = [h for f in c.planted if f.ground in SINGLE and not f.random for h in c.of(f)]
    missed = tuple(h.label for h in own if not h.caught)
    return Row("moeproof", "", len(own), len(own) - len(missed), missed, false_alarms=len(c.well.alarms))


def _rule_table(rows: Sequence[Row], with_ours: bool = False) -> list[str]:
    head = ["recipe or rule", "faults", "let through", "share", "null kernels accepted", "false alarms"]
    head += ["never triggered", "moeproof lets through"] if with_ours else []
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for r in rows:
        passed = r.faults - r.rejected
        cells = [r.name, r.faults, passed, f"{passed / max(r.faults, 1):.0%}", ", ".join(r.nulls) or "-", r.false_alarms]
        cells += [r.idle, r.ours] if with_ours else []
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _null_table(rows: Sequence[Taken]) -> list[str]:
    lines = [f"| policy | {' | '.join(NULLS)} |", f"| --- |{' --- |' * len(NULLS)}"]
    for r in rows:
        lines.append(f"| {r.policy} | " + " | ".join("taken" if n in r.accepted else "rejected" for n in NULLS) + " |")
    return lines
