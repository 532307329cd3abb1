"""What a row's score reads: all of it, an eighth of its columns, or the gradient's row alone.

An unbiased selection weights the rows it draws by the scores that it drew them by, so any positive
scores give the exact gradient in the mean; the norms of whole rows give the least variance. A row
of norm zero may have score zero, because it adds nothing. A row that is zero in the columns that
were read may add something elsewhere, so scores from columns are raised above zero (`with_floor`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memaop_triton.draws import draw_seed

#: Norms of whole rows, ‖x‖‖g‖; norms of an eighth of the columns of each; ‖g‖.
SCORES = ("norms", "columns", "grad")
#: Columns of a block: 128 bytes in half precision, a line of a GPU's cache.
BLOCK = 64
_SHARE = 8
# Of the mean score. It takes a tenth of the draws at most, and a row whose columns read are zero
# is drawn at least a tenth as often as by uniform draws.
_FLOOR = 0.1
# Every row's score where all that was read is zero.
_LEAST = 1e-30


def columns_read(features: int) -> int:
    """How many columns `"columns"` reads of rows of this length.

    The number of blocks next to an eighth, at least one; all columns of rows below two blocks.
    """
    if features < 2 * BLOCK:
        return features
    return BLOCK * max(1, round(features / (BLOCK * _SHARE)))


def numbers_read(scores: str, in_features: int, out_features: int) -> int:
    """How many numbers the score of one row reads, of N + P."""
    if scores == "grad":
        return out_features
    if scores == "columns":
        return columns_read(in_features) + columns_read(out_features)
    return in_features + out_features


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
        scores: One of `SCORES`.
        x: [M, N].
        g: [M, P].
        generator: Source of the places of the columns; the device's default one if `None`.
        whole_grad: Take all columns of G even with `"columns"`, because they are read anyway.

    Returns:
        [M, n] of X, or `None` if its norms do not count, and [M, p] of G; the part of either may be
        blocks of columns, [M, blocks, BLOCK].
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
        A view [M, columns_read(N) / BLOCK, BLOCK], or a copy where the seed is on the device; `a`
        itself where all columns are read.
    """
    columns = a.shape[1]
    count = columns_read(columns) // BLOCK
    if columns_read(columns) == columns:
        return a
    apart = columns // BLOCK // count
    first = seed % apart
    if isinstance(first, Tensor):
        blocks = torch.arange(0, count * apart, apart, device=a.device) + first
        return a[:, : columns // BLOCK * BLOCK].unflatten(1, (-1, BLOCK)).index_select(1, blocks)
    return a[:, first * BLOCK :].unfold(1, BLOCK, apart * BLOCK)[:, :count]


def with_floor(scores: Tensor) -> Tensor:
    """Scores that are all above zero: a tenth of their mean more, or equal ones if all are zero.

    Scores that are not finite stay so and do not count in the mean.

    Args:
        scores: [M], non-negative.
    """
    finite = scores.nan_to_num(nan=0.0, posinf=0.0)
    return scores.add(finite.mean(dtype=torch.float64), alpha=_FLOOR).clamp_(min=_LEAST)
