"""What training steps hold: a table, the largest batches, and where ours is behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memaop_triton.bench.report import text
from memaop_triton.bench.report.charts import bars
from memaop_triton.bench.report.data import Case, Method, Run
from memaop_triton.bench.report.document import NOTHING, Bullets, Cell, Chart, Section, Table
from memaop_triton.bench.report.methods import ordered
from memaop_triton.monitor.units import human_bytes

#: In which the largest batch has to fit.
AVAILABLE_BYTES = 16 << 30


def largest_batch(case: Case, method: Method, available: int = AVAILABLE_BYTES) -> int | None:
    """Samples of the largest batch whose step fits into `available` bytes.

    Forward and backward pass are taken to hold the same number of bytes more with every sample,
    from the smaller measured batch to the larger one and on. `None` if they do not hold more.
    """
    growth = (method.batch_bytes - method.small_batch_bytes) / (case.samples - case.small_samples)
    if growth <= 0:
        return None
    fixed = method.batch_bytes - growth * case.samples
    return max(0, int((available - method.resident_bytes - fixed) / growth))


def samples_per_second(case: Case, method: Method, samples: int) -> float:
    """Of a batch of this size, if a step's time is a fixed part and one that grows with the batch.

    Both come from the two measured batches, and neither is taken to be below 0.
    """
    most = method.ms.median / case.samples
    growth = (method.ms.median - method.small_ms) / (case.samples - case.small_samples)
    growth = min(max(growth, 0.0), most)
    fixed = method.ms.median - growth * case.samples
    return 1e3 * samples / (fixed + growth * samples)


def memory(run: Run) -> Section:
    """The section of the cases that measure memory."""
    cases = run.of_kind("memory")
    section = Section("memory", "What a training step holds")
    section.blocks.append(
        "Held: what the forward pass allocates and is still there at its end, for the backward "
        "pass, the output included. Peak: the most that a step holds beyond the parameters and the "
        "optimizer's state: forward, backward and AdamW. Both are sums over the allocator's record "
        "of a step. The resident set of a process would also show what was freed and did not go "
        "back to the system. The largest batch is that whose forward and backward pass fit into "
        f"{human_bytes(AVAILABLE_BYTES)} beside parameters, gradients and the optimizer's state. "
        "It and its samples a second are computed: bytes and times of the measured batch and of a "
        "quarter of it, continued in a straight line."
    )
    section.blocks.append(Chart("Training step", bars(cases)))
    section.blocks.append(_table(cases))
    behind = [line for case in cases for line in _behind(case)]
    if behind:
        section.blocks.append("Where ours is behind:")
        section.blocks.append(Bullets(tuple(behind), len(behind)))
    return section


def _methods(case: Case) -> list[Method]:
    return [case.dense, *ordered([m for m in case.methods.values() if m.role != "dense"])]


def _table(cases: Sequence[Case]) -> Table:
    lines = []
    for case in cases:
        found = _methods(case)
        least_held = min(method.saved_bytes for method in found)
        least_peak = min(method.peak_bytes for method in found)
        for method in found:
            batch = largest_batch(case, method)
            rate = NOTHING
            if batch:
                per_second = samples_per_second(case, method, batch)
                rate = Cell(f"{per_second:,.{0 if per_second >= 100 else 1}f}")
            lines.append(
                (
                    Cell(case.title),
                    Cell(method.name),
                    _bytes(case, method, lambda m: m.saved_bytes, least_held),
                    _bytes(case, method, lambda m: m.peak_bytes, least_peak),
                    Cell(text.duration(method.ms.median)),
                    _speed(method),
                    NOTHING if batch is None else Cell(f"{batch:,}"),
                    rate,
                )
            )
    head = ("case", "method", "held", "peak", "time", "speed-up", "largest batch", "samples/s")
    return Table(
        head,
        tuple(lines),
        names=2,
        caption="Below bytes the share of dense's, below the speed-up its quartiles. Bold: the "
        "least bytes.",
    )


def _bytes(case: Case, method: Method, of: Callable[[Method], int], least: int) -> Cell:
    mine, dense = of(method), of(case.dense)
    share = "" if method.role == "dense" or not dense else text.percent(mine / dense)
    return Cell(human_bytes(mine), share, "best" if mine == least else "")


def _speed(method: Method) -> Cell:
    if method.role == "dense":
        return NOTHING
    speed = method.speedup
    tone = "bad" if speed.median < 1 else ""
    return Cell(text.times(speed.median), text.span(speed.q1, speed.q3), tone)


def _behind(case: Case) -> list[str]:
    """One line for each method of ours that is slower than dense, or holds more than another."""
    lines = []
    for method in ordered(case.of_role("ours")):
        faults = []
        if method.speedup.median < 1:
            faults.append(f"{text.times(method.speedup.median)} of dense's speed")
        for what, of in _MEASURES.items():
            less = [b.name for b in case.of_role("baseline") if of(b) < of(method)]
            if of(method) > of(case.dense):
                faults.append(f"a larger {what} than dense")
            elif less:
                names = ", ".join(f"`{name}`" for name in less)
                faults.append(f"a larger {what} than {names}")
        if faults:
            lines.append(f"{case.title}: `{method.name}` has {', '.join(faults)}.")
    return lines


_MEASURES: dict[str, Callable[[Method], int]] = {
    "graph": lambda method: method.saved_bytes,
    "peak": lambda method: method.peak_bytes,
}
