"""Convolutions: gradients beside float64, in either layout, and that a step does not wait."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, Subspace, convert_, new_memory
from memaop_triton.backward.conv_grad import conv_weight_grad
from memaop_triton.memory.patches import Geometry, as_weight
from tests.gpu.helpers import Graph, no_synchronisation

INPUTS, GRADIENTS = Subspace(4, "input", 2), Subspace(4, "grad", 2)
CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Case(NamedTuple):
    dims: int = 2
    groups: int = 1
    kernel: int = 3
    memory: Subspace | None = None
    is_last: bool = False  # whether channels are
    options: Mapping[str, object] = MappingProxyType({})  # of the dense layer


def label(case):
    memory = case.memory.side if case.memory else "none"
    layout = "last" if case.is_last else "first"
    options = [f"{name}={value}" for name, value in case.options.items()]
    return "-".join([f"{case.dims}d", f"{case.groups}x{case.kernel}", memory, layout, *options])


# The first four run without a GPU.
CASES = [
    Case(memory=INPUTS, is_last=True),
    Case(groups=2, options={"stride": 2, "padding": 1}),
    Case(dims=1, memory=GRADIENTS, options={"dilation": 2}),
    Case(kernel=1, memory=INPUTS),
    Case(),
    Case(is_last=True, options={"padding": 1, "padding_mode": "circular"}),
    Case(groups=2, is_last=True),
    Case(memory=INPUTS, options={"padding": "same"}),
    Case(memory=GRADIENTS, is_last=True),
    Case(kernel=1, is_last=True, options={"stride": 2}),
    Case(kernel=1, groups=2),
    Case(dims=1, memory=INPUTS, is_last=True),
    Case(dims=3, options={"padding": 1}),
    Case(dims=3, memory=INPUTS, is_last=True),
]


def laid_out(a, is_last):
    return a.movedim(1, -1).contiguous().movedim(-1, 1) if is_last else a


def problem(case, dtype, device, on_gpu):
    """A dense layer, inputs, and gradients of its outputs."""
    torch.manual_seed(0)
    channels, side = on_gpu((32, {1: 500, 2: 24, 3: 9}), (4, {1: 14, 2: 6, 3: 4}))
    dense = CLASSES[case.dims](
        channels, 2 * channels, case.kernel, groups=case.groups, device=device, dtype=dtype,
        **case.options,
    )  # fmt: skip
    sizes = on_gpu(8, 2), channels, *[side[case.dims]] * case.dims
    x = laid_out(torch.randn(sizes, device=device).to(dtype), case.is_last)
    g = torch.randn_like(dense(x).detach())
    return dense, x, laid_out(g, case.is_last)


def gradients(layer, x, g):
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(layer(leaf), [layer.weight, layer.bias, leaf], g)


def assert_near(found, exact, tolerance):
    for one, other in zip(found, exact, strict=True):
        error = torch.linalg.vector_norm(one.double() - other) / torch.linalg.vector_norm(other)
        assert error < tolerance


def dense_in_float64(dense, x, g):
    exact = CLASSES[len(dense.kernel_size)](
        dense.in_channels, dense.out_channels, dense.kernel_size, dense.stride, dense.padding,
        dense.dilation, dense.groups, padding_mode=dense.padding_mode, device=x.device,
        dtype=torch.float64,
    )  # fmt: skip
    exact.load_state_dict(dense.state_dict())
    return gradients(exact, x.double(), g.double())


def keep_rows(g, count):
    """`g` with zeros everywhere but at so many positions."""
    rows = g.movedim(1, -1).reshape(-1, g.shape[1])
    kept = torch.zeros_like(rows)
    some = torch.randperm(len(rows), device=g.device)[:count]
    kept[some] = rows[some]
    return kept.view(g.movedim(1, -1).shape).movedim(-1, 1)


@pytest.mark.slow  # in the interpreter
@pytest.mark.parametrize("case", CASES, ids=label)
def test_k_rows_that_alone_have_a_gradient_are_exact(case, device, half, on_gpu):
    dense, x, g = problem(case, half, device, on_gpu)
    k = on_gpu(64, 8)
    g = laid_out(keep_rows(g, k), case.is_last)
    layer = convert_(dense, MemAOPConfig(k=k, memory=case.memory))
    for _ in range(3):  # the basis is refreshed
        found = gradients(layer, x, g)
    assert_near(found, dense_in_float64(dense, x, g), on_gpu(0.03, 1e-4))


@pytest.mark.parametrize("case", [case for case in CASES if case.memory is None], ids=label)
@pytest.mark.parametrize("ratio", [1 / 4, 1])
def test_the_same_rows_as_on_the_cpu(case, ratio, device, half, on_gpu, monkeypatch):
    dense, x, g = problem(case, half, device, on_gpu)
    layer = convert_(dense, MemAOPConfig(ratio=ratio, selection="topk", memory=None))
    found = gradients(layer, x, g)
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "torch")
    there = gradients(layer.double().cpu(), x.double().cpu(), g.double().cpu())
    assert_near(found, [a.to(device) for a in there], on_gpu(0.03, 1e-4))


@pytest.mark.parametrize("memory", [None, INPUTS, GRADIENTS], ids=lambda m: m.side if m else "none")
@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.slow  # in the interpreter
def test_a_step_does_not_wait_for_the_device(memory, is_last, groups, device, half, on_gpu):
    case = Case(groups=groups, is_last=is_last, options={"padding": 1})
    dense, x, g = problem(case, half, device, on_gpu)
    layer = convert_(dense, MemAOPConfig(ratio=1 / 4, memory=memory))
    for _ in range(2):  # makes the basis and compiles
        gradients(layer, x, g)
    with no_synchronisation(device):
        for _ in range(4):
            gradients(layer, x, g)


@pytest.mark.parametrize("memory", [None, INPUTS, GRADIENTS], ids=lambda m: m.side if m else "none")
@pytest.mark.parametrize("is_last", [False, True])
def test_a_captured_step_reads_new_inputs(memory, is_last, device, half, on_gpu):
    case = Case(is_last=is_last)
    dense, x, g = problem(case, half, device, on_gpu)
    k = on_gpu(64, 8)
    config = MemAOPConfig(k=k, memory=memory)
    geometry = Geometry((3, 3), (1, 1), (0, 0), (1, 1), 1)
    held = new_memory(config, 9 * x.shape[1], g.shape[1])
    g.copy_(keep_rows(g, k))
    graph = Graph(lambda: conv_weight_grad(x, g, geometry, config, held), device)
    x.copy_(torch.randn_like(x))
    g.copy_(keep_rows(torch.randn_like(g), k))
    dw, db = graph.replay()
    exact = dense_in_float64(dense, x, g)
    assert_near((as_weight(dw, (3, 3)), db), exact[:2], on_gpu(0.03, 1e-4))


def test_inputs_beyond_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.zeros(1, 8192, 8200, 32, **half).movedim(-1, 1)
    g = torch.zeros(1, 8190, 8198, 16, **half).movedim(-1, 1)
    assert x.numel() > 1 << 31
    x[0, :, -1, -1], g[0, :, -1, -1] = 2, 3
    config = MemAOPConfig(k=4, selection="topk", memory=None)
    dw = conv_weight_grad(x, g, Geometry((3, 3), (1, 1), (0, 0), (1, 1), 1), config).weight
    of_taps = dw.view(16, 9, 32)
    assert (of_taps[:, -1] == 6).all()
    assert (of_taps[:, :-1] == 0).all()
