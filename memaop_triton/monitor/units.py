"""Numbers with units, as text."""

from __future__ import annotations

import math


def human_bytes(count: int) -> str:
    """A number of bytes with a binary unit: `0 B`, `1.5 KiB`, `132 MiB`."""
    if count < 1024:
        return f"{count} B"
    power = min(3, int(math.log2(count) // 10))
    size = count / 1024**power
    return f"{size:.{0 if size >= 100 else 1}f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def milliseconds(seconds: float) -> str:
    """Seconds as a number of milliseconds, to three digits: `0.0123`, `1.23`, `123`."""
    value = 1e3 * seconds
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(4, max(0, digits))}f}"
