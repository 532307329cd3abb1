"""20 Newsgroups as the tokens of a pretrained BERT.

Files, in the data directory: `minilm/tokenizer.json` of all-MiniLM-L6-v2, and
`newsgroups20_train.tsv.gz` and `newsgroups20_test.tsv.gz` with a line `label<TAB>lower-case words`
for every post. They are read by hand, so that tokenizers need not be installed.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from memaop_triton.bench.studies.quality.batches import Batch, ImageData
from memaop_triton.bench.studies.quality.bert import PAD, existing, folder_of

CONTEXT = 64
_UNKNOWN, _CLS, _SEP = 100, 101, 102


def load(data_dir: Path | None) -> ImageData:
    """The posts of 20 Newsgroups as `CONTEXT` tokens each, and their classes.

    Raises:
        DataError: A file is missing.
    """
    return _posts(folder_of(data_dir))


@functools.cache
def _posts(folder: Path) -> ImageData:
    vocabulary = json.loads(existing(folder / "minilm" / "tokenizer.json").read_text("utf-8"))
    number: dict[str, int] = vocabulary["model"]["vocab"]
    parts = {}
    for name in ("train", "test"):
        path = existing(folder / f"newsgroups20_{name}.tsv.gz")
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
        parts[name] = [line.split("\t", 1) for line in lines]
    labels = {label: i for i, label in enumerate(sorted({label for label, _ in parts["train"]}))}
    train, test = (
        Batch(
            torch.tensor([tokens(text.split(), number) for _, text in part]),
            torch.tensor([labels[label] for label, _ in part]),
        )
        for part in parts.values()
    )
    return ImageData(train, test)


def tokens(words: Iterable[str], number: dict[str, int]) -> list[int]:
    """`CONTEXT` numbers for a text: its start, word pieces, and an end, filled up with 0.

    A word is cut into the longest pieces that the vocabulary has, from its start on.
    """
    found = [_CLS]
    for word in words:
        found += _pieces(word, number)
        if len(found) >= CONTEXT:
            break
    found = [*found[: CONTEXT - 1], _SEP]
    return found + [PAD] * (CONTEXT - len(found))


def _pieces(word: str, number: dict[str, int]) -> list[int]:
    found, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        ends = range(len(word), start, -1)
        end = next((e for e in ends if prefix + word[start:e] in number), None)
        if end is None:
            return [_UNKNOWN]
        found.append(number[prefix + word[start:end]])
        start = end
    return found
