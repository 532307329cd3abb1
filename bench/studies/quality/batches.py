"""Batches for training, and fixed samples to judge by.

Learning rates are tuned on a part of the training data (`for_tuning`), so that the data that a run
is judged by has not been used for tuning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

#: The class of a target that does not count.
MASKED = -100

_SAMPLE_SEQUENCES = 64


class Batch(NamedTuple):
    """Inputs and targets.

    Attributes:
        x: [B, pixels] float32, or [B, T] characters, int64.
        y: [B] or [B, T], int64; `MASKED` where nothing is to be predicted.
    """

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class ImageData:
    """Batches of images or texts to train on, and others held out to judge by.

    They come in shuffled passes; a batch may hold the end of one and the start of the next.

    Attributes:
        train: All that batches are made of.
        held_out: All that a run is judged by.
        sample_size: How many of these the points of a curve are of.
        shift: Pixels by which images to train on, square ones, are moved at most, to either side.
    """

    train: Batch
    held_out: Batch
    sample_size: int = 2_000
    shift: int = 0

    @property
    def sample(self) -> Batch:
        """Some of those held out, always the same, for curves."""
        order = torch.randperm(len(self.held_out.y), generator=torch.Generator().manual_seed(0))
        chosen = order[: self.sample_size]
        return Batch(self.held_out.x[chosen], self.held_out.y[chosen])

    def batches(self, size: int, steps: int, generator: torch.Generator) -> Iterator[Batch]:
        """`steps` batches of `size` images."""
        left = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(left) < size:
                left = torch.cat([left, torch.randperm(len(self.train.y), generator=generator)])
            rows, left = left[:size], left[size:]
            x = self.train.x[rows]
            yield Batch(_moved(x, self.shift, generator) if self.shift else x, self.train.y[rows])

    def for_tuning(self) -> ImageData:
        """The last sixth of the training set held out."""
        x, y = self.train
        cut = len(y) - len(y) // 6
        train, rest = Batch(x[:cut], y[:cut]), Batch(x[cut:], y[cut:])
        return ImageData(train, rest, self.sample_size, self.shift)


def _moved(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Square images, [B, side²], each by a random number of pixels; what comes in is zero."""
    side = math.isqrt(x.shape[1])
    padded = F.pad(x.view(-1, side, side), (most,) * 4)
    down, right = torch.randint(2 * most + 1, (2, len(x), 1, 1), generator=generator)
    along = torch.arange(side)
    image = torch.arange(len(x)).view(-1, 1, 1)
    return padded[image, down + along.view(-1, 1), right + along].flatten(1)


@dataclass(frozen=True)
class TextData:
    """A text cut into sequences: at random to train on, one after the other to judge by.

    Attributes:
        train: [characters] int64.
        rest: [characters] int64, held out.
        context: Characters of a sequence.
        prompt: Of these, how many at its start are not predicted.
    """

    train: Tensor
    rest: Tensor
    context: int
    prompt: int = 0

    @property
    def held_out(self) -> Batch:
        """All whole sequences of the part held out."""
        count = (len(self.rest) - 1) // self.context
        rows = torch.arange(count)[:, None] * self.context + torch.arange(self.context)
        return self._batch(self.rest, rows)

    @property
    def sample(self) -> Batch:
        """64 of them, evenly spread, for curves."""
        x, y = self.held_out
        chosen = torch.linspace(0, len(x) - 1, min(len(x), _SAMPLE_SEQUENCES)).long()
        return Batch(x[chosen], y[chosen])

    def batches(self, size: int, steps: int, generator: torch.Generator) -> Iterator[Batch]:
        """`steps` batches of `size` sequences."""
        along = torch.arange(self.context)
        for _ in range(steps):
            last = len(self.train) - self.context
            rows = torch.randint(last, (size, 1), generator=generator) + along
            yield self._batch(self.train, rows)

    def for_tuning(self) -> TextData:
        """As much of the training text's end held out as is of the whole text."""
        cut = len(self.train) - len(self.rest)
        return TextData(self.train[:cut], self.train[cut:], self.context, self.prompt)

    def _batch(self, text: Tensor, rows: Tensor) -> Batch:
        y = text[rows + 1]
        y[:, : self.prompt] = MASKED
        return Batch(text[rows], y)


Data = ImageData | TextData
