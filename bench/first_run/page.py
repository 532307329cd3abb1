"""One page of plain text of what a run has found so far: `page.txt` beside the results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from memaop_triton.bench.first_run import records
from memaop_triton.bench.first_run.records import Record
from memaop_triton.bench.first_run.stages import STAGES

FILE = "page.txt"
DENSE = "dense"
_MOST_LINES = 20  # of failures, tuned tiles and the like


def write(folder: Path) -> str:
    """Write the page of what is in `folder`, and return it."""
    text = "\n".join(_lines(records.read(folder), folder)) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")
    return text


def device_of(found: Iterable[Record]) -> Record | None:
    """What the stage `device` found; `None` before it has, or if it failed."""
    ended = records.ended(found, "device")
    return next((one for one in ended if one["status"] == records.PASSED), None)


def counts(ended: Sequence[Record]) -> str:
    """How many cases ended how: "3 passed, 1 failed"."""
    number = Counter(one["status"] for one in ended)
    return ", ".join(f"{number[status]} {status}" for status in records.ENDS if number[status])


def _lines(found: list[Record], folder: Path) -> Iterator[str]:
    device = device_of(found)
    yield "memaop-triton, first run on a GPU"
    if device is not None and device["is_dry"]:
        yield "A DRY RUN on the CPU: times are those of the interpreter, and mean nothing."
    yield ""
    yield from _machine(device)
    yield ""
    for stage in STAGES:
        ended = records.ended(found, stage.name)
        yield f"{stage.name:10} {stage.about}: {counts(ended) or 'not run'}"
    yield from _unwanted(found, device["obstacle"] if device else None)
    yield from _rates(found)
    yield from _times(found, "dW", "Weight gradients")
    yield from _times(found, "step", "Training steps at 1/8; predicted: dense less what dW saves")
    yield from _worst(found)
    yield from _tuned(found)
    yield ""
    yield f"Every number, and the kernels of each call: {folder / records.FILE}"
    if (folder / records.TILES).exists():
        yield f"Tiles, to be copied to kernels/configs: {folder / records.TILES}"


def _machine(device: Record | None) -> Iterator[str]:
    if device is None:
        yield "The device could not be described: see device.log."
        return
    yield f"GPU: {device['gpu'] or 'none'}"
    if "capability" in device:
        yield (
            f"  {device['capability']}, {device['multiprocessors']} multiprocessors, "
            f"{device['memory'] / 2**30:.0f} GiB, L2 {device['cache'] / 2**20:.0f} MiB, "
            f"{device['runtime']}, predicted as {device['predicted_as']}, GPUs: {device['gpus']}"
        )
        yield f"  clocks: {device['clocks'] or 'not known'}"
    versions = ("torch", "triton", "numpy", "pytest", "python")
    yield ", ".join(f"{name} {device[name] or 'missing'}" for name in versions)
    yield f"commit {device['commit'] or 'not known'}, processors: {device['processors']}"
    for name, lost in device["missing"].items():
        yield f"without {name}: {lost}"
    if device["obstacle"]:
        yield f"Nothing was run: {device['obstacle']}."


def _unwanted(found: list[Record], obstacle: str | None) -> Iterator[str]:
    """What failed, what was cut off, and why other things were skipped."""
    for status, title in (
        (records.FAILED, "Failed"),
        (records.DIED, "Ended with their process"),
        (records.CUT_OFF, "Cut off"),
    ):
        lines = [f"  {one['stage']}: {one['name']}: {_last(one)}" for one in found
                 if one["status"] == status]  # fmt: skip
        if lines:
            yield ""
            yield f"{title}:"
            yield from _some(lines)
    skipped = [one for one in found if one["status"] == records.SKIPPED]
    reasons = Counter(f"{one['stage']}: {_last(one)}" for one in skipped)
    if reasons and not obstacle:  # which has been named
        yield ""
        yield "Skipped:"
        yield from _some([f"  {reason} ({number})" for reason, number in reasons.items()])


def _last(one: Record) -> str:
    """The last line of a reason, which is what a traceback says in the end."""
    lines = [line for line in str(one.get("reason", "")).splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E  ")]  # as pytest has them
    return (errors[:1] or lines[-1:] or ["no reason"])[0].strip()[:160]


def _some(lines: Sequence[str]) -> Iterator[str]:
    yield from lines[:_MOST_LINES]
    if len(lines) > _MOST_LINES:
        yield f"  and {len(lines) - _MOST_LINES} more"


def _figures(found: list[Record], kind: str) -> list[Record]:
    return [one for one in found if one.get("kind") == kind]


def _rates(found: list[Record]) -> Iterator[str]:
    for one in _figures(found, "rates"):
        yield ""
        yield "Rates, measured / predicted:"
        for key, title in (
            ("tflops", "large product, TFLOP/s"),
            ("tb_s", "long read, TB/s"),
            ("launch_us", "a launch in a row, µs"),
        ):
            yield f"  {title}: {one[key]['measured']:.3g} / {one[key]['predicted']:.3g}"
        yield f"  an event pair with nothing between, µs: {one['nothing_us']:.3g}"
        yield f"  the host's time for a launch of PyTorch, µs: {one['cpu_launch_us']:.3g}"


def _times(found: list[Record], kind: str, title: str) -> Iterator[str]:
    body = []
    for one in _figures(found, kind):
        place = one.get("net") or f"{' x '.join(map(str, one['shape']))} 1/{one['inverse']}"
        dense = one["methods"][DENSE]
        for name, method in one["methods"].items():
            predicted = method["predicted"]["us"]
            body.append((
                place, name,
                f"{method['us']:.1f}", f"{method['q1']:.1f}-{method['q3']:.1f}",
                f"{method['host_us']:.0f}", f"{predicted:.0f}", f"{method['us'] / predicted:.2f}",
                f"{dense['us'] / method['us']:.2f}",
                f"{dense['predicted']['us'] / predicted:.2f}",
            ))  # fmt: skip
            place = ""
    if body:
        head = ("", "", "µs", "quartiles", "host µs", "PREDICTED", "factor", "dense / it", "PRED.")
        yield ""
        yield f"{title}. Factor: measured over predicted. Host: to launch; if longer, it decides."
        yield from table(head, body)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table; all columns but the first two to the right."""
    rows = [head, *body]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = [
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def _worst(found: list[Record]) -> Iterator[str]:
    """The time that is furthest from its prediction, by factor, and what it is made of."""

    def distance(one: tuple[Record, str, Any]) -> float:
        return abs(math.log(one[2]["us"] / one[2]["predicted"]["us"]))

    every = [
        (one, name, method)
        for one in _figures(found, "dW")
        for name, method in one["methods"].items()
    ]
    if not every:
        return
    one, name, method = max(every, key=distance)
    predicted = method["predicted"]
    factor = method["us"] / predicted["us"]
    yield ""
    yield (
        f"Worst misprediction: {one['name']}, {name}: {method['us']:.1f} µs measured, "
        f"{predicted['us']:.1f} predicted, a factor of {factor:.2f}"
    )
    if "parts" in predicted:
        parts = (f"{part} {us:.0f}" for part, us in predicted["parts"].items())
        yield f"  predicted, µs: {', '.join(parts)}"
    launched = [f"{k['kernel']} {k['us']:.1f} ({k['launches']:g})" for k in method["kernels"][:8]]
    if launched:
        yield "  measured, µs (launches): " + ", ".join(launched)


def _tuned(found: list[Record]) -> Iterator[str]:
    tuned = [one for record in found for one in record.get("tuned", ())
             if record["stage"] == "tuning"]  # fmt: skip
    if not tuned:
        return
    known = [one for one in tuned if one["heuristic_ms"]]
    known.sort(key=lambda one: float(one["heuristic_ms"]) / float(one["ms"]), reverse=True)
    better = [one for one in known if one["ms"] < one["heuristic_ms"]]
    yield ""
    yield f"Tuned: {len(tuned)} problems, {len(better)} with a better tile than the one that ships:"
    lines = [
        f"  {one['kernel']} {one['problem']}: {1e3 * one['heuristic_ms']:.1f} µs, best "
        f"{1e3 * one['ms']:.1f} µs, {one['heuristic_ms'] / one['ms']:.2f} times: {one['tile']}"
        for one in better
    ]
    yield from _some(lines)
