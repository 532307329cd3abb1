"""The stage `times`: weight gradients and training steps, beside the vendor's library.

*dense* is PyTorch's Gᵀ X. Every time stands beside what `bench.microscope.predict` says of the same
chip; kernels run the tiles that ship.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from memaop_triton import MemAOPConfig, MemAOPLinear, convert_, new_memory
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.bench.first_run import cases, problems, timing
from memaop_triton.bench.first_run.cases import Case, Place
from memaop_triton.bench.first_run.problems import Shape, Sizes
from memaop_triton.bench.first_run.timing import Method
from memaop_triton.bench.suites import models
from memaop_triton.kernels import targets

DENSE = "dense"
STEP_SETTINGS: dict[str, dict[str, Any]] = {
    "the default": {},
    "no memory, `priority`": {"memory": "none"},
}
_LAUNCHES = 200


def run(place: Place) -> int:
    """The cases of this process."""
    return cases.run(place, all_cases(place))


def all_cases(place: Place) -> Iterator[Case]:
    """What matters most comes first: the stage may be cut off."""
    from bench.microscope import predict

    sizes, timer = problems.sizes(place), timing.timer_for(place.device)
    at = (place, sizes, timer)
    first, *others = predict.INVERSE_RATIOS
    yield Case("rates", partial(rates, *at))
    for shape in sizes.shapes:
        yield _weight_grads(*at, shape, first)
    for net in sizes.nets:
        yield Case(f"step, {net.name}", partial(training_steps, *at, net))
    for inverse in others:
        for shape in sizes.shapes:
            yield _weight_grads(*at, shape, inverse)


def rates(place: Place, sizes: Sizes, timer: Any) -> dict[str, Any]:
    """What the predictions start from: large products, long reads, launches in a row."""
    device = place.device
    size = 64 if place.is_dry else 8192
    a, b = (torch.randn(size, size, device=device).to(sizes.dtype) for _ in range(2))
    long = torch.ones(size, 8 * size, device=device)
    tiny = torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(_LAUNCHES):
            tiny.add_(1)

    methods = [
        Method("product", lambda: a.t() @ b),
        Method("read", long.sum),
        Method("launches", launches),
        Method("nothing", lambda: None),
    ]
    taken = timing.compare(methods, timer, 5)
    chip = targets.current(device).chip
    return {
        "kind": "rates",
        "tflops": {
            "measured": 2e-6 * size**3 / taken["product"]["us"],
            "predicted": chip.flops("half") / 1e12,
        },
        "tb_s": {
            "measured": 1e-6 * long.nbytes / taken["read"]["us"],
            "predicted": chip.memory_rate / 1e12,
        },
        "launch_us": {
            "measured": taken["launches"]["us"] / _LAUNCHES,
            "predicted": 1e6 * _launch_seconds(),
        },
        "nothing_us": taken["nothing"]["us"],
        "cpu_launch_us": taken["launches"]["host_us"] / _LAUNCHES,
    }


def _launch_seconds() -> float:
    from memaop_triton.kernels.tuning.cost_model import LAUNCH

    return LAUNCH


def _weight_grads(place: Place, sizes: Sizes, timer: Any, shape: Shape, inverse: int) -> Case:
    name = f"dW, {' x '.join(map(str, shape))}, 1/{inverse}"
    return Case(name, partial(weight_grads, place, sizes, timer, shape, inverse))


def weight_grads(
    place: Place, sizes: Sizes, timer: Any, shape: Shape, inverse: int
) -> dict[str, Any]:
    """Dense and the settings whose times are predicted, on one shape."""
    from bench.microscope import predict

    m, n, p = shape
    x, g = (torch.randn(m, c, device=place.device).to(sizes.dtype) for c in (n, p))
    target = targets.current(place.device)
    methods = [Method(DENSE, lambda: g.t() @ x)]
    predicted: dict[str, Any] = {DENSE: {"us": 1e6 * predict.dense_product(target, *shape)}}
    for name, setting in predict.SETTINGS.items():
        config = MemAOPConfig(ratio=1 / inverse, **setting)
        memory = new_memory(config, n, p)
        methods.append(Method(name, partial(weight_grad, x, g, config, memory), config.period))
        one = predict.weight_grad(target, shape, config)
        parts = {part: 1e6 * seconds for part, seconds in one.parts.items() if seconds}
        predicted[name] = {"us": 1e6 * one.seconds, "parts": parts}
    return {"kind": "dW", "shape": shape, "inverse": inverse} | _measure(
        place, sizes, timer, methods, predicted
    )


def _measure(
    place: Place, sizes: Sizes, timer: Any, methods: list[Method], predicted: dict[str, Any]
) -> dict[str, Any]:
    measured: dict[str, dict[str, Any]] = dict(timing.compare(methods, timer, sizes.rounds))
    for method in methods:
        one = measured[method.name]
        one["predicted"] = predicted[method.name]
        one["peak_bytes"] = _peak_bytes(method.call, place.device)
        one["kernels"] = timing.kernels_of(method.call, place.device, method.period)
    return {"methods": measured}


def _peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def training_steps(place: Place, sizes: Sizes, timer: Any, net: models.Net) -> dict[str, Any]:
    """Forward, backward and optimizer of a network, dense and converted.

    Predicted is dense as it was measured, less what the layers' weight gradients should save.
    """
    methods, saved = [], {DENSE: 0.0}
    device = str(place.device)
    torch.manual_seed(0)
    dense = models.TrainingStep(net, net.make(), device, sizes.dtype)
    methods.append(Method(DENSE, dense))
    for name, setting in STEP_SETTINGS.items():
        config = MemAOPConfig(ratio=1 / 8, **setting)
        torch.manual_seed(0)
        model = convert_(net.make(), config)
        saved[name] = _saved_seconds(place, net.rows, model, config)
        step = models.TrainingStep(net, model, device, sizes.dtype)
        methods.append(Method(name, step, config.period))
    taken = timing.compare(methods, timer, max(2, sizes.rounds // 3))
    figures: dict[str, dict[str, Any]] = dict(taken)
    for name, seconds in saved.items():
        figures[name]["predicted"] = {"us": figures[DENSE]["us"] - 1e6 * seconds}
    return {"kind": "step", "net": net.name, "inverse": 8, "methods": figures}


def _saved_seconds(place: Place, rows: int, model: torch.nn.Module, config: MemAOPConfig) -> float:
    from bench.microscope import predict

    target, saved = targets.current(place.device), 0.0
    for layer in model.modules():
        if isinstance(layer, MemAOPLinear):
            shape = (rows, layer.in_features, layer.out_features)
            ours = predict.weight_grad(target, shape, config).seconds
            saved += predict.dense_product(target, *shape) - ours
    return saved
