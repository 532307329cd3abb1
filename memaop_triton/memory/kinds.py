"""One layer's memory: rows that were not computed yet, or bases of subspaces.

A memory is a plain object, not a buffer: it belongs to one process (each rank of a distributed run
has its own), follows its layer across devices, and stays out of the layer's `state_dict`.
"""

from __future__ import annotations

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


def new_memory(config: MemAOPConfig, in_features: int, out_features: int) -> Memory | None:
    """The empty memory that `config` specifies for a layer of this size; `None` for `"none"`."""
    rows, subspace = config.row_memory, config.subspace
    if rows is not None:
        return ResidualMemory(
            in_features, out_features, signed=rows.signed, decay=rows.decay, dtype=rows.dtype
        )
    if subspace is None:
        return None
    rank = None
    if subspace.rank is not None:
        rank = config.rank_for(MANY_ROWS, in_features, out_features)
    memory = SubspaceMemory(
        in_features, out_features, rank, side=subspace.side, refresh_every=subspace.refresh_every
    )
    memory.follow_budget(config, MANY_ROWS)
    return memory


def check_memory(
    config: MemAOPConfig, memory: Memory | None, in_features: int, out_features: int
) -> None:
    """Raise `ValueError` unless `memory` is of the kind that `config` specifies, and fits."""
    check_config(config)
    kind = "none" if memory is None else memory.kind
    if kind != config.memory_name:
        raise ValueError(
            f"memory is of kind {kind!r}, but config.memory={config.memory_name!r}: pass "
            "memory=new_memory(config, in_features, out_features), made once and kept."
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
    subspace = None
    if isinstance(memory, SubspaceMemory):
        memory.follow_budget(config, rows)
        if config.budget is not None:
            subspace = memory.cost
    return config.num_rows(rows, in_features, out_features, subspace)
