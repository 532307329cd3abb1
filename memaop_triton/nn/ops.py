"""The backward passes as operators, `torch.ops.memaop_triton.*`, for compilers and FLOP counters.

Each takes the handle of a `LayerState`, whose memory it reads and updates. Those of the backward
pass declare that they write to `order`: a compiler that reorders a program keeps these operators in
sequence, so a compiled step draws the same numbers as an eager one. A gradient that is not required
is returned with shape [0]. `stash` is what a compiled forward pass keeps of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from memaop_triton.backward.input_grad import (
    flops_of_input_grad,
    input_grad_with_subspace,
    projected_input_grad,
    sampled_input_grad,
    select_for_both,
)
from memaop_triton.backward.step import Gradients
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.flops import weight_grad_flops
from memaop_triton.kernels.cpu.stash import bytes_of_row, widths
from memaop_triton.kernels.cpu.torch_ops import score_dtype
from memaop_triton.memory.kinds import SubspaceMemory, rows_to_compute
from memaop_triton.memory.stash import BITS, Stash
from memaop_triton.nn import layer_state
from memaop_triton.nn.layer_state import LayerState
from memaop_triton.nn.stashing import new_stash, stash_of
from memaop_triton.sampling.selection import Selection

# Unsafe in the CUDA graphs that Inductor cuts a program into, because the operators keep tensors
# from one step to the next: it runs them between two graphs, as in eager mode.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    torch.Tag.nondeterministic_seeded,
    torch.Tag.cudagraph_unsafe,
)


def _weight_grad(
    x: Tensor,
    kept: Sequence[Tensor],
    g: Tensor,
    handle: Tensor,
    order: Tensor,
    *,
    bias_grad: bool,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """dW [P, N] and db [P] from x [M, N] and g [M, P], as configured in `handle`'s state.

    `kept` is what is left of x, whose shape is [0] then. With `transposed` dW is a view of what is
    contiguous as [N, P].
    """
    state = layer_state.find(handle.shape[0])
    dw, db = _gradients(state, _inputs(state, x, kept), g, bias_grad, transposed)
    return dw, g.new_empty(0) if db is None else db


def _inputs(state: LayerState, x: Tensor, kept: Sequence[Tensor]) -> Tensor | Stash:
    return stash_of(kept, state, x.dtype) if kept else x


def _gradients(
    state: LayerState,
    x: Tensor | Stash,
    g: Tensor,
    bias_grad: bool,
    transposed: bool,
    selection: Selection | None = None,
) -> Gradients:
    gradients = weight_and_bias_grad(
        x,
        g,
        state.config,
        state.memory,
        bias_grad=bias_grad,
        selection=selection,
        shards=state.shards,
        factors=state.factors,
        observer=state.step_observer or state.observer,
        is_transposed=transposed,
    )
    if state.on_weight_grad is not None:
        dw = gradients.weight
        state.on_weight_grad(dw.t() if transposed else dw)
    return gradients


def _weight_grad_fake(
    x: Tensor,
    kept: Sequence[Tensor],
    g: Tensor,
    *_: Any,
    bias_grad: bool,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    columns = kept[-1].shape[1] if kept else x.shape[1]
    dw = _new_weight_grad(x, g.shape[1], columns, transposed)
    return dw, g.new_empty(g.shape[1] if bias_grad else 0)


def _new_weight_grad(x: Tensor, p: int, n: int, transposed: bool) -> Tensor:
    return x.new_empty((n, p)).t() if transposed else x.new_empty((p, n))


def _sampled_backward(
    x: Tensor,
    kept: Sequence[Tensor],
    g: Tensor,
    weight: Tensor,
    handle: Tensor,
    order: Tensor,
    *,
    weight_grad: bool,
    bias_grad: bool,
    is_frozen: bool,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX [M, N], sampled or projected, dW [P, N] and db [P] from x [M, N] and g [M, P].

    Sampled from the same rows, unless a subspace memory gives each scores of its own. `x` may have
    shape [0] if no weight gradient is required, or if it was `kept` in another form. With a frozen
    weight there is no step of dW, so that of dX advances the memory. `transposed` as above.
    """
    state = layer_state.find(handle.shape[0])
    config, memory = state.config, state.memory
    inputs = _inputs(state, x, kept)
    selection = dx = None
    is_empty = g.numel() == 0 or weight.numel() == 0
    k = 0 if is_empty else rows_to_compute(config, memory, len(g), weight.shape[1], g.shape[1])
    if is_empty or k == len(g):
        dx = g @ weight
    elif not isinstance(memory, SubspaceMemory):
        selection = select_for_both(
            inputs if weight_grad else None, g, config, k, shards=state.shards
        )
        dx = sampled_input_grad(g, weight, selection, config)
    dw, db = x.new_empty(0), None
    if weight_grad:
        dw, db = _gradients(state, inputs, g, bias_grad, transposed, selection)
    elif bias_grad:
        db = g.sum(0)
    if dx is None:
        # After dW, whose step makes the bases and chooses among them.
        assert isinstance(memory, SubspaceMemory)
        if config.projected is not None:
            dx = projected_input_grad(g, weight, config, memory)
        else:
            dx = input_grad_with_subspace(
                g, weight, config, memory, shards=state.shards, is_alone=is_frozen
            )
    return dx, dw, g.new_empty(0) if db is None else db


def _sampled_backward_fake(
    x: Tensor,
    kept: Sequence[Tensor],
    g: Tensor,
    weight: Tensor,
    *_: Any,
    weight_grad: bool,
    bias_grad: bool,
    transposed: bool = False,
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = g.new_empty((g.shape[0], weight.shape[1]))
    p, n = weight.shape
    dw = _new_weight_grad(x, p, n, transposed) if weight_grad else x.new_empty(0)
    return dx, dw, g.new_empty(g.shape[1] if bias_grad else 0)


def _stash(
    x: Tensor, handle: Tensor, *, out_features: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a `Stash` of x [M, N], for a weight with so many rows.

    What is kept inside of a subspace has the rank of the memory's bases, whatever is in use, and
    nothing is where that may change. The operator writes nothing: a compiler that divides a step
    into forward and backward pass could not order writes of both.
    """
    state = layer_state.find(handle.shape[0])
    rank = _rank_of_stash(state)
    stash = new_stash(x, out_features, state, has_inside=rank > 0)
    numbers, scales, norms, seed, z, expand = stash.tensors
    padding = rank - len(expand)
    z, expand = F.pad(z, (0, padding)), F.pad(expand, (0, 0, 0, padding))
    return numbers, scales, norms, seed, z, expand


def _stash_fake(x: Tensor, handle: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    # A size that was different in an earlier graph is symbolic.
    state = layer_state.find(int(handle.shape[0]))
    (rows, columns), rank = x.shape, _rank_of_stash(state)
    bits = BITS[state.stash]
    return (
        x.new_empty((rows, bytes_of_row(columns, bits)), dtype=torch.uint8),
        x.new_empty((rows, len(widths(columns))), dtype=torch.bfloat16),
        x.new_empty(rows, dtype=score_dtype(x.dtype)),
        x.new_empty(1, dtype=torch.int64),
        x.new_empty((rows, rank), dtype=torch.bfloat16),
        x.new_empty((rank, columns), dtype=torch.bfloat16),
    )


def _rank_of_stash(state: LayerState) -> int:
    """A size that no step changes: a graph is compiled for it."""
    memory = state.memory
    if not isinstance(memory, SubspaceMemory) or memory.choice.is_rank_open:
        return 0
    return memory.choice.max_rank if "input" in memory.bases else 0


def register_operator(
    name: str, compute: Callable[..., Any], fake: Callable[..., Any], *, writes: Sequence[str] = ()
) -> None:
    """Make `compute` an operator of PyTorch, of whose results `fake` has shapes and dtypes."""
    schema = torch.library.infer_schema(compute, mutates_args=tuple(writes))
    torch.library.define(name, schema, tags=_TAGS)
    torch.library.impl(name, "CompositeExplicitAutograd", compute)
    torch.library.register_fake(name, fake)


register_operator("memaop_triton::stash", _stash, _stash_fake)
register_operator("memaop_triton::weight_grad", _weight_grad, _weight_grad_fake, writes=["order"])
register_operator(
    "memaop_triton::sampled_backward", _sampled_backward, _sampled_backward_fake, writes=["order"]
)


# What `FlopCounterMode` reports: products of matrices, as for PyTorch's own operators.


@register_flop_formula(torch.ops.memaop_triton.weight_grad)
def _flops_of_weight_grad(
    x: torch.Size,
    kept: Sequence[torch.Size],
    g: torch.Size,
    handle: torch.Size,
    *_: Any,
    **__: Any,
) -> int:
    (m, p), n = g, kept[-1][1] if kept else x[1]
    return flops_of_state(layer_state.find(handle[0]), m, n, p)


def flops_of_state(state: LayerState, m: int, n: int, p: int) -> int:
    """Of a layer's weight gradient from so many rows of these lengths."""
    k = rows_to_compute(state.config, state.memory, m, n, p)
    subspace = state.memory.cost if isinstance(state.memory, SubspaceMemory) else None
    return weight_grad_flops(m, n, p, k, subspace, state.config.numbers_scored(n, p))


@register_flop_formula(torch.ops.memaop_triton.sampled_backward)
def _flops_of_sampled_backward(
    x: torch.Size,
    kept: Sequence[torch.Size],
    g: torch.Size,
    weight: torch.Size,
    handle: torch.Size,
    *_: Any,
    weight_grad: bool,
    **__: Any,
) -> int:
    (m, p), n = g, weight[1]
    state = layer_state.find(handle[0])
    dx = flops_of_input_grad(state.config, state.memory, m, n, p)
    return dx + (_flops_of_weight_grad(x, kept, g, handle) if weight_grad else 0)
