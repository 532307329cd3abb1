"""Classified texts as the tokens of a pretrained BERT.

Files, in the data directory: `minilm/tokenizer.json` of all-MiniLM-L6-v2, and for a data set NAME
`NAME_train.tsv.gz` and `NAME_test.tsv.gz` with a line `label<TAB>lower-case words` for every text:
`newsgroups20` (20 Newsgroups) and `reuters_r8` (Reuters-21578, the eight largest classes). They are
read by hand, so that tokenizers need not be installed. Without a directory 20 Newsgroups comes
through scikit-learn, with the tokenizer of the Hugging Face hub.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from memaop_triton.experiments import hub
from memaop_triton.experiments.bert import PAD, existing
from memaop_triton.experiments.data import DATA_DIR_VARIABLE, DataError, Examples

CONTEXT = 64
_UNKNOWN, _CLS, _SEP = 100, 101, 102


def load_texts(name: str, data_dir: Path | None, context: int = CONTEXT) -> Examples:
    """The data set `"newsgroups20"` or `"reuters_r8"`.

    Args:
        name: Which one.
        data_dir: Holds the files; `None` fetches `newsgroups20`.
        context: T, tokens of a text; longer ones are cut.

    Raises:
        DataError: A file is missing, or the download failed.
    """
    return _read(name, data_dir, context) if data_dir is not None else _fetch(name, context)


@functools.cache
def _read(name: str, folder: Path, context: int) -> Examples:
    vocabulary = json.loads(existing(folder / "minilm" / "tokenizer.json").read_text("utf-8"))
    number: dict[str, int] = vocabulary["model"]["vocab"]
    parts = {}
    for part in ("train", "test"):
        path = existing(folder / f"{name}_{part}.tsv.gz")
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
        parts[part] = [line.split("\t", 1) for line in lines]
    labels = {label: i for i, label in enumerate(sorted({label for label, _ in parts["train"]}))}
    return Examples(
        *(
            torch.tensor(values)
            for part in parts.values()
            for values in (
                [tokens(text.split(), number, context) for _, text in part],
                [labels[label] for label, _ in part],
            )
        )
    )


def _fetch(name: str, context: int) -> Examples:
    if name != "newsgroups20":
        raise DataError(
            f"{name} is not downloaded by itself: name the directory that holds it with --data-dir "
            f"or {DATA_DIR_VARIABLE}."
        )
    found = []
    for part in ("train", "test"):
        texts, labels = hub.newsgroups(part)
        found += [torch.tensor(hub.tokens_of(texts, context)), torch.tensor(labels)]
    return Examples(*found)


def tokens(words: Iterable[str], number: dict[str, int], context: int = CONTEXT) -> list[int]:
    """`context` numbers for a text: its start, word pieces, and an end, filled up with 0.

    A word is cut into the longest pieces that the vocabulary has, from its start on.
    """
    found = [_CLS]
    for word in words:
        found += _pieces(word, number)
        if len(found) >= context:
            break
    found = [*found[: context - 1], _SEP]
    return found + [PAD] * (context - len(found))


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
