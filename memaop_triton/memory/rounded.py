"""A tensor in 8 bits a number, whatever its shape: what other operations than ours save.

The numbers are rounded in the order in which they lie in memory (`kernels.cpu.stash` says how), so
that a tensor and its transpose are rounded once, and rows that are short or of an odd length cost
no more than others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memaop_triton.dispatch import restore_rows, round_rows

_BITS = 8
# Numbers that have one norm and, in a GPU's kernel, are walked over by one program.
_ROW = 512


class RoundedTensor:
    """The numbers of a tensor, in the order in which they lie in memory.

    A block of 64 numbers with one that is not finite is restored as NaN. The last ones, fewer than
    512, are kept as they are.

    Args:
        a: float16, bfloat16 or float32, `is_dense`.
        generator: Source of the draws; the device's default one if `None`.

    Attributes:
        dtype: Of `a`.
        device: Of `a`.
    """

    def __init__(self, a: Tensor, generator: torch.Generator | None = None) -> None:
        self.dtype = a.dtype
        self.device = a.device
        numbers = a.as_strided((a.numel(),), (1,))
        whole = a.numel() // _ROW * _ROW
        rows = numbers[:whole].view(-1, _ROW)
        self._stored = round_rows(rows, _BITS, None, generator)[0] if whole else None
        self._rest = numbers[whole:].clone()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(a.nbytes for a in (*(self._stored or ()), self._rest))

    def restore(self, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
        """The numbers, in memory of their own, as a dense tensor of this shape and these strides.

        They are the same in every call.
        """
        if self._stored is None:
            numbers = self._rest.clone()
        else:
            numbers = restore_rows(self._stored, _BITS, _ROW, self.dtype).view(-1)
            if self._rest.numel():
                numbers = torch.cat((numbers, self._rest))
        return numbers.as_strided(shape, stride)


def is_dense(a: Tensor) -> bool:
    """Whether the numbers of `a` fill a part of memory without gaps, in whichever order."""
    if a.is_contiguous():
        return True
    expected = 1
    for step, size in sorted(zip(a.stride(), a.shape, strict=True)):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True
