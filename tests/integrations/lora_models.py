"""A Llama and a BERT without data, made from their configurations, with adapters of PEFT."""

import pytest
import torch

from memaop_triton import MemAOPConfig, convert_

peft = pytest.importorskip("peft", reason="needs the extra peft")
transformers = pytest.importorskip("transformers", reason="needs the extra peft")

EXACT = MemAOPConfig(ratio=1, memory="none", stash="exact")
INT8 = MemAOPConfig(ratio=1, memory="none", stash="int8")
TOKENS = 128
LORA_LLAMA = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LORA_BERT = {"target_modules": ["query", "key", "value"], "task_type": "SEQ_CLS"}


def llama(dtype=torch.float32, width=64, depth=2):
    config = transformers.LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=width,
        intermediate_size=width * 5 // 2,
        num_hidden_layers=depth,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 32,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def bert(dtype=torch.float32):
    config = transformers.BertConfig(
        vocab_size=TOKENS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config).to(dtype)


def adapted(base, settings, dropout=0.0, **kwargs):
    """A model of PEFT whose B are not zero, as after some steps."""
    config = peft.LoraConfig(r=4, lora_dropout=dropout, **settings, **kwargs)
    model = peft.get_peft_model(base, config)
    fill(model)
    return model.train()


def fill(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)


MODELS = {"llama": (llama, LORA_LLAMA), "bert": (bert, LORA_BERT)}


def make(name="llama", dropout=0.0, dtype=torch.float32, **kwargs):
    base, settings = MODELS[name]
    torch.manual_seed(0)
    return adapted(base(dtype), settings | kwargs, dropout)


def pair(*args, config=None, **kwargs):
    """A model of PEFT's, and the same one converted."""
    return make(*args, **kwargs), convert_(make(*args, **kwargs), config, targets="lora")


def ids(rows=4, length=40):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, TOKENS, (rows, length), generator=generator)


def loss_of(model, tokens=None, seed=3):
    tokens = ids() if tokens is None else tokens
    torch.manual_seed(seed)
    is_bert = "Bert" in type(model.get_base_model()).__name__
    labels = torch.arange(len(tokens)) % 2 if is_bert else tokens
    kwargs = {} if is_bert else {"use_cache": False}
    return model(input_ids=tokens, labels=labels, **kwargs).loss


def gradients(model, seed=3):
    model.zero_grad()
    loss_of(model, seed=seed).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def wrappers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def check_right_in_the_mean(draws, exact):
    """Within four standard errors, all numbers of a tensor together."""
    square_error = (draws.mean(0) - exact).square().sum()
    expected = draws.var(0).sum() / len(draws)
    assert square_error <= expected * (1 + 4 * (2 / exact.numel()) ** 0.5)


def close(ours, exact):
    """Gradients by name, as near as a stash of 8 bits brings it."""
    for n, g in exact.items():
        assert (ours[n] - g).norm() <= 0.03 * g.norm(), n
