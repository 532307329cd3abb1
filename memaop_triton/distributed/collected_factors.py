"""The factors of one weight's gradient since the last exchange, and whether their product is it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memaop_triton.backward.step import Factors

#: Dtypes that factors travel in.
FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SEED = 20211009
# In units of the rounding of one sum: two orders of summation differ by far less.
_TOLERANCE = 32.0
# The rounding of TF32, the coarsest that a product of float32 matrices has.
_COARSEST_PRODUCT = 2.0**-10


class CollectedFactors:
    """What the backward passes added to one weight's gradient since the last exchange.

    Args:
        weight: [P, N].
        world: Number of processes.

    Attributes:
        factors: Those of all passes; the layers' backward passes append to it. Empty from the pass
            on with which they are too many to be gathered.
    """

    def __init__(self, weight: Tensor, world: int) -> None:
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        # Normal, so that no two entries of a gradient can cancel. From a generator of its own, so
        # that the hook does not change the random draws of training.
        generator = torch.Generator().manual_seed(_SEED)
        self.probe = torch.randn(weight.shape[1], dtype=self.dtype, generator=generator)
        self.max_bytes = weight.nbytes / world
        self.factors: list[Factors] = []
        self._forget()

    def _forget(self) -> None:
        self.factors.clear()
        self.passes = 0
        self.is_dropped = False
        self.is_product: Tensor | None = None
        self.image: Tensor | None = None
        self.norm: Tensor | None = None

    def add(self, dw: Tensor) -> None:
        """Record one backward pass, whose factors are in the list unless it was exact."""
        if self.is_dropped:
            self.factors.clear()
            return
        if len(self.factors) == self.passes:
            return
        added = self.factors[self.passes :]
        self.passes = len(self.factors)
        if sum(x.nbytes + g.nbytes for x, g in self.factors) >= self.max_bytes:
            self._forget()
            self.is_dropped = True
            return
        image = self._image(dw)
        # Rounding is relative to all of dW, whose product with the probe may be small.
        norm = torch.linalg.vector_norm(dw.to(self.dtype))
        # dW was rounded to its dtype, and by TF32 its products too: a coarse comparison, which
        # factors that are not those of this dW do not pass.
        of_factors = sum(self._image(x, g) for x, g in added)
        dtypes = {dw.dtype, *(x.dtype for x, _ in added)}
        rounding = max(_COARSEST_PRODUCT, *(torch.finfo(dtype).eps for dtype in dtypes))
        smallest = math.sqrt(dw.numel()) * torch.finfo(dw.dtype).smallest_normal
        error = torch.linalg.vector_norm(of_factors - image)
        is_product = error <= 8 * (rounding * norm + smallest)
        self.is_product = is_product if self.is_product is None else self.is_product & is_product
        self.image = image if self.image is None else self.image + image
        self.norm = norm if self.norm is None else self.norm + norm

    def header(self, gradient: Tensor) -> Tensor:
        """[2] int64: the number of rows and that of their dtype.

        −1 if their product is not `gradient`, or if they are too many.
        """
        dtypes = {x.dtype for x, _ in self.factors}
        if self.is_dropped or len(dtypes) > 1:
            return torch.tensor([-1, 0], device=gradient.device)
        image = self._image(gradient)
        bound = image.new_zeros(())
        if self.image is not None and self.norm is not None:
            image = image - self.image
            bound = self.norm * (_TOLERANCE * self.passes * torch.finfo(self.dtype).eps)
        # Not a comparison of the opposite: NaN must not pass.
        holds = torch.linalg.vector_norm(image) <= bound
        if self.is_product is not None:
            holds &= self.is_product
        rows = sum(x.shape[0] for x, _ in self.factors)
        number = FACTOR_DTYPES.index(dtypes.pop()) if dtypes else 0
        entry = torch.tensor([rows, number], device=gradient.device)
        return torch.where(holds, entry, -1)

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """The factors, X and G apart, which are then forgotten."""
        both = [x for x, _ in self.factors], [g for _, g in self.factors]
        self._forget()
        return both

    def _image(self, matrix: Tensor, g: Tensor | None = None) -> Tensor:
        """`matrix` ([P, N]) times the probe; with g [R, P] that of Gᵀ X, for `matrix` X [R, N]."""
        if self.probe.device != matrix.device:
            self.probe = self.probe.to(matrix.device)
        image = matrix.to(self.dtype) @ self.probe
        return image if g is None else g.to(self.dtype).t() @ image
