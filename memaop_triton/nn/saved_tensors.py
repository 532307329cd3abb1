"""`compress_saved`: what the operations of a model save for the backward pass, in 8 bits a number.

When one of its modules is done, a hook walks over the new nodes of the autograd graph and puts
hooks on what they have saved. Those of `torch.autograd.graph.saved_tensors_hooks` would not be told
which operation saves a tensor, and it depends on that whether the tensor bears rounding.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from memaop_triton.dispatch import DTYPES
from memaop_triton.memory.rounded import RoundedTensor, is_dense
from memaop_triton.memory.signs import SignBits
from memaop_triton.nn.autograd import no_autocast
from memaop_triton.nn.saved_operands import Form, new_nodes, saved_by

# Smaller tensors are not worth the calls.
_LEAST_BYTES = 64 << 10
_DEVICES = ("cpu", "cuda")


def compress_saved(model: nn.Module) -> CompressedSaved:
    """Hold what the operations of `model` save for their backward passes in 8 bits a number.

    A GELU, a norm or an attention saves its inputs, and often its result, between forward and
    backward pass. From now on these are rounded, with a random error of mean zero, as soon as the
    module that runs the operation is done, and are restored when the backward pass gets there.
    Outputs and loss do not change. Gradients stay unbiased where they are linear in what was saved:
    those of weights. Where they are smooth in it, as in a GELU or in an attention, whose weights
    are computed again from rounded queries and keys, a bias remains of the order of the error's
    square. It goes with `stash="int4"`, which takes less for the inputs of linear
    layers.

    Rounded are float16, bfloat16 and float32 tensors in at least 64 KiB of memory, on CPUs and CUDA
    devices, once each, that these operations save: matrix products and `einsum`, linear layers,
    convolutions, products of elements, layer, group, batch and RMS norm, GELU, SiLU, Mish, GLU,
    sigmoid, tanh, softmax, `scaled_dot_product_attention`, pooling in two dimensions. A ReLU, leaky
    or not, gets a bit a number, and its own gradient is exact. Never Parameters, buffers, leaves,
    what no gradient flows to (masks, batches, and the factors of a dropout, which are floats on a
    CPU), statistics, or a tensor that any other operation saves as well, because that would free
    nothing.

    Under activation checkpointing, offloading and other saved-tensor hooks nothing is rounded, nor
    what a region compiled by `torch.compile` saves. A tensor that is changed in place before it was
    rounded is autograd's error as ever; afterwards it may be changed. Second derivatives are those
    of the rounded tensors. Draws come from torch's default generator.

    Args:
        model: Is changed only by hooks on its modules: copies and pickles of it compress as well.

    Returns:
        Undoes it by `remove`, or as a context manager.
    """
    return CompressedSaved(model)


class CompressedSaved:
    """That a model holds in 8 bits what it saves for the backward pass, until `remove`.

    Args:
        model: As for `compress_saved`, which makes it.

    Attributes:
        exact_bytes: What the tensors that the last forward pass with gradients has rounded take as
            they were.
        held_bytes: What is held in their place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.exact_bytes = 0
        self.held_bytes = 0
        self._running = threading.local()
        self._hooks: list[RemovableHandle] = []
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no such hooks
                continue
            self._hooks += (
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            )

    def remove(self) -> None:
        """Hold what is saved from now on as it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_running"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _running=threading.local())

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not _is_traced_or_recomputed() and getattr(self._running, "forward", None) is None:
            self._running.forward = _ForwardPass(module, (args, kwargs))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        forward = None if _is_traced_or_recomputed() else getattr(self._running, "forward", None)
        if forward is None:
            return
        forward.pack_behind(output)
        if forward.module is module:
            self._running.forward = None
            if torch.is_grad_enabled():
                self.exact_bytes, self.held_bytes = forward.exact_bytes, forward.held_bytes


def compressed_in(model: nn.Module) -> list[CompressedSaved]:
    """What `compress_saved` has made of `model` and its parts, each once."""
    owners = (
        getattr(hook, "__self__", None)
        for module in model.modules()
        for hook in module._forward_hooks.values()
    )
    return list(dict.fromkeys(one for one in owners if isinstance(one, CompressedSaved)))


class _Place(NamedTuple):
    """Numbers in memory, as they were at some time."""

    storage: int
    offset: int | torch.SymInt
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    version: int


class _Packed(NamedTuple):
    """What is held in place of a saved tensor."""

    numbers: RoundedTensor | SignBits
    shape: torch.Size
    stride: tuple[int, ...]

    def restore(self) -> Tensor:
        with torch.no_grad(), no_autocast(self.numbers.device.type):
            return self.numbers.restore(self.shape, self.stride)


class _ForwardPass:
    """One forward pass of `module` on `inputs`, as far as it has come.

    Attributes:
        module: The outermost one.
        exact_bytes: Of what was packed so far.
        held_bytes: Of what it was packed into.
    """

    def __init__(self, module: nn.Module, inputs: Any) -> None:
        self.module = module
        self.exact_bytes = 0
        self.held_bytes = 0
        # What made the inputs is no part of this pass.
        self._visited = {a.grad_fn for a in _tensors(inputs)}
        self._kept: set[int] = set()  # storages that are held as they are
        # No other storage gets the address of one to which there is a weak reference.
        self._storages: dict[_Place, StorageWeakRef] = {}
        self._packed: dict[tuple[_Place, Form], RoundedTensor | SignBits] = {}

    def pack_behind(self, output: Any) -> None:
        """Pack what was saved on the way to `output` since the last call."""
        wanted = []
        for node in new_nodes(_tensors(output), self._visited):
            for saved in saved_by(node):
                if saved.form is not None and _is_worth_it(saved.tensor):
                    wanted.append((saved, saved.form))
                else:
                    self._kept.add(_storage(saved.tensor))
        for saved, form in wanted:
            # Beside what is held in any case bits would only add.
            if _storage(saved.tensor) not in self._kept and saved.is_unchanged():
                packed = self._pack(saved.tensor.detach(), form)
                saved.handle.register_hooks(lambda _, packed=packed: packed, _Packed.restore)

    def _pack(self, a: Tensor, form: Form) -> _Packed:
        is_whole = is_dense(a)
        dense = a if is_whole else a.contiguous()
        named = a.as_strided((a.numel(),), (1,)) if is_whole else a  # one name for all views of it
        storage = StorageWeakRef(a.untyped_storage())
        place = _Place(
            storage.cdata, a.storage_offset(), named.shape, named.stride(), a.dtype, a._version
        )
        if place not in self._storages:
            self._storages[place] = storage
            self.exact_bytes += a.nbytes
        if (place, form) not in self._packed:
            with torch.no_grad(), no_autocast(a.device.type):
                self._packed[place, form] = form(dense)
            self.held_bytes += self._packed[place, form].nbytes
        return _Packed(self._packed[place, form], dense.shape, dense.stride())


def _is_traced_or_recomputed() -> bool:
    """Whether a compiler is looking, or a backward pass computes again what it then uses up."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._current_graph_task_id() != -1
    )


def _tensors(values: Any) -> list[Tensor]:
    """Those in a nest of containers, without those of a transform of `torch.func`."""
    leaves = (values,) if isinstance(values, Tensor) else tree_leaves(values)
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return [a for a in leaves if isinstance(a, Tensor) and not is_wrapped(a)]


def _storage(a: Tensor) -> int:
    address: int = a.untyped_storage()._cdata
    return address


def _is_worth_it(a: Tensor) -> bool:
    if a.dtype not in DTYPES or a.device.type not in _DEVICES:
        return False
    nbytes = a.untyped_storage().nbytes()  # all of it stays for a part; some expand to more
    return max(_LEAST_BYTES, a.nbytes) <= nbytes
