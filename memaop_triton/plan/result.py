"""What `plan` found: rows, their table, and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from memaop_triton.config import MemAOPConfig
from memaop_triton.units import human_bytes, milliseconds

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
        verdict: `Verdict.CONVERT` if it gets faster.
        dense_seconds: Of all its backward passes in a step, dense; `None` if nothing was measured.
        ours_seconds: The same, converted, including the additional time of the forward passes.
        speedup: dense / ours over the rounds, `None` if nothing was measured.
        memory_bytes: What it would hold between steps.
        note: Why nothing was measured.
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
    """

    layers: tuple[LayerPlan, ...]
    step_seconds: float | None
    devices: str

    @property
    def faster(self) -> tuple[str, ...]:
        """Names of the layers that get faster by conversion.

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
            "layers": [row.to_dict() for row in self.layers],
        }

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=1000, color_system=None)
        with console.capture() as printed:
            console.print(self._table(), self.summary(), sep="\n")
        lines = printed.get().splitlines()
        return "\n".join(line.rstrip() for line in lines).strip("\n")

    def summary(self) -> str:
        """The plan in words: layers that get faster, memory, time of a step."""
        count = len(self.faster)
        text = f"{count} of {len(self.layers)} layers get faster"
        if count:
            text += (
                f", saving about {milliseconds(self.saved_seconds)} ms a step and holding "
                f"{human_bytes(self.memory_bytes)}"
            )
        if self.step_seconds is None:
            return f"{text}."
        now = f"{milliseconds(self.step_seconds)} ms"
        if not count:
            return f"{text}. Forward and backward pass of the whole model: {now}."
        then = max(0.0, self.step_seconds - self.saved_seconds)
        ratio = f" ({self.step_seconds / then:.2f}×)" if then else ""
        return (
            f"{text}.\nForward and backward pass of the whole model: {now}, with them converted "
            f"about {milliseconds(then)} ms{ratio}."
        )

    def _table(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            title=f"backward passes of a step, on {self.devices}" if self.devices else None,
            title_justify="left",
        )
        table.add_column("layer", overflow="fold")
        table.add_column("M×N×P", overflow="fold")
        for name in ("calls", "dense ms", "ours ms", "speed-up [quartiles]", "held"):
            table.add_column(name, justify="right", overflow="fold")
        table.add_column("verdict", overflow="fold")
        for row in self.layers:
            table.add_row(*_cells(row))
        return table


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
        f"{row.verdict}: {row.note}" if row.note else str(row.verdict),
    )
