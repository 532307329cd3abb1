"""What was kept between forward and backward pass in a few bits, as numbers.

By layers with a stash of their inputs, and by a model's other operations under `compress_saved`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from memaop_triton.nn.layer_choice import converted_layers
from memaop_triton.nn.layer_state import LayerState
from memaop_triton.nn.saved_tensors import compressed_in

#: Of the column of a table.
HEADING = "kept, MiB (dense)"


class KeptBytes(NamedTuple):
    """Of one layer's last forward pass; what several layers share counts for the first of them.

    Attributes:
        dense: What a dense layer would have kept.
        ours: What was kept.
        note: Who keeps the inputs anyway, so that they were kept as they are, or with which layer
            they are shared; "" otherwise.
    """

    dense: int
    ours: int
    note: str = ""

    def __str__(self) -> str:
        numbers = f"{_mebibytes(self.ours)} ({_mebibytes(self.dense)})"
        return f"{numbers}, {self.note}" if self.note else numbers


def kept_bytes(states: Mapping[str, LayerState]) -> dict[str, KeptBytes | None]:
    """By name of the layer, for those that have a stash; `None` before their first forward pass.

    Empty if no layer has one.
    """
    found: dict[str, KeptBytes | None] = {}
    inputs: dict[int, str] = {}
    stashes: dict[int, str] = {}
    for name, state in states.items():
        if state.stash == "exact":
            continue
        kept = state.kept
        if kept is None:
            found[name] = None
            continue
        # Weak references to one tensor are one object, also when it is gone.
        first_input = inputs.setdefault(id(kept.input), name)
        first_stash = stashes.setdefault(id(kept.stash), name)
        note = f"for {kept.keeper} anyway" if kept.keeper else ""
        if first_stash != name:
            note = f"shared with {first_stash}"
        found[name] = KeptBytes(
            kept.input_bytes if first_input == name else 0,
            kept.mask_bytes + (kept.stash_bytes if first_stash == name else 0),
            note,
        )
    return found


def kept_lines(model: nn.Module) -> list[str]:
    """A table of the layers that have a stash, with their sum, and what `compress_saved` rounded.

    Empty if no layer has one, and nothing is compressed.
    """
    return [*_stash_lines(model), *_compressed_lines(model)]


def _compressed_lines(model: nn.Module) -> list[str]:
    sums = (KeptBytes(one.exact_bytes, one.held_bytes) for one in compressed_in(model))
    return [f"saved by operations, in 8 bits, MiB (as it was): {kept}" for kept in sums]


def _stash_lines(model: nn.Module) -> list[str]:
    states = {name or "(the model)": one.layer_state for name, one in converted_layers(model)}
    layers = kept_bytes(states)
    if not layers:
        return []
    width = max(len("layer"), *map(len, layers))
    lines = [f"{'layer':{width}}  {HEADING}"]
    lines += [f"{name:{width}}  {shown(kept)}" for name, kept in layers.items()]
    return [*lines, f"{'sum':{width}}  {_sum(layers.values())}"]


def shown(kept: KeptBytes | None) -> str:
    """As a cell of a table."""
    return "–" if kept is None else str(kept)


def _sum(layers: Iterable[KeptBytes | None]) -> KeptBytes:
    known = [kept for kept in layers if kept is not None]
    return KeptBytes(sum(kept.dense for kept in known), sum(kept.ours for kept in known))


def _mebibytes(count: int) -> str:
    size = count / 2**20
    return f"{size:.0f}" if size >= 100 else f"{size:.3g}"
