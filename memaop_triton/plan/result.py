"""What `plan` found: rows, their table, and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from memaop_triton.auto.worth import EXACT, Worth
from memaop_triton.config import MemAOPConfig
from memaop_triton.monitor.units import human_bytes, milliseconds
from memaop_triton.nn.coverage import Coverage

if TYPE_CHECKING:
    from rich.table import Table


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    q1: float
    q3: float


class Verdict(StrEnum):
    """What to do with a layer."""

    CONVERT = "convert"
    LEAVE_DENSE = "leave dense"
    TOO_CLOSE = "too close to call"
    UNKNOWN = "noise unknown"


class OptionPlan(NamedTuple):
    """What a layer with `ratio="auto"` may get.

    Attributes:
        share: K/M, 1 for an exact gradient.
        seconds: Of all its weight gradients in a step.
        noise: V/D of the layer by itself; `None` if it is unknown.
    """

    share: float
    seconds: float
    noise: float | None


@dataclass(frozen=True)
class LayerPlan:
    """What was found out about one layer.

    Attributes:
        name: Qualified name in the model, "" for the model itself.
        rows: The numbers of rows M that its calls have, ascending.
        in_features: N.
        out_features: P.
        dtypes: Of its rows, by name.
        calls: Backward passes through it in one step.
        config: What it was measured with.
        verdict: `Verdict.CONVERT` if it gets faster, or would be sampled by `ratio="auto"`.
        dense_seconds: Of all its backward passes in a step, dense; `None` if nothing was measured.
            With `ratio="auto"` of its weight gradients alone.
        ours_seconds: The same, converted, including the additional time of the forward passes.
        speedup: dense / ours over the rounds, `None` if nothing was measured or with
            `ratio="auto"`.
        memory_bytes: What it would hold between steps.
        note: Why nothing was measured.
        share: K/M that `ratio="auto"` would choose, 1 for an exact gradient; `None` otherwise, and
            if the noise is unknown.
        options: What it would choose from; empty otherwise.
        input_kept_by: Who keeps the layer's inputs for the backward pass anyway, so that its stash
            only adds: the name of a module, or "the loss"; "" if it frees them.
    """

    name: str
    rows: tuple[int, ...]
    in_features: int
    out_features: int
    dtypes: tuple[str, ...]
    calls: int
    config: MemAOPConfig
    verdict: Verdict
    dense_seconds: float | None = None
    ours_seconds: float | None = None
    speedup: Spread | None = None
    memory_bytes: int = 0
    note: str = ""
    share: float | None = None
    options: tuple[OptionPlan, ...] = ()
    input_kept_by: str = ""

    @property
    def saved_seconds(self) -> float:
        """Per step, if the layer is converted; negative if that makes it slower."""
        if self.dense_seconds is None or self.ours_seconds is None:
            return 0.0
        return self.dense_seconds - self.ours_seconds

    @property
    def shape(self) -> str:
        """M×N×P; M from the least to the most if it differs between calls."""
        rows = (
            "–".join(map(str, dict.fromkeys((self.rows[0], self.rows[-1])))) if self.rows else "?"
        )
        return f"{rows}×{self.in_features}×{self.out_features}"

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists, for JSON."""
        content = dataclasses.asdict(self)
        content["speedup"] = None if self.speedup is None else self.speedup._asdict()
        content["options"] = [option._asdict() for option in self.options]
        content["config"] |= {
            "memory": self.config.memory_name,
            "memory_settings": _settings(self.config.memory),
            "grad_input": self.config.grad_input_name,
            "grad_input_settings": _settings(self.config.grad_input),
        }
        return content


@dataclass(frozen=True)
class Plan:
    """What `plan` returns: prints as a table.

    Attributes:
        layers: In the order of the model.
        step_seconds: Of a forward and backward pass of the whole model as it is, `None` if there
            was no model.
        devices: What it was measured on.
        predicted: What `ratio="auto"` would come to; `None` without such layers, and if their noise
            is unknown. Its speed-up is that of forward and backward pass, without the optimizer.
        decision: The same in one line; "" without such layers.
        remarks: On their noise, in sentences.
        saved_bytes: Held by autograd between forward and backward pass of the whole model as it is;
            `None` without a model, and if no configuration has a stash.
        saved_bytes_converted: The same with all layers converted, those included that stay exact.
        coverage: How much of the model's weight gradients `layers` compute, by FLOPs of the batch;
            `None` without a model.
    """

    layers: tuple[LayerPlan, ...]
    step_seconds: float | None
    devices: str
    predicted: Worth | None = None
    decision: str = ""
    remarks: str = ""
    saved_bytes: int | None = None
    saved_bytes_converted: int | None = None
    coverage: Coverage | None = None

    @property
    def faster(self) -> tuple[str, ...]:
        """Names of the layers that get faster by conversion, or that `ratio="auto"` would sample.

        `convert_(model, config, filter_fn=lambda module, fqn: fqn in plan.faster)` converts them.
        """
        return tuple(row.name for row in self.layers if row.verdict is Verdict.CONVERT)

    @property
    def saved_seconds(self) -> float:
        """Per step, with the layers of `faster` converted: an estimate."""
        return sum(row.saved_seconds for row in self.layers if row.verdict is Verdict.CONVERT)

    @property
    def memory_bytes(self) -> int:
        """Held between steps by the layers of `faster`."""
        return sum(row.memory_bytes for row in self.layers if row.verdict is Verdict.CONVERT)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries, for JSON. Times are in seconds."""
        return {
            "devices": self.devices,
            "step_seconds": self.step_seconds,
            "saved_seconds": self.saved_seconds,
            "memory_bytes": self.memory_bytes,
            "saved_bytes": self.saved_bytes,
            "saved_bytes_converted": self.saved_bytes_converted,
            "predicted": None if self.predicted is None else self.predicted._asdict(),
            "decision": self.decision,
            "coverage": None if self.coverage is None else self.coverage.to_dict(),
            "layers": [row.to_dict() for row in self.layers],
        }

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=1000, color_system=None)
        fixed, auto = self._rows(is_auto=False), self._rows(is_auto=True)
        with console.capture() as printed:
            if fixed or not auto:
                console.print(self._table(fixed))
            if auto:
                console.print(self._auto_table(auto))
            console.print(self.summary())
        lines = printed.get().splitlines()
        return "\n".join(line.rstrip() for line in lines).strip("\n")

    def _rows(self, *, is_auto: bool) -> list[LayerPlan]:
        return [row for row in self.layers if row.config.is_auto == is_auto]

    def summary(self) -> str:
        """The plan in words: the decision, layers that get faster, memory, time of a step.

        With a stash, what is held for the backward pass; how much of the model the layers are.
        """
        lines = [f"{self.decision[:1].upper()}{self.decision[1:]}."] if self.decision else []
        lines += [self.remarks] if self.remarks else []
        fixed = self._rows(is_auto=False)
        if fixed or not lines:
            lines.append(_gain_of(fixed))
        lines += self._held()
        if self.coverage is not None:
            lines.append(self.coverage.summary("These layers"))
        if self.step_seconds is None:
            return "\n".join(lines)
        step = f"Forward and backward pass of the whole model: {milliseconds(self.step_seconds)} ms"
        if not self.faster:
            return "\n".join([*lines, f"{step}."])
        then = max(0.0, self.step_seconds - self.saved_seconds)
        ratio = f" ({self.step_seconds / then:.2f}×)" if then else ""
        step += f", with them converted about {milliseconds(then)} ms{ratio}."
        return "\n".join([*lines, step])

    def _held(self) -> list[str]:
        """What is held for the backward pass, and where a stash frees nothing."""
        dense, ours = self.saved_bytes, self.saved_bytes_converted
        if dense is None or ours is None:
            return []
        change = f" ({100 * (ours / dense - 1):+.0f} %)" if dense else ""
        lines = [
            f"Held for the backward pass: {human_bytes(dense)}, with these layers converted "
            f"{human_bytes(ours)}{change}."
        ]
        count = sum(bool(row.input_kept_by) for row in self.layers)
        if count:
            whose = "1 layer frees" if count == 1 else f"{count} layers frees"
            lines.append(
                f'The stash of {whose} nothing, because the input is kept anyway: stash="exact" '
                "by overrides holds less."
            )
        return lines

    def _table(self, rows: Iterable[LayerPlan]) -> Table:
        table = self._new_table("backward passes of a step")
        for name in ("calls", "dense ms", "ours ms", "speed-up \\[quartiles]", "held"):
            table.add_column(name, justify="right", overflow="fold")
        table.add_column("verdict", overflow="fold")
        for row in rows:
            table.add_row(*_cells(row))
        return table

    def _auto_table(self, rows: Sequence[LayerPlan]) -> Table:
        """Milliseconds and, in parentheses, noise of every share that a layer may get."""
        table = self._new_table('weight gradients of a step with ratio="auto", ms (noise V/D)')
        shares = dict.fromkeys(option.share for row in rows for option in row.options)
        names = [_share(share) for share in shares if share < EXACT]
        for name in ("calls", "exact", *names, "choice"):
            table.add_column(name, justify="right", overflow="fold")
        for row in rows:
            options = [_option(option) for option in row.options] or ["–"] * len(shares)
            table.add_row(row.name or "(the model)", row.shape, str(row.calls), *options, _why(row))
        return table

    def _new_table(self, title: str) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            title=f"{title}, on {self.devices}" if self.devices else None,
            title_justify="left",
        )
        table.add_column("layer", overflow="fold")
        table.add_column("M×N×P", overflow="fold")
        return table


def _gain_of(rows: Sequence[LayerPlan]) -> str:
    faster = [row for row in rows if row.verdict is Verdict.CONVERT]
    text = f"{len(faster)} of {len(rows)} layers get faster"
    if faster:
        text += (
            f", saving about {milliseconds(sum(row.saved_seconds for row in faster))} ms a step "
            f"and holding {human_bytes(sum(row.memory_bytes for row in faster))}"
        )
    return f"{text}."


def _share(share: float) -> str:
    return "exact" if share == EXACT else f"1/{round(1 / share)}"


def _option(option: OptionPlan) -> str:
    noise = "" if option.noise is None or option.share == EXACT else f" ({option.noise:.2g})"
    return f"{milliseconds(option.seconds)}{noise}"


def _why(row: LayerPlan) -> str:
    if row.note:
        return _with_keeper(f"exact: {row.note}", row)
    return _with_keeper(row.verdict if row.share is None else _share(row.share), row)


def _with_keeper(text: str, row: LayerPlan) -> str:
    keeper = row.input_kept_by
    return f"{text}; its input is kept anyway by {keeper}" if keeper else text


def _settings(part: object) -> dict[str, Any]:
    """Of a memory or of an input gradient; a dtype by its name."""
    fields = {} if part is None else vars(part)
    return {n: str(v) if isinstance(v, torch.dtype) else v for n, v in fields.items()}


def _cells(row: LayerPlan) -> tuple[str, ...]:
    def or_dash(value: Any, show: Callable[[Any], str]) -> str:
        return "–" if value is None else show(value)

    return (
        row.name or "(the model)",
        row.shape,
        str(row.calls),
        or_dash(row.dense_seconds, milliseconds),
        or_dash(row.ours_seconds, milliseconds),
        or_dash(row.speedup, lambda s: f"{s.median:.2f}× \\[{s.q1:.2f}, {s.q3:.2f}]"),
        or_dash(None if row.note else row.memory_bytes, human_bytes),
        _with_keeper(f"{row.verdict}: {row.note}" if row.note else str(row.verdict), row),
    )
