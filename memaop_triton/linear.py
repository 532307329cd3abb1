"""The drop-in layer `MemAOPLinear` and its functional form `memaop_linear`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memaop_triton import ops as ops  # registers torch.ops.memaop_triton
from memaop_triton.config import MemAOPConfig, check_config
from memaop_triton.layer_state import LayerState, state_for
from memaop_triton.memory import Memory, SubspaceMemory, check_memory, new_memory

M = TypeVar("M", bound=nn.Module)


class _MemAOPLinearFunction(torch.autograd.Function):
    """y = x Wᵀ + b, with the approximate backward pass; touches the memory in backward only."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        handle: Tensor,
        order: Tensor,
        state: LayerState,
    ) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, handle, order, state = inputs
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        # Out of the saved tensors: a graph writes to `order` between the backward passes of a layer
        # that is used twice. The state is kept alive.
        ctx.handle, ctx.order, ctx.state = handle, order, state
        ctx.sampled = needs_x and state.config.grad_input == "sampled"
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Casts were made in the forward pass, whatever region backward is called from.
        with torch.no_grad(), no_autocast(grad_output.device.type):
            gradients: tuple[Tensor | None, ...] = _backward(ctx, grad_output)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            sources = (grad_output, *ctx.saved_tensors)
            gradients = tuple(
                None if a is None else _DifferentiableOnce.apply(a, *sources) for a in gradients
            )
        return *gradients, None, None, None


class _DifferentiableOnce(torch.autograd.Function):
    """A gradient as it is, still linked to what it was made of, so that a second one is refused.

    Without the link a second derivative would be taken for zero.
    """

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the gradient of a MemAOPLinear cannot be differentiated again, because it is computed "
            "from part of the rows: call .eval() on the layer, which makes it exact, or revert_ it."
        )


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    g = _as_rows(grad_output)
    rows = g.new_empty(0) if x is None else _as_rows(x)
    dx = dw = db = None
    if ctx.sampled:
        dx, dw, db = torch.ops.memaop_triton.sampled_backward(
            rows, g, weight, ctx.handle, ctx.order, weight_grad=needs_weight, bias_grad=needs_bias
        )
    else:
        if needs_x:
            dx = g @ weight
        if needs_weight:
            dw, db = torch.ops.memaop_triton.weight_grad(
                rows, g, ctx.handle, ctx.order, bias_grad=needs_bias
            )
        elif needs_bias:
            db = g.sum(0)
    if dx is not None:
        dx = dx.reshape(*grad_output.shape[:-1], weight.shape[1])
    return dx, dw if needs_weight else None, db if needs_bias else None


def _is_distributed(a: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a tensor is a `DTensor`, without importing that."""
    return hasattr(a, "device_mesh")


def _as_rows(a: Tensor) -> Tensor:
    """[..., N] as a matrix of rows."""
    return a.unsqueeze(0) if a.dim() == 1 else a.flatten(0, -2)


def memaop_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: MemAOPConfig,
    memory: Memory | None = None,
) -> Tensor:
    """`torch.nn.functional.linear` with an approximate weight gradient (and input gradient).

    The result and the bias gradient are exact. The weight gradient is computed from K of the M rows
    of `x` as `config` says, and likewise the input gradient with `grad_input="sampled"`. Every draw
    comes from the default generator of the tensors' device.

    Args:
        x: [..., N], any floating dtype. The leading dimensions make M rows.
        weight: [P, N], dtype of `x`.
        bias: [P] or `None`.
        config: What to compute in the backward pass.
        memory: What `new_memory(config, N, P)` made for this weight, updated by each backward pass.
            `None` for `memory="none"`.

    Returns:
        [..., P]. Under autocast the operands are cast as for any linear layer. Differentiable once,
        and not under `torch.func.vmap`.

    Raises:
        TypeError: `x` is not floating point, or the dtypes differ.
        ValueError: The shapes do not fit, or `memory` is not of the kind that `config` asks for.
    """
    x, weight, bias = _prepared(x, weight, bias)
    check_memory(config, memory, weight.shape[1], weight.shape[0])
    return linear_of_state(x, weight, bias, state_for(config, memory))


def _prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands checked, and cast where autocast asks for it."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x, weight = _autocast(x), _autocast(weight)
        bias = None if bias is None else _autocast(bias)
    _check_operands(x, weight, bias)
    return x, weight, bias


def linear_of_state(x: Tensor, weight: Tensor, bias: Tensor | None, state: LayerState) -> Tensor:
    """`memaop_linear` for operands that have been checked and a layer's state."""
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return F.linear(x, weight, bias)
    if state.handle.device != x.device:
        state.move(x.device)
    result: Tensor = _MemAOPLinearFunction.apply(x, weight, bias, state.handle, state.order, state)
    return result


def no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off for a type of device, if it is on."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _autocast(a: Tensor) -> Tensor:
    """What autocast makes of an operand of a linear layer: float64 and integers stay."""
    eligible = a.is_floating_point() and a.dtype != torch.float64
    return a.to(torch.get_autocast_dtype(a.device.type)) if eligible else a


def _check_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(
            f"x must be of a floating-point dtype, got {x.dtype}: convert it, x.to({weight.dtype})."
        )
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got {tuple(weight.shape)}.")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but weight {tuple(weight.shape)} needs rows of "
            f"{weight.shape[1]} inputs as the last dimension."
        )
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x is {x.dtype} but weight is {weight.dtype}: convert one, or use torch.autocast."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, weight needs ({weight.shape[0]},).")


class MemAOPLinear(nn.Linear):
    """`torch.nn.Linear` whose backward pass is computed as `config` says.

    Parameters, `state_dict` and forward pass are those of `nn.Linear`. The approximation applies in
    training mode; after `.eval()` the gradients are exact and the memory rests, as with dropout.
    Call `reset_memory` on a copy that is not trained, or it holds a copy of the memory too.

    Args:
        in_features: N.
        out_features: P.
        bias: Whether to add a learned bias.
        config: What the backward pass computes; `MemAOPConfig()` if `None`.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        config: The configuration.
        memory: This layer's memory, `None` for `memory="none"`. Not a buffer: it is saved by
            `memory_state_dict`, follows `.to()`, and is never synchronised between processes.
    """

    #: What `revert_` turns the layer back into.
    dense_class: type[nn.Linear] = nn.Linear

    layer_state: LayerState

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
        # Shallow, one level deeper than copy.copy: the dictionaries of parameters and hooks are
        # copied, what they hold is shared.
        twin = type(linear).__new__(type(linear))
        twin.__dict__.update(
            {
                name: value.copy() if isinstance(value, dict) else value
                for name, value in linear.__dict__.items()
            }
        )
        return cls.adopt_(twin, config)

    @staticmethod
    def adopt_(linear: nn.Linear, config: MemAOPConfig | None = None) -> MemAOPLinear:
        """Turn `linear` itself into a `MemAOPLinear`: the same object, its class exchanged.

        Raises:
            ValueError: As `from_linear`, or `linear` is a `MemAOPLinear` already.
        """
        config = MemAOPConfig() if config is None else config
        check_config(config)
        check_adoptable(linear)
        linear.__class__ = _class_for(type(linear))
        assert isinstance(linear, MemAOPLinear)
        linear._set_config(config)
        return linear

    def revert_(self) -> nn.Linear:
        """Turn this layer back into the dense class it came from; the memory is dropped.

        Raises:
            ValueError: The layer was parametrised after it was converted.
        """
        self.check_revertible()
        del self.layer_state
        self.__class__ = _dense_class_of(type(self))  # type: ignore[assignment]
        return self

    def check_revertible(self) -> None:
        """Raise `ValueError` if `revert_` cannot restore the dense class."""
        if _dense_class_of(type(self)) is None:
            raise ValueError(
                f"{type(self).__name__} was parametrised after it was converted: remove the "
                "parametrizations first."
            )

    @property
    def config(self) -> MemAOPConfig:
        """What the backward pass computes."""
        return self.layer_state.config

    @property
    def memory(self) -> Memory | None:
        """What is remembered between steps, `None` for `memory="none"`.

        Where the weight is divided by tensor parallelism, one for the columns of this process.
        """
        weight = self._parameters.get("weight")
        # What `fully_shard` divides is whole again by the time a layer works with it.
        if _is_distributed(weight) and not getattr(self, "_is_fsdp_managed_module", False):
            from memaop_triton import tensor_parallel

            self.layer_state.fit(*tensor_parallel.local_sizes(weight))
        return self.layer_state.memory

    def _set_config(self, config: MemAOPConfig) -> None:
        check_config(config)
        memory = new_memory(config, self.in_features, self.out_features)
        self.layer_state = LayerState(config, memory)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        if not self.training:
            return F.linear(input, self.weight, self.bias)
        x, weight, bias = _prepared(input, self.weight, self.bias)
        if _is_distributed(weight) and torch.is_grad_enabled():
            from memaop_triton import tensor_parallel

            return tensor_parallel.linear(x, weight, bias, self.layer_state)
        return linear_of_state(x, weight, bias, self.layer_state)

    def extra_repr(self) -> str:
        """The layer's sizes and the settings that differ between layers."""
        config = self.config
        budget = f"k={config.k}" if config.k is not None else f"ratio={config.ratio:g}"
        parts = [super().extra_repr(), budget, f"selection={config.selection}"]
        parts.append(f"memory={config.memory}")
        if isinstance(self.memory, SubspaceMemory):
            parts.append(f"rank={self.memory.rank}")
        if config.grad_input != "exact":
            parts.append(f"grad_input={config.grad_input}")
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemAOPLinear:
        super()._apply(fn, recurse)
        self.layer_state.convert(fn)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.dense_class is nn.Linear:
            return super().__reduce_ex__(protocol)
        # The class of a converted subclass is made on demand and cannot be found by its name.
        return _blank, (self.dense_class,), self.__getstate__()


def check_adoptable(linear: nn.Linear) -> None:
    """Raise `ValueError` if `linear` cannot become a `MemAOPLinear`."""
    name = type(linear).__name__
    if isinstance(linear, MemAOPLinear):
        raise ValueError(f"{name} is converted already: revert_ it first.")
    if isinstance(linear.weight, nn.UninitializedParameter):
        raise ValueError(f"{name} is not initialised: run one forward pass first.")
    ours = ("config", "memory", "layer_state")
    taken = [attribute for attribute in ours if hasattr(linear, attribute)]
    if taken:
        raise ValueError(
            f"{name} has an attribute {taken[0]!r} of its own, which MemAOPLinear would replace: "
            "rename it, or leave the layer out with filter_fn."
        )
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        raise ValueError(
            f"{name} has a forward pass of its own, which MemAOPLinear would replace: leave it out "
            "with filter_fn, or call memaop_linear inside it."
        )


def _blank(dense_class: type[nn.Linear]) -> MemAOPLinear:
    new_class = _class_for(dense_class)
    return new_class.__new__(new_class)


def _class_for(dense_class: type[nn.Linear]) -> type[MemAOPLinear]:
    """The `MemAOPLinear` that keeps everything of `dense_class` but the forward pass."""
    if dense_class not in _classes:
        below = class_below_fsdp(dense_class)
        if below is not dense_class:
            new_class = _with_fsdp_of(dense_class, _class_for(below))
            new_class.dense_class = dense_class
            _classes[dense_class] = new_class
            return new_class
        name = f"MemAOP{dense_class.__name__}"
        bases = (MemAOPLinear, dense_class)
        _classes[dense_class] = type(name, bases, {"dense_class": dense_class})
    return _classes[dense_class]


def _dense_class_of(converted_class: type[MemAOPLinear]) -> type[nn.Linear] | None:
    """What a class was before conversion; `None` if something else than FSDP came on top."""
    dense_class = converted_class.dense_class
    if converted_class is _class_for(dense_class):
        return dense_class
    if class_below_fsdp(converted_class) is _class_for(dense_class):
        return _with_fsdp_of(converted_class, dense_class)
    return None


def class_below_fsdp(module_class: type[M]) -> type[M]:
    """The class of a module before `fully_shard` was applied to it, by exchanging its class."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    bases = module_class.__bases__
    if fsdp is not None and len(bases) == 2 and issubclass(bases[0], fsdp.FSDPModule):
        below: type[M] = bases[1]
        return below
    return module_class


def _with_fsdp_of(sharded_class: type[nn.Module], below: type[M]) -> type[M]:
    """The class that `fully_shard` would have made of `below`, as it made `sharded_class`."""
    key = (sharded_class, below)
    if key not in _sharded_classes:
        prefix = sharded_class.__name__.removesuffix(class_below_fsdp(sharded_class).__name__)
        bases = (sharded_class.__bases__[0], below)
        no_deepcopy = {"__deepcopy__": vars(sharded_class)["__deepcopy__"]}
        _sharded_classes[key] = type(prefix + below.__name__, bases, no_deepcopy)
    return _sharded_classes[key]


_classes: dict[type[nn.Linear], type[MemAOPLinear]] = {nn.Linear: MemAOPLinear}
_sharded_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[Any]] = {}
