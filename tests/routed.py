"""Experts of transformers by themselves, and rows that are routed to them."""

import importlib.util

import torch

EXPERTS, WIDTH, TOP_K, TOKENS = 4, 16, 2, 24
_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
}
_PLACES = {
    "Mixtral": "mixtral",
    "Qwen3Moe": "qwen3_moe",
    "GptOss": "gpt_oss",
    "NemotronH": "nemotron_h",
}


def has_transformers():
    return importlib.util.find_spec("transformers") is not None


def experts(name="Mixtral", implementation="grouped_mm", dtype=torch.float32, **sizes):
    """Such a module in training mode, with normal weights."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**_SIZES | sizes)
    config._experts_implementation = implementation
    folder = _PLACES[name]
    path = f"transformers.models.{folder}.modeling_{folder}"
    kind = getattr(importlib.import_module(path), f"{name}Experts")
    torch.manual_seed(0)
    module = kind(config).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def tokens(seed=0, dtype=torch.float32, rows=TOKENS):
    """Hidden states [rows, WIDTH], their experts [rows, TOP_K], some with few rows, and weights."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=draws).to(dtype)
    likely = torch.tensor([0.6, 0.25, 0.1, 0.05]).expand(rows, -1)
    ids = torch.multinomial(likely, TOP_K, generator=draws)
    return x, ids, torch.rand(rows, TOP_K, generator=draws).to(dtype)
