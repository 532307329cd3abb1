"""A weight gradient to benchmark: its shape and how many of its rows are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memaop_triton import MemAOPConfig, Projected


@dataclass(frozen=True)
class Problem:
    """A weight gradient dW = Gᵀ X of which a part of the rows is computed.

    Attributes:
        m: Rows of X and G.
        n: Columns of X.
        p: Columns of G.
        ratio: K/M.
        dtype: Of X and G.
        device: "cpu" or "cuda".
        block_rows: Rows are picked in blocks of so many neighbours.
    """

    m: int
    n: int
    p: int
    ratio: float = 1 / 8
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    block_rows: int = 1

    @property
    def shape(self) -> str:
        """M×N×P, for titles."""
        return f"{self.m}×{self.n}×{self.p}"

    @property
    def budget(self) -> str:
        """The ratio as a fraction, for titles."""
        return f"r=1/{round(1 / self.ratio)}"

    @property
    def details(self) -> str:
        """All in which this problem may differ from others, for titles."""
        parts = [self.shape, self.budget]
        if self.dtype != torch.float32:
            parts.append(str(self.dtype).removeprefix("torch."))
        if self.block_rows > 1:
            parts.append(f"blocks of {self.block_rows}")
        return ", ".join(parts)

    @property
    def k(self) -> int:
        """K."""
        return self.config().num_rows(self.m)

    def config(self, **settings: Any) -> MemAOPConfig:
        """The configuration with these settings for this ratio and these blocks."""
        return MemAOPConfig(ratio=self.ratio, block_rows=self.block_rows, **settings)

    def config_of_layer(self, grad_input: str, **settings: Any) -> MemAOPConfig:
        """The same with an input gradient; a projected one costs `ratio` of dense's FLOPs."""
        given = Projected(self.ratio) if grad_input == "projected" else grad_input
        return self.config(grad_input=given, **settings)

    def operands(self) -> tuple[Tensor, Tensor]:
        """Random X and G."""
        x, g = (
            torch.randn(self.m, columns, dtype=self.dtype, device=self.device)
            for columns in (self.n, self.p)
        )
        return x, g

    def describe(self, kind: str, title: str, **more: Any) -> dict[str, Any]:
        """The `extra_info` of a benchmark of this problem, without its methods."""
        return {
            "kind": kind,
            "title": title,
            "m": self.m,
            "n": self.n,
            "p": self.p,
            "k": self.k,
            "ratio": self.ratio,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "block_rows": self.block_rows,
            "model": None,
        } | more
