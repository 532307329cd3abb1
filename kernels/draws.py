"""The seed that the kernels of one step draw from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memaop_triton.kernels import targets

_FIRST = 1 << 62  # of seeds; they end below 2⁶³, so every one is a positive number of 64 bits
NOT_DRAWN = _FIRST  # for a kernel that takes a seed and draws nothing
_MASK = (1 << 64) - 1


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> int | Tensor:
    """A seed for counter-based draws on `device`, another one in every call.

    Like any draw it follows from the state of the generator, and advances it: what
    `torch.manual_seed` or a restored state repeats is repeated. On a GPU that takes no launch,
    because the state of its generators is kept on the host. Within the capture of a CUDA graph
    it is a tensor, int64 [1] on the device, which every replay of the graph draws anew.

    Args:
        device: Of the rows.
        generator: Source of the seed; the device's default one if `None`.
    """
    if device.type != "cuda":
        return int(_drawn(device, generator))
    if targets.is_capturing(device):
        return _drawn(device, generator)
    if generator is None:
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    return seed_of_state(generator)


def draw_seed_tensor(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """`draw_seed` as a tensor, int64 [1] on `device`, to be kept beside what was drawn."""
    if device.type != "cuda":
        return _drawn(device, generator)
    seed = draw_seed(device, generator)
    if isinstance(seed, Tensor):
        return seed
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _drawn(device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randint(_FIRST, 2 * _FIRST - 1, (1,), device=device, generator=generator)


def seed_of_state(generator: Any) -> int:
    """A seed from a generator of a GPU, whose state is its seed and an offset, both on the host."""
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # a multiple of 4, as the generator wants it
    return _mixed(generator.initial_seed(), offset // 4)


def _mixed(seed: int, count: int) -> int:
    """The `count`-th number of the splitmix64 generator that starts at `seed`, from 2⁶² on."""
    bits = (seed + (count + 1) * 0x9E3779B97F4A7C15) & _MASK
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & _MASK
    return _FIRST | (bits ^ (bits >> 31)) >> 2
