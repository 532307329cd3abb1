"""Weights of rows as the gather GEMM multiplies by them: of the operands' dtype, in its range."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.targets import Target

CHUNK = 1024  # weights that a program holds at a time


class RowWeights(NamedTuple):
    """Factors of rows, and the number that the sum of the products is multiplied by.

    Attributes:
        factors: [K], of the dtype that `dtype_of_factors` names.
        scale: float32 [1], a power of two, or `None` for 1.
    """

    factors: Tensor
    scale: Tensor | None


def dtype_of_factors(target: Target, dtype: torch.dtype) -> torch.dtype:
    """The dtype of factors of rows of `dtype`: float32 where a GPU cannot multiply bfloat16."""
    if dtype == torch.bfloat16 and target.backend == "hip":
        return torch.float32
    return dtype


@triton.jit
def _half_log(value):
    """⌈log₂(value)/2⌉ of a float32 that is positive and not subnormal, exactly."""
    bits = value.to(tl.int32, bitcast=True)
    log = (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return (log + 1) >> 1


@triton.jit
def store_scaled(weights_ptr, factors_ptr, scale_ptr, count, CHUNK: tl.constexpr):
    """float16 factors of `count` weights, and their scale.

    A weighted float16 row may leave the range where the weighted sum does not. So the weights are
    divided by a power of two, by which the sum is multiplied: the root of the largest weight or the
    next power above, so that no row grows by more than that root; up to 64, the root of the largest
    times the least one, so that rows of equal weights do not grow at all. A larger divisor would
    take digits from rows of small numbers.
    """
    largest = 0.0
    least = float("inf")
    for first in range(0, count, CHUNK):
        each = first + tl.arange(0, CHUNK)
        weight = tl.load(weights_ptr + each, mask=each < count, other=0)
        largest = tl.maximum(largest, tl.max(weight, 0))
        least = tl.minimum(least, tl.min(tl.where(weight > 0, weight, float("inf")), 0))
    least = tl.minimum(least, largest)
    balanced = tl.minimum(_half_log(largest * least), 6)
    power = tl.minimum(tl.maximum(tl.maximum(_half_log(largest), balanced), 0), 12)
    tl.store(scale_ptr, ((power + 127) << 23).to(tl.float32, bitcast=True))
    inverse = ((127 - power) << 23).to(tl.float32, bitcast=True)
    for first in range(0, count, CHUNK):
        each = first + tl.arange(0, CHUNK)
        weight = tl.load(weights_ptr + each, mask=each < count, other=0)
        tl.store(factors_ptr + each, (weight * inverse).to(tl.float16), mask=each < count)


@triton.jit(do_not_specialize=["count"])
def scale_kernel(weights_ptr, factors_ptr, scale_ptr, count, CHUNK: tl.constexpr):
    """`store_scaled` by one program."""
    store_scaled(weights_ptr, factors_ptr, scale_ptr, count, CHUNK)


def row_weights(weights: Tensor, target: Target, dtype: torch.dtype) -> RowWeights:
    """Float32 weights, [K], for rows of `dtype`."""
    if dtype != torch.float16:
        return RowWeights(weights.to(dtype_of_factors(target, dtype)), None)
    both = empty_scaled(weights)
    store_float16(both, weights)
    return both


def store_float16(room: RowWeights, weights: Tensor) -> None:
    """Fill `room` with what `store_scaled` makes of `weights`, by a launch of its own."""
    launch.launch(
        scale_kernel, (1,), weights_ptr=weights, factors_ptr=room.factors, scale_ptr=room.scale,
        count=weights.numel(), CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip


def empty_scaled(weights: Tensor) -> RowWeights:
    """Room for the float16 factors of `weights`, and their scale."""
    scale = torch.empty(1, dtype=torch.float32, device=weights.device)
    return RowWeights(torch.empty_like(weights, dtype=torch.float16), scale)
