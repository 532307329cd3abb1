"""The FLOPs of a model's weight gradients, of linear layers and of whatever else has weights.

In a product of a weight with something else the gradient of the weight takes as many operations as
the product itself. So the products of a forward pass are counted, each for the Parameter that is
one of its operands: whole, a view of it, a copy in another dtype, or the matrices of some experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_COPIES = frozenset((_aten._to_copy, _aten.clone))
# What picks the matrices of experts from a weight of three dimensions. Of two it is a table.
_GATHERS = frozenset((_aten.index, _aten.index_select))
_LOOK_UPS = frozenset((_aten.embedding, _aten.embedding_renorm_, _aten._embedding_bag))
_WITHOUT_PRODUCT = _GATHERS | _LOOK_UPS | {_aten.add, _aten.cat}
# Rows that come in groups, each multiplied by a matrix of its own; not in PyTorch's counter.
_GROUPED = frozenset(("aten::_grouped_mm", "transformers::grouped_mm_fallback"))


class WeightFlops(NamedTuple):
    """What the gradients of weights take in one step.

    Attributes:
        by_id: Operations by id of the Parameter; 0 where none are needed.
        is_estimate: Whether there are weights whose products could not be seen. They are taken to
            meet as many rows as the others do on average.
    """

    by_id: dict[int, float]
    is_estimate: bool


class CountingProducts(TorchDispatchMode):
    """Inside, products with `weights` are counted; enter it for a forward pass."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._flops: Counter[int] = Counter()
        self._is_gathered: set[int] = set()  # or added, without a product
        self._is_unknown: set[int] = set()
        self._parameters = {address_of(p): id(p) for p in weights}
        self._parameters.pop(None, None)
        self._copies: list[Tensor] = []  # alive, so that no other tensor takes their addresses

    def of_those_with_gradients(self, weights: Iterable[nn.Parameter]) -> WeightFlops:
        """Of the weights to which the backward pass gave a gradient."""
        trained = [w for w in weights if w.grad is not None]
        counted = [w for w in trained if self._flops[id(w)]]
        found: dict[int, float] = {id(w): self._flops[id(w)] for w in trained}
        elements = sum(w.numel() for w in counted)
        per_element = sum(found.values()) / elements if elements else 1.0
        unseen = [w for w in trained if not found[id(w)] and self._may_have_products(id(w))]
        return WeightFlops(found | {id(w): per_element * w.numel() for w in unseen}, bool(unseen))

    def _may_have_products(self, weight: int) -> bool:
        """Of what computes it the counter knows nothing, or it was nowhere to be seen."""
        return weight in self._is_unknown or weight not in self._is_gathered

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count an operation after it was carried out."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        operator, name = func._overloadpacket, func._schema.name
        for weight, operand in self._weights_among((args, kwargs)).items():
            if operator in flop_registry:
                self._flops[weight] += flop_registry[operator](*args, **kwargs, out_val=result)
            elif name in _GROUPED and operand.dim() == 3:
                self._flops[weight] += 2 * result.shape[0] * operand[0].numel()
            elif operator in _COPIES or (operator in _GATHERS and operand.dim() > 2):
                self._parameters[address_of(result)] = weight
                self._copies.append(result)
            elif operator in _WITHOUT_PRODUCT:
                self._is_gathered.add(weight)
            else:
                self._is_unknown.add(weight)
        return result

    def _weights_among(self, operands: object) -> dict[int, Tensor]:
        """Operands that lie in the memory of a weight, by its id."""
        tensors = (a for a in tree_leaves(operands) if isinstance(a, Tensor))
        found = ((self._parameters.get(address_of(a)), a) for a in tensors)
        return {weight: a for weight, a in found if weight is not None}


def address_of(tensor: Tensor) -> int | None:
    """Of the tensor's storage; `None` if it has none of its own, as a `DTensor` has not."""
    if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        return None
    return tensor.untyped_storage().data_ptr() or None
