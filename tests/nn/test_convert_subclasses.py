import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from memaop_triton import MemAOPConfig, MemAOPLinear, convert_, revert_

CONFIG = MemAOPConfig(k=3, memory="none")
EXACT = MemAOPConfig(k=99, memory="none")
OTHER = MemAOPConfig.paper(k=2)


def everything(module, name):
    return True


class Named(nn.Linear):
    label = "kept"


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_a_forward_pass():
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


def with_an_attribute():
    layer = Named(8, 8)
    layer.config = {"own": 1}
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
        (lambda: Scaled(8, 8), "layer '1': Scaled has a forward pass of its own.*memaop_linear"),
        (with_a_forward_pass, "layer '1': Linear has a forward pass of its own"),
        (lambda: nn.LazyLinear(8), "layer '1': LazyLinear is not initialised.*forward pass first"),
        (with_an_attribute, "layer '1': Named has an attribute 'config' of its own"),
    ],
)
def test_refused_layer_leaves_the_model_unconverted(special, message):
    model = nn.Sequential(nn.Linear(8, 8), special())
    kind, attributes = type(model[1]), dict(vars(model[1]))
    with pytest.raises(ValueError, match=message):
        convert_(model, CONFIG, filter_fn=everything)
    assert [type(layer) for layer in model] == [nn.Linear, kind]
    assert vars(model[1]) == attributes


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
