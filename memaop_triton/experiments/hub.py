"""The pretrained BERT from the Hugging Face hub, and 20 Newsgroups through scikit-learn.

What `bert` and `posts` use without a data directory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from memaop_triton.errors import CommandError, require_extra
from memaop_triton.experiments.data import DATA_DIR_VARIABLE, DataError

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_ELSEWHERE = (
    "name the directory that holds the weights and texts of the pretrained BERT with --data-dir or "
    f"{DATA_DIR_VARIABLE}."
)
_Found = TypeVar("_Found")


def pretrained_weights() -> Mapping[str, Tensor]:
    """The model's weights, by its own names.

    Raises:
        DataError: transformers is not installed, or the download failed.
    """
    _require("transformers")
    from transformers import AutoModel

    model = _fetched(f"the weights {MODEL}", lambda: AutoModel.from_pretrained(MODEL))
    weights: Mapping[str, Tensor] = model.state_dict()
    return weights


def tokens_of(texts: Iterable[str], context: int) -> list[list[int]]:
    """`context` numbers for every text: its start, word pieces, an end, filled up with 0.

    Raises:
        DataError: transformers is not installed, or the download failed.
    """
    _require("transformers")
    from transformers import AutoTokenizer

    tokenizer = _fetched(f"the tokenizer {MODEL}", lambda: AutoTokenizer.from_pretrained(MODEL))
    found = tokenizer(list(texts), truncation=True, padding="max_length", max_length=context)
    numbers: list[list[int]] = found["input_ids"]
    return numbers


def newsgroups(part: str) -> tuple[list[str], list[int]]:
    """Subjects and bodies of 20 Newsgroups, and their classes, numbered by name.

    Args:
        part: "train" or "test".

    Raises:
        DataError: scikit-learn is not installed, or the download failed.
    """
    _require("sklearn")
    from sklearn.datasets import fetch_20newsgroups

    bunch = _fetched("20 Newsgroups", lambda: fetch_20newsgroups(subset=part, shuffle=False))
    return [_subject_and_body(post) for post in bunch.data], [int(label) for label in bunch.target]


def _subject_and_body(post: str) -> str:
    """Without the other headers, among which is the group."""
    headers, _, body = post.partition("\n\n")
    subject = re.search(r"^Subject:(.*)$", headers, re.MULTILINE)
    return f"{subject[1].strip() if subject else ''}\n{body}"


def _require(module: str) -> None:
    try:
        require_extra("finetune", module)
    except CommandError as error:
        raise DataError(f"{error} Or {_ELSEWHERE}") from None


def _fetched(what: str, fetch: Callable[[], _Found]) -> _Found:
    try:
        return fetch()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{what} could not be fetched ({reason}): download elsewhere and {_ELSEWHERE}"
        ) from None
