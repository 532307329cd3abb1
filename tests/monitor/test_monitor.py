"""What a monitor reads of layers in training, and that it changes nothing there."""

import copy
import dataclasses
import math
import pickle
import time

import pytest
import torch
from rich.console import Console
from torch import nn

from memaop_triton import (
    MemAOPConfig,
    MemAOPLinear,
    StarvedLayerWarning,
    Subspace,
    attach_optimizer,
    convert_,
    monitor,
    revert_,
)
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.kernels import targets
from tests.schemes import flat_config

N, P = 12, 6


def net(dtype=torch.float32, **settings):
    settings = {"ratio": 1 / 4, "rank": 3, "refresh_every": 3} | settings
    layers = nn.Sequential(nn.Linear(N, 16), nn.Tanh(), nn.Linear(16, P)).to(dtype)
    return convert_(layers, flat_config(**settings))


def train(model, batches, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    gradients = []
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return gradients


def batches(count, rows=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(rows, N, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("block_rows", [1, 16])
def test_what_is_computed_stays_the_same_bit_for_bit(scheme, block_rows, contents, same):
    is_unbiased = flat_config(**scheme).is_unbiased
    plain = net(block_rows=block_rows, **scheme)
    if is_unbiased:
        sampled = convert_(
            nn.Linear(P, P), flat_config(ratio=1 / 4, rank=1, grad_input="sampled", **scheme)
        )
        plain.append(sampled)
    watched = copy.deepcopy(plain)
    data = [*batches(4), *batches(1, rows=50), *batches(1, rows=2), torch.zeros(0, N)]
    torch.manual_seed(1)
    expected = train(plain, data)
    torch.manual_seed(1)
    with monitor(watched, every=1, starving=1000) as watch:
        found = train(watched, data)
        seen = watch.read()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for one, other in zip(watched, plain, strict=True):
        if isinstance(one, MemAOPLinear):
            assert same(contents(one.memory), contents(other.memory))
    assert [layer.observations for layer in seen.values()] == [6, 6, 6][: 2 + is_unbiased]
    for layer in seen.values():
        assert 0 < layer.captured <= 1
        scalars = layer.scalars()
        if layer.batch_variance == 0:  # an estimate from a batch of two rows may be below
            assert scalars.pop("relative_variance") == math.inf
        assert all(math.isfinite(v) and v >= 0 for v in scalars.values())


def test_observes_every_so_many_passes_and_both_uses_of_a_layer():
    layer = MemAOPLinear(N, N, config=MemAOPConfig(ratio=1 / 4))
    with monitor(layer, every=10) as watch:
        due = []
        for x in batches(101):
            layer(layer(x)).sum().backward()
            due.append(watch._watched[""][1].is_due)
        assert watch.read()[""].observations == pytest.approx(202 / 10, abs=1)
    # The second use of every forward pass is the first of its backward pass.
    assert sum(due) == pytest.approx(101 / 10, abs=1)
    layer(batches(1)[0]).sum().backward()
    assert watch.read()[""].observations == pytest.approx(202 / 10, abs=1)


def test_a_captured_step_is_observed_whenever_it_is_replayed(monkeypatch):
    layer = MemAOPLinear(N, P, config=MemAOPConfig.paper(ratio=1 / 4))
    with monitor(layer, every=100) as watch:
        observer = watch._watched[""][1]
        layer(batches(1)[0]).sum().backward()
        layer(batches(1)[0]).sum().backward()
        assert watch.read()[""].observations == 1
        monkeypatch.setattr(targets, "is_capturing", lambda device: True)
        places = [t.data_ptr() for t in (*observer.read(), observer.ages)]
        for _ in range(3):
            layer(batches(1)[0]).sum().backward()
        # What a replay writes is what the next one reads.
        assert [t.data_ptr() for t in (*observer.read(), observer.ages)] == places
        assert watch.read()[""].observations == 4


def test_averages_forget_at_the_rate_of_the_smoothing():
    layer = MemAOPLinear(N, P, config=MemAOPConfig(k=8, memory="none"))
    sums = []
    with monitor(layer, every=1, smoothing=0.5, starving=100) as watch:
        for x in batches(3):
            layer(x).sum().backward()
            sums.append(float((x.norm(dim=1) * P**0.5).sum()))
    expected = (0.25 * sums[0] + 0.5 * sums[1] + sums[2]) / 1.75
    assert watch.read()[""].score_sum == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("memory", ["none", "residual", "subspace"])
def test_rows_that_are_not_finite_are_counted_and_left_out(bad, memory):
    selection = "topk" if memory == "residual" else "priority"
    config = flat_config(ratio=1 / 4, selection=selection, memory=memory, rank=2)
    layer, data = MemAOPLinear(N, P, config=config), batches(3)
    data[1][5, 3] = bad
    with monitor(layer, every=1) as watch:
        layer(data[0]).sum().backward()
        before = watch.read()[""]
        layer(data[1]).sum().backward()
        after = watch.read()[""]
        assert (after.nonfinite_rows, after.skipped) == (1, 1)
        assert after.observations == before.observations == 1
        assert (after.score_sum, after.captured) == (before.score_sum, before.captured)
        layer(data[2]).sum().backward()
        assert watch.read()[""].observations == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_agree(dtype):
    model = net(torch.float64, ratio=1 / 2, memory="none")
    results = []
    for kind in (torch.float64, dtype):
        torch.manual_seed(2)
        one = copy.deepcopy(model).to(kind)
        with monitor(one, every=1, smoothing=0) as watch:
            train(one, [x.to(kind) for x in batches(1, dtype=torch.bfloat16)], lr=0)
        results.append(watch.read()["0"])
    assert results[1].batch_variance == pytest.approx(results[0].batch_variance, rel=0.05)
    assert results[1].score_sum == pytest.approx(results[0].score_sum, rel=0.05)


def test_an_exact_pass_has_no_sampling_variance_and_shows_what_there_is_to_sample():
    # The last layer of a net: its gradient does not depend on what was drawn before it.
    model = net(memory="subspace")
    model[0].eval()
    with monitor(model, every=1, smoothing=0) as watch:
        train(model, batches(4), lr=0)
        sampled = watch.read()["2"]
        for layer in (model[0], model[2]):
            layer.set_ratio_(1)
        train(model, batches(4), lr=0)
        exact = watch.read()["2"]
    assert "0" not in watch.read()  # its passes were those of nn.Linear
    assert exact.captured == 1
    assert exact.sampling_variance == exact.relative_variance == 0
    assert exact.k == exact.rows == 64
    # Of the same batch through the same basis, but for one refresh of it.
    assert exact.score_sum == pytest.approx(sampled.score_sum, rel=0.3)
    assert exact.variance_of(sampled.k) == pytest.approx(sampled.variance_of(sampled.k), rel=0.3)
    assert exact.variance_of(64) == 0
    assert 0 < exact.outside_subspace < 1


def test_what_other_numbers_of_rows_would_have_is_what_they_have():
    layer = MemAOPLinear(N, P, config=MemAOPConfig(k=48, memory="none"))
    (x,) = batches(1)
    with monitor(layer, every=1, smoothing=0.999, starving=1e9) as watch:
        layer(x).square().sum().backward()
        seen = watch.read()[""]
    g = 2 * layer(x).detach()
    for k in (24, 40):
        config = MemAOPConfig(k=k, memory="none")
        errors = [weight_grad(x, g, config) - g.T @ x for _ in range(2000)]
        mean = float(torch.stack(errors).square().sum((1, 2)).mean())
        assert seen.variance_of(k) == pytest.approx(mean, rel=0.1)


def test_outside_of_the_subspace():
    config = MemAOPConfig(ratio=1 / 4, memory=Subspace(rank=3, side="input", refresh_every=5))
    layer = MemAOPLinear(N, P, config=config)
    directions = torch.linalg.qr(torch.randn(N, 3)).Q.T
    with monitor(layer, every=1, smoothing=0) as watch:
        for _ in range(8):
            x = torch.randn(64, 3) @ directions
            layer(x).sum().backward()
        assert watch.read()[""].outside_subspace < 1e-6
        basis = layer.memory.basis
        x = torch.randn(64, N)
        layer(x).square().sum().backward()
        share = (x - x @ basis @ basis.T).square().sum() / x.square().sum()
        assert watch.read()[""].outside_subspace == pytest.approx(float(share), rel=1e-4)


def test_norm_and_age_of_a_row_memory():
    config = MemAOPConfig.paper(k=1, selection="topk")
    layer = MemAOPLinear(2, 1, bias=False, config=config)
    with monitor(layer, every=1, smoothing=0) as watch:
        # Rows of norm 1, 2 and 3 with a gradient of 1: the third is computed and its slot emptied.
        x = torch.tensor([[1.0, 0], [0, 2], [3, 0]])
        layer(x).sum().backward()
        seen = watch.read()[""]
        assert seen.memory_norm == pytest.approx(math.sqrt((1 + 4) / (1 + 4 + 9)))
        assert seen.staleness == pytest.approx(2 / 3)
        assert seen.captured == pytest.approx(3 / 6)
        assert seen.dropped_bound == pytest.approx(9)
        assert math.isnan(seen.sampling_variance)
        # Scores are now 2·2, 4·2, 3·1, and then 3·3, 2·1, 6·2 after the second was emptied.
        layer(x).sum().backward()
        seen = watch.read()[""]
        assert seen.memory_norm == pytest.approx(math.sqrt((16 + 9) / 14))
        assert seen.staleness == pytest.approx((2 + 0 + 1) / 3)
        assert seen.captured == pytest.approx(8 / 15)
        assert seen.dropped_bound == pytest.approx(49)
        # A shorter batch: the slots it does not reach get older too. Scores are 9 and 2.
        layer(x[:2]).sum().backward()
        assert watch.read()[""].staleness == pytest.approx((0 + 1 + 2) / 3)


def test_ages_are_counted_between_observations_too():
    layer = MemAOPLinear(2, 1, bias=False, config=MemAOPConfig.paper(k=1))
    with monitor(layer, every=100) as watch:
        for _ in range(4):
            layer(torch.eye(2)[:1]).sum().backward()  # one row is all there is: always emptied
            layer(torch.tensor([[9.0, 0], [0, 0]])).sum().backward()
        assert watch.read()[""].staleness == pytest.approx((0 + 7) / 2, abs=0.6)


def test_a_resting_memory_is_not_observed():
    layer = MemAOPLinear(N, P, config=MemAOPConfig.paper(k=4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    attach_optimizer(layer, optimizer)
    with monitor(layer, every=1) as watch:
        layer(batches(1)[0]).sum().backward()
        assert watch.read() == {}


def test_copies_are_not_watched_and_the_watched_can_be_copied():
    model = net()
    with monitor(model, every=1) as watch:
        train(model, batches(1))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin[0].layer_state.observer is twin[2].layer_state.observer is None
            train(twin, batches(2))
        assert watch.read()["0"].observations == 1
    assert model[0].layer_state.observer is model[2].layer_state.observer is None


def test_closing_twice_and_after_the_model_was_reverted():
    model = net()
    first = monitor(model)
    train(model, batches(1))
    revert_(model)
    first.close()
    assert first.read()["0"].observations == 1
    convert_(model, MemAOPConfig())
    second = monitor(model)
    first.close()  # must not stop the second
    train(model, batches(1))
    assert first.read()["0"].observations == second.read()["0"].observations == 1


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="no converted layer"):
        monitor(nn.Linear(2, 2))
    model = net()
    for wrong in ({"every": 0}, {"smoothing": 1.0}, {"smoothing": -0.1}, {"starving": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            monitor(model, **wrong)
    with monitor(model), pytest.raises(ValueError, match="'0' is watched already"):
        monitor(model)
    monitor(model).close()


def test_a_layer_that_starves_is_named_once_and_not_in_backward():
    model = net(ratio=1 / 16, selection="uniform", memory="none")
    with monitor(model, every=1, smoothing=0.75) as watch:
        train(model, batches(3))
        watch.read()  # three observations are not enough
        train(model, batches(3))
        with pytest.warns(StarvedLayerWarning) as caught:
            watch.read()
        assert [str(w.message)[:17] for w in caught] == ["layer '0' starves", "layer '2' starves"]
        assert "above starving=4" in str(caught[0].message)
        assert caught[0].filename == __file__
        watch.scalars()
        watch.table()


def test_what_counts_as_starving():
    layer = MemAOPLinear(N, P, config=MemAOPConfig(k=16, memory="none"))
    mask = (torch.arange(64) < 16)[:, None]
    with monitor(layer, every=1) as watch:
        for x in batches(3):
            (layer(x) * mask).sum().backward()
        seen = watch.read()[""]
    assert seen.nonzero_rows == pytest.approx(16)
    assert seen.relative_variance < 4
    noisy = {"sampling_variance": 100.0, "batch_variance": 10.0}
    for changes, words in (
        ({}, None),
        ({"nonzero_rows": 8.0}, "only 8 of 64 rows have a gradient, fewer than the 16"),
        (noisy | {"gradient_square": 50.0}, "sampling adds 10 times the variance"),
        # The noise is below the gradient: the rows agree, and the batch has next to no variance.
        (noisy | {"gradient_square": 500.0}, None),
    ):
        complaint = dataclasses.replace(seen, **changes).complaint(starving=4)
        assert complaint is None if words is None else words in complaint


def test_scalars_have_the_names_of_layers():
    model = net()
    with monitor(model, every=1) as watch:
        assert watch.scalars() == {}
        train(model, batches(2))
        scalars = watch.scalars("run")
    assert scalars["run/0/ratio"] == 0.25
    assert {name.split("/")[1] for name in scalars} == {"0", "2"}
    assert all(isinstance(value, float) for value in scalars.values())
    with monitor(model[0], every=1) as watch:
        train(model, batches(1))
        assert "memaop/captured" in watch.scalars()


def test_the_live_table_is_drawn_at_most_every_second(monkeypatch):
    now, reads = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    overrides = {"0": MemAOPConfig.paper(ratio=1 / 4), "2": MemAOPConfig(memory="none")}
    layers = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N), nn.Linear(N, P))
    model = convert_(layers, MemAOPConfig(ratio=1 / 4), overrides=overrides)
    console = Console(width=120, record=True, force_terminal=True)
    with monitor(model, every=1) as watch:
        read = watch.read
        monkeypatch.setattr(watch, "read", lambda: reads.append(now[0]) or read())
        with watch.live(console) as refresh:
            for _ in range(10):
                train(model, batches(1))
                now[0] += 0.3
                refresh()
    assert reads == pytest.approx([0.0, 1.2, 2.4, 3.0])
    text = console.export_text()
    for words in ("16 of 64", "biased", "× the batch", "outside"):
        assert words in text


@pytest.mark.parametrize("side", ["input", "grad"])
@pytest.mark.parametrize("ratio", [1 / 4, 1])
def test_a_stash_shows_the_figures_of_what_was_kept(side, ratio):
    found = {}
    for stash in ("exact", "int8"):
        torch.manual_seed(0)
        model = net(torch.float64, ratio=ratio, side=side, stash=stash)
        model[0].set_ratio_(1 / 4)
        train(model, batches(2, dtype=torch.float64), lr=0)  # makes the bases
        model[0].set_ratio_(ratio)
        with monitor(model, every=1) as watch:
            train(model, batches(200, dtype=torch.float64), lr=0)
            found[stash] = watch.read()["0"]
    # The variance is that beside a basis, which both have drawn for themselves.
    allowed = {"batch_variance": 0.3, "score_sum": 0.3, "gradient_square": 0.3}
    for name, rel in (allowed | {"sampling_variance": 0.6}).items():
        ours, exact = getattr(found["int8"], name), getattr(found["exact"], name)
        assert ours == pytest.approx(exact, rel=rel), name
    assert all(0 < figures.outside_subspace < 1 for figures in found.values())
