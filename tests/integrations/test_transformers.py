"""Models of Hugging Face's transformers, built from their configurations."""

import copy
from types import SimpleNamespace

import pytest
import torch

from memaop_triton import (
    LowCoverageWarning,
    MemAOPConfig,
    attach_optimizer,
    convert_,
    coverage,
    model_report,
    plan,
    revert_,
)
from memaop_triton.nn.conv1d import MemAOPConv1D
from tests.auto.training import steps_of_a_second

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed, with which this is tested"
)
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

pytestmark = [
    # Their own, and the compiler's.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

VOCABULARY, WIDTH = 100, 64
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
GPT = {"n_layer": 2, "n_embd": WIDTH, "n_head": 4, **TOKENS}
LLAMA = {
    "num_hidden_layers": 2,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **TOKENS,
}


def gpt2(**settings):
    no_dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = transformers.GPT2Config(**GPT, **no_dropout, **settings)
    return transformers.GPT2LMHeadModel(config).train()


def mixtral(experts="grouped_mm"):
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config).train()
    model.set_experts_implementation(experts)
    return model


def batch():
    ids = torch.randint(3, VOCABULARY, (4, 32))
    return {"input_ids": ids, "labels": ids}


def step(model, inputs, seed=2):
    """Logits and gradients by name."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ("GPT2Config", "GPT2LMHeadModel"),
        ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel"),
        ("ImageGPTConfig", "ImageGPTForCausalImageModeling"),
    ],
)
def test_all_of_a_model_of_conv1d_is_converted(config, model):
    model = getattr(transformers, model)(getattr(transformers, config)(**GPT)).train()
    layers = [module for module in model.modules() if type(module) is Conv1D]
    assert len(layers) == 8
    convert_(model)
    assert all(isinstance(layer, MemAOPConv1D) for layer in layers)
    assert coverage(model).share > 0.95
    ids = torch.randint(3, VOCABULARY - 1, (4, 32))
    assert coverage(model, {"input_ids": ids, "labels": ids}).share > 0.95
    revert_(model)
    assert all(type(layer) is Conv1D for layer in layers)


@pytest.mark.parametrize(
    ("config", "model"), [("LlamaConfig", "LlamaForCausalLM"), ("BertConfig", "BertForMaskedLM")]
)
def test_all_of_a_model_of_linear_layers_is_converted(config, model):
    settings = LLAMA if config == "LlamaConfig" else LLAMA | {"num_key_value_heads": 4}
    model = getattr(transformers, model)(getattr(transformers, config)(**settings)).train()
    assert coverage(convert_(model), batch()).share > 0.95


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
def test_experts_are_named(experts):
    with pytest.warns(UserWarning, match="because stash='int8' is not for experts") as caught:
        model = convert_(mixtral(experts), MemAOPConfig(ratio=1 / 2, stash="int8"))
    assert not any(one.category is LowCoverageWarning for one in caught), "they could be converted"
    found = coverage(model, batch())
    assert not found.is_estimate
    # Two of the experts for every one of 128 tokens, in two layers.
    rows, of_one_expert = 2 * 128, 3 * WIDTH * 96
    attention = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2
    routers, head = 4 * WIDTH, VOCABULARY * WIDTH
    others = 128 * (2 * attention + 2 * routers + head)
    total = 2 * rows * of_one_expert + others
    assert found.left["MixtralExperts"].share == pytest.approx(2 * rows * of_one_expert / total)
    assert found.left["MixtralTopKRouter"].share == pytest.approx(128 * 2 * routers / total)
    assert set(found.left) == {"MixtralExperts", "MixtralTopKRouter"}


@pytest.mark.parametrize("missing", ["_grouped_mm", "grouped_mm_fallback", "_is_expert_parallel"])
def test_experts_of_a_release_that_is_unlike_this_one_stay_and_are_named(missing, monkeypatch):
    model = mixtral()
    if missing == "_grouped_mm":
        monkeypatch.delattr("transformers.integrations.moe._grouped_mm")
    elif missing == "grouped_mm_fallback":
        monkeypatch.setattr(torch.ops, "transformers", SimpleNamespace())
    else:
        for layer in model.model.layers:
            del layer.mlp.experts._is_expert_parallel
    with pytest.warns(LowCoverageWarning):
        convert_(model, MemAOPConfig())
    left = coverage(model).left["MixtralExperts"]
    assert left.reason == "Parameters of 3 dimensions"
    assert not left.is_convertible


def test_exact_gradients_are_those_of_transformers_bit_for_bit():
    model, inputs = gpt2(), batch()
    logits, expected = step(model, inputs)
    for config in (MemAOPConfig(ratio=1.0, memory=None), MemAOPConfig(ratio="auto")):
        convert_(model, config)
        found, gradients = step(model, inputs)
        assert torch.equal(found, logits)
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)
        revert_(model)


@pytest.mark.parametrize(
    "config",
    [
        MemAOPConfig(ratio=1 / 2),
        MemAOPConfig(ratio=1 / 2, memory=None),
        MemAOPConfig(ratio=1 / 2, stash="int4"),
        MemAOPConfig(ratio=1 / 2, grad_input="projected"),
        MemAOPConfig.paper(ratio=1 / 2),
    ],
    ids=lambda config: f"{config.memory_name}-{config.stash}-{config.grad_input_name}",
)
@pytest.mark.parametrize("way", ["plain", "autocast", "checkpointed"])
def test_training_lowers_the_loss(config, way):
    model, inputs = convert_(gpt2(), config), batch()
    if way == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    attach_optimizer(model, optimizer)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_a_tied_head_stays_tied():
    model, inputs = gpt2(), batch()
    _, expected = step(model, inputs)
    convert_(model, MemAOPConfig(ratio=1 / 2, memory=None))
    assert model.lm_head.weight is model.transformer.wte.weight
    mean = torch.zeros_like(model.lm_head.weight)
    for seed in range(100):
        mean += step(model, inputs, seed)[1]["transformer.wte.weight"] / 100
    exact = expected["transformer.wte.weight"]
    assert (mean - exact).norm() < 0.3 * exact.norm()


def test_checkpoints_load_either_way(tmp_path):
    model, inputs = gpt2(), batch()
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "dense")
    convert_(model, MemAOPConfig(ratio=1 / 2))
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path / "converted")
    logits = model.eval()(**inputs).logits
    for folder in ("dense", "converted"):
        loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / folder)
        assert torch.equal(loaded.eval()(**inputs).logits, logits)
    twin = convert_(gpt2(), MemAOPConfig(ratio=1 / 2))
    twin.load_state_dict(loaded.state_dict())
    assert torch.equal(twin.eval()(**inputs).logits, logits)
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, logits)


def test_plan_and_report(monkeypatch):
    model, inputs = gpt2(), batch()
    found = plan(model, MemAOPConfig(ratio=1 / 4), example_inputs=inputs, time_budget=0.01)
    assert len(found.layers) == 9
    assert found.coverage.share == 1
    steps_of_a_second(monkeypatch)  # the fifth one is observed
    convert_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model_report(model).splitlines()[-1] == (
        "Converted layers compute 100 % of the FLOPs of the weight gradients."
    )


@pytest.mark.slow
def test_a_compiled_model_trains():
    torch._dynamo.reset()
    model, inputs = gpt2(), batch()
    convert_(model, MemAOPConfig(ratio=1 / 2, memory=None))
    logits, expected = step(model, inputs)
    found, gradients = step(torch.compile(model, backend="aot_eager"), inputs)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    for name, gradient in expected.items():
        error = (gradients["_orig_mod." + name] - gradient).norm()
        assert error < 1e-3 * gradient.norm() + 1e-6, name
    torch._dynamo.reset()
