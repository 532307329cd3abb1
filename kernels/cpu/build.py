"""How the C code beside this file is compiled on a machine, and where the result is kept.

The file stays in the cache folder under a name made of hashes: other sources, another compiler or
other flags make another file.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from memaop_triton.kernels.env import cache_folder

_log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "csrc"
HEADERS = tuple(_FOLDER / name for name in ("lanes.h", "passes.h", "ahead.h", "draws.h"))
#: How matrices of rows may be stored, and the flag that compiles a file for these.
KINDS = {"f32": "-DKIND_F32", "f64": "-DKIND_F64", "bf16": "-DKIND_BF16"}
_PASSES = ("rows", "positions", "projection", "transposed")
_OTHERS = ("gather_gemm", "selection", "step", "stash")
SOURCES = tuple(_FOLDER / f"{name}.c" for name in _PASSES + _OTHERS)
# Not -march=native: machines with different processors may share a cache directory.
VECTOR_FLAGS = {
    "AVX512": [
        *("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"),
        "-mprefer-vector-width=512",
    ],
    "AVX2": ["-mavx2", "-mfma"],
}
FLAGS = ["-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wno-psabi"]
# Calls between the files stay inside, also if another library has a function of the same name.
LINK_FLAGS = ["-shared", "-Wl,-Bsymbolic"]


_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "u": ctypes.c_uint64,
    "f": ctypes.c_float, "v": None,
}  # fmt: skip
_MATRIX = "pl"  # and the distance between its rows
_ROWS = f"{_MATRIX} pp ll"  # of these, and what they are made of
#: What every function returns and takes, a letter each as in `_TYPES`.
_OF_A_KIND = {
    "row_norms": ("v", f"{_MATRIX} p ll i"),
    "position_norms": ("v", "pp lll i"),
    "gather_positions": ("v", "ppp lll i"),
    "lay_out": ("v", "ppp i ll lll lll li"),
    "project_positions": ("v", "pppp f llll i"),
    "block_norms": ("v", f"{_MATRIX} l p lll i"),
    "accumulate": ("v", f"{_MATRIX} {_MATRIX} pp ll i"),
    "project": ("v", f"{_MATRIX} ppp f ll ii"),
    "product_room": ("l", "ll i"),
    "transposed_product": ("i", f"{_MATRIX} l {_ROWS} pppp ll i"),
    "panel_size": ("l", "ll i"),
    "gather_gemm": ("i", f"{_ROWS} {_ROWS} p {_MATRIX} p {_MATRIX} p pp llll ii"),
    "stash_rows": ("v", f"{_MATRIX} {_MATRIX} {_MATRIX} l ppp u ll ii"),
    "restore_rows": ("v", f"ppp {_MATRIX} {_MATRIX} l {_MATRIX} u ll ii"),
    "step_room": ("l", "llll ii"),
    "step": (
        "v",
        f"{_MATRIX} {_MATRIX} {_MATRIX} {_MATRIX} p {_MATRIX} l f iu ppp pp pp pp llll iiii",
    ),
}
SIGNATURES = {
    **{f"{name}_{kind}": types for name, types in _OF_A_KIND.items() for kind in KINDS},
    **{f"choose_{kind}": ("v", "p iu p ll pp") for kind in ("f32", "f64")},
}


class BuildError(RuntimeError):
    """Why the C code is not compiled here."""


class Recipe(NamedTuple):
    """How the C code is compiled on this machine.

    Attributes:
        compiler: The command.
        version: Its output of `--version`.
        vectors: The vector instructions it is compiled for, as PyTorch names them.
        flags: All flags.
        file: Where the result is kept.
    """

    compiler: str
    version: str
    vectors: str
    flags: list[str]
    file: Path


def find_recipe() -> Recipe:
    """How the C code would be compiled here; runs the compiler for its version.

    Raises:
        BuildError: It cannot be compiled on this machine.
    """
    # The parallel loops use PyTorch's own OpenMP runtime and its threads: the file is not linked
    # against another one.
    if sys.platform != "linux":
        raise BuildError(f"not done on {sys.platform}")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise BuildError("no C compiler: none of $CC, cc, gcc is there")
    vectors = torch.backends.cpu.get_cpu_capability()
    flags = FLAGS + VECTOR_FLAGS.get(vectors, [])
    version = run([*compiler.split(), "--version"])
    texts = [source.read_text() for source in (*HEADERS, *SOURCES)]
    functions = repr((KINDS, SIGNATURES))
    made_from = "\0".join([*texts, version, platform.machine(), *flags, *LINK_FLAGS, functions])
    name = f"rows-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    return Recipe(compiler, version, vectors, flags, cache_folder("native") / name)


def load() -> ctypes.CDLL:
    """The compiled code, from the cache folder or newly compiled.

    Raises:
        BuildError: It cannot be compiled on this machine.
        OSError: It cannot be loaded.
    """
    recipe = find_recipe()
    cached = recipe.file
    try:
        return _open(cached)
    except OSError as error:
        _log.info("compiling the row passes: %s", error)
    with tempfile.TemporaryDirectory() as folder:
        compiled = _compile(recipe.compiler, recipe.flags, Path(folder))
        try:
            _put(compiled, cached)
            return _open(cached)
        except OSError as error:
            _log.info("compiled row passes are not kept in %s: %s", cached.parent, error)
        return _open(compiled)


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype = _TYPES[result]
        function.argtypes = [_TYPES[one] for one in arguments.replace(" ", "")]
    return library


def _compile(compiler: str, flags: list[str], folder: Path) -> Path:
    def made_of(source: Path, kind: str) -> Path:
        made = folder / f"{source.stem}_{kind}.o"
        run([*compiler.split(), *flags, KINDS[kind], "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(made_of, *zip(*itertools.product(SOURCES, KINDS), strict=True)))
    linked = folder / "rows.so"
    run([*compiler.split(), *LINK_FLAGS, *map(str, objects), "-o", str(linked), "-lm"])
    return linked


def _put(source: Path, target: Path) -> None:
    """Copy to `target` in one step, so that a process beside this one never loads half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = shutil.copy(source, folder)
        os.replace(part, target)


def run(command: list[str]) -> str:
    """The output of a command.

    Raises:
        BuildError: It fails or is not there.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{command[0]} failed: {error.stderr.strip()[-500:]}") from error
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    return done.stdout
