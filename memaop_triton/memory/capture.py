"""State must not be made while a CUDA graph is captured: every replay would make it again."""

from __future__ import annotations

import torch

from memaop_triton.kernels import targets


def check_not_capturing(device: torch.device, what: str) -> None:
    """Raise `RuntimeError` while a CUDA graph is captured: it would make `what` in every replay.

    Args:
        device: Of the rows that a step works on.
        what: The state that is to be made.
    """
    if targets.is_capturing(device):
        raise RuntimeError(
            f"{what} would be made inside of a CUDA graph, and anew by every replay of it: run one "
            "training step with a batch of this size before the capture, also after reset_memory, "
            "load_memory_state_dict and .to(), which leave it to the next step."
        )
