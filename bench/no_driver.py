"""A CUDA driver that does nothing, so that Triton's host code runs without a GPU.

Triton compiles its own launcher against `libcuda`. Given one whose functions return at once, it
compiles kernels for a GPU, "loads" them and goes through all that a launch takes on the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.nvidia import driver as nvidia

from memaop_triton import dispatch
from memaop_triton.backward import steps_triton
from memaop_triton.kernels import targets
from memaop_triton.kernels.draws import seed_of_state
from memaop_triton.memory import choice

# Every value asked for is 1, every handle too; a limit is large. 0 is success.
_LIBRARY = """
#define NOTHING(name) int name(void *a, void *b, void *c, void *d) { return 0; }
#define ONE(name) int name(void **a, void *b, void *c, void *d) { *a = (void *)1; return 0; }
NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig) NOTHING(cuGetErrorString) NOTHING(cuTensorMapEncodeTiled)
NOTHING(cuTensorMapEncodeIm2col) NOTHING(cuLaunchKernelEx) NOTHING(cuDevicePrimaryCtxRelease)
ONE(cuCtxGetCurrent) ONE(cuCtxGetLimit) ONE(cuDevicePrimaryCtxRetain) ONE(cuModuleGetFunction)
ONE(cuModuleLoadData)
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = 1 << 20; return 0; }
int cuFuncGetAttribute(int *value, int which, void *function) { *value = 1024; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { return 0; }
int cuPointerGetAttribute(void **value, int which, void *pointer) { *value = pointer; return 0; }
"""


class _Generator:
    """The state of a GPU's generator."""

    def __init__(self) -> None:
        self._offset = 0

    def initial_seed(self) -> int:
        return 0

    def get_offset(self) -> int:
        return self._offset

    def set_offset(self, offset: int) -> None:
        self._offset = offset


class _Driver(nvidia.CudaDriver):  # type: ignore[misc]
    """One GPU of compute capability 9.0 whose default stream is current."""

    def __init__(self) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_device_capability = lambda device: (9, 0)
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None


@contextlib.contextmanager
def active(target: str = "sm_90") -> Iterator[None]:
    """Within it, Triton kernels are launched on tensors of the CPU, and nothing computes.

    Raises:
        FileNotFoundError: There is no C compiler `cc`.
        subprocess.CalledProcessError: It fails.
    """
    with TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        source = Path(folder, "cuda.c")
        source.write_text(_LIBRARY)
        library = Path(folder, "libcuda.so.1")
        flags = ["-shared", "-fPIC", "-O2", "-w", f"-Wl,-soname,{library.name}"]
        subprocess.run(["cc", *flags, "-o", library, source], check=True)
        # The launcher opens the driver by its name: the loaded one is found.
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        settings: Any = triton.knobs.nvidia
        generator = _Generator()

        # Functions, for a Mock takes longer than what is measured.
        def find(device: torch.device) -> targets.Target:
            return targets.TARGETS[target]

        def no_obstacle(*_: Any) -> str:
            return ""

        def draw_seed(*_: Any) -> int:
            return seed_of_state(generator)

        arrived = choice.Arriving.get

        def finite(arriving: choice.Arriving) -> torch.Tensor:
            return torch.ones_like(arrived(arriving))

        for patch in (
            mock.patch.object(choice.Arriving, "get", finite),
            mock.patch.object(settings, "libcuda_path", folder),
            mock.patch.dict("os.environ", {"MEMAOP_TRITON_BACKEND": "triton"}),
            mock.patch.object(targets, "find", find),
            mock.patch.object(dispatch, "_obstacle", no_obstacle),
            mock.patch.object(dispatch, "draw_seed", draw_seed),
            mock.patch.object(steps_triton, "draw_seed", draw_seed),
        ):
            stack.enter_context(patch)
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(_Driver())
        try:
            yield
        finally:
            triton.runtime.driver._active = before
