"""The methods that are compared on a weight gradient: dense, ours, the literature's, the limit.

There are three families, by what is kept between calls, because the unavoidable work differs. The
limit is a GEMM of K contiguous rows, and one pass over the data that a family has to read or write:

| memory | pass | rows of the GEMM |
|---|---|---|
| none | X and G are read | K |
| residual | X, G and their memories are read, the memories written | K |
| subspace | X and G are read | K + M q (N + P)/(N P), which have the FLOPs of X Q and Gᵀ Z |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memaop_triton import MemAOPConfig, convert_, new_memory
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.bench.measure import Method
from memaop_triton.bench.report import methods
from memaop_triton.bench.suites import baselines
from memaop_triton.bench.suites.problem import Problem

#: Our configurations by name.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "priority": {"selection": "priority", "memory": "none"},
    "topk": {"selection": "topk", "memory": "none"},
    "topk-residual": {"selection": "topk", "memory": "residual"},
    "topk-signed": {"selection": "topk", "memory": "signed"},
}
#: The literature's methods that keep nothing between calls.
SAMPLERS = ("crs", "bernoulli-crs", "bernoulli-crs-code", "topk-crs", "vcas", "wta-crs")
#: What is compared in each family; the limit and dense are in all of them.
FAMILIES = {
    "none": ("priority", "topk", *SAMPLERS),
    "residual": ("topk-residual", "topk-signed", "authors"),
    "subspace": ("default", "vcas"),
}

#: Target speed-ups over dense on two cores, by (M, 1/ratio) and setting.
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


def wanted(problem: Problem) -> dict[str, float]:
    """The target speed-ups on this problem by setting, if there are any."""
    plain = Problem(problem.m, problem.n, problem.p, problem.ratio)
    if problem != plain or (problem.m, problem.n, problem.p) not in WANTED_SHAPES:
        return {}
    return WANTED.get((problem.m, round(1 / problem.ratio)), {})


def family(problem: Problem, memory: str) -> list[Method]:
    """Every method of a family on one problem, with operands of its own."""
    names = FAMILIES[memory]
    if problem.device == "cuda" and memory == "none":
        names += ("topk-compiled",)
    return selected(problem, names, memory)


def selected(problem: Problem, names: Sequence[str], memory: str | None = None) -> list[Method]:
    """Dense, some of `SETTINGS` and `baselines`, and with `memory` that family's limit."""
    x, g = problem.operands()
    found = [Method("dense", "dense", "dense", lambda: g.t() @ x)]
    for name in names:
        if name in SETTINGS:
            found.append(ours(name, problem, x, g))
        else:
            call = functools.partial(baselines.make(name, problem.k), x, g)
            found.append(Method(name, "baseline", methods.BASELINES[name].text, call))
    return found if memory is None else [*found, limit(memory, problem, x, g)]


def ours(setting: str, problem: Problem, x: Tensor, g: Tensor) -> Method:
    """One of `SETTINGS`: scores, selection, GEMM and memory."""
    config = problem.config(**SETTINGS[setting])
    memory = new_memory(config, problem.n, problem.p)
    label = methods.OURS[setting].text
    return Method(setting, "ours", label, lambda: weight_grad(x, g, config, memory), config.period)


def limit(memory: str, problem: Problem, x: Tensor, g: Tensor) -> Method:
    """The unavoidable work of a family."""
    rows = problem.k
    touched = "X and G"
    touch: Callable[[], object] = functools.partial(_read, x, g)
    if memory == "residual":
        touched += " and their memories"
        slots = torch.zeros_like(x), torch.zeros_like(g)
        touch = functools.partial(_update, slots, x, g)
    elif memory == "subspace":
        rank = problem.config().rank_for(problem.m, problem.n, problem.p)
        rows += round(problem.m * rank * (problem.n + problem.p) / (problem.n * problem.p))
    few_x, few_g = x[:rows].clone(), g[:rows].clone()

    def call() -> Tensor:
        touch()
        return few_g.t() @ few_x

    label = f"GEMM of {rows} rows that lie together + a pass over {touched}"
    return Method("limit", "limit", label, call)


def converted(
    problem: Problem,
    variants: Sequence[tuple[str, str]],
    make: Callable[[MemAOPConfig | None], Callable[[], object]],
) -> list[Method]:
    """What `make` builds, dense and with a configuration for each setting and `grad_input`."""
    found = [Method("dense", "dense", "dense", make(None))]
    for setting, grad_input in variants:
        config = problem.config_of_layer(grad_input, **SETTINGS[setting])
        name = setting if grad_input == "exact" else f"{setting}, {grad_input} dX"
        found.append(Method(name, "ours", name, make(config), config.period))
    return found


def layers(problem: Problem, variants: Sequence[tuple[str, str]]) -> list[Method]:
    """Forward and backward of a linear layer: dense, and pairs of a setting and `grad_input`."""
    x, g = problem.operands()
    x.requires_grad_()

    def make(config: MemAOPConfig | None) -> Callable[[], object]:
        layer = nn.Linear(problem.n, problem.p, device=x.device, dtype=x.dtype)
        if config is not None:
            convert_(layer, config)

        def step() -> None:
            x.grad = None
            layer.zero_grad()
            layer(x).backward(g)

        return step

    return converted(problem, variants, make)


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
