"""What examples share: arguments, data, and two trainings that take turns and are printed."""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch

from memaop_triton.experiments.data import Examples, load_images, load_text


def arguments(description, steps, **others):
    """`--steps`, and others with their defaults; weights are made from one seed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help="of the optimizer")
    for name, default in others.items():
        parser.add_argument(f"--{name}", default=default)
    torch.manual_seed(0)
    return parser.parse_args()


def data_folder():
    """The folder that MEMAOP_TRITON_DATA_DIR names, if it does."""
    name = os.environ.get("MEMAOP_TRITON_DATA_DIR")
    return Path(name) if name else None


def images() -> Examples:
    """Fashion-MNIST from the data folder, or else the digits of scikit-learn; rows of pixels."""
    folder = data_folder()
    return load_images("fashion_mnist", folder) if folder else load_images("digits")


def text() -> str:
    """Shakespeare from the data folder, or else sums that are made here."""
    folder = data_folder()
    if folder:
        return load_text("tinyshakespeare", folder)
    pairs = torch.randint(100, (5_000, 2), generator=torch.Generator().manual_seed(0)).tolist()
    return "".join(f"{a} + {b} = {a + b}\n" for a, b in pairs)


def rows_of_step(step, count, size):
    """Which `size` of `count` examples a step takes, the same in both trainings."""
    return torch.randint(count, (size,), generator=torch.Generator().manual_seed(step))


def take_turns(steps, **trainings):
    """Losses and seconds, by name, of every `training(step)`, called in turn for its loss."""
    found = {name: ([], []) for name in trainings}
    for step in range(steps):
        for name, training in trainings.items():
            start = time.perf_counter()
            loss = float(training(step))
            found[name][1].append(time.perf_counter() - start)
            found[name][0].append(loss)
    return found


def one_by_one(steps, **trainings):
    """The same, one after the other: `ratio="auto"` takes the time of whole steps itself."""
    parts = [take_turns(steps, **{name: training}) for name, training in trainings.items()]
    return {name: result for part in parts for name, result in part.items()}


def show(found, **columns):
    """Print the mean loss of the last tenth and the median time of a step, dense above ours.

    `columns` has more of them: a heading, and one text for each training.
    """
    print(f"{'':12}{'loss':>8}{'ms a step':>11}", *(f"{name:>14}" for name in columns))
    medians = [1e3 * statistics.median(seconds) for _, seconds in found.values()]
    for i, (name, (losses, _)) in enumerate(found.items()):
        loss = statistics.fmean(losses[-max(1, len(losses) // 10) :])
        more = (f"{texts[i]:>14}" for texts in columns.values())
        print(f"{name:12}{loss:8.4f}{medians[i]:11.2f}", *more)
    print(f"saved: {1 - medians[-1] / medians[0]:.0%} of the time of a step")
