"""A machine's name, versions and measured rates, with which the other numbers are compared."""

from __future__ import annotations

import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import memaop_triton
from memaop_triton.bench.measure import clock_for
from memaop_triton.kernels.cpu import torch_ops
from memaop_triton.kernels.cpu.processor import blas, caches, processor_name, usable_cores

_ROUNDS = 7


def describe(
    device: torch.device, *, dtypes: Sequence[torch.dtype], size: int, stream_bytes: int
) -> dict[str, Any]:
    """Name, versions and measured rates, for `extra_info`.

    Args:
        device: Whose.
        dtypes: Of the GEMMs.
        size: M, N and P of the GEMM Gᵀ X that is timed.
        stream_bytes: Of the matrix that is streamed; more than the caches hold.

    Returns:
        `kind` "machine", `name`, `device`, `threads`, `cores`, `gemm_gflops` by dtype, `stream_gbs`
        (reading), `triad_gbs` (y ← y + x, bytes read and written), `caches`, `versions`, `clocks`,
        `load_before`. Rates are medians.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    on_gpu = device.type == "cuda"
    properties: Any = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "kind": "machine",
        "name": properties.name if on_gpu else processor_name(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "cores": properties.multi_processor_count if on_gpu else usable_cores(),
        "gemm_gflops": {
            str(dtype).removeprefix("torch."): gemm_gflops(device, dtype, size) for dtype in dtypes
        },
        "stream_gbs": stream_gbs(device, stream_bytes),
        "triad_gbs": triad_gbs(device, stream_bytes),
        "caches": {"L2": f"{properties.L2_cache_size >> 10}K"} if on_gpu else caches(),
        "versions": versions(),
        "clocks": gpu_clocks() if on_gpu else cpu_clocks(),
        "load_before": load,
    }


def here() -> tuple[str, int]:
    """What times of a CPU belong to: its name with its vector instructions, and the threads.

    Names alone do not tell: virtual machines call generations of processors by one.
    """
    name = f"{processor_name()} {torch.backends.cpu.get_cpu_capability()}"
    return name, torch.get_num_threads()


def gemm_gflops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Rate of Gᵀ X with M = N = P = `size`, in 10⁹ operations a second."""
    x, g = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2e-9 * size**3 / _median_seconds(device, lambda: g.t() @ x)


def stream_gbs(device: torch.device, nbytes: int) -> float:
    """Rate of reading memory, in 10⁹ bytes a second: the best of three ways to reduce a matrix."""
    a = torch.ones(max(1, nbytes // 4096), 1024, device=device)
    flat = a.flatten()
    ways: tuple[Callable[[], object], ...] = (
        a.sum,
        lambda: torch.dot(flat, flat),
        lambda: (
            torch_ops.row_norms(a) if a.device.type == "cpu" else torch.linalg.vector_norm(a, dim=1)
        ),
    )
    return 1e-9 * a.nbytes / min(_median_seconds(device, way) for way in ways)


def triad_gbs(device: torch.device, nbytes: int) -> float:
    """Rate of y ← y + x, which reads two numbers and writes one, in 10⁹ bytes a second."""
    x, y = (torch.ones(max(1, nbytes // 8), device=device) for _ in range(2))
    return 3e-9 * x.nbytes / _median_seconds(device, lambda: y.add_(x))


def cpu_clocks() -> str | None:
    """Present clocks of the cores in MHz, where Linux reports them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    clocks = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*(.+)$", text, re.M)]
    return f"{min(clocks):.0f} to {max(clocks):.0f} MHz" if clocks else None


def gpu_clocks() -> str | None:
    """Clocks of the first GPU at this moment and at most, as `nvidia-smi` has them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    fields = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    done = subprocess.run(
        [program, f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return None
    now, memory, most, most_memory, power = (part.strip() for part in done.stdout.split(","))
    return f"{now} (memory {memory}), at most {most} (memory {most_memory}), limit {power}"


def versions() -> dict[str, str | None]:
    """Of this package and of what computes beneath it."""
    try:
        import triton
    except ModuleNotFoundError:
        triton_version = None
    else:
        triton_version = triton.__version__
    gpu = torch.version.hip or torch.version.cuda
    return {
        "memaop_triton": memaop_triton.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "blas": f"{blas()}, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": f"{'ROCm' if torch.version.hip else 'CUDA'} {gpu}" if gpu else None,
    }


def _median_seconds(device: torch.device, call: Callable[[], object]) -> float:
    clock = clock_for(device)
    clock.seconds(call, 2)
    return statistics.median(clock.seconds(call, 1) for _ in range(_ROUNDS))


def folder_name(name: str) -> str:
    """A machine's name as a folder's: "NVIDIA H100 80GB HBM3" becomes "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    print(folder_name(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"))
