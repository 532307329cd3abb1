"""The controller of a model whose layers have `ratio="auto"`.

It lives from one step of the optimizer to the next. At the end of each it takes the time, reads
what was observed, and sets the mode of every layer for the whole next step, so that accumulated
and checkpointed passes of a step agree:

- *exact*: all layers compute like `nn.Linear`. A few steps are observed; then the layers' calls are
  timed at their shapes, and the choice of most progress per second is found.
- *trial*: if that promises a gain, windows of sampled and of exact steps take turns.
- *sampling*: if the measured gain holds, the choice stays. It is reviewed from time to time.
"""

from __future__ import annotations

import logging
import math
import statistics
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from memaop_triton.auto.clock import StepClock
from memaop_triton.auto.observing import Seen, StepObserver
from memaop_triton.auto.savings import Savings
from memaop_triton.auto.worth import (
    EXACT,
    WORTH_A_CHANGE,
    Layer,
    Worth,
    best_choice,
    obstacle_to,
    progress_of,
    worth_of,
)
from memaop_triton.config import MemAOPConfig
from memaop_triton.kernels import targets
from memaop_triton.monitor.hull import Option
from memaop_triton.nn.layer_state import LayerState
from memaop_triton.nn.linear import MemAOPLinear

_log = logging.getLogger("memaop_triton.auto")

#: K/M that a layer may get.
SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)

_FIRST_LOOKS = (5, 9, 13)  # steps that are observed; after the last one comes the first decision
_LOOKS = 4  # that a decision is based on, evenly spaced: noise changes as training goes on
_WINDOW = 8  # steps of one mode in a trial
_WINDOWS = 4  # of a trial, sampled ones first
_REVIEW_AFTER = 100  # steps
_LONGEST_REVIEW = 1600
# One-sided 90 % quantiles of Student's t for one degree of freedom, two, and so on.
_STUDENT = (3.078, 1.886, 1.638)


class Controller:
    """Decides for the layers of one model.

    Args:
        layers: By qualified name, each with the configuration that was asked for.

    Attributes:
        phase: "exact", "trial", "sampling" or "frozen".
        shares: K/M of every layer in sampled steps, 1 for an exact gradient.
        predicted: What `shares` promised when they were chosen; `None` before the first decision.
        realised: Measured progress per second over dense's, of the last trial.
        speedup: Measured seconds of an exact step over a sampled one, of the last trial.
        obstacle: Why nothing is sampled, if nothing is.
    """

    def __init__(self, layers: Mapping[str, tuple[nn.Linear, MemAOPConfig]]) -> None:
        self.phase = "exact"
        self.shares: dict[str, float] = dict.fromkeys(layers, EXACT)
        self.predicted: Worth | None = None
        self.realised: float | None = None
        self.speedup: float | None = None
        self.obstacle = ""
        self.steps = 0
        self.seen: dict[str, deque[Seen]] = {name: deque(maxlen=_LOOKS) for name in layers}
        self._states = {name: _state_of(layer) for name, (layer, _) in layers.items()}
        self._layers = [weakref.ref(layer) for layer, _ in layers.values()]
        # One object for each, because what is recorded of a step belongs to its configuration.
        self._configs = {
            name: {share: config.spending(ratio=share) for share in (EXACT, *SHARES)}
            for name, (_, config) in layers.items()
        }
        self._savings = Savings()
        self._clock: StepClock | None = None
        self._observers: dict[str, StepObserver] = {}
        # Kinds of the steps of a trial that are to come. The times of the first steps of a mode,
        # which have kinds of their own, are not looked at.
        self._window: list[str] = []
        self._decide_at = _FIRST_LOOKS[-1]
        self._patience = _REVIEW_AFTER
        self._owners: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self._kind: str | None = None  # of the step that is running
        for state in self._states.values():
            state.controller = self
        self._prepare()

    # The end of a step. --------------------------------------------------------------------------

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after the step of any optimizer."""
        is_ours = self._owners.get(optimizer)
        if is_ours is None:
            is_ours = self._owners[optimizer] = self._is_led_by(optimizer)
        if is_ours and not targets.is_capturing(self._device):
            self._end_step()

    @property
    def _device(self) -> torch.device:
        return next(iter(self._states.values())).handle.device

    def _is_led_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it updates the first trainable weight of ours: steps are counted by that one."""
        layers = (layer() for layer in self._layers)
        weights = (layer._parameters.get("weight") for layer in layers if layer is not None)
        leader = next((w for w in weights if w is not None and w.requires_grad), None)
        groups = optimizer.param_groups
        return any(parameter is leader for group in groups for parameter in group["params"])

    def _ours(self) -> list[tuple[str, LayerState]]:
        """The layers that have not been given a ratio of their own since."""
        return [(name, s) for name, s in self._states.items() if s.controller is self]

    def _end_step(self) -> None:
        if self._clock is None:
            self._clock = StepClock(self._device)
        self._clock.tick(self._kind)
        self.steps += 1
        self._read()
        is_tried = self.phase == "trial" and not self._window
        if is_tried or (self.phase in ("exact", "sampling") and self.steps >= self._decide_at):
            if is_tried:
                self._judge()
            else:
                self._decide()
            self._decide_at = self.steps + self._patience
        self._prepare()

    def _prepare(self) -> None:
        """The modes of the next step."""
        is_observed = self._is_observed(self.steps + 1)
        kind = "sampled" if self.phase == "sampling" else "exact"
        if self.phase == "trial":
            kind = self._window.pop(0)
        is_sampled = self.phase == "frozen" or kind in ("sampled", "settling")
        self._kind = None if is_observed else kind
        for name, state in self._ours():
            share = self.shares[name] if is_sampled else EXACT
            state.config = self._configs[name][share]
            state.is_native = share == EXACT and not is_observed
            if is_observed:
                state.step_observer = self._observers[name] = StepObserver(state)

    def _is_observed(self, step: int) -> bool:
        if self.phase in ("trial", "frozen") or _is_distributed():
            return False
        if step <= _FIRST_LOOKS[-1]:
            return step in _FIRST_LOOKS
        return (self._decide_at - step) % (self._patience // _LOOKS) == 0

    def _read(self) -> None:
        """Take what the step that has ended showed."""
        for name, observer in self._observers.items():
            self._states[name].step_observer = None
            seen = observer.read()
            if seen is not None and seen.is_finite:
                self.seen[name].append(seen)
        self._observers = {}

    # Decisions. ----------------------------------------------------------------------------------

    def _decide(self) -> None:
        assert self._clock is not None
        times = self._clock.seconds("exact")
        if _is_distributed():
            self.obstacle = "processes of a distributed run do not decide yet"
            return
        if len(times) < 3:
            return
        exact = statistics.median(times)
        layers = {name: found for name, _ in self._ours() if (found := self._layer(name))}
        if not layers:
            return
        best = best_choice(layers, exact)
        self.predicted = best
        self.obstacle = obstacle_to(layers, exact)
        if self.cautious_progress(best) < WORTH_A_CHANGE:
            self._change("exact", dict.fromkeys(self._states, EXACT))
            self._wait_longer()
            return
        shares = dict.fromkeys(self._states, EXACT) | best.shares
        if self.phase == "sampling":
            now = worth_of(layers, self.shares, exact)
            if now.progress >= WORTH_A_CHANGE and best.progress < WORTH_A_CHANGE * now.progress:
                self.predicted = now
                return
        self._change("trial", shares)
        one = ["settling", *["sampled"] * (_WINDOW - 1)]
        other = ["resting", *["exact"] * (_WINDOW - 1)]
        self._window = [kind for i in range(_WINDOWS) for kind in (one, other)[i % 2]]
        for kind in ("sampled", "exact"):
            self._clock.forget(kind)

    def _judge(self) -> None:
        """Keep what was tried, or take it back."""
        assert self._clock is not None
        assert self.predicted is not None
        self.speedup = self._clock.median("exact") / self._clock.median("sampled")
        self.realised = self.speedup * progress_of(self.predicted.noise)
        self.obstacle = f"sampled steps were measured to be worth {self.realised:.2f} of exact ones"
        if self.realised >= WORTH_A_CHANGE:
            self._patience = _REVIEW_AFTER
            self._change("sampling", self.shares)
        else:
            self._change("exact", dict.fromkeys(self._states, EXACT))
            self._wait_longer()

    def _wait_longer(self) -> None:
        self._patience = min(2 * self._patience, _LONGEST_REVIEW)

    def _layer(self, name: str) -> Layer | None:
        """What is known of a layer; `None` before it was seen."""
        seen = self.seen[name]
        if not seen:
            return None
        square = statistics.fmean(one.square for one in seen)
        seconds = self._savings.seconds(seen[-1].uses, self._configs[name])
        options = [
            Option(share, seconds[share], statistics.fmean(one.variance_of(share) for one in seen))
            for share in (EXACT, *SHARES)
        ]
        return Layer(options, square)

    def cautious_progress(self, worth: Worth) -> float:
        """Progress per second at the upper end of a 90 % interval of the noise."""
        looks = min(len(self.seen[name]) for name in worth.shares)
        noises = []
        for look in range(1, looks + 1):
            ones = {name: self.seen[name][-look] for name in worth.shares}
            square = sum(one.square for one in ones.values())
            sampled = {name: share for name, share in worth.shares.items() if share < EXACT}
            variance = sum(ones[name].variance_of(share) for name, share in sampled.items())
            noises.append(variance / square if square > 0 else math.inf)
        if worth.noise == 0:
            return worth.progress
        if looks < 2:
            return 0.0
        error = statistics.stdev(noises) / math.sqrt(looks)
        return worth.speedup * progress_of(statistics.fmean(noises) + _STUDENT[looks - 2] * error)

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
            "patience": self._patience,
            "predicted": None if self.predicted is None else list(self.predicted[1:]),
            "realised": self.realised,
            "speedup": self.speedup,
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
        self.phase, self.shares = state["phase"], dict(state["shares"])
        self.steps, self._patience = state["steps"], state["patience"]
        predicted = state["predicted"]
        self.predicted = None if predicted is None else Worth(dict(self.shares), *predicted)
        self.realised, self.speedup = state["realised"], state["speedup"]
        self.obstacle = state["obstacle"]
        for seen in self.seen.values():
            seen.clear()
        self._clock, self._window = None, []
        self._read()
        self._decide_at = max(_FIRST_LOOKS[-1], self.steps + self._patience)
        self._prepare()

    # What users see. -----------------------------------------------------------------------------

    def freeze(self) -> None:
        """Keep what was decided last, from the next step on; no more clocks and observations."""
        if self.phase != "sampling":
            self.shares = dict.fromkeys(self._states, EXACT)
        self._change("frozen", self.shares)
        self._prepare()

    def seconds_of(self, name: str) -> tuple[float, float] | None:
        """Of a layer's weight gradients in a step, dense and now; `None` before a decision."""
        if self.predicted is None or not self.seen[name]:
            return None
        seconds = self._savings.seconds(self.seen[name][-1].uses, self._configs[name])
        return seconds[EXACT], seconds[self.shares[name]]

    def summary(self) -> str:
        """What is decided, in one line."""
        if self.predicted is None:
            return f"exact: {self.obstacle or 'nothing is known yet'}"
        count = sum(share < EXACT for share in self.shares.values())
        which = f"sampling {count} of {len(self.shares)} layers"
        unit = "times dense's progress per second"
        if self.phase == "trial":
            return f"trying {which}, predicted {self.predicted.progress:.2f} {unit}"
        if count and self.realised is not None:
            return f"{self.realised:.2f} {unit}, predicted {self.predicted.progress:.2f}; {which}"
        return f"dense is best here: {self.obstacle}"


_controllers: weakref.WeakSet[Controller] = weakref.WeakSet()


def control(layers: Mapping[str, tuple[nn.Linear, MemAOPConfig]]) -> Controller:
    """Let a new controller decide for these layers from now on."""
    controller = Controller(layers)
    _controllers.add(controller)
    _listen()
    return controller


def _state_of(layer: nn.Linear) -> LayerState:
    assert isinstance(layer, MemAOPLinear)
    return layer.layer_state


def _listen() -> None:
    global _handle
    if _handle is None:
        _handle = register_optimizer_step_post_hook(_stepped)


_handle: Any = None


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for controller in list(_controllers):
        controller.optimizer_stepped(optimizer)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
