"""What `plan` says of the bytes that autograd holds, and of stashes that free nothing."""

import functools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memaop_triton import MemAOPConfig, Subspace, convert_, plan
from memaop_triton.memory.stash import Stash
from memaop_triton.plan import planning
from memaop_triton.plan.held import measure_held

M, N = 256, 128
PLAIN = MemAOPConfig(ratio=1 / 8, memory="none", stash="int4")
INPUT = M * N * 4
BITS = Stash.of(torch.zeros(M, N), 4).nbytes


@pytest.fixture(autouse=True)
def _quick(measured, savings):
    """Measuring takes no time."""


class Net(nn.Module):
    """Layers whose inputs nobody else keeps, and one whose inputs a product keeps."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(N, N) for _ in range(3))
        self.gate = Gate()

    def forward(self, x):
        y = self.first(x + 1) + 1
        return self.third(self.second(y) * self.gate(y))


class Gate(nn.Module):
    def forward(self, x):
        return x * x.new_ones(1).requires_grad_()


def held(model, config=PLAIN, x=None, layers=None, **kwargs):
    chosen = {
        name: (layer, config)
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and (layers is None or name in layers)
    }
    x = torch.randn(M, N, requires_grad=True) if x is None else x
    return measure_held(model, chosen, x, **kwargs)


def chain(*between):
    layers = (part for between_ in between for part in (nn.Linear(N, N), between_))
    return nn.Sequential(*layers, nn.Linear(N, N))


class PlusOne(nn.Module):
    def forward(self, x):
        return x + 1


def test_bytes_are_those_of_inputs_and_of_bits():
    model = chain(PlusOne(), PlusOne())
    assert held(model)[:2] == (3 * INPUT, INPUT + 2 * BITS), "the first input is a leaf"
    assert held(model, layers=["2"])[:2] == (3 * INPUT, 2 * INPUT + BITS)
    frozen = model.requires_grad_(False)
    assert held(frozen)[:2] == (0, 0)


def test_a_storage_counts_once_and_what_is_gone_does_not():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(N, N), nn.Linear(N, N)

        def forward(self, x):
            self.left(x * 1)  # a part of the graph without use
            x = x + 1
            return self.left(x) + self.right(x.view(-1, 2, N)).view(-1, N)

    assert held(Twice(), layers=["left"])[0] == INPUT
    model = convert_(Twice(), PLAIN)
    found = held(Twice())
    assert found.dense == INPUT
    assert found.converted == 2 * BITS, "a view is not recognised as the same inputs"
    assert type(model.left) is not nn.Linear


def test_parameters_and_buffers_are_there_anyway():
    model = nn.Sequential(nn.Linear(N, N), nn.BatchNorm1d(N))
    statistics = 2 * N * 4  # of the batch
    assert held(model)[0] == 2 * INPUT + statistics


def test_what_is_beside_a_subspace_is_counted():
    """The basis of a memory is made in the first backward pass; its part of the rows is kept."""
    config = MemAOPConfig(ratio=1 / 8, memory=Subspace(4, side="input"), stash="int4")
    model = chain(PlusOne(), PlusOne())
    alone, beside = held(model), held(model, config)
    assert beside.converted == alone.converted + 2 * 4 * (M + N) * 2


def test_the_kept_input_is_named_by_the_module_that_keeps_it():
    found = held(Net())
    assert found.keepers == {"second": "gate"}
    assert found.converted > held(Net(), layers=["first", "third"]).converted


def test_who_keeps_an_input():
    def of(forward, **layers):
        model = nn.ModuleDict(layers)
        model.forward = lambda x: forward(model, x * 1)
        return held(model, loss_fn=lambda y: y.square().sum()).keepers

    linear = functools.partial(nn.Linear, N, N)
    assert of(lambda m, x: m["a"](x), a=linear()) == {}
    assert of(lambda m, x: m["a"](x) * x, a=linear()) == {"a": "the model itself"}
    assert of(lambda m, x: m["a"](x) + x, a=linear()) == {}
    # By a later operation, and by an earlier one that is known to: that is no stash at all.
    assert of(lambda m, x: m["a"](F.relu(x)), a=linear()) == {}
    assert of(lambda m, x: (m["a"](x), x.square())[0], a=linear()) == {}, "without use"
    # A use that frees its inputs.
    assert of(lambda m, x: m["a"](x) * x + m["a"](x + 1), a=linear()) == {}
    assert of(lambda m, x: m["a"](x) * x + m["a"](y := x + 1) * y, a=linear()) == (
        {"a": "the model itself"}
    )


def test_a_loss_that_keeps_an_input():
    inner = nn.Linear(N, N)
    model = nn.ModuleList([inner])
    model.forward = lambda x: (y := x * 1, inner(y))
    keepers = held(model, loss_fn=lambda out: (out[0] * out[1]).sum()).keepers
    assert keepers == {"0": "the loss"}


def test_the_model_itself_may_be_the_layer():
    assert held(nn.Linear(N, N), x=torch.randn(M, N)) == (INPUT, BITS, {})


def test_a_dense_layer_beside_keeps_the_input_of_both():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(N, N), nn.Linear(N, N)

        def forward(self, x):
            x = x + 1
            return self.a(x) + self.b(x)

    assert held(Pair(), layers=["a"]).keepers == {"a": "b"}
    with torch.autocast("cpu", torch.bfloat16):
        assert held(Pair(), layers=["a"]).keepers == {}, "each has a cast of its own"


@pytest.mark.parametrize(
    ("use_reentrant", "keepers"), [(True, {}), (False, {"block.0": "the model itself"})]
)
def test_a_checkpointed_block_holds_its_input_alone(use_reentrant, keepers):
    """The one that computes it again in a pass of its own is seen without gradients."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = chain(PlusOne(), PlusOne())

        def forward(self, x):
            return checkpoint(self.block, x * 1, use_reentrant=use_reentrant)

    assert held(Outer()) == (INPUT, INPUT, keepers)


def test_the_model_is_as_before():
    model, x = Net(), torch.randn(M, N)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    held(model, x=x)
    assert torch.equal(torch.rand(3), expected)
    assert {type(layer) for layer in (model.first, model.second, model.third)} == {nn.Linear}
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("ratio", [1 / 8, "auto"])
def test_a_plan_says_it(ratio):
    config = MemAOPConfig(ratio=ratio, memory="none", stash="int4")
    x = torch.randn(M, N)
    found = plan(Net(), config, example_inputs=x, loss_fn=lambda y: y.sum())
    dense, ours, _ = held(Net(), x=x)
    assert (found.saved_bytes, found.saved_bytes_converted) == (dense, ours)
    line = (
        f"Held for the backward pass: {dense // 1024} KiB, with these layers converted "
        f"{ours // 1024} KiB ({100 * (ours / dense - 1):+.0f} %)."
    )
    assert line in str(found)
    assert "The stash of 1 layer frees nothing, because the input is kept anyway" in str(found)
    (row,) = [line for line in str(found).splitlines() if line.strip().startswith("second")]
    assert row.endswith("; its input is kept anyway by gate")
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (content["saved_bytes"], content["saved_bytes_converted"]) == (dense, ours)
    assert [layer["input_kept_by"] for layer in content["layers"]] == ["", "gate", ""]
    # What is advised holds less.
    exact = {"second": MemAOPConfig(ratio=ratio, memory="none")}
    better = plan(Net(), config, example_inputs=x, overrides=exact, loss_fn=lambda y: y.sum())
    assert better.saved_bytes_converted < found.saved_bytes_converted
    assert "frees nothing" not in str(better)


def test_without_a_stash_there_is_no_further_pass(monkeypatch):
    monkeypatch.setattr(planning, "measure_held", lambda *_: pytest.fail("measured"))
    found = plan(Net(), MemAOPConfig(ratio=1 / 8), example_inputs=torch.randn(M, N))
    assert (found.saved_bytes, found.saved_bytes_converted) == (None, None)
    assert "Held for" not in str(found)
    shapes = planning.plan_shapes([(M, N, N)], PLAIN)
    assert (shapes.saved_bytes, shapes.saved_bytes_converted) == (None, None)
