"""Dependencies point one way (docs/design.md). Reads the sources as syntax trees: nothing is imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHELF = ("reference", "optimized", "harness")
OURS = "moeproof."
LONGEST = 500

# Who may import whom: the first row whose pattern fits a file decides. The standard library is open to all.
# Names are packages, or our own modules without the `moeproof.` in front.
ARROWS = [
    ("reference/__init__.py", ()),
    ("reference/contract/*", ("torch", "reference.contract")),
    ("reference/oracle/*", ("torch", "reference.contract", "reference.oracle")),
    ("reference/ranks/*", ("torch", "reference.contract", "reference.oracle", "reference.ranks")),
    ("reference/eager/*", ("torch", "reference.contract", "reference.eager")),
    ("optimized/*", ("torch", "triton", "reference.contract", "optimized")),
    ("harness/interpreter*.py", ("torch", "triton", "numpy", "reference", "harness")),
    ("harness/pytest_plugin.py", ("torch", "pytest", "reference", "harness")),
    ("harness/cases/strategies.py", ("torch", "hypothesis", "reference", "harness")),
    ("harness/cli.py", ("torch", "typer", "rich", "reference", "harness", "_version")),
    ("harness/reports/doctor.py", ("torch", "reference", "harness", "_version")),
    ("harness/reports/report.py", ("torch", "rich", "reference", "harness")),
    ("harness/timing/report.py", ("torch", "rich", "reference", "harness")),
    ("harness/timing/plot.py", ("matplotlib", "reference", "harness")),
    ("harness/reports/matrix.py", ("torch", "rich", "reference", "harness")),
    ("harness/dumps/golden.py", ("torch", "safetensors", "reference", "harness")),
    ("harness/dumps/golden_file.py", ("torch", "safetensors", "reference", "harness")),
    ("harness/*", ("torch", "reference", "harness")),
    ("src/moeproof/*", ("harness", "reference", "_version")),
]
BANNED = {
    "pickle": "reading a pickle runs code",
    "torch.load": "it reads pickles; safetensors does not",
    "make_block_ptr": "deprecated in Triton, and our interpreter has no bounds for it",
    "autotune": "tile sizes are chosen by shape, so that a case gives the same bits every time",
}
ONLY_IN = {"make_block_ptr": "optimized/*", "autotune": "optimized/*"}
"""Bans that hold in one folder only: elsewhere the words name what a user's kernel may do."""


@cache
def sources() -> dict[str, ast.Module]:
    """Path relative to the root -> syntax tree, for every file that ships."""
    files = [f for folder in SHELF for f in sorted((ROOT / folder).rglob("*.py"))]
    files += sorted((ROOT / "src" / "moeproof").glob("*.py"))
    return {f.relative_to(ROOT).as_posix(): ast.parse(f.read_text(encoding="utf-8"), str(f)) for f in files}


def module_of(path: str) -> str:
    """`harness/cases/case.py` -> `harness.case`; a package's __init__ is the package itself."""
    return path.removeprefix("src/moeproof/").removesuffix(".py").replace("/", ".").removesuffix(".__init__")


@cache
def modules() -> dict[str, str]:
    return {module_of(path): path for path in sources()}


def imports(node: ast.AST, path: str) -> Iterator[tuple[str, int]]:
    """(module, line) of every import below `node`, ours without the `moeproof.` in front.

    `from a import b` names a.b where that is one of our modules, and a otherwise.
    """
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            for name in found.names:
                yield name.name.removeprefix(OURS), found.lineno
        elif isinstance(found, ast.ImportFrom):
            base = found.module or ""
            if found.level:
                package = module_of(path).split(".")
                drop = found.level - path.endswith("__init__.py")
                base = ".".join([*package[: len(package) - drop], *([base] if base else [])])
            base = base.removeprefix(OURS)
            for name in found.names:
                inner = f"{base}.{name.name}" if base != "moeproof" else name.name
                yield (inner if inner in modules() else base), found.lineno


def top_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Statements that run when the module is imported: not inside functions, not under TYPE_CHECKING."""
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        stack.extend(ast.iter_child_nodes(node))


def allowed(path: str) -> tuple[str, ...]:
    return next(names for pattern, names in ARROWS if fnmatch(path, pattern))


def inside(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def broken_arrows(tree: ast.AST, path: str) -> list[str]:
    return [
        f"{path}:{line} imports {module}; the arrows from here go to: {', '.join(allowed(path)) or 'nothing'}"
        for module, line in imports(tree, path)
        if module.split(".")[0] not in sys.stdlib_module_names and not inside(module, allowed(path))
    ]


def test_every_import_follows_an_arrow() -> None:
    broken = [line for path, tree in sources().items() for line in broken_arrows(tree, path)]

    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("optimized/layer.py", "from moeproof.reference.oracle import chain"),
        ("optimized/layer.py", "from moeproof.reference import oracle"),
        ("optimized/layer.py", "import moeproof.reference.eager.slots as s"),
        ("optimized/layer.py", "from ..harness import case"),
        ("harness/judging/judge.py", "def f():\n    from moeproof.optimized.candidates import candidates"),
        ("harness/judging/judge.py", "from moeproof import optimized"),
        ("harness/judging/judge.py", "import numpy as np"),
        ("harness/reports/report.py", "import safetensors.torch"),
        ("reference/contract/problem.py", "from moeproof.reference.oracle.rounding import ulp"),
        ("reference/oracle/chain.py", "from ..eager import layer"),
        ("reference/eager/layer.py", "from moeproof.reference.oracle import route"),
    ],
)
def test_a_forbidden_line_is_seen(path: str, line: str) -> None:
    found = broken_arrows(ast.parse(line), path)

    assert len(found) == 1 and found[0].startswith(f"{path}:")


def test_the_walls_that_have_reasons_stand_in_the_table() -> None:
    """A shared bug would cancel out (optimized never sees the oracle); our kernels get no privilege (harness never sees
    them): the table above must not be loosened by mistake."""
    for pattern, names in ARROWS:
        folder = pattern.split("/")[0]
        if folder == "optimized":
            assert not {"reference", "reference.oracle", "reference.eager", "harness"} & set(names), pattern
        if folder in ("harness", "reference"):
            assert "optimized" not in names, pattern


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle, in order; empty where there is none."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for after in sorted(graph.get(node, ())):
            found = visit(after, [*trail, node])
            if found:
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        module_of(path): {m for node in top_level(tree) for m, _ in imports(node, path) if m in modules()}
        for path, tree in sources().items()
    }
    found = cycle(graph)

    assert not found, "import cycle: " + " -> ".join(modules()[m] for m in found)


def test_the_cycle_finder_finds_one() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("name", BANNED)
def test_banned_names_appear_nowhere(name: str) -> None:
    """As an import, an attribute or a bare name. Comments and docstrings may speak of them."""
    broken = []
    for path, tree in sources().items():
        if not fnmatch(path, ONLY_IN.get(name, "*")):
            continue
        for node in ast.walk(tree):
            dotted = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            last = node.attr if isinstance(node, ast.Attribute) else ""
            plain = node.id if isinstance(node, ast.Name) else ""
            if name in (dotted, last, plain):
                broken.append(f"{path}:{node.lineno} uses {name}: {BANNED[name]}")
            if isinstance(node, (ast.Import, ast.ImportFrom)) and name in [m.split(".")[0] for m, _ in imports(node, path)]:
                broken.append(f"{path}:{node.lineno} imports {name}: {BANNED[name]}")

    assert not broken, "\n" + "\n".join(broken)


def test_no_file_is_longer_than_a_reviewer_can_hold() -> None:
    own = [ROOT / "tests", *(ROOT / folder for folder in SHELF)]
    long = [
        f"{f.relative_to(ROOT)} has {lines} lines, at most {LONGEST} are allowed"
        for folder in own
        for f in sorted(folder.rglob("*.py"))
        if (lines := len(f.read_text(encoding="utf-8").splitlines())) > LONGEST
    ]

    assert not long, "\n" + "\n".join(long)
