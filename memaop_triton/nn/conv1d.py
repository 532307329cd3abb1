"""The linear layer of GPT-2 and its kin, `transformers.pytorch_utils.Conv1D`, converted.

It computes y = x W + b with a weight of shape [in_features, out_features], the transpose of that of
`nn.Linear`. The library never imports transformers: if a model has such a layer, somebody else did.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import cast

import torch.fx
from torch import Tensor, nn

from memaop_triton.nn.linear import MemAOPLayer, traced


class MemAOPConv1D(MemAOPLayer):
    """What a `Conv1D` becomes: the same weight, [in_features, out_features], and name of it.

    The gradient of the weight is computed in that orientation, so that no copy of it is transposed.
    In evaluation mode, and where `ratio="auto"` finds exact gradients best, the layer computes by
    the forward pass of transformers. Layers are converted by `convert_`; there is no constructor.
    """

    is_transposed = True

    nf: int

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """N, the first size of the weight."""
        # Not the shape itself, which a wrapper may change; older releases keep only `nf`.
        nx: int = getattr(self, "nx", 0) or self.weight.shape[0]
        return nx

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """P, the second size of the weight."""
        return self.nf

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        dense: Callable[[Tensor], Tensor] = super().forward
        if isinstance(x, torch.fx.Proxy):
            call: Tensor = traced(self, x, dense)
            return call
        if self._is_dense():
            return dense(x)
        return self._compute(x, self.weight.t(), cast("Tensor | None", self.bias))

    __repr__ = nn.Module.__repr__  # that of Conv1D shows its sizes only


def conv1d_class() -> type[nn.Module] | None:
    """The class `Conv1D` of transformers; `None` if nobody has imported it."""
    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None
