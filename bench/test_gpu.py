"""The Triton path on a GPU: one weight-gradient call, and a whole layer, against dense (cuBLAS).

Times are taken by events on the stream, with the second-level cache overwritten before each call,
and dense and ours alternate. The limit is what a call cannot avoid: a GEMM of K rows that lie
together, plus one pass over what the path has to touch.
"""

import dataclasses
import statistics

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, convert_, new_memory
from memaop_triton.kernels import configs, gather_gemm, targets
from memaop_triton.weight_grad import weight_grad

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"
)

SHAPES = [(16384, 4096, 4096), (16384, 1024, 1024), (8192, 4096, 11008), (4096, 768, 3072)]
SETTINGS = {
    "topk": {"selection": "topk", "memory": "none"},
    "priority": {"selection": "priority", "memory": "none"},
    "priority-blocks": {"selection": "priority", "memory": "none", "block_rows": 64},
    "topk-residual": {"selection": "topk", "memory": "residual"},
    "topk-signed": {"selection": "topk", "memory": "signed"},
    "randk-residual": {"selection": "randk", "memory": "residual"},
    "default": {},
}
ROUNDS = 15


@pytest.fixture(scope="module")
def cold_seconds():
    """Times a call on the GPU with a cold cache."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def measure(call):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return measure


@pytest.fixture
def compare_gpu(benchmark, cold_seconds, request):
    """Alternates a baseline, a call and its limit, and records the ratio."""

    def run(name, baseline, call, limit=None):
        calls = [baseline, call, *([limit] if limit else [])]
        for each in calls * 3:
            each()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        peak = torch.cuda.max_memory_allocated() - held
        times = [[cold_seconds(each) for each in calls] for _ in range(ROUNDS)]
        low, middle, high = statistics.quantiles([t[0] / t[1] for t in times], n=4)
        medians = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
        properties = torch.cuda.get_device_properties(0)
        benchmark.extra_info.update(
            name=name,
            baseline_ms=medians[0],
            ours_ms=medians[1],
            limit_ms=medians[2] if limit else None,
            ratio={"median": middle, "q1": low, "q3": high},
            peak_bytes=peak,
            gpu=properties.name,
            processors=properties.multi_processor_count,
            torch=torch.__version__,
        )

        def synchronous():
            call()
            torch.cuda.synchronize()

        benchmark.pedantic(synchronous, rounds=5, warmup_rounds=1)

    return run


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("inverse_ratio", [8, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_gpu_weight_grad(compare_gpu, shape, inverse_ratio, setting):
    m, n, p = shape
    x, g = (torch.randn(m, c, dtype=torch.bfloat16, device="cuda") for c in (n, p))
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
            torch.linalg.vector_norm(x, dim=1)
            torch.linalg.vector_norm(g, dim=1)
        return few_g.t() @ few_x

    compare_gpu(
        f"dW {m}x{n}x{p} r=1/{inverse_ratio} {setting}",
        lambda: g.t() @ x,
        lambda: weight_grad(x, g, config, memory),
        limit,
    )


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("tile", range(3))
def test_gpu_gather_gemm_tiles(compare_gpu, tile, weighted):
    """The gather GEMM alone with each of its large tiles, against cuBLAS on gathered rows."""
    m, n, p, k = 16384, 4096, 4096, 2048
    x, g = (torch.randn(m, c, dtype=torch.bfloat16, device="cuda") for c in (n, p))
    tiles = configs.gemm_tiles(targets.current(x.device), x.dtype, "ieee")
    config = dataclasses.replace(tiles[tile], split_k=1)
    indices = torch.randperm(m, device="cuda")[:k].sort().values
    weights = torch.rand(k, device="cuda") + 1 if weighted else None
    few_x, few_g = x[indices], g[indices]
    compare_gpu(
        f"gather GEMM {config.block_p}x{config.block_n}x{config.block_k}"
        f"{' weighted' if weighted else ''}, against cuBLAS on K rows that lie together",
        lambda: few_g.t() @ few_x,
        lambda: gather_gemm.gather_gemm(x, g, indices, weights, config=config),
    )


@pytest.mark.parametrize("setting", ["default", "priority"])
@pytest.mark.parametrize("grad_input", ["exact", "sampled"])
def test_gpu_layer(compare_gpu, grad_input, setting):
    m, n, p = SHAPES[0]
    dense = nn.Linear(n, p, device="cuda", dtype=torch.bfloat16)
    config = MemAOPConfig(ratio=1 / 8, grad_input=grad_input, **SETTINGS[setting])
    ours = convert_(nn.Linear(n, p, device="cuda", dtype=torch.bfloat16), config)
    x = torch.randn(m, n, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(m, p, device="cuda", dtype=torch.bfloat16)

    def step(layer):
        x.grad = layer.weight.grad = layer.bias.grad = None
        layer(x).backward(g)

    compare_gpu(
        f"layer {m}x{n}x{p} r=1/8 {setting} dX {grad_input}",
        lambda: step(dense),
        lambda: step(ours),
    )
