"""Modules import downwards only and in no circle; folders and files stay of a readable size."""

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "memaop_triton"
# From the bottom up. A room imports from those below it and from itself.
ORDER = [
    ("kernels.env", "kernels.targets"),
    ("kernels.tuning",),
    ("kernels.gpu", "kernels.cpu"),
    ("config", "flops", "selection", "reference", "dispatch", "errors", "units"),
    ("memory",),
    ("backward",),
    ("nn",),
    ("monitor", "plan", "distributed"),
    ("convert",),
    ("__init__",),
    ("experiments",),
    ("bench",),
    ("commands",),
    ("__main__",),
]
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# Rooms of one level that know nothing of each other; those of the ground are one room.
APART = {"kernels.gpu", "kernels.cpu", "monitor", "plan", "distributed"}
# (importing module, imported module): why this one import goes upwards.
ALLOWED_UPWARDS = {
    ("bench.studies.quality.commands", "commands.common"): "its own command line, never installed",
}
# File: why it may be longer than `MAX_LINES`.
ALLOWED_LENGTH: dict[str, str] = {}
MAX_LINES = 400


class Import(NamedTuple):
    """One import statement.

    Attributes:
        source: The importing module.
        target: The imported module, or the package where `from package import name` names no file.
        line: Where it stands in `source`.
        is_lazy: Within a function, so that it does not run when `source` is imported.
    """

    source: str
    target: str
    line: int
    is_lazy: bool


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


def all_imports(modules):
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in modules.items()}
    return [found for name, tree in trees.items() for found in imports_of(name, tree, modules)]


def room(module):
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "kernels" else parts[0]


def goes_upwards(edge):
    source, target = room(edge.source), room(edge.target)
    if source == target:
        return False
    level, other = LEVELS[source], LEVELS[target]
    return other > level or (other == level and source in APART)


def find_circle(edges):
    """Modules that import each other in a circle, the first one again at the end; or nothing."""
    below = {}
    for edge in edges:
        below.setdefault(edge.source, []).append(edge.target)
    done = set()

    def descend(module, path):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in below.get(module, []):
            if circle := descend(target, [*path, module]):
                return circle
        done.add(module)
        return []

    circles = (descend(module, []) for module in list(below))
    return next(filter(None, circles), [])


@pytest.fixture(scope="module")
def edges():
    return all_imports(files())


def test_rooms_import_downwards(edges):
    upwards = [edge for edge in edges if goes_upwards(edge)]
    bad = [edge for edge in upwards if edge[:2] not in ALLOWED_UPWARDS]
    lines = [f"{e.source}, line {e.line}, imports {e.target} from a room above it" for e in bad]
    assert not lines, "\n".join(lines)
    assert {edge[:2] for edge in upwards} == set(ALLOWED_UPWARDS), "an exception is not needed"


def test_no_modules_import_each_other_in_a_circle(edges):
    circle = find_circle(edge for edge in edges if not edge.is_lazy)
    assert not circle, "a circle of imports: " + " -> ".join(circle)


def test_every_room_has_its_place():
    assert {room(module) for module in files()} - {"kernels"} == set(LEVELS)


# What the checks above see: each source makes them fail.
@pytest.mark.parametrize(
    "statement",
    [
        "from memaop_triton.nn.linear import MemAOPLinear",
        "from memaop_triton.nn import linear",
        "import memaop_triton.nn.linear",
        "if TYPE_CHECKING:\n    from memaop_triton.nn.linear import MemAOPLinear",
        "def f():\n    from memaop_triton.nn import linear",
        "class A:\n    def f(self):\n        import memaop_triton.nn.linear as linear",
    ],
)
def test_an_import_from_above_is_seen(statement):
    modules = files()
    (found,) = imports_of("memory.basis", ast.parse(statement), modules)
    assert found.target == "nn.linear"
    assert found.is_lazy == ("def" in statement)
    assert goes_upwards(found)
    assert not goes_upwards(found._replace(source="nn.state"))
    assert not goes_upwards(found._replace(source="convert"))


def test_a_circle_is_named_as_it_runs():
    pairs = ["ab", "bc", "xa", "cd", "db"]
    chain = [Import(source, target, 1, False) for source, target in pairs]
    assert find_circle(chain) == ["b", "c", "d", "b"]
    assert find_circle(chain[:-1]) == []


@pytest.mark.parametrize(("folder", "most"), [(PACKAGE, 20), ("kernels", 6)])
def test_a_package_has_few_entries_at_its_top(folder, most):
    entries = [e.name for e in (ROOT / folder).iterdir() if e.name != "__pycache__"]
    assert len(entries) <= most, sorted(entries)


def test_no_file_is_long():
    folders = [ROOT / name for name in (PACKAGE, "kernels", "bench", "tests")]
    counts = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for folder in folders
        for path in folder.rglob("*.py")
    }
    assert len(counts) > 200
    long = {name: lines for name, lines in counts.items() if lines > MAX_LINES}
    assert not long.keys() - ALLOWED_LENGTH.keys(), long
    assert not ALLOWED_LENGTH.keys() - long.keys(), "an exception is not needed"
