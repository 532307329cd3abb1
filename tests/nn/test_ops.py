"""The operators: what PyTorch checks of them, their handles, and the FLOPs they report."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memaop_triton import MemAOPConfig, MemAOPLinear, Subspace, convert_, new_memory
from memaop_triton.flops import SubspaceCost, weight_grad_flops
from memaop_triton.nn.layer_state import LayerState, find
from tests.schemes import flat_config, label

M, N, P = 40, 24, 12
ops = torch.ops.memaop_triton

# Each gives the same result twice, which is what opcheck compares: a row memory that is emptied in
# every step, a subspace that is not refreshed.
REPEATABLE = [
    {"selection": "topk", "memory": "none"},
    {"selection": "priority", "memory": "none"},
    {"selection": "priority", "memory": "subspace", "refresh_every": 1000},
    {"selection": "topk", "memory": "residual", "k": M},
    {"selection": "bernoulli", "memory": "none"},
]


def state_for(**settings):
    config = flat_config(**({} if "k" in settings else {"ratio": 1 / 4}), **settings)
    return LayerState(config, new_memory(config, N, P))


def inputs_for(state, x):
    """`x` and what is kept of it: the one or the other."""
    if state.stash == "exact":
        return x, []
    return torch.randn(0), list(ops.stash(x, state.handle, out_features=P))


WITH_A_STASH = [one | {"stash": "int4"} for one in REPEATABLE if one["memory"] != "residual"]


@pytest.mark.parametrize("bias_grad", [True, False])
@pytest.mark.parametrize("settings", REPEATABLE + WITH_A_STASH, ids=label)
def test_opcheck_weight_grad(settings, bias_grad):
    state = state_for(**settings)
    inputs = inputs_for(state, torch.randn(M, N))
    arguments = *inputs, torch.randn(M, P), state.handle, state.order
    torch.library.opcheck(ops.weight_grad.default, arguments, {"bias_grad": bias_grad})


@pytest.mark.parametrize("stash", ["exact", "int8"])
@pytest.mark.parametrize("weight_grad", [True, False])
@pytest.mark.parametrize("bias_grad", [True, False])
@pytest.mark.parametrize(
    ("memory", "grad_input"),
    [("none", "sampled"), ("subspace", "sampled"), ("subspace", "projected")],
)
def test_opcheck_sampled_backward(memory, grad_input, weight_grad, bias_grad, stash):
    state = state_for(memory=memory, grad_input=grad_input, stash=stash)
    inputs = inputs_for(state, torch.randn(M, N)) if weight_grad else (torch.randn(0), [])
    arguments = *inputs, torch.randn(M, P), torch.randn(P, N), state.handle, state.order
    settings = {"weight_grad": weight_grad, "bias_grad": bias_grad, "is_frozen": not weight_grad}
    torch.library.opcheck(ops.sampled_backward.default, arguments, settings)


@pytest.mark.parametrize("memory", ["none", "subspace"])
def test_opcheck_stash(memory):
    """But for its values, which are drawn."""
    state = state_for(memory=memory, stash="int4")
    arguments = torch.randn(M, N), state.handle
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(ops.stash.default, arguments, {"out_features": P}, test_utils=checks)


@pytest.mark.parametrize(
    ("name", "writes"), [("weight_grad", ["order"]), ("sampled_backward", ["order"]), ("stash", [])]
)
def test_what_is_written_and_operators_run_between_the_graphs_of_a_compiler(name, writes):
    operator = getattr(ops, name).default
    arguments = operator._schema.arguments
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == writes
    assert torch.Tag.cudagraph_unsafe in operator.tags


def test_a_copy_has_a_handle_of_its_own():
    state = state_for(memory="residual", selection="topk")
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert twin.handle.shape != state.handle.shape
        assert find(twin.handle.shape[0]) is twin
        assert find(twin.handle.shape[0]).memory is not state.memory
    assert find(state.handle.shape[0]) is state


def test_handles_are_where_the_layer_is():
    """A graph of one device's operators would otherwise hold a tensor of another device."""
    layer = convert_(nn.Linear(N, P, device="meta"))
    number = layer.layer_state.handle.shape
    assert layer.layer_state.handle.is_meta
    assert layer.layer_state.order.is_meta
    assert layer(torch.empty(M, N, device="meta")).shape == (M, P)
    layer.to_empty(device="cpu").half()
    assert layer.layer_state.handle.device.type == layer.layer_state.order.device.type == "cpu"
    assert layer.layer_state.handle.dtype == torch.uint8
    assert layer.layer_state.handle.shape == number
    assert find(layer.layer_state.handle.shape[0]) is layer.layer_state


def test_memory_that_is_gone_before_backward():
    state = state_for(memory="none")
    handle, order = state.handle, state.order
    del state
    gc.collect()
    with pytest.raises(RuntimeError, match="memory of this backward pass is gone: keep the layer"):
        ops.weight_grad(torch.randn(M, N), [], torch.randn(M, P), handle, order, bias_grad=False)


def flops(layer):
    x = torch.randn(M, N, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops()


def test_flops_of_a_layer_are_those_of_its_gemms_and_its_subspace():
    gemm, norms = 2 * M * N * P, 2 * M * (N + P)
    for settings, expected in (
        ({"ratio": 1, "memory": "none"}, 3 * gemm),
        ({"ratio": 1, "memory": "subspace"}, 3 * gemm),
        ({"ratio": 1 / 4, "memory": "none"}, 2.25 * gemm + norms),
        ({"ratio": 1 / 4, "memory": "none", "grad_input": "sampled"}, 1.5 * gemm + norms),
    ):
        assert flops(MemAOPLinear(N, P, config=MemAOPConfig(**settings))) == expected
    for stash in ("int4", "int8"):  # what restores the rows is not counted
        config = MemAOPConfig(ratio=1 / 4, memory="none", stash=stash)
        assert flops(MemAOPLinear(N, P, config=config)) == 2.25 * gemm + norms
    for side, kept in (("input", 0), ("grad", 0), ("auto", 3 * (N + P))):
        config = MemAOPConfig(ratio=1 / 4, memory=Subspace(rank=3, side=side, refresh_every=10))
        layer = MemAOPLinear(N, P, config=config)
        found, length = flops(layer), {"input": N, "grad": P}[layer.memory.side]
        cost = SubspaceCost(rank=3, features=length, refresh_every=10, kept=kept)
        assert found == 2 * gemm + weight_grad_flops(M, N, P, M // 4, cost)
