"""The parts of a configuration: what is kept of rows, and how the input gradient is computed."""

from __future__ import annotations

import dataclasses

import torch

from memaop_triton.errors import check_count, check_fraction, check_name, is_number

#: Whose rows a subspace is one of: the inputs X, the output gradients G, or the better one.
SIDES = ("auto", "input", "grad")
MEMORY_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_budget(argument: str, value: object, instead: str) -> None:
    """Raise `ValueError` unless `value` is in (0, 1); 1 is to be said in another way, `instead`."""
    check_fraction(argument, value, "1 is what dense costs")
    if value == 1:
        raise ValueError(f"{argument}=1 is what dense costs: {instead}.")


@dataclasses.dataclass(frozen=True)
class Subspace:
    """A memory of directions: the part of rows in a slowly moving subspace is computed exactly.

    For unbiased selections. Holds (N+P)·`rank` numbers a layer, or those of one side.

    Args:
        rank: Dimension of the subspace. `None` is 16, or left open by a `budget`. Cut to a quarter
            of the layer's features on the side it is taken from, the smaller one for `"auto"`.
        side: Whose rows the subspace is one of: `"input"` X, `"grad"` G, or `"auto"` that of which
            less is left to sample, compared every few refreshes.
        refresh_every: Steps between two updates of the subspace.
    """

    rank: int | None = None
    side: str = "auto"
    refresh_every: int = 8

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_count("rank", self.rank, "dimensions of the subspace")
        check_name("side", self.side, SIDES)
        check_count("refresh_every", self.refresh_every, "steps")


@dataclasses.dataclass(frozen=True)
class Rows:
    """A memory of rows: those not selected are added to the same slots of the next batch.

    The paper's memory (arXiv 2110.09164), for its biased selections. Holds M·(N+P) numbers a layer.

    Args:
        signed: Give every stored row a random sign in every step, the same for X and G, so that
            the products of rows of different steps have mean zero.
        decay: Fraction in (0, 1] of a stored outer product that survives a step; a stored row
            shrinks by its square root. The authors' `memory-decay-rate`. A step is one backward
            pass of the layer: with A accumulated gradients, or a layer used A times, take the A-th
            root.
        dtype: In which the rows are stored; `None` is the dtype of the layer's input.
    """

    signed: bool = False
    decay: float = 1.0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.decay) and 0 < self.decay <= 1):
            raise ValueError(
                f"decay={self.decay!r} must be in (0, 1]; memory=None remembers nothing at all."
            )
        if self.dtype is not None and self.dtype not in MEMORY_DTYPES:
            raise ValueError(
                f"dtype={self.dtype!r} is not a floating-point dtype a memory can be stored in: "
                f"{', '.join(map(str, MEMORY_DTYPES))}, or None for the input's."
            )


@dataclasses.dataclass(frozen=True)
class Sampled:
    """An input gradient dX = G W from K rows, picked by an unbiased selection.

    With a subspace, of which `side` must not be `"input"`, every row has its part inside exactly,
    and the rows are picked by what is left of G; without one they are picked by the norms of G's
    rows, and dW uses the same ones. A budget is that of either gradient.
    """


@dataclasses.dataclass(frozen=True)
class Projected:
    """An input gradient whose rows are projected onto a subspace that holds most of their energy.

    dX = G (W Q) Qᵀ drops what is outside: it adds no noise but is not unbiased, and costs far less
    quality than sampling in deep networks (docs/quality.md). Q belongs to a `Subspace` memory and
    has N times its dimension numbers.

    Args:
        budget: Floating-point operations of dX as a fraction of the dense 2 M N P, in (0, 1), from
            which the dimension follows. `None` is the memory's `rank`, or the largest that fits the
            layer's `budget` if that is not given.
    """

    budget: float | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            check_budget("budget", self.budget, "use grad_input='exact'")


#: The objects that a string is short for.
NAMED_MEMORIES: dict[str, Subspace | Rows | None] = {
    "none": None,
    "residual": Rows(),
    "signed": Rows(signed=True),
    "subspace": Subspace(),
}
NAMED_GRAD_INPUTS: dict[str, Sampled | Projected | None] = {
    "exact": None,
    "sampled": Sampled(),
    "projected": Projected(),
}
MEMORIES = tuple(NAMED_MEMORIES)
ROW_MEMORIES = ("residual", "signed")
