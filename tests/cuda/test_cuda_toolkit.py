"""Building and loading: what is cached, what makes a new library, and what a user is told when something is missing."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moeproof.optimized.cuda import build, library, toolkit
from moeproof.reference.contract import ContractError

FAKE = """#!{python}
import pathlib, sys
with open({log!r}, "a") as log:
    log.write("called\\n")
if {error!r}:
    print({error!r}, file=sys.stderr)
    sys.exit(1)
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text("library")
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a toolkit, its cache in tmp_path/cache, and a copy of the sources in tmp_path/sources."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    real = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, path=None: real(name, path=path) if path and str(tmp_path) in path else None
    )
    monkeypatch.setenv(toolkit.CACHE, str(tmp_path / "cache"))
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in (*toolkit.SOURCES.glob("*.cu"), *toolkit.SOURCES.glob("*.cuh")):
        shutil.copy(path, sources)
    monkeypatch.setattr(toolkit, "SOURCES", sources)
    return tmp_path


def install(machine: Path, monkeypatch: pytest.MonkeyPatch, error: str = "") -> Path:
    """A compiler in tmp_path/cuda that logs its calls to the file returned."""
    log, compiler = machine / "log", machine / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(FAKE.format(python=sys.executable, log=str(log), error=error))
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(machine / "cuda"))
    return log


def test_without_a_toolkit_the_mend_is_named(machine: Path) -> None:
    with pytest.raises(ContractError, match=r"install nvcc .* or set CUDA_HOME"):
        toolkit.build("combine", "sm_90a")

    assert toolkit.missing("sm_90a") == toolkit.NO_TOOLKIT


def test_built_once_and_found_again(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(machine, monkeypatch)
    path = toolkit.build("combine", "sm_90a")
    monkeypatch.delenv("CUDA_HOME")  # what is in the cache needs no compiler

    assert toolkit.build("combine", "sm_90a") == path
    assert path.parent == machine / "cache"
    assert log.read_text() == "called\n"
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half made stays


def test_prebuilt_stages_need_no_toolkit(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(machine, monkeypatch)
    assert len(build.build_all(["sm_80"])) == len(toolkit.STAGES)
    monkeypatch.delenv("CUDA_HOME")

    assert toolkit.missing("sm_80") is None
    assert toolkit.missing("sm_90a") == toolkit.NO_TOOLKIT


def test_a_package_takes_its_libraries_along(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No toolkit and no cache are needed where they lie beside the sources, and those of other sources are not taken."""
    install(machine, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["build", "--arch", "sm_80", "--package"])
    assert build.main() == 0
    monkeypatch.delenv("CUDA_HOME")

    assert toolkit.missing("sm_80") is None
    assert toolkit.build("combine", "sm_80").parent == toolkit.SOURCES / toolkit.PREBUILT
    assert not (machine / "cache").exists()
    with (toolkit.SOURCES / "combine.cu").open("a") as file:
        file.write("// changed\n")
    assert toolkit.missing("sm_80") == toolkit.NO_TOOLKIT


def test_nvcc_of_a_wheel_is_found(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(machine, monkeypatch)
    monkeypatch.delenv("CUDA_HOME")
    (machine / "nvidia" / "cu13").mkdir(parents=True)
    (machine / "cuda" / "bin").rename(machine / "nvidia" / "cu13" / "bin")
    spec = SimpleNamespace(submodule_search_locations=[str(machine / "nvidia")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    assert toolkit.nvcc() == str(machine / "nvidia" / "cu13" / "bin" / "nvcc")


def test_every_ingredient_makes_another_library(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [toolkit.library_name("combine", "sm_90a"), toolkit.library_name("combine", "sm_80")]
    paths.append(toolkit.library_name("align", "sm_90a"))
    for name in ("combine.cu", "slots.cuh"):
        with (toolkit.SOURCES / name).open("a") as file:
            file.write("// changed\n")
        paths.append(toolkit.library_name("combine", "sm_90a"))
    unrelated = toolkit.library_name("align", "sm_90a")
    with (toolkit.SOURCES / "combine.cu").open("a") as file:
        file.write("// changed\n")
    assert toolkit.library_name("align", "sm_90a") == unrelated
    monkeypatch.setattr(toolkit, "FLAGS", (*toolkit.FLAGS, "-G"))
    paths.append(toolkit.library_name("combine", "sm_90a"))

    assert len(set(paths)) == len(paths)


def test_a_failed_compilation_is_one_line_and_leaves_nothing(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(machine, monkeypatch, error="combine.cu(3): error: expected a ;")
    with pytest.raises(ContractError, match=r"cannot compile combine.cu for sm_90a: combine.cu\(3\): error: expected a ;"):
        toolkit.build("combine", "sm_90a")

    assert list((machine / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(machine, monkeypatch)
    (machine / "cache").write_text("a file where the folder should be")
    with pytest.raises(ContractError, match=f"cannot be written .*; set {toolkit.CACHE}"):
        toolkit.build("combine", "sm_90a")


def test_a_damaged_library_is_named(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(machine, monkeypatch)
    with pytest.raises(ContractError, match=r"combine-sm_90a-.*cannot be loaded .*; delete it"):
        library._load(toolkit.SOURCES, "combine", "sm_90a")


def test_unknown_stage() -> None:
    with pytest.raises(ContractError, match="CUDA stage 'gemm' is not known; allowed: router, align"):
        toolkit.key("gemm", "sm_90a")


def test_build_command(machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["build", "--arch", "sm_80", "sm_90a"])
    assert build.main() == 2
    assert "no CUDA toolkit was found" in capsys.readouterr().err
    install(machine, monkeypatch)
    assert build.main() == 0
    made = capsys.readouterr().out.split()

    assert len(made) == 2 * len(toolkit.STAGES)
    assert all(Path(path).is_file() for path in made)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to build for")
def test_build_command_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["build"])

    assert build.main() == 2
    assert "name architectures" in capsys.readouterr().err


def test_signatures_are_read_from_the_sources() -> None:
    found = {name: kinds for stage in toolkit.STAGES for name, kinds in library.signatures(toolkit.SOURCES, stage).items()}
    combine = found["moeproof_combine"]

    assert set(found) == {
        "moeproof_route",
        "moeproof_align",
        "moeproof_align_chunk",
        "moeproof_move",
        "moeproof_clear",
        "moeproof_rows",
        "moeproof_ends",
        "moeproof_activate",
        "moeproof_combine",
        "moeproof_quantise",
    }
    assert list(combine)[:4] == ["dtype", "y", "weights", "rows"]
    assert list(combine)[-3:] == ["num_local", "K", "stream"]  # the slots' parameters are spelled out
    expected = {
        "y": ctypes.c_void_p,
        "stride_ys": ctypes.c_longlong,
        "H": ctypes.c_int,
        "scale": ctypes.c_float,
        "K": ctypes.c_uint,
    }
    assert {name: combine[name] for name in expected} == expected


def test_a_call_must_name_every_parameter() -> None:
    function = library._Function(lambda *values: 0, ("a", "b"), lambda code: b"")

    assert library._run(function, {"a": 1, "b": 2}) == 0
    with pytest.raises(AssertionError, match=r"\['b', 'c'\]: missing or unknown"):
        library._run(function, {"a": 1, "c": 2})
