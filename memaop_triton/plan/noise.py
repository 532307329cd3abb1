"""The noise of sampled gradients before training: what `ratio="auto"` would see of a few batches.

While a batch is observed, layers are converted and exact, so that whatever the library handles in
training (checkpointing, layers that are used several times, autocast) it handles here. The model is
the same afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from memaop_triton.auto.observing import Seen, StepObserver
from memaop_triton.auto.timing import generators_restored
from memaop_triton.auto.worth import EXACT
from memaop_triton.backward.step import Operands
from memaop_triton.memory.kinds import Memory
from memaop_triton.nn.layer_choice import Chosen
from memaop_triton.nn.layer_state import LayerState
from memaop_triton.plan.observing import converted, run_backward, untouched


class Noise(NamedTuple):
    """What was seen.

    Attributes:
        seen: Steps by name of the layer, those that are to be averaged.
        batches: How many there were.
        is_bound: Whether V of some layers is that without their subspace, an upper bound.
    """

    seen: dict[str, list[Seen]]
    batches: int
    is_bound: bool


def observe_noise(
    model: nn.Module,
    layers: Chosen,
    batches: Iterable[object],
    loss_fn: Callable[[Any], Tensor] | None = None,
) -> Noise:
    """Run every batch forward and backward, each from the state that the model has now.

    A basis leaves less of the rows that it was made from than of those of another batch. So the
    first batch that a layer with a subspace sees makes its bases, and its V is read from the next
    ones; if there are none, V is that without a subspace.

    Args:
        model: As for `observe`.
        layers: Those to observe, with `ratio="auto"`.
        batches: Each as `example_inputs` of `plan`. One after the other is taken and run.
        loss_fn: As for `plan`; if `None`, the output has a loss.
    """
    first: dict[str, Seen] = {}
    later: dict[str, list[Seen]] = {name: [] for name in layers}
    memories: dict[str, Memory | None] = {}
    count = 0
    with generators_restored({parameter.device for parameter in model.parameters()}):
        for batch in batches:
            count += 1
            with untouched(model, batch), _observed(layers, memories, first.keys()) as observers:
                run_backward(model, batch, loss_fn)
                for name, observer in observers.items():
                    seen = observer.read()
                    if seen is None or not seen.is_finite:
                        continue
                    if isinstance(observer, _FirstLook):
                        first[name] = seen
                    else:
                        later[name].append(seen)
    bounds = {name: [seen] for name, seen in first.items() if not later[name]}
    return Noise(later | bounds, count, bool(bounds))


class _FirstLook(StepObserver):
    """Has the bases of a memory made, and sees the noise that there is without them."""

    def __init__(self, state: LayerState) -> None:
        super().__init__(state)
        self._beside = StepObserver(state)

    def observe_exact(self, operands: Operands, dw: Tensor, memory: Memory | None) -> None:
        """Take note of a pass."""
        super().observe_exact(operands, dw, None)
        self._beside.observe_exact(operands, dw, memory)


@contextlib.contextmanager
def _observed(
    layers: Chosen, memories: dict[str, Memory | None], known: Iterable[str]
) -> Iterator[dict[str, StepObserver]]:
    """Inside, the layers are converted and observed; the memories go from one batch to the next."""
    exact = {
        name: (layer, config.spending(ratio=EXACT)) for name, (layer, config) in layers.items()
    }
    observers: dict[str, StepObserver] = {}
    known = set(known)
    with converted(exact) as ours:
        for name, layer in ours.items():
            state = layer.layer_state
            state.memory = memories.setdefault(name, state.memory)
            is_first = state.memory is not None and name not in known
            observer = _FirstLook(state) if is_first else StepObserver(state)
            state.step_observer = observers[name] = observer
        yield observers
