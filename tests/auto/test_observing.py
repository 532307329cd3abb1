"""What one observed step says of a layer, against its definition."""

import pytest
import torch

from memaop_triton import MemAOPConfig, MemAOPLinear, Subspace
from memaop_triton.auto.observing import StepObserver
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.sampling.selection import inclusion_probabilities

M, N, P = 320, 24, 40


def batch(seed=0):
    torch.manual_seed(seed)
    x = torch.randn(M, N) * torch.rand(M, 1)
    return x, (x[:, :1] + torch.randn(M, P)) * torch.rand(M, 1)


def seen_by(config, *batches):
    layer = MemAOPLinear(N, P, config=config)
    observer = layer.layer_state.observer = StepObserver(layer.layer_state)
    for x, g in batches:
        layer(x).backward(g)
    return observer.read(), layer


@pytest.mark.parametrize("ratio", [1.0, 1 / 4])
def test_variance_without_a_memory(ratio):
    x, g = batch()
    seen, _ = seen_by(MemAOPConfig(ratio=ratio, memory="none"), (x, g))
    scores = x.norm(dim=1) * g.norm(dim=1)
    for share in (1 / 2, 1 / 4, 1 / 8):
        p = inclusion_probabilities(scores, round(share * M))
        exact = (scores.square() * (1 / p - 1)).sum().item()
        assert exact <= seen.variance_of(share) * (1 + 1e-3)
        assert seen.variance_of(share) < exact + 0.02 * scores.square().sum()
    assert seen.variance_of(1.0) == 0


@pytest.mark.parametrize("memory", ["none", "subspace"])
def test_some_rows_of_a_large_batch_stand_for_all(memory):
    torch.manual_seed(0)
    x, g = torch.randn(8192, N), torch.randn(8192, P)
    config = MemAOPConfig(ratio=1.0, memory=memory)
    seen, _ = seen_by(config, (x, g))
    scores = x.norm(dim=1) * g.norm(dim=1)
    p = inclusion_probabilities(scores, 2048)
    exact = (scores.square() * (1 / p - 1)).sum().item()
    assert (0.5 if memory == "subspace" else 0.95) < seen.variance_of(1 / 4) / exact < 1.05


def test_square_of_the_gradient_is_that_of_dense_on_average():
    x, g = batch()
    dense = (g.T @ x).square().sum().item()
    exact, _ = seen_by(MemAOPConfig(ratio=1.0, memory="none"), (x, g))
    assert exact.square == pytest.approx(dense, rel=1e-4)
    config = MemAOPConfig(ratio=1 / 4, memory="none")
    found = [seen_by(config, (x, g))[0].square for _ in range(400)]
    assert sum(found) / len(found) == pytest.approx(dense, rel=0.05)


def test_passes_of_a_step_add_up():
    first, second = batch(0), batch(1)
    seen, _ = seen_by(MemAOPConfig(ratio=1.0, memory="none"), first, second)
    ones = [seen_by(MemAOPConfig(ratio=1.0, memory="none"), one)[0] for one in (first, second)]
    assert len(seen.uses) == 2
    assert seen.variance_of(1 / 4) == pytest.approx(sum(one.variance_of(1 / 4) for one in ones))
    dense = sum(g.T @ x for x, g in (first, second)).square().sum().item()
    assert seen.square == pytest.approx(dense, rel=1e-4)


def test_beside_a_subspace_only_the_rest_is_noisy():
    torch.manual_seed(0)
    x = torch.randn(M, 3) @ torch.randn(3, N) + 0.05 * torch.randn(M, N)
    g = torch.randn(M, P)
    with_one = MemAOPConfig(ratio=1.0, memory=Subspace(rank=4))
    seen, layer = seen_by(with_one, (x, g), (x, g))
    without, _ = seen_by(MemAOPConfig(ratio=1.0, memory="none"), (x, g))
    assert len(seen.curves[0]) == 2, "of either side"
    assert seen.variance_of(1 / 4) < 0.02 * without.variance_of(1 / 4)
    # What a sampled step of this layer then has.
    config = layer.config.spending(ratio=1 / 4)
    layer.memory.set_refresh_interval(10**6)
    errors = [weight_grad(x, g, config, layer.memory) - g.T @ x for _ in range(200)]
    mean = torch.stack(errors).square().sum((1, 2)).mean().item()
    assert seen.variance_of(1 / 4) / 2 == pytest.approx(mean, rel=0.3)


def test_a_layer_without_a_gradient_and_one_that_is_not_finite():
    layer = MemAOPLinear(N, P, config=MemAOPConfig(ratio=1.0, memory="none"))
    assert StepObserver(layer.layer_state).read() is None
    x, g = batch()
    assert seen_by(layer.config, (x, g))[0].is_finite
    g[3, 4] = torch.nan
    assert not seen_by(layer.config, (x, g))[0].is_finite
