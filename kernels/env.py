"""What the process is set to: which implementation, which folder of cached files, tf32 or not."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs
import torch

_BACKEND = "MEMAOP_TRITON_BACKEND"
_CACHE_DIR = "MEMAOP_TRITON_CACHE_DIR"


def backend() -> str:
    """ "torch", "triton", or "" to choose by device.

    Raises:
        ValueError: `MEMAOP_TRITON_BACKEND` holds anything else.
    """
    name = os.environ.get(_BACKEND, "")
    if name not in ("", "torch", "triton"):
        raise ValueError(f"{_BACKEND}={name!r} is not one of 'torch', 'triton': or unset it.")
    return name


def cache_folder(part: str) -> Path:
    """The folder `part` of `$MEMAOP_TRITON_CACHE_DIR`, or of the user's cache; may not exist."""
    chosen = os.environ.get(_CACHE_DIR)
    return (Path(chosen) if chosen else platformdirs.user_cache_path("memaop-triton")) / part


def allows_tf32() -> bool:
    """Whether PyTorch may round float32 operands of matrix products to tf32 on a GPU.

    By the setting of the GPU's matrix products, which follows `torch.set_float32_matmul_precision`,
    `allow_tf32` and `torch.backends.fp32_precision` alike. The older
    `torch.get_float32_matmul_precision()` raises once a program has used the newer settings.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
