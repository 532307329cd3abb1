"""Switching the linear layers of a model over, and back."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from torch import nn

from memaop_triton.config import MemAOPConfig, check_config
from memaop_triton.linear import MemAOPLinear, check_adoptable, class_below_fsdp

M = TypeVar("M", bound=nn.Module)


def convert_(
    model: M,
    config: MemAOPConfig | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    overrides: Mapping[str, MemAOPConfig | None] | None = None,
) -> M:
    """Turn the linear layers of `model` into `MemAOPLinear`, in place.

    Layers stay the same objects: Parameters, names, hooks, `state_dict` and references to them are
    untouched, so an optimizer made before or after works alike.

    Args:
        model: Any module; it may itself be a linear layer.
        config: For every layer that `overrides` does not name; `MemAOPConfig()` if `None`.
        filter_fn: `filter_fn(module, fqn)`, called with every `nn.Linear` of the model (subclasses
            included) and its qualified name; layers for which it is false stay dense. By default
            the layers whose class is exactly `nn.Linear` (or was, before `fully_shard`), and a
            warning names the others.
        overrides: Configuration by name pattern (shell style, `"blocks.*.mlp.*"`), `None` to leave
            a layer dense. Of several patterns that match, the last one counts.

    Returns:
        `model`.

    Raises:
        ValueError: No layer is left to convert, a layer is converted already, a pattern matches
            nothing, or a layer has a forward pass of its own. Nothing is converted then.
        TypeError: `model` is not a module, or a configuration not a `MemAOPConfig`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    config = MemAOPConfig() if config is None else config
    overrides = {} if overrides is None else overrides
    check_config(config)
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must map name patterns to configurations, got {overrides!r}.")
    for pattern, value in overrides.items():
        if value is not None and not isinstance(value, MemAOPConfig):
            raise TypeError(
                f"overrides[{pattern!r}] must be a MemAOPConfig or None, got {value!r}."
            )

    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if filter_fn is None:
        taken = {
            n: m
            for n, m in linears.items()
            if class_below_fsdp(type(m)) is nn.Linear or _is_converted(m)
        }
    else:
        taken = {n: m for n, m in linears.items() if filter_fn(m, n)}
    twice = [_quoted(name) for name, module in taken.items() if _is_converted(module)]
    if twice:
        raise ValueError(
            f"model is converted already: {', '.join(twice)}. Call revert_(model) first, or leave "
            "these layers out with filter_fn."
        )
    chosen = _apply_overrides(model, taken, config, overrides)
    others = {n: m for n, m in linears.items() if n not in taken and not _is_converted(m)}
    if filter_fn is None and others:
        named = ", ".join(f"{_quoted(n)} ({type(m).__name__})" for n, m in others.items())
        warnings.warn(
            f"left as they are, being subclasses of nn.Linear: {named}. A filter_fn can take them.",
            stacklevel=2,
        )
    if not chosen:
        raise ValueError(
            f"model has no layer to convert: {len(linears)} nn.Linear in {type(model).__name__}, "
            f"{len(taken)} taken by the filter, none left after overrides."
        )
    for name, (module, _) in chosen.items():
        with _naming(name):
            check_adoptable(module)
    for module, layer_config in chosen.values():
        MemAOPLinear.adopt_(module, layer_config)
    return model


def revert_(model: M) -> M:
    """Turn every `MemAOPLinear` of `model` back into the dense layer it was, in place.

    Raises:
        ValueError: The model has none, or a layer was parametrised after it was converted. Nothing
            is reverted then.
    """
    layers = dict(converted_layers(model))
    if not layers:
        raise ValueError(f"model has no converted layer to revert: {type(model).__name__}.")
    for name, layer in layers.items():
        with _naming(name):
            layer.check_revertible()
    for layer in layers.values():
        layer.revert_()
    return model


def converted_layers(model: nn.Module) -> Iterator[tuple[str, MemAOPLinear]]:
    """Qualified name and layer of every `MemAOPLinear` in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, MemAOPLinear):
            yield name, module


def _is_converted(module: nn.Module) -> bool:
    return isinstance(module, MemAOPLinear)


@contextlib.contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Put the name of the layer before the message of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {_quoted(layer)}: {error}") from None


def _quoted(name: str) -> str:
    return repr(name) if name else "the model itself"


def _apply_overrides(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    config: MemAOPConfig,
    overrides: Mapping[str, MemAOPConfig | None],
) -> dict[str, tuple[nn.Linear, MemAOPConfig]]:
    configs: dict[str, MemAOPConfig | None] = dict.fromkeys(layers, config)
    # A module that stands in several places answers to each of its names.
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
