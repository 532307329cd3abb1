"""A pretrained BERT that is fine-tuned on 20 Newsgroups: network, weights, tokens, and the task.

Files, in the data directory: `minilm/model.safetensors` and `minilm/tokenizer.json` of
sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), and `newsgroups20_train.tsv.gz` and
`newsgroups20_test.tsv.gz` with a line `label<TAB>lower-case words` for every post. They are read by
hand, so that neither transformers nor tokenizers has to be installed.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memaop_triton.bench.studies.quality.data import Batch, ImageData
from memaop_triton.bench.studies.quality.tasks import Optimizer, Task
from memaop_triton.experiments.data import DATA_DIR_VARIABLE, DataError

CONTEXT = 64
_PAD, _UNKNOWN, _CLS, _SEP = 0, 100, 101, 102


@dataclass(frozen=True)
class MiniLm:
    """BERT of six layers with its pretrained weights, and a classifier on its first token.

    Attributes:
        folder: Where the weights are.
        width: Of the residual stream.
        depth: Layers.
        heads: Of the attention.
        classes: Of the new output layer.
        vocabulary: Different tokens.
        positions: Most tokens of a text.
    """

    folder: Path = field(repr=False)
    width: int = 384
    depth: int = 6
    heads: int = 12
    classes: int = 20
    vocabulary: int = 30_522
    positions: int = 512

    def build(self) -> nn.Module:
        """[B, T] tokens (int64, 0 where there is none) to [B, classes]."""
        model = _Bert(self)
        weights = _read_safetensors(self.folder / "model.safetensors")
        named = {_our_name(name): value for name, value in weights.items()}
        head = {f"head.{name}": value for name, value in model.head.state_dict().items()}
        model.load_state_dict(
            {name: named[name] for name in model.state_dict().keys() - head} | head
        )
        return model


def task(data_dir: Path | None) -> Task:
    """Fine-tuning at the usual rate, 2,048 tokens a step."""
    network = MiniLm(_folder(data_dir) / "minilm")
    optimizer = Optimizer("adamw", 1e-4, weight_decay=0.01, floor=0.0)
    title = "BERT (MiniLM, 6 layers, d=384), pretrained, on 20 Newsgroups"
    return Task("minilm", title, "newsgroups20", network, optimizer, 32, 170, "accuracy")


def load(data_dir: Path | None) -> ImageData:
    """The posts of 20 Newsgroups as `CONTEXT` tokens each, and their classes.

    Raises:
        DataError: A file is missing.
    """
    return _posts(_folder(data_dir))


@functools.cache
def _posts(folder: Path) -> ImageData:
    vocabulary = json.loads(_existing(folder / "minilm" / "tokenizer.json").read_text("utf-8"))
    number: dict[str, int] = vocabulary["model"]["vocab"]
    parts = {}
    for name in ("train", "test"):
        path = _existing(folder / f"newsgroups20_{name}.tsv.gz")
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
    return found + [_PAD] * (CONTEXT - len(found))


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


def _folder(data_dir: Path | None) -> Path:
    if data_dir is None:
        raise DataError(
            "the pretrained BERT and 20 Newsgroups are not downloaded: name the directory that "
            f"holds them with --data-dir or {DATA_DIR_VARIABLE}."
        )
    return data_dir


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"there is no file {path}, which the study of the pretrained BERT reads.")
    return path


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, as float32: a length, a JSON table of contents, and the numbers."""
    content = _existing(path).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    dtypes = {"F16": np.float16, "F32": np.float32}
    found = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__" and entry["dtype"] in dtypes:
            first, end = (start + offset for offset in entry["data_offsets"])
            numbers = np.frombuffer(content[first:end], dtypes[entry["dtype"]])
            found[name] = torch.from_numpy(numbers.astype(np.float32)).view(entry["shape"])
    return found


_NAMES = (
    ("embeddings.LayerNorm", "norm"),
    ("embeddings.word_embeddings", "words"),
    ("embeddings.position_embeddings", "positions"),
    ("embeddings.token_type_embeddings", "kinds"),
    ("encoder.layer", "blocks"),
    ("attention.self.", ""),
    ("attention.output.dense", "proj"),
    ("attention.output.LayerNorm", "norm1"),
    ("intermediate.dense", "fc1"),
    ("output.dense", "fc2"),
    ("output.LayerNorm", "norm2"),
)


def _our_name(name: str) -> str:
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours)
    return name


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))

    def forward(self, x: Tensor, is_token: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=is_token)
        x = self.norm1(x + self.proj(attended.transpose(1, 2).flatten(2)))
        out: Tensor = self.norm2(x + self.fc2(F.gelu(self.fc1(x))))
        return out


class _Bert(nn.Module):
    def __init__(self, sizes: MiniLm) -> None:
        super().__init__()
        self.words = nn.Embedding(sizes.vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.positions, sizes.width)
        self.kinds = nn.Embedding(2, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=1e-12)
        self.blocks = nn.ModuleList(_Block(sizes.width, sizes.heads) for _ in range(sizes.depth))
        self.head = nn.Linear(sizes.width, sizes.classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.kinds.weight[0]
        x = self.norm(x)
        is_token = (tokens != _PAD)[:, None, None, :]
        for block in self.blocks:
            x = block(x, is_token)
        out: Tensor = self.head(x[:, 0])
        return out
