"""Which numbers of a tensor are positive, in a bit each: all that the gradient of a ReLU takes."""

from __future__ import annotations

import torch
from torch import Tensor

# Of eight bytes that are 0 or 1, in one number, times the first: they are the bits of the highest
# byte of the product. Eight copies of that byte, cut by the second: a byte is 0 or it is not.
_GATHER = 0x0102040810204080
_SPREAD, _ONE_EACH = 0x0101010101010101, 0x8040201008040201 - (1 << 64)


class SignBits:
    """The signs of a tensor's numbers, in the order in which they lie in memory.

    Args:
        a: Floating point, `is_dense`.

    Attributes:
        dtype: Of `a`.
        device: Of `a`.
    """

    def __init__(self, a: Tensor) -> None:
        self.dtype = a.dtype
        self.device = a.device
        # Autograd lets the gradient pass where a result is not at most 0; NaN is not.
        is_positive = ~(a.as_strided((a.numel(),), (1,)) <= 0)
        whole = a.numel() // 8 * 8
        self._bits = ((is_positive[:whole].view(torch.int64) * _GATHER) >> 56).to(torch.uint8)
        self._rest = is_positive[whole:].clone()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._bits.nbytes + self._rest.nbytes

    def restore(self, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
        """1 for a positive number and 0 for others, as a dense tensor of this shape and strides."""
        spread = self._bits.long().mul_(_SPREAD).bitwise_and_(_ONE_EACH)
        is_positive = spread.view(torch.uint8) != 0
        if self._rest.numel():
            is_positive = torch.cat((is_positive, self._rest))
        return is_positive.to(self.dtype).as_strided(shape, stride)
