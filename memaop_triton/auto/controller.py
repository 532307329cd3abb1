"""The controller of a model whose layers have `ratio="auto"`.

It lives from one step of the optimizer to the next. At the end of each it takes the time, reads
what was observed, and sets the mode of every layer for the whole next step, so that accumulated
and checkpointed passes of a step agree:

- *exact*: all layers compute like `nn.Linear`. The first seconds of a training are left alone, so
  that a short one does not pay for decisions that it cannot use. Then a few steps are observed, the
  layers' calls are timed at their shapes, and the choice of most progress per second is found.
- *trial*: if that promises a gain, windows of sampled and of exact steps take turns.
- *sampling*: if the measured gain holds, the choice stays. It is reviewed from time to time.
"""

from __future__ import annotations

import itertools
import logging
import math
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memaop_triton.auto.agenda import LEFT_ALONE, Agenda
from memaop_triton.auto.agreement import Processes, SeenByAll, divided_among
from memaop_triton.auto.clock import StepClock
from memaop_triton.auto.evidence import Evidence
from memaop_triton.auto.observing import Seen, StepObserver
from memaop_triton.auto.optimizer_steps import OptimizerSteps
from memaop_triton.auto.worth import (
    EXACT,
    WORTH_A_CHANGE,
    Worth,
    best_choice,
    obstacle_to,
    progress_of,
    worth_of,
)
from memaop_triton.config import MemAOPConfig
from memaop_triton.kernels import targets
from memaop_triton.nn.layer_state import LayerState
from memaop_triton.nn.linear import MemAOPLayer
from memaop_triton.nn.packed import weight_parameter_of

_log = logging.getLogger("memaop_triton.auto")

# Windows of a trial, the first step of each apart. That of a sampled one refreshes a subspace, by
# default, and its last step does so again, so that the others and one refresh are compared.
_SAMPLED, _EXACT = ["settling", *["sampled"] * 8], ["resting", *["exact"] * 7]
_WINDOWS = (_SAMPLED, _EXACT, _SAMPLED, _EXACT)
_NOTHING_YET = f"a training is left alone for its first {LEFT_ALONE:g} seconds"


class Controller:
    """Decides for the layers of one model.

    Args:
        layers: By qualified name, each with the configuration that was asked for.
        processes: Those that decide alike.

    Attributes:
        phase: "exact", "trial", "sampling" or "frozen".
        shares: K/M of every layer in sampled steps, 1 for an exact gradient.
        predicted: What `shares` promised when they were chosen; `None` before the first decision.
        realised: Measured progress per second over dense's, of the last trial.
        obstacle: Why nothing is sampled, if nothing is.
    """

    def __init__(
        self, layers: Mapping[str, tuple[nn.Module, MemAOPConfig]], processes: Processes
    ) -> None:
        self.phase = "exact"
        self.shares: dict[str, float] = {}
        self.predicted: Worth | None = None
        self.realised: float | None = None
        self.obstacle = ""
        self.steps = 0
        self._processes = processes
        self._is_checked = False  # that all processes have the same layers and decisions
        self._states: dict[str, LayerState] = {}
        self._layers: dict[str, Callable[[], MemAOPLayer | None]] = {}
        self._asked: dict[str, MemAOPConfig] = {}
        self._evidence = Evidence(processes)
        self._clock: StepClock | None = None
        self._observers: dict[str, StepObserver] = {}
        # Kinds of the steps of a trial that are to come. The times of the first steps of a mode,
        # which have kinds of their own, are not looked at.
        self._window: list[str] = []
        self._agenda = Agenda()
        self._cost_of_a_look = math.nan  # that an observed step takes more, in exact ones
        # Of the step that is running.
        self._kind: str | None = None
        self._is_observed = self._is_sampled = False
        for name, (layer, config) in layers.items():
            assert isinstance(layer, MemAOPLayer)
            self._add(name, layer, config, EXACT)
        self._optimizer_steps = OptimizerSteps(self._first_weight, self._optimizer_stepped)
        self._prepare()

    def _add(self, name: str, layer: MemAOPLayer, config: MemAOPConfig, share: float) -> None:
        state = self._states[name] = layer.layer_state
        state.controller, state.name = self, name
        self._layers[name] = weakref.ref(layer)
        self._asked[name] = config
        self._evidence.add_layer(name, config, layer.gradient_shape)
        self.shares[name] = share

    # Copies. -------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        # The controller of a copy, which begins with no layers: they come one by one.
        return _resumed, (self._asked, self.state_dict(), self._processes)

    def resume(self, asked: Mapping[str, MemAOPConfig], state: Mapping[str, Any]) -> None:
        """Go on from what another controller decided, without layers as yet."""
        self._asked, self._decided = dict(asked), dict(state["shares"])
        self._go_on_from(state)
        self._prepare()

    def adopt(self, layer: nn.Module) -> None:
        """Decide for a copied layer, whose state came with a copy of its controller."""
        assert isinstance(layer, MemAOPLayer)
        name = layer.layer_state.name
        if self._states.get(name) is not layer.layer_state:  # else a shallow copy
            self._add(name, layer, self._asked[name], self._decided[name])
            self._set_mode(name)

    # The end of a step. --------------------------------------------------------------------------

    def _optimizer_stepped(self) -> None:
        if not targets.is_capturing(self._device):
            self._end_step()

    @property
    def _device(self) -> torch.device:
        return next(iter(self._states.values())).handle.device

    def _first_weight(self) -> Tensor | None:
        """The first one that is trained: steps are those of its optimizer."""
        layers = [layer for find in self._layers.values() if (layer := find()) is not None]
        weights = map(weight_parameter_of, layers)
        return next((w for w in weights if w is not None and w.requires_grad), None)

    def _ours(self) -> list[str]:
        """The layers that have not been given a ratio of their own since."""
        return [name for name, state in self._states.items() if state.controller is self]

    def _end_step(self) -> None:
        if self._clock is None:
            self._clock = StepClock(self._device)
        self._clock.tick(self._kind)
        self.steps += 1
        if not self._is_checked:
            decided = self.phase, self.steps, self._agenda.patience, self.shares
            description = f"{self._evidence.description()} {decided}"
            self._processes.check_alike(description, self._device)
            self._is_checked = True
        if self._is_observed:
            self._read()
        is_tried = self.phase == "trial" and not self._window
        has_looks = self.phase in ("exact", "sampling")
        if is_tried or (has_looks and self._agenda.decides_after(self.steps)):
            if is_tried:
                self._judge()
            else:
                self._decide()
            self._agenda.wait(self.steps, self._cost_of_a_look)
        elif has_looks and self._agenda.asks_for_seconds(self.steps):
            (seconds,) = self._processes.mean([self._clock.median("exact")], self._device)
            self._agenda.begin(self.steps, seconds)
        self._prepare()

    def _prepare(self) -> None:
        """The modes of the next step."""
        has_looks = self.phase in ("exact", "sampling")
        self._is_observed = has_looks and self.steps + 1 in self._agenda.looks
        kind = "sampled" if self.phase == "sampling" else "exact"
        if self.phase == "trial":
            kind = self._window.pop(0)
        self._is_sampled = self.phase == "frozen" or kind in ("sampled", "settling")
        self._kind = "observed" if self._is_observed else kind
        for name in self._ours():
            self._set_mode(name)

    def _set_mode(self, name: str) -> None:
        state = self._states[name]
        share = self.shares[name] if self._is_sampled else EXACT
        is_observed = self._is_observed and self.divided_among(name) == 1
        state.config = self._evidence.configs[name][share]
        state.is_native = share == EXACT and not is_observed and state.config.stash == "exact"
        if is_observed:
            # The seeds of sketches differ by layer and step, and are the same in all processes.
            seed = (self.steps + 1) * len(self._asked) + list(self._asked).index(name)
            observer = StepObserver(state, self._processes.sketcher(seed))
            state.step_observer = self._observers[name] = observer

    def _read(self) -> None:
        """Take what the step that has ended showed, to all processes together."""
        among = {name: self.divided_among(name) for name in self._ours()}
        whole = [name for name, count in among.items() if count == 1]
        observers = {name: self._observers[name] for name in whole if name in self._observers}
        self._stop_observing()
        # The processes that divide a layer have the same rows, and draw alike.
        self._evidence.read(observers, max(among.values(), default=1), self._device)

    def _stop_observing(self) -> None:
        for name in self._observers:
            self._states[name].step_observer = None
        self._observers = {}
        self._is_observed = False

    def divided_among(self, name: str) -> int:
        """The processes among which tensor parallelism divides a layer, which then stays exact."""
        layer = self._layers[name]() if self._states[name].controller is self else None
        return 1 if layer is None else divided_among(layer)

    # Decisions. ----------------------------------------------------------------------------------

    def _decide(self) -> None:
        assert self._clock is not None
        times, observed = self._clock.seconds("exact"), self._clock.median("observed")
        exact, observed = self._evidence.time(self._ours(), times, observed, self._device)
        self._cost_of_a_look = observed / exact - 1
        layers = self._evidence.layers()
        if math.isnan(exact):
            return
        if not layers:
            divided = [name for name in self._states if self.divided_among(name) > 1]
            self.obstacle = "tensor parallelism divides the layers" if divided else ""
            return
        best = best_choice(layers, exact)
        self.predicted = best
        self.obstacle = obstacle_to(layers, exact)
        if self._evidence.cautious_progress(best) < WORTH_A_CHANGE:
            self._change("exact", dict.fromkeys(self._states, EXACT))
            self._agenda.gain_confidence()
            return
        shares = dict.fromkeys(self._states, EXACT) | best.shares
        if self.phase == "sampling":
            now = worth_of(layers, self.shares, exact)
            if now.progress >= WORTH_A_CHANGE and best.progress < WORTH_A_CHANGE * now.progress:
                self.predicted = now
                self._agenda.gain_confidence()
                return
        self._change("trial", shares)
        self._window = list(itertools.chain.from_iterable(_WINDOWS))
        for kind in ("sampled", "exact"):
            self._clock.forget(kind)

    def _judge(self) -> None:
        """Keep what was tried, or take it back."""
        assert self._clock is not None
        assert self.predicted is not None
        # Exact steps are all alike. A break between two sampled ones counts against these.
        seconds = [self._clock.median("exact"), self._clock.median("observed")]
        seconds.append(self._clock.mean("sampled"))
        exact, observed, sampled = self._processes.mean(seconds, self._device)
        self._cost_of_a_look = observed / exact - 1
        progress = exact / sampled * progress_of(self.predicted.noise)
        if math.isnan(progress):  # a device that is many steps behind
            self.realised = None
            self.obstacle = "no times of sampled steps are known yet"
        else:
            self.realised = progress
            self.obstacle = f"sampled steps were measured to be worth {progress:.2f} of exact ones"
        if progress >= WORTH_A_CHANGE:
            self._agenda.start_over()
            self._change("sampling", self.shares)
        else:
            self._change("exact", dict.fromkeys(self._states, EXACT))
            self._agenda.gain_confidence()

    def _change(self, phase: str, shares: dict[str, float]) -> None:
        before, self.phase, self.shares = self.phase, phase, shares
        if phase != before:
            _log.info("step %d: %s", self.steps, self.summary())

    # Saving. -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What was decided, as numbers and strings. A trial that is under way is not."""
        is_decided = self.phase in ("sampling", "frozen")
        return {
            "phase": self.phase if is_decided else "exact",
            "shares": dict(self.shares) if is_decided else dict.fromkeys(self.shares, EXACT),
            "steps": self.steps,
            "patience": self._agenda.patience,
            "predicted": None if self.predicted is None else list(self.predicted[1:]),
            "realised": self.realised,
            "obstacle": self.obstacle,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` if `state` is of other layers."""
        odd = sorted(state["shares"].keys() ^ self.shares.keys())
        if odd:
            raise ValueError(f"decisions are about other layers: {odd}.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what another controller of the same layers decided.

        Raises:
            ValueError: They are other layers.
        """
        self.check_state(state)
        self.shares = dict(state["shares"])
        self._go_on_from(state)
        self._prepare()

    def _go_on_from(self, state: Mapping[str, Any]) -> None:
        self._stop_observing()
        self.phase, self._agenda = state["phase"], Agenda(state["patience"])
        predicted = state["predicted"]
        self.predicted = None if predicted is None else Worth(dict(state["shares"]), *predicted)
        self.realised = state["realised"]
        self.obstacle = state["obstacle"]
        for seen in self.seen.values():
            seen.clear()
        self._clock, self._window, self._is_checked = None, [], False
        # Before the first decision there is nothing to go on from.
        is_decided = self.phase == "frozen" or predicted is not None
        self.steps = state["steps"] if is_decided else 0
        if is_decided:
            self._agenda.wait(self.steps)

    # What users see. -----------------------------------------------------------------------------

    def freeze(self) -> None:
        """Keep what was decided last, from the next step on; no more clocks and observations."""
        if self.phase != "sampling":
            self.shares = dict.fromkeys(self._states, EXACT)
        self._stop_observing()
        self._change("frozen", self.shares)
        self._prepare()

    @property
    def seen(self) -> dict[str, deque[Seen | SeenByAll]]:
        """What the newest observed steps showed of each layer."""
        return self._evidence.seen

    def seconds_of(self, name: str) -> tuple[float, float] | None:
        """Of a layer's weight gradients in a step, dense and now; `None` before a decision."""
        seconds = self._evidence.seconds[name]
        is_known = self.predicted is not None and not math.isnan(seconds[EXACT])
        return (seconds[EXACT], seconds[self.shares[name]]) if is_known else None

    def summary(self) -> str:
        """What is decided, in one line."""
        if self.predicted is None:
            return f"exact: {self.obstacle or _NOTHING_YET}"
        count = sum(share < EXACT for share in self.shares.values())
        which = f"sampling {count} of {len(self.shares)} layers"
        unit = "times dense's progress per second"
        if self.phase == "trial":
            return f"trying {which}, predicted {self.predicted.progress:.2f} {unit}"
        if count and self.realised is not None:
            return f"{self.realised:.2f} {unit}, predicted {self.predicted.progress:.2f}; {which}"
        return f"dense is best here: {self.obstacle}"


def control(
    layers: Mapping[str, tuple[nn.Module, MemAOPConfig]], processes: Processes | None = None
) -> Controller:
    """Let a new controller decide for these layers from now on, all processes alike if `None`."""
    return Controller(layers, Processes() if processes is None else processes)


def _resumed(
    asked: Mapping[str, MemAOPConfig], state: Mapping[str, Any], processes: Processes
) -> Controller:
    """A controller that goes on from what another one decided, for layers that `adopt` brings."""
    controller = Controller({}, processes)
    controller.resume(asked, state)
    return controller
