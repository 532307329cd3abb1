"""What a layer costs the host beyond a dense one: `python -m bench.host_overhead`.

The kernels are compiled, and every call goes through the driver's launcher, with a driver that does
nothing (`no_driver.py`). The rows are few, so that what PyTorch computes on the CPU in place of a
GPU is small, and it is subtracted: a dense layer computes the same forward pass and dX, and its dW.
The times of layers are medians over rounds, in each of which all settings take turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from memaop_triton import MemAOPConfig, MemAOPLinear, Subspace
from memaop_triton.bench import no_driver

ROWS, WIDTH = 64, 32
ROUNDS = 40
CALLS = 32  # of which one chooses a side of the subspace, and four refresh it
SETTINGS = {
    "no memory": MemAOPConfig(memory=None),
    "topk, no memory": MemAOPConfig(selection="topk", memory=None),
    "row memory": MemAOPConfig(selection="topk", memory="residual"),
    "default": MemAOPConfig(),
    "default without refreshes": MemAOPConfig(memory=Subspace(refresh_every=1 << 30)),
}


def step_of(layer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> Callable[[], None]:
    """A forward and a backward pass of one layer, as in the middle of a network."""

    def step() -> None:
        layer(x).backward(g)

    return step


def seconds(step: Callable[[], None]) -> float:
    """Of one call, the mean of some."""
    start = time.perf_counter()
    for _ in range(CALLS):
        step()
    return (time.perf_counter() - start) / CALLS


def measure(settings: dict[str, MemAOPConfig]) -> dict[str, list[float]]:
    """Microseconds beyond a dense layer, of every setting and round."""
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    g = torch.randn(ROWS, WIDTH)
    layers = {"dense": nn.Linear(WIDTH, WIDTH)} | {
        name: MemAOPLinear(WIDTH, WIDTH, config=config) for name, config in settings.items()
    }
    steps = {name: step_of(layer, x, g) for name, layer in layers.items()}
    for step in steps.values():
        for _ in range(3 * CALLS):  # compiles, makes memories
            step()
    found: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(ROUNDS):
        times = {name: seconds(step) for name, step in steps.items()}
        for name in settings:
            found[name].append(1e6 * (times[name] - times["dense"]))
    return found


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    with no_driver.active():
        found = measure(SETTINGS)
    sys.stdout.write(f"{'microseconds beyond dense':28}{'median':>8}{'quartiles':>16}\n")
    for name, times in found.items():
        low, middle, high = statistics.quantiles(times, n=4)
        sys.stdout.write(f"{name:28}{middle:8.0f}{low:8.0f}{high:8.0f}\n")


if __name__ == "__main__":
    main()
