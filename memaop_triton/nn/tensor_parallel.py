"""Linear layers whose weight is divided among processes (`ColwiseParallel`, `RowwiseParallel`).

The weight [P, N] is then a `DTensor`. With W in rows, `Shard(0)`, every process has all of X and
some columns of G; with W in columns, `Shard(1)`, some columns of X and all of G. Each computes its
part of dW from its part of the operands and has a memory of its own for these columns,
independently of the others. The parts form one gradient because all use the same rows: the squared
score of a row is the sum over the processes of its squared local scores, because the local score is
the norm of what the row would add to the local part of dW; and the selection of the group's first
process is used by all. A backward pass takes one reduction of M numbers and one broadcast of 2K.

Along the other dimensions of a mesh the weight may be replicated. Every process then estimates the
gradient from the rows it has: the estimates are added up if these rows are different ones, and
averaged if they are the same, so that the copies of the weight stay equal.

A layer that has a plain weight in a model that is otherwise divided takes no part in this. As with
dropout, its copies stay equal only if the processes draw the same numbers: seed them alike.

This module loads `torch.distributed.tensor`; it is imported where a weight is a `DTensor`, only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from memaop_triton.backward.shards import ProcessShards
from memaop_triton.nn.functional import linear_of_state
from memaop_triton.nn.layer_state import LayerState


class _Along(NamedTuple):
    """How a layer's operands lie along one dimension of the mesh.

    `x` and `b` are what a process works on, the gradients `dx`, `dw` and `db` what it computes.
    """

    x: Placement
    y: Placement
    dx: Placement
    dw: Placement
    b: Placement
    db: Placement


def local_sizes(weight: Tensor) -> tuple[int, int]:
    """N and P of the part of a weight ([P, N], `DTensor`) that this process has."""
    local = cast(DTensor, weight).to_local()
    return local.shape[1], local.shape[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, state: LayerState) -> Tensor:
    """y = x Wᵀ + b for a weight that is a `DTensor`, with the layer's approximate backward pass.

    Args:
        x: `DTensor`, [..., N], in the weight's dtype. It is redistributed if need be: a weight in
            `Shard(0)` takes `Replicate()`, one in `Shard(1)` takes `Shard(-1)`.
        weight: `DTensor`, [P, N].
        bias: `DTensor`, [P], or `None`.
        state: Configuration and memory. A memory for other columns than those of this process is
            emptied and becomes one for them.

    Returns:
        `DTensor`, [..., P]: `Shard(-1)` for a weight in `Shard(0)`, `Partial()` for `Shard(1)`.
        The parameters' gradients have the parameters' placements.

    Raises:
        TypeError: `x` or `bias` is not a `DTensor`.
        ValueError: The weight is divided along several dimensions of the mesh or in another way, or
            leaves a process without a part; the operands are on different meshes; or the
            configuration has a budget.
    """
    x, weight, bias = _checked(x, weight, bias)
    if state.config.budget is not None:
        raise ValueError(
            f"budget={state.config.budget} would buy different numbers of rows in the processes "
            "among which the weight is divided: give ratio and rank instead."
        )
    mesh = weight.device_mesh
    divided = _divided_dimension(weight)
    approximates_dx = state.config.grad_input is not None
    along = [
        _along(of_x, of_weight, x.dim() - 1, approximates_dx)
        for of_x, of_weight in zip(x.placements, weight.placements, strict=True)
    ]
    # Where the same rows meet the same part of the weight, each process makes its own estimate.
    copies = 1
    for dimension, a in enumerate(along):
        copies *= mesh.size(dimension) if a.x == a.y == Replicate() else 1
    placements = tuple(a.x for a in along)
    # A partial gradient stays partial: the operation that made x reduces or scatters it.
    x = x if x.placements == placements else x.redistribute(placements=placements)
    x_part = _part(x, [a.dx for a in along], copies if approximates_dx else 1)
    w_part = _part(_kept(weight), [a.dw for a in along], copies)
    b_part = None
    if bias is not None:
        bias = _kept(bias).redistribute(placements=[a.b for a in along])
        b_part = _part(bias, [a.db for a in along])
    if divided is not None:
        state.shards = ProcessShards(mesh.get_group(divided))
        is_sum = along[divided].y.is_partial()
        if b_part is not None and is_sum and mesh.get_local_rank(divided) != 0:
            # Added once to a sum over processes: here zeros, with the gradient of a bias.
            b_part = b_part - b_part.detach()
    state.fit(w_part.shape[1], w_part.shape[0])
    y = linear_of_state(x_part, w_part, b_part, state)
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    stride = torch.empty(shape, device="meta").stride()
    of_y = [a.y for a in along]
    return DTensor.from_local(y, mesh, of_y, run_check=False, shape=shape, stride=stride)


def _along(of_x: Placement, of_weight: Placement, last: int, approximates_dx: bool) -> _Along:
    """What a weight's placement requires; `last` is the last dimension of x and y."""
    same, total = Replicate(), Partial()
    if of_weight == Shard(0):
        return _Along(same, Shard(last), total, Shard(0), Shard(0), Shard(0))
    if of_weight == Shard(1):
        return _Along(Shard(last), total, Shard(last), Shard(1), same, same)
    if type(of_x) is Shard and of_x.dim != last:
        return _Along(of_x, of_x, of_x, total, same, total)
    return _Along(same, same, total if approximates_dx else same, total, same, same)


def _kept(parameter: DTensor) -> DTensor:
    """The parameter itself, whose gradient is brought into the parameter's placements."""
    return parameter.redistribute(placements=parameter.placements)


def _part(a: DTensor, grad_placements: Sequence[Placement], copies: int = 1) -> Tensor:
    """What this process has of `a`; the gradient of one of so many copies counts for its share."""
    part = a.to_local(grad_placements=grad_placements)
    if copies > 1 and part.requires_grad:
        part.register_hook(lambda grad: grad / copies)
    return part


def _divided_dimension(weight: DTensor) -> int | None:
    """The dimension of the mesh along which a weight is divided, `None` if it is replicated.

    Raises:
        ValueError: The weight is placed in another way, or a process has no part of it.
    """
    mesh = weight.device_mesh
    placed = f"weight {tuple(weight.shape)} has placements {weight.placements} on {mesh}"
    dimensions = [d for d, p in enumerate(weight.placements) if p != Replicate()]
    if len(dimensions) > 1 or any(
        weight.placements[d] not in (Shard(0), Shard(1)) for d in dimensions
    ):
        raise ValueError(
            f"{placed}: it may be divided along one dimension of the mesh, by Shard(0) "
            "(ColwiseParallel) or Shard(1) (RowwiseParallel), and must be Replicate() along the "
            "others."
        )
    if not dimensions:
        return None
    (divided,) = dimensions
    parts = mesh.size(divided)
    features = weight.shape[cast(Shard, weight.placements[divided]).dim]
    if (parts - 1) * -(-features // parts) >= features:
        raise ValueError(
            f"{placed}: {features} features leave the last of {parts} processes without any. Use "
            "fewer processes, or leave the layer out of the conversion."
        )
    return divided


def _checked(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[DTensor, DTensor, DTensor | None]:
    """The operands, all `DTensor`s on one mesh."""
    weight = cast(DTensor, weight)
    for name, operand in (("x", x), ("bias", weight if bias is None else bias)):
        if not isinstance(operand, DTensor):
            raise TypeError(
                f"{name} is a plain tensor, but weight is a DTensor with placements "
                f"{weight.placements}: make it one, as ColwiseParallel and RowwiseParallel do."
            )
        if operand.device_mesh != weight.device_mesh:
            raise ValueError(
                f"{name} is on {operand.device_mesh}, but weight is on {weight.device_mesh}: they "
                "must be on the same mesh."
            )
    return cast(DTensor, x), weight, cast(DTensor | None, bias)
