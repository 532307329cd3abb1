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
_PROMPTED = "-prompted"  # ends the name of a text of which half of each sequence is a prompt
_SHIFTED = "-shifted"  # ends the name of images that are moved by up to so many pixels
_SHIFT = 2
# A BERT reads a text in some ten milliseconds: it is judged by at most so many, evenly spread, and
# its curves by some of these.
_JUDGED_TEXTS, _TEXTS_OF_A_CURVE = 2_500, 300


def load(task: Task, data_dir: Path | None) -> Data:
    """The data of a task, read once per process.

    Raises:
        DataError: The data is missing or is not what it should be.
        CommandError: scikit-learn is needed to fetch it and not installed.
    """
    if isinstance(task.network, MiniLm):
        return _texts(task.data, data_dir)
    if not isinstance(task.network, Gpt):
        return _images(task.data, data_dir)
    codes, count = _codes(task.data.removesuffix(_PROMPTED), data_dir)
    if count > task.network.vocabulary:
        raise DataError(
            f"{task.data} has {count} different characters, the network of {task.name} takes "
            f"{task.network.vocabulary}."
        )
    cut = len(codes) - round(_HELD_OUT * len(codes))
    context = task.network.context
    prompt = context // 2 if task.data.endswith(_PROMPTED) else 0
    return TextData(codes[:cut], codes[cut:], context, prompt)


def _texts(name: str, data_dir: Path | None) -> ImageData:
    texts = load_texts(name, data_dir)
    every = max(1, len(texts.y_test) // _JUDGED_TEXTS)
    held_out = Batch(texts.x_test[::every], texts.y_test[::every])
    return ImageData(Batch(texts.x_train, texts.y_train), held_out, _TEXTS_OF_A_CURVE)


@functools.cache
def _images(name: str, data_dir: Path | None) -> ImageData:
    images = load_images(name.removesuffix(_SHIFTED), data_dir)
    train, test = Batch(images.x_train, images.y_train), Batch(images.x_test, images.y_test)
    return ImageData(train, test, shift=_SHIFT if name.endswith(_SHIFTED) else 0)


@functools.cache
def _codes(name: str, data_dir: Path | None) -> tuple[Tensor, int]:
    text = load_text(name, data_dir)
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text]), len(number)


def first_batch(data: Data, size: int) -> Batch:
    """One batch, always the same."""
    return next(data.batches(size, 1, torch.Generator().manual_seed(0)))
