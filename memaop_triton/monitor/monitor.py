"""How much of its gradients a model in training computes, and how noisy they are."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from memaop_triton.memory.kinds import SubspaceMemory
from memaop_triton.monitor.diagnostics import LayerDiagnostics, diagnostics_table
from memaop_triton.monitor.estimates import Figures
from memaop_triton.monitor.kept import KeptBytes, kept_bytes
from memaop_triton.monitor.observer import LayerObserver, Look
from memaop_triton.nn.layer_choice import converted_layers
from memaop_triton.nn.layer_state import LayerState
from memaop_triton.sampling.variance import POINTS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_SECONDS_BETWEEN_REFRESHES = 1.0


class StarvedLayerWarning(UserWarning):
    """A layer computes too few rows for a useful gradient."""


def monitor(
    model: nn.Module, *, every: int = 25, smoothing: float = 0.9, starving: float = 4.0
) -> Monitor:
    """Watch the backward passes of the converted layers of `model` until it is closed.

    Results and random draws stay the same. Every `every`-th backward pass of a layer is observed,
    on its device and without a host synchronisation; only the methods of `Monitor` read the device.
    With `ratio="auto"`, passes that compute as `nn.Linear` does are not observed, and all those are
    that the library looks at for its decisions.

    Args:
        model: A model with converted layers; those that are converted later are not watched.
        every: Backward passes of a layer from one observation to the next, on average. Captured in
            a CUDA graph, a layer is observed in every replay.
        smoothing: Weight of an observation relative to the next one in the averages, in [0, 1).
        starving: A layer computes too few rows if its sampling variance is above this many times
            its batch's own and above the squared norm of its gradient, or if fewer rows have a
            gradient than are computed. After 1/(1 − smoothing) observations a
            `StarvedLayerWarning` is given, once for a layer.

    Raises:
        ValueError: The model has no converted layer, one is watched already, or an argument is out
            of range.
    """
    return Monitor(model, every, smoothing, starving)


class Monitor:
    """Diagnostics of the layers of a model; `monitor` makes it.

    A context manager, which stops watching at its end. What was observed can be read afterwards.
    As with a hook, it is in no `state_dict`, and a copy of the model is not watched.
    """

    def __init__(self, model: nn.Module, every: int, smoothing: float, starving: float) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be at least 1: backward passes, 25 by default.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing} must be in [0, 1): 0 averages nothing.")
        if not starving > 0:
            raise ValueError(f"starving={starving} must be above 0: a ratio of variances.")
        layers = dict(converted_layers(model))
        if not layers:
            raise ValueError("model has no converted layer: call convert_(model) first.")
        for name, layer in layers.items():
            if layer.layer_state.observer is not None:
                raise ValueError(f"layer {name!r} is watched already: close its monitor first.")
        self.starving = starving
        self._patience = 1 / (1 - smoothing)
        self._warned: set[str] = set()
        self._watched: dict[str, tuple[LayerState, LayerObserver]] = {}
        for name, layer in layers.items():
            observer = LayerObserver(every, smoothing, layer.layer_state.handle.device)
            layer.layer_state.observer = observer
            self._watched[name] = layer.layer_state, observer

    def read(self) -> dict[str, LayerDiagnostics]:
        """Diagnostics by qualified name of every layer that was observed.

        Synchronises with the layers' devices, and warns of layers that compute too few rows.
        """
        kept = kept_bytes({name: state for name, (state, _) in self._watched.items()})
        read = {
            name: _diagnostics(*watched, kept.get(name)) for name, watched in self._watched.items()
        }
        result = {name: layer for name, layer in read.items() if layer is not None}
        for name, layer in result.items():
            complaint = layer.complaint(self.starving)
            if complaint and name not in self._warned and layer.observations >= self._patience:
                self._warned.add(name)
                text = f"layer {name!r} starves: {complaint}"
                warnings.warn(text, StarvedLayerWarning, stacklevel=2)
        return result

    def scalars(self, prefix: str = "memaop") -> dict[str, float]:
        """Figures under `prefix/layer/figure`, for a logger; synchronises and warns as `read`.

        ``for name, value in monitor.scalars().items(): writer.add_scalar(name, value, step)``
        """
        return {
            f"{prefix}/{name}/{figure}" if name else f"{prefix}/{figure}": value
            for name, layer in self.read().items()
            for figure, value in layer.scalars().items()
        }

    def table(self) -> Table:
        """The layers as a table of rich; synchronises and warns as `read`.

        With `ratio="auto"` it has K/M as decided and the noise V/D of layers, and below it the
        decision in one line, as `model_report` does. Where layers have a stash, it has what they
        keep of their inputs between forward and backward pass, and what dense layers would.
        """
        controllers = (state.controller for state, _ in self._watched.values())
        summaries = [c.summary() for c in dict.fromkeys(controllers) if c is not None]
        return diagnostics_table(self.read(), self.starving, summaries)

    @contextlib.contextmanager
    def live(self, console: Console | None = None) -> Iterator[Callable[[], None]]:
        """A table that stays in place on the terminal; gives the function to call in every step.

        That function draws it, at most once a second, and not a thread, so that no synchronisation
        falls into the middle of a step.

        Args:
            console: Of rich; the standard output if `None`.
        """
        from rich.live import Live

        drawn_at = -math.inf

        def draw() -> None:
            nonlocal drawn_at
            display.update(self.table(), refresh=True)
            drawn_at = time.monotonic()

        def refresh() -> None:
            if time.monotonic() - drawn_at >= _SECONDS_BETWEEN_REFRESHES:
                draw()

        with Live(console=console, auto_refresh=False) as display:
            draw()
            yield refresh
            draw()

    def close(self) -> None:
        """Stop watching. Nothing happens the second time."""
        for state, observer in self._watched.values():
            if state.observer is observer:
                state.observer = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _diagnostics(
    state: LayerState, observer: LayerObserver, kept: KeptBytes | None
) -> LayerDiagnostics | None:
    """What was observed of a layer, `None` if nothing was."""
    sums, counts = observer.read()
    *weighted, weight = sums.tolist()
    observations, skipped, nonfinite_rows = counts.tolist()
    if not observations:
        return None
    means = [value / weight for value in weighted]
    mean = Figures(*means[: -2 * POINTS])
    config, memory = state.config, state.memory
    optional: dict[str, Any] = {}
    if isinstance(memory, SubspaceMemory):
        optional["outside_subspace"] = _fraction(mean.outside_square_sum, mean.input_square_sum)
    if config.row_memory is not None:
        own, ages = mean.batch_square_sum, observer.ages
        optional["memory_norm"] = math.sqrt(mean.remembered_square_sum / own) if own else 0.0
        optional["staleness"] = 0.0 if ages is None else float(ages.double().mean())
    is_biased = observer.k < observer.rows and not config.is_unbiased
    dropped = max(0.0, mean.score_sum - mean.computed_score_sum)
    if state.controller is not None:
        assert isinstance(config.ratio, float)
        optional["auto_ratio"] = config.ratio
        optional["auto_noise"] = _noise(observer.looks, config.ratio)
    return LayerDiagnostics(
        rows=observer.rows,
        k=observer.k,
        observations=observations,
        skipped=skipped,
        nonfinite_rows=nonfinite_rows,
        captured=_fraction(mean.computed_score_sum, mean.score_sum),
        effective_sample_size=mean.effective_sample_size,
        nonzero_rows=mean.nonzero_rows,
        sampling_variance=math.nan if is_biased else max(0.0, mean.sampling_variance),
        dropped_bound=dropped**2 if is_biased else math.nan,
        gradient_square=math.nan if is_biased else max(0.0, mean.gradient_square),
        batch_variance=max(0.0, mean.batch_variance),
        score_sum=mean.score_sum,
        variance_curve=(tuple(means[-2 * POINTS : -POINTS]), tuple(means[-POINTS:])),
        kept=kept,
        **optional,
    )


def _noise(looks: Sequence[Look], ratio: float) -> float:
    """V/D with this K/M, or with half of the rows where it is 1."""
    square = sum(look.square for look in looks)
    variance = sum(look.variance_of(ratio if ratio < 1 else 0.5) for look in looks)
    return variance / square if square > 0 else math.nan


def _fraction(part: float, whole: float) -> float:
    """`part` / `whole` in [0, 1]; 1 where both are 0."""
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 1.0
