"""What a row's score reads: all of it, an eighth of its columns, or the gradient's row alone.

An unbiased selection weights the rows it draws by the scores that it drew them by, so any positive
scores give the exact gradient in the mean; the norms of whole rows give the least variance. A row
of norm zero may have score zero, because it adds nothing. A row that is zero in the columns that
were read may add something elsewhere, so scores from columns are raised above zero (`with_floor`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memaop_triton.flops import SCORED_BLOCK, columns_read, numbers_read
from memaop_triton.kernels.draws import draw_seed

# Of the mean score. One draw in eleven goes by it, so that a row which is zero in the columns read
# is drawn an eleventh as often as by uniform draws.
_FLOOR = 0.1
# Every row's score where all that was read is zero.
_LEAST = 1e-30


def misses_columns(scores: str, in_features: int, out_features: int) -> bool:
    """Whether a row that adds something may have score zero, unless `with_floor` raises it."""
    read = numbers_read(scores, in_features, out_features)
    return scores == "columns" and read < in_features + out_features


def parts_to_score(
    scores: str,
    x: Tensor,
    g: Tensor,
    generator: torch.Generator | None = None,
    *,
    whole_grad: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """What of X and G is read to score the rows; a row's score is the product of the norms.

    Args:
        scores: One of `config.SCORES`.
        x: [M, N].
        g: [M, P].
        generator: Source of the places of the columns; the device's default one if `None`.
        whole_grad: Take all columns of G even with `"columns"`, because they are read anyway.

    Returns:
        [M, n] of X, or `None` if its norms do not count, and [M, p] of G; the part of either may be
        blocks of columns, [M, blocks, SCORED_BLOCK].
    """
    if scores == "grad":
        return None, g
    if scores == "norms":
        return x, g
    seed = draw_seed(x.device, generator)
    return columns_of(x, seed), g if whole_grad else columns_of(g, seed >> 20)


def columns_of(a: Tensor, seed: int | Tensor) -> Tensor:
    """Evenly spread whole blocks of the columns of `a` ([M, N]), the first by the seed.

    Args:
        a: Rows of any length.
        seed: A number, or one on the device (int64 [1]), which is not read on the host: a replayed
            graph takes other columns each time.

    Returns:
        A view [M, columns_read(N) / SCORED_BLOCK, SCORED_BLOCK], or a copy where the seed is on the
        device; `a` itself where all columns are read.
    """
    columns = a.shape[1]
    if columns_read(columns) == columns:
        return a
    whole = columns // SCORED_BLOCK
    count = columns_read(columns) // SCORED_BLOCK
    apart = whole // count
    blocks: Tensor = a[:, : whole * SCORED_BLOCK].unflatten(1, (whole, SCORED_BLOCK))
    first = seed % apart
    if isinstance(first, Tensor):
        numbers = first + torch.arange(0, count * apart, apart, device=a.device)
        return blocks.index_select(1, numbers)
    return blocks[:, first : first + count * apart : apart]


def product_of_norms(norms: Tensor, others: Tensor) -> Tensor:
    """Scores from the norms of X's and G's rows, [M]; +Inf where that is not finite, as 0·Inf."""
    return (norms * others).nan_to_num_(nan=torch.inf, posinf=torch.inf)


def with_floor(scores: Tensor) -> Tensor:
    """Scores that are all above zero: a tenth of their mean more, or equal ones if all are zero.

    Scores that are not finite stay so and do not count in the mean.

    Args:
        scores: [M], non-negative.
    """
    finite = scores.nan_to_num(nan=0.0, posinf=0.0)
    return scores.add(finite.mean(dtype=torch.float64), alpha=_FLOOR).clamp_(min=_LEAST)
