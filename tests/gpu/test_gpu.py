"""The kernels, and whole steps beside the same in PyTorch."""

import pytest
import torch
from torch import nn

from memaop_triton import (
    convert_,
    load_memory_state_dict,
    memory_state_dict,
    new_memory,
)
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.kernels import targets
from memaop_triton.kernels.cpu import torch_ops
from memaop_triton.kernels.gpu import gather_gemm, score
from memaop_triton.kernels.gpu import select as kernel
from memaop_triton.kernels.tuning import defaults
from tests.judging import check_products, drawn_blocks, operands
from tests.schemes import flat_config
from tests.selecting import expected, select_in_pytorch

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1000, 264, 520), (129, 17, 3), (4096, 1024, 768), (1, 1, 1)]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request, device):
    if device.type == "cpu" and request.param == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    return request.param


@pytest.mark.parametrize("problem", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block_rows", [1, 64])
def test_gather_gemm(problem, dtype, weighted, block_rows, device):
    m = problem[0]
    x, g = operands(*problem, dtype, device=device)
    indices = torch.randperm(m, device=device)[: max(1, m // 4)].sort().values
    if block_rows > 1:
        indices = drawn_blocks(list(range(0, -(-m // block_rows), 2)), block_rows, device)
    weights = torch.rand(indices.numel(), device=device) * 3 + 1 if weighted else None
    result = gather_gemm.gather_gemm(x, g, indices, weights, block_rows=block_rows)
    check_products(result, x, g, indices, weights)


def test_every_tile(dtype, device, on_gpu):
    m, n, p = on_gpu((2048, 512, 384), (48, 16, 32))
    x, g = operands(m, n, p, dtype, device=device)
    indices = torch.arange(0, m, 3, device=device)
    for tile in defaults.gemm_tiles(targets.current(x.device), dtype, "ieee"):
        result = gather_gemm.gather_gemm(x, g, indices, config=tile)
        check_products(result, x, g, indices)


def test_rows_beyond_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    x = torch.zeros(1 << 20, 4096, dtype=torch.bfloat16, device="cuda")
    g = torch.zeros(1 << 20, 16, dtype=torch.bfloat16, device="cuda")
    x[-1], g[-1] = 2, 3
    indices = torch.tensor([0, (1 << 20) - 1], device="cuda")
    assert (gather_gemm.gather_gemm(x, g, indices) == 6).all()
    assert score.row_norms(x)[-1] == 2 * 64


# Not `weightedk`: logarithms differ in their last bits.
@pytest.mark.parametrize("policy", ["topk", "priority", "randk", "uniform"])
@pytest.mark.parametrize("rows", [2, 100, 4096, 16384, 1_000_000])
def test_selection(rows, policy, device):
    scores, seed = torch.randn(rows, device=device).exp(), torch.tensor([1 << 61], device=device)
    k = max(1, rows // 8)
    rows_of_kernel, weights, _ = kernel.select(scores, k, policy, seed)
    good = expected(scores, k, policy, 1 << 61)
    assert torch.equal(rows_of_kernel, good.indices)
    torch.testing.assert_close(weights, good.weights)


def gradients(config, batches, seed):
    generator = torch.Generator(batches[0][0].device).manual_seed(seed)
    memory = new_memory(config, batches[0][0].shape[1], batches[0][1].shape[1])
    return [weight_and_bias_grad(x, g, config, memory, generator=generator) for x, g in batches]


@pytest.mark.parametrize("block_rows", [1, 32])
def test_steps_equal_those_in_pytorch(scheme, dtype, block_rows, device, on_gpu, monkeypatch):
    if scheme["memory"] in ("residual", "signed"):
        scheme = {"selection": "topk", "memory": "residual"}
    select_in_pytorch(monkeypatch)
    config = flat_config(ratio=1 / 4, rank=8, refresh_every=2, block_rows=block_rows, **scheme)
    problem = on_gpu((1024, 128, 192), (70, 32, 24))
    batches = [operands(*problem, dtype, device=device) for _ in range(3)]
    ours = gradients(config, batches, 5)
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "torch")
    theirs = gradients(config, batches, 5)
    for one, other in zip(ours, theirs, strict=True):
        # Scores that differ in the last bit may swap rows of nearly equal score.
        error = (one.weight - other.weight).norm() / other.weight.norm()
        assert error < (0.05 if dtype != torch.float32 else 1e-3)
        torch.testing.assert_close(one.bias, other.bias, rtol=0.02, atol=0.5)


def test_memory_read_into_cpu_memory_follows_its_layer(memory_scheme, device):
    config = flat_config(k=8, rank=4, refresh_every=2, **memory_scheme)
    model = convert_(nn.Linear(64, 32, device=device), config)

    def gradients():
        torch.manual_seed(1)
        made = []
        for _ in range(3):
            model.zero_grad()
            model(torch.randn(100, 64, device=device)).square().sum().backward()
            made.append(model.weight.grad.clone())
        return made

    gradients()
    state = {
        name: {n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in memory.items()}
        for name, memory in memory_state_dict(model).items()
    }
    load_memory_state_dict(
        model, {n: dict(memory) for n, memory in memory_state_dict(model).items()}
    )
    expected = gradients()
    load_memory_state_dict(model, state)
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_rows_named_repeatedly_are_added_in_one_order(device):
    g, w = torch.randn(64, 512, device=device), torch.randn(512, 2048, device=device)
    indices = torch.randint(0, 8, (4096,), device=device).sort().values
    weights = torch.rand(4096, device=device)
    first = torch_ops.sampled_rows_mm(g, w, indices, weights)
    for _ in range(10):
        assert torch.equal(torch_ops.sampled_rows_mm(g, w, indices, weights), first)
