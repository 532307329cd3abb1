"""`nn.MultiheadAttention` that calls its projections as layers.

PyTorch multiplies by `in_proj_weight` and by the weight of `out_proj` inside of one function. In
training a converted one computes the same step by step, with layers for the products: `in_proj`,
[E] to [3 E], where queries, keys and values are one tensor, or else `q_proj`, `k_proj` and
`v_proj`; and `out_proj`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from memaop_triton.nn.classes import has_own_forward, stands_for_dense
from memaop_triton.nn.packed import Host, Projection, Source

#: How a module is known to be called: with one tensor for queries, keys and values, or with others.
SELF, CROSS = "self", "cross"

# Attentions in layers of `nn.Transformer`, and the methods that call them.
_PLACES = (
    (nn.TransformerEncoderLayer, "self_attn", "_sa_block", SELF),
    (nn.TransformerDecoderLayer, "self_attn", "_sa_block", SELF),
    (nn.TransformerDecoderLayer, "multihead_attn", "_mha_block", CROSS),
)

_functional: Any = F  # whose private functions have no types


class _Masks(NamedTuple):
    """What is added to the scores.

    Attributes:
        scores: Broadcasts to [B * heads, L, S]; `None` if nothing is added.
        is_causal: Whether the lower triangle is meant, which no mask says then.
    """

    scores: Tensor | None
    is_causal: bool


@stands_for_dense
class MemAOPMultiheadAttention(Host, nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose projections are layers, each as its `config` says.

    Parameters, `state_dict` and results are those of `nn.MultiheadAttention`; in evaluation mode,
    and while all layers compute as dense ones do, its own forward pass computes them. `convert_`
    makes it; there is no other constructor.

    Layers for both ways of calling it exist, `in_proj` and the three others, unless it is part of a
    layer of `nn.Transformer`, which tells. Those that are not called have nothing to do.
    """

    dense_class: type[nn.Module] = nn.MultiheadAttention

    in_proj: Projection
    q_proj: Projection
    k_proj: Projection
    v_proj: Projection

    def make_projections(self, *, role: str = "") -> Mapping[str, Projection]:
        """By name; `role` is one of `SELF` and `CROSS`, or "" if both are possible."""
        width, made = self.embed_dim, {}
        is_packed = self._qkv_same_embed_dim
        if is_packed:
            source = Source(self._parameters, "in_proj_weight", "in_proj_bias")
            made["in_proj"] = Projection(source, width, 3 * width, is_expected=role != CROSS)
        for part, (name, features) in enumerate(zip("qkv", self._input_sizes(), strict=True)):
            weight = "in_proj_weight" if is_packed else f"{name}_proj_weight"
            source = Source(self._parameters, weight, "in_proj_bias", part, not is_packed)
            is_expected = not is_packed or role != SELF
            made[f"{name}_proj"] = Projection(source, features, width, is_expected=is_expected)
        return made

    def _input_sizes(self) -> tuple[int, int, int]:
        return self.embed_dim, self.kdim, self.vdim

    def layers(self) -> list[nn.Module]:
        """Projections that are expected to be called, and `out_proj`."""
        children = self._modules.values()
        called = [c for c in children if isinstance(c, Projection) and c.is_expected]
        return [*called, self.out_proj]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As that of `nn.MultiheadAttention`."""
        options: dict[str, Any] = {
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        results: tuple[Tensor, Tensor | None]
        if isinstance(query, torch.fx.Proxy) and query.tracer.root is not self:
            path, operands = query.tracer.path_of_module(self), (query, key, value)
            results = query.tracer.create_proxy("call_module", path, operands, options)
        elif self.needs_layers():
            results = self._by_layers(query, key, value, **options)
        else:
            results = super().forward(query, key, value, **options)
        return results

    def _by_layers(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        # PyTorch's own checks and conversions, so that errors and warnings are the same.
        padding = _functional._canonical_mask(
            key_padding_mask,
            "key_padding_mask",
            _functional._none_or_dtype(attn_mask),
            "attn_mask",
            query.dtype,
        )
        mask = _functional._canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, False)
        is_batched = _functional._mha_shape_check(query, key, value, padding, mask, self.num_heads)
        if is_causal and mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask: pass that too.")
        if query.shape[-1] != self.embed_dim:
            raise ValueError(f"query has {query.shape[-1]} features, not {self.embed_dim}.")
        if not is_batched and padding is not None:
            padding = padding.unsqueeze(0)
        q, k, v = self._projected(query, key, value, is_batched)
        is_hint = is_causal and not need_weights
        masks = self._masks(q.shape, k.shape[0], mask, padding, is_hint)
        k, v = self._with_additional_keys(k, v)
        rows, weights = self._attend(q, k, v, masks, need_weights)
        y: Tensor = self.out_proj(rows).view(q.shape)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return y.squeeze(1), None if weights is None else weights.squeeze(0)
        return y.transpose(0, 1) if self.batch_first else y, weights

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor, is_batched: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [L, B, E], and k and v [S, B, E]."""
        if query is key and key is value and self._qkv_same_embed_dim:
            x = self._sequence_first(query, is_batched)
            y = self.in_proj(x, self.in_proj_weight, self.in_proj_bias)
            q, k, v = y.unflatten(-1, (3, self.embed_dim)).movedim(-2, 0).contiguous().unbind(0)
            return q, k, v
        weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        biases: tuple[Tensor | None, ...] = (None, None, None)
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)
        # What is one tensor stays one, of which layers keep one stash.
        keys = self._sequence_first(key, is_batched)
        queries = keys if query is key else self._sequence_first(query, is_batched)
        values = keys if value is key else self._sequence_first(value, is_batched)
        return (
            self.q_proj(queries, weights[0], biases[0]),
            self.k_proj(keys, weights[1], biases[1]),
            self.v_proj(values, weights[2], biases[2]),
        )

    def _sequence_first(self, a: Tensor, is_batched: bool) -> Tensor:
        """[L, B, E] of a batch in either order, or of a single sequence."""
        if not is_batched:
            return a.unsqueeze(1)
        return a.transpose(0, 1) if self.batch_first else a

    def _masks(
        self,
        shape: torch.Size,
        keys: int,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_hint: bool,
    ) -> _Masks:
        """Both masks in one, of q's shape [L, B, E] and `keys` keys and the additional ones."""
        length, batch, _ = shape
        if is_hint and key_padding_mask is None:
            return _Masks(None, True)
        more = (self.bias_k is not None) + self.add_zero_attn
        if attn_mask is not None:
            shapes = {2: (length, keys), 3: (batch * self.num_heads, length, keys)}
            if attn_mask.shape != shapes[attn_mask.dim()]:
                raise RuntimeError(
                    f"attn_mask has shape {tuple(attn_mask.shape)}, but should have "
                    f"{shapes[attn_mask.dim()]}."
                )
            attn_mask = F.pad(attn_mask, (0, more))
            attn_mask = attn_mask.unsqueeze(0) if attn_mask.dim() == 2 else attn_mask
        if key_padding_mask is None:
            return _Masks(attn_mask, False)
        if key_padding_mask.shape != (batch, keys):
            raise RuntimeError(
                f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, but should have "
                f"{(batch, keys)}."
            )
        padding = F.pad(key_padding_mask, (0, more)).view(batch, 1, 1, keys + more)
        padding = padding.expand(-1, self.num_heads, -1, -1).flatten(0, 1)
        return _Masks(padding if attn_mask is None else attn_mask + padding, False)

    def _with_additional_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values followed by those that are Parameters, and by zeros, if there are any."""
        if self.bias_k is not None and self.bias_v is not None:
            batch = k.shape[1]
            k = torch.cat([k, self.bias_k.expand(-1, batch, -1)])
            v = torch.cat([v, self.bias_v.expand(-1, batch, -1)])
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
        return k, v

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, masks: _Masks, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Rows [L * B, E] for `out_proj`, and the attention weights [B, heads, L, S] if needed."""
        (length, batch, width), keys = q.shape, len(k)
        q, k, v = (a.reshape(len(a), -1, self.head_dim).transpose(0, 1) for a in (q, k, v))
        heads = batch, self.num_heads
        if not need_weights:
            mask = masks.scores
            if mask is not None:
                mask = mask.unsqueeze(0) if len(mask) == 1 else mask.unflatten(0, heads)
            q, k, v = (a.unflatten(0, heads) for a in (q, k, v))
            y = F.scaled_dot_product_attention(
                q, k, v, mask, self.dropout, is_causal=masks.is_causal
            )
            return y.permute(2, 0, 1, 3).reshape(length * batch, width), None
        q, k = q * math.sqrt(1 / self.head_dim), k.transpose(1, 2)
        scores = torch.bmm(q, k) if masks.scores is None else torch.baddbmm(masks.scores, q, k)
        weights = scores.softmax(-1)
        if self.dropout > 0:
            weights = F.dropout(weights, self.dropout)
        y = torch.bmm(weights, v).transpose(0, 1).reshape(length * batch, width)
        return y, weights.view(*heads, length, keys)


def roles_of(model: nn.Module) -> dict[int, str]:
    """How attentions are called by id, of those whose role in a layer of `nn.Transformer` tells.

    It tells nothing in a layer whose forward pass, or the part of it in question, is its own.
    """
    roles = {}
    for module in model.modules():
        for dense, name, block, role in _PLACES:
            if not isinstance(module, dense) or has_own_forward(module, dense):
                continue
            if getattr(type(module), block) is getattr(dense, block):
                roles[id(module.get_submodule(name))] = role
    return roles
