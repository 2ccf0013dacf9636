"""Quantised layers on process ranks over gloo: every scheme, calls back to back, the command, and refusals on all ranks."""

from __future__ import annotations

import json

import pytest
import torch
from gloo_ranks import GlooRanks, pair_on_cases
from rank_kit import PAIRS, every_pair, expectation, findings, line_for, on_ranks
from user_side import moeproof

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.worlds import make_rank_inputs
from moeproof.harness.ranks.pairs import run_rank, support
from moeproof.reference.contract import SCHEMES, ContractError, Link

QUANTISED = [name for name, s in SCHEMES.items() if s.quantised]
SPREADS = ("spread=uneven", "spread=empty", "spread=one")
ROUTINGS = ("routing=minus1", "routing=dup", "routing=hot", "routing=uniform")


def line(name: str, ranks: int, scheme: str, *extras: str) -> str:
    width = max(SCHEMES[scheme].w.group[1], 64)  # type: ignore[union-attr]
    return line_for(name, ranks, *extras, sizes=f"T=7,H={width},I={width},E=5,K=2,scheme={scheme}")


@every_pair
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_scheme_on_processes(gloo: GlooRanks, name: str, ranks: int) -> None:
    """A third of the schemes at each number of ranks, so that every pair meets every one; all shown tensors judged."""
    for n, scheme in enumerate(QUANTISED[ranks - 1 :: 3]):
        case = line(name, ranks, scheme, f"values=groups,{ROUTINGS[n % 4]},{SPREADS[n % 3]}")
        if support(PAIRS[name], parse_case(case).world, "gloo") is None:
            shown = [answer[0] for answer in gloo.results(pair_on_cases, ranks, name, [case])]
            assert not findings(expectation(case, name), shown), case


@every_pair
def test_calls_back_to_back_and_the_same_bits_as_threads(gloo: GlooRanks, name: str) -> None:
    """Other tokens, other scales, none at all, and the first call again: nothing of one call's scales in the next."""
    lines = [line(name, 2, "fp8_block", f"values=hetero,{extra}") for extra in ("seed=6", "seed=7", "routing=none")]
    lines.append(lines[0])
    answers = gloo.results(pair_on_cases, 2, name, lines)
    for n, case in enumerate(lines):
        assert not findings(expectation(case, name), [answer[n] for answer in answers])

    cases = [parse_case(text) for text in lines]
    threads = on_ranks(
        2, lambda link: run_rank(PAIRS[name], [make_rank_inputs(c, link.rank) for c in cases], cases[0].world, link)
    )
    for rank in range(2):
        assert torch.equal(answers[rank][0]["out"], answers[rank][3]["out"])
        if name != "eager-allgather":  # a reduce-scatter may add in another order
            assert torch.equal(answers[rank][0]["out"], threads[rank][0]["out"])
        for tensor in ("rows", "row_scales"):
            if tensor in threads[rank][0]:
                a, b = (t.contiguous().view(torch.uint8) for t in (answers[rank][0][tensor], threads[rank][0][tensor]))
                assert torch.equal(a, b)


def refused(link: Link, name: str) -> list[str]:
    """What this rank is told of calls in which rank 1 means another scheme, and has no scale of its w1."""
    texts = []
    for wrong in ("scheme", "w1_scale"):
        case = parse_case(line(name, 2, "fp8_token"))
        inputs, world = make_rank_inputs(case, link.rank), case.world
        if link.rank == 1 and wrong == "scheme":
            other = parse_case(line(name, 2, "int8_token"))
            inputs, world = make_rank_inputs(other, link.rank), other.world
        elif link.rank == 1:
            inputs = inputs.map({wrong: inputs.w2_scale[:, :8]})  # type: ignore[index]
        try:
            run_rank(PAIRS[name], [inputs], world, link)
            texts.append("")
        except ContractError as error:
            texts.append(str(error))
    return texts


@every_pair
def test_one_rank_with_another_scheme_or_without_its_scales(gloo: GlooRanks, name: str) -> None:
    first, second = gloo.results(refused, 2, name)

    for text in (first[0], second[0]):
        assert "scheme: rank 0 has fp8_token, rank 1 has int8_token" in text
    assert second[1].startswith("w1_scale is (") and "must be (" in second[1]
    assert "rank 1 refused: ContractError in the experts: w1_scale is (" in first[1]


@pytest.mark.parametrize("transport", ["gloo", "simulated"])
def test_the_command(transport: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`moeproof verify --ranks 2` on a quantised line: what a scheme has no place for is refused with the reason."""
    case = "T=6,H=64,I=64,E=5,K=2,scheme=mxfp8,values=groups,routing=minus1,seed=3"
    names = ["eager-allgather", "eager-alltoall", "eager-alltoall-overlapped"]
    options = ("--case", case, "--ranks", "2", "--transport", transport, "--json")
    code = moeproof(monkeypatch, "verify", *names, *options)
    *verdicts, summary = [json.loads(text) for text in capsys.readouterr().out.splitlines()]

    assert code == 0 and summary["pass"] == 3
    assert {v["candidate"] for v in verdicts} == set(names)
    assert min(v["checked"] for v in verdicts) >= 6 * 64

    beyond = ("--case", case.replace("minus1", "beyond"), "--ranks", "2", "--transport", transport, "--json")
    assert moeproof(monkeypatch, "verify", names[0], *beyond) == 3
    verdict = json.loads(capsys.readouterr().out.splitlines()[0])
    assert verdict["outcome"] == "UNSUPPORTED" and "refuses ids >= E" in verdict["reason"]

    shards = "T=6,H=64,I=96,E=5,K=2,scheme=mxfp8,ranks=2,tp=2,seed=3"
    assert moeproof(monkeypatch, "verify", names[0], "--case", shards, "--transport", transport) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "shard 0 of I=96 would hold columns 0..47; scheme mxfp8 groups 32 columns of w2, which no shard may cut" in error
