"""Settings of the process: which implementation runs, where files are cached, tf32 or not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

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
    """The folder `part` of `$MEMAOP_TRITON_CACHE_DIR`, or of the user's cache; may not exist.

    Raises:
        ModuleNotFoundError: The variable is not set, platformdirs is not installed, and the system
            is not Linux.
    """
    chosen = os.environ.get(_CACHE_DIR)
    return (Path(chosen) if chosen else _user_cache()) / part


def _user_cache() -> Path:
    try:
        import platformdirs
    except ModuleNotFoundError:
        if sys.platform != "linux":
            raise ModuleNotFoundError(
                f"the cache folder is not known: install platformdirs or set {_CACHE_DIR}."
            ) from None
        # The same folder. A checkout also runs in images that have little more than PyTorch.
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "memaop-triton"
    return platformdirs.user_cache_path("memaop-triton")


def allows_tf32() -> bool:
    """Whether PyTorch may round float32 operands of matrix products to tf32 on a GPU.

    By the setting of the GPU's matrix products, which follows `torch.set_float32_matmul_precision`,
    `allow_tf32` and `torch.backends.fp32_precision` alike. The older
    `torch.get_float32_matmul_precision()` raises once a program has used the newer settings.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
