"""`env`: what this machine is, and which implementation works on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import typer

from memaop_triton import dispatch
from memaop_triton.commands.common import JsonPath, write_json
from memaop_triton.kernels import targets
from memaop_triton.kernels.cpu import build, library, processor
from memaop_triton.kernels.env import allows_tf32, cache_folder
from memaop_triton.monitor.units import human_bytes

#: Facts by name, in sections by title.
Report = dict[str, dict[str, str]]

_PATH_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
#: What each environment variable does, and when it is read.
VARIABLES = {
    "MEMAOP_TRITON_BACKEND": "torch or triton: which implementation, in every backward pass",
    "MEMAOP_TRITON_AUTOTUNE": "off, first-use or force: on a GPU, when a kernel is first launched",
    "MEMAOP_TRITON_CACHE_DIR": "folder of compiled C code and tuned configurations, on first use",
    "MEMAOP_TRITON_DATA_DIR": "data sets of the commands demo and reproduce",
    "XDG_CACHE_HOME": "on Linux, where that folder is if MEMAOP_TRITON_CACHE_DIR is not set",
    "TRITON_INTERPRET": "1: Triton kernels in its interpreter, if set before Triton is imported",
    "CC": "the compiler of the C code, on first use",
    "WORLD_SIZE": "above 1: a distributed run, in which no kernel is tuned",
    "OMP_NUM_THREADS": "threads on a CPU, if set before PyTorch is imported",
}
_DTYPES_OF_ROWS = ", ".join(str(dtype).removeprefix("torch.") for dtype in library.DTYPES)
# The flags of /proc/cpuinfo by which the row passes and PyTorch's GEMMs choose their code.
_VECTOR_FLAGS = (
    *("sse4_2", "avx", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve", "sve2", "bf16"),
)


def env(json_path: JsonPath = None) -> None:
    """What this machine is, which implementation runs on it, and why: for a bug report."""
    report = describe()
    typer.echo(as_text(report))
    if json_path is not None:
        write_json(json_path, report)
        typer.echo(f"wrote {json_path}")


def as_text(report: Report) -> str:
    """One fact a line, below the titles of the sections."""
    lines = []
    for title, facts in report.items():
        lines.append(f"{title}:")
        width = max(map(len, facts), default=0)
        lines += [f"  {name:{width}}  {fact}" for name, fact in facts.items()]
    return "\n".join(lines)


def describe() -> Report:
    """Versions, processors, GPUs, which path runs and why, variables, cache.

    Compiles the C code if that has not been done on this machine. The home directory is written as
    ~; of the environment only what `VARIABLES` lists and what starts with MEMAOP_TRITON_ is shown.
    """
    report = {
        "versions": dict(_versions()),
        "PyTorch": dict(_pytorch()),
        "CPU": dict(_cpu()),
        "GPU": dict(_gpus()),
        "row passes in C": dict(_row_passes()),
        "what works on": dict(_paths()),
        "variables": dict(_variables()),
        "cache": dict(_cache()),
    }
    return {
        title: {name: without_home(fact) for name, fact in facts.items()}
        for title, facts in report.items()
    }


def without_home(text: str) -> str:
    """`text` with every occurrence of the home directory as ~."""
    home = os.path.expanduser("~").rstrip("/")
    if len(home) < 2:
        return text
    return re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w.-])", "~", text)


def _versions() -> Iterator[tuple[str, str]]:
    from memaop_triton import __version__

    yield "memaop-triton", f"{__version__}, in {Path(__file__).parents[1]}"
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    for package in ("torch", "triton", "numpy"):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    yield "system", platform.platform()


def _pytorch() -> Iterator[tuple[str, str]]:
    yield "threads", str(torch.get_num_threads())
    yield "BLAS", processor.blas()
    yield "CPU capability", torch.backends.cpu.get_cpu_capability()
    yield "float32 products on a GPU", "tf32" if allows_tf32() else "exact"
    yield "built for", _built_for()


def _built_for() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def _cpu() -> Iterator[tuple[str, str]]:
    yield "model", processor.processor_name()
    yield "cores", f"{os.cpu_count()}, {processor.usable_cores()} of them for this process"
    sizes = (f"{name} {size}" for name, size in processor.caches().items())
    yield "caches", ", ".join(sizes) or "unknown"
    info = processor.facts()
    flags = (info.get("flags") or info.get("Features") or "").split()
    yield "instructions", " ".join(flag for flag in _VECTOR_FLAGS if flag in flags) or "unknown"


def _gpus() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        reason = "this PyTorch is built for a CPU" if _built_for() == "CPU" else "none is found"
        yield "available", f"no: {reason}"
        return
    yield "driver", _driver()
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        properties = torch.cuda.get_device_properties(number)
        target = targets.find(device)
        kernels = "no kernels for it" if target is None else f"kernels chosen for {target.name}"
        yield (
            str(device),
            f"{properties.name}, {targets.name_of(device)}, "
            f"{properties.multi_processor_count} processors, "
            f"{human_bytes(properties.total_memory)}, {kernels}",
        )


def _driver() -> str:
    nvidia = processor.read_text(Path("/proc/driver/nvidia/version"))
    amd = processor.read_text(Path("/sys/module/amdgpu/version"))
    found = re.search(r"\d+\.\d+(?:\.\d+)*", nvidia)
    return f"NVIDIA {found[0]}" if found else (f"amdgpu {amd}" if amd else "unknown")


def _row_passes() -> Iterator[tuple[str, str]]:
    try:
        recipe = build.find_recipe()
        obstacle = library.obstacle()
    except (build.BuildError, ValueError) as error:
        yield "used", f"no: {error}"
        return
    yield "used", f"no: {obstacle}" if obstacle else f"yes, for {_DTYPES_OF_ROWS} on a CPU"
    own = library.prefers_own_gemm(torch.float32) and not obstacle
    yield "gather GEMM", "compiled too" if own else "PyTorch's"
    yield "compiler", f"{recipe.compiler}: {recipe.version.splitlines()[0]}"
    yield "vectors", recipe.vectors
    yield "flags", " ".join(recipe.flags)
    kept = "kept in" if recipe.file.exists() else "not kept, compiled by every process; wanted in"
    yield "file", recipe.file.name if obstacle else f"{kept} {recipe.file}"


def _paths() -> Iterator[tuple[str, str]]:
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        for dtype in _PATH_DTYPES:
            name = f"{device} {str(dtype).removeprefix('torch.')}"
            try:
                path = dispatch.explain(torch.empty(0, 1, dtype=dtype, device=device))
                if device.type == "cpu" and dtype in library.DTYPES and library.is_compiled():
                    path = path.replace("PyTorch:", "PyTorch and C:")
            except ValueError as error:
                path = f"an error: {error}"
            yield name, path


def _variables() -> Iterator[tuple[str, str]]:
    for name, meaning in VARIABLES.items():
        value = os.environ.get(name)
        yield name, f"{'not set' if value is None else repr(value)} ({meaning})"
    unknown = {name for name in os.environ if name.startswith("MEMAOP_TRITON_")} - VARIABLES.keys()
    for name in sorted(unknown):
        yield name, f"{os.environ[name]!r} (no such variable: is it misspelt?)"


def _cache() -> Iterator[tuple[str, str]]:
    folder = cache_folder("native").parent
    yield "directory", str(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = human_bytes(sum(path.stat().st_size for path in files))
    yield "holds", f"{len(files)} files, {size}"
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    yield "can be written", "yes" if os.access(nearest, os.W_OK) else "no"
