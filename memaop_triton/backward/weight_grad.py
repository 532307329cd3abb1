"""The backward pass of a linear layer: which rows are computed, and by what.

`weight_and_bias_grad` checks its operands and hands them to the step of the memory that the
configuration names, in plain PyTorch and C (`steps_torch`) or in Triton (`steps_triton`).
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from memaop_triton.backward import steps_patches, steps_stash, steps_torch
from memaop_triton.backward.shards import ProcessShards
from memaop_triton.backward.step import Factors, Gradients, Observer, Operands
from memaop_triton.config import MemAOPConfig
from memaop_triton.dispatch import runs_triton
from memaop_triton.memory.kinds import (
    Memory,
    ResidualMemory,
    SubspaceMemory,
    check_memory,
    rows_to_compute,
)
from memaop_triton.memory.maps import Maps
from memaop_triton.memory.patches import Patches
from memaop_triton.memory.row_source import RowSource
from memaop_triton.memory.stash import Stash
from memaop_triton.sampling.selection import Selection


def weight_grad(
    x: Tensor,
    g: Tensor,
    config: MemAOPConfig,
    memory: Memory | None = None,
    *,
    selection: Selection | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Approximate dW = Gᵀ X from K of its M outer products, and update the memory.

    Args:
        x: Inputs, [M, N], floating point. Rows with NaN or Inf reach the result.
        g: Gradient of the loss with respect to the output, [M, P], dtype and device of `x`.
        config: What to compute.
        memory: What `new_memory(config, N, P)` made; updated in place.
        selection: Rows and weights to use instead of scoring `x` and `g`; not for row memories.
        generator: Source of all draws; the device's default one if `None`.

    Returns:
        [P, N] in the dtype of `x`. Zeros for an empty batch, Gᵀ X itself when K = M and no row
        memory holds anything.

    Raises:
        ValueError: Shapes do not fit, or `memory` is not of the kind that `config` specifies.
        TypeError: `x` is not floating point, or `g` has another dtype.
        RuntimeError: `MEMAOP_TRITON_BACKEND=triton`, and no Triton kernel supports these operands.
    """
    return weight_and_bias_grad(
        x, g, config, memory, bias_grad=False, selection=selection, generator=generator
    ).weight


def weight_and_bias_grad(
    x: Tensor | RowSource,
    g: Tensor | Maps,
    config: MemAOPConfig,
    memory: Memory | None = None,
    *,
    bias_grad: bool = True,
    selection: Selection | None = None,
    generator: torch.Generator | None = None,
    shards: ProcessShards | None = None,
    factors: list[Factors] | None = None,
    observer: Observer | None = None,
    is_transposed: bool = False,
) -> Gradients:
    """`weight_grad`, and with `bias_grad` also the exact db = Σ_m g_m ([P]).

    Args:
        x: Inputs, or what their rows can be made of, a `Stash` or `Patches`.
        g: As there; with `Patches` the maps that its rows are made of.
        shards: The processes that hold other columns of X or G: all select the same rows.
        factors: Receives the selected rows, weighted: two matrices whose product is dW; nothing
            where the gradient is exact.
        observer: Records the step, unless the batch is empty or the memory is skipped.
        is_transposed: Return dW as a view of dWᵀ, [N, P], which is contiguous.
    """
    patches = x if isinstance(x, Patches) else None
    if patches is not None and patches.geometry.is_pointwise:
        x = patches.matrix()
        g = g.matrix() if isinstance(g, Maps) else g
    _check_operands(x, g)
    check_memory(config, memory, x.shape[1], g.shape[1])
    (rows, n), p = x.shape, g.shape[1]
    if 0 in (rows, n, p):
        g = g.matrix() if isinstance(g, Maps) else g
        dw = g.new_zeros((n, p)).t() if is_transposed else g.new_zeros((p, n))
        return Gradients(dw, g.sum(0) if bias_grad else None)
    is_skipped = isinstance(memory, ResidualMemory) and memory.is_paused
    observer = None if is_skipped else observer
    if observer is not None:
        observer.begin_step(x.device)
    k = rows_to_compute(config, memory, rows, n, p)
    if isinstance(memory, SubspaceMemory) and k < rows:
        choice = memory.side, memory.rank
        memory.begin_step(x, g, config, generator)
        if (memory.side, memory.rank) != choice:
            k = rows_to_compute(config, memory, rows, n, p)
    operands = Operands(
        x, g, config, k, bias_grad, generator, shards, factors, observer, is_transposed, patches
    )
    if not isinstance(x, Tensor):
        if k < rows and isinstance(x, Stash):
            return steps_stash.sampled(operands, memory, selection)
        if k < rows:
            return steps_patches.sampled(operands, memory)
        exact = steps_stash.exact if isinstance(x, Stash) else steps_patches.exact
        result = exact(operands)
        if observer is not None:
            observer.observe_exact(operands, result.weight, memory)
        return result
    step = _steps_for(x, memory)
    # The memory is empty and every row is computed: nothing is left to store, no slots are made.
    is_untouched = isinstance(memory, ResidualMemory) and k == rows and memory.rows == 0
    if isinstance(memory, ResidualMemory) and not is_skipped and not is_untouched:
        result = step.with_row_memory(operands, memory)
    elif k == rows:
        result = Gradients(operands.product(x, operands.g), operands.sum_rows())
        if observer is not None:
            observer.observe_exact(operands, result.weight, memory)
    elif isinstance(memory, SubspaceMemory) and memory.rank:
        result = step.with_subspace(operands, memory, selection)
    else:
        result = step.without_memory(operands, selection)
        if isinstance(memory, SubspaceMemory):
            memory.end_step(x)
    return result


def _steps_for(x: Tensor, memory: Memory | None) -> ModuleType:
    """`steps_torch`, or `steps_triton`, which is imported only where it is used."""
    rank = memory.rank if isinstance(memory, SubspaceMemory) else 0
    memory_dtype = memory.dtype if isinstance(memory, ResidualMemory) else None
    return _steps_triton() if runs_triton(x, rank=rank, memory_dtype=memory_dtype) else steps_torch


@functools.cache
def _steps_triton() -> ModuleType:
    from memaop_triton.backward import steps_triton

    return steps_triton


def _check_operands(x: Tensor | RowSource, g: Tensor | Maps) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be of a floating-point dtype, got {x.dtype}.")
    if g.dtype != x.dtype:
        raise TypeError(f"g is {g.dtype} but x is {x.dtype}: they must agree.")
    if len(x.shape) != 2 or len(g.shape) != 2 or x.shape[0] != g.shape[0]:
        raise ValueError(
            f"x must be [M, N] and g [M, P], got {tuple(x.shape)} and {tuple(g.shape)}: flatten "
            "the leading dimensions into rows."
        )
