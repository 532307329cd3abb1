"""The paper's memory: rows that were not computed yet, carried over to the next batch."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from memaop_triton.config import MemAOPConfig
from memaop_triton.dispatch import rescale_
from memaop_triton.memory.capture import check_not_capturing
from memaop_triton.memory.saved_state import check_fields, check_shape


class ResidualMemory:
    """Rows of X and G that were not selected yet, one slot per row of the batch.

    A step, which is one backward pass of the layer, adds the rows of the batch to the slots,
    `m ← c·σ·m + x` (for G likewise), computes the outer products of K slots and empties these. c is
    the carry `√(decay · η_prev/η_now)`, which makes the stored rows a gradient at the current
    learning rate, and σ a random sign for the `signed` memory (the same for X and G), 1 otherwise.
    A slot belongs to a position in the batch: a shorter batch adds to the first slots (the carry
    applies to the others too), a longer one makes more slots.

    Args:
        in_features: N, length of a row of X.
        out_features: P, length of a row of G.
        signed: Give every carried row a random sign.
        decay: Fraction of a stored outer product that survives a step, in (0, 1].
        dtype: Storage dtype; the input's if `None`.

    Attributes:
        x: [rows, N], or `None` before the first step.
        g: [rows, P], or `None` before the first step.
        filled: [rows], bool. A slot that is not filled counts as zero, whatever is stored.
        layer_states: By configuration, of a memory that is given to `memaop_linear`; not read here.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        signed: bool = False,
        decay: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.signed = signed
        self.decay = decay
        self.dtype = dtype
        self.x: Tensor | None = None
        self.g: Tensor | None = None
        self.filled: Tensor | None = None
        self.layer_states: dict[MemAOPConfig, Any] = {}
        self._last_rate: float | Tensor | None = None
        self._last_scale: Tensor | None = None
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._group = 0
        self._scaler: weakref.ref[torch.amp.GradScaler] | None = None

    @property
    def kind(self) -> str:
        """`"signed"` or `"residual"`, as the configuration names it."""
        return "signed" if self.signed else "residual"

    @property
    def rows(self) -> int:
        """Number of slots."""
        return 0 if self.x is None else self.x.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.x, self.g, self.filled) if t is not None)

    def slots(self, rows: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first `rows` slots `(x, g, filled)` on the device of `like`, made if missing."""
        dtype = self.dtype or like.dtype
        made = f"{rows} slots of a row memory"
        if self.x is None or self.g is None or self.filled is None:
            check_not_capturing(like.device, made)
            self.x = like.new_zeros((rows, self.in_features), dtype=dtype)
            self.g = like.new_zeros((rows, self.out_features), dtype=dtype)
            self.filled = like.new_zeros(rows, dtype=torch.bool)
        elif self.x.dtype != dtype or self.x.device != like.device:
            check_not_capturing(like.device, made)
            self._move(like.device, dtype)
        if self.rows < rows:
            check_not_capturing(like.device, made)
            self.x, self.g, self.filled = (
                torch.cat([old, old.new_zeros((rows - old.shape[0], *old.shape[1:]))])
                for old in (self.x, self.g, self.filled)
            )
        return self.x[:rows], self.g[:rows], self.filled[:rows]

    def empty(self, indices: Tensor, scores: Tensor) -> None:
        """Empty the slots at `indices` and every slot whose score (one per row) is not finite."""
        assert self.x is not None
        assert self.g is not None
        assert self.filled is not None
        filled = self.filled[: scores.numel()]
        filled.index_fill_(0, indices, False)
        if scores.amax() == math.inf:
            # Zero times what such a row holds would still be NaN.
            lost = scores.isinf()
            filled[lost] = False
            self.x[: scores.numel()][lost] = 0
            self.g[: scores.numel()][lost] = 0

    @property
    def learning_rate(self) -> float | Tensor | None:
        """Learning rate of the attached optimizer's group, `None` if none is attached.

        A tensor if the group holds one: it is never read on the host.
        """
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None:
            return None
        rate = optimizer.param_groups[self._group]["lr"]
        return rate if isinstance(rate, Tensor) else float(rate)

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        group: int,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Rescale with the learning rate of parameter group `group` and the scaler's loss scale.

        Both are weak references, and a copy of the memory (`deepcopy`, pickle) is not attached.
        """
        self._optimizer = weakref.ref(optimizer)
        self._group = group
        self._scaler = None if scaler is None else weakref.ref(scaler)

    @property
    def is_paused(self) -> bool:
        """Whether the learning rate is zero, so that an SGD step would move nothing."""
        rate = self.learning_rate
        return not isinstance(rate, Tensor) and rate == 0

    def take_carry(self) -> float | Tensor:
        """The factor c of this step, `√(decay · η_prev/η_now)`; η_now becomes η_prev.

        A tensor ([]) if the learning rate is one; its rate of zero counts as no change.
        """
        now, before = self.learning_rate, self._last_rate
        if isinstance(now, Tensor):
            return self._take_carry_on_device(now)
        self._last_rate = now
        before = float(before) if isinstance(before, Tensor) else before
        change = before / now if now and before else 1.0
        return math.sqrt(self.decay * change)

    def _take_carry_on_device(self, now: Tensor) -> Tensor:
        if not isinstance(self._last_rate, Tensor) or self._last_rate.device != now.device:
            check_not_capturing(now.device, "the last learning rate of a row memory")
            start = now if self._last_rate is None else torch.as_tensor(self._last_rate)
            self._last_rate = start.detach().to(now, copy=True)
        before = self._last_rate
        known = (now > 0) & (before > 0)
        change = torch.where(known, before / now, 1.0)
        # In place: a graph that replays this step reads what the last replay wrote.
        before.copy_(torch.where(now > 0, now, before))
        return (self.decay * change).sqrt()

    def carry_slots_after(self, rows: int, carry: float | Tensor) -> None:
        """Apply the carry to the slots beyond a batch of `rows` rows."""
        if self.x is None or self.g is None or self.rows <= rows:
            return
        if isinstance(carry, Tensor) or carry != 1:
            self.x[rows:] *= carry
            self.g[rows:] *= carry

    def follow_loss_scale(self) -> None:
        """Rescale the stored rows of G to the attached scaler's present scale."""
        scaler = None if self._scaler is None else self._scaler()
        # The scale as a tensor: `get_scale` synchronises with it. It exists once a loss was scaled.
        scale = None if scaler is None or not scaler.is_enabled() else scaler._scale
        if scale is None or self.g is None:
            return
        scale = scale.detach().reshape(1)
        if self._last_scale is None or self._last_scale.device != self.g.device:
            check_not_capturing(self.g.device, "the last loss scale of a row memory")
        if self._last_scale is None:
            self._last_scale = scale.to(self.g.device, copy=True)
            return
        scale = scale.to(self.g.device)
        self._last_scale = self._last_scale.to(self.g.device)
        rescale_(self.g, scale / self._last_scale)
        self._last_scale.copy_(scale)

    def fit(self, config: MemAOPConfig, in_features: int, out_features: int) -> None:
        """Become a memory for rows of these lengths, empty and attached as before, if it is not."""
        if (self.in_features, self.out_features) != (in_features, out_features):
            self.reset()
            self.in_features, self.out_features = in_features, out_features

    def reset(self) -> None:
        """Drop slots, rate and scale; the next step makes new ones."""
        self.x = self.g = self.filled = None
        self._last_rate = self._last_scale = None

    def state_dict(self) -> dict[str, Any]:
        """Contents for a checkpoint. The tensors are the memory's own, not copies."""
        state: dict[str, Any] = {"kind": self.kind}
        if self.x is not None:
            self._clear_unfilled()
            state |= {"x": self.x, "g": self.g, "filled": self.filled}
        if self._last_rate is not None:
            state["learning_rate"] = float(self._last_rate)
        if self._last_scale is not None:
            state["loss_scale"] = float(self._last_scale)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the contents of another memory of the same kind and shape (copied).

        Raises:
            ValueError: The state is of another kind or of rows of other lengths.
        """
        self.check_state(state)
        self.reset()
        self._last_rate = state.get("learning_rate")
        if "loss_scale" in state:
            self._last_scale = torch.tensor([state["loss_scale"]], dtype=torch.float32)
        if "x" in state:
            self.x, self.g, self.filled = (state[name].clone() for name in ("x", "g", "filled"))

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` if `state` cannot be loaded into this memory."""
        check_fields(self.kind, state)
        if "x" in state:
            check_fields(self.kind, state, "g", "filled")
            rows = state["x"].shape[0]
            check_shape("x", state["x"], (rows, self.in_features))
            check_shape("g", state["g"], (rows, self.out_features))
            check_shape("filled", state["filled"], (rows,))

    def _clear_unfilled(self) -> None:
        """Set the unfilled slots to zero, the value that they count as."""
        if self.x is not None and self.g is not None and self.filled is not None:
            self.x[~self.filled] = 0
            self.g[~self.filled] = 0

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a module conversion to its device and dtype (`fn` as in `Module._apply`)."""
        if self.x is None:
            return
        goal = fn(self.x.new_empty(0))
        if goal.is_meta:
            self.reset()
        else:
            self._move(goal.device, self.dtype or goal.dtype)

    def _move(self, device: torch.device, dtype: torch.dtype) -> None:
        assert self.x is not None
        assert self.g is not None
        assert self.filled is not None
        self._clear_unfilled()
        self.x, self.g = self.x.to(device, dtype), self.g.to(device, dtype)
        self.filled = self.filled.to(device)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_optimizer": None, "_group": 0, "_scaler": None}
