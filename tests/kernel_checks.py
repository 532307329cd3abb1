"""Checks of single kernels that two suites make, each on operands of its own.

tests/interpret runs the kernels in Triton's interpreter, on the CPU; tests/sanitize runs them under
ttsem, whose tensors are on "cuda", and adds bfloat16.
"""

import math
from dataclasses import replace

import torch

from memaop_triton.kernels.gpu import subspace
from memaop_triton.kernels.gpu.gather_gemm import Correction, gather_gemm
from memaop_triton.kernels.gpu.pack import pack_rows
from memaop_triton.kernels.gpu.score import accumulate_and_score, accumulate_rest, row_scores
from memaop_triton.kernels.tuning.config import RowConfig
from tests.judging import (
    SMALL,
    as_good_as,
    check_products,
    drawn_blocks,
    drawn_rows,
    operands,
)

TILE = RowConfig(16, 32, 4)
CARRY = 0.75
SEED = 20240229


def scalar(value, device="cpu"):
    """A number on the device, of int64 for an integer and of float32 for others."""
    return torch.tensor([value], device=device)


# The gather GEMM. --------------------------------------------------------------------------------


def check_gather(
    shape, dtype, layout="plain", *, index=torch.int64, weighted=False, config=SMALL, device="cpu"
):
    """Products of drawn rows; `shape` is M, N, P, K."""
    rows, n, p, k = shape
    x, g = operands(rows, n, p, dtype, layout, device)
    indices = drawn_rows(rows, k, index, device)
    weights = 4 * torch.rand(k, device=device) if weighted else None
    result = gather_gemm(x, g, indices, weights, config=config)
    assert result.dtype == dtype
    check_products(result, x, g, indices, weights)


def check_blocks(
    rows, block_rows, blocks, dtype, *, weighted, split=1, is_named=True, device="cpu"
):
    """Products of whole blocks; rows that a last block lacks are named or not."""
    x, g = operands(rows, 40, 24, dtype, device=device)
    indices = drawn_blocks(blocks, block_rows, device)
    indices = indices if is_named else indices[indices < rows]
    weights = None
    if weighted:
        of_blocks = 4 * torch.rand(len(blocks), device=device)
        weights = of_blocks.repeat_interleave(block_rows)[: len(indices)]
    config = replace(SMALL, block_k=32, split_k=split)
    result = gather_gemm(x, g, indices, weights, block_rows=block_rows, config=config)
    check_products(result, x, g, indices, weights)


def check_padding(blocks, block_rows, dtype, config, device="cpu"):
    """Rows of weight 0 or not selected may hold anything; returns how many others there are."""
    x, g = operands(blocks * block_rows - 5, 48, 32, dtype, device=device)
    count = blocks * 2 // 3
    indices = drawn_blocks(sorted(torch.randperm(blocks)[:count].tolist()), block_rows, device)
    weights = 1 + torch.rand(count, device=device)
    weights[torch.rand(count) < 0.4] = 0
    weights = weights.repeat_interleave(block_rows)
    drawn = weights > 0
    unused = torch.ones(len(x), dtype=torch.bool, device=device)
    unused[indices[drawn & (indices < len(x))]] = False
    x[unused], g[unused] = torch.nan, torch.inf
    result = gather_gemm(
        x, g, indices, weights, block_rows=block_rows, is_padded=True, config=config
    )
    check_products(result, x, g, indices[drawn], weights[drawn])
    return int((~unused).sum())


def check_gather_correction(rank, dtype, *, weighted, config, device="cpu"):
    """Blocks of rows into a tensor of another dtype, beginning with C Eᵀ."""
    x, g = operands(70, 40, 24, dtype, device=device)
    c, e = torch.randn(24, rank, device=device), torch.randn(40, rank, device=device).to(dtype)
    indices = drawn_blocks([0, 2, 4], 16, device)
    weights = (8 * torch.rand(3, device=device)).repeat_interleave(16) if weighted else None
    out = torch.empty(24, 40, device=device)
    result = gather_gemm(
        x, g, indices, weights, block_rows=16, correction=Correction(c, e, 4.0), out=out,
        config=config,
    )  # fmt: skip
    assert result is out
    check_products(result, x, g, indices, weights, plus=4 * c.double() @ e.double().T)
    of_g = Correction(*(torch.randn(n, rank, device=device) for n in (40, 24)), 0.5, is_of_g=True)
    of_g = of_g._replace(q=of_g.q.to(dtype))
    result = gather_gemm(x, g, indices, weights, block_rows=16, correction=of_g, config=config)
    check_products(result, x, g, indices, weights, plus=of_g.q.double() @ of_g.c.double().T / 2)


# Scores and the row memory. ----------------------------------------------------------------------


def check_norms(norms, *matrices):
    """Products of the norms of the rows of these matrices."""
    theirs, exact = (
        math.prod(torch.linalg.vector_norm(a.to(dtype), dim=1) for a in matrices)
        for dtype in (torch.float32, torch.float64)
    )
    as_good_as(norms, theirs, exact)


def check_sums(sums, g):
    """Sums of the columns of G, in its dtype, when they are added up."""
    sums = sums.total()
    assert sums.dtype == g.dtype
    as_good_as(sums, g.sum(0), g.double().sum(0))


def spoil(x, g):
    """Makes some of seventeen rows not finite, each in its own way; returns which."""
    x[1, 3], x[4, 0], x[5, -1] = torch.nan, torch.inf, -torch.inf
    g[6, 2], g[7, -1], g[8, 0] = torch.nan, torch.inf, -torch.inf
    x[9], g[9, 1] = 0.0, torch.inf
    g[10], x[10, 1] = 0.0, -torch.inf
    x[11, 2], g[11, 2] = torch.nan, torch.inf
    bad = torch.zeros(17, dtype=torch.bool, device=x.device)
    bad[[1, 4, 5, 6, 7, 8, 9, 10, 11]] = True
    return bad


def check_rows_that_are_not_finite(dtype, layout="plain", device="cpu"):
    """They score infinity, and a memory does not keep them."""
    x, g = operands(17, 33, 20, dtype, layout, device)
    x[2], g[3] = 0.0, 0.0
    bad = spoil(x, g)
    scores, _ = row_scores(x, g, config=TILE)
    assert torch.equal(scores == torch.inf, bad)
    assert (scores[2:4] == 0).all()
    check_norms(scores[~bad], x[~bad], g[~bad])
    memory = new_memory(17, 33, 20, dtype, device)
    scores, _ = accumulate_and_score(
        memory, x, g, scalar(CARRY, device), scalar(SEED, device), config=TILE
    )
    assert torch.equal(scores == torch.inf, bad)
    assert torch.equal(memory[2], ~bad)


def new_memory(rows, n, p, dtype, device="cpu", layout="padded"):
    """Slots in larger matrices of NaN; every other slot is filled, the empty ones hold NaN."""
    filled = torch.arange(rows, device=device) % 2 == 0
    halves = operands(rows, n, p, dtype, layout, device)
    for half in halves:
        half[~filled] = torch.nan
    return (*halves, filled)


def signs_of(rows, seed=SEED, device="cpu"):
    """The signs of a seed, ±1 for each row, read off an update that adds nothing: [rows, 1]."""
    memory = [torch.ones(rows, 1, device=device) for _ in range(2)]
    filled, zeros = torch.ones(rows, dtype=torch.bool, device=device), torch.zeros_like(memory[0])
    accumulate_and_score(
        (*memory, filled), zeros, zeros, scalar(1.0, device), scalar(seed, device),
        signed=True, config=RowConfig(512, 16, 4),
    )  # fmt: skip
    assert torch.equal(*memory), "X and G must share their signs"
    return memory[0]


def formed(memory, x, g, signed, dtype):
    """X̂ and Ĝ from the memory as it is now, computed in `dtype`."""
    factor = CARRY * (signs_of(len(x), device=x.device) if signed else torch.ones(1)).to(x.device)
    return [
        torch.where(memory[2][:, None], factor.to(dtype) * m.to(dtype), 0.0) + a.to(dtype)
        for m, a in zip(memory, (x, g), strict=False)
    ]


def check_stored(memory, exact, rows=slice(None)):
    """Each element is off by one rounding at most."""
    for m, right in zip(memory, exact, strict=False):
        unit = torch.finfo(m.dtype).eps
        assert ((m - right)[rows].abs() <= unit * right[rows].abs() + 1e-6).all()


def check_update(shape, dtype, stored, *, signed, layout="plain", device="cpu"):
    """What is stored, the scores of just that, and the column sums; `shape` is M, N, P."""
    x, g = operands(*shape, dtype, layout, device)
    memory = new_memory(*shape, stored, device)
    exact = formed(memory, x, g, signed, torch.float64)
    scores, sums = accumulate_and_score(
        memory, x, g, scalar(CARRY, device), scalar(SEED, device),
        signed=signed, bias_grad=True, config=TILE,
    )  # fmt: skip
    check_stored(memory, exact)
    assert memory[2].all()
    check_norms(scores, *memory[:2])
    check_sums(sums, g)


def check_update_of_the_rest(dtype, stored, *, bias_grad, device="cpu"):
    """Rows that are taken are emptied and may hold anything; others may not lose a row."""
    x, g = operands(33, 20, 17, dtype, device=device)
    taken = torch.arange(33, device=device) % 3 == 0
    x[3, 5] = torch.nan
    memory = new_memory(33, 20, 17, stored, device)
    poisoned = torch.ones(17, dtype=dtype, device=device)
    before = [m.clone() for m in memory]
    exact = formed(memory, x, g, True, torch.float64)

    def update():
        return accumulate_rest(
            memory, x, g, scalar(CARRY, device), scalar(SEED, device), taken, poisoned,
            signed=True, bias_grad=bias_grad, config=TILE,
        )  # fmt: skip

    sums = update()
    check_stored(memory, exact, ~taken)
    for m, old in zip(memory[:2], before, strict=False):
        torch.testing.assert_close(m[taken], old[taken], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(memory[2], ~taken)
    assert (poisoned == 1).all()
    if bias_grad:
        check_sums(sums, g)
    else:
        assert sums is None
    for rows, bad in ((x, torch.nan), (g, torch.inf)):
        poisoned.fill_(1)
        rows[7, 2] = bad
        update()
        assert poisoned.isnan().all(), "a row that is not taken shows nowhere else"
        assert not memory[2][7]
        rows[7, 2] = 0.0


# Packed rows. ------------------------------------------------------------------------------------


def check_packed(shape, indices, dtype, stored, layout="plain", *, signed, device="cpu"):
    """Rows with their memory, which stays as it is, zeros for those beyond M; shape is M, N, P."""
    x, g = operands(*shape, dtype, layout, device)
    memory, indices = new_memory(*shape, stored, device), indices.to(device)
    before = [m.clone() for m in memory]
    packed = pack_rows(
        memory, x, g, indices, scalar(CARRY, device), scalar(SEED, device), signed=signed
    )
    exists = indices < shape[0]
    for rows, sums in zip(packed, formed(memory, x, g, signed, torch.float32), strict=True):
        assert rows.is_contiguous()
        expected = torch.zeros_like(rows)
        expected[exists] = sums[indices[exists].long()].to(dtype)
        # A multiplication and an addition may be rounded as one.
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(rows, expected, rtol=unit, atol=unit)
    for m, old in zip(memory, before, strict=True):
        torch.testing.assert_close(m, old, rtol=0, atol=0, equal_nan=True)


# The subspace. -----------------------------------------------------------------------------------


def new_basis(columns, rank, dtype, device="cpu"):
    """Q with orthonormal columns, and s."""
    q = torch.linalg.qr(torch.randn(columns, rank, device=device)).Q
    return q.contiguous().to(dtype), float(2 ** round(math.log2(columns) / 2))


def check_projection(shape, dtype, layout="plain", *, config=TILE, device="cpu"):
    """Z and what Q leaves of each row; `shape` is M, N, q."""
    rows, columns, rank = shape
    x, _ = operands(rows, columns, 1, dtype, layout, device)
    q, scale = new_basis(columns, rank, dtype, device)
    z, rest, sums = subspace.project(x, q, scale, column_sums=True, config=config)
    check_sums(sums, x)
    exact = x.double() @ q.double() / scale
    assert z.dtype == dtype
    as_good_as(z, (x @ q) / scale, exact)
    # √(a − b), with Z rounded as it is stored: a − b is judged by what float32 leaves of a.
    squares = x.double().square().sum(1)
    left = squares - (scale * exact.to(dtype).double()).square().sum(1)
    error = (rest.double().square() - left.clamp(min=0)).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * squares).all()


def check_special_rows(dtype, device="cpu"):
    """What Q leaves of zeros, of rows within the subspace and of rows that are not finite.

    Rows that are not finite in G or in what Q left score infinity, even if the other is zero.
    """
    (x, _), (q, scale) = operands(9, 40, 1, dtype, device=device), new_basis(40, 5, dtype, device)
    x[1], x[2] = 0.0, q[:, 0]
    x[4, 3], x[5, 39], x[6, 0] = torch.nan, torch.inf, -torch.inf
    rest = subspace.project(x, q, scale, config=TILE).rest
    norms = torch.linalg.vector_norm(x.float(), dim=1)
    assert rest[1] == 0
    assert 0 < rest[2] <= 4 * torch.finfo(dtype).eps ** 0.5, "a row must keep a chance to be drawn"
    assert not rest[4:7].isfinite().any()
    assert (rest[[0, 7, 8]] > 0.5 * norms[[0, 7, 8]]).all()

    (g, z), rest = operands(20, 40, 5, dtype, device=device), torch.ones(20, device=device)
    g[3, 39], g[4, 0], rest[5], rest[6] = torch.nan, torch.inf, torch.nan, torch.inf
    g[7], rest[7] = 0.0, torch.inf
    _, scores, _ = subspace.project_gradient(g, z, rest, config=TILE)
    assert (scores == torch.inf).nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7]
    assert scores[:3].isfinite().all()


def check_gradient(shape, dtype, layout="plain", *, split, bias_grad, device="cpu"):
    """One pass over G, and the product alone; `shape` is M, P, q."""
    rows, columns, rank = shape
    g, _ = operands(rows, columns, 1, dtype, layout, device)
    z, rest = torch.randn(rows, rank, device=device).to(dtype), torch.rand(rows, device=device)
    tile = replace(TILE, split=split)
    parts, scores, sums = subspace.project_gradient(g, z, rest, bias_grad=bias_grad, config=tile)
    assert parts.shape == (split, columns, rank)
    product = subspace.transposed_mm(z, g, config=tile)
    assert product.dtype == torch.float32
    for one in (parts.sum(0), product):
        as_good_as(one, g.T.float() @ z.float(), g.T.double() @ z.double())
    check_norms(scores, g, rest[:, None])
    if bias_grad:
        check_sums(sums, g)
    else:
        assert sums is None


def check_whole_gradient(count, dtype, *, split=1, device="cpu"):
    """(GᵀZ) Qᵀ + Σ w gᵀ(x − z Qᵀ), which is Gᵀ X itself with all 80 rows at weight 1."""
    x, g = operands(80, 40, 24, dtype, device=device)
    q, scale = new_basis(40, 8, dtype, device)
    indices = drawn_rows(80, count, device=device)
    # Powers of two: exact products in any dtype.
    weights = 2.0 ** torch.randint(0, 1 if count == 80 else 3, (count,), device=device)
    z, rest, _ = subspace.project(x, q, scale, config=TILE)
    parts = subspace.project_gradient(g, z, rest, config=replace(TILE, split=2)).parts
    config = replace(SMALL, split_k=split)
    c = subspace.correction(parts, z, g, indices, weights, config=config)
    e = (scale * q.float()).to(dtype)
    out = torch.empty(24, 40, device=device)
    correction = Correction(c, q, scale)
    gather_gemm(x, g, indices, weights, correction=correction, config=config, out=out)
    wx, wg, wz, we = (a.double() for a in (x, g, z, e))
    left = wg[indices] * weights[:, None].double()
    exact = wg.T @ wz @ we.T + left.T @ (wx - wz @ we.T)[indices]
    if count == 80:
        torch.testing.assert_close(exact, wg.T @ wx)
    # C is carried by two summands of the dtype: twice its bits.
    bound = {torch.bfloat16: 2**-12, torch.float16: 2**-15, torch.float32: 2**-18}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=bound * exact.abs().max())
