"""Which layers of a model get faster by conversion, measured, and are worth it: `plan`.

Layers with `ratio="auto"` are decided about together, in `memaop_triton.plan.deciding`. Of another
layer the time is that of its backward pass (dW, and db and dX where they are required) on random
rows of the shape that a training step of the model has, plus what the forward pass of a
`MemAOPLinear` takes longer than that of an `nn.Linear`. Dense and ours are timed in turn, and every
round gives a ratio. Layers with the same shapes, configuration and gradients share one measurement.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memaop_triton.auto.layer_timing import Measurement, Use, measure
from memaop_triton.auto.timing import generators_restored
from memaop_triton.config import MemAOPConfig, check_config
from memaop_triton.nn.coverage import coverage_of
from memaop_triton.nn.exposing import exposed
from memaop_triton.nn.layer_choice import Chosen, Filter, choose_layers, sizes_of
from memaop_triton.plan.deciding import LEAST_GAIN, decide
from memaop_triton.plan.held import Held, measure_held
from memaop_triton.plan.noise import Noise, observe_noise
from memaop_triton.plan.observing import observe
from memaop_triton.plan.request import LayerRequest
from memaop_triton.plan.result import LayerPlan, Plan, Spread, Verdict

TIME_BUDGET = 10.0
_TIMED_STEPS = 5  # where the time of a step decides


def plan(
    model: nn.Module,
    config: MemAOPConfig | None = None,
    *,
    example_inputs: object,
    filter_fn: Filter | None = None,
    overrides: Mapping[str, MemAOPConfig | None] | None = None,
    targets: str = "all",
    loss_fn: Callable[[Any], Tensor] | None = None,
    batches: Iterable[object] = (),
    time_budget: float = TIME_BUDGET,
) -> Plan:
    """Measure which layers of `model` `convert_` would make faster, and by how much.

    With `ratio="auto"`, the default, it shows before training what the library would decide: the
    noise V/D and the time of each share of the rows, and the choice that promises most of dense's
    progress per second. The noise is that at the weights that the model has now. It grows as
    training goes on, and what is best now may not be later. In training the library looks again,
    and asks the clock whether what it chose is faster.

    Where a configuration has a stash, it also shows the bytes that autograd holds for the backward
    pass, dense and with all layers converted, and names the layers whose stash frees nothing
    because somebody else keeps their inputs: `overrides` can give these `stash="exact"`.

    The model is run forward and backward a few times, without an update. Afterwards parameters,
    gradients, buffers, modes and random generators are as before. It needs memory for a training
    step and a copy of the parameters. Call this under the autocast and with the number of threads
    that training uses, before the model is wrapped or divided for several processes.

    Args:
        model: A dense model, on the device that trains it.
        config: For every layer that `overrides` does not name; `MemAOPConfig(ratio="auto")` if
            `None`. A given number of rows is timed against dense; its noise is not looked at.
        example_inputs: What a training step hands to the model, with training's batch size: a
            tensor, a tuple of arguments, or a dictionary of keyword arguments.
        filter_fn: As for `convert_`.
        overrides: As for `convert_`.
        targets: `"all"` or `"linear"`, as for `convert_`.
        loss_fn: From the model's output to a scalar loss. By default the loss in the output: itself
            if it is a scalar, the first of several, or what is named `"loss"`, as in models of
            Hugging Face. Without either, gradients are those of the sum of all floating-point
            tensors in the output; times are right then, and the noise is unknown.
        batches: For `ratio="auto"`: a few more of what `example_inputs` is one of. V and D are
            averaged over all of them. A layer with a subspace needs at least one, because the first
            batch makes its bases and would show too little noise beside them; without one, V is
            shown as it is without a subspace. They are taken one by one, each before the model
            runs, so that a generator can hand the batch's targets to `loss_fn`.
        time_budget: Seconds for measuring the layers with a given number of rows, about. Each
            distinct shape takes at least three rounds, however long they are. Work on first use is
            not counted. With `ratio="auto"` a shape is timed for about a quarter of a second.

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
    config = MemAOPConfig(ratio="auto") if config is None else config
    with exposed(model, targets, subclasses=filter_fn is not None):
        chosen = choose_layers(model, config, filter_fn, overrides, targets)
        return plan_chosen(model, chosen, example_inputs, loss_fn, time_budget, batches)


def plan_chosen(
    model: nn.Module,
    chosen: Chosen,
    example_inputs: object,
    loss_fn: Callable[[Any], Tensor] | None = None,
    time_budget: float = TIME_BUDGET,
    batches: Iterable[object] = (),
) -> Plan:
    """`plan` for layers that are already chosen."""
    layers = {name: layer for name, (layer, _) in chosen.items()}
    is_auto = any(config.is_auto for _, config in chosen.values())
    timed = _TIMED_STEPS if is_auto else 1
    uses, seconds, has_loss, flops = observe(model, layers, example_inputs, loss_fn, timed)
    every = set(map(id, layers.values()))
    coverage = coverage_of(
        model,
        flops.by_id,
        lambda module: id(module) in every,
        is_estimate=flops.is_estimate,
    )
    requests = [
        LayerRequest(name, *sizes_of(layer), config, uses[name])
        for name, (layer, config) in chosen.items()
    ]
    undecided = [r.name for r in requests if r.config.is_auto and not r.nothing_to_gain()]
    noise = None
    if undecided and has_loss:
        inputs = itertools.chain([example_inputs], batches)
        noise = observe_noise(model, {name: chosen[name] for name in undecided}, inputs, loss_fn)
    held = None
    if any(config.stash != "exact" for _, config in chosen.values()):
        held = measure_held(model, chosen, example_inputs, loss_fn)
    found = _planned(requests, seconds, time_budget, noise, held)
    return dataclasses.replace(found, coverage=coverage)


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
        config: For all of them; `MemAOPConfig()` if `None`. With `ratio="auto"` the times of its
            shares are shown.
        dtype: Of the rows and the weight.
        device: Where to measure.
        time_budget: As for `plan`.

    Raises:
        ValueError: A size is below 1.
    """
    config = MemAOPConfig() if config is None else config
    check_config(config)
    device = torch.empty(0, device=device).device  # "cuda" has a number
    requests = []
    for m, n, p in shapes:
        if min(m, n, p) < 1:
            raise ValueError(f"shape {m}x{n}x{p} must be M×N×P, all at least 1.")
        use = Use(m, n, p, dtype, device)
        requests.append(LayerRequest(f"{m}x{n}x{p}", n, p, config, Counter([use])))
    return _planned(requests, None, time_budget)


def _planned(
    requests: list[LayerRequest],
    step_seconds: float | None,
    time_budget: float,
    noise: Noise | None = None,
    held: Held | None = None,
) -> Plan:
    """Measure layers, judge those with a given number of rows, and decide about the others."""
    notes = {request.name: request.nothing_to_gain() for request in requests}
    left = [request for request in requests if not notes[request.name]]
    rows = {
        request.name: request.row(Verdict.LEAVE_DENSE, note=notes[request.name])
        for request in requests
    }
    rows |= _judged_each([r for r in left if not r.config.is_auto], time_budget)
    predicted, text, remarks = None, "", ""
    total = sum(request.config.is_auto for request in requests)
    if total:
        exact = None
        if step_seconds is not None:  # the layers with a given number of rows are as they will be
            exact = step_seconds - sum(row.saved_seconds for row in rows.values())
        undecided = [request for request in left if request.config.is_auto]
        found, predicted, text, remarks = decide(undecided, noise, exact, total)
        rows |= found
    if held is not None:
        for name, keeper in held.keepers.items():
            rows[name] = dataclasses.replace(rows[name], input_kept_by=keeper)
    devices = {use.device for request in left for use in request.uses}
    return Plan(
        tuple(rows.values()),
        step_seconds,
        ", ".join(sorted(map(_device_name, devices))),
        predicted,
        text,
        remarks,
        None if held is None else held.dense,
        None if held is None else held.converted,
    )


def _judged_each(requests: list[LayerRequest], time_budget: float) -> dict[str, LayerPlan]:
    """Verdicts by layer, dense and converted timed in turn."""
    cases = dict.fromkeys((use, request.config) for request in requests for use in request.uses)
    end = time.perf_counter() + time_budget
    measured = {}
    with generators_restored({use.device for use, _ in cases}):
        for number, case in enumerate(cases):
            left = max(0.0, end - time.perf_counter())
            measured[case] = measure(*case, left / (len(cases) - number))
    return {request.name: _judged(request, measured) for request in requests}


def _judged(
    layer: LayerRequest, measured: Mapping[tuple[Use, MemAOPConfig], Measurement]
) -> LayerPlan:
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
    return layer.row(
        verdict,
        dense_seconds=statistics.median(dense),
        ours_seconds=statistics.median(ours),
        speedup=Spread(median, q1, q3),
        memory_bytes=max(m.memory_bytes for _, m in found),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"
