"""The stage `tuning`: the tiles of every problem in the table of times.

What is found lies in `configs/<gpu>/<kernel>.json` of the results' folder, as the library keeps it:
copied to `kernels/configs/<gpu>/`, it ships.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from memaop_triton import MemAOPConfig, new_memory
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.bench.first_run import cases, dry, problems, records
from memaop_triton.bench.first_run.cases import Case, Place
from memaop_triton.bench.first_run.problems import Shape, Sizes
from memaop_triton.kernels.tuning import cache, tuner
from memaop_triton.kernels.tuning.config import in_words

Call = Callable[[], object]


def run(place: Place) -> int:
    """The cases of this process."""
    os.environ["MEMAOP_TRITON_CACHE_DIR"] = str(place.folder)
    with dry.made_up_gpu(place.is_dry), first_use(place):
        status = cases.run(place, all_cases(place))
    for lock in (place.folder / records.TILES).glob("*/*.lock"):
        lock.unlink()
    return status


@contextlib.contextmanager
def first_use(place: Place) -> Iterator[None]:
    """Inside, a problem that no file of the results knows is tuned when it is first launched."""
    os.environ["MEMAOP_TRITON_AUTOTUNE"] = "first-use"
    before = tuner.FIRST_USE_CANDIDATES
    tuner.FIRST_USE_CANDIDATES = problems.sizes(place).candidates
    tuner.forget()
    try:
        yield
    finally:
        tuner.FIRST_USE_CANDIDATES = before
        os.environ["MEMAOP_TRITON_AUTOTUNE"] = "off"
        tuner.forget()


def all_cases(place: Place) -> Iterator[Case]:
    """The shapes of the table with every setting, without db as they are timed, then with it."""
    from bench.microscope import predict

    sizes = problems.sizes(place)
    for bias_grad in (False, True):
        for shape in sizes.shapes:
            for name, setting in predict.SETTINGS.items():
                config = MemAOPConfig(ratio=1 / predict.INVERSE_RATIOS[0], **setting)
                title = f"{' x '.join(map(str, shape))}, {name}{', db' * bias_grad}"
                yield Case(title, partial(tune, place, sizes, shape, config, bias_grad))


def tune(
    place: Place, sizes: Sizes, shape: Shape, config: MemAOPConfig, bias_grad: bool
) -> dict[str, Any]:
    """One weight gradient, whose launches are tuned; returns what was added to the files."""
    m, n, p = shape
    before = _entries(place.device)
    x, g = (torch.randn(m, c, device=place.device).to(sizes.dtype) for c in (n, p))
    weight_and_bias_grad(x, g, config, new_memory(config, n, p), bias_grad=bias_grad)
    added = [one for key, one in _entries(place.device).items() if key not in before]
    return {"tuned": added}


def _entries(device: torch.device) -> dict[tuple[str, str], dict[str, Any]]:
    """What the files hold, by kernel and problem."""
    gpu = cache.gpu_of(device)
    assert gpu is not None
    found = {}
    for kernel in cache.SOURCES:
        file = cache.read(cache.path_of(cache.folder(), gpu, kernel))
        for entry in () if file is None else file.entries:
            found[kernel, entry.problem] = {
                "kernel": kernel,
                "problem": entry.problem,
                "tile": in_words(entry.config),
                "ms": entry.milliseconds,
                "heuristic_ms": entry.heuristic_milliseconds,
            }
    return found
