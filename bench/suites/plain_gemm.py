"""Plain GEMMs dW = Gᵀ X of the first K rows: what the gathering kernels are measured against.

G is [K, P], X is [K, N], dW is [P, N], all row-major. Rows of G can be multiplied by weights, in
the way the gathering kernels do it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu import launch as launching
from memaop_triton.kernels.gpu.primitives import precision, tile_of_program, weighted
from memaop_triton.kernels.gpu.row_weights import row_weights
from memaop_triton.kernels.tuning.config import GemmConfig


@triton.jit
def pointer_kernel(
    g, x, weights, out, K, P, N, g_stride, x_stride, out_stride,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN_P: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of dW. Loading G transposed and X as it lies takes the fewest instructions."""
    tile_p, tile_n = tile_of_program(N, P, BLOCK_N, BLOCK_P, GROUP)
    p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    g_at = g + p[:, None] + k[None, :].to(tl.int64) * g_stride
    x_at = x + k[:, None].to(tl.int64) * x_stride + n[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        rows = k < K - start
        g_tile = _load(g_at, (p < P)[:, None], rows[None, :], EVEN_P, EVEN_K)
        if WEIGHTED:
            w = _load(weights + start + k, rows, rows, True, EVEN_K)
            g_tile = weighted(g_tile, w[None, :])
        x_tile = _load(x_at, (n < N)[None, :], rows[:, None], EVEN_N, EVEN_K)
        total = tl.dot(g_tile, x_tile, total, input_precision=PRECISION)
        g_at += tl.cast(g_stride, tl.int64) * BLOCK_K
        x_at += tl.cast(x_stride, tl.int64) * BLOCK_K
    out_at = out + p[:, None].to(tl.int64) * out_stride + n[None, :]
    value = total.to(out.dtype.element_ty)
    if EVEN_P and EVEN_N:
        tl.store(out_at, value)
    else:
        tl.store(out_at, value, mask=(p < P)[:, None] & (n < N)[None, :])


@triton.jit
def _load(at, columns, rows, EVEN: tl.constexpr, EVEN_K: tl.constexpr):
    """A tile, masked only along the sides that are not even."""
    if EVEN and EVEN_K:
        tile = tl.load(at)
    elif EVEN:
        tile = tl.load(at, mask=rows, other=0.0)
    elif EVEN_K:
        tile = tl.load(at, mask=columns, other=0.0)
    else:
        tile = tl.load(at, mask=columns & rows, other=0.0)
    return tile


@triton.jit
def descriptor_kernel(
    g, x, weights, out, K, P, N,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of dW, its operands copied by descriptor."""
    tile_p, tile_n = tile_of_program(N, P, BLOCK_N, BLOCK_P, GROUP)
    p = tile_p * BLOCK_P
    n = tile_n * BLOCK_N
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        g_tile = g.load([start, p]).T
        if WEIGHTED:
            w = tl.load(weights + start + tl.arange(0, BLOCK_K))
            g_tile = weighted(g_tile, w[None, :])
        x_tile = x.load([start, n])
        total = tl.dot(g_tile, x_tile, total, input_precision=PRECISION)
    out.store([p, n], total.to(out.dtype))


def plain_gemm(
    g: Tensor,
    x: Tensor,
    weights: Tensor | None = None,
    *,
    config: GemmConfig,
    by_descriptor: bool = False,
) -> Tensor:
    """dW; `weights` is [K] float32. By descriptor, K is a multiple of the tile's."""
    (K, P), N, target = g.shape, x.shape[1], targets.current(g.device)
    block_p, block_n, block_k = config.block_p, config.block_n, config.block_k
    out = torch.empty((P, N), dtype=g.dtype, device=g.device)
    common: dict[str, Any] = {
        "weights": None if weights is None else row_weights(weights, target, g.dtype).factors,
        "K": K, "P": P, "N": N,
        "BLOCK_P": block_p, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP": 8,
        "WEIGHTED": weights is not None, "PRECISION": precision(target, g.dtype),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    grid = (triton.cdiv(P, block_p) * triton.cdiv(N, block_n),)
    if by_descriptor:
        launching.launch(
            descriptor_kernel,
            grid,
            g=TensorDescriptor.from_tensor(g, [block_k, block_p]),
            x=TensorDescriptor.from_tensor(x, [block_k, block_n]),
            out=TensorDescriptor.from_tensor(out, [block_p, block_n]),
            **common,
        )
    else:
        launching.launch(
            pointer_kernel,
            grid,
            g=g, x=x, out=out,
            g_stride=g.stride(0), x_stride=x.stride(0), out_stride=out.stride(0),
            EVEN_P=P % block_p == 0, EVEN_N=N % block_n == 0, EVEN_K=K % block_k == 0,
            **common,
        )  # fmt: skip
    return out
