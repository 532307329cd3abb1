"""What a layer computes of its backward pass: `MemAOPConfig`, checked when it is built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from memaop_triton.config.parts import (
    NAMED_GRAD_INPUTS,
    NAMED_MEMORIES,
    Projected,
    Rows,
    Sampled,
    Subspace,
    check_budget,
)
from memaop_triton.errors import check_count, check_fraction, check_name
from memaop_triton.flops import (
    SubspaceCost,
    numbers_read,
    projection_rank_within,
    rank_within,
    rows_within,
)

DEFAULT_RATIO = 1 / 8
DEFAULT_RANK = 16

#: Every selection policy, in the order in which `select_rows` documents them.
SELECTIONS = ("topk", "weightedk", "randk", "uniform", "priority", "crs", "bernoulli", "wta")
#: Policies whose weighted sum of outer products has the exact gradient as its mean.
UNBIASED_SELECTIONS = ("uniform", "priority", "crs", "bernoulli", "wta")
#: What rows are picked by: norms of whole rows, of an eighth of their columns, of G's rows alone.
SCORES = ("norms", "columns", "grad")
#: What is kept of X for the backward pass.
STASHES = ("exact", "int8", "int4")
BLOCK_ROWS = (1, 16, 32, 64, 128)


def check_config(config: object) -> None:
    """Raise `TypeError` unless `config` is a `MemAOPConfig`."""
    if not isinstance(config, MemAOPConfig):
        raise TypeError(f"config must be a MemAOPConfig, got {config!r}.")


@dataclasses.dataclass(frozen=True)
class MemAOPConfig:
    """How a linear layer computes the weight gradient dW = Gᵀ X from K of its M rows.

    Args:
        ratio: K/M, in (0, 1]. Defaults to 1/8 if `k` and `budget` are not given. `"auto"`, for
            `convert_` and unbiased selections with an exact dX: layers start exact, and the library
            finds out which of them are worth sampling, and how many rows (`memaop_triton.auto`).
        k: K itself, a number of rows, instead of `ratio`. A batch of at most `k` rows is exact.
        budget: Instead of `ratio` and `k`: floating-point operations of dW as a fraction of the
            dense 2 M N P, in (0, 1), with everything counted (`memaop_triton.flops`). Unless the
            rank of a subspace is given, up to 0.6 of them go to it; the rest to rows, at least one.
        selection: The policy that picks the K rows: `"topk"`, `"weightedk"` and `"randk"` are the
            paper's (arXiv 2110.09164); `"uniform"` (`randk` with weights M/K), `"priority"`,
            `"crs"`, `"bernoulli"` and `"wta"` are unbiased. `select_rows` of
            `memaop_triton.sampling.selection` defines each and names its source.
        memory: What is kept of the rows that were not picked: a `Subspace` for the unbiased
            selections, `Rows` for the others, or `None`. The strings `"subspace"`, `"residual"`
            (the paper's memory), `"signed"` and `"none"` stand for these with their defaults.
        grad_input: How the input gradient dX is computed: `"exact"`, `Sampled()` from K rows as
            well, or `Projected()` onto a subspace; `"sampled"` and `"projected"` stand for these.
            Where K = M, dX is exact with all of them.
        block_rows: Rows are scored and picked in whole blocks of 1, 16, 32, 64 or 128 neighbours,
            at least one block.
        scores: What rows are picked by: `"norms"` ‖x‖‖g‖; `"columns"` the same over an eighth of
            the columns of X and of G, spread blocks of 64 that change with the step;
            `"grad"` ‖g‖ alone. The last two read less and make a gradient noisier, but unbiased
            ones stay so (`memaop_triton.backward.scores`); for `memory=None` only, as a memory
            reads all rows anyway. Where a GPU sums db in the same pass, `"columns"` takes all
            columns of G. A NaN or Inf that is not read does not get its row picked. One in X makes
            the loss NaN; one in G is in db and in an exact dX, by which a `GradScaler` sees it. A
            layer with neither has a finite dW then, unless the row is drawn. With
            `grad_input="sampled"` dX and dW use one selection: by ‖g‖ whole (`"norms"`, which also
            looks for NaN in X, and `"grad"`, which does not), or by ‖g‖ over the columns of G that
            are read.
        stash: How X is kept from the forward pass to the backward pass: `"exact"`, or `"int8"` or
            `"int4"`, rounded at random to so many bits a number, where that frees memory
            (`memaop_triton.memory.stash`). The mean of dW stays what it is, and rows are selected
            as ever, by their norms; where K = M, dW is exact but for the rounding. Not with a
            memory of rows.

    Attributes:
        memory: An object or `None`; strings are converted to objects.
        grad_input: An object, or `None` for `"exact"`.

    Raises:
        ValueError: An argument is out of range, unknown, or contradicts another.
        TypeError: An argument is of the wrong type.
    """

    ratio: float | str | None = None
    k: int | None = None
    selection: str = "priority"
    memory: Subspace | Rows | str | None = "subspace"
    grad_input: Sampled | Projected | str | None = "exact"
    block_rows: int = 1
    budget: float | None = None
    scores: str = "norms"
    stash: str = "exact"

    def __post_init__(self) -> None:
        self._check_number_of_rows()
        check_name("selection", self.selection, SELECTIONS)
        check_name("scores", self.scores, SCORES)
        check_name("stash", self.stash, STASHES)
        self._replace_name("memory", NAMED_MEMORIES, (Subspace, Rows))
        self._replace_name("grad_input", NAMED_GRAD_INPUTS, (Sampled, Projected))
        if type(self.block_rows) is not int or self.block_rows not in BLOCK_ROWS:
            raise ValueError(f"block_rows={self.block_rows!r} is not one of {BLOCK_ROWS}.")
        if self.subspace is not None and self.leaves_rank_open and self.budget is None:
            with_rank = dataclasses.replace(self.subspace, rank=DEFAULT_RANK)
            object.__setattr__(self, "memory", with_rank)
        self._check_combinations()

    def _replace_name(
        self, field: str, meaning: Mapping[str, object], kinds: tuple[type, ...]
    ) -> None:
        value = getattr(self, field)
        if isinstance(value, str):
            check_name(field, value, meaning)
            object.__setattr__(self, field, meaning[value])
        elif value is not None and not isinstance(value, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{field} must be a {names}, a string or None, got {value!r}.")

    def _check_number_of_rows(self) -> None:
        every = {"ratio": self.ratio, "k": self.k, "budget": self.budget}
        given = {name: value for name, value in every.items() if value is not None}
        if len(given) > 1:
            both = " and ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"{both} say the same thing twice: give one of them.")
        if not given:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)
        elif self.k is not None:
            check_count("k", self.k, "rows")
        elif self.ratio is not None:
            if not self.is_auto:
                check_fraction("ratio", self.ratio, "it is K/M, 0.125 for 1/8, or 'auto'")
        else:
            check_budget("budget", self.budget, "leave the layer dense")

    def _check_combinations(self) -> None:
        if self.is_auto and not (self.is_unbiased and self.grad_input is None):
            raise ValueError(
                "ratio='auto' knows what the noise of an unbiased selection costs, and nothing of "
                f"selection={self.selection!r} with grad_input={self.grad_input_name!r}: give "
                "these layers a number."
            )
        if self.row_memory is not None and self.is_unbiased:
            raise ValueError(
                f"memory={self.memory_name!r} with the unbiased selection={self.selection!r} would "
                "count rows twice: use memory='subspace' or 'none', or a selection of the paper "
                "('topk', 'weightedk', 'randk')."
            )
        if self.stash != "exact" and self.row_memory is not None:
            raise ValueError(
                f"stash={self.stash!r} saves nothing beside memory={self.memory_name!r}, which "
                "holds a copy of all rows from step to step: use memory='subspace' or 'none'."
            )
        if self.scores != "norms" and self.memory is not None:
            raise ValueError(
                f"scores={self.scores!r} saves no pass with memory={self.memory_name!r}, which "
                "reads all rows anyway, to store or to project them: use memory='none' or "
                "scores='norms'."
            )
        if self.projected is not None and self.subspace is None:
            raise ValueError(
                "grad_input='projected' needs memory='subspace', which keeps the basis of dX, not "
                f"{self.memory_name!r}."
            )
        if isinstance(self.grad_input, Sampled) and not self.is_unbiased:
            raise ValueError(
                f"grad_input='sampled' needs an unbiased selection, not {self.selection!r}: use "
                f"{', '.join(map(repr, UNBIASED_SELECTIONS))}."
            )

    @classmethod
    def paper(
        cls,
        *,
        k: int | None = None,
        ratio: float | None = None,
        selection: str = "topk",
        memory: Rows | str | None = "residual",
    ) -> MemAOPConfig:
        """Mem-AOP-GD as published: `topk`, `weightedk` or `randk`, with the row memory.

        `memory=Rows(decay=...)` sets the authors' decay, `None` gives the variants without memory.
        With SGD at a learning rate that changes, also call `attach_optimizer`, which keeps the
        update equal to the paper's.
        """
        check_name("selection", selection, ("topk", "weightedk", "randk"))
        config = cls(ratio=ratio, k=k, selection=selection, memory=memory)
        check_name("memory", config.memory_name, ("residual", "none"))
        return config

    @property
    def is_auto(self) -> bool:
        """Whether the ratio is left to the library."""
        return self.ratio == "auto"

    @property
    def is_unbiased(self) -> bool:
        """Whether the mean of the weight gradient over the draws is the exact one."""
        return self.selection in UNBIASED_SELECTIONS

    @property
    def subspace(self) -> Subspace | None:
        """The memory, if it is one of directions."""
        return self.memory if isinstance(self.memory, Subspace) else None

    @property
    def row_memory(self) -> Rows | None:
        """The memory, if it holds one slot per row of the batch."""
        return self.memory if isinstance(self.memory, Rows) else None

    @property
    def projected(self) -> Projected | None:
        """How the input gradient is projected, if it is."""
        return self.grad_input if isinstance(self.grad_input, Projected) else None

    @property
    def memory_name(self) -> str:
        """`"none"`, `"residual"`, `"signed"` or `"subspace"`."""
        if self.row_memory is not None:
            return "signed" if self.row_memory.signed else "residual"
        return "none" if self.subspace is None else "subspace"

    @property
    def grad_input_name(self) -> str:
        """`"exact"`, `"sampled"` or `"projected"`."""
        return "exact" if self.grad_input is None else type(self.grad_input).__name__.lower()

    @property
    def leaves_rank_open(self) -> bool:
        """Whether a budget chooses the rank of the subspace."""
        return self.subspace is not None and self.subspace.rank is None

    @property
    def period(self) -> int:
        """Steps after which the work of a step repeats: those between two refreshes, or 1."""
        return 1 if self.subspace is None else self.subspace.refresh_every

    def spending(self, *, ratio: float | None = None, budget: float | None = None) -> MemAOPConfig:
        """The same with this `ratio` or `budget` instead. A projected dX keeps its budget."""
        grad_input = self.grad_input
        if self.projected is not None:
            grad_input = Projected(self.budget_of_projection)
        return dataclasses.replace(self, ratio=ratio, k=None, budget=budget, grad_input=grad_input)

    def num_rows(
        self,
        rows: int,
        in_features: int = 0,
        out_features: int = 0,
        subspace: SubspaceCost | None = None,
    ) -> int:
        """K for a batch of `rows` rows: whole blocks, at least one, and at most `rows`.

        Where all rows are asked for it is M, also if the last block is not whole.

        Args:
            rows: M.
            in_features: N; used with a budget only, like the next two.
            out_features: P.
            subspace: Cost of the layer's subspace, which is subtracted from the budget.
        """
        rounding = 0.5
        if self.k is not None:
            wanted = float(self.k)
        elif isinstance(self.ratio, str):
            raise ValueError(
                "ratio='auto' is no number of rows: convert_(model, config) finds one."
            )
        elif self.ratio is not None:
            wanted = self.ratio * rows
        else:  # down, to stay within the budget
            assert self.budget is not None
            rounding = 0.0
            sizes = rows, in_features, out_features
            wanted = rows_within(self.budget, *sizes, subspace, self.numbers_scored(*sizes[1:]))
        if wanted >= rows:
            return rows
        blocks = math.floor(wanted / self.block_rows + rounding)
        return min(rows, max(1, blocks) * self.block_rows)

    def numbers_scored(self, in_features: int, out_features: int) -> int:
        """How many of the N + P numbers of a row its score reads."""
        return numbers_read(self.scores, in_features, out_features)

    def rank_for(self, rows: int, in_features: int, out_features: int) -> int:
        """Rank of the subspace in a layer of this size, with batches of `rows` rows."""
        subspace = self.subspace
        assert subspace is not None
        lengths = {"input": (in_features,), "grad": (out_features,)}
        shortest = min(lengths.get(subspace.side, (in_features, out_features)))
        rank = subspace.rank
        if rank is None:
            assert self.budget is not None
            if shortest == 0:
                return 0
            sizes = rows, in_features, out_features, subspace.refresh_every
            rank = rank_within(self.budget, *sizes, both_sides=subspace.side == "auto")
        return min(rank, max(1, shortest // 4), shortest)

    def projection_rank(self, rows: int, in_features: int, out_features: int) -> int:
        """Dimension of a projected dX's subspace, with batches of `rows` rows."""
        subspace, budget = self.subspace, self.budget_of_projection
        assert subspace is not None
        if budget is None:
            assert subspace.rank is not None
            return max(1, min(subspace.rank, min(in_features, out_features) // 4))
        sizes = rows, in_features, out_features
        return projection_rank_within(budget, *sizes, subspace.refresh_every)

    @property
    def budget_of_projection(self) -> float | None:
        """That of a projected dX, or the budget that it is computed from; `None` if by `rank`."""
        if self.projected is None:
            return None
        return self.projected.budget or (self.budget if self.leaves_rank_open else None)
