import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from memaop_triton import MemAOPConfig, MemAOPLinear, convert_, revert_

CONFIG = MemAOPConfig(k=3, memory="none")
OTHER = MemAOPConfig.paper(k=2)


def everything(module, name):
    return True


class Named(nn.Linear):
    """A subclass without a forward pass of its own."""

    label = "kept"


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "special",
    [
        lambda: Named(8, 8),
        lambda: Scaled(8, 8),
        lambda: nn.LazyLinear(8),
        lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    ],
    ids=["subclass", "own-forward", "lazy", "parametrised"],
)
def test_other_classes_are_left_alone_and_named(special):
    model = nn.Sequential(nn.Linear(8, 8), special())
    kind = type(model[1])
    with pytest.warns(UserWarning, match=rf"left as they are.*'1' \({kind.__name__}\).*filter_fn"):
        convert_(model, CONFIG)
    assert type(model[1]) is kind
    assert type(model[0]) is MemAOPLinear


def test_subclass_taken_by_the_filter_keeps_everything_but_its_backward_pass(train_step):
    model = convert_(nn.Sequential(Named(8, 8)), OTHER, filter_fn=everything)
    layer = model[0]
    assert isinstance(layer, MemAOPLinear)
    assert isinstance(layer, Named)
    assert layer.label == "kept"
    assert type(layer).__name__ == "MemAOPNamed"
    train_step(model, torch.randn(9, 8))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is type(layer)
        assert twin[0].config == OTHER
        assert torch.equal(twin[0].memory.x, layer.memory.x)
        train_step(twin, torch.randn(9, 8))
        assert type(revert_(twin)[0]) is Named


def test_subclass_whose_attributes_would_be_overwritten_is_refused():
    model = nn.Sequential(Named(8, 8))
    model[0].config = {"own": 1}
    with pytest.raises(ValueError, match=r"'0'.*config"):
        convert_(model, OTHER, filter_fn=everything)
    assert model[0].config == {"own": 1}


def test_parametrised_layer_taken_by_the_filter_trains_and_reverts(train_step):
    layer = parametrizations.weight_norm(nn.Linear(8, 8))
    dense = copy.deepcopy(layer)
    kind = type(layer)
    convert_(layer, MemAOPConfig(k=99, memory="none"), filter_fn=everything)
    x = torch.randn(9, 8)
    for model in (layer, dense):
        train_step(model, x)
    for ours, theirs in zip(layer.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert type(revert_(layer)) is kind
    assert torch.equal(layer(x), dense(x))


def test_layer_parametrised_after_conversion_survives_revert():
    layer = parametrizations.weight_norm(convert_(nn.Linear(8, 8), CONFIG))
    x = torch.randn(9, 8)
    before = layer(x)
    with pytest.raises(ValueError, match="was parametrised after it was converted"):
        revert_(layer)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (lambda: Scaled(8, 8), "layer '1': Scaled has a forward pass of its own.*memaop_linear"),
        (lambda: nn.LazyLinear(8), "layer '1': LazyLinear is not initialised.*forward pass first"),
    ],
)
def test_refused_layer_leaves_the_model_unconverted(special, message):
    model = nn.Sequential(nn.Linear(8, 8), special())
    with pytest.raises(ValueError, match=message):
        convert_(model, CONFIG, filter_fn=everything)
    assert type(model[0]) is nn.Linear


def test_forward_pass_set_on_the_instance_is_refused():
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
    with pytest.raises(ValueError, match="forward pass of its own"):
        convert_(layer, CONFIG)
    assert type(layer) is nn.Linear


def test_adopting_with_a_wrong_configuration_changes_nothing():
    layer = nn.Linear(8, 8)
    with pytest.raises(TypeError, match="config must be a MemAOPConfig, got 'priority'"):
        MemAOPLinear.adopt_(layer, "priority")
    assert type(layer) is nn.Linear


def test_lazy_layer_is_converted_once_initialised():
    layer = nn.LazyLinear(8)
    layer(torch.randn(2, 5))
    assert type(convert_(layer, CONFIG)) is MemAOPLinear


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.filterwarnings("ignore:left as they are")
def test_transformer_layer_still_runs(mode):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    dense = copy.deepcopy(layer)
    convert_(layer, MemAOPConfig(k=99, memory="none"))
    assert type(layer.linear1) is type(layer.linear2) is MemAOPLinear
    assert type(layer.self_attn.out_proj) is not MemAOPLinear
    x = torch.randn(2, 7, 16)
    for model in (layer, dense):
        model.train(mode == "train")
        model(x).square().sum().backward()
    assert torch.equal(layer(x), dense(x))
    torch.testing.assert_close(layer.linear1.weight.grad, dense.linear1.weight.grad)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x))


def test_attention_alone_has_nothing_to_convert():
    attention = nn.MultiheadAttention(16, 2)
    with (
        pytest.warns(UserWarning, match="NonDynamicallyQuantizableLinear"),
        pytest.raises(ValueError, match="no layer to convert"),
    ):
        convert_(attention, CONFIG)
    assert attention(*3 * [torch.randn(5, 1, 16)])[0].shape == (5, 1, 16)
