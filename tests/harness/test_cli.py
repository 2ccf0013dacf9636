"""The command: exit codes, JSON lines, and one clear message for every bad input."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup
from user_side import KERNEL, moeproof

from moeproof.harness import cli

ZEROS = """
def zeros(hidden_states, *rest):
    return torch.zeros_like(hidden_states)
"""
LINE = "T=5,H=24,I=16,E=4,K=2,seed=1"


@pytest.fixture
def kernels(tmp_path: Path) -> str:
    path = tmp_path / "kernels.py"
    path.write_text(KERNEL + ZEROS)
    return str(path)


def test_verify_passes(kernels: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = moeproof(monkeypatch, "verify", f"{kernels}:moe", "--case", LINE, "--jobs", "1")

    assert code == 0
    assert "1 PASS" in capsys.readouterr().out


def test_verify_fails_with_finding_and_replay_line(
    kernels: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = moeproof(monkeypatch, "verify", f"{kernels}:zeros", "--case", LINE, "--jobs", "1")
    lines = capsys.readouterr().out.splitlines()

    assert code == 1
    found = next(line for line in lines if "COMBINE out: wrong value" in line)
    replay = next(line for line in lines if "moeproof replay" in line)
    assert replay.strip() == f'moeproof replay "{LINE}" --candidate {kernels}:zeros'

    code = moeproof(monkeypatch, *shlex.split(replay)[1:])
    assert code == 1
    assert found in capsys.readouterr().out.splitlines()


def test_json_lines_end_in_a_summary(kernels: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = moeproof(monkeypatch, "verify", f"{kernels}:moe", f"{kernels}:zeros", "--case", LINE, "--jobs", "1", "--json")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert code == 1
    assert [line["outcome"] for line in lines[:-1]] == ["PASS", "FAIL"]
    assert lines[1]["findings"][0]["stage"] == "COMBINE"
    keys = "cases checked pass fail flaky error timeout vacuous unsupported not_run seconds worst_ratio"
    assert set(lines[-1]) == set(keys.split())
    assert (lines[-1]["cases"], lines[-1]["pass"], lines[-1]["fail"]) == (1, 1, 1)


def test_nothing_checked_is_its_own_exit_code(
    kernels: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = moeproof(monkeypatch, "verify", f"{kernels}:moe", "--case", f"{LINE},act=gelu", "--jobs", "1")

    assert code == 3
    assert "1 UNSUPPORTED" in capsys.readouterr().out


def test_replay_shows_shares_of_the_bounds(
    kernels: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = moeproof(monkeypatch, "replay", LINE, "--candidate", f"{kernels}:moe")

    assert code == 0
    assert "observed/allowed: out" in capsys.readouterr().out


def test_workers_give_the_same_verdicts(
    kernels: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = moeproof(
        monkeypatch, "verify", f"{kernels}:moe", "--case", LINE, "--case", "T=3,H=24,I=16,E=4,K=1", "--jobs", "2", "--json"
    )
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])

    assert code == 0
    assert (summary["cases"], summary["pass"]) == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["replay", "T=5,H=24"], "the case line lacks I, E, K"),
        (["replay", f"{LINE},shared=x"], "shared='x' is not an int"),
        (["replay", f"{LINE},inplace=yes"], "inplace='yes' is not 0 or 1"),
        (["replay", "hello"], "'hello' is not key=value"),
        (["replay", f"{LINE},speed=9"], "case key 'speed' is not known; allowed: T, H, I"),
        (["replay", f"{LINE},T=6"], "'T' is given twice"),
        (["replay", "T=5,H=24,I=16,E=4,K=5"], "K=5 slots per token but only 4 experts"),
        (["replay", f"{LINE},weight_on_input=1"], "weight_on_input with K=2"),
        (["replay", f"{LINE},dtype=int3"], "dtype 'int3' is not known; allowed: bf16, fp16, fp32"),
        (["replay", f"{LINE},scheme=fp9"], "scheme 'fp9' is not known; allowed: none"),
        (["replay", f"{LINE},act=swish"], "activation 'swish' is not known; allowed: silu"),
        (["replay", f"{LINE},act=relu2"], "activation 'relu2' is refused"),
        (["replay", f"{LINE},act=silu:limit=x"], "limit='x' is not a number"),
        (["replay", f"{LINE},router=softmax:groups=3/1"], "E=4 experts do not divide into groups=3"),
        (["replay", f"{LINE},routing=sideways"], "routing 'sideways' is not known; allowed: uniform"),
        (["replay", "T=5,H=24,I=16,E=4,K=2,seed=-1"], "seed='-1' is not a whole number"),
        (["replay", "model=mixtral-9x7b"], "mixtral-8x7b"),
        (["replay", LINE, "--candidate", "tritn"], "candidate 'tritn' is not known; allowed: .*did you mean triton"),
        (["replay", LINE, "--candidate", "no/such.py:moe"], "candidate file 'no/such.py' does not exist"),
        (["replay", LINE, "--candidate", "json:nothing"], "json has no attribute 'nothing'"),
        (["replay", LINE, "--candidate", "json:__version__"], "a candidate is a callable"),
        (["replay", LINE, "--candidate", "no_such_module:f"], "no_such_module cannot be imported"),
        (["replay", LINE, "--mode", "sideways"], "mode 'sideways' is not known; allowed: auto, interpret, device"),
        (["verify", "--tier", "huge"], "tier 'huge' is not known; allowed: quick, default, full, soak"),
        (["verify", "--model", "mixtral-8x7b", "--dtype", "fp4"], "dtype 'fp4' is not known"),
        (["verify", "--model", "mixtral-8x7b", "--tier", "quick"], "give one of --model, --case, --tier and --random"),
    ],
)
def test_bad_input_gets_one_clear_message(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    code = moeproof(monkeypatch, *arguments)
    err = capsys.readouterr().err

    assert code == 2
    assert err.startswith("moeproof: ")
    assert err.count("\n") == 1, "one line"
    assert re.search(words, err) or words in err, err


def test_wrong_usage_is_two(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert moeproof(monkeypatch, "verify", "--no-such-option") == 2
    assert moeproof(monkeypatch, "nonsense") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_commands_name_common_options_alike() -> None:
    app = typer.main.get_command(cli.app)
    assert isinstance(app, TyperGroup)
    golden = app.commands["golden"]
    assert isinstance(golden, TyperGroup)
    commands = {**app.commands, **{f"golden {name}": command for name, command in golden.commands.items()}}
    del commands["golden"]

    for name, command in commands.items():
        options = {word for parameter in command.params for word in parameter.opts if word.startswith("--")}
        assert "--json" in options, name
        assert not {"--out", "--candidates", "--models"} & options, name
        assert all(getattr(parameter, "help", "") for parameter in command.params), f"{name}: every option says what it does"


def test_ratios_without_names_measures_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ratios.json"
    words = ("--scheme", "fp8_token", "--cases", "1", "--jobs", "1", "--json", "--output", str(output))
    code = moeproof(monkeypatch, "ratios", *words)
    standard, batched = (json.loads(line) for line in capsys.readouterr().out.splitlines()[:2])

    assert code == 0
    assert standard["outcomes"] == {"PASS": 12} and batched["outcomes"] == {"PASS": 6}
    assert set(standard["sums"]) >= {"eager", "triton-fp8", "triton-fp8-modular"}
    assert json.loads(output.read_text())["rows"] == [standard, batched]


def test_doctor_lists_versions_and_candidates(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    moeproof(monkeypatch, "doctor", "--json")
    facts = json.loads(capsys.readouterr().out)

    assert facts["mode"] == "interpret"
    assert facts["torch"]
    assert isinstance(facts["problems"], list)
