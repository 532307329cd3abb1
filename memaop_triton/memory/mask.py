"""Which numbers of a tensor dropout kept, in one bit each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Eight bytes of 0 or 1 are a word of 64 bits, bit 8k of which is byte k's. Its product with the sum
# of all 2^(9k) has bit 8k also in place 63 - k, and no carries: 8k + 9j takes 64 different values.
# The same product spreads a byte: bit 7 - k gets into place 8k + 7.
_SPREAD = sum(1 << 9 * k for k in range(8)) - (1 << 64)  # as a signed number
_LAST_BITS = sum(1 << 8 * k for k in range(8))


class Mask(NamedTuple):
    """What dropout multiplied the rows of a tensor with.

    Attributes:
        bits: Whether a number was kept, `pack_bits` of [M, N].
        scale: What those were multiplied with, 1/(1 − p). On the CPU, of shape [], so that reading
            it waits for no device.
    """

    bits: Tensor
    scale: Tensor

    @classmethod
    def of(cls, kept: Tensor, scale: float) -> Mask:
        """From whether the numbers of [M, N] were kept, bool."""
        return cls(pack_bits(kept), torch.tensor(scale, dtype=torch.float64, device="cpu"))

    def apply(self, rows: Tensor, indices: Tensor | None = None) -> Tensor:
        """`rows`, which are those at `indices` ([K]) of all, as dropout would return them: [K, N].

        Also its gradient, given that of what it returned.
        """
        bits = self.bits if indices is None else self.bits[indices]
        return (rows * unpack_bits(bits, rows.shape[1])).mul_(self.scale)


def pack_bits(kept: Tensor) -> Tensor:
    """[M, N] bool as [M, ⌈N/8⌉] uint8."""
    padding = -kept.shape[1] % 8
    whole = F.pad(kept, (0, padding)) if padding else kept.contiguous()
    words = whole.view(torch.int64) * _SPREAD
    return (words >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """What `pack_bits` was given as 0 and 1, [M, N] uint8, from its result and N.

    Not bool, which a CPU converts to floating point at a seventh of the speed.
    """
    words = bits.to(torch.int64) * _SPREAD
    return (words >> 7 & _LAST_BITS).view(torch.uint8)[:, :columns]
