"""Ratios of all layers from one budget: the optimum, and the layers that get them."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memaop_triton import MemAOPConfig, MemAOPLinear, Subspace, allocate_, convert_, monitor
from memaop_triton.monitor.allocate import DEFAULT_BUDGETS, DEFAULT_RATIOS, Option, best_options
from tests.schemes import flat_config

N = 16


def total(options, attribute):
    return sum(getattr(option, attribute) for option in options)


def optimum(options, budget):
    """By trying everything."""
    affordable = [
        total(choice, "variance")
        for choice in itertools.product(*options.values())
        if total(choice, "cost") <= budget
    ]
    return min(affordable)


def random_options(layers, convex):
    ratios = DEFAULT_RATIOS
    options = {}
    for number in range(layers):
        dense, noise = (float(10 ** (2 * torch.rand(()))) for _ in range(2))
        if convex:
            variances = [noise * (1 / r - 1) for r in ratios]
        else:
            variances = (noise * torch.rand(len(ratios))).tolist()
        options[str(number)] = [
            Option(r, dense * r, v) for r, v in zip(ratios, variances, strict=True)
        ]
    return options


@pytest.mark.parametrize("convex", [True, False])
def test_is_within_one_step_of_the_optimum_and_mostly_there(convex):
    gaps = []
    for seed in range(40):
        torch.manual_seed(seed)
        options = random_options(4, convex)
        dense = sum(choices[-1].cost for choices in options.values())
        budget = dense * float(torch.rand(())) * 0.6 + dense / 32
        chosen = best_options(options, budget).values()
        assert total(chosen, "cost") <= budget * (1 + 1e-8)
        best = optimum(options, budget * (1 + 1e-8))
        largest_step = max(
            a.variance - b.variance
            for choices in options.values()
            for a, b in itertools.pairwise(choices)
        )
        assert best * (1 - 1e-9) <= total(chosen, "variance") < best + largest_step
        gaps.append(total(chosen, "variance") / best - 1 if best else 0.0)
    assert sorted(gaps)[len(gaps) // 2] < 0.02


def test_is_the_optimum_where_steps_use_the_budget_up():
    options = random_options(5, True)
    for price in (0.02, 0.3, 2.0, 30.0):  # of a FLOP in variance: the Lagrangian's minimum
        best = [min(c, key=lambda o: o.variance + price * o.cost) for c in options.values()]
        budget = total(best, "cost")
        chosen = best_options(options, budget)
        assert total(chosen.values(), "variance") == pytest.approx(total(best, "variance"))


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
    model = convert_(
        Net(), flat_config(**({"ratio": 1 / 8, "rank": 2, "side": "input"} | settings))
    )
    watch = monitor(model, every=1, starving=1e9)
    for _ in range(steps):
        model(torch.randn(64, N) * torch.rand(64, 1) ** tail).square().sum().backward()
    return model, watch


def flops(model, rows=64):
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(rows, N)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if "memaop" in str(op))


@pytest.mark.parametrize(
    ("memory", "budget"), [("none", 0.3), ("none", 0.6), ("subspace", 0.6), ("subspace", 0.9)]
)
def test_keeps_the_budget_and_adds_less_variance_than_equal_ratios(memory, budget):
    model, watch = watched(memory=memory)
    seen = watch.read()
    before = {name: model.get_submodule(name).memory for name in seen}
    ratios = allocate_(model, watch, budget)
    assert set(ratios) == {"inner", "twice", "head"}
    assert all(ratio in DEFAULT_RATIOS for ratio in ratios.values())
    for name, ratio in ratios.items():
        layer = model.get_submodule(name)
        assert layer.config.ratio == ratio
        assert layer.memory is before[name]
    assert model.idle.config.ratio == 1 / 8
    dense = 4 * 2 * 64 * N * N
    assert flops(model) <= budget * dense
    uses = {"inner": 1, "twice": 2, "head": 1}

    def variance(ratio_of):
        return sum(
            uses[name]
            * (
                0
                if ratio_of(name) == 1
                else max(0, s.score_sum**2 / (ratio_of(name) * 64) - s.score_square_sum)
            )
            for name, s in seen.items()
        )

    # Equal ratios that cost no more: what the subspaces take is paid in both.
    def cost(ratio):
        for name in ratios:
            model.get_submodule(name).set_ratio_(ratio)
        return flops(model)

    even = max(r for r in DEFAULT_RATIOS if cost(r) <= budget * dense)
    assert variance(ratios.get) <= variance(lambda name: even)


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
    with FlopCounterMode(display=False) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    spent = sum(n for op, n in counts.items() if "memaop" in str(op))
    dense = 3 * 2 * ROWS * WIDE * WIDE * (2 if "grad_input" in settings else 1)
    assert 0.6 * budget < spent / dense <= budget


def test_the_subspace_makes_a_layer_content_with_less():
    with_subspace, without = allocated(0.3)[2], allocated(0.3, memory="none")[2]
    assert with_subspace["0"] < without["0"]


def test_a_changed_budget_keeps_what_is_left_of_the_basis_and_looks_again():
    model, step = wide(side="input")
    memory = model[0].memory
    for _ in range(3):
        step()
    rank, before = memory.choice.max_rank, memory.bases["input"].q.clone()
    assert memory.choice.measured is not None
    for budget in (1 / 2, 3 / 16):
        model[0].set_budget_(budget)
        wanted = model[0].config.rank_for(ROWS, WIDE, WIDE)
        assert memory.choice.max_rank == wanted not in (0, rank)
        after = memory.bases["input"].q
        kept = min(rank, wanted)
        torch.testing.assert_close((after[:, :kept].T @ before[:, :kept]).abs(), torch.eye(kept))
        torch.testing.assert_close(after.T @ after, torch.eye(wanted))
        assert memory.choice.measured is None
        assert memory.rank <= wanted
        rank = wanted
        step()
        assert memory.choice.measured is not None
        before = memory.bases["input"].q.clone()
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


def test_a_budget_replaces_ratio_and_k():
    layer = MemAOPLinear(N, N, config=MemAOPConfig(ratio=1 / 2, memory=Subspace(rank=4)))
    layer.set_budget_(1 / 4)
    assert layer.config == MemAOPConfig(budget=1 / 4, memory=Subspace(rank=4))
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
        assert flops(model) <= 2 * 4 * 2 * 64 * N * N * budget


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


def test_a_ratio_replaces_k_and_keeps_blocks():
    layer = MemAOPLinear(N, N, config=MemAOPConfig(k=3, block_rows=16, memory="none"))
    layer.set_ratio_(1 / 2)
    assert layer.config == MemAOPConfig(ratio=1 / 2, block_rows=16, memory="none")
    with pytest.raises(ValueError, match=r"ratio=1\.5"):
        layer.set_ratio_(1.5)
    assert layer.config.ratio == 1 / 2
