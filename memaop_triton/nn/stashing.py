"""When a layer keeps its inputs as a `Stash`, and when several layers share one.

A stash frees memory only if the inputs themselves go. They stay where the operation that made them
needs them for its own backward pass, as a ReLU does its result: such inputs are kept as they are.
What a later operation keeps is not known here; `plan` finds that out.

An input that was cast or dropped out for one layer is made of a tensor that feeds others too. Who
makes it says so (`made_from`), and the stash is one of that tensor: beside it, only the mask of
dropout is the layer's own.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from memaop_triton.kernels.draws import draw_seed, draw_seed_tensor
from memaop_triton.memory.kinds import SubspaceMemory, rows_to_compute
from memaop_triton.memory.mask import Mask
from memaop_triton.memory.stash import BITS, Stash
from memaop_triton.nn.layer_state import Kept, LayerState

# Nodes of the autograd graph that keep their result, and those whose result is a view of what they
# were given.
_KEEP_THEIR_RESULT = frozenset(
    (
        *("ReluBackward0", "SigmoidBackward0", "TanhBackward0", "SoftmaxBackward0"),
        *("LogSoftmaxBackward0", "ExpBackward0", "Exp2Backward0", "Expm1Backward0"),
        *("SqrtBackward0", "RsqrtBackward0", "ReciprocalBackward0"),
        *("LeakyReluBackward1", "EluBackward1", "CeluBackward1"),  # in place
        "ScaledDotProductFlashAttentionForCpuBackward0",
        *("ScaledDotProductFlashAttentionBackward0", "ScaledDotProductEfficientAttentionBackward0"),
        "ScaledDotProductCudnnAttentionBackward0",
    )
)
_VIEWS = frozenset(
    (
        *("ViewBackward0", "UnsafeViewBackward0", "AliasBackward0", "ReshapeAliasBackward0"),
        *("TransposeBackward0", "PermuteBackward0", "TBackward0", "SqueezeBackward0"),
        *("SqueezeBackward1", "UnsqueezeBackward0", "SliceBackward0", "SelectBackward0"),
        *("ExpandBackward0", "AsStridedBackward0", "UnflattenBackward0"),
    )
)
_OF_A_LEAF = "torch::autograd::AccumulateGrad"
# Layers that are fed by one tensor follow each other closely.
_MOST_REMEMBERED = 8


class _Made(NamedTuple):
    """A stash that was made a moment ago; it holds none of these tensors.

    Attributes:
        source: The layer's argument.
        version: Of it.
        dtype: In which it was multiplied.
        bits: Of the stash.
        has_inside: Whether a part of the rows is kept beside it.
        tensors: The stash's.
    """

    source: TensorWeakRef
    version: int
    dtype: torch.dtype
    bits: int
    has_inside: bool
    tensors: tuple[TensorWeakRef, ...]


class _Origin(NamedTuple):
    """What a tensor was made of, as an attribute of the tensor.

    Attributes:
        version: Of the tensor.
        source: What it was made of.
        source_version: Of that.
        mask: Of dropout between the two; `None` if it was cast only.
    """

    version: int
    source: TensorWeakRef
    source_version: int
    mask: Mask | None


_ORIGIN = "_memaop_origin"
_recent = threading.local()


def made_from(made: Tensor, source: Tensor, mask: Mask | None = None) -> None:
    """Say what a tensor that layers will be given was made of.

    Args:
        made: This tensor, [..., N].
        source: Of the same shape; it may be of another dtype. If it was made of a third one, then
            so was `made`.
        mask: Of dropout, if it lies between the two.
    """
    if made.is_inference() or source.is_inference():
        return
    first, mask_before = _origin_of(source)
    if mask_before is not None:  # two of them are one dropout with a mask that nobody has
        return
    origin = _Origin(made._version, TensorWeakRef(first), first._version, mask)
    setattr(made, _ORIGIN, origin)


def _origin_of(a: Tensor) -> tuple[Tensor, Mask | None]:
    """What `made_from` said; the tensor itself if that was nothing, or is not true any more."""
    origin: _Origin | None = getattr(a, _ORIGIN, None)
    if origin is not None and origin.version == a._version:
        source = origin.source()
        if isinstance(source, Tensor) and source._version == origin.source_version:
            return source, origin.mask
    return a, None


def kept_of(x: Tensor, source: Tensor, weight: Tensor, state: LayerState) -> tuple[Tensor, ...]:
    """The tensors of a `Stash` of `x`; none if `x` itself is to be kept. Recorded in `state.kept`.

    A seed is drawn in any case.

    Args:
        x: [..., N], as it is multiplied.
        source: The layer's argument, of which autocast may have made `x`; `made_from` may have said
            what this was made of.
        weight: [P, N].
        state: Of a layer that has a stash.
    """
    if x.numel() == 0 or weight.shape[0] == 0:
        skip_draw(x.device)
        return ()
    source, mask = _origin_of(source)
    keeper = _keeper_of(x) if x is source else ""
    if keeper:
        itself = weakref.ref(x)
        state.kept = Kept(x.nbytes, x.nbytes, itself, itself, keeper)
        skip_draw(x.device)
        return ()
    if mask is not None:
        return _kept_beside_mask(x, source, mask, state)
    rows = x.detach().reshape(-1, x.shape[-1])
    bits, basis = BITS[state.stash], _basis_for(rows, weight.shape[0], state)
    found = _find(source, x.dtype, bits, inside=(False, True) if basis is None else (True,))
    if found is None:
        found = _remembered(source, x.dtype, bits, Stash.of(rows, bits, basis))
    state.kept = _record(x, found)
    return found


def skip_draw(device: torch.device) -> None:
    """Draw the seed of a stash that is not made.

    Activation checkpointing runs a forward pass twice, from one state of the generator: without
    gradients or without what autograd saves, and then with them. Only then do layers share a stash.
    As every layer draws in both passes, what is drawn after it, as by dropout, is the same.
    """
    if device.type == "cuda":
        draw_seed(device)  # without a launch
    else:
        draw_seed_tensor(device)  # also on a device without numbers


def _kept_beside_mask(
    x: Tensor, source: Tensor, mask: Mask, state: LayerState
) -> tuple[Tensor, ...]:
    """The tensors of a `Stash` of `source`, of which dropout with this mask has made `x`."""
    bits = BITS[state.stash]
    found = _find(source, x.dtype, bits, inside=(False,))
    if found is None:
        rows = source.detach().to(x.dtype).reshape(-1, x.shape[-1])
        found = _remembered(source, x.dtype, bits, Stash.of(rows, bits))
    state.kept = _record(x, found, mask.bits.nbytes)
    return *mask, *found


def new_stash(
    rows: Tensor, out_features: int, state: LayerState, *, has_inside: bool = True
) -> Stash:
    """A stash of `rows` ([M, N]) that is shared with no other layer; recorded in `state.kept`.

    Nothing is kept inside of a subspace unless `has_inside`.
    """
    basis = _basis_for(rows, out_features, state) if has_inside else None
    stash = Stash.of(rows, BITS[state.stash], basis)
    state.kept = _record(rows, stash.tensors)
    return stash


def _record(x: Tensor, tensors: tuple[Tensor, ...], mask_bytes: int = 0) -> Kept:
    nbytes = sum(a.nbytes for a in tensors)
    return Kept(x.nbytes, nbytes, weakref.ref(x), weakref.ref(tensors[0]), mask_bytes=mask_bytes)


def _basis_for(rows: Tensor, out_features: int, state: LayerState) -> Tensor | None:
    """Of the subspace of X that the memory keeps, where `rows` ([M, N]) will be sampled.

    Also where dW is sampled beside a subspace of G: what is rounded is the smaller for it.
    """
    memory = state.memory
    if not isinstance(memory, SubspaceMemory):
        return None
    count, in_features = rows.shape
    k = rows_to_compute(state.config, memory, count, in_features, out_features)
    basis = memory.bases.get("input")
    rank = memory.rank if memory.side == "input" else memory.choice.max_rank
    if k == count or rank == 0 or basis is None or basis.q is None:
        return None
    return basis.columns(rows, rank)


def _keeper_of(x: Tensor) -> str:
    """Who made `x` and holds it until the backward pass; "" if nobody does."""
    node: Any = x.grad_fn
    if node is None:
        return "a leaf" if x.requires_grad else ""  # a Parameter
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    if node is None:
        return ""
    name: str = node.name()
    if name == _OF_A_LEAF:
        return "a leaf"
    return name.partition("Backward")[0] if name in _KEEP_THEIR_RESULT else ""


def _find(
    source: Tensor, dtype: torch.dtype, bits: int, *, inside: tuple[bool, ...]
) -> tuple[Tensor, ...] | None:
    """The tensors of a stash of the same numbers, if they are still there.

    `inside`: whether a part of the rows may be kept beside it.
    """
    for made in getattr(_recent, "made", ()):
        if made.source() is not source or made.version != source._version:
            continue
        if made.dtype == dtype and made.bits == bits and made.has_inside in inside:
            tensors = [one() for one in made.tensors]
            if all(isinstance(one, Tensor) for one in tensors):
                skip_draw(source.device)
                return tuple(tensors)
    return None


def _remembered(source: Tensor, dtype: torch.dtype, bits: int, stash: Stash) -> tuple[Tensor, ...]:
    """The tensors of a new stash, which later layers will find."""
    if not source.is_inference():
        made = _Made(
            TensorWeakRef(source),
            source._version,
            dtype,
            bits,
            stash.inside is not None,
            tuple(map(TensorWeakRef, stash.tensors)),
        )
        if not hasattr(_recent, "made"):
            _recent.made = deque(maxlen=_MOST_REMEMBERED)
        _recent.made.appendleft(made)
    return stash.tensors


def stash_of(tensors: Sequence[Tensor], state: LayerState, dtype: torch.dtype) -> Stash:
    """The stash of a layer's inputs, of which `kept_of` has given the tensors."""
    return Stash.from_tensors(tensors, BITS[state.stash], dtype)
