"""The methods that are compared on a weight gradient: dense, ours, the literature's, the limit.

There are three families, by what is remembered, because the unavoidable work differs. The limit is
a GEMM of K contiguous rows, and one pass over the data that a family has to read or write:

| memory | pass | rows of the GEMM |
|---|---|---|
| none | X and G are read | K |
| rows | X, G and their memories are read, the memories written | K |
| subspace | X and G are read | K + M q (N + P)/(N P), which have the FLOPs of X Q and Gᵀ Z |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memaop_triton import MemAOPConfig, convert_, dispatch, new_memory
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.bench.measure import Method
from memaop_triton.bench.suites import baselines
from memaop_triton.bench.suites.problem import Problem
from memaop_triton.kernels.cpu import library

#: Our configurations by name.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "priority": {"selection": "priority", "memory": "none"},
    "topk": {"selection": "topk", "memory": "none"},
    "topk-residual": {"selection": "topk", "memory": "residual"},
    "topk-signed": {"selection": "topk", "memory": "signed"},
}
_LABELS = {
    "default": "default: priority + subspace",
    "priority": "priority",
    "topk": "top-k",
    "topk-residual": "top-k + residual (the paper)",
    "topk-signed": "top-k + signed",
}
#: What is compared in each family; the limit and dense are in all of them.
OURS = {
    "none": ("priority", "topk"),
    "rows": ("topk-residual", "topk-signed"),
    "subspace": ("default",),
}
BASELINES = {
    "none": ("crs", "bernoulli-crs", "bernoulli-crs-code", "topk-crs", "vcas", "wta-crs"),
    "rows": ("authors",),
    "subspace": ("vcas",),
}

#: Speed-ups over dense that were asked for on two cores, by (M, 1/ratio) and setting.
WANTED = {
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
WANTED_SHAPES = ((8192, 1024, 1024), (4096, 2048, 2048))


def wanted(problem: Problem, names: tuple[str, ...]) -> dict[str, float]:
    """The wanted speed-ups of these settings on this problem, if any were set."""
    plain = Problem(problem.m, problem.n, problem.p, problem.ratio)
    if problem != plain or (problem.m, problem.n, problem.p) not in WANTED_SHAPES:
        return {}
    targets = WANTED.get((problem.m, round(1 / problem.ratio)), {})
    return {name: targets[name] for name in names if name in targets}


def family_of(setting: str) -> str:
    """The family of one of `SETTINGS`."""
    return next(family for family, names in OURS.items() if setting in names)


def family(problem: Problem, memory: str) -> list[Method]:
    """Every method of a family on one problem, with operands of its own."""
    x, g = problem.operands()
    return [
        dense(x, g),
        *(ours(name, problem, x, g) for name in OURS[memory]),
        *(baseline(name, problem, x, g) for name in BASELINES[memory]),
        *([compiled(problem, x, g)] if problem.device == "cuda" and memory == "none" else []),
        limit(memory, problem, x, g),
    ]


def selected(problem: Problem, names: tuple[str, ...]) -> list[Method]:
    """Dense and some of `SETTINGS` and `baselines.METHODS` on one problem."""
    x, g = problem.operands()
    others = [n for n in names if n not in SETTINGS]
    return [
        dense(x, g),
        *(ours(name, problem, x, g) for name in names if name in SETTINGS),
        *(baseline(name, problem, x, g) for name in others),
    ]


def dense(x: Tensor, g: Tensor) -> Method:
    """Gᵀ X by the library that PyTorch was built with; cuBLAS or hipBLAS on a GPU."""
    return Method("dense", "dense", "dense", lambda: baselines.dense(x, g))


def ours(setting: str, problem: Problem, x: Tensor, g: Tensor) -> Method:
    """One of `SETTINGS`: scores, selection, GEMM and memory."""
    config = problem.config(**SETTINGS[setting])
    memory = new_memory(config, problem.n, problem.p)
    return Method(
        setting,
        "ours",
        _LABELS[setting],
        lambda: weight_grad(x, g, config, memory),
        period=config.period,
        config_source=functools.partial(config_source, x),
    )


def baseline(name: str, problem: Problem, x: Tensor, g: Tensor) -> Method:
    """One of `baselines.METHODS`, with the same number of rows."""
    method = baselines.METHODS[name]
    call = method.make(problem.k)
    note = None if method.is_unbiased else "biased"
    return Method(name, "baseline", method.label, lambda: call(x, g), note=note)


def compiled(problem: Problem, x: Tensor, g: Tensor) -> Method:
    """Top-k sampling without memory, as `torch.compile` makes it."""
    call = torch.compile(functools.partial(baselines.topk_crs, k=problem.k), dynamic=False)
    label = "top-k, torch.compile"
    return Method("topk-compiled", "baseline", label, lambda: call(x, g), note="biased")


def limit(memory: str, problem: Problem, x: Tensor, g: Tensor) -> Method:
    """The unavoidable work of a family."""
    rows = problem.k
    label = "GEMM of K rows that lie together + a pass over X and G"
    touch: Callable[[], object] = functools.partial(_read, x, g)
    if memory == "rows":
        label += " and their memories"
        slots = torch.zeros_like(x), torch.zeros_like(g)
        touch = functools.partial(_update, slots, x, g)
    elif memory == "subspace":
        rank = problem.config().rank_for(problem.m, problem.n, problem.p)
        rows += round(problem.m * rank * (problem.n + problem.p) / (problem.n * problem.p))
        label = f"GEMM of {rows} rows that lie together + a pass over X and G"
    few_x, few_g = x[:rows].clone(), g[:rows].clone()

    def call() -> Tensor:
        touch()
        return few_g.t() @ few_x

    return Method("limit", "limit", label, call)


def layers(problem: Problem, variants: Sequence[tuple[str, str]]) -> list[Method]:
    """Forward and backward of a linear layer: dense, and pairs of a setting and `grad_input`."""
    x, g = problem.operands()
    x.requires_grad_()
    methods = [Method("dense", "dense", "dense", _layer_step(problem, x, g, None))]
    for setting, grad_input in variants:
        config = problem.config_of_layer(grad_input, **SETTINGS[setting])
        name = variant_name(setting, grad_input)
        call = _layer_step(problem, x, g, config)
        period = config.period
        source = functools.partial(config_source, x)
        methods.append(Method(name, "ours", name, call, period, config_source=source))
    return methods


def variant_name(setting: str, grad_input: str) -> str:
    """Name of a setting with an exact, sampled or projected input gradient."""
    return setting if grad_input == "exact" else f"{setting}, {grad_input} dX"


def _layer_step(
    problem: Problem, x: Tensor, g: Tensor, config: MemAOPConfig | None
) -> Callable[[], object]:
    layer = nn.Linear(problem.n, problem.p, device=x.device, dtype=x.dtype)
    if config is not None:
        convert_(layer, config)

    def step() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(g)

    return step


def config_source(a: Tensor) -> str:
    """What computes on tensors like `a`, and on a GPU where configurations came from so far."""
    if dispatch.runs_triton(a):
        from memaop_triton.kernels.tuning import tuner

        origins = sorted({choice.origin for choice in tuner.choices().values()})
        return f"Triton, {' and '.join(origins) or 'nothing launched'}"
    compiled_passes = a.dtype in library.DTYPES and library.is_compiled()
    return "PyTorch + C" if a.device.type == "cpu" and compiled_passes else "PyTorch"


def _read(x: Tensor, g: Tensor) -> None:
    if x.is_cuda:  # where a sum over everything takes a second kernel
        torch.linalg.vector_norm(x, dim=1)
        torch.linalg.vector_norm(g, dim=1)
    else:
        x.sum()
        g.sum()


def _update(slots: tuple[Tensor, Tensor], x: Tensor, g: Tensor) -> None:
    slots[0].add_(x)
    slots[1].add_(g)
