"""Results files: whole or not at all, with what made them, and without the folders of a machine."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from moeproof.harness.reports import results

STORED = Path(__file__).parents[2] / "docs" / "results"


def test_the_origin_names_command_device_versions_and_date() -> None:
    origin = results.origin("cpu")

    assert list(origin) == ["command", "device", "versions", "date"]
    assert re.fullmatch(r"cpu, \d+ cores", str(origin["device"]))
    assert {"python", "torch"} <= set(origin["versions"])  # type: ignore[call-overload]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(origin["date"]))


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["/somewhere/bin/moeproof", "bench", "--output", "kept/bench.json"], "moeproof bench --output bench.json"),
        (
            ["moeproof", "tune", "/a/b/kernels.py:moe", "--trace=/a/b/trace.json"],
            "moeproof tune kernels.py:moe --trace=trace.json",
        ),
        (["/a/b/moeproof/__main__.py", "doctor"], "moeproof doctor"),
        (["moeproof", "ratios", "mine/k.py:moe"], "moeproof ratios mine/k.py:moe"),
        (["moeproof", "replay", "T=1,router=softmax:groups=4/2"], "moeproof replay T=1,router=softmax:groups=4/2"),
    ],
)
def test_a_command_keeps_all_but_folders_of_this_machine(words: list[str], shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", words)

    assert results.origin("cpu", Path("kept/bench.json"))["command"] == shown


def test_a_file_is_written_whole_with_folders_made_and_none_named(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    words = f"{Path.cwd()}/harness/judging/judge.py and {tmp_path}/kernels.py"

    results.write(path, {"rows": [1], "words": words})

    found = json.loads(path.read_text())
    assert found["rows"] == [1]
    assert found["words"].startswith("harness/judging/judge.py and ") and " /" not in found["words"]
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_record_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    results.write(path, {"rows": []})

    with pytest.raises(TypeError):
        results.write(path, {"rows": object()})

    assert json.loads(path.read_text()) == {"rows": []}


@pytest.mark.parametrize("path", sorted(STORED.glob("*.json")), ids=lambda p: p.name)
def test_no_stored_result_names_a_folder_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    assert not re.findall(r"[\s\"'=](/[\w.-]+/[\w./-]+)", text)
