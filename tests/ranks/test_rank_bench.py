"""`moeproof bench --ranks`: what must move is what the oracle says, and nothing wrong has a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rank_kit import line_for
from typer.testing import CliRunner

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.worlds import make_world_inputs
from moeproof.harness.cli import app
from moeproof.harness.ranks import bench_clock
from moeproof.harness.ranks.bench import Options, Phase, Reading, Sizes, measure, read
from moeproof.harness.ranks.bench_calls import own_rows
from moeproof.harness.ranks.bench_clock import Laps, Samples
from moeproof.harness.ranks.bench_load import Load, busiest, full_size
from moeproof.harness.ranks.bench_report import lines
from moeproof.harness.ranks.outcome import Ending, RankRun
from moeproof.harness.ranks.tags import check_delivery, tag
from moeproof.harness.registry import load_rank_pairs
from moeproof.reference.contract import ContractError
from moeproof.reference.ranks import received, sent_tokens

FILE = str(Path(__file__).parent / "rank_candidates.py")
SMALL = Sizes(hidden=96, topk=3, experts=7)


@pytest.mark.parametrize("routing", ["uniform", "hot", "minus1", "dup", "none"])
@pytest.mark.parametrize("spread", ["even", "uneven", "empty"])
def test_what_must_move_is_what_the_oracle_says(routing: str, spread: str) -> None:
    case = parse_case(line_for("eager-alltoall", 3, f"routing={routing},spread={spread}"))
    load, inputs = Load(case), make_world_inputs(case)
    tokens = sent_tokens(case.world, inputs)

    assert torch.equal(load.token_rows(), tokens)
    for rank, pairs in enumerate(received(case.world, inputs)):
        assert sorted(map(tuple, load.triples(rank).tolist())) == sorted((p.source, p.token, p.expert) for p in pairs)
        assert int(load.slot_rows()[:, rank].sum()) == len(pairs)
        for name, tensor in load.inputs(rank).tensors():
            if name.startswith(("topk", "expert_map")):
                assert torch.equal(tensor.nan_to_num(-7.0), getattr(inputs[rank], name).nan_to_num(-7.0))
    travel = tokens - tokens.diag().diag()
    assert load.must_move() == busiest(tokens) * 20 * 2 == max(int(travel.sum(d).max()) for d in (0, 1)) * 40
    assert [own_rows(load, rank, by_slot=False).size(0) for rank in range(3)] == tokens.sum(dim=1).tolist()
    assert [own_rows(load, rank, by_slot=True).size(0) for rank in range(3)] == load.slot_rows().sum(dim=1).tolist()


def test_a_batched_region_has_room_for_the_fullest_expert() -> None:
    case = full_size(SMALL.problem(64), 2, "batched")
    ids = Load(case).routing[0]
    fullest = int(torch.bincount(ids.flatten().long()).max())

    assert case.problem.capacity % 16 == 0 and fullest <= case.problem.capacity < fullest + 16
    assert Load(case).must_move() == busiest(Load(case).slot_rows()) * 96 * 2


def test_each_way_of_going_astray_is_seen() -> None:
    load = Load(parse_case(line_for("eager-alltoall", 2, "routing=uniform")))
    triples = load.triples(0)
    rows = torch.cat([tag(int(s), int(t) + 1, 20, torch.bfloat16, torch.device("cpu"))[-1:] for s, t, _ in triples])
    ids = triples[:, 2:]
    assert not check_delivery(0, triples, rows, ids)

    lost, twice, torn = rows[1:], torch.cat([rows, rows[:1]]), rows.clone()
    torn[2, -1] = 7 - torn[2, -1]
    other = ids.clone()
    other[0] = (other[0] + 1) % 3
    assert "0 times for this expert, must be 1" in str(check_delivery(0, triples, lost, ids[1:])[0])
    assert "2 times for this expert, must be 1" in str(check_delivery(0, triples, twice, torch.cat([ids, ids[:1]]))[0])
    assert "made of pieces" in str(check_delivery(0, triples, torn, ids)[0])
    assert len(check_delivery(0, triples, rows, other)) == 2


def test_pairs_and_bare_collectives_are_timed_and_what_is_wrong_is_not() -> None:
    """`far` candidates are right at the small size that the oracle judges; only the full size shows them."""
    names = ["eager-alltoall", "eager-batched-alltoall", *(f"{FILE}:{n}" for n in ("halves", "far_rows", "far_out", "raises"))]
    pairs = list(zip(names, load_rank_pairs(names), strict=True))
    readings = list(measure(pairs, [3], SMALL, 2, "gloo", Options(seconds=1e-3)))
    by_name = {r.candidate: r for r in readings}
    timed = [r for r in readings if r.both]

    assert [r.candidate for r in timed if not r.candidate.startswith("raw")] == names[:2]
    assert len(timed) == 5
    for r in timed:
        assert r.dispatch and r.combine and r.both and not r.reason
        assert 0 < r.dispatch.us_min <= r.dispatch.us <= r.dispatch.us_max
        assert r.tokens_per_s == pytest.approx(6 / (r.both.us * 1e-6))
        assert r.dispatch.gbs == pytest.approx(r.dispatch_bytes / (r.dispatch.us * 1e3))
        assert r.repeats >= 3
    assert by_name["raw all_gather, reduce_scatter"].combine_bytes == 3 * 96 * 4
    assert by_name["eager-alltoall"].dispatch_bytes == by_name["raw all_to_all, a row per token"].dispatch_bytes
    assert by_name["eager-batched-alltoall"].dispatch_bytes == by_name["raw all_to_all, a row per slot"].dispatch_bytes
    assert "ranks=2" in by_name["eager-alltoall"].judged and "H=64" in by_name["eager-alltoall"].judged
    assert by_name["halves"].reason.startswith("wrong: FAIL on T=6,H=64")
    assert by_name["far_rows"].reason.startswith("wrong: DISPATCH rows")
    assert by_name["far_out"].reason.startswith("wrong: COMBINE out, rank 1, token 0")
    assert "no room for a third replica" in by_name["raises"].reason and "us" not in by_name["raises"].record()


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    sizes = ["--hidden", "32", "--topk", "2", "--experts", "4", "--tokens", "2", "--seconds", "0.001"]
    options = ["--ranks", "2", "--transport", "gloo", *sizes, "--json", "--output", str(path)]
    result = CliRunner().invoke(app, ["bench", "eager-allgather", *options])
    *readings, last = map(json.loads, result.stdout.splitlines())
    written = json.loads(path.read_text())

    assert result.exit_code == 0, result.output
    assert written["readings"] == readings and len(readings) == 4
    assert (last["timed"], last["wrong"]) == (4, 0) and "say nothing about a GPU" in last["note"]
    assert {"command", "device", "versions", "date"} <= written.keys()


def test_what_was_replayed_stands_beside_what_was_called() -> None:
    """Every repeat counts its slowest rank; a line of the table and a part of the record of its own."""
    called = [Laps((30.0, 10.0, 20.0), (5.0,) * 3, (60.0,) * 3), Laps((10.0, 40.0, 20.0), (6.0,) * 3, (50.0,) * 3)]
    replayed = [Laps((3.0, 1.0, 2.0), (0.5,) * 3, (6.0,) * 3), Laps((1.0, 4.0, 2.0), (0.6,) * 3, (5.0,) * 3)]
    run = RankRun(Ending.DONE, (), tuple(map(Samples, called, replayed)))
    reading = read(Reading("a", "symm", 2, 3, "T=6"), run, 1000, 2000)

    assert reading.dispatch == Phase(30.0, 20.0, 40.0, 1000 / 30e3)
    assert reading.replayed is not None and reading.replayed.dispatch == Phase(3.0, 2.0, 4.0, 1000 / 3e3)
    assert reading.replayed.both.us == 6.0 and reading.repeats == 3
    _, plain, graph = lines([reading])
    assert "30 (20-40)" in plain and graph.split()[0] == "replayed" and "3 (2-4)" in graph
    assert reading.record()["replayed"]["combine"]["us"] == 0.6  # type: ignore[index]


def test_the_graphs_that_are_judged_fill_what_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured dispatch that allocates fills its own tensor at every replay, not that of the graph captured after it."""

    class Allocates:
        def dispatch(self) -> None:
            self.prepared: list[str] = []
            record.append(lambda rows=self.prepared: rows.append("rows"))

        def combine(self) -> None:
            record.append(lambda rows=self.prepared: taken.extend(rows))

    record: list[Callable[[], None]] = []
    taken: list[str] = []

    def captured(act: Callable[[], None]) -> SimpleNamespace:
        record.clear()
        act()
        steps = [*record]
        return SimpleNamespace(replay=lambda: [step() for step in steps])

    monkeypatch.setattr(bench_clock, "captured", captured)
    calls = Allocates()
    dispatch, combine, _ = bench_clock.graphs(calls, lambda: (calls.dispatch(), calls.combine()))  # type: ignore[arg-type]
    dispatch.replay()
    combine.replay()

    assert calls.prepared == taken == ["rows"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "1"], "there must be at least 2"),
        (["--transport", "simulated"], "there is no transport to time"),
        (["--model", "qwen3"], "--model does not go with --ranks"),
        (["--tokens", "0"], r"tokens \[0\] must be in \[1, 16384\]"),
        (["--hidden", "2"], "hidden=2 must be at least 3"),
        (["--experts", "1"], "experts"),
        (["--transport", "mpi"], "transport 'mpi' is not known"),
    ],
)
def test_wrong_usage_is_one_message(arguments: list[str], words: str) -> None:
    given = {"--ranks": "2", "--transport": "gloo"} | dict([arguments])
    result = CliRunner().invoke(app, ["bench", "eager-allgather", *(w for pair in given.items() for w in pair)])

    assert isinstance(result.exception, ContractError)
    with pytest.raises(ContractError, match=words):
        raise result.exception
