"""Builds the wheel and fails unless every source file of every sub-package is in it, and it works where it is installed.

The packages are reached through symbolic links (src/moeproof/*), which some build tools silently leave out.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "moeproof"
SHIPPED = (".py", ".typed", ".json", ".toml", ".cu", ".cuh", ".html")
PROBE = "import moeproof, moeproof.harness.api, moeproof.reference.oracle; print(moeproof.__file__)"


def expected() -> set[str]:
    """Files that a wheel must hold, as it names them."""
    found = {path.name for path in SOURCE.glob("*.py")}
    for package in ("reference", "optimized", "harness"):
        files = (path for path in (ROOT / package).rglob("*") if path.suffix in SHIPPED and "__pycache__" not in path.parts)
        found |= {str(path.relative_to(ROOT)) for path in files}
    return {f"moeproof/{name}" for name in found}


def build(folder: Path) -> Path:
    for stale in (ROOT / "build" / "lib", ROOT / "build" / f"bdist.{sys.platform}"):
        # setuptools would copy modules that no longer exist out of it.
        shutil.rmtree(stale, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True)
    return next(folder.glob("moeproof-*.whl"))


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        wheel = build(Path(name))
        with zipfile.ZipFile(wheel) as archive:
            held = set(archive.namelist())
            archive.extractall(Path(name) / "site")
        missing = sorted(expected() - held)
        if missing:
            print(f"{wheel.name} lacks {len(missing)} of {len(expected())} files: {', '.join(missing)}", file=sys.stderr)
            return 1
        # The wheel's folder comes before the editable install's.
        code = f"import sys; sys.path.insert(0, {str(Path(name) / 'site')!r}); {PROBE}"
        came = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=name).stdout
        if not Path(came.strip()).is_relative_to(Path(name) / "site"):
            print(f"the wheel's packages were not the ones imported: {came.strip()}", file=sys.stderr)
            return 1
        print(f"{wheel.name}: {len(expected())} source files, all there; it imports")
    return 0


if __name__ == "__main__":
    sys.exit(main())
