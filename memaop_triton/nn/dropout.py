"""Dropout in front of a layer that has a stash: the same numbers, its mask kept in one bit each.

PyTorch keeps the mask as bytes on a GPU and as numbers on a CPU, and what was dropped out besides,
for the layer that follows. Here the layer learns (`stashing.made_from`) which tensor that was made
of, and keeps a stash of this one, which it shares with other layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memaop_triton.memory.mask import Mask
from memaop_triton.nn.stashing import made_from


class MaskedDropout(nn.Dropout):
    """`torch.nn.Dropout` that keeps bits of its mask; with one seed the two are equal.

    It is made of an `nn.Dropout` by exchanging its class. In a compiled graph, under transforms of
    `torch.func` and for subclasses of `Tensor` it is `nn.Dropout`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., N] to [..., N]."""
        if not self._keeps_bits_of(input):
            return super().forward(input)
        dropped: Tensor
        dropped, *mask = _Dropout.apply(input, self.p)
        made_from(dropped, input, Mask(*mask))
        return dropped

    def _keeps_bits_of(self, input: Tensor) -> bool:
        return (
            self.training
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
            and not self.inplace
            and 0 < self.p < 1
            and type(input) is Tensor
            and input.dim() > 0
            and input.numel() > 0
        )


class _Dropout(torch.autograd.Function):
    """Dropout of x, [..., N], with a probability, and its `Mask`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
        dropped, kept = torch.native_dropout(x, p, train=True)
        mask = Mask.of(kept.reshape(-1, kept.shape[-1]), 1 / (1 - p))
        ctx.mark_non_differentiable(*mask)
        ctx.save_for_backward(*mask)
        return dropped, *mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        mask = Mask(*ctx.saved_tensors)
        return mask.apply(grad.reshape(-1, grad.shape[-1])).reshape(grad.shape), None
