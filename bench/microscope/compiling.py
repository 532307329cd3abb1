"""Compiles the library's Triton kernels for GPUs that this machine does not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as compile_source
from triton.runtime.jit import create_function_from_signature

from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu import launch as launching
from memaop_triton.kernels.targets import Target


@dataclass(frozen=True)
class Launch:
    """One kernel launch that was recorded and not executed."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True)
class Compiled:
    """A launch, and what the compiler made of it.

    Attributes:
        launch: What was compiled.
        target: For which instruction set.
        asm: Every stage by Triton's name: "ttgir", "ptx", "cubin" or "amdgcn", "hsaco".
        shared: Bytes of shared memory per program.
        threads: Threads per program, those included that Triton's warp specialisation adds.
    """

    launch: Launch
    target: Target
    asm: dict[str, Any]
    shared: int
    threads: int


def record(call: Callable[[], object], target: Target) -> list[Launch]:
    """The launches that `call` makes on `target`, in order, none of them executed.

    The tensors may lie on the CPU and are not read. Their whole storage counts: on AMD a pointer
    into more than 2 GiB compiles to other loads than one into less.
    """
    launches: list[Launch] = []

    def collect(
        kernel: Any,
        grid: tuple[int, ...],
        *,
        num_warps: int = 4,
        num_stages: int = 3,
        **arguments: Any,
    ) -> None:
        if 0 not in grid:
            launches.append(Launch(kernel, tuple(grid), arguments, num_warps, num_stages))

    with (
        mock.patch.object(launching, "launch", collect),
        mock.patch.object(targets, "current", return_value=target),
    ):
        call()
    return launches


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile one launch as Triton would just before executing it.

    Types, constants and what is known of each argument's divisibility come from Triton's own
    binder, so that the code is the code a GPU would run.
    """
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(gpu)
    kernel = launch.kernel
    given = launch.arguments | launching.OPTIONS
    given |= {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**given)
    options, signature, constants, attributes = kernel._pack_args(
        backend, given, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    with knobs.compilation.scope():
        # Where a line came from is a tenth of the time, and changes no instruction.
        knobs.compilation.disable_line_info = True
        built = compile_source(source, target=gpu, options=options.__dict__)
    meta = built.metadata
    return Compiled(
        launch=launch,
        target=target,
        asm=dict(built.asm),
        shared=int(meta.shared),
        threads=int(meta.num_warps) * target.warp_size,
    )


def compile_call(call: Callable[[], object], target: Target) -> list[Compiled]:
    """Every kernel that `call` launches on `target`, compiled."""
    return [compile_launch(launch, target) for launch in record(call, target)]
