"""Golden dumps: they agree with the oracle, hold candidates to account, and refuse every kind of damage by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeproof import Candidate, Claims, ContractError, Inputs, parse_case
from moeproof.harness.cases.presets import PRESETS
from moeproof.harness.dumps import golden, golden_file
from moeproof.harness.verdict import Outcome
from moeproof.reference.oracle import chain, route
from moeproof.reference.oracle.experts import live_slots

STORED = Path(__file__).parent
PLAIN = "T=5,H=16,I=12,E=4,K=2,seed=1"
EXACT = "T=5,H=16,I=12,E=4,K=2,values=sat,seed=2"
Spoil = Callable[[Path], None]


def _layer(inputs: Inputs) -> dict[str, torch.Tensor]:
    """The oracle's own tensors, stored in the problem's dtype: a candidate that must pass."""
    trace, choice, own = chain(inputs, Claims()), route(inputs), inputs.problem.fmt.dtype
    shown = {name: value.value.to(own) for name, value in trace.items()}
    return shown | {"topk_ids": choice.ids.to(torch.int32), "topk_weights": choice.weights.float()}


def _transposed_experts(inputs: Inputs) -> dict[str, torch.Tensor]:
    return _layer(inputs.map({"w2": inputs.w2.flip(0).contiguous()}))


RIGHT = Candidate("right", _layer, shows=("out",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    golden.record([parse_case(PLAIN), parse_case(EXACT)], tmp_path / "dumps")
    return tmp_path / "dumps"


def _file(folder: Path) -> Path:
    return folder / golden.file_name(parse_case(PLAIN))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def _manifest(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# the committed dumps


@pytest.fixture(scope="module")
def verdicts() -> list[golden.GoldenVerdict]:
    """The oracle on every committed dump, and a right candidate on those of few experts (to save time)."""
    few = Candidate("right", _layer, supports=lambda p: None if p.E <= 8 else "only few experts")
    return golden.check(STORED, [few])


def test_the_oracle_agrees_with_the_committed_dumps(verdicts: list[golden.GoldenVerdict]) -> None:
    mine = [v for v in verdicts if v.candidate == "oracle"]

    assert [v for v in mine if v.outcome is not Outcome.PASS] == []
    assert len(mine) == len(golden.canonical_cases())


def test_a_right_candidate_passes_against_the_committed_dumps(verdicts: list[golden.GoldenVerdict]) -> None:
    ran = [v for v in verdicts if v.candidate == "right" and v.outcome is not Outcome.UNSUPPORTED]

    assert {v.outcome for v in ran} == {Outcome.PASS}
    assert len(ran) >= 15
    assert all(v.checked for v in ran)


def test_every_preset_has_a_dump() -> None:
    recorded = {entry.case for entry in golden_file.read_manifest(STORED).values()}

    assert recorded == {str(case) for case in golden.canonical_cases()}
    assert {str(golden.twin(model)) for model in PRESETS} <= recorded


def test_the_dumps_stay_small() -> None:
    assert sum(p.stat().st_size for p in STORED.iterdir() if p.suffix != ".py" and p.is_file()) < 3_000_000


def test_recording_again_changes_nothing(tmp_path: Path) -> None:
    """On every machine: another CPU differs in the last bits of float64, and leaves the files as they are."""
    shutil.copytree(STORED, tmp_path / "copy", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    before = _bytes(tmp_path / "copy")

    golden.record(golden.canonical_cases(), tmp_path / "copy")

    assert _bytes(tmp_path / "copy") == before


# candidates


def test_a_wrong_candidate_fails_and_says_how_to_repeat_it(folder: Path) -> None:
    wrong = Candidate("wrong", _transposed_experts)
    verdicts = [v for v in golden.check(folder, [wrong]) if v.candidate == "wrong"]

    assert {v.outcome for v in verdicts} == {Outcome.FAIL}
    assert [f.tensor for f in verdicts[0].findings] == ["y", "out"]
    assert f"moeproof golden check {folder} --candidate wrong" in str(verdicts[0])


def test_a_wrong_router_fails(folder: Path) -> None:
    def shifted(inputs: Inputs) -> dict[str, torch.Tensor]:
        shown = _layer(inputs)
        return shown | {"topk_ids": (shown["topk_ids"] + 1) % inputs.problem.E}

    verdicts = golden.check(folder, [Candidate("shifted", shifted)])

    assert {f.tensor for v in verdicts for f in v.findings} == {"topk_ids"}


def test_stored_values_judge_a_candidate_not_new_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle that drifts takes nobody with it: the candidate that follows it fails too."""

    def drifted(inputs: Inputs, claims: Claims) -> object:
        return chain(inputs.map({"w1": inputs.w1 * 1.5}), claims)

    def follows(inputs: Inputs) -> torch.Tensor:
        return drifted(inputs, Claims())["out"].value.to(inputs.problem.fmt.dtype)  # type: ignore[index]

    monkeypatch.setattr(golden, "chain", drifted)
    verdicts = golden.check(folder, [Candidate("follows", follows)])

    assert [v.outcome for v in verdicts] == [Outcome.FAIL] * 4
    assert "no longer gives the recorded value" in str(verdicts[0])


def test_a_weaker_claim_widens_the_stored_bound(folder: Path) -> None:
    def coarse(inputs: Inputs) -> dict[str, torch.Tensor]:
        y = _layer(inputs)["y"]
        weights = inputs.topk_weights.to(y.dtype)
        out = torch.zeros_like(inputs.hidden_states)
        for slot in range(y.shape[1]):
            out = out + torch.where(live_slots(inputs)[:, slot, None], weights[:, slot, None] * y[:, slot], 0)
        return {"out": out}

    claims = Claims(combine="dtype")
    verdicts = golden.check(folder, [Candidate("coarse", coarse, claims=claims)])

    assert {v.outcome for v in verdicts} == {Outcome.PASS}
    assert {v.claims for v in verdicts if v.candidate == "coarse"} == {"combine=dtype"}


def test_an_unsupported_case_says_why(folder: Path) -> None:
    picky = Candidate("picky", _layer, supports=lambda problem: "never today")

    assert {v.reason for v in golden.check(folder, [picky]) if v.candidate == "picky"} == {"never today"}


# the oracle: bitwise where it must be, and honest about the rest


def _with_last_bit(folder: Path, line: str, tensor: str) -> None:
    """As if recorded on a CPU whose sums round the other way: one last bit, with every hash made anew."""
    entries = golden_file.read_manifest(folder)
    name = golden.file_name(parse_case(line))
    tensors = load_file(folder / name)
    flat = tensors[tensor].flatten()
    nonzero = int((flat != 0).nonzero()[0])
    flat[nonzero] = torch.nextafter(flat[nonzero], torch.tensor(torch.inf, dtype=flat.dtype))
    hashes = {k: golden_file.tensor_hash(t) for k, t in tensors.items()}
    entry = golden_file.Entry(**(vars(entries[name]) | {"tensors": hashes}))
    entries[name] = golden_file.write_dump(folder / name, entry, tensors)
    golden_file.write_manifest(folder, entries)


def test_a_last_bit_is_reported_but_passes_where_sums_may_round(folder: Path) -> None:
    _with_last_bit(folder, PLAIN, "y.value")
    verdicts = {str(v.case): v for v in golden.check(folder)}

    assert verdicts[PLAIN].outcome is Outcome.PASS
    assert verdicts[PLAIN].reason == "within 2^-40, not bitwise: y.value"
    assert verdicts[EXACT].reason == ""


def test_a_last_bit_fails_where_every_sum_is_exact(folder: Path) -> None:
    _with_last_bit(folder, EXACT, "y.value")
    verdicts = {str(v.case): v.outcome for v in golden.check(folder)}

    assert verdicts == {PLAIN: Outcome.PASS, EXACT: Outcome.FAIL}


def test_a_changed_recipe_is_a_failure_of_the_inputs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(case: object, device: object = "cpu") -> Inputs:
        inputs = make_inputs(case, device)  # type: ignore[arg-type]
        return inputs.map({"hidden_states": inputs.hidden_states * 2})

    make_inputs = golden.make_inputs
    monkeypatch.setattr(golden, "make_inputs", other)
    verdicts = golden.check(folder, [RIGHT])

    assert [(v.candidate, v.outcome) for v in verdicts] == [("oracle", Outcome.FAIL)] * 2
    assert "a recipe or the generator changed" in str(verdicts[0])


# damage


def _truncate(folder: Path) -> None:
    _file(folder).write_bytes(_file(folder).read_bytes()[:-100])


def _flip_a_bit(folder: Path) -> None:
    content = bytearray(_file(folder).read_bytes())
    content[-1] ^= 1
    _file(folder).write_bytes(bytes(content))


def _swap(folder: Path) -> None:
    """Another case's file under this name, in a manifest that knows its hash."""
    other = folder / golden.file_name(parse_case(EXACT))

    def change(content: dict[str, dict[str, dict[str, object]]]) -> None:
        files = content["files"]
        for key in ("bytes", "sha256"):
            files[_file(folder).name][key] = files[other.name][key]

    _file(folder).write_bytes(other.read_bytes())
    _manifest(folder, change)  # type: ignore[arg-type]


def _pickle(folder: Path) -> None:
    """A file of another kind whose size and hash the manifest does state."""
    torch.save({"x": torch.zeros(2)}, _file(folder))

    def change(content: dict[str, dict[str, dict[str, object]]]) -> None:
        entry = content["files"][_file(folder).name]
        entry["bytes"], entry["sha256"] = _file(folder).stat().st_size, golden_file.file_hash(_file(folder))

    _manifest(folder, change)  # type: ignore[arg-type]


def _headless(folder: Path) -> None:
    """The right tensors from a tool that is not ours."""
    save_file(load_file(_file(folder)), _file(folder))

    def change(content: dict[str, dict[str, dict[str, object]]]) -> None:
        entry = content["files"][_file(folder).name]
        entry["bytes"], entry["sha256"] = _file(folder).stat().st_size, golden_file.file_hash(_file(folder))

    _manifest(folder, change)  # type: ignore[arg-type]


def _entry(key: str, value: object) -> Spoil:
    def spoil(folder: Path) -> None:
        def change(content: dict[str, dict[str, dict[str, object]]]) -> None:
            entry = content["files"][_file(folder).name]
            if value is None:
                del entry[key]
            else:
                entry[key] = value

        _manifest(folder, change)  # type: ignore[arg-type]

    return spoil


DAMAGE: dict[str, tuple[Spoil, str]] = {
    "truncated": (_truncate, r"golden file '.*{file}' is truncated: it has \d+ of \d+ bytes"),
    "bit flipped": (_flip_a_bit, "golden file '.*{file}' is damaged: its SHA-256"),
    "missing": (lambda f: _file(f).unlink(), "golden file '.*{file}' is missing: the manifest lists it"),
    "foreign file": (lambda f: (f / "mine.safetensors").write_bytes(b"x"), "mine.safetensors' is foreign"),  # type: ignore[dict-item]
    "another case's file": (_swap, "golden file '.*{file}' belongs to another entry: its case is 'T=5"),
    "no safetensors": (_pickle, "golden file '.*{file}' is damaged: "),
    "no header": (_headless, "golden file '.*{file}' is foreign: it has no moeproof-golden header"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    "no folder": (shutil.rmtree, "golden folder '.*' does not exist"),
    "manifest cut": (
        lambda f: (f / "manifest.json").write_text("{"),  # type: ignore[dict-item]
        "manifest.json' is damaged: ",
    ),
    "manifest of another tool": (
        lambda f: (f / "manifest.json").write_text("[]"),  # type: ignore[dict-item]
        "manifest.json' is foreign",
    ),
    "newer": (
        lambda f: _manifest(f, lambda c: c.update(version=2)),
        "manifest.json' is newer: it has version 2, this moeproof reads up to 1",
    ),
    "empty manifest": (lambda f: _manifest(f, lambda c: c.update(files={})), "lists no file|is foreign"),
    "entry lacks a key": (_entry("sha256", None), "the entry of '{file}' lacks 'sha256'"),
    "entry has a wrong type": (_entry("bytes", "many"), "the entry of '{file}' has a 'bytes' that is no int"),
    "entry has a stranger": (_entry("colour", "red"), "the entry of '{file}' has unknown keys: colour"),
    "entry has no hash": (_entry("inputs", "abc"), "has 'abc', which is no SHA-256"),
    "entry has a bad case": (_entry("case", "T=5,H=banana"), "case line that is refused: .*"),
    "tensor hash": (_entry("tensors", {"gate_up.value": "0" * 64}), "{file}' does not hold the tensors"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name_and_nothing_is_touched(folder: Path, kind: str) -> None:
    spoil, message = DAMAGE[kind]
    spoil(folder)
    before = _bytes(folder) if folder.exists() else {}

    with pytest.raises(ContractError, match=message.replace("{file}", _file(folder).name)):
        golden.check(folder, [RIGHT])
    assert (_bytes(folder) if folder.exists() else {}) == before


def test_a_path_out_of_the_folder_is_refused(folder: Path) -> None:
    _manifest(folder, lambda c: c["files"].update({"../x.safetensors": {}}))  # type: ignore[attr-defined]

    with pytest.raises(ContractError, match=r"is not a plain \.safetensors file name"):
        golden.check(folder)


# recording


def test_the_record_command_names_the_file_of_each_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main_record([parse_case(PLAIN)], tmp_path / "new", force=False, json=True) == 0

    first, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (tmp_path / "new" / first["file"]).is_file()
    assert last == {"cases": 1}


def test_record_refuses_to_lose_a_difference(folder: Path) -> None:
    _with_last_bit(folder, EXACT, "y.value")
    before = _bytes(folder)

    with pytest.raises(ContractError, match=r"holds other values of y\.value; nothing was written, --force overwrites"):
        golden.record([parse_case(EXACT), parse_case(f"{PLAIN[:-1]}9")], folder)
    assert _bytes(folder) == before

    golden.record([parse_case(EXACT)], folder, force=True)
    assert {v.outcome for v in golden.check(folder)} == {Outcome.PASS}


def test_force_makes_the_last_bits_this_machines_own(folder: Path) -> None:
    _with_last_bit(folder, PLAIN, "y.value")
    before = _bytes(folder)

    golden.record([parse_case(PLAIN)], folder)
    assert _bytes(folder) == before

    golden.record([parse_case(PLAIN)], folder, force=True)
    assert {v.reason for v in golden.check(folder)} == {""}


def test_record_keeps_a_damaged_file_unless_asked(folder: Path) -> None:
    _flip_a_bit(folder)

    with pytest.raises(ContractError, match="is not the file that the manifest describes"):
        golden.record([parse_case(PLAIN)], folder)
    golden.record([parse_case(PLAIN)], folder, force=True)
    assert {v.outcome for v in golden.check(folder)} == {Outcome.PASS}


def test_record_brings_a_lost_file_back_and_keeps_the_others(folder: Path) -> None:
    before = _bytes(folder)
    _file(folder).unlink()
    golden.record([parse_case(PLAIN)], folder)
    after = _bytes(folder)

    assert {k: v for k, v in after.items() if k != "manifest.json"} == {k: v for k, v in before.items() if k != "manifest.json"}
    assert len(golden.check(folder)) == 2


def test_an_interrupted_write_leaves_no_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    before = _bytes(folder)
    monkeypatch.setattr(golden_file, "save_file", full)

    with pytest.raises(OSError, match="no space left"):
        golden.record([parse_case(f"{PLAIN[:-1]}9")], folder)
    assert _bytes(folder) == before


def test_the_command_prints_and_exits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main_check(folder, [RIGHT], json=True) == 0
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(lines[-1])

    assert len(lines) == 5
    assert (summary["pass"], summary["fail"], summary["cases"]) == (4, 0, 2)
    assert golden.main_check(folder, [Candidate("wrong", _transposed_experts)], json=False) == 1
    assert "wrong: 2 FAIL" in capsys.readouterr().out
