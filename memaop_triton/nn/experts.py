"""Experts of transformers whose weight gradients are computed from some of the routed rows.

Since release 5 its experts are Parameters of three dimensions, and a registry has several functions
that multiply by them. A converted module of that kind sorts the tokens by expert as the function
`grouped_mm` does, multiplies by its grouped product and computes the same. In the backward pass of
a projection one selection of all routed rows serves all experts (`memaop_triton.backward.experts`).
`plan` and `ratio="auto"` time a projection as a linear layer with as many rows, which has as many
operations; `ratio="auto"` then asks the clock what sampled steps take.
The library never imports transformers: if a model has experts, somebody else did.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memaop_triton.backward.experts import is_grouped_operand
from memaop_triton.config import MemAOPConfig, check_config
from memaop_triton.nn import expert_ops as expert_ops  # registers its operator
from memaop_triton.nn.autograd import (
    LayerFunction,
    caches_signature,
    check_not_batched,
    gradients_once,
    handle_and_order,
    wanted_gradients,
)
from memaop_triton.nn.classes import stands_for_dense
from memaop_triton.nn.conv import obstacle_in
from memaop_triton.nn.layer_state import LayerState
from memaop_triton.nn.linear import MemAOPLayer
from memaop_triton.nn.packed import Host, Projection, Source

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What the decorator of transformers notes about a class of experts.
_NOTES = (
    "has_gate",
    "has_bias",
    "is_transposed",
    "num_experts",
    "_apply_gate",
    "_is_expert_parallel",
)


class ExpertsProjection(Projection):
    """One of the products of all experts.

    Args:
        source: Where the weight is, [E, out_features, in_features].
        in_features: N.
        out_features: P.
        num_experts: E.
        is_transposed: Whether the weight is [E, in_features, out_features].
    """

    def __init__(
        self,
        source: Source,
        in_features: int,
        out_features: int,
        *,
        num_experts: int,
        is_transposed: bool,
    ) -> None:
        super().__init__(source, in_features, out_features)
        self.num_experts = num_experts
        self.is_transposed = is_transposed

    def forward(  # type: ignore[override]
        self, input: Tensor, weight: Tensor, ends: Tensor
    ) -> Tensor:
        """[R, in_features] to [R, out_features]: rows by expert, those of each end at `ends`."""
        return _multiplied(input, weight if self.is_transposed else weight.mT, ends)


@stands_for_dense
class MemAOPExpertsProjection(MemAOPLayer, ExpertsProjection):
    """An `ExpertsProjection` whose weight gradient is computed as configured by `config`.

    The rows are those of all tokens for all of their experts, R = tokens × top_k, and K is a share
    of these. A subspace would have to be one for each expert: `memory="subspace"` is taken as
    `None` here. Memories of rows, a stash, an approximate dX and cheap scores are refused.
    """

    dense_class: type[nn.Module] = ExpertsProjection

    weight_parameter = ExpertsProjection.weight_parameter

    @property
    def gradient_shape(self) -> tuple[int, int]:
        """That of the experts' matrices below each other."""
        rows, columns = self.out_features, self.in_features
        if self.is_transposed:
            rows, columns = columns, rows
        return self.num_experts * rows, columns

    def forward(  # type: ignore[override]
        self, input: Tensor, weight: Tensor, ends: Tensor
    ) -> Tensor:
        """[R, in_features] to [R, out_features]: rows by expert, those of each end at `ends`."""
        state = self.layer_state
        matrices = weight if self.is_transposed else weight.mT
        is_dense = self._is_dense() or not torch.is_grad_enabled()
        if is_dense or torch.compiler.is_exporting():
            return _multiplied(input, matrices, ends)
        handle, order = handle_and_order(state, input.device)
        y: Tensor = _ExpertsFunction.apply(
            input.to(weight.dtype), weight, ends, handle, order, state, self.is_transposed
        )
        return y

    def _set_config(self, config: MemAOPConfig) -> None:
        super()._set_config(checked_for_experts(self, config))


@caches_signature
class _ExpertsFunction(LayerFunction):
    """y_m = W_e x_m for the expert e of each row m, with the approximate weight gradient."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        ends: Tensor,
        handle: Tensor,
        order: Tensor,
        state: LayerState,
        is_transposed: bool,
    ) -> Tensor:
        return _multiplied(x, weight if is_transposed else weight.mT, ends)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ends, ctx.handle, ctx.order, ctx.state, ctx.is_transposed = inputs
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, ends)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        gradients = gradients_once(
            grad_output, (x, weight), lambda: _backward(ctx, grad_output, x, weight, ends)
        )
        return *gradients, None, None, None, None, None


def _backward(
    ctx: Any, g: Tensor, x: Tensor | None, weight: Tensor | None, ends: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    check_not_batched(g)
    wants_x, wants_weight, _ = wanted_gradients(ctx)
    g, dx, dw = g.contiguous(), None, None
    if wants_x and weight is not None:
        dx = _multiplied(g, weight.mT if ctx.is_transposed else weight, ends)
    if wants_weight and x is not None:
        dw = torch.ops.memaop_triton.experts_weight_grad(
            x, g, ends, ctx.handle, ctx.order, transposed=ctx.is_transposed
        )
    return dx, dw


def _multiplied(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """x [R, N] times the matrix of its expert, of [E, N, P], by a product of transformers."""
    product: Callable[..., Tensor] = torch.ops.transformers.grouped_mm_fallback
    if is_grouped_operand(matrices.dtype, *matrices.shape[1:]):
        product = sys.modules["transformers.integrations.moe"]._grouped_mm
    return product(x.to(matrices.dtype), matrices, offs=ends)


class MemAOPExperts(Host):
    """Experts of transformers whose projections are layers, each as its `config` says.

    They are called `gate_up`, or `up` in experts without a gate, and `down`. In evaluation mode,
    and while both compute as dense ones do, the function that the model's configuration names is
    called.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]
    _is_expert_parallel: bool

    def make_projections(self, *, role: str = "") -> Mapping[str, Projection]:
        """By name."""
        made = {}
        for name in self._names():
            weight = self.get_parameter(f"{name}_proj")
            sizes = weight.shape[1:] if self.is_transposed else weight.shape[:0:-1]
            made[name] = ExpertsProjection(
                Source(self._parameters, f"{name}_proj"),
                *sizes,
                num_experts=self.num_experts,
                is_transposed=self.is_transposed,
            )
        return made

    def layers(self) -> list[nn.Module]:
        """Both projections."""
        return [self.get_submodule(name) for name in self._names()]

    def _names(self) -> tuple[str, str]:
        return "gate_up" if self.has_gate else "up", "down"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[tokens, features] to the same, for the experts [tokens, top_k] and their weights."""
        if not self.needs_layers() or self._is_expert_parallel:
            dense: Callable[..., Tensor] = super().forward
            return dense(hidden_states, *args, **kwargs)
        return self._route(hidden_states, *args, **kwargs)

    def _route(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        top_k = top_k_index.shape[-1]
        expert, order = top_k_index.flatten().sort()
        numbers = torch.arange(self.num_experts, device=expert.device, dtype=expert.dtype)
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        into, down = self._names()
        y = self._product(into, hidden_states[order // top_k], expert, ends)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = self._product(down, y, expert, ends)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * top_k_weights.flatten()[order].unsqueeze(-1)
        by_token: Tensor = y[order.argsort()].unflatten(0, top_k_index.shape)
        return by_token.sum(1).to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        projection, weight = self.get_submodule(name), getattr(self, f"{name}_proj")
        y: Tensor = projection(x, weight, ends)
        if self.has_bias:
            y = y + getattr(self, f"{name}_proj_bias")[expert]
        return y


def can_be_taken_apart(module: nn.Module) -> bool:
    """Whether a module is one of experts that compute by the registry of transformers.

    And whether all that a converted one needs of that library is in its release.
    """
    registry = sys.modules.get("transformers.integrations.moe")
    if registry is None or "forward" in vars(module):
        return False
    if not hasattr(registry, "_grouped_mm"):
        return False
    if not hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        return False
    # What the decorator of transformers makes of a forward pass refers to the registry.
    code = getattr(type(module).forward, "__code__", None)
    if code is None or "experts_interface" not in code.co_freevars:
        return False
    if not all(hasattr(module, note) for note in _NOTES):
        return False
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    weights = [module._parameters.get(name) for name in names]
    # `fully_shard` gathers the whole weight before it is multiplied by.
    is_gathered = getattr(module, "_is_fsdp_managed_module", False)
    return all(
        w is not None
        and w.dim() == 3
        and w.dtype in _DTYPES
        and (is_gathered or not hasattr(w, "device_mesh"))
        for w in weights
    )


def checked_for_experts(layer: nn.Module, config: MemAOPConfig) -> MemAOPConfig:
    """`config` as experts use it: without a subspace.

    Raises:
        ValueError: It is not for experts.
        TypeError: It is no `MemAOPConfig`.
    """
    check_config(config)
    obstacle = obstacle_in(config)
    if obstacle:
        raise ValueError(f"{obstacle} is for linear layers: experts take none.")
    return dataclasses.replace(config, memory=None)
