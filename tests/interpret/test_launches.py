"""How many operations a weight gradient takes on the device: launches, and operators of PyTorch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from memaop_triton import dispatch, new_memory
from memaop_triton.backward import steps_triton
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.kernels.gpu import launch
from tests.schemes import flat_config

# Room and views are no operations of a device.
ROOM = ("aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty")
SUBSPACE = ["project", "transposed", "combine", "select", *["gather_gemm", "add_up"] * 2]
# Launches, and operators of PyTorch, of a step in the middle of training with db, no refresh.
OPERATIONS = {
    "priority-none": (["score", "select", "gather_gemm", "add_up"], []),
    "topk-none": (["score", "select", "gather_gemm", "add_up"], []),
    "bernoulli-none": (["score", "slope", "select", "gather_gemm", "add_up"], []),
    "topk-residual": (["accumulate", "select", "gather_gemm", "add_up"], []),
    "weightedk-signed": (["accumulate", "select", "gather_gemm", "add_up"], []),
    "randk-residual": (["select", "pack", "accumulate", "add_up"], ["aten.mm"]),
    "priority-subspace-input": (SUBSPACE, []),
    "priority-subspace-grad": (SUBSPACE, []),
}
MOST = {"none": 4, "residual": 5, "signed": 5, "subspace": 8}


class Operators(TorchDispatchMode):
    """Takes down every operator that computes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if not func.is_view and name not in ROOM:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def operations(monkeypatch):
    """Calls a function; returns the kernels that it launched and the operators that it called."""
    launched = launch.launch
    kernels = []

    def noted(kernel, grid, **arguments):
        kernels.append(kernel.__name__.removesuffix("_kernel"))
        with _disable_current_modes():
            launched(kernel, grid, **arguments)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "triton")
    monkeypatch.setattr(launch, "launch", noted)
    # Of a GPU the seed is computed on the host: tests/gpu and test_draws.
    for room in (dispatch, steps_triton):
        monkeypatch.setattr(room, "draw_seed", lambda *_: 1 << 62)

    def count(function):
        kernels.clear()
        with Operators() as operators:
            function()
        return list(kernels), operators.found

    return count


@pytest.mark.parametrize("scheme", OPERATIONS)
@pytest.mark.parametrize("split", [False, True])
def test_a_step_in_the_middle_of_training(scheme, split, operations, monkeypatch):
    """Also where the rows of a product are split among programs, whose parts are added up."""
    expected, operators = OPERATIONS[scheme]
    selection, memory, *side = scheme.split("-")
    sides = {"side": side[0]} if side else {}
    config = flat_config(
        ratio=1 / 8, rank=4, refresh_every=1 << 20, selection=selection, memory=memory, **sides
    )
    m, n, p = (2048, 32, 16) if split else (256, 128, 192)
    state = new_memory(config, n, p)
    x, g = torch.randn(m, n).half(), torch.randn(m, p).half()

    def step():
        weight_and_bias_grad(x, g, config, state)

    step()
    kernels, called = operations(step)
    if scheme == "bernoulli-none":
        assert len(kernels) == 5
    else:
        assert len(kernels) + len(called) <= MOST[memory]
    assert (kernels, called) == (expected, operators)
