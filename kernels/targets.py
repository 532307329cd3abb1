"""What the kernels have to know of a GPU to choose how to run on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """An instruction set, and the limits of the chips that have it.

    Attributes:
        name: As the compilers spell it, "sm_90" or "gfx942".
        backend: "cuda" or "hip", as in `triton.backends.compiler.GPUTarget`.
        arch: 90 for sm_90, "gfx942" for gfx942.
        warp_size: Threads of a warp.
        shared_memory: Bytes of shared memory that one program can have.
        processors: Streaming multiprocessors (compute units) of a typical chip.
        has_tensor_copies: Whether tiles are copied by descriptor (TMA) instead of by pointers.
        has_tf32: Whether matrix units multiply float32 rounded to ten bits of mantissa.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int
    processors: int
    has_tensor_copies: bool
    has_tf32: bool = True


# Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (the
# opt-in maximum per block); AMD CDNA3 and CDNA4 instruction set references (LDS per work-group).
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 << 10, 108, False),
        Target("sm_86", "cuda", 86, 32, 99 << 10, 84, False),
        Target("sm_89", "cuda", 89, 32, 99 << 10, 128, False),
        Target("sm_90", "cuda", 90, 32, 227 << 10, 132, True),
        Target("sm_100", "cuda", 100, 32, 227 << 10, 148, True),
        Target("sm_120", "cuda", 120, 32, 99 << 10, 170, True),
        Target("gfx942", "hip", "gfx942", 64, 64 << 10, 304, False),
        Target("gfx950", "hip", "gfx950", 64, 160 << 10, 256, False, has_tf32=False),
    )
}


def current(device: torch.device) -> Target:
    """The target of a device; for a chip that is not listed, the nearest older one of its make."""
    return _target_of(device.type, device.index)


@functools.cache
def _target_of(kind: str, index: int | None) -> Target:
    if kind != "cuda":
        return TARGETS["sm_80"]  # Triton's interpreter, where any will do
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return TARGETS.get(name, TARGETS["gfx942"])
    capability = 10 * properties.major + properties.minor
    older = [t for t in TARGETS.values() if isinstance(t.arch, int) and t.arch <= capability]
    return max(older or [TARGETS["sm_80"]], key=lambda t: int(t.arch))
