"""The stage `smoke`: every kernel once on small shapes and on real ones, values against float64.

First whole weight gradients as they ship, at the first of the shapes that are timed later, so that
what is compiled here is there; then each kernel by itself on awkward shapes, as the sanitizer runs
them; then every policy and memory, other dtypes, and the other shapes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from memaop_triton import MemAOPConfig, Subspace, convert_
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.bench.first_run import cases, oracle, problems
from memaop_triton.bench.first_run.cases import Case, Place
from memaop_triton.bench.first_run.problems import Shape, Sizes

RATIO = 1 / 8


def run(place: Place) -> int:
    """The cases of this process."""
    # The kernels are judged by PyTorch's own error, which must not be that of tf32.
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return cases.run(place, all_cases(place.device, problems.sizes(place)))


def all_cases(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """What matters most comes first: the stage may be cut off."""
    yield from _as_shipped(device, sizes.shapes[0], sizes.dtype)
    yield from _kernels(device, sizes.dtype)
    yield from _schemes(device, sizes)
    yield from _layers(device, sizes)
    for dtype in sizes.other_dtypes:
        yield from _as_shipped(device, sizes.small, dtype)
    for shape in sizes.shapes[1:]:
        yield from _as_shipped(device, shape, sizes.dtype)


def _steps(config: MemAOPConfig, shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    kind = str(dtype).removeprefix("torch.")
    name = f"{config.selection}, {config.memory_name}, {'x'.join(map(str, shape))}, {kind}"
    if config.block_rows > 1:
        name += f", blocks of {config.block_rows}"
    return Case(name, partial(oracle.check_steps, config, shape, dtype, device))


def _as_shipped(device: torch.device, shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """The settings whose times are predicted."""
    from bench.microscope import predict

    for setting in reversed(predict.SETTINGS.values()):
        yield _steps(MemAOPConfig(ratio=RATIO, **setting), shape, dtype, device)


def _schemes(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """Every policy with every memory; blocks; many rows; a refresh in every step; the mean."""
    from tests.schemes import LEGAL, UNBIASED

    for scheme in LEGAL:
        yield _steps(MemAOPConfig(ratio=RATIO, **scheme), sizes.small, sizes.dtype, device)
    refreshed = MemAOPConfig(ratio=RATIO, memory=Subspace(rank=4, refresh_every=1))
    case = _steps(refreshed, sizes.small, sizes.dtype, device)
    yield dataclasses.replace(case, name=f"{case.name}, refreshed")
    for scheme in UNBIASED:
        config = MemAOPConfig(ratio=1 / 4, memory="none", **scheme)
        mean = partial(check_mean, config, sizes, device)
        yield Case(f"mean of {config.selection}", mean)
    for policy in sizes.policies:
        config = MemAOPConfig(ratio=RATIO, selection=policy, memory="none")
        yield _steps(config, sizes.many_rows, sizes.dtype, device)
    blocks: tuple[dict[str, Any], ...] = (
        {"memory": "none"},
        {},
        {"selection": "topk", "memory": "residual"},
    )
    for setting in blocks:
        config = MemAOPConfig(ratio=RATIO, block_rows=16, **setting)
        yield _steps(config, sizes.small, sizes.dtype, device)


def check_mean(config: MemAOPConfig, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """The mean of many draws of an unbiased gradient lies within its error bars of Gᵀ X.

    Along Gᵀ X itself, where a wrong weight shows most, and along random directions.
    """
    m, n, p = sizes.small
    generator = torch.Generator(device).manual_seed(3)
    # float32, because the weights of half precision are rounded, which is a bias in itself.
    x, g = (torch.randn(m, c, device=device, generator=generator) for c in (n, p))
    exact = (g.double().T @ x.double()).flatten()
    count = sizes.draws
    made = [weight_grad(x, g, config, generator=generator).flatten() for _ in range(count)]
    errors = torch.stack(made).double() - exact
    others = torch.randn(8, exact.numel(), device=device, generator=generator).double()
    along = errors @ torch.cat([exact[None], others]).T
    worst = float((along.mean(0).abs() / (along.std(0) / count**0.5)).max())
    if not worst <= 5:
        raise oracle.WrongResultError(f"the mean is {worst:.1f} standard errors from the exact one")
    return {"standard_errors": worst, "draws": count}


def _layers(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """Layers, forward and backward, with every kind of input gradient."""
    for grad_input in ("exact", "sampled", "projected"):
        call = partial(check_layer, grad_input, sizes, device)
        yield Case(f"layer, {grad_input} dX", call)


def check_layer(grad_input: str, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Output and db of a converted layer are those of the dense one, and so is dX.

    The rows have rank two: a subspace holds all of them, and sampling what is left changes nothing.
    """
    m, n, p = sizes.small
    torch.manual_seed(3)
    dense = nn.Sequential(nn.Linear(n, p, device=device, dtype=sizes.dtype))
    ours = convert_(copy.deepcopy(dense), MemAOPConfig(ratio=1 / 2, grad_input=grad_input))
    inside = torch.randn(m, 2, device=device) @ torch.randn(2, n + p, device=device)
    x, g = inside.to(sizes.dtype).split((n, p), 1)
    found = []
    for net in (dense, ours):
        leaf = x.clone().requires_grad_()
        out = net(leaf)
        out.backward(g)
        *_, bias = net.parameters()
        found.append((out.detach(), bias.grad, leaf.grad))
    tight = torch.finfo(sizes.dtype).eps * 4
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found[1], found[0], strict=True)]
    for what, error, allowed in zip(
        ("output", "db", "dX"),
        errors,
        (tight, tight, tight if grad_input == "exact" else 0.05),
        strict=True,
    ):
        if not error <= allowed:
            raise oracle.WrongResultError(f"{what}: relative error {error:.3g} beside dense")
    return {"errors": errors}


def _kernels(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Each kernel on shapes that no tile divides, as the sanitizer checks it."""
    from tests import kernel_checks as checks
    from tests.curve_checks import check_curves
    from tests.judging import SMALL, drawn_blocks
    from tests.orthonormal_checks import check_product
    from tests.stash_checks import check_rounded

    at = {"device": device}
    rows = torch.arange(0, 45, 3)
    calls: dict[str, Callable[[], object]] = {
        "gather GEMM": partial(checks.check_gather, (70, 40, 24, 33), dtype, weighted=True, **at),
        "gather GEMM, strided": partial(
            checks.check_gather, (45, 17, 33, 20), dtype, "strided", **at
        ),
        "gather GEMM, blocks": partial(
            checks.check_blocks, 70, 16, [0, 2, 4], dtype, weighted=True, split=2, **at
        ),
        "gather GEMM, padded": partial(checks.check_padding, 9, 16, dtype, SMALL, **at),
        "gather GEMM, correction": partial(
            checks.check_gather_correction, 17, dtype, weighted=True, config=SMALL, **at
        ),
        "scores": partial(checks.check_rows_that_are_not_finite, dtype, **at),
        "update": partial(checks.check_update, (21, 33, 17), dtype, dtype, signed=True, **at),
        "update of the rest": partial(
            checks.check_update_of_the_rest, dtype, dtype, bias_grad=True, **at
        ),
        "packed rows": partial(
            checks.check_packed, (45, 33, 17), rows, dtype, dtype, signed=True, **at
        ),
        "packed blocks": partial(
            checks.check_packed, (45, 32, 16), drawn_blocks([0, 2], 16), dtype, dtype,
            signed=False, **at,
        ),
        "projection": partial(checks.check_projection, (45, 40, 5), dtype, **at),
        "projection, special rows": partial(checks.check_special_rows, dtype, **at),
        "gradient": partial(
            checks.check_gradient, (70, 33, 5), dtype, split=3, bias_grad=True, **at
        ),
        "variance curves": partial(check_curves, 70, 6, dtype, **at),
        "whole gradient": partial(checks.check_whole_gradient, 30, dtype, split=2, **at),
        "rescale": partial(check_rescale, dtype, device),
        "stash": partial(check_rounded, (45, 75), 4, dtype, rank=3, **at),
        "stash of bytes": partial(check_rounded, (33, 128), 8, dtype, **at),
    }  # fmt: skip
    if dtype == torch.float32:
        calls["gather GEMM, scaled weights"] = partial(
            checks.check_gather, (70, 40, 24, 33), torch.float16, weighted=True, **at
        )
        calls["basis"] = partial(check_product, "condition 1e6", (65, 17), **at)
        calls["basis, due on the device"] = partial(
            check_product, "random", (70, 5), due=[True], **at
        )
    for name, call in calls.items():
        yield Case(f"kernel: {name}", partial(_no_figures, call))


def _no_figures(call: Callable[[], object]) -> dict[str, Any]:
    torch.manual_seed(0)
    call()
    return {}


def check_rescale(dtype: torch.dtype, device: torch.device) -> None:
    """A matrix times a number, and times 1."""
    from memaop_triton.kernels.gpu.rescale import rescale_

    a = torch.randn(33, 20, device=device).to(dtype)
    before = a.clone()
    for factor in (1.0, 0.25):
        rescale_(a, torch.tensor([factor], device=device))
        if not torch.equal(a, before * factor):
            raise oracle.WrongResultError(f"a matrix times {factor} is wrong")
