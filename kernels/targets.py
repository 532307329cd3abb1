"""GPUs: what products can do at most, and the limits of their instruction sets.

Every figure of a `Chip` is published by its vendor or, where that publishes nothing, measured by
others; none was measured by this project.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Chip:
    """A product. Matrix peaks are dense, in TFLOP/s with float32 accumulation.

    Attributes:
        name: The product, as people call it.
        processors: Streaming multiprocessors (compute units).
        clock: GHz at which the vendor counts the matrix peaks.
        half: bfloat16 and float16 matrix products.
        tf32: TF32 matrix products; on chips without them, float32 matrix products.
        single: float32 without matrix instructions (NVIDIA) or with (AMD).
        single_clock: GHz of that peak, where the vendor counts it at another.
        bandwidth: Of its memory, in TB/s.
        cache: MiB of the largest cache that all processors share.
        cache_bandwidth: Of that cache, in TB/s at `clock`.
        matrix_share: Part of the matrix peaks that large products reach in practice.
        memory_share: Part of both bandwidths that long copies reach in practice.
        device: What the driver calls it, in part; `None` where `name` is part of that.
    """

    name: str
    processors: int
    clock: float
    half: float
    tf32: float
    single: float
    single_clock: float | None = None
    bandwidth: float = 0.0
    cache: float = 0.0
    cache_bandwidth: float = 0.0
    matrix_share: float = 0.7
    memory_share: float = 0.9
    device: str | None = None

    def rate(self, kind: str) -> int:
        """FLOPs per cycle of one processor; `kind`: "half", "tf32" or "single"."""
        clock = (self.single_clock if kind == "single" else None) or self.clock
        peak = float(getattr(self, kind))
        return 1 << round(math.log2(1e3 * peak / (self.processors * clock)))

    def flops(self, kind: str) -> float:
        """FLOP/s of large products in practice."""
        return 1e12 * self.matrix_share * float(getattr(self, kind))

    @property
    def memory_rate(self) -> float:
        """Bytes per second of long reads of memory in practice."""
        return 1e12 * self.memory_share * self.bandwidth

    @property
    def cache_rate(self) -> float:
        """The same of the shared cache."""
        return 1e12 * self.memory_share * self.cache_bandwidth


# Peaks, bandwidths and cache sizes: the vendors' data sheets and architecture white papers.
#
# Cache bandwidth: the A100 white paper says 5,120 bytes per clock. NVIDIA publishes no other;
# Luo et al. (arXiv 2402.13499) measure the H100's L2 at more than twice the A100's in bytes per
# clock, and so near those 5,120, which are used for it here; B200 has the same per processor, and
# GeForce chips measure near 16 bytes per clock and processor (chipsandcheese.com). For AMD it is
# the memory-side Infinity Cache (CDNA 3 white paper: 17.2 TB/s): a chiplet's own L2 is faster,
# but neighbouring programs run on different chiplets.
#
# Shares: 700 of 989 TFLOP/s and 3.0 of 3.35 TB/s on the H100, where SemiAnalysis reports 720
# TFLOP/s ("MI300X vs H100 vs H200 Benchmark Part 1: Training", 2024). The same article has 620 of
# 1,307 for the MI300X, where copies reach some 4.3 of 5.3 TB/s.
A100 = Chip("A100 SXM", 108, 1.41, 312.0, 156.0, 19.5, None, 2.039, 40, 7.2, device="A100-SXM4-80")
RTX_3090_TI = Chip("RTX 3090 Ti", 84, 1.86, 80.0, 40.0, 40.0, None, 1.008, 6, 2.5)
RTX_4090 = Chip("RTX 4090", 128, 2.52, 165.2, 82.6, 82.6, None, 1.008, 72, 5.2)
H100 = Chip("H100 SXM", 132, 1.83, 989.4, 494.7, 66.9, 1.98, 3.35, 50, 9.4, device="H100 80GB HBM3")
B200 = Chip("B200", 148, 1.86, 2250.0, 1125.0, 75.0, 1.98, 8.0, 126, 10.6)
RTX_5090 = Chip("RTX 5090", 170, 2.41, 209.5, 104.8, 104.8, None, 1.792, 96, 6.6)
MI300X = Chip("MI300X", 304, 2.1, 1307.4, 653.7, 163.4, None, 5.3, 256, 17.2, 0.475, 0.8)
MI350X = Chip("MI350X", 256, 2.2, 2306.9, 144.2, 144.2, None, 8.0, 256, 17.2, 0.475, 0.8)
MI355X = replace(MI350X, name="MI355X", clock=2.4, half=2516.6, tf32=157.3, single=157.3)

CHIPS = (
    A100,
    RTX_3090_TI,
    RTX_4090,
    H100,
    B200,
    RTX_5090,
    MI300X,
    MI355X,
    replace(A100, name="A100 40GB", bandwidth=1.555, device="A100-SXM4-40"),
    replace(A100, name="A100 PCIe", bandwidth=1.935, device="A100 80GB PCIe"),
    Chip("L40S", 142, 2.52, 362.1, 183.0, 91.6, None, 0.864, 96, 5.7),
    Chip("H100 PCIe", 114, 1.755, 756.0, 378.0, 51.2, 1.755, 2.0, 50, 9.0),
    Chip("H100 NVL", 132, 1.83, 835.0, 417.5, 60.0, 1.785, 3.9, 50, 9.4),
    replace(H100, name="H200", bandwidth=4.8, device=None),
    replace(MI300X, name="MI325X", bandwidth=6.0),
    MI350X,
)


def with_processors(chip: Chip, count: int) -> Chip:
    """A chip of the same make that has `count` processors: what they do scales with them."""
    part = count / chip.processors
    return replace(
        chip,
        processors=count,
        half=part * chip.half,
        tf32=part * chip.tf32,
        single=part * chip.single,
        cache_bandwidth=part * chip.cache_bandwidth,
    )


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
            many, but then a SIMD holds one warp, so nothing runs while this warp waits for memory.
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
        _nvidia(80, 164, 64, 32, A100),
        _nvidia(86, 100, 48, 16, RTX_3090_TI),
        _nvidia(89, 100, 48, 24, RTX_4090),
        _nvidia(90, 228, 64, 32, H100, tensor_copies=True),
        _nvidia(100, 228, 64, 32, B200, tensor_copies=True),
        _nvidia(120, 100, 48, 24, RTX_5090, tensor_copies=True),
        _amd("gfx942", 64, MI300X, tf32=True),
        _amd("gfx950", 160, MI355X, tf32=False),
    )
}


@functools.cache
def find(device: torch.device) -> Target | None:
    """The target of a device; `None` for a GPU whose limits are neither listed nor reported.

    A compute capability of NVIDIA's that is not listed has the instructions of a listed older one
    of the same major version, and PyTorch reports what a processor of it holds: sm_103 is sm_100,
    sm_121 is sm_120, sm_87 is sm_86, each with limits of its own. The rates of a chip that is not
    listed are those of the typical one of its target, scaled by the number of processors; they only
    rank configurations. Nothing is assumed of other generations (sm_75) or of AMD's (gfx90a,
    gfx1100), whose matrix instructions differ from one to the next.
    """
    if device.type != "cuda":
        return TARGETS["sm_80"]  # Triton's interpreter, where any will do
    properties: Any = torch.cuda.get_device_properties(device.index)
    target = TARGETS.get(_name_of(properties))
    if target is None and not torch.version.hip:
        target = _relative_of(properties)
    if target is None:
        return None
    listed = (chip for chip in CHIPS if (chip.device or chip.name) in properties.name)
    chip = next(listed, target.chip)
    return replace(target, chip=with_processors(chip, properties.multi_processor_count))


def current(device: torch.device) -> Target:
    """The target of a device.

    Raises:
        RuntimeError: There is none; `dispatch` sends its tensors to PyTorch.
    """
    target = find(device)
    if target is None:
        raise RuntimeError(f"there are no measured limits for {device}, {name_of(device)}.")
    return target


def name_of(device: torch.device) -> str:
    """The instruction set of a GPU as compilers spell it: "sm_90", "gfx942"."""
    return _name_of(torch.cuda.get_device_properties(device.index))


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):  # entering it takes time
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _name_of(properties: Any) -> str:
    if torch.version.hip:
        return str(properties.gcnArchName.split(":")[0])
    return f"sm_{properties.major}{properties.minor}"


def _relative_of(properties: Any) -> Target | None:
    """The listed older target of the same major version, with the limits that PyTorch reports."""
    arch = 10 * properties.major + properties.minor
    older = [
        target
        for target in TARGETS.values()
        if isinstance(target.arch, int) and target.arch // 10 == properties.major
        if target.arch < arch
    ]
    if not older:
        return None
    target = max(older, key=lambda one: int(one.arch))
    return replace(
        target,
        name=_name_of(properties),
        shared_memory=properties.shared_memory_per_block_optin,
        processor_shared_memory=properties.shared_memory_per_multiprocessor,
        processor_warps=properties.max_threads_per_multi_processor // properties.warp_size,
        processor_registers=properties.regs_per_multiprocessor,
        chip=replace(target.chip, cache=properties.L2_cache_size / 2**20),
    )
