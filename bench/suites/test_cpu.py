"""The target speed-ups on two cores: `python -m pytest bench -k cpu`.

They are in no suite, and are printed as a table.
"""

import copy

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, convert_, new_memory
from memaop_triton.backward.conv_grad import conv_weight_grad
from memaop_triton.bench.measure import Method
from memaop_triton.bench.suites import contenders
from memaop_triton.bench.suites.problem import Problem
from memaop_triton.memory.maps import by_position
from memaop_triton.memory.patches import Geometry

LAYER = Problem(8192, 1024, 1024)


@pytest.mark.parametrize("setting", contenders.SETTINGS)
@pytest.mark.parametrize("inverse_ratio", [8, 16])
@pytest.mark.parametrize("shape", contenders.WANTED_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_cpu_weight_grad(compare, shape, inverse_ratio, setting):
    problem = Problem(*shape, ratio=1 / inverse_ratio)
    family = next(name for name, names in contenders.FAMILIES.items() if setting in names)
    compare(
        problem,
        "dw",
        f"dW {problem.details}",
        contenders.selected(problem, (setting,), family),
        cold=True,
        wanted=contenders.wanted(problem),
    )


@pytest.mark.parametrize("setting", ["priority", "default"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_cpu_convolution(compare, memory_format, setting):
    """dW of 64 to 128 channels by 3 × 3 at 28 × 28 positions of 64 samples."""
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), groups=1)
    x = torch.randn(64, 64, 28, 28).to(memory_format=memory_format)
    g = torch.randn(64, 128, 28, 28).to(memory_format=memory_format)
    weight = torch.empty(128, 64, 3, 3).to(memory_format=memory_format)
    problem = Problem(64 * 28 * 28, weight[0].numel(), len(weight))
    config = problem.config(**contenders.SETTINGS[setting])
    memory = new_memory(config, problem.n, problem.p)

    def dense():
        where = geometry.stride, geometry.padding, geometry.dilation, False, [0, 0], 1
        wanted = (False, True, False)
        return torch.ops.aten.convolution_backward(g, x, weight, None, *where, wanted)[1]

    def unfold():
        return by_position(g).t() @ nn.functional.unfold(x, 3, padding=1).mT.flatten(0, 1)

    def ours():
        return conv_weight_grad(x, g, geometry, config, memory, bias_grad=False)

    methods = [
        Method("dense", "dense", "convolution_backward", dense),
        Method("unfold", "baseline", "the matrix of patches, and one GEMM", unfold),
        Method(setting, "ours", setting, ours, config.period),
    ]
    layout = "channels last" if memory_format is torch.channels_last else "channels first"
    title = f"convolution dW {problem.details}, {layout},"
    wanted = {setting: 3.0 if setting == "priority" else 2.0}
    compare(problem, "dw", title, methods, wanted=wanted)


@pytest.mark.parametrize("setting", ["default", "priority"])
@pytest.mark.parametrize(("grad_input", "target"), [("exact", 1.3), ("sampled", 1.9)])
def test_cpu_layer(compare, grad_input, target, setting):
    methods = contenders.layers(LAYER, [(setting, grad_input)])
    wanted = {methods[1].name: target}
    compare(LAYER, "layer", f"layer {LAYER.details}", methods, wanted=wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("setting", ["default", "topk-signed"])
def test_cpu_compiled_step(compare, setting):
    """A training step of a small network, compiled, beside the same step run eagerly."""
    problem = Problem(LAYER.m // 4, LAYER.n, LAYER.p)
    n = problem.n
    eager = nn.Sequential(nn.Linear(n, n), nn.GELU(), nn.Linear(n, n), nn.GELU(), nn.Linear(n, 16))
    convert_(eager, MemAOPConfig(ratio=1 / 8, **contenders.SETTINGS[setting]))
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True)
    x = torch.randn(problem.m, n)

    def step(call, model):
        model.zero_grad()
        call(x).square().mean().backward()

    name = f"{setting}, compiled"
    methods = [
        Method("eager", "dense", "the same step, eager", lambda: step(eager, eager)),
        Method(name, "ours", name, lambda: step(compiled, twin)),
    ]
    title = f"step of an MLP, M={problem.m}, eager /"
    compare(problem, "step", title, methods, wanted={name: 1.0}, model="MLP")
