"""Loaders for the data sets: from a directory of files, or else through scikit-learn.

The project ships no data. `digits` comes with scikit-learn; the others are read from the directory
that `--data-dir` or the environment variable `MEMAOP_TRITON_DATA_DIR` names, and fetched from
OpenML if neither is set.
"""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memaop_triton.errors import CommandError, require_extra

DATA_DIR_VARIABLE = "MEMAOP_TRITON_DATA_DIR"
CLASSES = 10

_OPENML_NAMES = {"mnist": "mnist_784", "fashion_mnist": "Fashion-MNIST"}
_ENERGY_SHAPE = (768, 10)
_WITHOUT_FILES = f"without --data-dir and {DATA_DIR_VARIABLE} it comes from OpenML"
_TEXT_SOURCES = {
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    )
}


class DataError(CommandError):
    """A data set is missing or is not what it should be."""


class Examples(NamedTuple):
    """A classification set; a row is an image of pixels in [0, 1], or the tokens of a text.

    Attributes:
        x_train: [examples, pixels] float32 or [examples, tokens] int64.
        y_train: [examples] int64.
        x_test: [test examples, pixels or tokens].
        y_test: [test examples] int64.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load_images(name: str, data_dir: Path | None = None) -> Examples:
    """The data set `"digits"`, `"mnist"` or `"fashion_mnist"`.

    Args:
        name: Which one. `digits` (1,437 training and 360 test images of 8×8) needs no file.
        data_dir: Holds `mnist.npz` or `fashion_mnist.npz` with the arrays `x_train`, `y_train`,
            `x_test` and `y_test`, uint8; `None` fetches them from OpenML.

    Raises:
        DataError: The file is missing or not as described, or the download failed.
        CommandError: scikit-learn is needed and not installed.
    """
    if name == "digits":
        return _digits()
    return _fetch_images(name) if data_dir is None else _read_images(data_dir, name)


def load_energy(data_dir: Path | None = None) -> npt.NDArray[np.float64]:
    """The UCI energy efficiency data, [768, 10]: eight features, heating load, cooling load.

    Args:
        data_dir: Holds `energy_efficiency.csv` with a header; `None` fetches OpenML's set 1472.

    Raises:
        DataError: The file is missing or not as described, or the download failed.
        CommandError: scikit-learn is needed and not installed.
    """
    if data_dir is None:
        table, source = _fetch_energy(), "OpenML's data set 1472"
    else:
        path = _existing(data_dir, "energy_efficiency.csv", _WITHOUT_FILES)
        source = str(path)
        try:
            table = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
        except ValueError as error:
            raise DataError(f"{path} is not a table of numbers below a header: {error}") from None
    if table.shape != _ENERGY_SHAPE:
        raise DataError(f"{source} has shape {table.shape}, the energy data has {_ENERGY_SHAPE}.")
    return table


def load_text(name: str, data_dir: Path | None = None) -> str:
    """The text `"tinyshakespeare"`, 1.1 million characters.

    Args:
        name: Which one.
        data_dir: Holds `tinyshakespeare.txt`. OpenML has no texts, so nothing is fetched without.

    Raises:
        DataError: The file is missing or not UTF-8.
    """
    source = f"the file is {_TEXT_SOURCES[name]}"
    if data_dir is None:
        raise DataError(
            f"{name}.txt is not downloaded by itself: {source}; put it into a directory and name "
            f"that with --data-dir or {DATA_DIR_VARIABLE}."
        )
    path = _existing(data_dir, f"{name}.txt", source)
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): {source}.") from None


def _digits() -> Examples:
    require_extra("demo", "sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        x / 16, y, test_size=0.2, random_state=0, stratify=y
    )
    return _images(x_train, y_train, x_test, y_test)


def _images(x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> Examples:
    def rows(x: Any) -> Tensor:
        return torch.from_numpy(np.asarray(x, np.float32).reshape(len(x), -1))

    def labels(y: Any) -> Tensor:
        return torch.from_numpy(np.asarray(y, np.int64))

    return Examples(rows(x_train), labels(y_train), rows(x_test), labels(y_test))


def _existing(data_dir: Path, name: str, where_from: str) -> Path:
    path = data_dir / name
    if not path.is_file():
        raise DataError(
            f"--data-dir={data_dir} has no file {name}: put it there, or name the directory that "
            f"holds it; {where_from}."
        )
    return path


def _read_images(data_dir: Path, name: str) -> Examples:
    path = _existing(data_dir, f"{name}.npz", _WITHOUT_FILES)
    try:
        with np.load(path) as archive:
            x_train, y_train, x_test, y_test = (archive[field] for field in Examples._fields)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is not an archive of {', '.join(Examples._fields)}: {error}"
        ) from None
    for x, y in ((x_train, y_train), (x_test, y_test)):
        if x.dtype != np.uint8 or x.ndim < 2 or y.shape != (len(x),) or y.max() >= CLASSES:
            raise DataError(
                f"{path} must hold uint8 images with one label of 0 to {CLASSES - 1} each, got "
                f"{x.dtype} images {x.shape} and labels {y.shape}."
            )
    scale = np.float32(255)
    return _images(x_train / scale, y_train, x_test / scale, y_test)


def _fetch_images(name: str) -> Examples:
    bunch = _fetch_openml(name, name=_OPENML_NAMES[name], version=1)
    x = np.asarray(bunch.data, np.float32) / np.float32(255)
    y = np.asarray(bunch.target).astype(np.int64)
    # OpenML holds the training images first, in one table with the test images.
    return _images(x[:60_000], y[:60_000], x[60_000:], y[60_000:])


def _fetch_energy() -> npt.NDArray[np.float64]:
    bunch = _fetch_openml("energy", data_id=1472, target_column=None)
    columns = []
    for name, column in zip(bunch.feature_names, np.asarray(bunch.data).T, strict=True):
        values = bunch.categories.get(name) if bunch.categories else None
        if values is not None and all(isinstance(code, (int, float)) for code in column):
            column = np.asarray(values)[column.astype(np.int64)]
        columns.append(column.astype(np.float64))
    return np.stack(columns, axis=1)


def _fetch_openml(what: str, **query: Any) -> Any:
    require_extra("demo", "sklearn")
    from sklearn.datasets import fetch_openml

    parser = "liac-arff" if importlib.util.find_spec("pandas") is None else "pandas"
    try:
        return fetch_openml(as_frame=False, parser=parser, **query)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"the {what} data could not be fetched from OpenML ({reason}): download it elsewhere "
            f"and name its directory with --data-dir or {DATA_DIR_VARIABLE}."
        ) from None
