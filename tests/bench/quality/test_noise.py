"""The variance of one step, against draws of the library itself."""

import dataclasses

import pytest
import torch

from memaop_triton import new_memory
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.bench.studies.quality import noise, tables
from memaop_triton.bench.studies.quality.capture import Rows
from memaop_triton.bench.studies.quality.noise import Noise, measure
from memaop_triton.flops import weight_grad_flops
from tests.bench.quality import tiny
from tests.schemes import flat_config

M, N, P, BUDGET = 512, 128, 96, 1 / 4


def batch(seed, side):
    """Rows of one side lie near four dimensions, the same ones in every batch."""
    plane = torch.randn(4, N if side == "input" else P, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    low = 3 * torch.randn(M, 4) @ plane + 0.3 * torch.randn(M, plane.shape[1])
    return Rows(low, torch.randn(M, P)) if side == "input" else Rows(torch.randn(M, N), low)


@pytest.mark.parametrize("side", ["input", "grad"])
def test_the_side_that_lies_in_few_dimensions_leaves_least(side):
    lines = {one[0]: one for one in measure(batch(1, side), batch(2, side), BUDGET)}
    assert list(lines) == ["none", "input", "grad"]
    assert lines[side][1] >= 4
    assert lines[side][3] < 0.3 * lines["none"][3]
    other = "grad" if side == "input" else "input"
    assert lines[other][3] > 3 * lines[side][3]
    for _, rank, k, _, own in lines.values():
        assert own == lines["none"][4]
        assert weight_grad_flops(M, N, P, k) <= BUDGET * 2 * M * N * P
        assert (rank > 0) == (k < lines["none"][2])


def test_variance_is_that_of_draws():
    before, after = batch(1, "input"), batch(2, "input")
    exact = after.g.t() @ after.x
    for side, rank, k, variance, _ in measure(before, after, BUDGET):
        memory = "subspace" if rank else "none"
        config = flat_config(k=k, memory=memory, rank=max(rank, 1), side=side if rank else "auto")
        kept = new_memory(config, N, P)
        if rank:
            for _ in range(9):
                weight_grad(*before, config, kept)
        errors = [(weight_grad(*after, config, kept) - exact).square().sum() for _ in range(50)]
        found = torch.stack(errors).mean() / exact.square().sum()
        assert found == pytest.approx(variance, rel=0.3)


def test_own_variance_is_that_of_rows_drawn_anew():
    rows = Rows(torch.randn(M, 8) + 0.5, torch.randn(M, 6))
    terms = rows.g.unsqueeze(2) * rows.x.unsqueeze(1)
    expected = M * terms.var(0).sum() / terms.sum(0).square().sum()
    (_, _, _, _, own), *_ = measure(rows, rows, BUDGET)
    assert own == pytest.approx(expected.item(), rel=1e-3)


def test_lines_of_another_step_stay(tmp_path, monkeypatch):
    monkeypatch.setitem(noise.TASKS, "tiny", dataclasses.replace(tiny.TASK, steps=8))
    path = tmp_path / "noise.csv"
    for step in (4, 2, 4):
        noise.run("tiny", step, 1 / 4, path, None)
    found = [(one.step, one.layer, one.rows, one.inputs) for one in tables.read(path, Noise)]
    layers = ("hidden1", 64, 64), ("hidden2", 64, 24)
    assert found == [(step, *layer) for step in (2, 4) for layer in layers for _ in range(3)]
