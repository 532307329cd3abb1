"""`allocate_`: ratios of all layers from one budget of FLOPs, by what a monitor observed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from torch import nn

from memaop_triton.config import MemAOPConfig
from memaop_triton.config.parts import Sampled
from memaop_triton.flops import input_grad_flops, weight_grad_flops
from memaop_triton.memory.kinds import SubspaceMemory
from memaop_triton.monitor.diagnostics import LayerDiagnostics
from memaop_triton.monitor.hull import Option, lower_hull, slope
from memaop_triton.monitor.monitor import Monitor
from memaop_triton.nn.layer_choice import converted_layers
from memaop_triton.nn.linear import MemAOPLayer

#: Ratios to choose from. Each is twice the one before: a few sizes are tuned on a GPU, not many.
DEFAULT_RATIOS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
#: Budgets to choose from. The rows of a layer with a budget depend on its rank, so its sizes are
#: many in any case.
DEFAULT_BUDGETS = (*(n / 64 for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)), 3 / 4)


def allocate_(
    model: nn.Module,
    monitor: Monitor,
    budget: float = 1 / 8,
    ratios: Sequence[float] | None = None,
) -> dict[str, float]:
    """Give the layers of `model` the ratios that add the least variance within a budget.

    A layer that has a budget is given another budget instead; within it the layer chooses side and
    rank of its subspace as before.

    Minimises Σ_l uses_l · V_l(K_l) with V(K) = Σ s² (1/p − 1) over the list, while
    Σ_l cost_l(K_l) ≤ budget · Σ_l dense cost_l; uses_l is how often a step uses layer l. All layers
    weigh the same: weights of 1/‖dW‖² gave a higher loss, also under AdamW (docs/quality.md).

    V is the variance of drawing every row with the probability p = min(1, λ s) that makes K rows
    (`memaop_triton.sampling.variance`). `priority` and `bernoulli` have it; for other policies it
    is only an upper limit of what sampling loses. The scores are the monitor's averages, or what
    the subspace measured when it last chose its rank. A cost is that of the products of the weight
    gradient, those of the subspace and, where the input gradient is sampled, its own (its noise is
    not counted). A projected input gradient is left as it is.

    The memories stay, and no compiled graph is built anew. Call it again every few hundred steps:
    scores change. In a distributed run every process has its own monitor; where processes share a
    layer, call it in one process and set its result in all.

    Args:
        model: The model that is watched.
        monitor: What `monitor(model)` returned, at least one observation old. Layers that it has
            not observed keep their ratios and take no part.
        budget: Share in (0, 1] of the FLOPs that the dense gradients take.
        ratios: Ratios to choose from, and budgets (a 1 among them is for ratios alone); `None` for
            `DEFAULT_RATIOS` and `DEFAULT_BUDGETS`.

    Returns:
        The new ratios and budgets by name of the layer.

    Raises:
        ValueError: Nothing was observed yet, the budget is too small for the smallest ratio, or an
            argument is out of range.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget={budget} must be in (0, 1]: 0.125 is an eighth of dense.")
    if ratios is not None and not (ratios and all(0 < ratio <= 1 for ratio in ratios)):
        raise ValueError(f"ratios={ratios} must be one or more numbers in (0, 1].")
    diagnostics = monitor.read()
    layers = {name: layer for name, layer in converted_layers(model) if name in diagnostics}
    if not layers:
        raise ValueError(
            "monitor has not observed any layer of model: train a few steps between monitor(model) "
            "and allocate_(model, monitor)."
        )
    most_uses = max(diagnostics[name].observations for name in layers)
    options: dict[str, list[Option]] = {}
    available = 0.0
    for name, layer in layers.items():
        # How often a layer runs in a step, relative to the one that runs most often.
        uses = diagnostics[name].observations / most_uses
        options[name] = _options(layer, diagnostics[name], ratios, uses)
        available += budget * uses * _dense_flops(layer, diagnostics[name].rows)
    chosen = best_options(options, available)
    for name, option in chosen.items():
        layer = layers[name]
        if layer.config.budget is None:
            layer.set_ratio_(option.share)
        elif layer.config.budget != option.share:
            layer.set_budget_(option.share)
    return {name: option.share for name, option in chosen.items()}


def best_options(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """One option for each name, of least total variance among those that cost at most `budget`.

    Steps along the lower convex hulls of variance against cost, the steepest first, are the optimum
    for every budget at which they end (Lagrange). What remains of the budget is then spent on the
    steps that gain most among those that still fit, so that the total exceeds the optimum by less
    than the gain of the first step that did not fit. Equal steps are taken in the order of the
    names.

    Raises:
        ValueError: The cheapest options cost more than the budget.
    """
    hulls = {name: lower_hull(choices) for name, choices in options.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    spent = math.fsum(option.cost for option in chosen.values())
    # Allow for rounding in the sum.
    room = budget * (1 + 1e-8) - spent
    if room < 0:
        raise ValueError(
            f"budget of {budget:.4g} FLOPs is below the {spent:.4g} that the smallest ratio takes "
            "everywhere: raise budget, add a smaller ratio, or lower the rank of the subspaces."
        )
    steps = [
        (slope(before, after), order, name, place)
        for order, (name, hull) in enumerate(hulls.items())
        for place, (before, after) in enumerate(itertools.pairwise(hull))
    ]
    for _, _, name, place in sorted(steps):
        before, after = hulls[name][place : place + 2]
        if chosen[name] is before and after.cost - before.cost <= room:
            chosen[name] = after
            room -= after.cost - before.cost
    while True:
        gains = [
            (option.variance - chosen[name].variance, order, name, option)
            for order, (name, choices) in enumerate(options.items())
            for option in choices
            if option.variance < chosen[name].variance and option.cost - chosen[name].cost <= room
        ]
        if not gains:
            return chosen
        _, _, name, option = min(gains, key=lambda gain: gain[:2])
        room -= option.cost - chosen[name].cost
        chosen[name] = option


def _options(
    layer: MemAOPLayer, seen: LayerDiagnostics, ratios: Sequence[float] | None, uses: float
) -> list[Option]:
    """What a layer may get, with its FLOPs and variance in as many uses."""
    has_budget = layer.config.budget is not None
    shares = set(map(float, ratios or (DEFAULT_BUDGETS if has_budget else DEFAULT_RATIOS)))
    options = []
    for share in sorted(shares - {1.0} if has_budget else shares):
        spent = {"budget": share} if has_budget else {"ratio": share}
        flops, variance = _outcome(layer, seen, layer.config.spending(**spent))
        options.append(Option(share, uses * flops, uses * variance))
    return options


def _outcome(
    layer: MemAOPLayer, seen: LayerDiagnostics, config: MemAOPConfig
) -> tuple[float, float]:
    """FLOPs and variance of a layer's gradients under another configuration."""
    rows, n, p, memory = seen.rows, layer.in_features, layer.out_features, layer.memory
    subspace = of_input_grad = None
    if isinstance(memory, SubspaceMemory):
        subspace, of_input_grad = memory.cost, memory.cost_of_input_grad
    k = config.num_rows(rows, n, p, subspace)
    variance = seen.variance_of(k)
    if isinstance(memory, SubspaceMemory) and config.budget is not None:
        best = memory.least_variance(config)
        if best is not None:
            variance, k, subspace = best
    flops = weight_grad_flops(rows, n, p, k, subspace, config.numbers_scored(n, p))
    if isinstance(config.grad_input, Sampled):
        own = k if config.budget is None else config.num_rows(rows, n, p, of_input_grad)
        flops += input_grad_flops(rows, n, p, own, of_input_grad)
    return float(flops), variance


def _dense_flops(layer: MemAOPLayer, rows: int) -> float:
    halves = 2 if isinstance(layer.config.grad_input, Sampled) else 1
    return 2.0 * rows * layer.in_features * layer.out_features * halves
