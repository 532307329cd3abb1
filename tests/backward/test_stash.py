"""Weight gradients from inputs that were kept in a few bits: their mean, and what rounding adds."""

import copy
import math

import pytest
import torch

from memaop_triton import MemAOPConfig, Subspace, memaop_linear, new_memory
from memaop_triton.backward.weight_grad import weight_grad
from tests.pairwise import pairwise
from tests.schemes import UNBIASED

ROWS, INPUTS, OUTPUTS = 40, 24, 9
STASHES = ("int4", "int8")
#: Memories by what they are and the steps before: in the first one there is no basis yet.
MEMORIES = {
    "none": (None, 0),
    "first-step": (Subspace(4, "auto", 2), 0),
    "input": (Subspace(4, "input", 2), 3),
    "grad": (Subspace(2, "grad", 2), 3),
    "auto": (Subspace(2, "auto", 1), 2),
}


@pytest.fixture
def batch():
    """Inputs with some large rows and a leading direction, as a layer sees them."""
    scale = torch.linspace(0.2, 2, ROWS, dtype=torch.float64).unsqueeze(1)
    x = scale * (torch.randn(ROWS, INPUTS, dtype=torch.float64) + 0.5)
    return x, scale.flip(0) * torch.randn(ROWS, OUTPUTS, dtype=torch.float64)


def memory_of(config, steps, x, g):
    """A memory after some steps with other batches."""
    memory = new_memory(config, INPUTS, OUTPUTS)
    for _ in range(steps):
        gradients(config, memory, x + torch.randn_like(x), g)
    return memory


def gradients(config, memory, x, g, bias=None, uses=1):
    """dW by the whole path: a forward pass, after which X is gone, and a backward pass."""
    w = torch.zeros(OUTPUTS, INPUTS, dtype=x.dtype, requires_grad=True)
    outputs = []
    for _ in range(uses):
        rows = x.clone()
        outputs.append(memaop_linear(rows, w, bias, config, memory))
        if config.stash != "exact":
            rows.fill_(torch.nan)
    torch.autograd.backward(outputs, [g] * uses)
    return w.grad


@pytest.mark.parametrize(
    ("stash", "unbiased", "memory", "block_rows"), pairwise(STASHES, UNBIASED, MEMORIES, [1, 16])
)
def test_the_mean_is_dense(stash, unbiased, memory, block_rows, batch, mean_agrees):
    kind, steps = MEMORIES[memory]
    config = MemAOPConfig(k=10, memory=kind, block_rows=block_rows, stash=stash, **unbiased)
    x, g = batch
    kept = memory_of(config, steps, x, g)
    draws = [gradients(config, copy.deepcopy(kept), x, g) for _ in range(200)]
    mean_agrees(draws, g.T @ x)


@pytest.mark.parametrize("stash", STASHES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_mean_is_dense_where_two_forward_passes_come_before_a_backward_pass(
    stash, memory, batch, mean_agrees
):
    """Between the two backward passes the basis is refreshed, and the side may change."""
    kind, steps = MEMORIES[memory]
    config = MemAOPConfig(k=10, memory=kind, stash=stash)
    x, g = batch
    kept = memory_of(config, steps, x, g)
    draws = [gradients(config, copy.deepcopy(kept), x, g, uses=2) for _ in range(200)]
    mean_agrees(draws, 2 * g.T @ x)


@pytest.mark.parametrize("stash", STASHES)
@pytest.mark.parametrize("scores", ["columns", "grad"])
def test_the_mean_is_dense_with_cheap_scores(stash, scores, batch, mean_agrees):
    config = MemAOPConfig(k=10, memory=None, stash=stash, scores=scores)
    x, g = batch
    mean_agrees([gradients(config, None, x, g) for _ in range(200)], g.T @ x)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("stash", STASHES)
def test_with_all_rows_only_the_rounding_is_left(stash, memory, batch, mean_agrees):
    kind, steps = MEMORIES[memory]
    sampling = MemAOPConfig(k=10, memory=kind, stash=stash)
    config = MemAOPConfig(ratio=1, memory=kind, stash=stash)
    x, g = batch
    kept = memory_of(sampling, steps, x, g)
    draws = [gradients(config, kept, x, g) for _ in range(200)]
    exact = g.T @ x
    mean_agrees(draws, exact)
    rounding = torch.stack([(dw - exact).square().sum() for dw in draws]).mean()
    rows = (x.square().sum(1) * g.square().sum(1)).sum()
    assert 0 < rounding < rows * {"int4": 0.04, "int8": 2e-4}[stash]


@pytest.mark.parametrize(("stash", "most"), [("int4", 0.15), ("int8", 0.01)])
@pytest.mark.parametrize("memory", ["none", "input", "grad"])
def test_rounding_adds_little_to_the_noise_of_sampling(stash, most, memory, batch):
    """The steps of both draw the same rows where scores agree, so few draws are enough."""
    kind, steps = MEMORIES[memory]
    x, g = batch
    exact = g.T @ x
    noise = {}
    for name in ("exact", stash):
        config = MemAOPConfig(k=10, memory=kind, stash=name)
        torch.manual_seed(3)
        kept = memory_of(MemAOPConfig(k=10, memory=kind), steps, x, g)
        draws = [gradients(config, copy.deepcopy(kept), x, g) for _ in range(600)]
        noise[name] = torch.stack([(dw - exact).square().sum() for dw in draws])
    means = {name: errors.mean().item() for name, errors in noise.items()}
    bars = [errors.std().item() / math.sqrt(len(errors)) for errors in noise.values()]
    assert means[stash] <= means["exact"] * (1 + most) + 4 * math.hypot(*bars)


@pytest.mark.parametrize("stash", STASHES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_dtypes_and_bias(stash, memory, batch):
    kind, steps = MEMORIES[memory]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, g = (a.to(dtype) for a in batch)
        config = MemAOPConfig(ratio=1 / 2, memory=kind, stash=stash)
        kept = memory_of(config, steps, x, g)
        bias = torch.zeros(OUTPUTS, dtype=dtype, requires_grad=True)
        draws = [gradients(config, kept, x, g, bias) for _ in range(16)]
        exact = g.float().T @ x.float()
        assert all(dw.dtype == dtype for dw in draws)
        mean = torch.stack(draws).float().mean(0)
        assert (mean - exact).norm() < 0.5 * exact.norm()
        expected = 16 * g.float().sum(0)
        torch.testing.assert_close(bias.grad.float(), expected, rtol=0.03, atol=1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("where", ["x", "g"])
@pytest.mark.parametrize("ratio", [1 / 4, 1])
def test_a_row_that_is_not_finite_reaches_the_gradient(value, memory, where, ratio, batch):
    kind, steps = MEMORIES[memory]
    config = MemAOPConfig(ratio=ratio, memory=kind, stash="int4")
    x, g = (a.float() for a in batch)
    kept = memory_of(config, steps, x, g)
    (x if where == "x" else g)[5, 3] = value
    assert not gradients(config, kept, x, g).isfinite().all()
    x, g = (a.float() for a in batch)  # and is gone a step later
    assert gradients(config, kept, x, g).isfinite().all()


@pytest.mark.parametrize("memory", MEMORIES)
def test_rows_of_zeros_are_exact_where_others_are_few(memory, batch):
    kind, steps = MEMORIES[memory]
    config = MemAOPConfig(k=10, memory=kind, stash="int8")
    x, g = batch
    kept = memory_of(config, steps, x, g)
    g[8:] = 0
    x[20:] = 0
    exact = g.T @ x
    assert (gradients(config, kept, x, g) - exact).norm() < 0.02 * exact.norm()


def test_a_stash_of_two_rows_of_numbers_is_that_of_their_tensors(batch):
    """What is kept is a function of X alone: the same seed gives the same gradient."""
    x, g = batch
    config = MemAOPConfig(k=10, memory=None, stash="int4")
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        results.append(gradients(config, None, x, g))
    assert torch.equal(*results)


def test_the_plain_function_takes_tensors_only_and_ignores_the_setting(batch):
    x, g = batch
    with_stash = MemAOPConfig(ratio=1, memory=None, stash="int4")
    assert torch.equal(weight_grad(x, g, with_stash), g.T @ x)


@pytest.mark.parametrize("stash", STASHES)
@pytest.mark.parametrize("side", ["input", "grad"])
def test_the_memory_follows_the_rows_and_chooses_the_side_that_leaves_less(stash, side):
    """Rows of one matrix lie near a plane that turns; those of the other lie anywhere."""
    config = MemAOPConfig(k=20, memory=Subspace(2, "auto", 2), stash=stash)
    memory = new_memory(config, INPUTS, OUTPUTS)
    lengths = {"input": (INPUTS, OUTPUTS), "grad": (OUTPUTS, INPUTS)}[side]
    for step in range(12):
        turn = torch.eye(2, lengths[0], dtype=torch.float64).roll(2 * (step // 4), 1)
        flat = torch.randn(400, 2, dtype=torch.float64) @ turn
        flat += 0.02 * torch.randn_like(flat)
        other = torch.randn(400, lengths[1], dtype=torch.float64)
        x, g = (flat, other) if side == "input" else (other, flat)
        gradients(config, memory, x, g)
        assert memory.side == side
        assert memory.step == step + 1
        if step % 4 == 3:  # two refreshes after the last turn
            basis = memory.basis
            assert (flat - flat @ basis @ basis.T).norm() < 0.1 * flat.norm()
