"""The layer under tracers, scripting, batching transforms and replicas."""

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, convert_, memaop_linear, new_memory, revert_
from memaop_triton.nn import layer_state

X = torch.randn(32, 16)
MEMORIES = [{}, {"selection": "topk", "memory": "residual"}]


def model(**settings):
    net = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))
    return convert_(net, MemAOPConfig(ratio=1 / 4, **settings))


def test_symbolic_trace_keeps_the_layer_as_a_call():
    net = model()
    traced = torch.fx.symbolic_trace(net)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["0", "1", "2"]
    traced(X).sum().backward()
    assert net[0].memory.step == 1
    of_a_layer = torch.fx.symbolic_trace(net[0])  # its forward pass
    torch.testing.assert_close(of_a_layer(X), net[0](X))


class Gated(nn.Linear):
    def extra_repr(self):
        return "gated"


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("linear", [nn.Linear, Gated])
@pytest.mark.parametrize("record", [torch.jit.script, lambda net: torch.jit.trace(net, X)])
def test_script_makes_a_dense_layer(linear, training, record):
    config = MemAOPConfig(ratio=1 / 4)
    net = convert_(nn.Sequential(linear(16, 8)), config, filter_fn=lambda *_: True)
    scripted = record(net.train(training))
    torch.testing.assert_close(scripted(X), net(X))
    scripted(X).sum().backward()
    torch.testing.assert_close(net[0].weight.grad, X.sum(0).expand(8, -1))


BATCHING = {
    "jacrev": lambda net, x: torch.func.jacrev(net)(x),
    "jacobian": lambda net, x: torch.autograd.functional.jacobian(net, x, vectorize=True),
    "is_grads_batched": lambda net, x: torch.autograd.grad(
        net(x), x, torch.randn(5, 32, 8), is_grads_batched=True
    ),
    "vmap": lambda net, x: torch.func.vmap(net)(torch.randn(3, 32, 16)),
    "vmap of grad": lambda net, x: torch.func.vmap(torch.func.grad(lambda a: net(a).sum()))(
        torch.randn(3, 32, 16)
    ),
}


@pytest.mark.parametrize("transform", BATCHING.values(), ids=BATCHING.keys())
@pytest.mark.parametrize("grad_input", ["exact", "sampled", "projected"])
def test_batching_is_refused_in_training_and_exact_in_evaluation(transform, grad_input):
    net = model(grad_input=grad_input)
    with pytest.raises(RuntimeError, match=r"cannot be batched.*\.eval\(\)"):
        transform(net, X.clone().requires_grad_())
    assert net[0].memory.step == 0
    transform(net.eval(), X.clone().requires_grad_())


def test_replicas_of_data_parallel_are_refused_in_training():
    net = model()
    with pytest.raises(RuntimeError, match=r"use torch\.nn\.parallel\.DistributedDataParallel"):
        net[0]._replicate_for_data_parallel()
    net.eval()[0]._replicate_for_data_parallel()


@pytest.fixture
def no_gc():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("settings", MEMORIES, ids=["subspace", "rows"])
def test_a_memory_is_freed_with_its_layer(settings, no_gc):
    for let_go in (lambda holder: holder.clear(), lambda holder: revert_(holder[0])):
        holder = [model(**settings)]
        holder[0](X).sum().backward()
        memories = [weakref.ref(layer.memory) for layer in (holder[0][0], holder[0][2])]
        let_go(holder)
        assert [memory() for memory in memories] == [None, None]


@pytest.mark.parametrize("settings", MEMORIES, ids=["subspace", "rows"])
def test_a_memory_of_its_own_is_freed_and_lives_until_backward(settings, no_gc):
    config = MemAOPConfig(ratio=1 / 4, **settings)
    weight = torch.randn(12, 16, requires_grad=True)
    memory = new_memory(config, 16, 12)
    loss = memaop_linear(X, weight, None, config, memory).sum()
    reference = weakref.ref(memory)
    del memory
    assert reference() is not None
    loss.backward()
    assert weight.grad is not None
    del loss
    assert reference() is None


def test_states_without_a_memory_are_kept_for_each_device_and_do_not_pile_up():
    def state_on(device, k=3):
        return layer_state.state_for(MemAOPConfig(k=k, memory="none"), None, torch.device(device))

    cpu, meta = state_on("cpu"), state_on("meta")
    assert cpu is state_on("cpu")
    assert (cpu.handle.device.type, meta.handle.device.type) == ("cpu", "meta")
    limit = layer_state._MAX_STATES_WITHOUT_MEMORY
    for k in range(1, limit + 20):
        state_on("cpu", k)
    assert layer_state._state_without_memory.cache_info().currsize == limit


def own_linear(x, weight, config, memory):
    return memaop_linear(x, weight, None, config, memory).square().sum()


def test_a_copy_of_a_memory_is_not_its_original():
    config = MemAOPConfig(ratio=1 / 4, selection="topk", memory="residual")
    weight = torch.randn(12, 16, requires_grad=True)
    original = new_memory(config, 16, 12)
    for duplicate in (copy.copy(original), copy.deepcopy(original)):
        own_linear(X, weight, config, duplicate).backward()
        assert (original.rows, duplicate.rows) == (0, 32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_another_configuration_leaves_a_compiled_backward_pass_its_state():
    config = MemAOPConfig(ratio=1 / 4)
    memory = new_memory(config, 16, 12)
    weight = torch.randn(12, 16, requires_grad=True)
    compiled = torch.compile(own_linear, backend="aot_eager")
    compiled(X, weight, config, memory).backward()
    loss = compiled(X, weight, config, memory)
    own_linear(X, weight, config.spending(ratio=1 / 2), memory).backward()
    loss.backward()
    assert memory.step == 3
    for k in range(2 * layer_state._MAX_STATES_OF_A_MEMORY):
        own_linear(X, weight, dataclasses.replace(config, ratio=None, k=1 + k), memory).backward()
    assert len(memory.layer_states) == layer_state._MAX_STATES_OF_A_MEMORY
