"""One layer's memory: the rows not computed yet, or the subspace its inputs live in.

A memory is a plain object, not a buffer: it belongs to one process (each rank of a distributed run
has its own), follows its layer across devices, and stays out of the layer's `state_dict`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memaop_triton.config import MemAOPConfig, check_config
from memaop_triton.dispatch import project_rows, transposed_mm

if TYPE_CHECKING:
    from memaop_triton.layer_state import LayerState


class _Memory:
    """What both kinds share."""

    #: Made by `layer_state.state_for` for a memory that is handed to `memaop_linear`.
    state: LayerState | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "state"}


class ResidualMemory(_Memory):
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
        decay: Fraction of a remembered outer product that survives a step, in (0, 1].
        dtype: Storage dtype; the input's if `None`.

    Attributes:
        x: [rows, N], or `None` before the first step.
        g: [rows, P], or `None` before the first step.
        filled: [rows], bool. A slot that is not filled counts as zero whatever it holds.
    """

    kind = "residual"

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
        self._last_rate: float | None = None
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._group = 0

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
        if self.x is None or self.g is None or self.filled is None:
            self.x = like.new_zeros((rows, self.in_features), dtype=dtype)
            self.g = like.new_zeros((rows, self.out_features), dtype=dtype)
            self.filled = like.new_zeros(rows, dtype=torch.bool)
        elif self.x.dtype != dtype or self.x.device != like.device:
            self._move(like.device, dtype)
        if self.rows < rows:
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
        filled[indices] = False
        lost = scores.isinf()
        if lost.any():
            # Zero times what such a row holds would still be NaN.
            filled[lost] = False
            self.x[: scores.numel()][lost] = 0
            self.g[: scores.numel()][lost] = 0

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of the attached optimizer's group, `None` if none is attached."""
        optimizer = None if self._optimizer is None else self._optimizer()
        return None if optimizer is None else float(optimizer.param_groups[self._group]["lr"])

    def attach(self, optimizer: torch.optim.Optimizer, group: int) -> None:
        """Read the learning rate from parameter group `group` of `optimizer` from now on.

        The optimizer is held weakly, and a copy of the memory (`deepcopy`, pickle) is not attached.
        """
        self._optimizer = weakref.ref(optimizer)
        self._group = group

    @property
    def is_paused(self) -> bool:
        """Whether the learning rate is zero, so that an SGD step would move nothing."""
        return self.learning_rate == 0

    def take_carry(self) -> float:
        """The factor c of this step, `√(decay · η_prev/η_now)`; η_now becomes η_prev."""
        now, before = self.learning_rate, self._last_rate
        self._last_rate = now
        change = before / now if now and before else 1.0
        return math.sqrt(self.decay * change)

    def carry_slots_after(self, rows: int, carry: float) -> None:
        """Apply the carry to the slots beyond a batch of `rows` rows."""
        if carry != 1 and self.x is not None and self.g is not None:
            self.x[rows:] *= carry
            self.g[rows:] *= carry

    def draw_signs(self, rows: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """σ: ±1 for each of `rows` rows, in the dtype and on the device of `like`."""
        signs = torch.empty(rows, dtype=like.dtype, device=like.device)
        return signs.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)

    def draw_seed(self, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Where the signs and the rounding of a step on a GPU start from: int64 [1] on `device`.

        A draw like any other: a run resumed with the generator's state repeats it.
        """
        return torch.randint(1 << 62, (1,), device=device, generator=generator)

    def fit(self, config: MemAOPConfig, in_features: int, out_features: int) -> None:
        """Become a memory for rows of these lengths, empty and attached as before, if it is not."""
        if (self.in_features, self.out_features) != (in_features, out_features):
            self.reset()
            self.in_features, self.out_features = in_features, out_features

    def reset(self) -> None:
        """Forget everything; the slots are made anew by the next step."""
        self.x = self.g = self.filled = None
        self._last_rate = None

    def state_dict(self) -> dict[str, Any]:
        """Contents for a checkpoint. The tensors are the memory's own, not copies."""
        state: dict[str, Any] = {"kind": self.kind, "signed": self.signed}
        if self.x is not None:
            self._clear_unfilled()
            state |= {"x": self.x, "g": self.g, "filled": self.filled}
        if self._last_rate is not None:
            state["learning_rate"] = self._last_rate
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the contents of another memory of the same kind and shape (copied).

        Raises:
            ValueError: The state is of another kind or of rows of other lengths.
        """
        self.check_state(state)
        self.reset()
        self._last_rate = state.get("learning_rate")
        if "x" in state:
            self.x, self.g, self.filled = (state[name].clone() for name in ("x", "g", "filled"))

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` if `state` cannot be loaded into this memory."""
        _check_fields(self.kind, state, "signed")
        if state["signed"] != self.signed:
            raise ValueError(
                f"signed={state['signed']} in the state, {self.signed} in this memory."
            )
        if "x" in state:
            _check_fields(self.kind, state, "g", "filled")
            rows = state["x"].shape[0]
            _check_shape("x", state["x"], (rows, self.in_features))
            _check_shape("g", state["g"], (rows, self.out_features))
            _check_shape("filled", state["filled"], (rows,))

    def _clear_unfilled(self) -> None:
        """Make the unfilled slots hold what they count as."""
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
        return super().__getstate__() | {"_optimizer": None, "_group": 0}


class SubspaceMemory(_Memory):
    """An orthonormal basis Q (N×rank) of the subspace that the inputs of a layer mostly live in.

    The part of every row inside the subspace enters the weight gradient exactly, and only the rest
    is sampled: dW = (Gᵀ Z) Qᵀ + Σ_{m∈S} w_m G_mᵀ (X_m − Z_m Qᵀ) with Z = X Q. Whatever Q is, the
    estimate stays unbiased; the closer Q follows the leading directions of X, the smaller its
    variance. Q starts from one power iteration on the first batch and takes another,
    Q ← qr(Xᵀ Z), every `refresh_every` steps.

    Args:
        in_features: N, length of a row of X.
        rank: Dimension of the subspace, at most `in_features`.
        refresh_every: Steps between two power iterations.

    Attributes:
        basis: [N, rank] float32 (float64 for float64 inputs), or `None` before the first step.
        step: Number of steps taken.

    Raises:
        ValueError: `rank` is below 1 or does not fit `in_features`.
    """

    kind = "subspace"

    def __init__(self, in_features: int, rank: int = 16, *, refresh_every: int = 8) -> None:
        if not min(1, in_features) <= rank <= in_features:
            raise ValueError(
                f"rank={rank} does not fit rows of in_features={in_features}: it must be from 1 to "
                f"{in_features}."
            )
        if refresh_every < 1:
            raise ValueError(f"refresh_every={refresh_every} must be at least 1.")
        self.in_features = in_features
        self.rank = rank
        self.refresh_every = refresh_every
        self.basis: Tensor | None = None
        self.step = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.basis is None else self.basis.nbytes

    def basis_for(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Q on the device and in the dtype of `x`; the first call makes it from `x` ([M, N])."""
        if self.basis is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            shape = (self.in_features, self.rank)
            start = torch.randn(shape, dtype=dtype, device=x.device, generator=generator)
            self.basis = torch.linalg.qr(start).Q
            self._iterate(x, project_rows(x, self.basis.to(x.dtype))[0])
        return self.basis.to(device=x.device, dtype=x.dtype)

    def end_step(self, x: Tensor, z: Tensor) -> None:
        """Count a step that projected `x` ([M, N]) to `z` ∝ X Q; refresh Q when it is due."""
        self.step += 1
        if self.step % self.refresh_every == 0:
            self._iterate(x, z)

    def _iterate(self, x: Tensor, z: Tensor) -> None:
        assert self.basis is not None
        product = transposed_mm(z, x).t().to(self.basis.dtype)  # [N, rank]
        # A row that is not finite must not get into Q; the gradient shows it. Nothing here waits
        # for the value.
        finite = product.isfinite().all()
        refreshed = torch.linalg.qr(torch.where(finite, product, self.basis)).Q
        self.basis = torch.where(finite, refreshed, self.basis)

    def fit(self, config: MemAOPConfig, in_features: int, out_features: int) -> None:
        """Become a memory for rows of this length, with the rank of `config`, if it is not."""
        if self.in_features != in_features:
            self.reset()
            self.in_features, self.rank = in_features, config.rank_for(in_features)

    def reset(self) -> None:
        """Forget the basis; the next step starts a new one."""
        self.basis = None
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """Contents for a checkpoint. The tensor is the memory's own, not a copy."""
        state: dict[str, Any] = {"kind": self.kind, "step": self.step}
        return state if self.basis is None else state | {"basis": self.basis}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the contents of another subspace memory of the same shape (copied).

        Raises:
            ValueError: The state is of another kind or its basis of another shape.
        """
        self.check_state(state)
        self.reset()
        self.step = state["step"]
        if "basis" in state:
            self.basis = state["basis"].clone()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` if `state` cannot be loaded into this memory."""
        _check_fields(self.kind, state, "step")
        if "basis" in state:
            _check_shape("basis", state["basis"], (self.in_features, self.rank))

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a module conversion to its device (`fn` as in `Module._apply`).

        Not to its dtype: a basis rounded to half precision would no longer be orthonormal.
        """
        if self.basis is None:
            return
        device = fn(self.basis.new_empty(0)).device
        if device.type == "meta":
            self.reset()
        else:
            self.basis = self.basis.to(device)


Memory = ResidualMemory | SubspaceMemory


def _memory_class(config: MemAOPConfig) -> type[Memory] | type[None]:
    if config.has_row_memory:
        return ResidualMemory
    return SubspaceMemory if config.memory == "subspace" else NoneType


def new_memory(config: MemAOPConfig, in_features: int, out_features: int) -> Memory | None:
    """The empty memory that `config` asks for in a layer of this size; `None` for `"none"`."""
    if config.has_row_memory:
        return ResidualMemory(
            in_features,
            out_features,
            signed=config.memory == "signed",
            decay=config.decay,
            dtype=config.memory_dtype,
        )
    if config.memory == "subspace":
        rank = config.rank_for(in_features)
        return SubspaceMemory(in_features, rank, refresh_every=config.refresh_every)
    return None


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
    if isinstance(memory, ResidualMemory) and memory.out_features != out_features:
        raise ValueError(
            f"memory holds rows of {memory.out_features} outputs, but the layer has {out_features}."
        )


def _check_fields(kind: str, state: Mapping[str, Any], *names: str) -> None:
    if state.get("kind") != kind:
        raise ValueError(f"state is of a {state.get('kind')!r} memory, this one is {kind!r}.")
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"state lacks {', '.join(missing)}: it is not a complete memory.")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, this memory needs {shape}.")
