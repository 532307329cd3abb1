"""Distributed checkpoints of the memories, through `torch.distributed.checkpoint` (DCP).

Each rank has memories of its own, so each has entries of its own in the checkpoint: DCP takes equal
keys for copies of one value. To have one checkpoint of everything, complete or not there at all,
put the entries beside model and optimizer, and load the memories by themselves::

    state = {"model": ..., "optimizer": ...}
    dcp.save(state | memory_entries(model), checkpoint_id=folder)

    dcp.load(state, checkpoint_id=folder)
    load_memory(model, folder)

The memories are no `Stateful`: DCP loads what the new object's `state_dict` lists. A new memory has
no tensors before its first batch, so DCP would load nothing into it, without an error.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import StorageReader

from memaop_triton.nn.state import (
    check_memory_state_dict,
    load_memory_state_dict,
    memory_state_dict,
    reset_memory,
)

_ROOT = "memaop_memory"


def memory_entries(
    model: nn.Module, process_group: dist.ProcessGroup | None = None
) -> dict[str, Tensor | str]:
    """This rank's memories as entries for the dictionary that `dcp.save` gets.

    One entry for each tensor (the memories' own, not copies) and one for everything else. They go
    to the top level of the dictionary, where `load_memory` looks for them.

    Args:
        model: Has converted layers. The same on all ranks; the rows stored may differ.
        process_group: As for `dcp.save`.
    """
    place = _place(_rank_and_size(process_group)[0])
    entries: dict[str, Tensor | str] = {}
    plain: dict[str, dict[str, Any]] = {}
    for layer, state in memory_state_dict(model).items():
        plain[layer] = {}
        for name, value in state.items():
            if isinstance(value, Tensor):
                entries[f"{place}.{layer}.{name}"] = value
            else:
                plain[layer][name] = value
    # There even if empty: the number of these entries is the number of ranks.
    return entries | {place: json.dumps(plain)}


def load_memory(
    model: nn.Module,
    checkpoint_id: str | os.PathLike[str] | None = None,
    *,
    storage_reader: StorageReader | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Put the memories that each rank saved back into its model; all ranks call it.

    The checkpoint comes from a `dcp.save` with `memory_entries`. If another number of ranks saved
    it, no process has the rows that it had: all memories start empty then, as after `reset_memory`,
    and a warning says so. Each rank reads its own entries, into CPU memory; the next step moves
    them to its device.

    Args:
        model: Has the converted layers of the model that was saved, under the same names.
        checkpoint_id: Folder of the checkpoint, or what `storage_reader` takes it for.
        storage_reader: As for `dcp.load`; reads folders if `None`.
        process_group: The ranks that load; all of them if `None`. Without an initialised process
            group this process counts as the only one.

    Raises:
        ValueError: The checkpoint holds no memories, or those of other layers, of another kind or
            shape; the message is that of `load_memory_state_dict`.
        RuntimeError: Another rank could not read the checkpoint; the message says which and why.
            That rank raises what its reader raised.

    Whatever fails on one rank is raised on all, and the memories of all ranks are unchanged then.
    """
    rank, size = _rank_and_size(process_group)
    state: dict[str, dict[str, Any]] = {}
    saved_size = 0
    failure: BaseException | None = None
    try:
        reader = _reader(checkpoint_id, storage_reader)
        metadata = reader.read_metadata()
        saved_size = _saved_size(metadata)
        if saved_size == size:
            state = _read(reader, metadata, rank)
            check_memory_state_dict(model, state)
    except (Exception, CheckpointException) as error:
        failure = error
    _raise_together(failure, process_group)
    if saved_size == size:
        load_memory_state_dict(model, state)
        return
    reset_memory(model)
    warnings.warn(
        f"the memories were saved by {saved_size} ranks and this run has {size}: they start "
        "empty. The gradients are right, only noisier or less complete at first.",
        stacklevel=2,
    )


def _place(rank: int) -> str:
    return f"{_ROOT}.rank_{rank}"


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if not _is_distributed():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _reader(
    checkpoint_id: str | os.PathLike[str] | None, storage_reader: StorageReader | None
) -> StorageReader:
    if storage_reader is not None:
        if checkpoint_id is not None:
            storage_reader.reset(checkpoint_id)
        return storage_reader
    if checkpoint_id is None or not FileSystemReader.validate_checkpoint_id(checkpoint_id):
        raise ValueError(
            f"checkpoint_id={checkpoint_id!r} is not a folder: pass the storage_reader that reads "
            "it."
        )
    return FileSystemReader(checkpoint_id)


def _saved_size(metadata: Metadata) -> int:
    """How many ranks saved their memories."""
    pattern = re.compile(re.escape(_ROOT) + r"\.rank_\d+")
    size = sum(pattern.fullmatch(key) is not None for key in metadata.state_dict_metadata)
    if size == 0:
        raise ValueError(
            "the checkpoint holds no memories: save it with memory_entries(model) at the top level "
            "of what dcp.save gets."
        )
    return size


def _read(reader: StorageReader, metadata: Metadata, rank: int) -> dict[str, dict[str, Any]]:
    """What `memory_state_dict` gave on `rank`."""
    place = _place(rank)
    entries: dict[str, Any] = {place: ""}
    for key, saved in metadata.state_dict_metadata.items():
        if key.startswith(f"{place}.") and isinstance(saved, TensorStorageMetadata):
            entries[key] = torch.empty(saved.size, dtype=saved.properties.dtype)
    with warnings.catch_warnings():
        # DCP warns that a single process loads; here that is intended.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        # Every rank loads by itself, because the keys differ; `_raise_together` follows.
        state_dict_loader.load(entries, storage_reader=reader, no_dist=True)
    state: dict[str, dict[str, Any]] = json.loads(entries.pop(place))
    for key, tensor in entries.items():
        layer, _, name = key.removeprefix(f"{place}.").rpartition(".")
        state[layer][name] = tensor
    return state


def _raise_together(failure: BaseException | None, group: dist.ProcessGroup | None) -> None:
    """Raise on all ranks if there is a failure on one."""
    if _is_distributed():
        mine = None if failure is None else (isinstance(failure, ValueError), str(failure))
        failures: list[tuple[bool, str] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(failures, mine, group=group)
        if failure is None:
            for rank, other in enumerate(failures):
                if other is not None:
                    is_value_error, message = other
                    kind = ValueError if is_value_error else RuntimeError
                    raise kind(f"rank {rank}: {message}")
    if failure is not None:
        raise failure
