"""One layer's memory: the rows not computed yet, or the subspace its inputs live in.

A memory is a plain object, not a buffer: it belongs to one process (each rank of a distributed run
has its own), follows its layer across devices, and stays out of the layer's `state_dict`.
"""

from __future__ import annotations

from types import NoneType

from memaop_triton.config import MemAOPConfig, check_config
from memaop_triton.memory.residual import ResidualMemory
from memaop_triton.memory.subspace import MANY_ROWS, SubspaceMemory

__all__ = [
    "Memory",
    "ResidualMemory",
    "SubspaceMemory",
    "check_memory",
    "new_memory",
    "rows_to_compute",
]

Memory = ResidualMemory | SubspaceMemory


def _memory_class(config: MemAOPConfig) -> type[Memory] | type[None]:
    if config.row_memory is not None:
        return ResidualMemory
    return NoneType if config.subspace is None else SubspaceMemory


def new_memory(config: MemAOPConfig, in_features: int, out_features: int) -> Memory | None:
    """The empty memory that `config` asks for in a layer of this size; `None` for `"none"`."""
    if config.row_memory is not None:
        rows = config.row_memory
        return ResidualMemory(
            in_features, out_features, signed=rows.signed, decay=rows.decay, dtype=rows.dtype
        )
    if config.subspace is None:
        return None
    subspace = config.subspace
    rank = None
    if subspace.rank is not None:
        rank = config.rank_for(MANY_ROWS, in_features, out_features)
    memory = SubspaceMemory(
        in_features,
        out_features,
        rank,
        side=subspace.side,
        refresh_every=subspace.refresh_every,
    )
    memory.follow_budget(config, MANY_ROWS)
    return memory


def check_memory(
    config: MemAOPConfig, memory: Memory | None, in_features: int, out_features: int
) -> None:
    """Raise `ValueError` unless `memory` is of the kind that `config` asks for, and fits."""
    check_config(config)
    wanted = _memory_class(config)
    if wanted is not type(memory):
        have = "None" if memory is None else f"a {type(memory).__name__}"
        need = "None" if memory is not None and wanted is NoneType else f"a {wanted.__name__}"
        raise ValueError(
            f"memory is {have}, but config.memory={config.memory_name!r} needs {need}: pass "
            "memory=new_memory(config, in_features, out_features), made once and kept."
        )
    rows = config.row_memory
    if isinstance(memory, ResidualMemory) and rows is not None and memory.signed != rows.signed:
        raise ValueError(
            f"memory.signed={memory.signed}, but config.memory={config.memory_name!r}: make it "
            "with new_memory(config, in_features, out_features)."
        )
    if memory is not None and memory.in_features != in_features:
        raise ValueError(
            f"memory holds rows of {memory.in_features} inputs, but x has rows of {in_features}."
        )
    if memory is not None and memory.out_features != out_features:
        raise ValueError(
            f"memory holds rows of {memory.out_features} outputs, but the layer has {out_features}."
        )


def rows_to_compute(
    config: MemAOPConfig, memory: Memory | None, rows: int, in_features: int, out_features: int
) -> int:
    """K of a batch of `rows` rows in a layer of this size, beside what its memory costs."""
    if isinstance(memory, SubspaceMemory):
        memory.follow_budget(config, rows)
    subspace = memory.cost if isinstance(memory, SubspaceMemory) else None
    return config.num_rows(rows, in_features, out_features, subspace)
