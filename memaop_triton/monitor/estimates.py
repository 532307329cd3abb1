"""Estimates of the noise in a sampled weight gradient, from the rows that were drawn.

Notation: A_m = g_mᵀ x_m is the outer product of row m (of what the subspace leaves of x_m, if there
is one), s_m = ‖A_m‖ its score, dW = Σ A_m, and T = Σ_{m∈S} w_m A_m what a step computes of it.
Norms are Frobenius norms; variances are summed over the entries of a gradient, E‖T − dW‖². With
`block_rows` above 1 the rows of a block count as uncorrelated. There is no host synchronisation.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from memaop_triton.config import MemAOPConfig
from memaop_triton.sampling.selection import Selection, within

T = TypeVar("T")


class Figures(NamedTuple, Generic[T]):
    """What is averaged over steps: tensors ([], float64) of one step, or numbers read from them.

    Attributes:
        score_sum: Σ s.
        computed_score_sum: Σ_S s, every row counted once.
        effective_sample_size: Of `effective_sample_size`.
        nonzero_rows: Number of rows with s > 0.
        sampling_variance: Of `sampling_variance`; 0 for a policy that is not unbiased.
        gradient_square: ‖dW‖² of the dense gradient, estimated by ‖dW_sampled‖² less the sampling
            variance; 0 for a policy that is not unbiased.
        batch_variance: Of `batch_variance`.
        batch_square_sum: Σ ‖g_m‖² ‖x_m‖² of the batch as it is.
        remembered_square_sum: Σ s² of the slots that a row memory holds after the step.
        input_square_sum: Σ ‖x_m‖² with a subspace.
        outside_square_sum: The part of it outside the subspace.
    """

    score_sum: T
    computed_score_sum: T
    effective_sample_size: T
    nonzero_rows: T
    sampling_variance: T
    gradient_square: T
    batch_variance: T
    batch_square_sum: T
    remembered_square_sum: T
    input_square_sum: T
    outside_square_sum: T


def contributions_of(selection: Selection, scores: Tensor) -> Tensor:
    """c_m = s_m Σ w over the draws of row m, 0 for a row that was not drawn: [M].

    Args:
        selection: May name a row twice, and rows beyond the last, which count for nothing.
        scores: [M].
    """
    indices, weights = within(selection, scores.numel())
    drawn = weights.to(scores.dtype) * scores.index_select(0, indices)
    return torch.zeros_like(scores).index_add_(0, indices, drawn)


def effective_sample_size(contributions: Tensor) -> Tensor:
    """(Σc)² / Σc², the number of equal rows that would make up such a sum (Kish 1965).

    Kish's formula on what the rows add to T, c = w·s, and not on their weights alone: under
    `priority` the weights are unequal just so that the contributions are equal. A row that was
    drawn twice is one row.
    """
    ratio = contributions.sum().square() / contributions.dot(contributions)
    return ratio.nan_to_num(nan=0.0)


def sampling_variance(
    config: MemAOPConfig, k: int, selection: Selection, scores: Tensor, sampled_square: Tensor
) -> Tensor:
    """An estimate of E‖T − dW‖² from one selection, whose mean is that, or above it for `wta`.

    | policy | estimate | why |
    |---|---|---|
    | `priority`, `bernoulli` | Σ_S w (w−1) s² | weights of two rows have no covariance, and
      E[w·1(m∈S)] = 1 (Duffield, Lund, Thorup 2007) |
    | `crs` | (K Σ_S w² s² − ‖T‖²) / (K−1) | T is a mean of K independent draws; sample variance |
    | `wta` | Σ_{w≠1} w² s² | the same with ‖Σ_rest A‖² left out: an upper bound |
    | `uniform` | (M−K)/(K−1) · (Σ s² − ‖T‖²/M) | simple random sampling (Cochran 1977) |

    It holds for any scores, not only those that the rows were drawn by. With one draw, `crs` and
    `uniform` leave out ‖T‖², which makes them upper bounds.

    Args:
        config: With an unbiased selection.
        k: Rows that were to be drawn.
        selection: What was drawn.
        scores: s, [M], float64.
        sampled_square: ‖T‖².
    """
    rows, block = scores.numel(), config.block_rows
    indices, weights = within(selection, rows)
    picked = scores.index_select(0, indices)
    drawn = weights.double() * picked
    draws = -(-k // block)
    if config.selection == "crs":
        if draws == 1:
            return drawn.dot(drawn)
        return (draws * drawn.dot(drawn) - sampled_square) / (draws - 1)
    if config.selection == "wta":
        drawn = drawn.masked_fill(weights == 1, 0)
        return drawn.dot(drawn)
    if config.selection == "uniform":
        units = -(-rows // block)
        total = scores.dot(scores)
        if draws == 1:
            return units * total
        return (units - draws) / (draws - 1) * (total - sampled_square / units)
    return drawn.dot(drawn - picked)


def batch_variance(square_sum: Tensor, dense_square: Tensor, rows: int) -> Tensor:
    """M/(M−1) (Σ‖g_m‖²‖x_m‖² − ‖dW‖²/M): the variance of the dense dW from batch to batch.

    Rows count as independent draws. Tokens of one sequence are not, so for these it is the variance
    that as many unrelated tokens would have. 0 for a batch of one row, from which nothing follows.

    Args:
        square_sum: Σ ‖g_m‖² ‖x_m‖².
        dense_square: ‖dW‖², or an unbiased estimate; 0 makes the result an upper bound.
        rows: M.
    """
    if rows < 2:
        return torch.zeros_like(square_sum)
    return rows / (rows - 1) * (square_sum - dense_square / rows)
