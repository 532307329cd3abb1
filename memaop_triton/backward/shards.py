"""Collectives that make the parts of a divided layer one gradient: all take the same rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from memaop_triton.sampling.selection import Selection


class ProcessShards:
    """The processes of a group, each with other columns of the same rows of X or G.

    Args:
        group: Their process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def all_reduce_scores(self, scores: Tensor) -> Tensor:
        """√Σ s² over the shards: the scores of whole rows from those of their parts, [M].

        Where X is divided and G is not, or the other way round, this is the product of the norms of
        whole rows; float64, because squares of float32 scores may leave its range.
        """
        squares = scores.double().square()
        dist.all_reduce(squares, group=self.group)
        return squares.sqrt().to(scores.dtype)

    def broadcast_selection(self, selection: Selection) -> Selection:
        """The selection of the group's first process, in all of them.

        Its size must be the same everywhere. Both parts travel as float64, which holds every row
        number below 2⁵³ exactly.
        """
        both = torch.stack([selection.indices.double(), selection.weights.double()])
        dist.broadcast(both, group=self.group, group_src=0)
        return Selection(both[0].long(), both[1].to(selection.weights.dtype))
