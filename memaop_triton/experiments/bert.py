"""A BERT with the pretrained weights of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0).

They are read by hand from `minilm/model.safetensors` in the data directory, so that transformers
need not be installed; without a directory they come from the Hugging Face hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memaop_triton.experiments import hub
from memaop_triton.experiments.data import DataError

PAD = 0  # the token where there is none


@dataclass(frozen=True)
class MiniLm:
    """BERT of six layers with its pretrained weights, and a classifier on top.

    Attributes:
        folder: The data directory that holds the weights; `None` fetches them from the hub.
        width: Of the residual stream.
        depth: Layers.
        heads: Of the attention.
        classes: Of the new output layer.
        pooling: What is classified: the output of the first token, or the mean over all tokens.
        vocabulary: Different tokens.
        positions: Most tokens of a text.
    """

    folder: Path | None = field(default=None, repr=False)
    width: int = 384
    depth: int = 6
    heads: int = 12
    classes: int = 20
    pooling: Literal["cls", "mean"] = "cls"
    vocabulary: int = 30_522
    positions: int = 512

    def build(self) -> nn.Module:
        """[B, T] tokens (int64, 0 where there is none) to [B, classes].

        Raises:
            DataError: There are no weights in the folder, or they could not be fetched.
        """
        model = self.build_untrained()
        weights: Mapping[str, Tensor]
        if self.folder is None:
            weights = hub.pretrained_weights()
        else:
            weights = _read_safetensors(existing(self.folder / "minilm" / "model.safetensors"))
        named = {_our_name(name): value for name, value in weights.items()}
        head = {f"head.{name}": value for name, value in model.head.state_dict().items()}
        model.load_state_dict(
            {name: named[name] for name in model.state_dict().keys() - head} | head
        )
        return model

    def build_untrained(self) -> _Bert:
        """The same with random weights."""
        return _Bert(self)


def existing(path: Path) -> Path:
    """The same path, or a `DataError` if there is no such file."""
    if not path.is_file():
        raise DataError(f"there is no file {path}, which fine-tuning a pretrained BERT reads.")
    return path


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, as float32: a length, a JSON table of contents, and the numbers."""
    content = path.read_bytes()
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
        self.takes_mean = sizes.pooling == "mean"
        self.words = nn.Embedding(sizes.vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.positions, sizes.width)
        self.kinds = nn.Embedding(2, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=1e-12)
        self.blocks = nn.ModuleList(_Block(sizes.width, sizes.heads) for _ in range(sizes.depth))
        self.head = nn.Linear(sizes.width, sizes.classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.kinds.weight[0]
        x = self.norm(x)
        is_token = tokens != PAD
        for block in self.blocks:
            x = block(x, is_token[:, None, None, :])
        if self.takes_mean:
            weight = is_token / is_token.sum(1, keepdim=True)
            x = (x * weight[..., None]).sum(1)
        else:
            x = x[:, 0]
        out: Tensor = self.head(x)
        return out
