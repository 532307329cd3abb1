"""Plain GEMMs dW = Gᵀ X of the first K rows: what the gathering kernels are measured against.

G is [K, P], X is [K, N], dW is [P, N], all row-major. Rows of G can be multiplied by weights, in
the way the gathering kernels do it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu import launch as launching
from memaop_triton.kernels.gpu.gather_gemm import factors
from memaop_triton.kernels.gpu.primitives import precision, weighted


@triton.jit
def _tile(p_tiles, n_tiles, GROUP: tl.constexpr):
    """The program's tile: `GROUP` rows of tiles are walked column by column, for the L2 cache."""
    program = tl.program_id(0)
    per_group = GROUP * n_tiles
    first = program // per_group * GROUP
    height = tl.minimum(p_tiles - first, GROUP)
    inside = program % per_group
    return first + inside % height, inside // height


@triton.jit
def pointer_kernel(
    g, x, weights, out, K, P, N, g_stride, x_stride, out_stride,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN_P: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of dW. Loading G transposed and X as it lies takes the fewest instructions."""
    tile_p, tile_n = _tile(tl.cdiv(P, BLOCK_P), tl.cdiv(N, BLOCK_N), GROUP)
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
    tile_p, tile_n = _tile(tl.cdiv(P, BLOCK_P), tl.cdiv(N, BLOCK_N), GROUP)
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


def pointer_gemm(
    g: Tensor,
    x: Tensor,
    weights: Tensor | None = None,
    *,
    tile: tuple[int, int, int] = (128, 128, 64),
    num_warps: int = 4,
    num_stages: int = 3,
) -> Tensor:
    """dW by pointers; `weights` is [K] float32, `tile` is (BLOCK_P, BLOCK_N, BLOCK_K)."""
    (K, P), N = g.shape, x.shape[1]
    block_p, block_n, block_k = tile
    out = torch.empty((P, N), dtype=g.dtype, device=g.device)
    launching.launch(
        pointer_kernel,
        (triton.cdiv(P, block_p) * triton.cdiv(N, block_n),),
        g=g, x=x, weights=_factors(weights, g), out=out,
        K=K, P=P, N=N,
        g_stride=g.stride(0), x_stride=x.stride(0), out_stride=out.stride(0),
        BLOCK_P=block_p, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=8,
        EVEN_P=P % block_p == 0, EVEN_N=N % block_n == 0, EVEN_K=K % block_k == 0,
        WEIGHTED=weights is not None,
        PRECISION=precision(targets.current(g.device), g.dtype),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def descriptor_gemm(
    g: Tensor,
    x: Tensor,
    weights: Tensor | None = None,
    *,
    tile: tuple[int, int, int] = (128, 128, 64),
    num_warps: int = 4,
    num_stages: int = 3,
) -> Tensor:
    """dW by tensor descriptors; arguments as above, K a multiple of BLOCK_K."""
    (K, P), N = g.shape, x.shape[1]
    block_p, block_n, block_k = tile
    out = torch.empty((P, N), dtype=g.dtype, device=g.device)
    launching.launch(
        descriptor_kernel,
        (triton.cdiv(P, block_p) * triton.cdiv(N, block_n),),
        g=TensorDescriptor.from_tensor(g, [block_k, block_p]),
        x=TensorDescriptor.from_tensor(x, [block_k, block_n]),
        weights=_factors(weights, g),
        out=TensorDescriptor.from_tensor(out, [block_p, block_n]),
        K=K, P=P, N=N,
        BLOCK_P=block_p, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=8,
        WEIGHTED=weights is not None,
        PRECISION=precision(targets.current(g.device), g.dtype),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def _factors(weights: Tensor | None, g: Tensor) -> Tensor | None:
    """The weights as the gathering kernels take them."""
    if weights is None:
        return None
    return factors(weights, targets.current(g.device), g.dtype)[0]
