"""Modules that hold several weights and compute with them, taken apart into layers.

An `nn.MultiheadAttention` multiplies by a packed weight of its own, and the experts of
transformers by Parameters of three dimensions. Nobody calls a layer there that could be
converted. A `Host` is such a module with its class exchanged: it has a `Projection` for each of its
products and calls it, and hands it the weight. Projections have no Parameters, so that names,
optimizers and `state_dict` stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memaop_triton.nn.classes import Converted, exchange_class, stands_for_dense
from memaop_triton.nn.linear import MemAOPLayer

# What `fully_shard` notes about the modules that it finds, of which it gathers the whole weights.
# That a host has them counts for projections that are made afterwards.
_MARKS_OF_FSDP = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


class Source(NamedTuple):
    """Where the weight of a `Projection` is.

    Attributes:
        parameters: Those of the host by name: its dictionary itself, in which PyTorch replaces
            them. A link to the host would be a circle.
        weight: Name of the weight's.
        bias: Name of the bias's; "" if it has none.
        part: Which of three equal parts of the rows; `None` for the whole weight and bias.
        is_whole: Whether the weight is whole all the same, as opposed to the bias.
    """

    parameters: dict[str, nn.Parameter | None]
    weight: str
    bias: str = ""
    part: int | None = None
    is_whole: bool = False


class Projection(nn.Module):
    """A product of a host as a linear layer, of which it has no Parameters.

    Args:
        source: Where the weight and bias are.
        in_features: N.
        out_features: P.
        is_expected: Whether the host is known, or may be expected, to call it. Others are not
            converted.
    """

    def __init__(
        self, source: Source, in_features: int, out_features: int, *, is_expected: bool = True
    ) -> None:
        super().__init__()
        self.source = source
        self.in_features = in_features
        self.out_features = out_features
        self.is_expected = is_expected

    @property
    def weight_parameter(self) -> nn.Parameter | None:
        """The host's Parameter that the weight is, or is a part of; `None` if it is computed."""
        return self.source.parameters.get(self.source.weight)

    @property
    def weight(self) -> Tensor | None:
        """The weight, to be looked at."""
        whole = self.weight_parameter
        is_part = self.source.part is not None and not self.source.is_whole
        return _part_of(whole, self.source.part if is_part else None)

    @property
    def bias(self) -> Tensor | None:
        """The bias, to be looked at."""
        return _part_of(self.source.parameters.get(self.source.bias), self.source.part)

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in_features] to [..., out_features], with what the host hands over."""
        return F.linear(input, weight, bias)

    def extra_repr(self) -> str:
        """Sizes, and whose weight it is."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        part = (
            "" if self.source.part is None or self.source.is_whole else f", part={self.source.part}"
        )
        return f"{sizes}, weight={self.source.weight}{part}"


@stands_for_dense
class MemAOPProjection(MemAOPLayer, Projection):
    """A `Projection` whose backward pass is computed as configured by `config`."""

    dense_class: type[nn.Module] = Projection

    weight_parameter = Projection.weight_parameter

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in_features] to [..., out_features], with what the host hands over."""
        if self._is_dense():
            return F.linear(input, weight, bias)
        return self._compute(input, weight, bias)


class Host(Converted):
    """A module that calls a layer for each of its products in training."""

    def make_projections(self, *, role: str = "") -> Mapping[str, Projection]:
        """New ones by name, for a module that is known to be used in one way; "" is any way."""
        raise NotImplementedError

    def layers(self) -> list[nn.Module]:
        """The layers that it is expected to call."""
        raise NotImplementedError

    def needs_layers(self) -> bool:
        """Whether it has to call them, because one does not compute as its dense class would."""
        return self.training and not all(
            isinstance(layer, MemAOPLayer) and layer.layer_state.is_native
            for layer in self.layers()
        )

    @property
    def is_converted(self) -> bool:
        """Whether one of its layers is."""
        return any(isinstance(layer, MemAOPLayer) for layer in self.children())

    def __prepare_scriptable__(self) -> nn.Module:
        # Called by torch.jit.script, which would put what is returned into the model itself.
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: revert_(model) first, or "
            "script a reverted copy."
        )

    def conceal_(self) -> None:
        """Turn it back into what it was, without its projections."""
        for name in [n for n, child in self._modules.items() if isinstance(child, Projection)]:
            del self._modules[name]
        self._exchange_back()


def weight_parameter_of(layer: nn.Module) -> nn.Parameter | None:
    """What the gradient of a layer's weight is one of, dense or converted; `None` if computed."""
    if isinstance(layer, Projection):
        return layer.weight_parameter
    return layer._parameters.get("weight")


def expose_(module: nn.Module, kind: type[Host], role: str = "") -> None:
    """Turn a module into a host, with dense projections; nothing happens if a name is taken."""
    plain, is_host = type(module), False
    exchange_class(module, kind)
    assert isinstance(module, Host)
    try:
        made = module.make_projections(role=role)
        is_host = not any(hasattr(module, name) for name in made)
    finally:
        if not is_host:
            module.__class__ = plain  # type: ignore[assignment]
    if not is_host:
        return
    marks = {name: value for name, value in vars(module).items() if name in _MARKS_OF_FSDP}
    for name, projection in made.items():
        vars(projection).update(marks)
        module._modules[name] = projection.train(module.training)


def _part_of(whole: Tensor | None, part: int | None) -> Tensor | None:
    return whole if whole is None or part is None else torch.chunk(whole, 3)[part]
