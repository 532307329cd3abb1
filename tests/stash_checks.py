"""Checks of the stash's kernels that two suites make, each on operands of its own.

What is stored is judged by its definition, and where there is a C compiler by what C stores with
the same seed; what is restored by PyTorch's function.
"""

import math
from unittest import mock

import torch

from memaop_triton.kernels.cpu import stash as on_cpu
from memaop_triton.kernels.gpu import stash, stash_restore
from tests.judging import as_good_as, operands

SEED = (1 << 62) + 0x123456789ABCDEF
MOST = {4: 7, 8: 127}


def new_subspace(columns, rank, device="cpu"):
    """E = s Qᵀ, rows further apart than they are long, and s; `None` and 1 for rank 0."""
    if rank == 0:
        return None, 1.0
    scale = float(2 ** round(math.log2(columns) / 2))
    q = torch.linalg.qr(torch.randn(columns, rank)).Q
    room = torch.full((rank, columns + 8), torch.nan, dtype=torch.bfloat16, device=device)
    return room[:, :columns].copy_(q.T * scale), scale


def kept(stored, seed=SEED, device="cpu"):
    """Numbers, scales and seed, as what restores rows takes them."""
    return *stored[:2], torch.as_tensor(seed, device=device).reshape(1)


def in_pytorch(stored, seed):
    """What was stored, as `on_cpu.restore_rows` takes it."""
    numbers, scales, seed = (a.cpu() for a in kept(stored, seed))
    return on_cpu.RoundedRows(numbers, scales, stored.norms.cpu(), seed)


def numbers_in_c(x, bits, seed, inside):
    """What the C code stores; `x` in float32, which has no rounding beside the other dtypes."""
    with mock.patch.object(on_cpu, "draw_seed_tensor", return_value=torch.tensor([seed])):
        return on_cpu.round_rows(x, bits, inside)


def check_rounded(
    shape, bits, dtype, layout="plain", *, rank=0, seed=SEED, compare=False, device="cpu"
):
    """What is stored of [M, N] rows, and what it is restored to; `compare` with what C stores.

    A few numbers may differ, whose sums in float32 lie within their rounding of an integer.
    """
    rows, columns = shape
    x, _ = operands(rows, columns, 1, dtype, layout, device)
    expand, scale = new_subspace(columns, rank, device)
    stored = stash.round_rows(x, bits, seed, expand, scale)
    plain, inside = x.cpu().float().contiguous(), None
    if rank:
        exact = plain.double() @ expand.cpu().double().T / scale**2
        error = (stored.z.cpu().double() - exact).abs()
        # That of bfloat16, which the interpreter cuts off to, and of operands with ten bits.
        assert (error <= 2**-7 * exact.abs() + 2**-10 * exact.abs().max()).all()
        inside = on_cpu.Inside(stored.z.cpu(), expand.cpu())
    _check_numbers(plain, bits, in_pytorch(stored, seed), inside)
    if compare:
        right = numbers_in_c(plain, bits, int(seed), inside)
        assert torch.equal(stored.scales.cpu().view(torch.int16), right.scales.view(torch.int16))
        others = (stored.numbers.cpu() != right.numbers).sum()
        # An error of 2⁻²² beside steps that are a 127th of the largest number.
        assert others <= 2 + 2e-4 * right.numbers.numel()
        if others == 0:
            torch.testing.assert_close(stored.norms.cpu(), right.norms, rtol=1e-6, atol=0)
    check_restored(stored, bits, columns, dtype, expand, seed, device=device)


def _check_numbers(x, bits, stored, inside):
    """No number is off by more than half a step, and scales and norms fit."""
    rest = x.double()
    if inside is not None:
        rest = rest - inside.z.double() @ inside.expand.double()
    restored = on_cpu.restore_rows(stored, bits, x.shape[1], torch.float64)
    norms = torch.linalg.vector_norm(restored, dim=1)
    torch.testing.assert_close(stored.norms.double(), norms, rtol=1e-5, atol=1e-30)
    widths = on_cpu.widths(x.shape[1])
    blocks = zip(
        rest.split(widths, 1), restored.split(widths, 1), stored.scales.double().T, strict=1
    )
    for exact, ours, step in blocks:
        matrix = on_cpu._hadamard(exact.shape[1], torch.float64, exact.device)
        exact, ours = exact @ matrix, ours @ matrix
        largest = exact.abs().amax(1)
        slack = 1e-5 * largest + 1e-6 * rest.abs().amax(1)
        assert (step >= (largest - slack) / MOST[bits]).all()
        assert (step <= (largest + slack) / MOST[bits] * (1 + 2**-7) + 2.0**-119).all()
        assert ((ours - exact).abs() <= (step / 2 + slack)[:, None]).all()


def check_restored(stored, bits, columns, dtype, expand, seed, *, device="cpu"):
    """All rows; some of them and rows of G; rows beyond the last one, which are zero."""
    rows, tensors = len(stored.norms), kept(stored, seed, device)
    inside = None if expand is None else (stored.z, expand)
    plain = in_pytorch(stored, seed)
    plain_inside = inside and on_cpu.Inside(*(a.cpu() for a in inside))

    def restored(number):
        return on_cpu.restore_rows(plain, bits, columns, number, None, plain_inside).to(device)

    exact, theirs = restored(torch.float64), restored(dtype)
    every = stash_restore.restore_rows(tensors, bits, columns, dtype, None, inside)
    assert every.dtype == dtype
    as_good_as(every, theirs, exact)
    indices = torch.cat([torch.randperm(rows)[: max(1, rows // 3)], torch.tensor([rows, rows + 9])])
    indices = indices.sort().values.to(device)
    weights = 4 * torch.rand(len(indices), device=device)
    g, _ = operands(rows, 70, 1, dtype, "strided", device)
    exists = indices < rows
    for given in (weights, None):
        some = stash_restore.restore_both(tensors, bits, columns, g, indices, given, inside)
        as_good_as(some.x[exists], theirs[indices[exists]], exact[indices[exists]])
        assert (some.x[~exists] == 0).all()
        picked = g[indices[exists]]
        if given is not None:
            picked = (picked.float() * given[exists, None]).to(dtype)
        assert torch.equal(some.g[exists], picked)
        assert (some.g[~exists] == 0).all()


def check_not_finite(bits, dtype, device="cpu"):
    """A number that is not finite shows in the norm and the columns of its row, and in no other."""
    x, _ = operands(9, 150, 1, dtype, device=device)
    x[3, 70], x[5, 149], x[6, 0], x[8] = torch.nan, torch.inf, -torch.inf, 0.0
    stored = stash.round_rows(x, bits, SEED)
    restored = stash_restore.restore_rows(kept(stored, device=device), bits, 150, dtype)
    finite = torch.tensor([True] * 9, device=device)
    finite[[3, 5, 6]] = False
    assert torch.equal(stored.norms.isfinite(), finite)
    assert torch.equal(restored.isfinite().all(1), finite)
    assert restored[3, 64:128].isnan().all()
    assert restored[3, :64].isfinite().all()
    assert restored[5, :128].isfinite().all()
    assert not restored[5, 149].isfinite()
    assert not restored[6, :64].isfinite().any()
    assert stored.norms[8] == 0
    assert restored[8].abs().max() <= 2.0**-119


def check_extremes(bits, dtype, device="cpu"):
    """The largest number is not rounded beyond what is stored; tiny and huge ones stay finite."""
    info = torch.finfo(dtype)
    most = min(info.max, 2.0**120) / 16
    x = torch.zeros(64, 70, dtype=dtype, device=device)
    x[1], x[2, 5], x[3, 66], x[4:, 0] = info.tiny, most, -most, 8 * MOST[bits]
    stored = stash.round_rows(x, bits, SEED)
    restored = stash_restore.restore_rows(kept(stored, device=device), bits, 70, dtype)
    assert restored.isfinite().all()
    assert restored[1].float().abs().max() <= max(2.0**-116, 16 * info.tiny)
    for row, column in ((2, 5), (3, 66)):
        error = (restored[row, column].double() - x[row, column].double()).abs()
        assert error < most / MOST[bits] * 8
    # After the rotation every number is just the largest one, 7 or 127 steps of 1.
    errors = torch.linalg.vector_norm((restored - x)[4:, :64].float(), dim=1)
    assert errors.max() < 8 * 0.51
