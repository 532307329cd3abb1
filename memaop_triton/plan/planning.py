"""Which layers of a model get faster by conversion, measured: `plan`.

A layer's time is that of its backward pass (dW, and db and dX where they are required) on random
rows of the shape that a training step of the model has, plus what the forward pass of a
`MemAOPLinear` takes longer than that of an `nn.Linear`. Dense and ours are timed in turn, and every
round gives a ratio. Layers with the same shapes, configuration and gradients share one measurement.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memaop_triton.auto.layer_timing import Measurement, Use, measure
from memaop_triton.auto.timing import generators_restored
from memaop_triton.config import MemAOPConfig, check_config
from memaop_triton.nn.layer_choice import Chosen, Filter, choose_layers, quoted
from memaop_triton.plan.observing import observe
from memaop_triton.plan.result import LayerPlan, Plan, Spread, Verdict

TIME_BUDGET = 10.0
#: A smaller gain does not count: with other contents of the caches it may be a loss.
LEAST_GAIN = 1.02


def plan(
    model: nn.Module,
    config: MemAOPConfig | None = None,
    *,
    example_inputs: object,
    filter_fn: Filter | None = None,
    overrides: Mapping[str, MemAOPConfig | None] | None = None,
    loss_fn: Callable[[Any], Tensor] | None = None,
    time_budget: float = TIME_BUDGET,
) -> Plan:
    """Measure which linear layers of `model` `convert_` would make faster, and by how much.

    The model is run forward and backward twice, without an update. Afterwards parameters,
    gradients, buffers, modes and random generators are as before. It needs memory for a training
    step and a copy of the parameters. Call this under the autocast and with the number of threads
    that training uses, before the model is wrapped or divided for several processes.

    Args:
        model: A dense model, on the device that trains it.
        config: As for `convert_`.
        example_inputs: What a training step hands to the model, with training's batch size: a
            tensor, a tuple of arguments, or a dictionary of keyword arguments.
        filter_fn: As for `convert_`.
        overrides: As for `convert_`.
        loss_fn: From the model's output to a scalar loss. By default the sum of all floating-point
            tensors in the output, also those in tuples, dictionaries and dataclasses.
        time_budget: Seconds for measuring, about. Each distinct shape takes at least three rounds,
            however long they are. Work on first use is not counted.

    Returns:
        For each layer its shape, times, memory and a verdict. `print` shows a table.

    Raises:
        TypeError: `example_inputs` is of another type; and as `convert_`.
        ValueError: Nothing in the output can be differentiated, a layer is on neither a CPU nor a
            GPU or is divided among processes, or `time_budget` is not positive; and as
            `convert_`.
    """
    if not (time_budget > 0 and math.isfinite(time_budget)):
        raise ValueError(f"time_budget={time_budget} must be a positive number of seconds.")
    chosen = choose_layers(model, config, filter_fn, overrides)
    return plan_chosen(model, chosen, example_inputs, loss_fn, time_budget)


def plan_chosen(
    model: nn.Module,
    chosen: Chosen,
    example_inputs: object,
    loss_fn: Callable[[Any], Tensor] | None = None,
    time_budget: float = TIME_BUDGET,
) -> Plan:
    """`plan` for layers that are already chosen."""
    layers = {name: layer for name, (layer, _) in chosen.items()}
    uses, seconds = observe(model, layers, example_inputs, loss_fn)
    wanted = [
        _Layer(name, layer.in_features, layer.out_features, config, uses[name])
        for name, (layer, config) in chosen.items()
    ]
    return _planned(wanted, seconds, time_budget)


def plan_shapes(
    shapes: Iterable[tuple[int, int, int]],
    config: MemAOPConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    time_budget: float = TIME_BUDGET,
) -> Plan:
    """`plan` for layers without a model: of M×N×P, with a bias, all gradients required.

    Args:
        shapes: (M, N, P) of each.
        config: For all of them; `MemAOPConfig()` if `None`.
        dtype: Of the rows and the weight.
        device: Where to measure.
        time_budget: As for `plan`.

    Raises:
        ValueError: A size is below 1.
    """
    config = MemAOPConfig() if config is None else config
    check_config(config)
    device = torch.empty(0, device=device).device  # "cuda" has a number
    wanted = []
    for m, n, p in shapes:
        if min(m, n, p) < 1:
            raise ValueError(f"shape {m}x{n}x{p} must be M×N×P, all at least 1.")
        use = Use(m, n, p, dtype, device)
        wanted.append(_Layer(f"{m}x{n}x{p}", n, p, config, Counter([use])))
    return _planned(wanted, None, time_budget)


class _Layer(NamedTuple):
    name: str
    in_features: int
    out_features: int
    config: MemAOPConfig
    uses: Counter[Use]


def _planned(layers: list[_Layer], step_seconds: float | None, time_budget: float) -> Plan:
    notes = {layer.name: _nothing_to_gain(layer) for layer in layers}
    cases = dict.fromkeys(
        (use, layer.config) for layer in layers if not notes[layer.name] for use in layer.uses
    )
    devices = {use.device for use, _ in cases}
    end = time.perf_counter() + time_budget
    measured = {}
    with generators_restored(devices):
        for number, case in enumerate(cases):
            left = max(0.0, end - time.perf_counter())
            measured[case] = measure(*case, left / (len(cases) - number))
    rows = tuple(
        _row(layer, Verdict.LEAVE_DENSE, note=note)
        if (note := notes[layer.name])
        else _judged(layer, measured)
        for layer in layers
    )
    return Plan(rows, step_seconds, ", ".join(sorted(map(_device_name, devices))))


def _nothing_to_gain(layer: _Layer) -> str:
    """Why a layer need not be measured, or "" if it must be.

    Raises:
        ValueError: It is on a device where nothing can be measured.
    """
    for use in layer.uses:
        if use.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"layer {quoted(layer.name)} works on device {str(use.device)!r}: move the model "
                "to a CPU or a GPU, to be measured there."
            )
    config, uses = layer.config, layer.uses
    if not uses:
        return "no gradient in this step"
    if all(use.rows * use.in_features * use.out_features == 0 for use in uses):
        return "empty"
    if config.grad_input is None and not any(use.needs_weight for use in uses):
        return "weight is frozen"
    if config.row_memory is None and all(
        config.num_rows(u.rows, u.in_features, u.out_features) == u.rows for u in uses
    ):
        return "K = M"
    return ""


def _judged(layer: _Layer, measured: Mapping[tuple[Use, MemAOPConfig], Measurement]) -> LayerPlan:
    """The verdict on a layer; with several uses in a step, on all of them together."""
    found = [(count, measured[use, layer.config]) for use, count in layer.uses.items()]
    # A measurement may have fewer rounds than another.
    dense = [sum(t) for t in zip(*([n * s for s in m.dense] for n, m in found), strict=False)]
    ours = [sum(t) for t in zip(*([n * s for s in m.ours] for n, m in found), strict=False)]
    ratios = [d / o for d, o in zip(dense, ours, strict=True)]
    q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    if q1 > LEAST_GAIN:
        verdict = Verdict.CONVERT
    elif q3 <= LEAST_GAIN:
        verdict = Verdict.LEAVE_DENSE
    else:
        verdict = Verdict.TOO_CLOSE
    return _row(
        layer,
        verdict,
        dense_seconds=statistics.median(dense),
        ours_seconds=statistics.median(ours),
        speedup=Spread(median, q1, q3),
        memory_bytes=max(m.memory_bytes for _, m in found),
    )


def _row(layer: _Layer, verdict: Verdict, **times: Any) -> LayerPlan:
    uses = layer.uses
    return LayerPlan(
        name=layer.name,
        rows=tuple(sorted({use.rows for use in uses})),
        in_features=layer.in_features,
        out_features=layer.out_features,
        dtypes=tuple(sorted({str(use.dtype).removeprefix("torch.") for use in uses})),
        calls=uses.total(),
        config=layer.config,
        verdict=verdict,
        **times,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"
