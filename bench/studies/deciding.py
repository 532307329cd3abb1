"""`ratio="auto"` beside dense at equal seconds: `python -m bench.studies.deciding --data-dir DIR`.

A large MLP on Fashion-MNIST, whose batch is larger than the task needs. Both nets start from the
same weights, see the same batches and take turns; each has its own clock, which stands still while
the other trains and during evaluations. Printed are the test losses over these seconds, and the
decision.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memaop_triton import MemAOPConfig, convert_, model_report
from memaop_triton.experiments.data import load_images


def network(width: int, depth: int, seed: int) -> nn.Sequential:
    """784 pixels, `depth` hidden layers, ten classes."""
    torch.manual_seed(seed)
    sizes = [784, *[width] * depth]
    hidden = [layer for n, p in itertools.pairwise(sizes) for layer in (nn.Linear(n, p), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


@torch.no_grad()
def held_out_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In nats."""
    return F.cross_entropy(model(x.flatten(1)), y).item()


def main() -> None:
    """Train, and print a line every few steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--batch", type=int, default=3072)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    data = load_images("fashion_mnist", settings.data_dir)
    shape = settings.width, settings.depth, settings.seed
    models = {
        "dense": network(*shape),
        "auto": convert_(network(*shape), MemAOPConfig(ratio="auto")),
    }
    optimizers = {name: torch.optim.AdamW(m.parameters(), 3e-4) for name, m in models.items()}
    seconds = dict.fromkeys(models, 0.0)
    generator = torch.Generator().manual_seed(settings.seed)
    print(f"{'step':>5}" + "".join(f"{f'{name}, s':>10}{'loss':>8}" for name in models))
    for step in range(1, settings.steps + 1):
        rows = torch.randint(len(data.x_train), (settings.batch,), generator=generator)
        x, y = data.x_train[rows].flatten(1), data.y_train[rows]
        for name, model in models.items():
            before = time.perf_counter()
            optimizers[name].zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizers[name].step()
            seconds[name] += time.perf_counter() - before
        if step % settings.every == 0:
            losses = {n: held_out_loss(m, data.x_test, data.y_test) for n, m in models.items()}
            print(f"{step:5}" + "".join(f"{seconds[n]:10.1f}{losses[n]:8.4f}" for n in models))
    print(model_report(models["auto"]))


if __name__ == "__main__":
    main()
