"""Files of a pretrained BERT of width 8 and one layer, and of a few texts."""

import gzip
import json

import torch

from memaop_triton.experiments.bert import MiniLm

VOCABULARY = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "play": 5, "##ing": 6, "##s": 7}
SIZES = {"width": 8, "depth": 1, "heads": 2, "vocabulary": 110, "positions": 64}
TEXTS = ["b\tplays", "a\tplaying x"]  # of two classes, "b" is number 1


def sizes(folder=None, **others):
    """The network that the files are of."""
    return MiniLm(folder, **(SIZES | others))


def weights():
    """By the names of the hub, float16."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embeddings.word_embeddings.weight": (110, 8),
        "embeddings.position_embeddings.weight": (64, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
        "pooler.dense.weight": (8, 8),
    }
    layer = "encoder.layer.0."
    linears = {
        **{f"{layer}attention.self.{name}": (8, 8) for name in ("query", "key", "value")},
        f"{layer}attention.output.dense": (8, 8),
        f"{layer}intermediate.dense": (32, 8),
        f"{layer}output.dense": (8, 32),
    }
    for name, (outputs, inputs) in linears.items():
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    for name in ("embeddings.", f"{layer}attention.output.", f"{layer}output."):
        shapes |= {f"{name}LayerNorm.{part}": (8,) for part in ("weight", "bias")}
    return {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}


def write(folder, copies=1):
    """Write weights, vocabulary, and `copies` of the texts into a data directory."""
    table, content = {}, b""
    for name, value in weights().items():
        numbers = value.numpy().tobytes()
        offsets = [len(content), len(content) + len(numbers)]
        table[name] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": offsets}
        content += numbers
    table["embeddings.position_ids"] = {"dtype": "I64", "shape": [0], "data_offsets": [0, 0]}
    table["__metadata__"] = {"format": "pt"}
    head = json.dumps(table).encode()
    (folder / "minilm").mkdir()
    whole = len(head).to_bytes(8, "little") + head + content
    (folder / "minilm" / "model.safetensors").write_bytes(whole)
    tokenizer = json.dumps({"model": {"vocab": VOCABULARY}})
    (folder / "minilm" / "tokenizer.json").write_text(tokenizer)
    lines = "".join(f"{line}\n" for line in TEXTS * copies)
    for part in ("train", "test"):
        (folder / f"newsgroups20_{part}.tsv.gz").write_bytes(gzip.compress(lines.encode()))
