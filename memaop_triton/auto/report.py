"""What was decided about a model, in words: `model_report`, and `auto_freeze`."""

from __future__ import annotations

import dataclasses
import statistics

from torch import nn

from memaop_triton.auto.controller import Controller
from memaop_triton.auto.worth import EXACT
from memaop_triton.monitor.kept import kept_lines
from memaop_triton.monitor.units import milliseconds
from memaop_triton.nn.coverage import Coverage, coverage_of, elements_of_weights
from memaop_triton.nn.layer_choice import converted_layers

_NO_AUTO_LAYER = "no layer of model has ratio='auto': convert_(model, MemAOPConfig(ratio='auto'))."


def model_report(model: nn.Module) -> str:
    """What was decided about layers with `ratio="auto"`, and what those with a stash keep.

    One line that sums it up, "1.14 times dense's progress per second, predicted 1.16; sampling 9 of
    14 layers", and one a layer: rows M of a pass, K/M in use, the noise V/D that this or, for an
    exact layer, half of the rows would have, and the milliseconds of its weight gradients in a
    step, dense and as they are. Of several processes that decide together all print the same but
    for the rows, which are their own.

    Then, if layers have a stash, one line for each of them: what its last forward pass in training
    kept of the inputs for the backward pass, and what a dense layer would have kept. What layers
    share counts once. A last line says the same of what `compress_saved` has rounded.

    Last, the share of the weight gradients' FLOPs that all converted layers together compute, exact
    or not, and what was left, as `coverage` counts it: at the rows that were observed. What was
    left is not observed and is taken to meet as many rows as most layers. Before any batch was
    observed it is the share of the weights' elements.

    Raises:
        ValueError: No layer of `model` has `ratio="auto"` or a stash, nor is it compressed.
    """
    lines, kept = [], kept_lines(model)
    controllers = _controllers_of(model)
    if not controllers and not kept:
        raise ValueError(f"{_NO_AUTO_LAYER} None has a stash either.")
    for controller in controllers:
        lines.append(controller.summary())
        width = max(len("layer"), *map(len, controller.shares))
        heading = f"{'M':>9}{'K/M':>8}{'noise':>9}{'dense, ms':>11}{'now, ms':>9}"
        lines.append(f"{'layer':{width}}{heading}")
        for name, share in controller.shares.items():
            lines.append(f"{name:{width}}{_line(controller, name, share)}")
    return "\n".join([*lines, *kept, _coverage(model).summary()])


def auto_freeze(model: nn.Module) -> None:
    """Keep what was decided about the layers of `model` with `ratio="auto"`, from now on.

    No more observations, clocks and changes: as decisions hang on measured times, this is also how
    a run is made repeatable. Layers that are being tried become exact. Of several processes that
    decide together all have to call this, after the same step.

    Raises:
        ValueError: No layer of `model` has `ratio="auto"`.
    """
    controllers = _controllers_of(model)
    if not controllers:
        raise ValueError(_NO_AUTO_LAYER)
    for controller in controllers:
        controller.freeze()


def _coverage(model: nn.Module) -> Coverage:
    """By the FLOPs of the newest observed step, if there was one."""
    products: dict[int, int] = {}
    rows: list[int] = []
    for _, layer in converted_layers(model):
        state, weight = layer.layer_state, layer.weight_parameter
        seen = state.controller.seen[state.name] if isinstance(state.controller, Controller) else ()
        if seen and weight is not None:
            uses = seen[-1].uses
            rows.append(sum(use.rows for use in uses))
            # Layers may share a weight, or have parts of it.
            done = sum(use.rows * use.in_features * use.out_features for use in uses)
            products[id(weight)] = products.get(id(weight), 0) + done
    if not any(rows):
        return coverage_of(model)
    most = statistics.median_low(rows)
    elements = elements_of_weights(model)
    amounts = {one: 2 * products.get(one, count * most) for one, count in elements.items()}
    found = coverage_of(model, amounts)
    return dataclasses.replace(found, is_estimate=bool(found.left))


def _controllers_of(model: nn.Module) -> list[Controller]:
    found = (layer.layer_state.controller for _, layer in converted_layers(model))
    return [c for c in dict.fromkeys(found) if isinstance(c, Controller)]


def _line(controller: Controller, name: str, share: float) -> str:
    seen = controller.seen[name]
    if controller.divided_among(name) > 1:
        return f"{'–':>9}{_share(share):>8}  divided by tensor parallelism"
    if not seen:
        return f"{'–':>9}{_share(share):>8}"
    square = statistics.fmean(one.square for one in seen)
    variance = statistics.fmean(one.variance_of(share if share < EXACT else 0.5) for one in seen)
    noise = f"{variance / square:.3g}" if square > 0 else "–"
    rows = seen[-1].uses[0].rows if seen[-1].uses else 0
    line = f"{rows:9}{_share(share):>8}{noise:>9}"
    times = controller.seconds_of(name)
    if times is not None:
        dense, now = map(milliseconds, times)
        line += f"{dense:>11}{now:>9}"
    return line


def _share(share: float) -> str:
    return "exact" if share == EXACT else f"1/{round(1 / share)}"
