"""A weight gradient to benchmark: its shape and how many of its rows are computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
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
    def identifier(self) -> str:
        """The same, as pytest's `-k` can name it: `64x64x64-r=1_8`."""
        replaced = str.maketrans({"×": "x", "/": "_", ",": "-", " ": None})
        return self.details.translate(replaced)

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

    def describe(self) -> dict[str, Any]:
        """The entries for this problem in the `extra_info` of a benchmark."""
        return dataclasses.asdict(self) | {
            "k": self.k,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def on_problems(*groups: tuple[Sequence[str], Sequence[Problem]]) -> pytest.MarkDecorator:
    """Parametrise a benchmark by `problem`: pairs of suites and the problems they have."""
    return pytest.mark.parametrize(
        "problem",
        [
            pytest.param(problem, marks=pytest.mark.suite(*suites), id=problem.identifier)
            for suites, problems in groups
            for problem in problems
        ],
    )
