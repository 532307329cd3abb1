"""Which saved tensors of which operations bear rounding, and how they are found in a graph.

Rounding with a random error of mean zero leaves a gradient unbiased where that is linear in the
saved tensor, and nearly so where it is smooth in it. It ruins what compares the saved tensor with
something: the result of a ReLU, of which half is exactly zero, the places of a maximum. And what
divides by it. So tensors are rounded by name of the operation that saved them, and an operation
that is not listed here keeps what it saves as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

_ATTENTION = ("query", "key", "value", "output")
# By name of the node, and of what it has saved.
_ROUNDED = {
    # The gradient is linear in what is saved.
    "AddmmBackward0": ("mat1", "mat2"),
    "MmBackward0": ("self", "mat2"),
    "BmmBackward0": ("self", "mat2"),
    "BaddbmmBackward0": ("batch1", "batch2"),
    "MulBackward0": ("self", "other"),
    "ConvolutionBackward0": ("input",),
    # Linear for weight and bias; means and deviations are saved beside it, and stay as they are.
    "NativeLayerNormBackward0": ("input",),
    "FusedRmsNormBackward0": ("input",),
    "NativeGroupNormBackward0": ("input",),
    "NativeBatchNormBackward0": ("input",),
    "CudnnBatchNormBackward0": ("input",),
    "MiopenBatchNormBackward0": ("input",),
    # Smooth.
    "GeluBackward0": ("self",),
    "SiluBackward0": ("self",),
    "MishBackward0": ("self",),
    "GluBackward0": ("self",),
    "SigmoidBackward0": ("result",),
    "TanhBackward0": ("result",),
    "SoftmaxBackward0": ("result",),
    # Attention computes its weights again from q and k; the sums that normalise them are exact.
    "ScaledDotProductFlashAttentionForCpuBackward0": _ATTENTION,
    "ScaledDotProductFlashAttentionBackward0": _ATTENTION,
    "ScaledDotProductEfficientAttentionBackward0": _ATTENTION,
    "ScaledDotProductCudnnAttentionBackward0": _ATTENTION,
}
# Layers of ours save their inputs first, or `None` where they keep them in another form.
_OUR_LAYERS = frozenset(("_EagerFunctionBackward", "_MemAOPLinearFunctionBackward"))
_RESULTS = frozenset(("result", "output"))
_RAW = "_raw_saved_"
# What a Parameter goes through before it is multiplied, autocast's copy included.
_STILL_A_PARAMETER = frozenset(
    (
        *("ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0"),
        *("ViewBackward0", "UnsafeViewBackward0", "ExpandBackward0", "CloneBackward0"),
    )
)
_OF_A_LEAF = "torch::autograd::AccumulateGrad"


class Saved(NamedTuple):
    """What a node of the autograd graph has saved.

    Attributes:
        handle: PyTorch's, that takes hooks.
        tensor: The tensor.
        bears_rounding: Whether it may be rounded, as far as the operation is concerned.
        read: Returns the tensor as the backward pass will get it.
    """

    handle: Any
    tensor: Tensor
    bears_rounding: bool
    read: Callable[[], Any]

    def is_unchanged(self) -> bool:
        """Whether nobody has written to it since it was saved; autograd will raise if so."""
        try:
            self.read()
        except RuntimeError:
            return False
        return True


def new_nodes(outputs: Iterable[Tensor], visited: set[Any]) -> list[Any]:
    """The nodes behind `outputs` that are not `visited` yet; they are then."""
    found = []
    waiting = [a.grad_fn for a in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        found.append(node)
        waiting += [source for source, _ in node.next_functions]
    return found


def saved_by(node: Any) -> Iterator[Saved]:
    """The tensors that `node` holds; none of those that somebody's hooks have taken over."""
    name = node.name()
    rounded = _ROUNDED.get(name, ())
    for operand in _saved_operands(type(node)):
        try:
            handles = getattr(node, f"{_RAW}{operand}")
        except RuntimeError:  # the graph was freed
            continue
        handles = handles if isinstance(handles, tuple) else (handles,)
        for place, handle in enumerate(handles):
            if handle.unpack_hook is not None:
                continue
            tensor = handle.data
            if type(tensor) not in (Tensor, Parameter) or tensor.layout != torch.strided:
                continue
            if operand in _RESULTS:
                bears, read = (
                    operand in rounded,
                    functools.partial(getattr, node, f"_saved_{operand}"),
                )
            else:
                bears = operand in rounded or (name in _OUR_LAYERS and place == 0)
                bears, read = bears and _is_activation(tensor), handle.unpack
            yield Saved(handle, tensor, bears, read)


# A class of nodes for each operation, and one for each `autograd.Function`.
@functools.lru_cache(maxsize=1024)
def _saved_operands(kind: Hashable) -> tuple[str, ...]:
    return tuple(name.removeprefix(_RAW) for name in dir(kind) if name.startswith(_RAW))


def _is_activation(a: Tensor) -> bool:
    """Whether gradients flow through `a` that are not only those of one leaf.

    A mask and a batch have none. A leaf stays in memory as long as its owner holds it.
    """
    if not a.requires_grad or a.is_leaf:
        return False
    if a._base is not None and a._base.is_leaf and a._base.requires_grad:
        return False
    node: Any = a.grad_fn
    while node.name() in _STILL_A_PARAMETER:
        node = node.next_functions[0][0]
    return bool(node.name() != _OF_A_LEAF)
