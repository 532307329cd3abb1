"""What can be done with a converted model of PEFT: saving, merging, more adapters, copies."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, MemAOPLinear, convert_, revert_
from memaop_triton.nn.dropout import MaskedDropout
from memaop_triton.nn.lora import DEFAULT_CONFIG, MemAOPLora
from tests.integrations.lora_models import (
    EXACT,
    LORA_LLAMA,
    MODELS,
    TOKENS,
    adapted,
    fill,
    gradients,
    ids,
    llama,
    loss_of,
    make,
    pair,
    peft,
    transformers,
    wrappers,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers", "ignore:Could not find a config file in"
)


def test_names_are_the_same_and_checkpoints_fit(tmp_path):
    theirs, ours = pair(dropout=0.1)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in ours.named_parameters()]
    for layer in wrappers(ours).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert not any(isinstance(m, MemAOPLora) for m in loaded.modules())
    assert torch.equal(loss_of(loaded.eval()), loss_of(ours.eval()))
    theirs.load_adapter(tmp_path, "default")
    assert torch.equal(loss_of(theirs.eval()), loss_of(ours))
    both = [peft.get_peft_model_state_dict(m) for m in (theirs, ours)]
    assert all(torch.equal(both[0][n], both[1][n]) for n in both[0] | both[1])


@pytest.mark.parametrize("name", MODELS)
def test_merging(name):
    theirs, ours = pair(name, dropout=0.1)
    for model in (theirs, ours):
        model.merge_adapter()
    assert torch.equal(loss_of(theirs), loss_of(ours))
    for model in (theirs, ours):
        model.unmerge_adapter()
    theirs, ours = theirs.merge_and_unload(), ours.merge_and_unload()
    assert not any(isinstance(m, MemAOPLora | MemAOPLinear) for m in ours.modules())
    both = theirs.state_dict(), ours.state_dict()
    assert all(torch.equal(both[0][n], both[1][n]) for n in both[0] | both[1])


def test_adapters_that_are_added_later(tmp_path):
    theirs, ours = pair(dropout=0.1, config=EXACT)
    for model in (theirs, ours):
        torch.manual_seed(4)
        second = peft.LoraConfig(r=2, lora_dropout=0.3, **LORA_LLAMA)
        model.add_adapter("second", second)
        fill(model)
        model.base_model.set_adapter(["default", "second"])
    layer = ours.base_model.model.model.layers[0].mlp.up_proj
    assert type(layer.lora_A["second"]) is MemAOPLinear
    assert type(layer.lora_dropout["second"]) is MaskedDropout
    exact, same = gradients(theirs), gradients(ours)
    assert any("second" in n for n in exact)
    assert all(torch.equal(exact[n], same[n]) for n in exact)
    for model in (theirs, ours):
        model.set_adapter("second")
    assert torch.equal(loss_of(theirs), loss_of(ours))
    theirs.save_pretrained(tmp_path)
    ours.load_adapter(tmp_path / "second", "third", is_trainable=True)
    ours.set_adapter("third")
    assert layer.lora_A["third"].config == EXACT
    assert torch.equal(loss_of(theirs), loss_of(ours))
    ours.delete_adapter("second")
    assert torch.equal(loss_of(theirs), loss_of(ours))
    revert_(ours)
    assert type(layer.lora_A["third"]) is nn.Linear
    assert torch.equal(loss_of(theirs), loss_of(ours))


def test_without_adapters_it_is_the_base():
    ours = convert_(make(dropout=0.1), targets="lora")
    torch.manual_seed(0)
    base = adapted(llama(), LORA_LLAMA).unload().train()
    with ours.disable_adapter():
        loss = loss_of(ours)
    torch.manual_seed(3)
    assert torch.equal(loss, base(input_ids=ids(), labels=ids(), use_cache=False).loss)
    theirs = make()
    assert torch.equal(loss_of(ours.eval()), loss_of(theirs.eval()))


def test_reverting_restores_what_there_was():
    theirs, ours = pair(dropout=0.2)
    layer = ours.base_model.model.model.layers[1].self_attn.q_proj
    assert isinstance(layer, MemAOPLora)
    assert isinstance(layer, peft.tuners.lora.Linear)
    assert "stash=int4" in repr(layer)
    assert revert_(ours) is ours
    kinds = [[type(m) for m in model.modules()] for model in (theirs, ours)]
    assert kinds[0] == kinds[1]
    assert set(vars(layer)) == set(vars(theirs.base_model.model.model.layers[1].self_attn.q_proj))
    assert torch.equal(loss_of(theirs), loss_of(ours))
    with pytest.raises(ValueError, match="no converted layer"):
        revert_(ours)
    convert_(ours, targets="lora")


def test_copies():
    ours = convert_(make(dropout=0.2), EXACT, targets="lora")
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = [
        copy.deepcopy(ours),
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(ours)),
    ]
    exact = gradients(ours)
    for twin in copies:
        assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
        same = gradients(twin)
        assert all(torch.equal(same[n], exact[n]) for n in exact)
        revert_(twin)
    assert isinstance(ours.base_model.model.model.layers[0].mlp.up_proj, MemAOPLora)


def test_some_layers_by_name_and_by_filter():
    ours = make()
    rows = MemAOPConfig(ratio=1 / 2, memory="none", stash="int8")
    convert_(
        ours,
        targets="lora",
        filter_fn=lambda layer, name: "mlp" in name and layer.in_features == 64,
        overrides={"*.1.mlp.*": rows, "*.0.mlp.gate_proj": None},
    )
    found = {n: m.adapter_config for n, m in ours.named_modules() if isinstance(m, MemAOPLora)}
    assert {n.split("layers.")[1]: c for n, c in found.items()} == {
        "0.mlp.up_proj": DEFAULT_CONFIG,
        "1.mlp.gate_proj": rows,
        "1.mlp.up_proj": rows,
    }
    gradients(ours)


@pytest.mark.filterwarnings("ignore:left as PEFT has them")
def test_variants_stay_and_are_named():
    theirs = make(use_dora=True, target_modules=["q_proj", "up_proj"])
    kinds = [type(m) for m in theirs.modules()]
    with (
        pytest.warns(UserWarning, match=r"up_proj' \((DoraLinearVariant|DoRA)\)"),
        pytest.raises(ValueError, match="4 in PeftModel"),
    ):
        convert_(theirs, targets="lora")
    assert [type(m) for m in theirs.modules()] == kinds
    mixed = make(target_modules=["q_proj"])
    dora = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])
    mixed.add_adapter("dora", dora)
    convert_(mixed, targets="lora")
    layer = mixed.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer.lora_A["default"]) is MemAOPLinear
    assert type(layer.lora_A["dora"]) is nn.Linear


def test_layers_that_are_not_linear_stay_and_are_named():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Conv1d(5, 5, 1), nn.Linear(8, 8))
    model = adapted(model, {"target_modules": ["0", "1", "2"]})
    with pytest.warns(UserWarning, match=r"model\.0' \(Embedding\), .*model\.1' \(Conv1d\)\."):
        convert_(model, targets="lora")
    model(torch.randint(0, 9, (3, 5))).sum().backward()
    assert [isinstance(m, MemAOPLora) for m in model.base_model.model] == [False, False, True]


def test_other_classes_and_forward_passes_stay_and_are_named():
    ours = make(target_modules=["q_proj", "up_proj"])
    layers = ours.base_model.model.model.layers
    other, patched = layers[0].self_attn.q_proj, layers[1].mlp.up_proj.lora_A["default"]
    other.__class__ = type("Linear4bit", (peft.tuners.lora.Linear,), {})
    patched.forward = lambda x: nn.functional.linear(x, patched.weight)
    with pytest.warns(
        UserWarning, match=r"q_proj' \(Linear4bit\), .*\(a forward pass of its own\)"
    ):
        convert_(ours, targets="lora")
    assert [isinstance(m, MemAOPLora) for m in (other, layers[0].mlp.up_proj)] == [False, True]
    assert not isinstance(patched, MemAOPLinear)
    assert torch.equal(loss_of(ours), loss_of(make(target_modules=["q_proj", "up_proj"])))


def test_a_conv1d_of_transformers_below_adapters():
    config = transformers.GPT2Config(vocab_size=TOKENS, n_embd=32, n_layer=1, n_head=2)
    settings = {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True}

    def gpt2():
        torch.manual_seed(0)
        return adapted(transformers.GPT2LMHeadModel(config), settings, 0.1).eval()

    ours = convert_(gpt2(), targets="lora")
    assert torch.equal(loss_of(ours), loss_of(gpt2()))
    assert all(g.isfinite().all() for g in gradients(ours.train()).values())


def test_what_cannot_be_converted():
    ours = make()
    with pytest.raises(ValueError, match="'linear', 'lora'"):
        convert_(ours, targets="adapters")
    with pytest.raises(ValueError, match="measures nothing"):
        convert_(ours, targets="lora", only_if_faster=True)
    for config in (
        MemAOPConfig(stash="int4"),
        MemAOPConfig(ratio="auto", memory="none"),
        MemAOPConfig(memory="none", grad_input="sampled"),
    ):
        for arguments in ({"config": config}, {"overrides": {"*q_proj": config}}):
            with pytest.raises(ValueError, match="adapters take"):
                convert_(ours, targets="lora", **arguments)
    with pytest.raises(ValueError, match="matches no layer"):
        convert_(ours, targets="lora", overrides={"nowhere.*": None})
    with pytest.raises(ValueError, match="no LoRA layer of PEFT"):
        convert_(nn.Linear(4, 4), targets="lora")
    assert not any(isinstance(m, MemAOPLora | MemAOPLinear) for m in ours.modules())
    convert_(ours, targets="lora")
    with pytest.raises(ValueError, match="converted already"):
        convert_(ours, targets="lora")


def test_linear_targets_are_what_peft_trains_as_a_whole():
    model = make("bert")
    assert model.base_model.model.classifier.original_module.out_features == 2
    config = MemAOPConfig(ratio=1 / 2, memory="none")
    convert_(model, config)
    found = {n for n, m in model.named_modules() if isinstance(m, MemAOPLinear)}
    assert found == {"base_model.model.classifier.modules_to_save.default"}
    convert_(model, targets="lora")
    gradients(model)
    revert_(model)
    convert_(model, targets="lora")
    convert_(model, config)
    assert model.base_model.model.classifier.modules_to_save["default"].config == config
    revert_(model)
    assert not any(isinstance(m, MemAOPLora | MemAOPLinear) for m in model.modules())
    with pytest.raises(ValueError, match="PEFT"):
        convert_(make(), config)
    everything = make()
    convert_(everything, config, filter_fn=lambda layer, name: name.endswith("q_proj.base_layer"))
    assert sum(isinstance(m, MemAOPLinear) for m in everything.modules()) == 2
