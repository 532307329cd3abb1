"""Converting the layers of a model, and reverting them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from memaop_triton.auto.agreement import Processes
from memaop_triton.auto.controller import control
from memaop_triton.config import MemAOPConfig
from memaop_triton.errors import check_name
from memaop_triton.nn.coverage import Coverage, LowCoverageWarning, coverage_of
from memaop_triton.nn.exposing import conceal_, exposed, hosts_of
from memaop_triton.nn.layer_choice import (
    TARGETS,
    Chosen,
    adopt_,
    choose_layers,
    converted_layers,
    naming,
)
from memaop_triton.nn.linear import MemAOPLayer
from memaop_triton.nn.lora import (
    DEFAULT_CONFIG,
    MemAOPLora,
    choose_lora_layers,
    converted_lora_layers,
)
from memaop_triton.plan.planning import plan_chosen

M = TypeVar("M", bound=nn.Module)

_log = logging.getLogger(__name__)


def convert_(
    model: M,
    config: MemAOPConfig | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    overrides: Mapping[str, MemAOPConfig | None] | None = None,
    *,
    targets: str = "all",
    only_if_faster: bool = False,
    example_inputs: object = None,
    loss_fn: Callable[[Any], Tensor] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> M:
    """Convert the layers of `model`, in place.

    These are `nn.Linear`, which becomes a `MemAOPLinear`, `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`,
    which become a `MemAOPConv1d` and so on unless they are depthwise, and `Conv1D` of Hugging
    Face's transformers; all are `MemAOPLayer` then. A `LowCoverageWarning` says if more than half
    of the model's weight gradients are out of reach, being those of other layers; `coverage` shows
    by class what was left.

    Two kinds of modules multiply by weights of their own, and get a layer for each product:
    `nn.MultiheadAttention` (`in_proj` where queries, keys and values are one tensor, otherwise
    `q_proj`, `k_proj` and `v_proj`; and `out_proj`), and the experts of transformers
    (`gate_up` or `up`, and `down`), which have no subspace. These layers have no Parameters: those
    of the module stay where they are. `memaop_triton.nn.attention` and `memaop_triton.nn.experts`
    say more.

    By default the library finds out by measurements which of them are worth sampling, and how many
    rows: all start exact, as `nn.Linear` is, and stay so where dense is best.

    Layers stay the same objects: Parameters, names, hooks, `state_dict` and references to them are
    untouched, so an optimizer made before or after works alike.

    Layers whose configuration has `ratio="auto"` are decided about together: `memaop_triton.auto`
    says how, and `model_report` what came of it.

    Of a model of PEFT it takes what is trained as a whole (`modules_to_save`) and
    leaves frozen layers and adapters alone, unless `filter_fn` takes them. `targets="lora"` takes
    the LoRA layers: A keeps a stash of its inputs, which layers with the same inputs share, and
    the mask of its dropout in bits (`memaop_triton.nn.lora`). The model computes the same, and is
    saved, loaded, merged and given more adapters as ever. What is not PEFT's plain LoRA of a linear
    layer, by its class or by a variant such as DoRA, stays as it is, and a warning names it.

    Args:
        model: Any module; it may itself be such a layer.
        config: For every layer that `overrides` does not name; a warning names the convolutions
            and experts that it is not for, which stay as they are. By default
            `MemAOPConfig(ratio="auto")`, and for LoRA layers `MemAOPConfig(ratio=1, memory="none",
            stash="int4")`, by which dW is exact but for the rounding. Those take no memory, an
            exact dX and no `ratio="auto"`.
        filter_fn: `filter_fn(module, fqn)`, called with every layer of these kinds (subclasses
            included), or every LoRA layer, and its qualified name; layers for which it is false
            stay as they are. By default the layers whose class is exactly one of these (or was,
            before `fully_shard`), and a warning names the others. The layers of an attention or of
            experts are called with their names in these. Subclasses of `nn.MultiheadAttention` have
            such layers with a `filter_fn` only, and none with a forward pass of their own.
        overrides: Configuration by name pattern (shell style, `"blocks.*.mlp.*"`), `None` to leave
            a layer dense. Of several patterns that match, the last one counts.
        targets: `"all"`; `"linear"` for `nn.Linear` and `Conv1D` of transformers only; or `"lora"`
            for the LoRA layers of PEFT. A model can be converted for one after the other.
        only_if_faster: Measure first, as `plan` does, and leave the layers dense that conversion
            would not make faster. The logger `memaop_triton.convert` names these layers (level
            INFO); if they are all layers, a warning says so. In a distributed run every process has
            to call this, and all use the measurements of the first one.
        example_inputs: For `only_if_faster`: the inputs of the model in a training step, as for
            `plan`.
        loss_fn: For `only_if_faster`, as for `plan`; optional.
        process_group: For `ratio="auto"`: the processes that train copies or shards of `model`,
            all processes by default. They decide alike: all of them have to convert the same
            layers, take the same number of optimizer steps, and load, freeze and copy alike,
            because they exchange what they measured at the end of some of these steps.

    Returns:
        `model`.

    Raises:
        ValueError: No layer is left to convert, a layer is converted already, a pattern matches
            nothing, or a layer has its own forward pass; `only_if_faster` without
            `example_inputs`, or the reverse, or with `ratio="auto"`; `process_group` without it,
            or one that this process is not in; or as `plan`; `targets` is unknown, or `"lora"`
            with one of these arguments or a configuration that is not for adapters. Nothing is
            converted then.
        TypeError: `model` is not a module, or a configuration not a `MemAOPConfig`.
    """
    check_name("targets", targets, (*TARGETS, "lora"))
    if targets == "lora":
        if only_if_faster or example_inputs is not None or loss_fn is not None or process_group:
            raise ValueError(
                "targets='lora' saves memory and measures nothing: only_if_faster, example_inputs, "
                "loss_fn and process_group have no meaning with it."
            )
        config = DEFAULT_CONFIG if config is None else config
        for layer, layer_config in choose_lora_layers(model, config, filter_fn, overrides).values():
            MemAOPLora.adopt_(layer, layer_config)
        return model
    if only_if_faster and example_inputs is None:
        raise ValueError(
            "only_if_faster=True needs example_inputs, the model's inputs in a training step: "
            "a tensor, a tuple of arguments, or a dictionary of keyword arguments."
        )
    if not only_if_faster and (example_inputs is not None or loss_fn is not None):
        raise ValueError(
            "example_inputs and loss_fn have no meaning without only_if_faster=True: nothing is "
            "measured."
        )
    config = MemAOPConfig(ratio="auto") if config is None else config
    with exposed(model, targets, subclasses=filter_fn is not None):
        chosen = choose_layers(model, config, filter_fn, overrides, targets)
        undecided = {name: found for name, found in chosen.items() if found[1].is_auto}
        if only_if_faster and undecided:
            raise ValueError(
                "only_if_faster=True measures a given number of rows: pass "
                "config=MemAOPConfig(...). ratio='auto', the default, measures by itself, and "
                "leaves dense what would not gain."
            )
        if process_group is not None and not undecided:
            raise ValueError(
                "process_group has no meaning without ratio='auto': nothing else is decided by "
                "several processes together."
            )
        if process_group is not None and dist.get_rank(process_group) < 0:
            raise ValueError("process_group must be one that this process belongs to.")
        covered = None
        if only_if_faster:
            chosen, covered = _faster_ones(model, chosen, example_inputs, loss_fn)
        for module, layer_config in chosen.values():
            exact = layer_config.spending(ratio=1.0) if layer_config.is_auto else layer_config
            adopt_(module, exact)
        if undecided:
            control(undecided, Processes(process_group))
        if covered is None:
            _warn_if_low(coverage_of(model), "Converted layers")
        else:
            _warn_if_low(covered, "Layers that could be converted")
    return model


def revert_(model: M) -> M:
    """Turn every converted layer of `model` back into what it was, in place, those of PEFT too.

    Raises:
        ValueError: The model has none, or a layer was parametrised after it was converted. Nothing
            is reverted then.
    """
    layers: dict[str, MemAOPLayer | MemAOPLora] = {}
    layers.update(converted_layers(model))
    layers.update(converted_lora_layers(model))
    if not layers:
        raise ValueError(f"model has no converted layer to revert: {type(model).__name__}.")
    for name, module in {**layers, **hosts_of(model)}.items():
        with naming(name):
            module.check_revertible()
    for layer in layers.values():
        layer.revert_()
    conceal_(model)
    return model


def _faster_ones(
    model: nn.Module,
    chosen: Chosen,
    example_inputs: object,
    loss_fn: Callable[[Any], Tensor] | None,
) -> tuple[Chosen, Coverage | None]:
    """The layers of `chosen` that get faster by conversion, the same in all processes.

    And how much of the model all of `chosen` are.
    """
    measured = plan_chosen(model, chosen, example_inputs, loss_fn)
    _log.debug("%s", measured)
    names = [measured.faster]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(names, src=0)
    slower = [name for name in chosen if name not in names[0]]
    if not names[0]:
        warnings.warn(
            f"nothing is converted: none of {len(slower)} layers would get faster. "
            "memaop_triton.plan shows the times.",
            stacklevel=3,
        )
    elif slower:
        _log.info("left dense, because conversion makes them no faster: %s", ", ".join(slower))
    return {name: chosen[name] for name in names[0]}, measured.coverage


def _warn_if_low(coverage: Coverage, layers: str) -> None:
    if coverage.is_low:
        warnings.warn(
            f"{coverage.summary(layers)} memaop_triton.coverage(model) shows all of it.",
            LowCoverageWarning,
            stacklevel=3,
        )
