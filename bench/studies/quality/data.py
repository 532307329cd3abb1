"""The data of the tasks, read from files."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from memaop_triton.bench.studies.quality.batches import Batch, Data, ImageData, TextData
from memaop_triton.bench.studies.quality.networks import Gpt
from memaop_triton.bench.studies.quality.tasks import Task
from memaop_triton.experiments.bert import MiniLm
from memaop_triton.experiments.data import DataError, load_images, load_text
from memaop_triton.experiments.posts import load_texts

_HELD_OUT = 0.05  # of a text


def load(task: Task, data_dir: Path | None) -> Data:
    """The data of a task, read once per process.

    Raises:
        DataError: The data is missing or is not what it should be.
        CommandError: scikit-learn is needed to fetch it and not installed.
    """
    if isinstance(task.network, MiniLm):
        texts = load_texts(task.data, data_dir)
        return ImageData(Batch(texts.x_train, texts.y_train), Batch(texts.x_test, texts.y_test))
    if not isinstance(task.network, Gpt):
        return _images(task.data, data_dir)
    codes, count = _codes(task.data, data_dir)
    if count > task.network.vocabulary:
        raise DataError(
            f"{task.data} has {count} different characters, the network of {task.name} takes "
            f"{task.network.vocabulary}."
        )
    cut = len(codes) - round(_HELD_OUT * len(codes))
    return TextData(codes[:cut], codes[cut:], task.network.context)


@functools.cache
def _images(name: str, data_dir: Path | None) -> ImageData:
    images = load_images(name, data_dir)
    return ImageData(Batch(images.x_train, images.y_train), Batch(images.x_test, images.y_test))


@functools.cache
def _codes(name: str, data_dir: Path | None) -> tuple[Tensor, int]:
    text = load_text(name, data_dir)
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text]), len(number)


def first_batch(data: Data, size: int) -> Batch:
    """One batch, always the same."""
    return next(data.batches(size, 1, torch.Generator().manual_seed(0)))
