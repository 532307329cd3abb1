"""What a layer computes of its backward pass: `MemAOPConfig`, checked when it is built."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable
from typing import TypeGuard

import torch

from memaop_triton.flops import Subspace, projection_rank_within, rank_within, rows_within

DEFAULT_RATIO = 1 / 8
DEFAULT_RANK = 16

#: Every selection policy, in the order in which `select_rows` documents them.
SELECTIONS = ("topk", "weightedk", "randk", "priority", "crs", "bernoulli", "wta")
#: Policies whose weighted sum of outer products has the exact gradient as its mean. `randk` joins
#: them with `rescale=True`.
UNBIASED_SELECTIONS = ("priority", "crs", "bernoulli", "wta")
MEMORIES = ("none", "residual", "signed", "subspace")
#: Memories that hold one slot per row of the batch.
ROW_MEMORIES = ("residual", "signed")
GRAD_INPUTS = ("exact", "sampled", "projected")
#: Whose rows the subspace is one of: the inputs X, the output gradients G, or the better one.
SIDES = ("auto", "input", "grad")
BLOCK_ROWS = (1, 16, 32, 64, 128)
MEMORY_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_name(argument: str, value: object, allowed: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `allowed`, and suggest the nearest name."""
    names = tuple(allowed)
    if value in names:
        return
    near = difflib.get_close_matches(str(value).lower(), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument}={value!r} is not one of {', '.join(map(repr, names))}.{hint}")


def check_config(config: object) -> None:
    """Raise `TypeError` unless `config` is a `MemAOPConfig`."""
    if not isinstance(config, MemAOPConfig):
        raise TypeError(f"config must be a MemAOPConfig, got {config!r}.")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_count(argument: str, value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{argument} must be an int ({what}), got {value!r}.")
    if int(value) < 1:
        raise ValueError(f"{argument}={value} must be at least 1 ({what}).")


@dataclasses.dataclass(frozen=True)
class MemAOPConfig:
    """How a linear layer computes the weight gradient dW = Gᵀ X from K of its M rows.

    Args:
        ratio: K/M, in (0, 1]. Defaults to 1/8 if `k` is not given.
        k: K itself, a number of rows, instead of `ratio`. A batch of at most `k` rows is exact.
        budget: Instead of `ratio` and `k`: floating-point operations of dW as a fraction of the
            dense 2 M N P, in (0, 1), with everything counted (`memaop_triton.flops`). Unless `rank`
            is given, up to 0.6 of them go to the subspace, if there is one; the rest to rows, at
            least one.
        selection: The policy that picks the K rows: `"topk"`, `"weightedk"` and `"randk"` are the
            paper's (arXiv 2110.09164); `"priority"`, `"crs"`, `"bernoulli"` and `"wta"` are
            unbiased. `memaop_triton.selection.select_rows` defines each and names its source.
        memory: What is kept of the rows that were not picked. `"residual"` adds them to the same
            slots of the next batch (the paper's memory), `"signed"` does so with a random sign per
            row, `"subspace"` computes their part in a slowly moving subspace of the inputs
            exactly, `"none"` drops them. The first two hold M·(N+P) numbers a layer and refuse
            unbiased policies, `"subspace"` holds (N+P)·`rank`, or those of one side.
        rank: Dimension of the subspace. `None` is 16, or left open by a `budget`. Cut to a quarter
            of the layer's features on the side it is taken from, the smaller one for `"auto"`.
        side: Whose rows the subspace is one of: `"input"` X, `"grad"` G, or `"auto"` that of which
            less is left to sample, compared every few refreshes.
        refresh_every: Steps between two updates of the subspace.
        decay: Fraction in (0, 1] of a remembered outer product that survives a step; a remembered
            row shrinks by its square root. The authors' `memory-decay-rate`. Row memories only. A
            step is one backward pass of the layer: with A accumulated gradients, or a layer used A
            times, take the A-th root.
        rescale: Weight the rows of `"randk"` by M/K, which makes it unbiased.
        block_rows: Rows are scored and picked in whole blocks of 1, 16, 32, 64 or 128 neighbours,
            at least one block.
        memory_dtype: Storage dtype of a row memory; `None` is the dtype of the layer's input.
        grad_input: `"sampled"` computes the input gradient G W from K rows as well, picked by the
            policy, which must be unbiased. With a subspace, of which `side` must not be `"input"`,
            every row has its part inside exactly, and the rows are picked by what is left of G;
            without one they are picked by the norms of G's rows, and dW uses the same ones. A
            budget is that of either gradient. `"projected"` gives every row of
            dX its part in a subspace that they mostly live in, G (W Q) Qᵀ, and drops the rest: it
            adds no noise but is not unbiased, and costs far less quality than sampling in deep
            networks (docs/quality.md). It needs `memory="subspace"`, which keeps Q, N times its
            dimension. Where K = M, dX is exact with all of these.
        grad_input_budget: Floating-point operations of a projected dX as a fraction of the dense
            2 M N P, in (0, 1), from which the dimension of its subspace follows. `None` is `rank`
            dimensions, or what `budget` pays for if that is not given.

    Raises:
        ValueError: An argument is out of range, unknown, or contradicts another.
        TypeError: An argument is of the wrong type.
    """

    ratio: float | None = None
    k: int | None = None
    selection: str = "priority"
    memory: str = "subspace"
    rank: int | None = None
    refresh_every: int = 8
    decay: float = 1.0
    rescale: bool = False
    block_rows: int = 1
    memory_dtype: torch.dtype | None = None
    grad_input: str = "exact"
    budget: float | None = None
    side: str = "auto"
    grad_input_budget: float | None = None

    def __post_init__(self) -> None:
        self._check_budget()
        check_name("selection", self.selection, SELECTIONS)
        check_name("memory", self.memory, MEMORIES)
        check_name("grad_input", self.grad_input, GRAD_INPUTS)
        check_name("side", self.side, SIDES)
        if self.rank is None and self.budget is None:
            object.__setattr__(self, "rank", DEFAULT_RANK)
        if self.rank is not None:
            _check_count("rank", self.rank, "dimensions of the subspace")
        _check_count("refresh_every", self.refresh_every, "steps")
        if type(self.block_rows) is not int or self.block_rows not in BLOCK_ROWS:
            raise ValueError(f"block_rows={self.block_rows!r} is not one of {BLOCK_ROWS}.")
        if self.memory_dtype is not None and self.memory_dtype not in MEMORY_DTYPES:
            raise ValueError(
                f"memory_dtype={self.memory_dtype!r} is not a floating-point dtype a memory can be "
                f"stored in: {', '.join(map(str, MEMORY_DTYPES))}, or None for the input's."
            )
        self._check_combinations()

    def _check_budget(self) -> None:
        given = {
            name: value
            for name in ("ratio", "k", "budget")
            if (value := getattr(self, name)) is not None
        }
        if len(given) > 1:
            both = " and ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"{both} say the same thing twice: give one of them.")
        if not given:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)
        elif self.k is not None:
            _check_count("k", self.k, "rows")
        elif self.ratio is not None:
            self._check_fraction("ratio", self.ratio, "it is K/M, 0.125 for 1/8")
        elif self.budget is not None:
            self._check_fraction("budget", self.budget, "1 is what dense costs")
            if self.budget == 1:
                raise ValueError("budget=1 is what dense costs: leave the layer dense.")

    @staticmethod
    def _check_fraction(argument: str, value: object, meaning: str) -> None:
        if not _is_number(value):
            raise TypeError(f"{argument} must be a number in (0, 1], got {value!r}.")
        if not 0 < value <= 1:
            raise ValueError(f"{argument}={value} must be in (0, 1]: {meaning}.")

    def _check_combinations(self) -> None:
        if not (_is_number(self.decay) and 0 < self.decay <= 1):
            raise ValueError(
                f"decay={self.decay!r} must be in (0, 1]; memory='none' remembers nothing at all."
            )
        if self.rescale and self.selection != "randk":
            raise ValueError(
                f"rescale=True only applies to selection='randk', not to {self.selection!r}, which "
                "weights its rows by its own rule."
            )
        if self.has_row_memory:
            if self.is_unbiased:
                raise ValueError(
                    f"memory={self.memory!r} with the unbiased selection={self.selection!r} would "
                    "count rows twice: use memory='subspace' or 'none', or a selection of the "
                    "paper ('topk', 'weightedk', 'randk' without rescale)."
                )
        else:
            if self.decay != 1:
                raise ValueError(
                    f"decay={self.decay} has no meaning for memory={self.memory!r}: it shrinks the "
                    "rows of memory='residual' and 'signed'."
                )
            if self.memory_dtype is not None:
                raise ValueError(
                    f"memory_dtype={self.memory_dtype} has no meaning for memory={self.memory!r}: "
                    "it is the storage of memory='residual' and 'signed'."
                )
        if self.grad_input == "projected" and self.memory != "subspace":
            raise ValueError(
                "grad_input='projected' needs memory='subspace', which keeps the basis of dX, not "
                f"{self.memory!r}."
            )
        if self.grad_input_budget is not None:
            self._check_grad_input_budget(self.grad_input_budget)
        if self.grad_input == "sampled" and not self.is_unbiased:
            raise ValueError(
                f"grad_input='sampled' needs an unbiased selection, not {self.selection!r}: use "
                "'priority', 'crs', 'bernoulli', 'wta', or 'randk' with rescale=True."
            )

    def _check_grad_input_budget(self, budget: float) -> None:
        self._check_fraction("grad_input_budget", budget, "1 is what dense costs")
        if budget == 1:
            raise ValueError("grad_input_budget=1 is what dense costs: use grad_input='exact'.")
        if self.grad_input != "projected":
            raise ValueError(
                f"grad_input_budget={budget} has no meaning for grad_input={self.grad_input!r}: it "
                "is that of grad_input='projected'."
            )

    @classmethod
    def paper(
        cls,
        *,
        k: int | None = None,
        ratio: float | None = None,
        selection: str = "topk",
        memory: str = "residual",
        decay: float = 1.0,
    ) -> MemAOPConfig:
        """Mem-AOP-GD as published: `topk`, `weightedk` or `randk`, with the row memory.

        `memory="none"` gives the paper's variants without memory. With SGD at a learning rate that
        changes, also call `attach_optimizer`, which keeps the update equal to the paper's.
        """
        check_name("selection", selection, ("topk", "weightedk", "randk"))
        check_name("memory", memory, ("residual", "none"))
        return cls(ratio=ratio, k=k, selection=selection, memory=memory, decay=decay)

    @property
    def is_unbiased(self) -> bool:
        """Whether the mean of the weight gradient over the draws is the exact one."""
        return self.selection in UNBIASED_SELECTIONS or self.rescale

    @property
    def has_row_memory(self) -> bool:
        """Whether the memory holds one slot per row of the batch."""
        return self.memory in ROW_MEMORIES

    def num_rows(
        self,
        rows: int,
        in_features: int = 0,
        out_features: int = 0,
        subspace: Subspace | None = None,
    ) -> int:
        """K for a batch of `rows` rows: whole blocks, at least one, and at most `rows`.

        Args:
            rows: M.
            in_features: N; only a budget asks for it, and for the next two.
            out_features: P.
            subspace: What the layer's memory spends beside the rows.
        """
        if self.k is not None:
            wanted = float(self.k)
        elif self.budget is not None:
            # Down, to stay within it.
            paid = rows_within(self.budget, rows, in_features, out_features, subspace)
            blocks = math.floor(paid / self.block_rows)
            return min(rows, max(1, blocks) * self.block_rows)
        else:
            wanted = (self.ratio or 0) * rows
        blocks = math.floor(wanted / self.block_rows + 0.5)
        return min(rows, max(1, blocks) * self.block_rows)

    def projection_rank(self, rows: int, in_features: int, out_features: int) -> int:
        """Dimension of a projected dX's subspace, with batches of `rows` rows."""
        budget = self.budget_of_projection
        if budget is None:
            assert self.rank is not None
            return max(1, min(self.rank, min(in_features, out_features) // 4))
        return projection_rank_within(budget, rows, in_features, out_features, self.refresh_every)

    @property
    def budget_of_projection(self) -> float | None:
        """`grad_input_budget`, or the budget that stands for it; `None` where `rank` does."""
        if self.grad_input != "projected" or self.grad_input_budget is not None:
            return self.grad_input_budget
        return self.budget if self.rank is None else None

    def rank_for(self, rows: int, in_features: int, out_features: int) -> int:
        """Rank of the subspace in a layer of this size, with batches of `rows` rows."""
        lengths = {"input": (in_features,), "grad": (out_features,)}
        shortest = min(lengths.get(self.side, (in_features, out_features)))
        rank = self.rank
        if rank is None:
            assert self.budget is not None
            if shortest == 0:
                return 0
            sizes = rows, in_features, out_features, self.refresh_every
            rank = rank_within(self.budget, *sizes, both_sides=self.side == "auto")
        return min(rank, max(1, shortest // 4), shortest)
