"""Which numbers of a tensor are positive, in a bit each: all that the gradient of a ReLU takes."""

from __future__ import annotations

import torch
from torch import Tensor

from memaop_triton.memory.mask import pack_bits, unpack_bits


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
        self._bits = pack_bits(~(a.as_strided((1, a.numel()), (a.numel(), 1)) <= 0))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._bits.nbytes

    def restore(self, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
        """1 for a positive number and 0 for others, as a dense tensor of this shape and strides."""
        is_positive = unpack_bits(self._bits, shape.numel())
        return is_positive.to(self.dtype).as_strided(shape, stride)
