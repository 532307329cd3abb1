"""`torch.compile(fullgraph=True)`: equal to eager step for step, and compiled once."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from memaop_triton import (
    MemAOPConfig,
    RatioScheduler,
    attach_optimizer,
    convert_,
    memaop_linear,
    memory_state_dict,
    monitor,
    new_memory,
)
from tests.schemes import LEGAL, flat_config

pytestmark = [
    # The compiler's own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Branches(nn.Module):
    """Layers whose gradients do not depend on each other, so that a compiler might reorder them."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 8)

    def forward(self, x):
        return self.out(self.query(x).relu() * self.key(x) + self.value(x).relu())


def branches(configs):
    """Such layers, converted one by one; those without a configuration get the default one."""
    overrides = dict(zip(("query", "key", "value", "out"), configs, strict=False))
    return convert_(Branches(), MemAOPConfig(ratio=1 / 4), overrides=overrides)


class Twice(nn.Module):
    """One layer used twice in a forward pass, once inside a checkpoint."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x):
        x = checkpoint(self.layer, x, use_reentrant=False).relu()
        return self.out(self.layer(x).relu())


def train(call, model, rows=(24,) * 5, *, autocast=False):
    """Losses, parameters and memories of a few steps with a learning rate that changes."""
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_optimizer(model, opt)
    torch.manual_seed(1)
    losses = []
    for step, count in enumerate(rows):
        opt.param_groups[0]["lr"] = 0.1 / (step + 1)
        x, target = torch.randn(count, 32), torch.randn(count, 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = call(x)
        loss = (y.float() - target).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    memories = [
        value
        for state in memory_state_dict(model).values()
        for value in state.values()
        if isinstance(value, torch.Tensor | int | float)
    ]
    return losses, [p.detach() for p in model.parameters()], memories


def both(model, backend, *args, **kwargs):
    """The same training eager and compiled."""
    twin = copy.deepcopy(model)
    eager = train(model, model, *args, **kwargs)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    return eager, train(compiled, twin, *args, **kwargs)


def exactly(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("schemes", [LEGAL[i::6] for i in range(6)], ids=range(6))
def test_equals_eager_bit_for_bit_with_changing_batches(schemes):
    """Every scheme, each layer with its own: it is compiling that takes the time."""
    configs = [flat_config(ratio=1 / 4, refresh_every=2, **scheme) for scheme in schemes]
    eager, compiled = both(branches(configs), "aot_eager", rows=(24, 24, 40, 16, 24, 64))
    exactly(compiled, eager)
    # One graph for the first shape, one for all others, whatever rates, signs and bases are.
    assert counters["stats"]["unique_graphs"] == 2


def test_equals_eager_under_inductor():
    configs = [
        flat_config(ratio=1 / 4, selection=selection, memory=memory, refresh_every=2)
        for selection, memory in (
            ("weightedk", "residual"),
            ("priority", "subspace"),
            ("weightedk", "signed"),
            ("priority", "none"),
        )
    ]
    eager, compiled = both(branches(configs), "inductor")
    # Fused operations round less often; other draws would differ in the first digit.
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("grad_input", "autocast"), [("sampled", False), ("projected", False), ("exact", True)]
)
def test_approximate_input_gradient_and_autocast(grad_input, autocast):
    config = MemAOPConfig(ratio=1 / 4, grad_input=grad_input)
    exactly(*both(convert_(Branches(), config), "aot_eager", autocast=autocast))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("memory", ["signed", "subspace"])
def test_layer_used_twice_and_checkpointed(memory, backend):
    selection = "topk" if memory == "signed" else "priority"
    config = MemAOPConfig(ratio=1 / 4, selection=selection, memory=memory)
    eager, compiled = both(convert_(Twice(), config), backend)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_functional_form():
    config, weight = MemAOPConfig(ratio=1 / 4), torch.randn(8, 32, requires_grad=True)

    def loss(x, memory):
        return memaop_linear(x, weight, None, config, memory).square().sum()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        memory = new_memory(config, 32, 8)
        torch.manual_seed(1)
        losses = [call(torch.randn(24, 32), memory) for _ in range(5)]
        results.append(([torch.autograd.grad(one, weight) for one in losses], memory.basis))
    exactly(*results)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("memory", ["none", "signed", "subspace"])
def test_ratios_and_monitors_do_not_recompile(memory):
    selection = "topk" if memory == "signed" else "priority"
    eager = convert_(Branches(), MemAOPConfig(ratio=1 / 4, selection=selection, memory=memory))
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for call, one in ((eager, eager), (compiled, model)):
        torch.manual_seed(1)
        schedule = RatioScheduler(one, lambda step: (1 / 4, 1 / 2, 1.0, 1 / 8)[step % 4])
        gradients = []
        with (
            torch._dynamo.config.patch(error_on_recompile=True),
            monitor(one, every=1, starving=1e9) as watch,
        ):
            for step in range(8):
                if step == 4:
                    watch.close()
                one.zero_grad()
                call(torch.randn(24, 32)).square().sum().backward()
                gradients += [p.grad.clone() for p in one.parameters()]
                schedule.step()
        results.append((gradients, {n: s.scalars() for n, s in watch.read().items()}))
    exactly(results[1], results[0])
    assert watch.read()["out"].observations == 4
    assert counters["stats"]["unique_graphs"] == 1


def test_equal_blocks_share_one_graph():
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(12)))
    model = convert_(nn.Sequential(blocks, nn.Linear(32, 8)), MemAOPConfig(ratio=1 / 4))
    eager = copy.deepcopy(model)
    for block in model[0]:
        block.compile(fullgraph=True, backend="aot_eager")
    exactly(train(model, model), train(eager, eager))
    # The first block of all, which has no gradient to pass on, then one fixed, one for any handle.
    assert counters["stats"]["unique_graphs"] <= 4


def test_evaluation_and_training_alternate():
    model = convert_(Branches(), MemAOPConfig(ratio=1 / 4))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(24, 32)
    exactly(compiled.eval()(x), model.eval()(x))
    compiled.train()(x).sum().backward()
    assert model.out.memory.step == 1
    compiled.eval()(x).sum().backward()
    assert model.out.memory.step == 1


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_export_of_the_forward_pass_is_that_of_a_dense_model(training, strict):
    model = convert_(Branches(), MemAOPConfig()).train(training)
    sizes = ({0: torch.export.Dim("rows")},)
    exported = torch.export.export(
        model, (torch.randn(24, 32),), dynamic_shapes=sizes, strict=strict
    )
    targets = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert targets.count("aten.linear.default") == 4
    assert set(exported.state_dict) == set(model.state_dict())
    x = torch.randn(7, 32)
    exactly(exported.module()(x), model(x))


class Chain(nn.Module):
    """Two layers of which each is fed by a tensor of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.second(self.first(x + 1).sin())


@pytest.mark.parametrize(
    "settings", [{"memory": "none"}, {"memory": "subspace"}, {"side": "grad"}, {"budget": 0.4}]
)
@pytest.mark.parametrize("stash", ["int8", "int4"])
def test_a_stash(stash, settings):
    share = {} if "budget" in settings else {"ratio": 1 / 4}
    config = flat_config(refresh_every=2, stash=stash, **share, **settings)
    eager, compiled = both(convert_(Chain(), config), "aot_eager", rows=(24, 24, 40, 16, 24, 64))
    if "budget" in settings:  # whose rank may change: a compiled layer keeps nothing beside
        assert all(torch.isfinite(loss) for loss in compiled[0])
    else:  # before there is a basis, a compiled layer keeps zeros inside of it
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("grad_input", ["exact", "sampled"])
def test_a_compiled_step_keeps_the_stash_and_not_the_inputs(grad_input):
    config = MemAOPConfig(ratio=1 / 4, memory="none", stash="int4", grad_input=grad_input)
    kept = {}

    def pack(a):
        kept[a.untyped_storage().data_ptr()] = a
        return a

    model = convert_(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
        y = compiled(torch.randn(512, 256, requires_grad=True) * 1)
    y.sum().backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = sum(a.untyped_storage().nbytes() for place, a in kept.items() if place not in weights)
    assert held <= 2 * (512 * (128 + 8 + 4) + 8)
