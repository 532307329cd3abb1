"""Other ways to hold less between forward and backward pass, in plain PyTorch.

| name | what is held | gradients | source |
|---|---|---|---|
| `checkpoint` | the inputs of blocks | exact | Chen et al., arXiv 1604.06174 |
| `forward-wta` | K rows of a layer's inputs | unbiased | Liu et al., arXiv 2305.15265 |
| `saved-int8` | all of it in 8 bits a number | biased | plain rounding |

Each changes a model in place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memaop_triton.bench.suites.baselines import draw_winners_and_others

# Scales would outweigh what shorter rows have to spare.
_SHORTEST_ROW = 16


def checkpoint_(blocks: Iterable[nn.Module]) -> None:
    """Hold the inputs of `blocks` and compute them again in the backward pass."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def sample_in_forward_(model: nn.Module, ratio: float) -> None:
    """Let trained linear layers keep a share of the rows of their inputs.

    As WTA-CRS does, rows are drawn before G is known. Its released code remembers norms of G from
    the last time that a sample was seen; without such a memory scores are ‖x_m‖, as here.
    """
    for module in model.modules():
        if _is_trained_linear(module):
            module.forward = functools.partial(_sampled, module, ratio)


def _is_trained_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.weight.requires_grad


def _sampled(layer: nn.Module, ratio: float, x: Tensor) -> Tensor:
    result: Tensor = _SampledInForward.apply(x, layer.weight, layer.bias, ratio)
    return result


class _SampledInForward(torch.autograd.Function):
    """y = x Wᵀ + b, whose backward pass has K rows of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ratio: float) -> Tensor:
        rows = x.flatten(0, -2)
        scores = vector_norm(rows, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
        chosen, weights = draw_winners_and_others(scores, max(1, round(ratio * len(rows))))
        ctx.save_for_backward(rows.index_select(0, chosen), chosen, weights, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kept, chosen, weights, weight = ctx.saved_tensors
        g = grad_output.flatten(0, -2)
        scaled = g.index_select(0, chosen).mul_(weights.to(g.dtype).unsqueeze(1))
        dx = grad_output @ weight if ctx.needs_input_grad[0] else None
        return dx, scaled.t() @ kept, g.sum(0) if ctx.needs_input_grad[2] else None, None


class _Rounded(NamedTuple):
    """A tensor in 8 bits a number.

    Attributes:
        numbers: int8, of the tensor's shape.
        scales: One for each row.
    """

    numbers: Tensor
    scales: Tensor

    @classmethod
    def of(cls, a: Tensor) -> _Rounded:
        scales = a.abs().amax(-1, keepdim=True).div_(127).clamp_(min=torch.finfo(a.dtype).tiny)
        return cls((a / scales).round_().to(torch.int8), scales)

    def restore(self) -> Tensor:
        return self.numbers.to(self.scales.dtype).mul_(self.scales)


def compress_saved_(model: nn.Module) -> None:
    """Round the floating-point tensors that autograd saves, less the Parameters.

    What several operations save of one storage is rounded once. Short rows are kept as they are.
    """
    forward = model.forward

    @functools.wraps(forward)
    def compressed(*args: Any) -> Any:
        lasting = {p.untyped_storage().data_ptr() for p in model.parameters()}
        pack = functools.partial(_pack, lasting, {})
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return forward(*args)

    model.forward = compressed


def _pack(
    lasting: set[int], made: dict[Any, tuple[StorageWeakRef, _Rounded]], a: Tensor
) -> Tensor | _Rounded:
    storage = a.untyped_storage()
    is_short = a.dim() == 0 or a.shape[-1] < _SHORTEST_ROW
    if not a.is_floating_point() or is_short or storage.data_ptr() in lasting:
        return a
    place = storage.data_ptr(), a.storage_offset(), a.shape, a.stride(), a._version
    if place in made and not made[place][0].expired():
        return made[place][1]
    rounded = _Rounded.of(a)
    made[place] = StorageWeakRef(storage), rounded
    return rounded


def _unpack(saved: Tensor | _Rounded) -> Tensor:
    return saved.restore() if isinstance(saved, _Rounded) else saved
