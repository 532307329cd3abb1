"""Results that the authors of the paper published, to compare with.

Source: the result files of github.com/HernandezEduin/Mem-AOP-GD, energy data, 10 runs a scheme.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from memaop_triton.experiments.errors import DataError
from memaop_triton.experiments.paper import Scheme

RUNS = 10
EPOCHS = 100


class Value(NamedTuple):
    """Mean and sample standard deviation over the authors' runs."""

    mean: float
    sd: float


#: Validation loss after the last epoch, figure 3.
ENERGY = {
    Scheme("dense", "none", None): Value(9.16931, 0.05493),
    Scheme("topk", "residual", 18): Value(9.51740, 0.29015),
    Scheme("topk", "residual", 9): Value(9.88373, 0.49424),
    Scheme("topk", "residual", 3): Value(10.38197, 1.42370),
    Scheme("topk", "none", 18): Value(11.39789, 0.19074),
    Scheme("topk", "none", 9): Value(11.41838, 0.21858),
    Scheme("topk", "none", 3): Value(26.61184, 0.48929),
    Scheme("weightedk", "residual", 18): Value(9.30213, 0.27358),
    Scheme("weightedk", "residual", 9): Value(9.75628, 0.82745),
    Scheme("weightedk", "residual", 3): Value(10.79295, 1.73473),
    Scheme("weightedk", "none", 18): Value(10.62459, 0.13329),
    Scheme("weightedk", "none", 9): Value(11.60270, 0.21301),
    Scheme("weightedk", "none", 3): Value(33.19110, 1.63428),
    Scheme("randk", "residual", 18): Value(9.65826, 0.65862),
    Scheme("randk", "residual", 9): Value(9.88249, 1.08480),
    Scheme("randk", "residual", 3): Value(32.38590, 16.95875),
    Scheme("randk", "none", 18): Value(14.64730, 0.37862),
    Scheme("randk", "none", 9): Value(25.82613, 1.17842),
    Scheme("randk", "none", 3): Value(61.97715, 3.87408),
}


def published_value(experiment: str, scheme: Scheme, epochs: int) -> Value | None:
    """The authors' final loss, `None` where there is none or for another number of epochs."""
    return ENERGY[scheme] if experiment == "energy" and epochs == EPOCHS else None


def published_curves(
    experiment: str, data_dir: Path | None
) -> dict[Scheme, npt.NDArray[np.float64]]:
    """The authors' mean validation loss per epoch, if their curves lie beside the data.

    Args:
        experiment: Only `"energy"` has curves.
        data_dir: The curves are read from `energy_curves.csv` in it: columns `selection`,
            `memory`, `k`, `epoch` and `val_loss_mean`.

    Raises:
        DataError: The file is there and cannot be read.
    """
    if experiment != "energy" or data_dir is None:
        return {}
    path = data_dir / "energy_curves.csv"
    if not path.is_file():
        return {}
    curves: dict[Scheme, dict[int, float]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                k = None if row["selection"] == "dense" else int(row["k"])
                scheme = Scheme(row["selection"], row["memory"], k)
                losses = curves.setdefault(scheme, {})
                losses[int(row["epoch"])] = float(row["val_loss_mean"])
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} is not a table of curves: {error!r}") from None
    return {s: np.array([losses[e] for e in sorted(losses)]) for s, losses in curves.items()}
