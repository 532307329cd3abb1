"""Numbers with units, rounded for readers."""

from __future__ import annotations

# Keeps a number and its unit on one line.
_SPACE = "\N{NO-BREAK SPACE}"


def times(speedup: float) -> str:
    """`5.31×`, `12.4×`."""
    return f"{_three(speedup)}×"


def span(low: float, high: float) -> str:
    """`5.2–5.4`, the quartiles of a speed-up."""
    return f"{_three(low)}–{_three(high)}"


def duration(ms: float) -> str:
    """`85.2 ms`, or `38.0 µs` below a millisecond."""
    return f"{_three(ms)}{_SPACE}ms" if abs(ms) >= 1 else f"{_three(1e3 * ms)}{_SPACE}µs"


def rate(gigas: float, unit: str) -> str:
    """`200 GFLOP/s` or `2.95 TB/s`, from 10^9 `unit` a second."""
    if gigas >= 1000:
        return f"{_three(gigas / 1000)}{_SPACE}T{unit}/s"
    return f"{_three(gigas)}{_SPACE}G{unit}/s"


def percent(share: float) -> str:
    """`93 %`."""
    return f"{100 * share:.0f}{_SPACE}%"


def ratio(value: float) -> str:
    """`1/8` where K/M is one over a whole number, else `0.3`."""
    inverse = 1 / value
    near = round(inverse)
    return f"1/{near}" if near > 1 and abs(inverse - near) < 0.01 * near else f"{value:.3g}"


def count(number: int, what: str) -> str:
    """`1 call`, `3 calls`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def axis(value: float) -> str:
    """A tick: `0.25`, `8`, `2k`, `128k`, for powers of two `64k` as in 2^16."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:.0f}k"
    if value >= 1000 and value % 1000 == 0:
        return f"{value / 1000:g}k"
    return f"{value:g}"


def _three(value: float) -> str:
    size = abs(value)
    if size >= 99.95:
        return f"{value:.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.0995 or size == 0 else f"{value:.2g}"
