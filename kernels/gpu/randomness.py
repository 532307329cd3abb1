"""Random numbers inside a kernel, each a function of a seed and a place: no state, no order.

The same seed gives the same numbers whatever the launch looks like, so a step can be repeated bit
for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_signs(seed_ptr, rows):
    """±1 (float32) for each row number in `rows`, from the seed (int64) at `seed_ptr`."""
    bits, _, _, _ = tl.randint4x(tl.load(seed_ptr), rows)
    return tl.where(bits & 1 == 0, 1.0, -1.0)


@triton.jit
def _mix(bits):
    # Two rounds of xor-shift and odd multiplication: every input bit reaches the upper half.
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def row_keys(seed_ptr, rows, STREAM: tl.constexpr):
    """Random uint32 for each row number; `STREAM` is 0 or 1, for two matrices with one seed."""
    _, first, second, _ = tl.randint4x(tl.load(seed_ptr), rows)
    keys = first if STREAM == 0 else second
    return keys.to(tl.uint32)


@triton.jit
def round_to_bfloat16(value, keys, columns):
    """Round float32 `value` ([BLOCK_M, BLOCK_C]) up or down to bfloat16, with mean `value`.

    `keys` are those of the rows. The chance of rounding up is the discarded fraction, in steps of
    2⁻¹⁶. NaN and infinities keep their kind.
    """
    noise = _mix(keys[:, None] + columns.to(tl.uint32)[None, :] * 0x9E3779B1)
    bits = value.to(tl.uint32, bitcast=True)
    rounded = ((bits + (noise >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(value) < float("inf"), rounded, value).to(tl.bfloat16)
