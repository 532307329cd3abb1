"""Which executor takes the steps of a tensor: PyTorch and C, or the Triton kernels."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from memaop_triton.backward import steps_torch
from memaop_triton.dispatch import runs_triton
from memaop_triton.memory.kinds import Memory, ResidualMemory, SubspaceMemory


def executor_for(a: Tensor, memory: Memory | None = None, *, rank: int = 0) -> ModuleType:
    """`steps_torch`, or `steps_triton`, which is imported only where it is used.

    Args:
        a: X or G.
        memory: Of the layer.
        rank: Columns of the basis in use, where it is not that of `memory`.

    Raises:
        RuntimeError: `MEMAOP_TRITON_BACKEND=triton` asks for what its kernels cannot do.
    """
    if isinstance(memory, SubspaceMemory):
        rank = memory.rank
    memory_dtype = memory.dtype if isinstance(memory, ResidualMemory) else None
    if not runs_triton(a, rank=rank, memory_dtype=memory_dtype):
        return steps_torch
    from memaop_triton.backward import steps_triton

    return steps_triton
