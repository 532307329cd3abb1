"""Which modules of a model are taken apart into layers, as long as one of these is converted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from memaop_triton.nn.attention import MemAOPMultiheadAttention, roles_of
from memaop_triton.nn.classes import class_below_fsdp, has_own_forward
from memaop_triton.nn.experts import MemAOPExperts, can_be_taken_apart
from memaop_triton.nn.packed import Host, expose_


@contextlib.contextmanager
def exposed(model: nn.Module, targets: str, *, subclasses: bool = False) -> Iterator[None]:
    """Inside, the modules of `model` that hold packed weights have layers that can be converted.

    Afterwards those of which no layer was converted are what they were before.

    Args:
        model: Any module.
        targets: As for `convert_`: nothing is exposed unless it is `"all"`.
        subclasses: Also expose subclasses that have no forward pass of their own.
    """
    try:
        if targets == "all" and isinstance(model, nn.Module):
            _expose_(model, subclasses)
        yield
    finally:
        if isinstance(model, nn.Module):
            conceal_(model)


def _expose_(model: nn.Module, subclasses: bool) -> None:
    roles = roles_of(model)
    for module in list(model.modules()):
        kind = host_kind_of(module)
        if kind is MemAOPMultiheadAttention:
            is_exact = class_below_fsdp(type(module)) is nn.MultiheadAttention
            if is_exact or subclasses:
                expose_(module, kind, roles.get(id(module), ""))
        elif kind is not None:
            expose_(module, kind)


def host_kind_of(module: nn.Module) -> type[Host] | None:
    """What a module can be exposed as; `None` if it cannot, or is."""
    if isinstance(module, Host):
        return None
    if isinstance(module, nn.MultiheadAttention):
        is_own = has_own_forward(module, nn.MultiheadAttention)
        return None if is_own else MemAOPMultiheadAttention
    return MemAOPExperts if can_be_taken_apart(module) else None


def hosts_of(model: nn.Module) -> dict[str, Host]:
    """The exposed modules of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Host)}


def conceal_(model: nn.Module) -> None:
    """Turn hosts of which no layer is converted back into what they were."""
    for host in hosts_of(model).values():
        if not host.is_converted:
            host.conceal_()
