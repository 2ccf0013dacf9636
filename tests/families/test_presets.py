"""Presets: every row is a legal problem, prints and parses, and has a small twin that keeps what matters."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.presets import PRESETS, TOKENS, preset, scaled
from moeproof.reference.contract import ContractError

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
KEPT = ("K", "act", "weight_on_input", "expert_bias", "storage", "shared_gate", "latent_norm", "layout", "ep", "ep_rank")


@pytest.mark.parametrize("name", PRESETS)
def test_a_case_line_names_the_model(name: str) -> None:
    full, small = parse_case(f"model={name}"), parse_case(f"model={name}/small,seed=3")

    assert full.problem == preset(name)
    assert full.problem.T == TOKENS
    assert parse_case(f"model={name},T=5").problem.T == 5
    assert small.problem == preset(f"{name}/small")
    assert parse_case(str(full)) == full
    assert parse_case(str(small)) == small


@pytest.mark.parametrize("name", PRESETS)
def test_small_twin_keeps_the_kind_and_shrinks_the_sizes(name: str) -> None:
    full, small = preset(name), scaled(preset(name), T=4)

    assert small.T == 4
    assert max(small.H, small.I, small.shared, small.latent) <= 256
    assert small.K < small.E <= 16 or name == "kimi-k3"
    for field in KEPT:
        assert getattr(small, field) == getattr(full, field), field
    assert (small.router.groups, small.router.keep, small.router.bias) == (
        full.router.groups,
        full.router.keep,
        full.router.bias,
    )
    assert bool(small.router.zero_experts) == bool(full.router.zero_experts)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gpt-oss-20b", {"H": 180, "I": 180, "E": 16, "K": 4}),
        ("qwen1.5-moe-a2.7b", {"H": 256, "I": 176, "E": 15, "shared": 176}),
        ("glm-5-next", {"E": 9, "K": 8}),
        ("granite-4-h-small", {"E": 16, "K": 10}),
        ("kimi-k3", {"E": 28, "K": 16, "latent": 224}),
        ("deepseek-v3", {"H": 224, "I": 256, "E": 16}),
        ("deepseek-v2", {"E": 16, "K": 6}),
    ],
)
def test_ragged_sizes_stay_ragged(name: str, sizes: dict[str, int]) -> None:
    small = preset(f"{name}/small")

    assert {field: getattr(small, field) for field in sizes} == sizes


def test_an_odd_width_stays_odd() -> None:
    """DeepSeek-V2's class default, 1407, is nobody's model, but kernels meet such widths under tensor parallelism."""
    import dataclasses

    assert scaled(dataclasses.replace(preset("deepseek-v2-lite"), I=1407)).I == 175


def test_unknown_models_list_close_names() -> None:
    with pytest.raises(ContractError, match=r"did you mean .*deepseek-v3"):
        preset("deepseek-r3")
    with pytest.raises(ContractError, match="allowed: mixtral-8x7b"):
        preset("zzzz")
    with pytest.raises(ContractError, match="only 'small'"):
        preset("mixtral-8x7b/tiny")


def test_expert_parallel_shard() -> None:
    shard = preset("deepseek-v3-ep8")

    assert (shard.E, shard.ep, shard.ep_rank, len(shard.local)) == (256, 8, 0, 32)


def test_sources_are_named_and_memory_is_marked() -> None:
    for row in PRESETS.values():
        assert row.source and set(row.source) <= set("CVMSHRTm")
        assert row.verified == ("m" not in row.source)


def test_the_page_lists_every_preset_as_it_is() -> None:
    """docs/models.md is generated: `PYTHONPATH=src python -m tests.families.page`."""
    from .page import table

    assert table() in DOCS.read_text()
