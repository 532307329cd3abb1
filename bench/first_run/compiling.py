"""The stage `compiling`: the tiles that `tuning` will time, in several processes.

A tile takes a second or two to compile and hundredths to time. What is compiled here lies in
Triton's cache afterwards; the times are thrown away.
"""

from __future__ import annotations

import os
import tempfile

import torch

from memaop_triton.bench.first_run import cases, dry, tuning
from memaop_triton.bench.first_run.cases import Place
from memaop_triton.kernels.tuning import tuner


def run(place: Place) -> int:
    """The cases of this process."""
    with tempfile.TemporaryDirectory() as scratch, dry.made_up_gpu(place.is_dry):
        os.environ["MEMAOP_TRITON_CACHE_DIR"] = scratch
        tuner.time_candidate = _launched_once
        with tuning.first_use(place):
            return cases.run(place, tuning.all_cases(place))


def _launched_once(call: tuning.Call, device: torch.device) -> float:
    call()
    return 1.0
