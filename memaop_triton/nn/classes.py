"""Exchanging the class of a module for one with another forward pass, and back.

The module stays the same object, with its Parameters, hooks and names. Of every dense class there
is one converted class, made on demand; `fully_shard`, which exchanges classes too, may come before
or after.
"""

from __future__ import annotations

import sys
from typing import Any, Self, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", bound="Converted")


class Converted(nn.Module):
    """A module whose class was exchanged."""

    #: What it is turned back into.
    dense_class: type[nn.Module]
    #: Whose forward pass it has.
    kind: type[Converted]

    def check_revertible(self) -> None:
        """Raise `ValueError` if the dense class cannot be restored."""
        if _dense_class_of(type(self)) is None:
            raise ValueError(
                f"{type(self).__name__} was parametrised after it was converted: remove the "
                "parametrizations first."
            )

    def _exchange_back(self) -> Self:
        self.__class__ = _dense_class_of(type(self))  # type: ignore[assignment]
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is self.kind:
            return super().__reduce_ex__(protocol)
        # Other converted classes are made on demand and cannot be found by their names.
        return _blank, (self.dense_class, self.kind), self.__getstate__()


_classes: dict[type[nn.Module], type[Converted]] = {}
_sharded_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[Any]] = {}


def stands_for_dense(kind: type[C]) -> type[C]:
    """Make a class the one that modules of exactly its `dense_class` become."""
    kind.kind = kind
    _classes[kind.dense_class] = kind
    return kind


def exchange_class(module: nn.Module, kind: type[Converted]) -> None:
    """Give a module everything of its class but the forward pass, which is `kind`'s."""
    module.__class__ = _class_for(type(module), kind)


def has_own_forward(module: nn.Module, dense: type[nn.Module]) -> bool:
    """Whether a module computes something else than the class `dense`, of which it is."""
    return any(
        getattr(type(module), name, None) is not getattr(dense, name, None) or name in vars(module)
        for name in ("forward", "_conv_forward")  # that of a convolution calls the second
    )


def shallow_copy(module: M) -> M:
    """Another module with the same Parameters.

    One level deeper than copy.copy: the dictionaries of parameters and hooks are copied, what they
    hold is shared.
    """
    twin = type(module).__new__(type(module))
    for name, value in vars(module).items():
        vars(twin)[name] = value.copy() if isinstance(value, dict) else value
    return twin


def class_below_fsdp(module_class: type[M]) -> type[M]:
    """The class of a module before `fully_shard` was applied to it, by exchanging its class."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    bases = module_class.__bases__
    if fsdp is not None and len(bases) == 2 and issubclass(bases[0], fsdp.FSDPModule):
        below: type[M] = bases[1]
        return below
    return module_class


def _blank(dense_class: type[nn.Module], kind: type[Converted]) -> Converted:
    new_class = _class_for(dense_class, kind)
    return new_class.__new__(new_class)


def _class_for(dense_class: type[nn.Module], kind: type[Converted]) -> type[Converted]:
    if dense_class not in _classes:
        below = class_below_fsdp(dense_class)
        new_class: type[Converted]
        if below is not dense_class:
            new_class = _with_fsdp_of(dense_class, _class_for(below, kind))
        else:
            new_class = type(f"MemAOP{dense_class.__name__}", (kind, dense_class), {})
        new_class.dense_class, new_class.kind = dense_class, kind
        _classes[dense_class] = new_class
    return _classes[dense_class]


def _dense_class_of(converted_class: type[Converted]) -> type[nn.Module] | None:
    """What a class was before conversion; `None` if something else than FSDP came on top."""
    dense_class = converted_class.dense_class
    if converted_class is _classes[dense_class]:
        return dense_class
    if class_below_fsdp(converted_class) is _classes[dense_class]:
        return _with_fsdp_of(converted_class, dense_class)
    return None


def _with_fsdp_of(sharded_class: type[nn.Module], below: type[M]) -> type[M]:
    """The class that `fully_shard` would have made of `below`, as it made `sharded_class`."""
    key = (sharded_class, below)
    if key not in _sharded_classes:
        prefix = sharded_class.__name__.removesuffix(class_below_fsdp(sharded_class).__name__)
        bases = (sharded_class.__bases__[0], below)
        no_deepcopy = {"__deepcopy__": vars(sharded_class)["__deepcopy__"]}
        _sharded_classes[key] = type(prefix + below.__name__, bases, no_deepcopy)
    return _sharded_classes[key]
