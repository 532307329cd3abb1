"""An `nn.MultiheadAttention`, the ways to call it, and how results are compared."""

import torch
from torch import nn

from memaop_triton import MemAOPConfig
from memaop_triton.nn.layer_choice import converted_layers

EXACT = MemAOPConfig(ratio=1, memory=None)
HALF = MemAOPConfig(ratio=1 / 2)
NO_MEMORY = MemAOPConfig(ratio=1 / 2, memory=None)
WIDTH, HEADS, LENGTH, KEYS, BATCH = 16, 4, 5, 7, 3
SEPARATE = {"kdim": 12, "vdim": 20}


def attention(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, dtype=dtype, **settings)
    for parameter in module.parameters():
        if parameter.dim() == 1:  # biases begin as zeros
            nn.init.normal_(parameter)
    return module


def layer_names(model):
    return {name for name, _ in converted_layers(model)}


def step(call, model, seed=1):
    """Everything that a call returns, and gradients by name."""
    torch.manual_seed(seed)
    model.zero_grad()
    results = call(model)
    results = [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None]
    sum(r.square().sum() for r in results).backward()
    named = model.named_parameters()
    return [r.detach() for r in results], {
        n: p.grad.clone() for n, p in named if p.grad is not None
    }


def assert_same(found, expected, **tolerance):
    assert len(found[0]) == len(expected[0])
    assert found[1].keys() == expected[1].keys()
    for one, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, **tolerance)


def inputs(way, settings, *, is_batched=True, is_causal=False):
    """Queries, keys and values for one of the ways to call an attention."""
    length = LENGTH if way == "self" or is_causal else KEYS
    sizes = WIDTH, settings.get("kdim", WIDTH), settings.get("vdim", WIDTH)
    made = []
    for rows, size in zip((LENGTH, length, length), sizes, strict=True):
        shape = (BATCH, rows) if settings.get("batch_first") else (rows, BATCH)
        made.append(torch.randn(*(shape if is_batched else (rows,)), size, dtype=torch.float64))
    query, key, value = made
    if way == "self":
        return query, query, query
    return (query, key, key) if way == "keys are values" else (query, key, value)


def masked(way, *, length, is_batched=True):
    """Keyword arguments by name of what is masked."""
    padding = torch.zeros(BATCH, length, dtype=torch.bool)
    padding[1, -2:] = True
    padding = padding if is_batched else padding[1]
    later = torch.ones(LENGTH, length, dtype=torch.bool).triu(1)
    each = torch.randn((BATCH if is_batched else 1) * HEADS, LENGTH, length, dtype=torch.float64)
    return {
        "nothing": {},
        "padding": {"key_padding_mask": padding},
        "later": {"attn_mask": later},
        "causal": {"attn_mask": later, "is_causal": True},
        "causal and padding": {
            "attn_mask": later,
            "is_causal": True,
            "key_padding_mask": padding,
        },
        "each head": {"attn_mask": each},
        "both": {"attn_mask": each, "key_padding_mask": -9.0 * padding.double()},
    }[way]


def name_of(settings):
    return "-".join(settings) or "plain"


def transformer():
    torch.manual_seed(0)
    return nn.Transformer(WIDTH, HEADS, 1, 1, 32, dropout=0.0, batch_first=True)
