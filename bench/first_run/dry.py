"""What stands for a GPU in a dry run: the interpreter, a made-up device, and the wall clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch

GPU_NAME = "interpreter"


@contextlib.contextmanager
def interpreter(is_dry: bool) -> Iterator[None]:
    """In a dry run kernels are interpreted, as on a GPU that copies tiles by descriptor.

    Also where Triton 3.6 meets NumPy 2.4 or newer, whose interpreter by itself raises "only
    0-dimensional arrays can be converted".
    """
    if not is_dry:
        yield
        return
    from memaop_triton.kernels import targets
    from tests.traffic import interpreted

    torch.set_num_threads(1)
    before = targets.current
    targets.current = lambda device: targets.TARGETS["sm_90"]
    try:
        with interpreted():
            yield
    finally:
        targets.current = before


@contextlib.contextmanager
def made_up_gpu(is_dry: bool) -> Iterator[None]:
    """In a dry run the CPU counts as a GPU that can be tuned, by the wall clock."""
    if not is_dry:
        yield
        return
    from memaop_triton.kernels.tuning import cache, tuner

    def time_candidate(call: Callable[[], object], device: torch.device) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    made_up = cache.Gpu(GPU_NAME, "sm_80", 1)
    with (
        mock.patch.object(cache, "gpu_of", return_value=made_up),
        mock.patch.object(tuner, "time_candidate", time_candidate),
    ):
        yield
