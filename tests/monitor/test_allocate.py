"""Ratios of all layers from one budget: the optimum, and the layers that get them."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memaop_triton import MemAOPConfig, MemAOPLinear, Subspace, allocate_, convert_, monitor
from memaop_triton.monitor.allocate import DEFAULT_BUDGETS, DEFAULT_RATIOS, best_options
from memaop_triton.monitor.hull import Option
from tests.schemes import flat_config

N = 16


def total(options, attribute):
    return sum(getattr(option, attribute) for option in options)


@pytest.mark.parametrize("convex", [True, False])
def test_is_within_one_step_of_the_optimum_and_mostly_there(convex):
    gaps = []
    for seed in range(40):
        torch.manual_seed(seed)
        options = {}
        for name in "abcd":
            dense, noise = (float(10 ** (2 * torch.rand(()))) for _ in range(2))
            variances = torch.rand(len(DEFAULT_RATIOS)).tolist()
            if convex:
                variances = [1 / ratio - 1 for ratio in DEFAULT_RATIOS]
            options[name] = [
                Option(ratio, dense * ratio, noise * variance)
                for ratio, variance in zip(DEFAULT_RATIOS, variances, strict=True)
            ]
        dense = sum(choices[-1].cost for choices in options.values())
        budget = dense * float(torch.rand(())) * 0.6 + dense / 32
        chosen = best_options(options, budget).values()
        assert total(chosen, "cost") <= budget * (1 + 1e-8)
        best = min(
            total(choice, "variance")
            for choice in itertools.product(*options.values())
            if total(choice, "cost") <= budget * (1 + 1e-8)
        )
        steps = [pair for choices in options.values() for pair in itertools.pairwise(choices)]
        largest_step = max(a.variance - b.variance for a, b in steps)
        assert best * (1 - 1e-9) <= total(chosen, "variance") < best + largest_step
        gaps.append(total(chosen, "variance") / best - 1 if best else 0.0)
    assert sorted(gaps)[len(gaps) // 2] < 0.02


FREE = [Option(0.1, 1.0, 0.0), Option(1.0, 10.0, 0.0)]
STEEP = [Option(0.1, 1.0, 100.0), Option(1.0, 50.0, 0.0)]
HIDDEN = [Option(0.1, 1.0, 10.0), Option(0.2, 2.0, 9.9), Option(0.3, 3.0, 0.0)]
BULGING = [Option(0.1, 1.0, 10.0), Option(0.5, 3.0, 9.0), Option(1.0, 10.0, 0.0)]
RISING = [Option(0.1, 1.0, 5.0), Option(0.5, 5.0, 6.0), Option(1.0, 10.0, 0.0)]
FLAT = [Option(0.1, 1.0, 5.0), Option(0.5, 5.0, 3.0), Option(1.0, 10.0, 2.5)]
EQUAL = [Option(0.1, 1.0, 2.0), Option(0.5, 5.0, 0.0)]


@pytest.mark.parametrize(
    ("options", "budget", "chosen"),
    [
        # What gains nothing is not bought, not even where the dear option does not fit.
        ((FREE, RISING), 100.0, (0, 2)),
        ((FREE, RISING), 8.0, (0, 0)),
        # The steepest step does not fit, the second of the other hull does.
        ((STEEP, FLAT), 12.0, (0, 2)),
        # An option off the hull is taken where nothing else fits.
        ((BULGING,), 4.0, (1,)),
        ((BULGING,), 10.0, (2,)),
        # A poor step does not hide the good one behind it.
        ((HIDDEN, [Option(0.1, 1.0, 10.0), Option(0.3, 3.0, 8.0)]), 4.0, (2, 0)),
        # Equal layers are served in order.
        ((EQUAL, EQUAL, EQUAL), 11.0, (1, 1, 0)),
    ],
)
def test_what_a_budget_buys(options, budget, chosen):
    named = {str(number): choices for number, choices in enumerate(options)}
    wanted = [choices[place] for choices, place in zip(options, chosen, strict=True)]
    assert list(best_options(named, budget).values()) == wanted


class Net(nn.Module):
    """Layers whose gradients differ in size, one used twice, one never."""

    def __init__(self):
        super().__init__()
        self.inner, self.twice, self.head = (nn.Linear(N, N) for _ in range(3))
        self.idle = nn.Linear(N, N)

    def forward(self, x):
        x = self.inner(x).tanh() * 0.1
        return self.head(self.twice(self.twice(x)).tanh())


def watched(steps=4, tail=2, **settings):
    """Most rows are small, the more of them the longer the tail."""
    settings = {"ratio": 1 / 8, "rank": 2, "side": "input"} | settings
    model = convert_(Net(), flat_config(**settings))
    watch = monitor(model, every=1, starving=1e9)
    for _ in range(steps):
        model(torch.randn(64, N) * torch.rand(64, 1) ** tail).square().sum().backward()
    return model, watch


def flops(run):
    """Of our products in `run`."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if "memaop" in str(op))


def flops_of_a_step(model):
    return flops(lambda: model(torch.randn(64, N)).sum().backward())


@pytest.mark.parametrize(
    ("memory", "budget"), [("none", 0.3), ("none", 0.6), ("subspace", 0.6), ("subspace", 0.9)]
)
def test_keeps_the_budget_and_adds_less_variance_than_equal_ratios(memory, budget):
    model, watch = watched(memory=memory)
    seen = watch.read()
    layers = {name: model.get_submodule(name) for name in seen}
    before = [layer.memory for layer in layers.values()]
    ratios = allocate_(model, watch, budget)
    assert set(ratios) == {"inner", "twice", "head"}
    assert all(ratio in DEFAULT_RATIOS for ratio in ratios.values())
    assert {name: layer.config.ratio for name, layer in layers.items()} == ratios
    assert [layer.memory for layer in layers.values()] == before
    assert model.idle.config.ratio == 1 / 8
    allowed = budget * 4 * 2 * 64 * N * N
    assert flops_of_a_step(model) <= allowed

    def variance(ratios):
        found = 0.0
        for name, s in seen.items():
            found += s.variance_of(ratios[name] * 64) * (2 if name == "twice" else 1)
        return found

    # Equal ratios that cost no more: what the subspaces take is paid in both.
    affordable = []
    for ratio in DEFAULT_RATIOS:
        for layer in layers.values():
            layer.set_ratio_(ratio)
        if flops_of_a_step(model) <= allowed:
            affordable.append(dict.fromkeys(seen, ratio))
    assert variance(ratios) <= variance(affordable[-1])


WIDE, ROWS = 128, 1024


def wide(**settings):
    """Layers with a budget, of which the inputs of the first lie near four dimensions."""
    torch.manual_seed(0)
    config = flat_config(budget=1 / 4, **settings)
    model = convert_(nn.Sequential(*(nn.Linear(WIDE, WIDE) for _ in range(3))), config)
    plane = torch.randn(4, WIDE)

    def step():
        x = torch.randn(ROWS, 4) @ plane + 0.1 * torch.randn(ROWS, WIDE)
        model(x).square().mean().backward()

    return model, step


def allocated(budget, **settings):
    model, step = wide(**settings)
    with monitor(model, every=1, starving=1e9) as watch:
        for _ in range(3):
            step()
        return model, step, allocate_(model, watch, budget)


@pytest.mark.parametrize("settings", [{}, {"memory": "none"}, {"grad_input": "sampled"}])
@pytest.mark.parametrize("budget", [0.15, 0.3])
def test_layers_with_budgets_get_budgets(budget, settings):
    model, step, budgets = allocated(budget, **settings)
    assert [layer.config.budget for layer in model] == list(budgets.values())
    assert set(budgets.values()) <= set(DEFAULT_BUDGETS)
    assert len(set(budgets.values())) > 1
    step()
    dense = 3 * 2 * ROWS * WIDE * WIDE * (2 if "grad_input" in settings else 1)
    assert 0.6 * budget < flops(step) / dense <= budget


def test_the_subspace_makes_a_layer_content_with_less():
    with_subspace, without = allocated(0.3)[2], allocated(0.3, memory="none")[2]
    assert with_subspace["0"] < without["0"]


def test_a_changed_budget_keeps_what_is_left_of_the_basis_and_looks_again():
    model, step = wide(side="input")
    memory = model[0].memory
    step()
    for budget in (1 / 2, 3 / 16):
        rank, before = memory.choice.max_rank, memory.bases["input"].q.clone()
        assert memory.choice.measured is not None
        model[0].set_budget_(budget)
        wanted = model[0].config.rank_for(ROWS, WIDE, WIDE)
        assert memory.choice.max_rank == wanted not in (0, rank)
        after, kept = memory.bases["input"].q, min(rank, wanted)
        torch.testing.assert_close((after[:, :kept].T @ before[:, :kept]).abs(), torch.eye(kept))
        torch.testing.assert_close(after.T @ after, torch.eye(wanted))
        assert memory.choice.measured is None
        assert memory.rank <= wanted
        step()
    model[0].set_budget_(1 / 32)
    assert memory.choice.max_rank == 0
    step()
    assert memory.basis is None
    model[0].set_budget_(1 / 2)
    step()
    assert memory.rank > 0


def test_what_was_measured_is_saved():
    model, step = wide()
    for _ in range(3):
        step()
    memory = model[1].memory
    loaded = copy.deepcopy(memory)
    loaded.reset()
    loaded.load_state_dict(memory.state_dict())
    config = model[1].config.spending(budget=1 / 2)
    assert loaded.least_variance(config) == memory.least_variance(config)
    assert loaded.least_variance(config)[0] < memory.least_variance(model[1].config)[0]


def test_a_budget_and_a_ratio_replace_each_other():
    config = MemAOPConfig(k=3, block_rows=16, memory=Subspace(rank=4))
    layer = MemAOPLinear(N, N, config=config)
    layer.set_ratio_(1 / 2)
    assert layer.config == MemAOPConfig(ratio=1 / 2, block_rows=16, memory=Subspace(rank=4))
    layer.set_budget_(1 / 4)
    assert layer.config == MemAOPConfig(budget=1 / 4, block_rows=16, memory=Subspace(rank=4))
    with pytest.raises(ValueError, match=r"ratio=1\.5"):
        layer.set_ratio_(1.5)
    for budget in (0, 1, 1.5):
        with pytest.raises(ValueError, match=f"budget={budget}"):
            layer.set_budget_(budget)
    with pytest.raises(TypeError, match="budget must be a number"):
        layer.set_budget_("1/4")
    assert layer.config.budget == 1 / 4


def test_sampled_input_gradients_are_paid_for():
    # The subspaces and norms alone take 0.4 of both gradients.
    model, watch = watched(grad_input="sampled", side="auto")
    for budget in (0.5, 0.6, 0.7):
        allocate_(model, watch, budget)
        assert flops_of_a_step(model) <= 2 * 4 * 2 * 64 * N * N * budget


def test_everything_is_exact_if_the_budget_says_so():
    model, watch = watched(tail=0)
    assert set(allocate_(model, watch, 1.0).values()) == {1.0}


def test_layers_without_any_score_get_the_least():
    model = convert_(nn.Sequential(nn.Linear(N, N), nn.Linear(N, N)), MemAOPConfig(memory="none"))
    with monitor(model, every=1, starving=1e9) as watch:
        x = torch.randn(64, N)
        y = model[0](x)
        (model[1](torch.zeros(64, N)).sum() + y.square().sum()).backward()
        ratios = allocate_(model, watch, 0.4)
    assert ratios == {"0": 1 / 2, "1": 1 / 32}


def test_arguments_are_checked():
    model, watch = watched(steps=0)
    with pytest.raises(ValueError, match="has not observed any layer"):
        allocate_(model, watch)
    for budget in (0, 1.5, -1, math.nan):
        with pytest.raises(ValueError, match="budget="):
            allocate_(model, watch, budget)
    for ratios in ((), (0.5, 2.0), (0.0,)):
        with pytest.raises(ValueError, match="ratios="):
            allocate_(model, watch, ratios=ratios)
    model(torch.randn(64, N)).sum().backward()
    with pytest.raises(ValueError, match="lower the rank"):
        allocate_(model, watch, 0.01)
