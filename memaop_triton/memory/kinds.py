"""One layer's memory: the rows not computed yet, or the subspace its inputs live in.

A memory is a plain object, not a buffer: it belongs to one process (each rank of a distributed run
has its own), follows its layer across devices, and stays out of the layer's `state_dict`.
"""

from __future__ import annotations

from types import NoneType

from memaop_triton.config import MemAOPConfig, check_config
from memaop_triton.memory.residual import ResidualMemory
from memaop_triton.memory.subspace import MANY_ROWS, SubspaceMemory
from memaop_triton.nn.layer_state import LayerState

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
    if config.has_row_memory:
        return ResidualMemory
    return SubspaceMemory if config.memory == "subspace" else NoneType


def new_memory(config: MemAOPConfig, in_features: int, out_features: int) -> Memory | None:
    """The empty memory that `config` asks for in a layer of this size; `None` for `"none"`."""
    memory: Memory
    if config.has_row_memory:
        memory = ResidualMemory(
            in_features,
            out_features,
            signed=config.memory == "signed",
            decay=config.decay,
            dtype=config.memory_dtype,
        )
    elif config.memory == "subspace":
        memory = SubspaceMemory(
            in_features,
            out_features,
            None if config.rank is None else config.rank_for(MANY_ROWS, in_features, out_features),
            side=config.side,
            refresh_every=config.refresh_every,
        )
        memory.follow_budget(config, MANY_ROWS)
    else:
        return None
    memory.state = LayerState(config, memory)
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
            f"memory is {have}, but config.memory={config.memory!r} needs {need}: pass "
            "memory=new_memory(config, in_features, out_features), made once and kept."
        )
    if isinstance(memory, ResidualMemory) and memory.signed != (config.memory == "signed"):
        raise ValueError(
            f"memory.signed={memory.signed}, but config.memory={config.memory!r}: make the memory "
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
