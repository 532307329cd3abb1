"""What the kernels have to know of a GPU to choose how to run on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from memaop_triton.kernels import chips
from memaop_triton.kernels.chips import Chip


@dataclass(frozen=True)
class Target:
    """An instruction set, the limits of the chips that have it, and one such chip.

    Attributes:
        name: As the compilers spell it, "sm_90" or "gfx942".
        backend: "cuda" or "hip", as in `triton.backends.compiler.GPUTarget`.
        arch: 90 for sm_90, "gfx942" for gfx942.
        warp_size: Threads of a warp.
        shared_memory: Bytes of shared memory that one program can have.
        processor_shared_memory: Bytes that the programs on one processor share.
        processor_warps: Warps that can be on a processor at once.
        processor_programs: Programs that can be on a processor at once.
        processor_registers: 32-bit registers of a processor.
        thread_registers: Of which one thread should have so many at most. AMD's can have twice as
            many, but then a SIMD holds one warp, and nothing to do while that waits.
        chip: The chip that runs, or a typical one.
        has_tensor_copies: Whether tiles are copied by descriptor (TMA) instead of by pointers.
        has_tf32: Whether matrix units multiply float32 rounded to ten bits of mantissa.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int
    processor_shared_memory: int
    processor_warps: int
    processor_programs: int
    processor_registers: int
    thread_registers: int
    chip: Chip
    has_tensor_copies: bool = False
    has_tf32: bool = True

    @property
    def processors(self) -> int:
        """Streaming multiprocessors (compute units) of the chip."""
        return self.chip.processors


def _nvidia(
    arch: int, shared: int, warps: int, programs: int, chip: Chip, *, tensor_copies: bool = False
) -> Target:
    """`shared`: KiB of a processor, of which each program takes one for itself."""
    return Target(
        name=f"sm_{arch}",
        backend="cuda",
        arch=arch,
        warp_size=32,
        shared_memory=(shared - 1) << 10,
        processor_shared_memory=shared << 10,
        processor_warps=warps,
        processor_programs=programs,
        processor_registers=1 << 16,
        thread_registers=255,
        chip=chip,
        has_tensor_copies=tensor_copies,
    )


def _amd(arch: str, shared: int, chip: Chip, *, tf32: bool) -> Target:
    """`shared`: KiB of a compute unit, all of which one program can have."""
    return Target(
        name=arch,
        backend="hip",
        arch=arch,
        warp_size=64,
        shared_memory=shared << 10,
        processor_shared_memory=shared << 10,
        processor_warps=32,
        processor_programs=32,
        processor_registers=1 << 17,
        thread_registers=256,
        chip=chip,
        has_tf32=tf32,
    )


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA3 and CDNA4
# instruction set references and white papers (LDS, wavefronts per SIMD, vector registers).
TARGETS = {
    target.name: target
    for target in (
        _nvidia(80, 164, 64, 32, chips.A100),
        _nvidia(86, 100, 48, 16, chips.RTX_3090_TI),
        _nvidia(89, 100, 48, 24, chips.RTX_4090),
        _nvidia(90, 228, 64, 32, chips.H100, tensor_copies=True),
        _nvidia(100, 228, 64, 32, chips.B200, tensor_copies=True),
        _nvidia(120, 100, 48, 24, chips.RTX_5090, tensor_copies=True),
        _amd("gfx942", 64, chips.MI300X, tf32=True),
        _amd("gfx950", 160, chips.MI355X, tf32=False),
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
    target = _instruction_set(properties)
    chip = chips.named(properties.name) or target.chip
    return replace(target, chip=chips.with_processors(chip, properties.multi_processor_count))


def _instruction_set(properties: torch.cuda._CudaDeviceProperties) -> Target:
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return TARGETS.get(name, TARGETS["gfx942"])
    capability = 10 * properties.major + properties.minor
    older = [t for t in TARGETS.values() if isinstance(t.arch, int) and t.arch <= capability]
    return max(older or [TARGETS["sm_80"]], key=lambda t: int(t.arch))
