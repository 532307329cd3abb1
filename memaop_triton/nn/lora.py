"""LoRA layers of PEFT whose adapters keep a stash of their inputs.

PEFT puts a layer around a linear one, y = W x + s B A dropout(x) (LoRA, arXiv 2106.09685). W is
frozen and needs no inputs in the backward pass; A, [r, N], needs all of them, so that they are what
such a training holds, once for every adapter. Here A keeps a stash instead, of x itself: the layers
that x is given to share one (query, key and value; gate and up), and each has beside it the bits of
its dropout.

A layer is converted in place by exchanging classes: those of A, of its dropout and of PEFT's layer
around them, whose methods stay what they are. Nothing here imports PEFT; a model that has such
layers has.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memaop_triton.config import MemAOPConfig
from memaop_triton.nn.classes import class_below_fsdp
from memaop_triton.nn.dropout import MaskedDropout
from memaop_triton.nn.layer_choice import (
    Filter,
    adopt_,
    apply_overrides,
    check_arguments,
    quoted,
)
from memaop_triton.nn.linear import MemAOPLinear
from memaop_triton.nn.stashing import made_from

#: Of adapters: exact but for the rounding of the stash.
DEFAULT_CONFIG = MemAOPConfig(ratio=1, memory=None, stash="int4")


class MemAOPLora(nn.Module):
    """What a `peft.tuners.lora.Linear` becomes: a subclass of it and of this class.

    Adapters that are added later are converted as well.

    Attributes:
        adapter_config: What the backward pass of A computes.
    """

    #: What `revert_` turns the layer back into.
    peft_class: type[nn.Module]

    adapter_config: MemAOPConfig
    lora_A: nn.ModuleDict  # noqa: N815, PEFT's name
    lora_dropout: nn.ModuleDict

    @staticmethod
    def adopt_(layer: nn.Module, config: MemAOPConfig) -> None:
        """Turn a `peft.tuners.lora.Linear` into one."""
        layer.__class__ = _class_for(type(layer))
        assert isinstance(layer, MemAOPLora)
        layer.adapter_config = config
        for adapter in layer.lora_A:
            layer._adopt_adapter(adapter)

    def check_revertible(self) -> None:
        """Raise `ValueError` if `revert_` cannot restore the class."""
        if type(self) is not _class_for(self.peft_class):
            raise ValueError(
                f"{type(self).__name__} got its class after it was converted: call fully_shard "
                "before convert_ to be able to revert it."
            )

    def revert_(self) -> None:
        """Turn this layer back into that of PEFT; its A are layers of their own to revert."""
        for dropout in self.lora_dropout.values():
            if type(dropout) is MaskedDropout:
                dropout.__class__ = nn.Dropout  # type: ignore[assignment]
        del self.adapter_config
        self.__class__ = self.peft_class  # type: ignore[assignment]

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does, and convert it."""
        super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]
        self._adopt_adapter(adapter_name)

    def _adopt_adapter(self, adapter: str) -> None:
        if _obstacle(self, adapter):
            return
        layer, dropout = self.lora_A[adapter], self.lora_dropout[adapter]
        assert isinstance(layer, nn.Linear)
        adopt_(layer, self.adapter_config)
        if type(dropout) is nn.Dropout:
            dropout.__class__ = MaskedDropout

    def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        cast: Tensor = super()._cast_input_dtype(x, dtype)  # type: ignore[misc]
        if cast is not x and not torch.compiler.is_compiling():
            made_from(cast, x)
        return cast

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on demand and cannot be found by its name.
        return _blank, (self.peft_class,), self.__getstate__()


def choose_lora_layers(
    model: nn.Module,
    config: MemAOPConfig,
    filter_fn: Filter | None,
    overrides: Mapping[str, MemAOPConfig | None] | None,
) -> dict[str, tuple[nn.Module, MemAOPConfig]]:
    """Layer of PEFT and configuration of its adapters by name, for the arguments of `convert_`.

    Only `convert_` calls it, directly: its warning names the user's line.

    Raises:
        ValueError: No layer is left, a layer is converted already, a pattern matches nothing, or a
            configuration is not one for adapters.
        TypeError: As `choose_layers`.
    """
    overrides = check_arguments(model, config, overrides)
    for one in (config, *overrides.values()):
        if one is not None:
            _check_adapter_config(one)
    lora = sys.modules.get("peft.tuners.lora.layer")
    found: dict[str, nn.Module] = {}
    if lora is not None:
        found = {n: m for n, m in model.named_modules() if isinstance(m, lora.LoraLayer)}
    obstacles = {name: _obstacles(layer) for name, layer in found.items()}
    taken = {
        name: layer
        for name, layer in found.items()
        if "" in obstacles[name] and (filter_fn is None or filter_fn(layer, name))
    }
    twice = [quoted(name) for name, layer in taken.items() if _is_converted(layer)]
    if twice:
        raise ValueError(
            f"model is converted already: {', '.join(twice)}. Call revert_(model) first, or leave "
            "these layers out with filter_fn."
        )
    others = {name: ", ".join(sorted(why - {""})) for name, why in obstacles.items()}
    named = [f"{quoted(name)} ({why})" for name, why in others.items() if why]
    if filter_fn is None and named:
        warnings.warn(f"left as PEFT has them: {', '.join(named)}.", stacklevel=3)
    chosen = apply_overrides(model, taken, config, overrides)
    if not chosen:
        raise ValueError(
            f"model has no LoRA layer of PEFT to convert: {len(found)} in {type(model).__name__}, "
            f"{len(taken)} taken by the filter, none left after overrides."
        )
    return chosen


def converted_lora_layers(model: nn.Module) -> Iterator[tuple[str, MemAOPLora]]:
    """Qualified name and layer of every `MemAOPLora` in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, MemAOPLora):
            yield name, module


def _check_adapter_config(config: MemAOPConfig) -> None:
    if config.memory is not None or config.grad_input is not None or config.is_auto:
        raise ValueError(
            "adapters take no memory, an exact dX and a number of rows, because dW of so few "
            "outputs costs little: pass "
            "MemAOPConfig(ratio=1, memory='none', stash='int4'), not "
            f"ratio={config.ratio!r} with memory={config.memory_name!r} and "
            f"grad_input={config.grad_input_name!r}."
        )


def _is_converted(layer: Any) -> bool:
    return isinstance(layer, MemAOPLora) or any(
        isinstance(one, MemAOPLinear) for one in layer.lora_A.values()
    )


def _obstacles(layer: Any) -> set[str]:
    """Why adapters of a layer of PEFT's stay as they are; "" if there is one that need not."""
    kind = layer.peft_class if isinstance(layer, MemAOPLora) else type(layer)
    lora = sys.modules["peft.tuners.lora.layer"]
    if class_below_fsdp(kind) is not lora.Linear:
        return {kind.__name__}
    return {_obstacle(layer, adapter) for adapter in layer.lora_A}


def _obstacle(layer: Any, adapter: str) -> str:
    """Why an adapter stays as it is; "" if it need not."""
    # PEFT before 0.16 had one variant and no name for it.
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None:
        return type(variant).__name__
    if layer.use_dora.get(adapter):
        return "DoRA"
    a = layer.lora_A[adapter]
    if "forward" in vars(a):  # as the hooks of accelerate replace it
        return "a forward pass of its own"
    return "" if type(a) in (nn.Linear, MemAOPLinear) else type(a).__name__


def _class_for(peft_class: type[nn.Module]) -> type[MemAOPLora]:
    """The subclass of a class of PEFT's and of `MemAOPLora`, made once."""
    if peft_class not in _classes:
        own = {"peft_class": peft_class, "__module__": __name__}
        bases = (MemAOPLora, peft_class)
        _classes[peft_class] = type(f"MemAOPLora{peft_class.__name__}", bases, own)
    return _classes[peft_class]


def _blank(peft_class: type[nn.Module]) -> MemAOPLora:
    new_class = _class_for(peft_class)
    return new_class.__new__(new_class)


_classes: dict[type[nn.Module], type[MemAOPLora]] = {}
