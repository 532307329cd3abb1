"""Modules import downwards only and in no circle; folders and files stay of a readable size."""

import ast
import graphlib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "memaop_triton"
# From the bottom up. A room imports from those below it and from itself.
ORDER = [
    ("kernels.env", "kernels.targets", "kernels.draws"),
    ("kernels.tuning",),
    ("kernels.gpu", "kernels.cpu"),
    ("config", "flops", "sampling", "reference", "dispatch", "errors"),
    ("memory",),
    ("backward",),
    ("nn",),
    ("monitor", "distributed"),
    ("auto",),
    ("plan",),
    ("convert",),
    ("__init__",),
    ("experiments", "integrations"),
    ("bench",),
    ("commands",),
    ("__main__",),
]
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# Rooms of one level that know nothing of each other; those of the ground are one room.
APART = {"kernels.gpu", "kernels.cpu", "monitor", "distributed", "experiments", "integrations"}
# (importing module, imported module): why this one import goes upwards.
ALLOWED_UPWARDS = {
    ("bench.studies.quality.commands", "commands.common"): "its own command line, never installed",
}
MAX_LINES = 400


class Import(NamedTuple):
    """One import statement; a lazy one is within a function, so that it does not run on import.

    `target` is the imported module, or the package where `from package import name` names no file.
    """

    source: str
    target: str
    line: int
    is_lazy: bool

    def goes_upwards(self):
        source, target = room(self.source), room(self.target)
        level, other = LEVELS[source], LEVELS[target]
        return source != target and (other > level or (other == level and source in APART))


def module_name(path):
    """Name without the package's, "memory.basis", "memory" for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == PACKAGE else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def files():
    """Every module of the package by its name without the package's."""
    folders = (ROOT / name for name in (PACKAGE, "kernels", "bench"))
    return {module_name(path): path for folder in folders for path in folder.rglob("*.py")}


def imports_of(source, tree, modules):
    """Imports of the package's own modules: at the top, under TYPE_CHECKING, within functions."""

    def known(name):
        name = name.removeprefix(PACKAGE).lstrip(".")
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name or "__init__"

    def visit(node, is_lazy):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert node.level == 0, f"{source} line {node.lineno}: a relative import"
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = []
        # In a checkout the benchmarks also go by the name of their folder.
        own = [n for n in names if n.split(".")[0] in (PACKAGE, "bench")]
        for target in dict.fromkeys(map(known, own)):
            yield Import(source, target, node.lineno, is_lazy)
        lazy = is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    return list(visit(tree, False))


def room(module):
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "kernels" else parts[0]


@pytest.fixture(scope="module")
def edges():
    modules = files()
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in modules.items()}
    return [found for name, tree in trees.items() for found in imports_of(name, tree, modules)]


def test_rooms_import_downwards(edges):
    upwards = [edge for edge in edges if edge.goes_upwards()]
    bad = [edge for edge in upwards if edge[:2] not in ALLOWED_UPWARDS]
    lines = [f"{e.source}, line {e.line}, imports {e.target} from a room above it" for e in bad]
    assert not lines, "\n".join(lines)
    assert {edge[:2] for edge in upwards} == set(ALLOWED_UPWARDS), "an exception is not needed"


def test_no_modules_import_each_other_in_a_circle(edges):
    below = {}
    for edge in edges:
        if not edge.is_lazy:
            below.setdefault(edge.source, set()).add(edge.target)
    graphlib.TopologicalSorter(below).prepare()  # raises CycleError, which names the circle


def test_every_room_has_its_place():
    assert {room(module) for module in files()} - {"kernels"} == set(LEVELS)


@pytest.mark.parametrize(("folder", "most"), [(PACKAGE, 20), ("kernels", 6)])
def test_a_package_has_few_entries_at_its_top(folder, most):
    entries = [e.name for e in (ROOT / folder).iterdir() if e.name != "__pycache__"]
    assert len(entries) <= most, sorted(entries)


def test_no_file_is_long():
    folders = [ROOT / name for name in (PACKAGE, "kernels", "bench", "tests")]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(paths) > 200
    counts = {str(path): len(path.read_text("utf-8").splitlines()) for path in paths}
    assert {name: lines for name, lines in counts.items() if lines > MAX_LINES} == {}
