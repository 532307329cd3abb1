"""dX = G (W Q) Qᵀ: every row's part in a subspace, nothing drawn; what it costs."""

import copy
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memaop_triton import MemAOPConfig, MemAOPLinear, Projected, Subspace, new_memory
from memaop_triton.backward.input_grad import flops_of_input_grad, projected_input_grad
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.flops import projected_input_grad_flops, projection_rank_within
from tests.schemes import flat_config

M, N, P = 512, 64, 96
DENSE = 2 * M * N * P


def low_rank(rank, noise=0.0):
    rows = torch.randn(M, rank) @ torch.randn(rank, P)
    return rows + noise * torch.randn(M, P)


def layer_of(dtype=torch.float32, **settings):
    config = flat_config(**{"grad_input": "projected"} | settings)
    return MemAOPLinear(N, P, config=config, dtype=dtype)


def input_grad(layer, g):
    x = torch.randn(len(g), N, dtype=g.dtype, requires_grad=True)
    layer(x).backward(g)
    return x.grad


def error_in_a_plane(layer, steps, plane):
    """Of the last of so many gradients whose rows lie in a space of three dimensions, relative."""
    for _ in range(steps):
        g = torch.randn(M, 3) @ plane
        dx = input_grad(layer, g).double()
    return (dx - g.double() @ layer.weight.double()).norm() / dx.norm()


def inside(layer, g):
    """What the layer's subspace has of the exact gradient."""
    q = layer.memory.projection.basis.to(g.dtype)
    return g @ layer.weight @ q @ q.T


@pytest.mark.parametrize("settings", [{"rank": 4}, {"budget": 1 / 4}, {"grad_input_budget": 0.2}])
@pytest.mark.parametrize("frozen", [False, True])
def test_it_is_the_gradient_of_the_rows_in_the_subspace(settings, frozen):
    layer, g = layer_of(refresh_every=99, **settings), low_rank(2, noise=0.5)
    layer.weight.requires_grad_(not frozen)
    for _ in range(3):
        dx = input_grad(layer, g)
        torch.testing.assert_close(dx, inside(layer, g), rtol=1e-4, atol=1e-4)
    assert (dx - g @ layer.weight).norm() > 0.05 * dx.norm()
    assert (layer.memory.basis is None) == frozen


def test_it_keeps_most_of_dx_not_of_g():
    """Where W takes most of G's energy away, that does not matter."""
    layer = layer_of(rank=4, refresh_every=1)
    kept, hidden = torch.randn(3, P), torch.randn(40, P)
    with torch.no_grad():
        out = torch.linalg.qr(hidden.T).Q
        layer.weight -= out @ (out.T @ layer.weight)
    for _ in range(4):
        g = torch.randn(M, 3) @ kept + 100 * torch.randn(M, 40) @ hidden
        dx = input_grad(layer, g)
    assert (dx - g @ layer.weight).norm() < 0.02 * dx.norm()


@pytest.mark.parametrize(
    ("first", "refresh_every"), [("noise", 2), (0.0, 99), (float("inf"), 99), (float("nan"), 99)]
)
@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e20])
def test_rows_of_any_size_are_found_whatever_the_first_batch_was(first, refresh_every, scale):
    """Also where columns of the weight are zero; a batch of zeros changes nothing then."""
    layer, plane = layer_of(rank=4, refresh_every=refresh_every), scale * torch.randn(3, P)
    with torch.no_grad():
        layer.weight[:, :8] = 0
    g = torch.randn(M, P)
    if first != "noise":
        g = torch.zeros(M, P)
        g[5] = first
    input_grad(layer, g)
    assert error_in_a_plane(layer, 8, plane) < 1e-3
    for _ in range(2):
        input_grad(layer, torch.zeros(M, P))
    assert error_in_a_plane(layer, 1, plane) < 1e-3


def test_a_refresh_comes_every_so_many_steps():
    layer, seen = layer_of(rank=4, refresh_every=3), []
    for _ in range(7):
        input_grad(layer, torch.randn(M, P))
        seen.append(layer.memory.projection.basis.clone())
    same = [torch.equal(one, other) for one, other in itertools.pairwise(seen)]
    assert same == [True, False, True, True, False, True]


@pytest.mark.parametrize("ratio", [1 / 8, 1.0])  # all rows: both are exact
def test_the_weight_gradient_is_what_it_is_without(ratio):
    """Also by the function that has no weight to multiply with."""
    x, g = torch.randn(M, N, requires_grad=True), torch.randn(M, P)
    gradients = []
    for grad_input in ("exact", "projected"):
        config = MemAOPConfig(ratio=ratio, grad_input=grad_input)
        layer = MemAOPLinear(N, P, config=config)
        torch.manual_seed(0)
        layer(x).backward(g)
        torch.manual_seed(0)
        memory = new_memory(config, N, P)
        gradients += [layer.weight.grad, weight_grad(x.detach(), g, config, memory)]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_few_dimensions_lose_nothing(dtype):
    layer, g = layer_of(dtype, rank=4), low_rank(3).to(dtype)
    dx, exact = input_grad(layer, g), g @ layer.weight
    assert dx.dtype == dtype
    assert layer.memory.projection.basis.dtype == torch.promote_types(dtype, torch.float32)
    assert (dx - exact).norm() < (0.02 if dtype == torch.bfloat16 else 1e-5) * exact.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_shows_and_stays_alone(bad):
    layer = layer_of(rank=4, refresh_every=1)
    g = torch.randn(M, P)
    g[3, 5] = bad
    dx = input_grad(layer, g)
    assert not dx[3].isfinite().any()
    assert dx[torch.arange(M) != 3].isfinite().all()
    assert layer.memory.projection.basis.isfinite().all()


def test_batches_of_all_sizes_share_a_basis():
    """A small batch takes the leading columns, a larger one makes more."""
    layer, ranks = layer_of(grad_input_budget=0.6, refresh_every=2), []
    w = layer.weight.detach()
    for rows in (64, 64, 512, 64, 2048, 64, 2048):
        g = torch.randn(rows, 5) @ torch.randn(5, P)
        before = layer.memory.projection.basis
        before = torch.empty(N, 0) if before is None else before.clone()
        dx = input_grad(layer, g)
        rank = layer.config.projection_rank(rows, N, P)
        held = layer.memory.projection.basis
        ranks.append((rank, held.shape[1]))
        torch.testing.assert_close(held.T @ held, torch.eye(held.shape[1]), atol=1e-5, rtol=0)
        if rank <= before.shape[1]:  # also where this step has refreshed it
            q = before[:, :rank]
            torch.testing.assert_close(dx, g @ w @ q @ q.T, rtol=1e-3, atol=1e-3)
    used, kept = zip(*ranks, strict=True)
    assert used[0] < used[2] < used[4]
    assert list(kept) == list(itertools.accumulate(used, max))


def test_half_precision_reaches_as_far_as_dense():
    config = MemAOPConfig(grad_input="projected", memory=Subspace(rank=4))
    layer = MemAOPLinear(4096, 64, config=config, dtype=torch.float16)
    column = torch.ones(256, 1, dtype=torch.float16)
    g = column @ torch.full((1, 64), 800.0, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(64, 4096))  # dX of up to 30,000
    x = torch.randn(256, 4096, dtype=torch.float16, requires_grad=True)
    layer(x).backward(g)
    exact = g.float() @ layer.weight.float()
    assert exact.max() < torch.finfo(torch.float16).max
    assert (x.grad.float() - exact).norm() < 0.01 * exact.norm()


def test_it_is_exact_in_evaluation_with_all_rows_and_where_that_costs_no_more():
    layer = layer_of(rank=16)
    assert input_grad(layer, torch.randn(0, P)).shape == (0, N)
    assert layer.memory.nbytes == 0

    def check(g):
        torch.testing.assert_close(input_grad(layer, g), g @ layer.weight)

    check(torch.randn(4, P))
    assert layer.memory.projection.basis is None
    layer.eval()
    check(torch.randn(M, P))
    layer.train().set_ratio_(1)
    check(torch.randn(M, P))


@pytest.mark.parametrize("settings", [{"rank": 4}, {"budget": 1 / 4}])
def test_a_checkpoint_resumes_to_the_bit(settings):
    first, second = layer_of(refresh_every=3, **settings), layer_of(refresh_every=3, **settings)
    for _ in range(4):
        input_grad(first, torch.randn(M, P))
    second.load_state_dict(first.state_dict())
    second.memory.load_state_dict(copy.deepcopy(first.memory.state_dict()))
    assert second.memory.nbytes == first.memory.nbytes
    for seed in range(4):
        results = []
        for layer in (first, second):
            torch.manual_seed(seed)
            results.append(input_grad(layer, torch.randn(M, P)))
        assert torch.equal(*results)
    first.memory.reset()
    assert first.memory.nbytes == 0
    assert "projection" not in first.memory.state_dict()


def test_a_state_that_does_not_fit_is_refused():
    layer = layer_of(rank=4)
    input_grad(layer, torch.randn(M, P))
    good = layer.memory.state_dict()
    lacking = {name: value for name, value in good.items() if name != "projection_step"}
    for broken, message in (
        (
            good | {"projection": torch.eye(N + 1, 4)},
            rf"projection has shape \({N + 1}, 4\).*, 4\)",
        ),
        (good | {"projection": torch.ones(N)}, "projection has shape"),
        (good | {"projection": torch.ones(N, N + 1)}, f"{N + 1} columns for rows of {N}"),
        (good | {"projection": torch.ones(N, 0)}, "0 columns"),
        (lacking, "state lacks projection_step"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.memory.load_state_dict(broken)
    # Of a memory that projected nothing.
    layer.memory.load_state_dict({k: v for k, v in good.items() if "projection" not in k})
    assert layer.memory.projection.basis is None


def test_copies_and_conversions_take_the_basis_along_unless_the_size_changes():
    layer = layer_of(rank=4)
    input_grad(layer, torch.randn(M, P))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.memory.projection.basis, layer.memory.projection.basis)
    assert twin.memory.projection.basis is not layer.memory.projection.basis
    twin.to(torch.float64)
    assert twin.memory.projection.basis.dtype == torch.float32
    twin.to("meta")
    assert twin.memory.projection.basis is None
    layer.memory.fit(layer.config, P, N)
    assert layer.memory.projection.basis is None
    g, weight = torch.randn(M, N), torch.randn(N, P)
    assert projected_input_grad(g, weight, layer.config, layer.memory).shape == (M, P)
    assert layer.memory.projection.basis.shape == (P, 4)


@pytest.mark.parametrize("budget", [1 / 16, 1 / 4, 1 / 2])
def test_both_halves_stay_within_their_budgets(budget):
    layer = layer_of(budget=budget)
    x = torch.randn(M, N, requires_grad=True)
    for _ in range(2):
        with FlopCounterMode(display=False) as forward:
            y = layer(x)
        with FlopCounterMode(display=False) as backward:
            y.backward(torch.randn(M, P))
    assert forward.get_total_flops() == DENSE
    assert 0.8 * 2 * budget * DENSE < backward.get_total_flops() <= 2 * budget * DENSE


def test_the_rank_is_the_largest_that_the_budget_pays_for():
    for budget in (0.04, 0.1, 0.3, 0.7, 0.999):
        rank = projection_rank_within(budget, M, N, P, 8)
        assert projected_input_grad_flops(M, N, P, rank, 8) <= budget * DENSE
        assert projected_input_grad_flops(M, N, P, rank + 4, 8) > budget * DENSE or rank == N
    assert projection_rank_within(1e-6, M, N, P, 8) == 1
    assert projection_rank_within(0.9, 10**6, 6, 10**4, 8) == 4


def test_flops_are_those_of_the_three_products_and_the_refreshes():
    layer = layer_of(rank=4, refresh_every=10)
    # A power iteration on all of the 512 rows and W, and QR.
    refresh = 2 * 4 * P * (M + N) + 4 * 4 * 4 * N
    expected = 2 * 4 * (M * P + P * N + M * N) + refresh / 10
    assert flops_of_input_grad(layer.config, layer.memory, M, N, P) == round(expected)
    assert flops_of_input_grad(layer.config, layer.memory, 2, N, P) == 2 * 2 * N * P  # dense


def test_a_budget_of_its_own():
    def rank(columns=N, **settings):
        settings = {"grad_input": "projected"} | settings
        return flat_config(**settings).projection_rank(M, columns, P)

    own = Projected(1 / 2)
    assert rank(budget=1 / 8, grad_input=own) == rank(ratio=1 / 8, grad_input=own)
    assert rank(budget=1 / 8, grad_input=own) > 3 * rank(budget=1 / 8)
    assert rank(rank=9) == rank(rank=9, budget=1 / 2) == 9
    assert rank(columns=40) == 10  # a quarter


def test_another_budget_of_dw_leaves_dx_as_it_is():
    for settings in ({"budget": 1 / 4}, {"ratio": 1 / 4, "rank": 6}):
        layer = layer_of(**settings)
        rank = layer.config.projection_rank(M, N, P)
        input_grad(layer, torch.randn(M, P))
        q = layer.memory.projection.basis.clone()
        for change, share in ((layer.set_budget_, 1 / 64), (layer.set_ratio_, 1 / 2)):
            change(share)
            assert layer.config.projection_rank(M, N, P) == rank
            input_grad(layer, torch.randn(M, P))
            assert torch.equal(layer.memory.projection.basis, q)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection": "topk", "memory": "residual"}, "needs memory='subspace'.*not 'residual'"),
        ({"grad_input_budget": 1.0}, "budget=1 is what dense costs: use grad_input='exact'"),
        ({"grad_input_budget": 1.5}, r"budget=1\.5 must be in \(0, 1\]"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        flat_config(**{"grad_input": "projected"} | settings)
    with pytest.raises(TypeError, match="budget must be a number"):
        MemAOPConfig(grad_input=Projected("all"))
