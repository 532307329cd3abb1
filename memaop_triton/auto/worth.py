"""What a choice of rows is worth: dense's progress per second, and the choice that has most.

A sampled gradient has a variance V beside the mean square D of the exact one. A step then makes
D/(D + V) of the progress of an exact step: the linear term of the loss stays, and the quadratic one
grows from D to D + V, at a learning rate that suits it (McCandlish et al., arXiv 1812.06162; of the
formulas that were compared with training runs, docs/quality.md, the one that misses least). What
counts is progress per second:

    E = (T_exact / T) · D/(D + V)

Variances, squares and savings of layers add up.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from memaop_triton.monitor.hull import Option, lower_hull, slope

#: The share of an exact gradient.
EXACT = 1.0
#: Progress per second over dense's that is worth a change.
WORTH_A_CHANGE = 1.02
#: V/D above which the progress is not known well enough to bet on it.
MOST_NOISE = 0.5
_MOST_FACTOR = 100  # by which noise might be reduced


class Layer(NamedTuple):
    """What is known of a layer; sums over its uses in a step of the optimizer.

    Attributes:
        options: With seconds for a cost; the exact gradient is one of them.
        square: D.
    """

    options: Sequence[Option]
    square: float


class Worth(NamedTuple):
    """What a choice comes to.

    Attributes:
        shares: K/M by layer, 1 for an exact gradient.
        seconds: Of a step of the optimizer.
        speedup: Exact steps' seconds over these.
        noise: V/D.
        progress: Dense's progress per second in the same unit, E.
    """

    shares: dict[str, float]
    seconds: float
    speedup: float
    noise: float
    progress: float


def progress_of(noise: float) -> float:
    """The progress of a step with this V/D, as a fraction of an exact step's."""
    return 1 / (1 + noise)


def best_choice(layers: Mapping[str, Layer], seconds: float) -> Worth:
    """The choice of most progress per second; all exact, if nothing is better.

    T·(D + V) is quasi-concave in a mixture of options, so the best choice is a vertex of the path
    on which seconds are bought at the lowest price in variance, layer by layer. E may rise and fall
    several times along it. Choices above `MOST_NOISE` are left out.

    Args:
        layers: By name. No layer is given an option whose V is above its own D: an optimizer that
            scales layers by their gradients, as Adam does, does not average it with the others.
        seconds: Of a step in which all layers are exact.
    """
    square = sum(layer.square for layer in layers.values())
    path = [worth for worth in _path(layers, seconds, square) if worth.noise <= MOST_NOISE]
    return max(path, key=lambda worth: worth.progress)


def worth_of(layers: Mapping[str, Layer], shares: Mapping[str, float], seconds: float) -> Worth:
    """What a choice comes to; the arguments are those of `best_choice`, and K/M by layer."""
    left, variance = seconds, 0.0
    for name, layer in layers.items():
        options = {option.share: option for option in layer.options}
        chosen = options[shares[name]]
        left -= options[EXACT].cost - chosen.cost
        variance += chosen.variance
    square = sum(layer.square for layer in layers.values())
    return _worth(shares, seconds, left, variance, square)


def obstacle_to(layers: Mapping[str, Layer], seconds: float) -> str:
    """What keeps sampling from being worth it, in words; arguments as for `best_choice`."""
    quieter = 1.0
    while quieter < _MOST_FACTOR:
        quieter *= 1.25
        less = {name: _quieter(layer, quieter) for name, layer in layers.items()}
        if best_choice(less, seconds).progress >= WORTH_A_CHANGE:
            return (
                f"the noise of sampling would have to be {quieter:.1f} times smaller, as with so "
                "much larger batches"
            )
    return "the layers are too small to get faster"


def _quieter(layer: Layer, factor: float) -> Layer:
    options = [
        dataclasses.replace(option, variance=option.variance / factor) for option in layer.options
    ]
    return layer._replace(options=options)


def _path(layers: Mapping[str, Layer], seconds: float, square: float) -> Iterator[Worth]:
    """From all exact to the fastest options, the cheapest variance per second first."""
    hulls = {}
    for name, layer in layers.items():
        allowed = [option for option in layer.options if option.variance <= layer.square]
        exact = next(option for option in layer.options if option.share == EXACT)
        cheaper = [o for o in reversed(lower_hull(allowed)) if o.cost < exact.cost]
        hulls[name] = [exact, *cheaper]
    shares = dict.fromkeys(layers, EXACT)
    left, variance = seconds, 0.0
    yield _worth(shares, seconds, left, variance, square)
    steps = [_steps(name, hull) for name, hull in hulls.items()]
    for _, name, before, after in heapq.merge(*steps, key=lambda step: step[:2]):
        shares[name] = after.share
        left -= before.cost - after.cost
        variance += after.variance - before.variance
        yield _worth(shares, seconds, left, variance, square)


def _steps(name: str, hull: Sequence[Option]) -> list[tuple[float, str, Option, Option]]:
    """Price, layer, and the options before and after; the prices rise along a hull."""
    return [
        (-slope(after, before), name, before, after) for before, after in itertools.pairwise(hull)
    ]


def _worth(
    shares: Mapping[str, float], exact: float, seconds: float, variance: float, square: float
) -> Worth:
    noise = variance / square if square > 0 else 0.0
    # Savings of layers that add up to more than the step are not to be believed.
    seconds = max(seconds, 0.1 * exact)
    speedup = exact / seconds
    return Worth(dict(shares), seconds, speedup, noise, speedup * progress_of(noise))
