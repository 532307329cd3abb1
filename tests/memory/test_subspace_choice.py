"""Which side's subspace a memory uses, and how many dimensions of it."""

import copy

import pytest
import torch

from memaop_triton import MemAOPConfig, MemAOPLinear, Subspace, SubspaceMemory, new_memory
from memaop_triton.backward.input_grad import input_grad_with_subspace
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.memory.choice import score_curves
from memaop_triton.sampling.selection import inclusion_probabilities
from tests.schemes import flat_config

M, N, P = 512, 64, 96


def low_rank(rows, columns, rank=2, noise=0.05):
    return torch.randn(rows, rank) @ torch.randn(rank, columns) + noise * torch.randn(rows, columns)


def made(**settings):
    config = flat_config(**settings)
    return config, new_memory(config, N, P)


def batch(side):
    """Rows of which those of one side lie in a plane."""
    torch.manual_seed(1)
    if side == "input":
        return low_rank(M, N), torch.randn(M, P)
    return torch.randn(M, N), low_rank(M, P)


@pytest.mark.parametrize("side", ["input", "grad"])
def test_the_side_that_leaves_less_is_taken(side):
    config, memory = made(k=64, rank=4)
    x, g = batch(side)
    dw = weight_grad(x, g, config, memory)
    assert memory.side == side
    exact = g.T @ x
    theirs = weight_grad(x, g, *made(k=64, rank=4, side="grad" if side == "input" else "input"))
    assert (dw - exact).norm() < 0.3 * (theirs - exact).norm()


def test_the_side_follows_the_data_at_every_fourth_refresh():
    config, memory = made(k=64, rank=4, refresh_every=2)
    weight_grad(*batch("input"), config, memory)
    sides = []
    for _ in range(9):
        weight_grad(*batch("grad"), config, memory)
        sides.append(memory.side)
    # Steps 1 to 9; the choice is made at the beginning of step 8.
    assert sides == ["input"] * 7 + ["grad"] * 2


def test_a_side_that_is_hardly_better_is_not_taken():
    config = MemAOPConfig(k=64, memory=Subspace(rank=4, refresh_every=1))
    memory, sides = new_memory(config, N, N), set()
    for _ in range(13):
        a = torch.randn(M, N)
        weight_grad(a, a * 1.01, config, memory)
        sides.add(memory.side)
    assert len(sides) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_of_a_batch_that_is_not_finite_nothing_is_measured(bad):
    config, memory = made(k=64, rank=4, refresh_every=1)
    x, g = batch("grad")
    x[3, 5] = bad
    weight_grad(x, g, config, memory)
    assert memory.choice.measured is None
    weight_grad(*batch("input"), config, memory)
    for _ in range(8):
        weight_grad(x, g, config, memory)
    assert memory.side == "input"
    assert all(basis.q.isfinite().all() for basis in memory.bases.values())


def test_an_open_rank_is_none_where_rows_are_better(selections):
    config, memory = made(budget=1 / 4)
    for step in (1, 2):
        weight_grad(torch.randn(M, N), torch.randn(M, P), config, memory)
        assert memory.rank == memory.basis.shape[1] == 0
        assert memory.step == step
    # The first step has the rows of the rank that it chose.
    counts = [selection.indices.numel() for selection in selections]
    assert counts == [config.num_rows(M, N, P, memory.cost)] * 2


def test_an_open_rank_grows_when_the_data_allow_it_and_is_loaded_again():
    config, memory = made(budget=1 / 2, refresh_every=3)
    weight_grad(torch.randn(M, N), torch.randn(M, P), config, memory)
    assert memory.rank == 0
    for _ in range(24):
        dw = weight_grad(*batch("grad"), config, memory)
    assert (memory.side, memory.rank > 0) == ("grad", True)
    x, g = batch("grad")
    assert (dw - g.T @ x).norm() < 0.2 * (g.T @ x).norm()
    other = made(budget=1 / 2, refresh_every=3)[1]
    other.load_state_dict(memory.state_dict())
    assert (other.side, other.rank, other.step) == (memory.side, memory.rank, memory.step)
    torch.manual_seed(1)
    ours = weight_grad(x, g, config, memory)
    torch.manual_seed(1)
    assert torch.equal(weight_grad(x, g, config, other), ours)


def test_the_choice_has_the_least_variance_of_all():
    """Against draws, with the spectrum such that neither end of the ranks is best."""
    torch.manual_seed(0)
    x = torch.randn(M, N) * torch.where(torch.arange(N) < 4, 3, 0.3)
    g = torch.randn(M, P)
    config, memory = made(budget=1 / 2, refresh_every=5)
    for _ in range(41):
        weight_grad(x, g, config, memory)
    exact = g.T @ x

    def variance(side, rank):
        kept = copy.deepcopy(memory)
        kept.choice.side, kept.choice.rank = side, rank
        kept.set_refresh_interval(10**6)  # far from the next choice
        errors = [weight_grad(x, g, config, kept) - exact for _ in range(60)]
        return torch.stack(errors).square().sum((1, 2)).mean()

    chosen = variance(memory.side, memory.rank)
    assert (memory.side, memory.rank, memory.choice.max_rank) == ("input", 4, 8)
    for other in [("input", 0), ("input", 8), ("grad", 4), ("grad", 8)]:
        assert chosen < 1.05 * variance(*other), other


def test_curves_stand_for_all_rows_where_some_are_read():
    torch.manual_seed(0)
    x, g = torch.randn(8192, N), torch.randn(8192, P)
    memory = SubspaceMemory(N, P, rank=4)
    memory.begin_step(x, g, MemAOPConfig())
    rows, curves, scale = memory.choice.measured
    curves = torch.tensor(curves)
    curves[:, 1] *= scale
    whole = score_curves(memory.bases, [4], x, g)
    assert rows == 8192
    # The last variances are those of a few rows of small scores.
    torch.testing.assert_close(curves[..., :8], whole[..., :8], rtol=0.1, atol=0)


@pytest.mark.parametrize("settings", [{"ratio": 1 / 4, "rank": 6}, {"budget": 1 / 2}])
def test_variances_are_those_of_the_scores_that_a_choice_leaves(settings):
    torch.manual_seed(0)
    x, g = low_rank(M, N), torch.randn(M, P) * torch.rand(M, 1) ** 3
    config, memory = made(**settings)
    memory.begin_step(x, g, config)
    found = memory.choice.variances(lambda choice: 100 + choice.rank)
    assert len(found) == 2 * len(memory.choice.ranks)
    for (side, rank), variance in found.items():
        a, other = (x, g) if side == "input" else (g, x)
        q = memory.bases[side].q[:, :rank]
        scores = (a - a @ q @ q.T).norm(dim=1) * other.norm(dim=1)
        p = inclusion_probabilities(scores, 100 + rank)
        exact = (scores.square() * (1 / p - 1)).sum().item()
        assert exact < variance < 1.06 * exact + 1e-3 * scores.square().sum().item()


@pytest.mark.parametrize(("rows", "most"), [(64, 4), (128, 8), (2048, 16)])
def test_the_rank_fits_the_first_batch(rows, most):
    """More rows make a dimension cheaper: it is one more outer product."""
    config = MemAOPConfig(budget=1 / 4)
    memory = new_memory(config, 256, 256)
    weight_grad(torch.randn(rows, 256), torch.randn(rows, 256), config, memory)
    assert memory.choice.max_rank == most


@pytest.mark.parametrize("settings", [{"side": "grad"}, {"side": "auto"}, {"rank": 8}, {"rank": 2}])
def test_a_state_of_another_side_or_rank_is_refused(settings):
    ours = {"rank": 4, "side": "input"}
    ((name, value),) = settings.items()
    config, other = made(**ours | settings)
    for _ in range(2):  # before and after a step
        with pytest.raises(ValueError, match=f"{name}={value!r} in the state, {ours[name]!r} in"):
            made(**ours)[1].load_state_dict(other.state_dict())
        weight_grad(*batch("grad"), config, other)


def test_where_the_numbers_arrive_later_the_choice_is_taken_at_the_next_refresh(monkeypatch):
    config, memory = made(k=64, rank=4, refresh_every=2)
    monkeypatch.setattr(SubspaceMemory, "_arrives_at_once", staticmethod(lambda device: False))
    sides, other = [], None
    for step in range(12):
        weight_grad(*batch("input" if step == 1 else "grad"), config, memory)
        sides.append(memory.side)
        if step == 8:
            assert memory.state_dict()["arriving_rows"] == M
            other = new_memory(config, N, P)
            other.load_state_dict(memory.state_dict())
            twin = copy.deepcopy(memory)
    # Looked at in steps 0 and 8, taken in steps 2 and 10.
    assert sides == ["input"] * 2 + ["grad"] * 10
    for loaded in (other, twin):
        assert loaded.choice.arriving is not None
        for _ in range(2):
            weight_grad(*batch("grad"), config, loaded)
        assert loaded.choice.arriving is None
        assert loaded.side == "grad"


@pytest.mark.parametrize("rank", [2, 8])
def test_a_sampled_input_gradient_has_the_noise_of_what_the_subspace_leaves(rank):
    """Rows of G in a plane, and noise: only that is sampled."""
    torch.manual_seed(2)
    g, w = low_rank(M, P), torch.randn(P, N)
    config, memory = made(k=64, rank=rank, grad_input="sampled")
    error = input_grad_with_subspace(g, w, config, memory) - g @ w
    inside = g @ memory.bases["grad"].q @ memory.bases["grad"].q.T
    scores = (g - inside).norm(dim=1)
    expected = (scores.sum().square() / 64 - scores.square().sum()) * w.square().sum() / P
    assert error.square().sum() == pytest.approx(float(expected), rel=0.3)
    assert error.norm() < 0.1 * (g @ w).norm()


@pytest.mark.parametrize("weight_is_frozen", [False, True])
def test_the_basis_of_a_sampled_input_gradient_follows_the_rows(weight_is_frozen):
    config = MemAOPConfig(k=64, memory=Subspace(rank=4, refresh_every=2), grad_input="sampled")
    layer = MemAOPLinear(N, P, config=config)
    layer.weight.requires_grad_(not weight_is_frozen)
    plane = torch.linalg.qr(torch.randn(P, 2)).Q
    for step in range(8):  # the next choice, at step 8, would bring both bases up to date
        # X lies in a plane, so that dW is on the inputs' side and refreshes no basis of G's.
        x = (low_rank(M, N, noise=0.0) + 1e-4 * torch.randn(M, N)).requires_grad_()
        g = torch.randn(M, P)
        if step > 1:
            g = torch.randn(M, 2) @ plane.T + 0.01 * torch.randn(M, P)
        layer(x).backward(g)
    assert layer.memory.side == "input"
    q = layer.memory.bases["grad"].q
    assert (plane.T @ q).norm() > 0.99 * 2**0.5
    error = x.grad - g @ layer.weight
    assert error.norm() < 0.2 * x.grad.norm()


def test_an_open_rank_of_a_sampled_input_gradient_is_its_own():
    config = MemAOPConfig(budget=1 / 2, memory=Subspace(refresh_every=3), grad_input="sampled")
    for side, has_rank in (("grad", True), ("input", False)):
        layer = MemAOPLinear(N, P, config=config)
        x, g = batch(side)
        layer(x.requires_grad_()).backward(g)
        assert (layer.memory.side, layer.memory.rank > 0) == (side, True)
        assert (layer.memory.choice.input_grad_rank > 0) == has_rank
        # Without a subspace of G: the rows drawn, and zeros.
        assert ((x.grad.norm(dim=1) > 0).sum() > M / 2) == has_rank


def test_a_memory_without_a_basis_of_the_gradients_samples_all_of_dx():
    config = MemAOPConfig(k=64, memory=Subspace(rank=4, side="input"), grad_input="sampled")
    layer = MemAOPLinear(N, P, config=config)
    x = torch.randn(M, N, requires_grad=True)
    layer(x).backward(torch.randn(M, P))
    assert (x.grad.norm(dim=1) > 0).sum() == 64


@pytest.mark.parametrize("budget", [None, 1 / 2])
def test_a_frozen_layer_saves_the_one_basis_it_has(budget):
    config = MemAOPConfig(budget=budget, memory=Subspace(refresh_every=2), grad_input="sampled")
    layers = [MemAOPLinear(N, P, config=config) for _ in range(2)]
    for layer in layers:
        layer.weight.requires_grad_(False)
    for rows in (M, M // 2, M):
        x = torch.randn(rows, N, requires_grad=True)
        layers[0](x).backward(low_rank(rows, P))
    state = layers[0].memory.state_dict()
    assert "grad" in state
    assert "input" not in state
    assert layers[0].memory.step == 3
    layers[1].memory.load_state_dict(state)
    layers[1].weight.requires_grad_(True)
    x = torch.randn(M, N, requires_grad=True)
    layers[1](x).backward(low_rank(M, P))
    assert layers[1].memory.state_dict().keys() >= {"input", "grad"}
    assert layers[1].weight.grad.isfinite().all()


def test_a_ratio_instead_of_a_budget_keeps_the_rank_in_use():
    """And the memory goes into a checkpoint that a layer of the same configuration loads."""
    torch.manual_seed(0)
    layer = MemAOPLinear(256, 256, config=MemAOPConfig(budget=1 / 2))
    plane = torch.randn(6, 256)

    def step():
        layer(torch.randn(512, 6) @ plane + 0.1 * torch.randn(512, 256)).square().sum().backward()

    step()
    rank = layer.memory.rank
    assert 0 < rank < layer.memory.choice.max_rank
    layer.set_ratio_(1 / 4)
    step()
    assert layer.config.memory.rank == layer.memory.rank == layer.memory.choice.max_rank == rank
    twin = MemAOPLinear(256, 256, config=layer.config)
    twin.memory.load_state_dict(layer.memory.state_dict())
    assert twin.memory.rank == rank
    for _ in range(40):
        step()
    assert layer.memory.rank == rank
