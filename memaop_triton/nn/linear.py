"""The drop-in layer `MemAOPLinear`, what all converted layers share, and their classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self, TypeGuard, TypeVar

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from memaop_triton.config import MemAOPConfig, check_config
from memaop_triton.memory.kinds import Memory, SubspaceMemory, new_memory
from memaop_triton.nn.classes import (
    Converted,
    exchange_class,
    has_own_forward,
    shallow_copy,
    stands_for_dense,
)
from memaop_triton.nn.functional import linear_of_state, prepared
from memaop_triton.nn.layer_state import LayerState

L = TypeVar("L", bound="MemAOPLayer")


class MemAOPLayer(Converted):
    """What all converted layers are: a dense layer with a backward pass as `config` configures it.

    Parameters, `state_dict` and forward pass are those of the dense layer. The approximation
    applies in training mode; after `.eval()` the gradients are exact and the memory is not used.
    Call `reset_memory` on a copy that is not trained, or it holds a copy of the memory too.
    """

    #: Whether the weight is stored as [in_features, out_features].
    is_transposed = False

    in_features: int
    out_features: int
    weight: Tensor
    layer_state: LayerState

    def revert_(self) -> nn.Module:
        """Turn this layer back into the dense class it came from; the memory is dropped.

        Raises:
            ValueError: The layer was parametrised after it was converted.
        """
        self.check_revertible()
        self.layer_state.release()
        del self.layer_state
        return self._exchange_back()

    @property
    def config(self) -> MemAOPConfig:
        """What the backward pass computes."""
        return self.layer_state.config

    @property
    def weight_parameter(self) -> nn.Parameter | None:
        """What the gradient of the weight is one of; `None` if the weight is computed."""
        return self._parameters.get("weight")

    @property
    def gradient_shape(self) -> tuple[int, int]:
        """Of the matrix that observers are shown as dW."""
        return self.out_features, self.in_features

    @property
    def memory(self) -> Memory | None:
        """The memory, kept between steps; `None` for `memory="none"`.

        Not a buffer: it is saved by `memory_state_dict`, follows `.to()`, and is never synchronised
        between processes. Where the weight is divided by tensor parallelism, one for the columns of
        this process.
        """
        memory, weight = self.layer_state.memory, self.weight_parameter
        # `fully_shard` gathers the whole weight before the layer computes with it.
        is_gathered = getattr(self, "_is_fsdp_managed_module", False)
        if memory is not None and _is_distributed(weight) and not is_gathered:
            from memaop_triton.nn import tensor_parallel

            outputs_first = weight.t() if self.is_transposed else weight
            self.layer_state.fit(*tensor_parallel.local_sizes(outputs_first))
        return memory

    def set_ratio_(self, ratio: float) -> None:
        """Compute this share of the rows from the next backward pass on, whole blocks as before.

        The memory stays, and no compiled graph is built anew. A layer that was given `k` or a
        budget has a ratio from then on, and keeps the rank that its subspace has. `ratio=1` is
        exact and scores nothing, once a row memory is empty.

        Args:
            ratio: K/M, in (0, 1].

        Raises:
            ValueError: `ratio` is out of range.
            TypeError: `ratio` is not a number.
        """
        config = self.config.spending(ratio=ratio)
        self.layer_state.release()
        if self.config.leaves_rank_open and isinstance(self.memory, SubspaceMemory):
            assert config.subspace is not None
            kept = dataclasses.replace(config.subspace, rank=self.memory.keep_rank())
            config = dataclasses.replace(config, memory=kept)
        self.layer_state.config = config

    def set_budget_(self, budget: float) -> None:
        """Compute the rows and rank that fit this share of dense's FLOPs from the next pass on.

        The memory stays; where the budget chooses the rank of its subspace it is chosen again.

        Args:
            budget: FLOPs of the weight gradient over dense's, in (0, 1).

        Raises:
            ValueError: `budget` is out of range.
            TypeError: `budget` is not a number.
        """
        self.layer_state.config = self.config.spending(budget=budget)
        self.layer_state.release()
        if isinstance(self.memory, SubspaceMemory):
            self.memory.change_budget(self.config)

    def _is_dense(self) -> bool:
        """Whether a call computes as the dense layer does; a trace of `torch.jit` holds that."""
        return not self.training or self.layer_state.is_native or torch.jit._trace.is_tracing()

    def _compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The forward pass in training; `weight` is [out_features, in_features]."""
        x, weight, bias = prepared(input, weight, bias)
        if _is_distributed(weight) and torch.is_grad_enabled():
            from memaop_triton.nn import tensor_parallel

            return tensor_parallel.linear(x, weight, bias, self.layer_state)
        return linear_of_state(x, weight, bias, self.layer_state, source=input)

    def _set_config(self, config: MemAOPConfig) -> None:
        check_config(config)
        if config.is_auto:
            raise ValueError(
                "ratio='auto' compares all layers of a model: convert_(model, config) takes it, a "
                "layer by itself needs a number."
            )
        memory = new_memory(config, self.in_features, self.out_features)
        self.layer_state = LayerState(config, memory, is_transposed=self.is_transposed)
        # Not `self.weight`: a parametrised one would be computed.
        parameter = self.weight_parameter
        found = self.parameters() if parameter is None else iter([parameter])
        device = next((p.device for p in found), torch.device("cpu"))
        self.layer_state.move(device)

    def extra_repr(self) -> str:
        """The layer's sizes and the settings that differ between layers."""
        config = self.config
        given = ((name, getattr(config, name)) for name in ("k", "budget", "ratio"))
        budget = next(f"{name}={value:g}" for name, value in given if value is not None)
        if self.layer_state.controller is not None:
            budget = f"ratio=auto, {'exact' if config.ratio == 1 else f'{config.ratio:g}'} now"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        parts = [super().extra_repr() or sizes, budget, f"selection={config.selection}"]
        parts.append(f"memory={config.memory_name}")
        if isinstance(self.memory, SubspaceMemory):
            parts.append(f"rank={self.memory.rank}")
        if config.scores != "norms":
            parts.append(f"scores={config.scores}")
        if config.stash != "exact":
            parts.append(f"stash={config.stash}")
        if config.grad_input is not None:
            parts.append(f"grad_input={config.grad_input_name}")
        if config.projected is not None and config.projected.budget is not None:
            parts.append(f"projection_budget={config.projected.budget:g}")
        return ", ".join(parts)

    def _replicate_for_data_parallel(self) -> Self:
        if self.training:
            raise RuntimeError(
                "nn.DataParallel copies a layer to several devices in every step, and the copies "
                "would share one memory and one source of draws: use "
                "torch.nn.parallel.DistributedDataParallel, or .eval() for exact gradients."
            )
        replica: Self = super()._replicate_for_data_parallel()
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.layer_state.convert(fn)
        return self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if self.layer_state.controller is not None:
            self.layer_state.controller.adopt(self)


@stands_for_dense
class MemAOPLinear(MemAOPLayer, nn.Linear):
    """`torch.nn.Linear` whose backward pass is computed as configured by `config`.

    The arguments are those of `nn.Linear`, and `config`: `MemAOPConfig()` if `None`. A scripted or
    traced layer (`torch.jit`) is a dense one.
    """

    dense_class: type[nn.Module] = nn.Linear
    # Left out by torch.jit.script, which makes a dense layer.
    __jit_ignored_attributes__ = ("dense_class", "is_transposed", "kind", "layer_state")
    __jit_unused_properties__ = ("config", "gradient_shape", "memory", "weight_parameter")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: MemAOPConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_config(MemAOPConfig() if config is None else config)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: MemAOPConfig | None = None) -> MemAOPLinear:
        """A new layer that shares the Parameters of `linear` and keeps its hooks and mode.

        Raises:
            TypeError: `linear` is not an `nn.Linear`.
            ValueError: `linear` is a subclass with a forward pass of its own, or not initialised.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}.")
        return cls.adopt_(shallow_copy(linear), config)

    @staticmethod
    def adopt_(linear: nn.Linear, config: MemAOPConfig | None = None) -> MemAOPLinear:
        """Turn `linear` itself into a `MemAOPLinear`: the same object, its class exchanged.

        Raises:
            ValueError: As `from_linear`, or `linear` is a `MemAOPLinear` already.
        """
        return adopt(linear, nn.Linear, MemAOPLinear, config)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return F.linear(input, self.weight, self.bias)
        else:  # noqa: RET505, TorchScript leaves out this branch, and nothing that follows it
            return self._forward(input)

    @torch.jit.unused
    def _forward(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):
            return traced(self, input, lambda x: F.linear(x, self.weight, self.bias))
        if self._is_dense():
            return F.linear(input, self.weight, self.bias)
        return self._compute(input, self.weight, self.bias)


def traced(layer: MemAOPLayer, input: Any, dense: Callable[[Any], Any]) -> Any:
    """A call of the layer in a graph of `torch.fx`, as for any layer of `torch.nn`.

    Of a layer that is traced by itself its forward pass, which is `dense`.
    """
    tracer = input.tracer
    if tracer.root is layer:
        return dense(input)
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})


def _is_distributed(a: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a tensor is a `DTensor`, without importing that."""
    return hasattr(a, "device_mesh")


def adopt(
    layer: nn.Module, dense: type[nn.Module], kind: type[L], config: MemAOPConfig | None = None
) -> L:
    """Turn `layer` itself into a converted layer: the same object, its class exchanged.

    Args:
        layer: Of the class `dense`, or of a subclass.
        dense: Whose forward pass is replaced.
        kind: What a layer of the class `dense` becomes.
        config: `MemAOPConfig()` if `None`.

    Raises:
        ValueError: As `check_adoptable`, or `config` is not for such a layer, which stays as it is.
    """
    config = MemAOPConfig() if config is None else config
    check_config(config)
    check_adoptable(layer, dense)
    before = layer.__class__
    exchange_class(layer, kind)
    assert isinstance(layer, kind)
    try:
        layer._set_config(config)
    except BaseException:
        layer.__class__ = before  # type: ignore[assignment]
        raise
    return layer


def check_adoptable(layer: nn.Module, dense: type[nn.Module]) -> None:
    """Raise `ValueError` if `layer`, a `dense` one, cannot be converted."""
    name = type(layer).__name__
    if isinstance(layer, MemAOPLayer):
        raise ValueError(f"{name} is converted already: revert_ it first.")
    if isinstance(layer.weight, nn.UninitializedParameter):
        raise ValueError(f"{name} is not initialised: run one forward pass first.")
    ours = ("config", "memory", "layer_state")
    taken = [attribute for attribute in ours if hasattr(layer, attribute)]
    if taken:
        raise ValueError(
            f"{name} has an attribute {taken[0]!r} of its own, which conversion would replace: "
            "rename it, or leave the layer out with filter_fn."
        )
    if has_own_forward(layer, dense):
        raise ValueError(
            f"{name} has a forward pass of its own, which conversion would replace: leave it out "
            "with filter_fn, or call memaop_linear inside it."
        )
