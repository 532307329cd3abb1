import copy

import pytest
import torch

from memaop_triton import MemAOPConfig, Subspace, memaop_linear, new_memory
from memaop_triton.backward.weight_grad import weight_grad
from tests.pairwise import pairwise
from tests.schemes import UNBIASED, flat_config

ROWS, INPUTS, OUTPUTS = 40, 16, 5


@pytest.fixture
def batch():
    """Inputs with some large rows and a leading direction, as a layer sees them."""
    scale = torch.linspace(0.2, 2, ROWS, dtype=torch.float64).unsqueeze(1)
    x = scale * (torch.randn(ROWS, INPUTS, dtype=torch.float64) + 0.5)
    return x, scale.flip(0) * torch.randn(ROWS, OUTPUTS, dtype=torch.float64)


def warmed_up(config, steps, x, g):
    """A memory whose basis is from other batches and was refreshed `steps - 1` times."""
    memory = new_memory(config, INPUTS, OUTPUTS)
    for _ in range(steps):
        weight_grad(x + torch.randn_like(x), g, config, memory)
    return memory


# Steps before: the first step has the first basis, the fifth one that was refreshed.
@pytest.mark.parametrize(
    ("unbiased", "memory", "block_rows"),
    pairwise(UNBIASED, [("none", 0), *(("subspace", steps) for steps in (0, 1, 4))], [1, 16]),
)
def test_mean_weight_grad_is_dense(unbiased, block_rows, memory, batch, mean_agrees):
    kind, steps = memory
    config = flat_config(
        k=10, memory=kind, rank=4, refresh_every=2, block_rows=block_rows, **unbiased
    )
    x, g = batch
    kept = warmed_up(config, steps, x, g)
    draws = [weight_grad(x, g, config, copy.deepcopy(kept)) for _ in range(400)]
    mean_agrees(draws, g.T @ x)


@pytest.mark.parametrize(
    ("unbiased", "memory", "block_rows"), pairwise(UNBIASED, ["none", "subspace"], [1, 16])
)
def test_mean_of_both_gradients_is_dense_with_sampled_input_gradient(
    unbiased, memory, block_rows, batch, mean_agrees
):
    config = flat_config(
        k=10, rank=4, memory=memory, block_rows=block_rows, grad_input="sampled", **unbiased
    )
    x, g = (t.requires_grad_(not i) for i, t in enumerate(batch))
    w = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64, requires_grad=True)
    kept = warmed_up(config, 3, x.detach(), g)
    dx, dw = [], []
    for _ in range(400):
        y = memaop_linear(x, w, None, config, copy.deepcopy(kept))
        for collected, grad in zip((dx, dw), torch.autograd.grad(y, (x, w), g), strict=True):
            collected.append(grad)
    mean_agrees(dw, g.T @ x.detach())
    mean_agrees(dx, g @ w.detach())
    assert torch.stack(dx).std(0).max() > 0


def test_float32_default_configuration_is_unbiased_over_training_steps(mean_agrees):
    config = MemAOPConfig(ratio=1 / 8, memory=Subspace(refresh_every=3))
    memory = new_memory(config, INPUTS, OUTPUTS)
    errors = []
    for _ in range(600):
        x, g = torch.randn(ROWS, INPUTS), torch.randn(ROWS, OUTPUTS)
        errors.append(weight_grad(x, g, config, memory) - g.T @ x)
    mean_agrees(errors, torch.zeros(OUTPUTS, INPUTS))


@pytest.mark.parametrize("selection", ["topk", "weightedk", "randk"])
def test_the_statistic_sees_biased_policies(selection, batch, mean_agrees):
    config = MemAOPConfig(k=10, selection=selection, memory="none")
    x, g = batch
    draws = [weight_grad(x, g, config) + 1e-9 * torch.randn(OUTPUTS, INPUTS) for _ in range(400)]
    with pytest.raises(AssertionError):
        mean_agrees(draws, g.T @ x)


@pytest.mark.parametrize(
    ("unbiased", "budget", "memory", "grad_input"),
    pairwise(
        UNBIASED,
        [{"k": ROWS}, {"k": 10 * ROWS}, {"ratio": 1.0}],
        ["none", "subspace"],
        ["exact", "sampled"],
    ),
)
def test_all_rows_are_exact(unbiased, memory, budget, grad_input, batch):
    config = MemAOPConfig(memory=memory, grad_input=grad_input, **budget, **unbiased)
    x, g = batch
    x.requires_grad_()
    w = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64, requires_grad=True)
    y = memaop_linear(x, w, None, config, new_memory(config, INPUTS, OUTPUTS))
    dx, dw = torch.autograd.grad(y, (x, w), g)
    torch.testing.assert_close(dw, g.T @ x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dx, g @ w, rtol=1e-13, atol=1e-13)
