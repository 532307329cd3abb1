"""A pretrained BERT that learns to classify texts."""

from __future__ import annotations

import dataclasses
import functools

import torch

from memaop_triton import MemAOPConfig
from memaop_triton.experiments.bert import MiniLm
from memaop_triton.experiments.data import Examples
from memaop_triton.experiments.demo.training import Scheme, Training, check_batch
from memaop_triton.experiments.posts import CONTEXT

_EVALUATIONS = 6
#: Texts of the test set that are classified at every evaluation, drawn at random: all of 20
#: Newsgroups would take as long as the training.
TESTED = 500


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to train: `steps` batches of `batch_size` texts of `tokens` tokens, `seeds` times.

    `lr` is the first learning rate of AdamW; it falls to zero. The weights come from `MiniLm`.
    """

    dataset: str = "newsgroups20"
    ratio: float = 0.25
    seeds: int = 1
    steps: int = 120
    batch_size: int = 32
    tokens: int = CONTEXT
    lr: float = 1e-4


def schemes(ratio: float) -> list[Scheme]:
    """Dense, "auto", and the default way to compute K = `ratio`·M rows."""
    return [
        Scheme("dense", "dense", None),
        Scheme("auto", "auto (it decides)", MemAOPConfig(ratio="auto")),
        Scheme("default", "priority + subspace", MemAOPConfig(ratio=ratio)),
    ]


def training(settings: Settings, texts: Examples, sizes: MiniLm) -> Training:
    """The training that the settings describe; `sizes` says where the weights are.

    Raises:
        CommandError: A batch is larger than the training set.
        DataError: There are no weights.
    """
    check_batch(settings.batch_size, len(texts.x_train), "texts")
    sizes = dataclasses.replace(sizes, classes=int(texts.y_train.max()) + 1)
    rows = settings.batch_size * settings.tokens
    order = torch.randperm(len(texts.x_test), generator=torch.Generator().manual_seed(0))
    tested = order[:TESTED]
    updated = f"AdamW from {settings.lr:g} to 0"
    return Training(
        name=f"finetune_{settings.dataset}",
        title=f"{settings.dataset}: K/M = {settings.ratio:g}, {settings.batch_size} texts × "
        f"{settings.tokens} tokens, {updated}, {settings.steps} steps",
        network=f"{settings.dataset}: a pretrained BERT of {sizes.depth} layers of {sizes.width} "
        f"units, dW from {100 * settings.ratio:.3g} % of the rows where the ratio is fixed\n"
        f"batches of {rows} tokens, {updated}",
        settings={"task": "finetune", **dataclasses.asdict(settings)},
        schemes=schemes(settings.ratio),
        data=texts._replace(x_test=texts.x_test[tested], y_test=texts.y_test[tested]),
        batch_size=settings.batch_size,
        steps=settings.steps,
        seeds=settings.seeds,
        evaluations=_EVALUATIONS,
        build=sizes.build,
        optimizer=functools.partial(torch.optim.AdamW, lr=settings.lr),
        is_decaying=True,
    )
