"""The noise along a run: against draws of the library, against gradients, and resumed."""

import dataclasses

import pytest
import torch

from memaop_triton import new_memory
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.bench.studies.quality import calibration, tables, variances
from memaop_triton.bench.studies.quality.calibration import StepNoise
from memaop_triton.bench.studies.quality.capture import Rows
from memaop_triton.bench.studies.quality.noise import basis_of
from memaop_triton.bench.studies.quality.schemes import Cell
from memaop_triton.bench.studies.quality.training import Trainer, loss_of
from memaop_triton.bench.studies.quality.variances import Captured
from memaop_triton.flops import weight_grad_flops
from tests.bench.quality import tiny
from tests.schemes import flat_config

M, N, P = 96, 20, 14
PRIORITY, BUDGET = Cell("tiny", "priority", "1/4"), Cell("tiny", "budget", "1/2")
ALLOCATED = Cell("tiny", "priority-allocated", "1/4")


def batch(seed, *, low=False):
    """Rows of unequal length; with `low` those of X lie near two dimensions."""
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(M, N, generator=generator), torch.randn(M, P, generator=generator)
    if low:
        plane = torch.randn(2, N, generator=torch.Generator().manual_seed(0))
        x = 3 * torch.randn(M, 2, generator=generator) @ plane + 0.3 * x
    return Rows(x, g * torch.rand(M, 1, generator=generator) ** 2)


def captured_of(before, *after, ranks=(0,)):
    squares = [float((one.g.t() @ one.x).square().sum()) for one in after]
    scores = variances.scores_of(before, after, sorted(ranks))
    return Captured((M, N, P), scores, squares, 1.0)


@pytest.mark.parametrize("selection", ["priority", "bernoulli", "crs", "uniform"])
def test_variance_is_that_of_draws(selection):
    rows = batch(1)
    config = flat_config(ratio=1 / 4, selection=selection, memory="none")
    found = variances.least(config, captured_of(batch(0), rows))
    exact = rows.g.t() @ rows.x
    torch.manual_seed(0)
    draws = [(weight_grad(*rows, config, None) - exact).square().sum() for _ in range(600)]
    assert found.k == M // 4
    assert found.variance == pytest.approx(torch.stack(draws).mean().item(), rel=0.1)
    assert found.choice.rank == 0
    assert found.flops == weight_grad_flops(M, N, P, M // 4)
    exact_rows = variances.least(dataclasses.replace(config, ratio=1.0), captured_of(rows, rows))
    assert exact_rows.variance == 0


def test_variance_beside_a_subspace_is_that_of_draws():
    before, rows = batch(0, low=True), batch(1, low=True)
    config = flat_config(ratio=1 / 4, memory="subspace", rank=3)
    found = variances.least(config, captured_of(before, rows, ranks=(0, 3)))
    assert found.choice == ("input", 3)
    memory = new_memory(dataclasses.replace(config, memory=flat_config(
        ratio=1 / 4, memory="subspace", rank=3, side="input").memory), N, P)  # fmt: skip
    weight_grad(*before, config, memory)
    memory.bases["input"].q = basis_of(before.x, 3).q
    exact, errors = rows.g.t() @ rows.x, []
    for _ in range(600):
        q = memory.bases["input"].q.clone()
        errors.append((weight_grad(*rows, config, memory) - exact).square().sum())
        memory.bases["input"].q = q
    assert found.variance == pytest.approx(torch.stack(errors).mean().item(), rel=0.1)
    plain = variances.least(flat_config(ratio=1 / 4, memory="none"), captured_of(before, rows))
    assert found.variance < 0.3 * plain.variance


def test_variances_are_means_over_batches():
    one, other = batch(1), batch(2)
    config = flat_config(ratio=1 / 4, memory="none")
    both, *single = (
        variances.least(config, captured_of(batch(0), *rows)).variance
        for rows in ((one, other), (one,), (other,))
    )
    assert both == pytest.approx(sum(single) / 2)
    assert single[0] != pytest.approx(single[1], rel=0.01)


def test_squares_are_those_of_gradients(task, source):
    trainer = Trainer(task, None, 0)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    batches = list(source.batches(64, 3, torch.Generator().manual_seed(1)))
    captured, others = calibration.measure(trainer, batches, lambda m, n, p: set())
    assert list(captured) == ["hidden1", "hidden2"]
    assert all(map(torch.equal, before, trainer.model.parameters()))
    expected = {"hidden1": [], "hidden2": [], "others": []}
    for one in batches[1:]:  # the first is for bases
        trainer.model.zero_grad()
        loss_of(trainer.model, one).backward()
        squares = {n: p.grad.square().sum().item() for n, p in trainer.model.named_parameters()}
        for name in captured:
            expected[name].append(squares.pop(f"{name}.weight"))
        expected["others"].append(sum(squares.values()))
    assert others == pytest.approx(sum(expected["others"]) / 2)
    for name, layer in captured.items():
        assert layer.squares == pytest.approx(expected[name])
        assert layer.sizes[0] == 64


def test_a_budget_is_spread_once_the_run_spreads_it():
    quiet, loud = captured_of(batch(0), batch(1)), captured_of(batch(0), batch(2))
    loud = loud._replace(
        scores=[{choice: 30 * s for choice, s in one.items()} for one in loud.scores]
    )
    layers = {"quiet": quiet, "loud": loud}
    early = variances.sampled(ALLOCATED, 49, layers)
    assert {one.k for one in early.values()} == {M // 4}
    late = variances.sampled(ALLOCATED, 50, layers)
    budget = 1 / 4 * 2 * (2 * M * N * P)
    assert late["quiet"].k < late["loud"].k
    assert sum(one.flops for one in late.values()) <= budget
    # The same number of rows everywhere, within the same budget, is noisier.
    alike = [variances.least(flat_config(k=12, memory="none"), layer) for layer in layers.values()]
    assert 0.95 * budget < sum(one.flops for one in alike) <= budget
    assert sum(one.variance for one in late.values()) < sum(one.variance for one in alike)


def test_what_is_not_variance_of_dw_is_not_covered():
    covered = {
        name: calibration.is_covered(Cell("mnist-adam", name, "1/8"))
        for name in ("priority", "budget", "budget-allocated", "crs", "bernoulli")
    }
    assert all(covered.values())
    for name in ("topk", "topk-signed", "budget-both", "budget-projected", "wta", "dense"):
        assert not calibration.is_covered(Cell("mnist-adam", name, "1/8")), name


def test_steps_are_those_of_the_curve_and_a_few_before():
    assert calibration.steps_of(tiny.TASK) == list(range(2, 21, 2))
    longer = dataclasses.replace(tiny.TASK, steps=400)
    assert calibration.steps_of(longer) == [5, 15, 30, *range(40, 401, 40)]


def test_what_is_measured_is_not_measured_again(task, tmp_path, monkeypatch):
    path, measured, measure = tmp_path / "calibration.csv", [], calibration.measure

    def recording(trainer, batches, ranks):
        measured.append(trainer.schedule.last_epoch)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return measure(trainer, batches, ranks)

    monkeypatch.setattr(calibration, "measure", recording)
    with pytest.raises(KeyboardInterrupt):
        list(calibration.run([PRIORITY], 0, path, None))
    assert len(list(calibration.run([PRIORITY], 0, path, None))) == 7
    assert measured == [2, 4, 6, 8, *range(8, 21, 2)]
    assert list(calibration.run([PRIORITY], 0, path, None)) == []
    lines = tables.read(path, StepNoise)
    assert [(one.step, one.layer) for one in lines] == [
        (step, layer) for step in range(2, 21, 2) for layer in ("hidden1", "hidden2")
    ]
    # Beside another scheme, and in one go: the same figures.
    monkeypatch.setattr(calibration, "measure", measure)
    list(calibration.run([BUDGET, PRIORITY], 0, tmp_path / "both.csv", None))
    both = tables.read(tmp_path / "both.csv", StepNoise)
    assert [one for one in both if one.cell == PRIORITY] == lines
    assert {one.cell for one in both} == {PRIORITY, BUDGET}
    assert all(one.variance > 0 and one.square > 0 and one.others > 0 for one in lines)
