"""The parts that a weight-gradient call is made of, each beside the same in plain PyTorch."""

import dataclasses

import pytest
import torch

from memaop_triton import dispatch
from memaop_triton.bench.measure import Method
from memaop_triton.bench.suites.problem import Problem, on_problems
from memaop_triton.kernels import targets
from memaop_triton.kernels.cpu import torch_ops
from memaop_triton.kernels.tuning import defaults
from memaop_triton.sampling.selection import select_rows

RANK = 16
DECAY = 0.5


def in_pytorch(call):
    """`call` without the compiled row passes."""

    def run():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MEMAOP_TRITON_BACKEND", "torch")
            call()

    return run


def row_norms(problem):
    x, _ = problem.operands()
    return (
        lambda: x.square().sum(1).sqrt(),
        lambda: dispatch.row_norms(x),
        ("one pass over X", lambda: torch.linalg.vector_norm(x, dim=1) if x.is_cuda else x.sum()),
    )


def accumulate_and_score(problem):
    x, memory = problem.operands()[0], problem.operands()[0]
    carry = torch.full((problem.m,), DECAY, dtype=torch_ops.score_dtype(x.dtype))

    def plain():
        memory.mul_(carry.unsqueeze(1)).add_(x)
        return torch.linalg.vector_norm(memory, dim=1)

    def limit():
        return torch.add(x, memory, alpha=DECAY, out=memory)

    return (
        plain,
        lambda: torch_ops.accumulate_and_score(memory, x, carry),
        ("one pass over X and its memory", limit),
    )


def _basis(problem, x):
    start = torch.randn(problem.n, RANK, device=x.device)
    return torch.linalg.qr(start).Q.to(x.dtype).contiguous()


def project_rows(problem):
    x, _ = problem.operands()
    basis = _basis(problem, x)

    def plain():
        z = x @ basis
        norms, inside = (torch.linalg.vector_norm(a, dim=1) for a in (x, z))
        return z, (norms.square() - inside.square()).clamp(min=0).sqrt()

    limit = ("X Q alone", lambda: x @ basis)
    return plain, lambda: dispatch.project_rows(x, basis), limit


def project_gradient(problem):
    x, g = problem.operands()
    z = x @ _basis(problem, x)

    def plain():
        return z.t() @ g, torch.linalg.vector_norm(g, dim=1)

    return plain, lambda: torch_ops.project_gradient(g, z), ("Zᵀ G alone", lambda: z.t() @ g)


def priority_selection(problem):
    scores = torch.rand(problem.m, device=problem.device)

    def plain():
        keys, order = (scores / torch.rand_like(scores)).topk(problem.k + 1)
        chosen = order[:-1].sort().values
        return chosen, (keys[-1] / scores[chosen]).clamp(min=1)

    return plain, lambda: select_rows(scores, problem.k, "priority"), None


def gather_gemm(problem):
    x, g = problem.operands()
    indices = torch.randperm(problem.m, device=x.device)[: problem.k].sort().values
    weights = torch.rand(problem.k, device=x.device) + 1
    few_x, few_g = x[indices], g[indices]

    def plain():
        return (g[indices] * weights.to(g.dtype).unsqueeze(1)).t() @ x[indices]

    limit = ("GEMM of K rows that lie together", lambda: few_g.t() @ few_x)
    if not x.is_cuda:
        return plain, lambda: torch_ops.gather_gemm(x, g, indices, weights), limit
    from memaop_triton.kernels.gpu.gather_gemm import gather_gemm as by_triton

    return plain, lambda: by_triton(x, g, indices, weights), limit


TITLES = {
    row_norms: "row norms",
    accumulate_and_score: "memory update and row norms",
    project_rows: "X Q and row norms of the rest",
    project_gradient: "Zᵀ G and row norms",
    priority_selection: "priority selection",
    gather_gemm: "gather GEMM",
}
SQUARE = Problem(8192, 1024, 1024)
ON_GPU = Problem(16384, 4096, 4096, dtype=torch.bfloat16, device="cuda")


def methods_of(kernel, problem):
    """Plain PyTorch, ours with and without C, and a lower bound where one is known."""
    plain, ours, limit = kernel(problem)
    on_cpu = problem.device == "cpu"
    fallback = Method("fallback", "ours", "ours, without the C", in_pytorch(ours))
    return [
        Method("dense", "dense", "plain PyTorch, operation by operation", plain),
        Method("ours", "ours", "C" if on_cpu else "Triton", ours),
        *([fallback] if on_cpu else []),
        *([Method("limit", "limit", *limit)] if limit else []),
    ]


@pytest.mark.parametrize("kernel", TITLES, ids=lambda kernel: kernel.__name__)
@on_problems(
    (("quick", "cpu"), [SQUARE]),
    (("cpu",), [Problem(4096, 768, 3072)]),
    (("gpu",), [ON_GPU]),
    (("smoke",), [Problem(64, 32, 16)]),
)
def test_kernel(compare, problem, kernel):
    if problem.device == "cuda" and kernel in (accumulate_and_score, project_gradient):
        pytest.skip("a pass of the CPU path; on a GPU it is part of another kernel")
    title = f"{TITLES[kernel]}, {problem.details}"
    compare(problem, "kernel", title, methods_of(kernel, problem))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@on_problems((("gpu",), [ON_GPU]))
def test_gpu_gather_gemm_tiles(compare, problem, weighted):
    """The gather GEMM with each of its large tiles, beside GEMMs of rows that lie together."""
    from memaop_triton.bench.suites.plain_gemm import plain_gemm
    from memaop_triton.kernels.gpu.gather_gemm import gather_gemm as by_triton

    x, g = problem.operands()
    indices = torch.randperm(problem.m, device="cuda")[: problem.k].sort().values
    weights = torch.rand(problem.k, device="cuda") + 1 if weighted else None
    few_x, few_g = x[indices], g[indices]
    tiles = defaults.gemm_tiles(targets.current(x.device), x.dtype, "ieee")[:3]

    def with_tile(tile):
        config = dataclasses.replace(tile, split_k=1)
        name = f"{tile.block_p}x{tile.block_n}x{tile.block_k}"
        return [
            Method(
                f"gathered {name}",
                "ours",
                f"gather GEMM, tile {name}",
                lambda: by_triton(x, g, indices, weights, config=config),
            ),
            Method(
                f"plain {name}",
                "baseline",
                f"plain Triton GEMM of K rows that lie together, tile {name}",
                lambda: plain_gemm(few_g, few_x, weights, config=tile),
            ),
        ]

    methods = [
        Method("dense", "dense", "cuBLAS on K rows that lie together", lambda: few_g.t() @ few_x),
        *(method for tile in tiles for method in with_tile(tile)),
    ]
    title = f"gather GEMM by tile{', weighted' * weighted}, {problem.details}"
    compare(problem, "kernel", title, methods)
