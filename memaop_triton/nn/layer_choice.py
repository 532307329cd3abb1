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
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from memaop_triton.config import MemAOPConfig, check_config
from memaop_triton.errors import check_name
from memaop_triton.nn.attention import MemAOPMultiheadAttention
from memaop_triton.nn.classes import class_below_fsdp
from memaop_triton.nn.conv import CONVOLUTIONS, checked_for, is_depthwise, obstacle_in
from memaop_triton.nn.conv1d import MemAOPConv1D, conv1d_class
from memaop_triton.nn.experts import (
    ExpertsProjection,
    MemAOPExpertsProjection,
    checked_for_experts,
)
from memaop_triton.nn.linear import MemAOPLayer, MemAOPLinear, adopt, check_adoptable
from memaop_triton.nn.packed import MemAOPProjection, Projection
from memaop_triton.nn.peft import left_to_peft

M = TypeVar("M", bound=nn.Module)
#: `filter_fn(module, fqn)`: whether a layer is taken.
Filter = Callable[[nn.Module, str], bool]
Chosen = dict[str, tuple[nn.Module, MemAOPConfig]]
#: Which kinds of layers are meant: `"linear"` are `nn.Linear` and transformers' `Conv1D`.
TARGETS = ("all", "linear")


class Kind(NamedTuple):
    """A dense class whose layers can be converted, and what they become.

    Attributes:
        dense: The class.
        ours: What its layers become.
        name: Of such layers, in messages.
        is_linear: Whether `targets="linear"` means them too.
        checked_for: Returns a configuration as a layer of this kind uses it, or raises; `None` if
            every one is for them.
        excludes: Whether a layer of the class cannot be converted all the same.
    """

    dense: type[nn.Module]
    ours: type[MemAOPLayer]
    name: str = "linear layers"
    is_linear: bool = False
    checked_for: Callable[[nn.Module, MemAOPConfig], MemAOPConfig] | None = None
    excludes: Callable[[nn.Module], bool] = lambda layer: False


def _is_unexpected(layer: nn.Module) -> bool:
    return isinstance(layer, Projection) and not layer.is_expected


# A subclass before the class that it is of.
_KINDS = (
    Kind(nn.Linear, MemAOPLinear, is_linear=True),
    *(
        Kind(dense, ours, "convolutions", checked_for=checked_for, excludes=is_depthwise)
        for dense, ours in CONVOLUTIONS.items()
    ),
    Kind(ExpertsProjection, MemAOPExpertsProjection, "experts", checked_for=checked_for_experts),
    Kind(Projection, MemAOPProjection, excludes=_is_unexpected),
)


def kind_of(layer: nn.Module) -> Kind | None:
    """That of a layer that can be converted, or is; `None` for any other module."""
    conv1d = conv1d_class()
    if conv1d is not None and isinstance(layer, conv1d):
        return Kind(conv1d, MemAOPConv1D, is_linear=True)
    found = next((kind for kind in _KINDS if isinstance(layer, kind.dense)), None)
    return None if found is None or found.excludes(layer) else found


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """N and P of a layer that can be converted, or is."""
    if isinstance(layer, nn.Linear | Projection | MemAOPLayer):
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

    Only public functions call it, directly: its warnings name the user's line. Layers that hang
    inside of others (`memaop_triton.nn.exposing`) are those that are exposed.

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
    plain = _plain_layers(model, layers)
    of_peft = left_to_peft(model, layers) if filter_fn is None else set()
    layers = {n: m for n, m in layers.items() if n not in of_peft}
    taken = {n: m for n, m in layers.items() if (filter_fn(m, n) if filter_fn else n in plain)}
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
    for kind_name, names in unfit.items():
        warnings.warn(
            f"left as they are, because {obstacle_in(config)} is not for {kind_name}: "
            f"{', '.join(map(quoted, names))}. overrides can configure them, targets='linear' "
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
    return kind is not None and (targets == "all" or kind.is_linear)


def _plain_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Names of the layers that are converted by default, or are already: those of no subclass.

    The last layer of an attention is of a subclass that computes the same.
    """
    hosts = [module for module in model.modules() if isinstance(module, MemAOPMultiheadAttention)]
    plain = {id(host.out_proj) for host in hosts}
    own = {n: class_below_fsdp(type(layer)) for n, layer in layers.items()}
    return {
        name
        for name, layer in layers.items()
        if isinstance(layer, MemAOPLayer)
        or own[name] is _dense_class(layer)
        or (id(layer) in plain and own[name] is NonDynamicallyQuantizableLinear)
    }


def _dense_class(layer: nn.Module) -> type[nn.Module] | None:
    kind = kind_of(layer)
    return None if kind is None else kind.dense


def _fitting(chosen: Chosen, config: MemAOPConfig) -> tuple[Chosen, dict[str, list[str]]]:
    """Layers with the configurations that their kinds have, and by kind what `config` is not for.

    Raises:
        ValueError: One that was given for single layers is not for them.
    """
    fitting: Chosen = {}
    unfit: dict[str, list[str]] = {}
    for name, (module, wanted) in chosen.items():
        kind = kind_of(module)
        if kind is not None and kind.checked_for is not None:
            if wanted is config and obstacle_in(config):
                unfit.setdefault(kind.name, []).append(name)
                continue
            with naming(name):
                wanted = kind.checked_for(module, wanted)
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
