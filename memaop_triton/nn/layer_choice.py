"""Which layers of a model are meant: what `convert_` converts and `plan` measures."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from torch import nn

from memaop_triton.config import MemAOPConfig, check_config
from memaop_triton.errors import check_name
from memaop_triton.nn.conv import CONVOLUTIONS, MemAOPConv, checked_for, is_depthwise, obstacle_in
from memaop_triton.nn.conv1d import MemAOPConv1D, conv1d_class
from memaop_triton.nn.linear import (
    MemAOPLayer,
    MemAOPLinear,
    adopt,
    check_adoptable,
    class_below_fsdp,
)
from memaop_triton.nn.peft import left_to_peft

M = TypeVar("M", bound=nn.Module)
#: `filter_fn(module, fqn)`: whether a layer is taken.
Filter = Callable[[nn.Module, str], bool]
Chosen = dict[str, tuple[nn.Module, MemAOPConfig]]
#: Which kinds of layers are meant: `"linear"` are `nn.Linear` and transformers' `Conv1D`.
TARGETS = ("all", "linear")


class Kind(NamedTuple):
    """A dense class whose layers can be converted, and what they become."""

    dense: type[nn.Module]
    ours: type[MemAOPLayer]


def kind_of(layer: nn.Module) -> Kind | None:
    """That of a layer that can be converted, or is; `None` for any other module."""
    if isinstance(layer, nn.Linear):
        return Kind(nn.Linear, MemAOPLinear)
    conv1d = conv1d_class()
    if conv1d is not None and isinstance(layer, conv1d):
        return Kind(conv1d, MemAOPConv1D)
    for dense, ours in CONVOLUTIONS.items():
        if isinstance(layer, dense) and not is_depthwise(layer):
            return Kind(dense, ours)
    return None


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """N and P of a layer that can be converted, or is."""
    if isinstance(layer, nn.Linear | MemAOPLayer):
        return layer.in_features, layer.out_features
    shape = layer.get_parameter("weight").shape
    kind = kind_of(layer)
    if kind is not None and kind.ours.is_transposed:
        return shape[0], shape[1]
    return math.prod(shape[1:]), shape[0]


def adopt_(layer: nn.Module, config: MemAOPConfig) -> MemAOPLayer:
    """Turn a dense layer into a converted one, in place.

    Raises:
        ValueError: It has a forward pass of its own, or is converted already.
    """
    kind = kind_of(layer)
    assert kind is not None
    return adopt(layer, kind.dense, kind.ours, config)


def choose_layers(
    model: nn.Module,
    config: MemAOPConfig | None,
    filter_fn: Filter | None,
    overrides: Mapping[str, MemAOPConfig | None] | None,
    targets: str = "all",
) -> Chosen:
    """Layer and configuration by qualified name, for the arguments of `convert_`.

    Only public functions call it, directly: its warnings name the user's line.

    Raises:
        ValueError: No layer is left, a layer is converted already, a pattern matches nothing, a
            layer has a forward pass of its own, `targets` is unknown, or a configuration that was
            meant for one layer is not for its kind.
        TypeError: `model` is not a module, or a configuration not a `MemAOPConfig`.
    """
    config = MemAOPConfig() if config is None else config
    overrides = check_arguments(model, config, overrides)
    check_name("targets", targets, TARGETS)
    layers = {n: m for n, m in model.named_modules() if _is_of(m, targets)}
    of_peft = left_to_peft(model, layers) if filter_fn is None else set()
    layers = {n: m for n, m in layers.items() if n not in of_peft}
    is_taken = _is_plain_or_converted if filter_fn is None else filter_fn
    taken = {n: m for n, m in layers.items() if is_taken(m, n)}
    twice = [quoted(name) for name, module in taken.items() if isinstance(module, MemAOPLayer)]
    if twice:
        raise ValueError(
            f"model is converted already: {', '.join(twice)}. Call revert_(model) first, or leave "
            "these layers out with filter_fn."
        )
    chosen, unfit = _fitting(apply_overrides(model, taken, config, overrides), config)
    others = [f"{quoted(n)} ({type(m).__name__})" for n, m in layers.items() if n not in taken]
    if filter_fn is None and others:
        warnings.warn(
            f"left as they are, being subclasses: {', '.join(others)}. A filter_fn can take them.",
            stacklevel=3,
        )
    if unfit:
        warnings.warn(
            f"left as they are, because {obstacle_in(config)} is not for convolutions: "
            f"{', '.join(map(quoted, unfit))}. overrides can configure them, targets='linear' "
            "leaves them out.",
            stacklevel=3,
        )
    if not chosen:
        hint = f" {len(of_peft)} more are PEFT's: see convert_(targets='lora')." if of_peft else ""
        raise ValueError(
            f"model has no layer to convert: {len(layers)} layers of targets={targets!r} in "
            f"{type(model).__name__}, {len(taken)} taken by the filter, none left after overrides."
            f"{hint}"
        )
    for name, (module, _) in chosen.items():
        with naming(name):
            kind = kind_of(module)
            assert kind is not None
            check_adoptable(module, kind.dense)
    return chosen


def _is_of(module: nn.Module, targets: str) -> bool:
    kind = kind_of(module)
    return kind is not None and (targets == "all" or not issubclass(kind.ours, MemAOPConv))


def _fitting(chosen: Chosen, config: MemAOPConfig) -> tuple[Chosen, list[str]]:
    """Layers with the configurations that their kinds have, and those that `config` is not for.

    Raises:
        ValueError: One that was given for single layers is not for them.
    """
    fitting, unfit = {}, []
    for name, (module, wanted) in chosen.items():
        kind = kind_of(module)
        if kind is not None and issubclass(kind.ours, MemAOPConv):
            if wanted is config and obstacle_in(config):
                unfit.append(name)
                continue
            with naming(name):
                wanted = checked_for(module, wanted)
        fitting[name] = module, wanted
    return fitting, unfit


def check_arguments(
    model: nn.Module, config: MemAOPConfig, overrides: Mapping[str, MemAOPConfig | None] | None
) -> Mapping[str, MemAOPConfig | None]:
    """Raise `TypeError` unless they are what `convert_` takes; returns `overrides`, not `None`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    overrides = {} if overrides is None else overrides
    check_config(config)
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must map name patterns to configurations, got {overrides!r}.")
    for pattern, value in overrides.items():
        if value is not None and not isinstance(value, MemAOPConfig):
            raise TypeError(
                f"overrides[{pattern!r}] must be a MemAOPConfig or None, got {value!r}."
            )
    return overrides


def converted_layers(model: nn.Module) -> Iterator[tuple[str, MemAOPLayer]]:
    """Qualified name and layer of every converted layer in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, MemAOPLayer):
            yield name, module


@contextlib.contextmanager
def naming(layer: str) -> Iterator[None]:
    """Put the name of the layer before the message of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {quoted(layer)}: {error}") from None


def quoted(name: str) -> str:
    """A layer's name in a message; that of the model's root is empty."""
    return repr(name) if name else "the model itself"


def _is_plain_or_converted(module: nn.Module, _: str) -> bool:
    kind = kind_of(module)
    is_plain = kind is not None and class_below_fsdp(type(module)) is kind.dense
    return is_plain or isinstance(module, MemAOPLayer)


def apply_overrides(
    model: nn.Module,
    layers: Mapping[str, M],
    config: MemAOPConfig,
    overrides: Mapping[str, MemAOPConfig | None],
) -> dict[str, tuple[M, MemAOPConfig]]:
    """Layer and configuration by name, without those that an override leaves as they are.

    Raises:
        ValueError: A pattern matches none of these layers.
    """
    configs: dict[str, MemAOPConfig | None] = dict.fromkeys(layers, config)
    # A module that is registered several times has several names.
    name_of = {id(module): name for name, module in layers.items()}
    names = {
        alias: name_of[id(module)]
        for alias, module in model.named_modules(remove_duplicate=False)
        if id(module) in name_of
    }
    for pattern, value in overrides.items():
        matches = {names[alias] for alias in fnmatch.filter(names, pattern)}
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"overrides: {pattern!r} matches no layer to convert.{hint}")
        configs.update(dict.fromkeys(matches, value))
    return {name: (layers[name], value) for name, value in configs.items() if value is not None}
