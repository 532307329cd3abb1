"""Which saved tensors of which operations may be held in fewer bits, and how to find them.

Rounding with a random error of mean zero leaves a gradient unbiased where that is linear in the
saved tensor, and nearly so where it is smooth in it. It ruins the gradient of an operation that
compares the saved tensor with something, as a maximum does, or divides by it, and that of a ReLU,
half of whose results are exactly zero; but a ReLU takes no more than signs. So what is done with a
tensor depends on the operation that saved it, and one that is not listed here keeps all as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from memaop_triton.memory.rounded import RoundedTensor
from memaop_triton.memory.signs import SignBits

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
    # Only sizes are read.
    "MaxPool2DWithIndicesBackward0": ("self",),
    "AvgPool2DBackward0": ("self",),
}
_REDUCED_TO_SIGNS = {
    "ReluBackward0": ("result",),
    "LeakyReluBackward0": ("self",),
    "LeakyReluBackward1": ("result",),
}
# Layers of ours save their inputs first, or `None` where they keep them in another form.
_OUR_LAYERS = frozenset(
    ("_EagerFunctionBackward", "_MemAOPLinearFunctionBackward", "_MemAOPConvFunctionBackward")
)
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

Form = type[RoundedTensor] | type[SignBits]


class Saved(NamedTuple):
    """What a node of the autograd graph has saved.

    Attributes:
        handle: PyTorch's, that takes hooks.
        tensor: The tensor.
        form: In which the operation can do with it; `None` stands for its own.
        read: Returns the tensor as the backward pass will get it.
    """

    handle: Any
    tensor: Tensor
    form: Form | None
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
    for operand in _saved_operands(node.__class__):
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
            form = _form_for(name, operand, place)
            if operand in _RESULTS:
                read = functools.partial(getattr, node, f"_saved_{operand}")
            else:
                form, read = form if _is_activation(tensor) else None, handle.unpack
            yield Saved(handle, tensor, form, read)


def _form_for(node: str, operand: str, place: int) -> Form | None:
    if operand in _REDUCED_TO_SIGNS.get(node, ()):
        return SignBits
    is_ours = node in _OUR_LAYERS and place == 0
    return RoundedTensor if is_ours or operand in _ROUNDED.get(node, ()) else None


# A class of nodes for each operation, and one for each `autograd.Function`.
@functools.lru_cache(maxsize=1024)
def _saved_operands(kind: type) -> tuple[str, ...]:
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
