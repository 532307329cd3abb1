"""How much of a model's weight gradients converted layers compute, and what was left: `Coverage`.

Counted are the trainable Parameters of two and more dimensions, each once however many modules
share it. The table of an embedding has no product in its backward pass and does not count, unless
a layer shares it, or a product was seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from memaop_triton.nn.classes import class_below_fsdp, has_own_forward
from memaop_triton.nn.exposing import host_kind_of
from memaop_triton.nn.layer_choice import kind_of
from memaop_triton.nn.linear import MemAOPLayer
from memaop_triton.nn.packed import Host, Projection

ELEMENTS = "elements of the weight matrices"
FLOPS = "FLOPs of the weight gradients"
#: Warned about if what `convert_` cannot take is more than this.
LARGEST_SHARE_LEFT = 1 / 2
# What a user may leave dense, by filter_fn, overrides or only_if_faster.
_CONVERTIBLE = "can be converted"
_SUBCLASS = "a subclass, which a filter_fn can take"
_TABLES = nn.Embedding | nn.EmbeddingBag
# Of a parametrised module: what computes its Parameters hangs below it.
_PARAMETRIZATIONS = re.compile(r"(^|\.)parametrizations\..*")
_MOST_NAMED = 3  # classes in one line of text


class LowCoverageWarning(UserWarning):
    """More than half of a model's weight gradients are out of reach of converted layers."""


class Left(NamedTuple):
    """What modules of one class have that no converted layer computes.

    Attributes:
        share: Of the whole model's, in the unit of the `Coverage`.
        parameters: How many weight matrices these are.
        reason: Why they were left.
        is_convertible: Whether `convert_` takes such layers, if it is asked to.
    """

    share: float
    parameters: int
    reason: str
    is_convertible: bool


@dataclass(frozen=True)
class Coverage:
    """How much of a model's weight gradients converted layers compute; prints as a short table.

    Attributes:
        share: From 0 to 1; 1 if the model has no trainable weight matrix.
        unit: What it is a share of, in words: FLOPs of a batch, or elements if none was seen.
        left: What was left by name of the module's class, the largest share first.
        is_estimate: Whether the products of some weights were not seen, which are taken to meet as
            many rows as the others do.
    """

    share: float
    unit: str
    left: Mapping[str, Left]
    is_estimate: bool = False

    @property
    def is_low(self) -> bool:
        """Whether more than half was left that `convert_` cannot take."""
        beyond = sum(left.share for left in self.left.values() if not left.is_convertible)
        return beyond > LARGEST_SHARE_LEFT

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and dictionaries, for JSON."""
        return {
            "share": self.share,
            "unit": self.unit,
            "is_estimate": self.is_estimate,
            "left": {name: left._asdict() for name, left in self.left.items()},
        }

    def summary(self, layers: str = "Converted layers") -> str:
        """The same in one line, with the classes that most was left of.

        `layers` are those that compute the share.
        """
        about = "about " if self.is_estimate else ""
        text = f"{layers} compute {about}{_percent(self.share)} of the {self.unit}"
        named = [
            f"{name} {_percent(left.share)} ({left.reason})"
            for name, left in list(self.left.items())[:_MOST_NAMED]
        ]
        if len(self.left) > _MOST_NAMED:
            named.append(f"{len(self.left) - _MOST_NAMED} more classes")
        return f"{text}; left: {', '.join(named)}." if named else f"{text}."

    def __str__(self) -> str:
        lines = [Coverage(self.share, self.unit, {}, self.is_estimate).summary()]
        if self.left:
            width = max(len("left"), *map(len, self.left))
            lines.append(f"{'left':{width}}{'share':>8}{'matrices':>10}  why")
        for name, left in self.left.items():
            share = _percent(left.share)
            lines.append(f"{name:{width}}{share:>8}{left.parameters:10}  {left.reason}")
        return "\n".join(lines)


def coverage_of(
    model: nn.Module,
    amounts: Mapping[int, float] | None = None,
    is_taken: Callable[[nn.Module], bool] = lambda module: isinstance(module, MemAOPLayer),
    *,
    is_estimate: bool = False,
) -> Coverage:
    """The coverage of a model.

    Args:
        model: Any module.
        amounts: FLOPs of the gradients of Parameters by their ids, 0 for those that are not there;
            their elements count if `None`.
        is_taken: Whether a module is a converted layer, or is to become one.
        is_estimate: As in `Coverage`.
    """
    taken = total = 0.0
    left: dict[str, list[tuple[float, str]]] = {}
    if amounts is None:
        amounts = elements_of_weights(model)
        unit = ELEMENTS
    else:
        unit = FLOPS
    owners = _owners_of(model)
    for weight in trainable_weights(model):
        owner = next(filter(is_taken, owners[id(weight)]), owners[id(weight)][0])
        amount = amounts.get(id(weight), 0.0)
        total += amount
        if is_taken(owner):
            taken += amount
        elif amount:
            reason = _reason_to_leave(owner, weight)
            left.setdefault(_class_name(owner), []).append((amount, reason))
    of_classes = {}
    for name, weights in left.items():
        part, reason = sum(amount for amount, _ in weights) / total, weights[0][1]
        of_classes[name] = Left(part, len(weights), reason, reason in (_CONVERTIBLE, _SUBCLASS))
    largest_first = sorted(of_classes.items(), key=lambda named: -named[1].share)
    share = taken / total if total else 1.0
    return Coverage(share, unit, dict(largest_first), is_estimate)


def trainable_weights(model: nn.Module) -> list[nn.Parameter]:
    """The Parameters of two and more dimensions, each once; tables of embeddings included."""
    return [p for p in model.parameters() if p.requires_grad and not is_lazy(p) and p.dim() > 1]


def elements_of_weights(model: nn.Module) -> dict[int, float]:
    """Their numbers of elements by id; without the tables that only embeddings have."""
    owners = _owners_of(model)
    weights = trainable_weights(model)
    return {id(w): w.numel() for w in weights if not isinstance(owners[id(w)][0], _TABLES)}


def _owners_of(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that have a Parameter, by its id; embeddings last."""
    modules = dict(model.named_modules())
    attentions = [m for m in modules.values() if isinstance(m, nn.MultiheadAttention)]
    # Unless converted they compute with the weight of their last layer without calling the layer.
    in_its_place: dict[int, nn.Module] = {
        id(one.out_proj): one for one in attentions if not isinstance(one, Host)
    }
    owners: dict[int, list[nn.Module]] = {}
    for name, module in modules.items():
        parent = modules[_PARAMETRIZATIONS.sub("", name)]
        owner = in_its_place.get(id(parent)) or parent
        parameters = list(module._parameters.values())
        if isinstance(module, Projection):
            parameters.append(module.weight_parameter)
        for parameter in parameters:
            owners.setdefault(id(parameter), []).append(owner)
    for found in owners.values():
        found.sort(key=lambda module: isinstance(module, _TABLES))
    return owners


def _reason_to_leave(owner: nn.Module, weight: nn.Parameter) -> str:
    kind = kind_of(owner)
    if kind is not None:
        if has_own_forward(owner, kind.dense):
            return "has a forward pass of its own"
        if class_below_fsdp(type(owner)) is not kind.dense:
            return _SUBCLASS
        return _CONVERTIBLE
    if isinstance(owner, _ConvNd):
        return "a transposed convolution" if owner.transposed else "a depthwise convolution"
    host = host_kind_of(owner)
    if host is not None or isinstance(owner, Host):
        names = [name for name, parameter in owner._parameters.items() if parameter is weight]
        if any("bias" in name for name in names):
            return "biases"
    if isinstance(owner, Host) or (host is not None and _is_exact(owner)):
        return _CONVERTIBLE
    if host is not None:
        return _SUBCLASS
    if isinstance(owner, nn.MultiheadAttention):
        return "has a forward pass of its own"
    if weight.dim() > 2:
        return f"Parameters of {weight.dim()} dimensions"
    return "of no kind that is converted"


def _is_exact(host: nn.Module) -> bool:
    """Whether a module is converted by default, as opposed to a subclass of an attention."""
    is_attention = isinstance(host, nn.MultiheadAttention)
    return not is_attention or class_below_fsdp(type(host)) is nn.MultiheadAttention


def _class_name(module: nn.Module) -> str:
    if isinstance(module, Host):
        return class_below_fsdp(module.dense_class).__name__
    return class_below_fsdp(type(module)).__name__


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"
