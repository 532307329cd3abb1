"""Memories in the checkpoints of Hugging Face's Accelerate: `MemAOPState`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn

from memaop_triton.integrations.conversion import gather_state, is_converted, load_gathered_state


class MemAOPState:
    """The memories and decisions of a converted model, for `accelerator.save_state`.

    ::

        convert_(model)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        attach_optimizer(model, optimizer, accelerator.scaler)
        accelerator.register_for_checkpointing(MemAOPState(model))

    `accelerator.load_state` then continues the training where it was saved; Accelerate restores the
    generators' states itself. What is saved is one `custom_checkpoint_<i>.pkl`, in which
    every process has an entry of its own; it holds tensors, numbers and strings. Memories of
    another number of processes are not used: they start empty then, and a warning says so.

    Args:
        model: Has converted layers; prepared, before or after conversion, or not.

    Raises:
        ValueError: It has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
        if not is_converted(self._model):
            raise ValueError("model has no converted layer: call convert_(model) first.")

    def state_dict(self) -> dict[str, Any]:
        """Memories and decisions of all processes, which have to call this together."""
        return gather_state(self._model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from memories and decisions that were saved.

        Raises:
            ValueError: They are those of other layers, or of another kind or shape.
        """
        load_gathered_state(self._model, state)
