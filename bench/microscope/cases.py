"""Calls that are compiled and inspected, and their operands.

The shapes are those of a large layer: M = 16384 rows of which K = 2048 are selected, N = P = 4096.
The tensors are on the device "meta": they have shapes and no contents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memaop_triton.kernels.gpu.gather_gemm import Correction
from memaop_triton.kernels.gpu.row_weights import RowWeights
from memaop_triton.kernels.tuning.config import GemmConfig, RowConfig

M, N, P, K = 16384, 4096, 4096, 2048
RANK = 16
SHORT = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    "ieee": "fp32",
    "tf32": "tf32",
}


@dataclass(frozen=True)
class Case:
    """One launcher, called in one way.

    Attributes:
        title: What it computes, for the report.
        config: The tile.
        call: The call; other kernels may be launched behind the one that is meant.
        dtype: Of X and G.
        precision: "tf32" or "ieee" for float32 operands that are multiplied.
        step_bytes: Bytes of large matrices that a program reads per step of its loop.
        side_bytes: Bytes of Q or Z that it reads besides, or that it writes.
        product_rows: The result's extent on the side where a matrix unit needs 64 at least.
        by_descriptor: Whether tiles are copied by descriptor.
        shown: Whether the report has a line for it.
    """

    title: str
    config: GemmConfig | RowConfig
    call: Callable[[], object]
    dtype: torch.dtype
    precision: str = "ieee"
    step_bytes: int = 0
    product_rows: int = 0
    by_descriptor: bool = False
    side_bytes: int = 0
    shown: bool = True

    @property
    def tile(self) -> str:
        """The tile's extents: P x N x K for a GEMM, rows x columns for a pass over rows."""
        c = self.config
        if isinstance(c, RowConfig):
            return f"{c.block_m}x{c.block_c}"
        return f"{c.block_p}x{c.block_n}x{c.block_k}"

    @property
    def name(self) -> str:
        """Title, tile and type: unique among a target's cases."""
        kind = self.precision if self.dtype == torch.float32 else self.dtype
        return f"{self.title}, {self.tile}, {SHORT[kind]}"


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor that has no contents."""
    return torch.empty(shape, dtype=dtype, device="meta")


def operands(dtype: torch.dtype, n: int = N, p: int = P) -> dict[str, Tensor]:
    """X, G and the selected rows, as keyword arguments of the GEMMs."""
    indices = empty(K, dtype=torch.int64)
    return {"x": empty(M, n, dtype=dtype), "g": empty(M, p, dtype=dtype), "indices": indices}


def weighting(dtype: torch.dtype, n: int = N, p: int = P, rank: int = RANK) -> dict[str, Any]:
    """Weights and a correction."""
    c, q = empty(p, rank, dtype=torch.float32), empty(n, rank, dtype=dtype)
    correction = Correction(c, q, 64.0)
    weights: Tensor | RowWeights = empty(K, dtype=torch.float32)
    if dtype == torch.float16:  # as a selection leaves them: their scale takes a launch
        weights = RowWeights(empty(K, dtype=dtype), empty(1, dtype=torch.float32))
    return {"weights": weights, "correction": correction}


def memory(dtype: torch.dtype, n: int = N, p: int = P) -> tuple[Tensor, Tensor, Tensor]:
    """A row memory."""
    slots = empty(M, n, dtype=dtype), empty(M, p, dtype=dtype)
    return (*slots, empty(M, dtype=torch.bool))


def scalars() -> dict[str, Tensor]:
    """Carry and seed."""
    return {"carry": empty(1, dtype=torch.float32), "seed": empty(1, dtype=torch.int64)}


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Products of float32 as tf32, or exactly ("ieee")."""
    settings: Any = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, precision
    try:
        yield
    finally:
        settings.fp32_precision = before
