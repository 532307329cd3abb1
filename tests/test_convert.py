import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from memaop_triton import MemAOPConfig, MemAOPLinear, convert_, revert_
from memaop_triton.auto.controller import Controller

CONFIG = MemAOPConfig(k=3, memory="none")
EXACT = MemAOPConfig(k=99, memory="none")
OTHER = MemAOPConfig.paper(k=2)


def net():
    def block():
        layers = {"up": nn.Linear(8, 12), "tanh": nn.Tanh(), "down": nn.Linear(12, 8)}
        return nn.Sequential(OrderedDict(layers))

    blocks = nn.Sequential(block(), block())
    return nn.Sequential(OrderedDict(blocks=blocks, head=nn.Linear(8, 2)))


def configs(model):
    return {
        name: getattr(module, "config", None)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def test_converted_model_is_the_same_and_reverts_to_what_it_was(train_step):
    model = net()
    x = torch.randn(9, 8)
    before, attributes = model(x), set(model.head.__dict__)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    assert convert_(model, CONFIG) is model
    assert dict(model.named_modules()) == modules
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    assert set(configs(model).values()) == {CONFIG}
    assert all(type(m) is MemAOPLinear for m in modules.values() if isinstance(m, nn.Linear))
    assert torch.equal(model(x), before)

    assert revert_(model) is model
    assert type(model.head) is nn.Linear
    assert set(model.head.__dict__) == attributes
    assert torch.equal(model(x), before)

    convert_(model, OTHER)
    train_step(model, x)
    assert model.head.memory.rows == 9
    assert list(model.state_dict()) == list(state)
    assert not list(model.buffers())


def test_optimizer_and_hooks_from_before_go_on_working(train_step):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append("forward"))
    model.head.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.head.weight.register_hook(lambda _: calls.append("grad"))
    convert_(model, CONFIG)
    before = model.head.weight.detach().clone()
    train_step(model, torch.randn(9, 8), optimizer=optimizer)
    assert calls == ["pre", "forward", "grad"]
    assert not torch.equal(model.head.weight, before)


def test_filter_chooses_layers_by_module_and_name():
    model = net()
    convert_(model, CONFIG, filter_fn=lambda module, name: module.out_features == 8)
    assert [n for n, c in configs(model).items() if c] == ["blocks.0.down", "blocks.1.down"]


def test_overrides_by_pattern_and_the_last_match_wins():
    model = net()
    overrides = {"blocks.*": OTHER, "*.down": None, "blocks.1.down": MemAOPConfig(k=9)}
    convert_(model, CONFIG, overrides=overrides)
    assert configs(model) == {
        "blocks.0.up": OTHER,
        "blocks.0.down": None,
        "blocks.1.up": OTHER,
        "blocks.1.down": MemAOPConfig(k=9),
        "head": CONFIG,
    }


def test_tied_modules_and_weights_stay_tied():
    # "config" as a layer's name is no attribute of a layer.
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("a", "same weight", "config")})
    model["b"] = model["a"]
    model["same weight"].weight = model["a"].weight
    convert_(model, MemAOPConfig(), overrides={"[bs]*": OTHER})
    assert model["a"] is model["b"]
    assert configs(model) == {"a": OTHER, "same weight": OTHER, "config": MemAOPConfig()}
    assert model["same weight"].weight is model["a"].weight
    assert model["same weight"].memory is not model["a"].memory
    revert_(model)
    assert type(model["a"]) is nn.Linear


def test_by_default_the_library_decides():
    model = convert_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), overrides={"1": OTHER})
    assert isinstance(model[0].layer_state.controller, Controller)
    assert model[0].layer_state.is_native
    assert model[1].layer_state.controller is None
    assert configs(model) == {"0": MemAOPConfig(ratio=1.0), "1": OTHER}


def test_model_that_is_itself_a_linear_layer():
    layer = nn.Linear(8, 2)
    assert convert_(layer, CONFIG) is layer
    assert type(layer) is MemAOPLinear
    with pytest.raises(ValueError, match="converted already: the model itself"):
        convert_(layer)
    assert type(revert_(layer)) is nn.Linear


def test_converting_twice_names_the_layers_and_changes_nothing():
    model = net()
    convert_(model, CONFIG, overrides={"blocks.*": None})
    with pytest.raises(ValueError, match=r"converted already: 'head'\. Call revert_"):
        convert_(model, OTHER)
    assert configs(model)["blocks.0.up"] is None
    assert model.head.config == CONFIG
    convert_(model, OTHER, filter_fn=lambda module, name: name != "head")
    assert configs(model)["blocks.0.up"] == OTHER


@pytest.mark.parametrize(
    ("convert", "error", "message"),
    [
        (lambda m: convert_(nn.ReLU()), ValueError, "no layer to convert: 0 in ReLU"),
        (lambda m: convert_(m, filter_fn=lambda *_: False), ValueError, "'all' means, 0 taken"),
        (lambda m: convert_(m, overrides={"*": None}), ValueError, "5 taken by .*, none left"),
        (
            lambda m: convert_(m, overrides={"head": OTHER, "blocks.0.dwn": None}),
            ValueError,
            r"'blocks\.0\.dwn' matches no .*Did you mean 'blocks\.0",
        ),
        (lambda m: revert_(m), ValueError, "no converted layer to revert: Sequential"),
        (lambda m: convert_(torch.zeros(3)), TypeError, "must be a torch.nn.Module, got Tensor"),
        (lambda m: convert_(m, {"k": 1}), TypeError, "config must be a MemAOPConfig, got {'k': 1}"),
        (lambda m: convert_(m, overrides=[3]), TypeError, r"overrides must map .*got \[3\]"),
        (lambda m: convert_(m, overrides={"*": 3}), TypeError, r"overrides\['\*'\] must be a Mem"),
    ],
)
def test_what_cannot_be_converted_or_reverted(convert, error, message):
    model = net()
    with pytest.raises(error, match=message):
        convert(model)
    assert set(configs(model).values()) == {None}


def everything(module, name):
    return True


class Named(nn.Linear):
    label = "kept"


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def having(layer, attribute, value):
    setattr(layer, attribute, value)
    return layer


def test_other_classes_are_left_alone_and_named():
    parametrised = parametrizations.weight_norm(nn.Linear(8, 8))
    for special in (Named(8, 8), Scaled(8, 8), nn.LazyLinear(8), parametrised):
        kind = type(special)
        model = nn.Sequential(nn.Linear(8, 8), special)
        with pytest.warns(match=rf"left as they are.*'1' \({kind.__name__}\).*filter_fn"):
            convert_(model, CONFIG)
        assert [type(layer) for layer in model] == [MemAOPLinear, kind]


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (Scaled(8, 8), "Scaled has a forward pass of its own.*memaop_linear"),
        (having(nn.Linear(8, 8), "forward", id), "Linear has a forward pass of its own"),
        (nn.LazyLinear(8), "LazyLinear is not initialised.*forward pass first"),
        (having(Named(8, 8), "config", {}), "Named has an attribute 'config' of its own"),
    ],
)
def test_refused_layer_leaves_the_model_unconverted(special, message):
    model = nn.Sequential(nn.Linear(8, 8), special)
    kind, attributes = type(special), dict(vars(special))
    with pytest.raises(ValueError, match=f"layer '1': {message}"):
        convert_(model, CONFIG, filter_fn=everything)
    assert [type(layer) for layer in model] == [nn.Linear, kind]
    assert vars(special) == attributes


def test_subclass_taken_by_the_filter_keeps_everything_but_its_backward_pass(train_step):
    model = convert_(nn.Sequential(Named(8, 8)), OTHER, filter_fn=everything)
    layer = model[0]
    assert isinstance(layer, MemAOPLinear)
    assert layer.label == "kept"
    assert type(layer).__name__ == "MemAOPNamed"
    train_step(model, torch.randn(9, 8))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is type(layer)
        assert twin[0].config == OTHER
        assert torch.equal(twin[0].memory.x, layer.memory.x)
        train_step(twin, torch.randn(9, 8))
        assert type(revert_(twin)[0]) is Named


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal])
@pytest.mark.parametrize("wrap_first", [True, False])
def test_parametrised_layer_trains_and_reverts_if_it_was_so_before(wrap, wrap_first, train_step):
    layer = nn.Linear(8, 8)
    dense = wrap(copy.deepcopy(layer))
    if wrap_first:
        ours = convert_(wrap(layer), EXACT, filter_fn=everything)
    else:
        ours = wrap(convert_(layer, EXACT))
    ours.load_state_dict(dense.state_dict())
    x = torch.randn(9, 8)
    for model in (ours, dense):
        train_step(model, x)
    for a, b in zip(ours.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    if wrap_first:
        assert type(revert_(ours)).__name__ == "ParametrizedLinear"
    else:
        with pytest.raises(ValueError, match="was parametrised after it was converted"):
            revert_(ours)
    assert torch.equal(ours(x), dense(x))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_transformer_layer_still_runs(mode):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    dense = copy.deepcopy(layer)
    with pytest.warns(match=r"left as they are.*NonDynamicallyQuantizableLinear"):
        convert_(layer, EXACT)
    assert type(layer.linear1) is type(layer.linear2) is MemAOPLinear
    x = torch.randn(2, 7, 16)
    for model in (layer, dense):
        model.train(mode == "train")
        model(x).square().sum().backward()
    assert torch.equal(layer(x), dense(x))
    torch.testing.assert_close(layer.linear1.weight.grad, dense.linear1.weight.grad)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x))
