"""The CPU path: one weight-gradient call, and a whole layer, against dense.

The limit beside a weight gradient is a GEMM of K rows that lie together, plus one pass over what
the path has to touch: X and G are read once, and a row memory is read, updated and written too.
"""

import copy

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, convert_, new_memory
from memaop_triton.weight_grad import weight_grad

SHAPES = [(8192, 1024, 1024), (4096, 2048, 2048)]
SETTINGS = {
    "topk": {"selection": "topk", "memory": "none"},
    "priority": {"selection": "priority", "memory": "none"},
    "topk-residual": {"selection": "topk", "memory": "residual"},
    "topk-signed": {"selection": "topk", "memory": "signed"},
    "default": {},
}
# Wanted ratios by (M, 1/ratio, setting).
TARGETS = {
    (8192, 8): {
        "topk": 6.0, "priority": 6.0, "topk-residual": 5.0, "topk-signed": 5.0,
    },
    (8192, 16): {
        "topk": 10.0, "priority": 10.0, "topk-residual": 8.0, "topk-signed": 8.0, "default": 5.8,
    },
    (4096, 8): {
        "topk": 6.5, "priority": 6.5, "topk-residual": 5.5, "topk-signed": 5.5,
    },
    (4096, 16): {"default": 7.5},
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("inverse_ratio", [8, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_cpu_weight_grad(compare, shape, inverse_ratio, setting):
    m, n, p = shape
    x, g = torch.randn(m, n), torch.randn(m, p)
    config = MemAOPConfig(ratio=1 / inverse_ratio, **SETTINGS[setting])
    memory = new_memory(config, n, p)
    k = config.num_rows(m)
    few_x, few_g = x[:k].clone(), g[:k].clone()
    if config.has_row_memory:
        slots = torch.zeros_like(x), torch.zeros_like(g)

    def limit():
        if config.has_row_memory:
            slots[0].add_(x)
            slots[1].add_(g)
        else:
            x.sum()
            g.sum()
        return few_g.t() @ few_x

    compare(
        f"dW {m}x{n}x{p} r=1/{inverse_ratio} {setting}",
        lambda: g.t() @ x,
        lambda: weight_grad(x, g, config, memory),
        limit=limit,
        target=TARGETS[m, inverse_ratio].get(setting),
    )


@pytest.mark.parametrize("setting", ["default", "priority"])
@pytest.mark.parametrize(("grad_input", "target"), [("exact", 1.3), ("sampled", 1.9)])
def test_cpu_layer(compare, grad_input, target, setting):
    m, n, p = SHAPES[0]
    dense = nn.Linear(n, p)
    config = MemAOPConfig(ratio=1 / 8, grad_input=grad_input, **SETTINGS[setting])
    ours = convert_(nn.Linear(n, p), config)
    x, g = torch.randn(m, n, requires_grad=True), torch.randn(m, p)

    def step(layer):
        x.grad = layer.weight.grad = layer.bias.grad = None
        layer(x).backward(g)

    compare(
        f"layer {m}x{n}x{p} r=1/8 {setting} dX {grad_input}",
        lambda: step(dense),
        lambda: step(ours),
        target=target,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("setting", ["default", "topk-signed"])
def test_cpu_compiled_step(compare, setting):
    """A training step of a small network, compiled, beside the same step run eagerly."""
    m, n, _ = SHAPES[0]
    eager = nn.Sequential(nn.Linear(n, n), nn.GELU(), nn.Linear(n, n), nn.GELU(), nn.Linear(n, 16))
    convert_(eager, MemAOPConfig(ratio=1 / 8, **SETTINGS[setting]))
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True)
    x = torch.randn(m // 4, n)

    def step(call, model):
        model.zero_grad()
        call(x).square().mean().backward()

    compare(
        f"step of an MLP, M={m // 4}, r=1/8 {setting}, eager / compiled",
        lambda: step(eager, eager),
        lambda: step(compiled, twin),
        target=1.0,
    )
