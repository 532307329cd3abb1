"""The pretrained BERT and its texts: from files, and from the hub."""

import dataclasses
import importlib.machinery
import sys
import types
from collections import OrderedDict

import pytest
import torch

from memaop_triton.experiments import hub, posts
from memaop_triton.experiments.data import DataError
from tests.experiments import tiny_bert


@pytest.fixture
def folder(tmp_path):
    tiny_bert.write(tmp_path)
    return tmp_path


@pytest.fixture
def fake_hub(monkeypatch):
    """A transformers with the tiny network, and 20 Newsgroups of two posts; the calls they got."""
    calls = []

    class Model:
        @staticmethod
        def from_pretrained(name):
            calls.append(name)
            return types.SimpleNamespace(state_dict=lambda: OrderedDict(tiny_bert.weights()))

    class Tokenizer:
        @staticmethod
        def from_pretrained(name):
            calls.append(name)

            def tokenize(texts, *, truncation, padding, max_length):
                assert isinstance(texts, list)
                assert truncation
                assert padding == "max_length"
                rows = [
                    posts.tokens(text.split(), tiny_bert.VOCABULARY, max_length) for text in texts
                ]
                return {"input_ids": rows}

            return tokenize

    module = types.ModuleType("transformers")
    module.__spec__ = importlib.machinery.ModuleSpec("transformers", None)
    module.AutoModel, module.AutoTokenizer = Model, Tokenizer
    monkeypatch.setitem(sys.modules, "transformers", module)

    def fetch(*, subset, shuffle):
        calls.append(subset)
        data = [
            "From: x\nSubject: plays\nNewsgroups: x\n\nplay x\n\nplay",
            "Newsgroups: x\n\nplaying",
        ]
        return types.SimpleNamespace(data=data, target=torch.tensor([1, 0]).numpy())

    monkeypatch.setattr("sklearn.datasets.fetch_20newsgroups", fetch)
    return calls


def test_words_are_cut_into_the_longest_pieces():
    found = posts.tokens(["plays", "playing", "plaything", "x"], tiny_bert.VOCABULARY)
    assert found[:8] == [101, 5, 7, 5, 6, 100, 100, 102]
    assert found[8:] == [0] * 56
    assert posts.tokens(["play"] * 100, tiny_bert.VOCABULARY) == [101, *[5] * 62, 102]
    assert posts.tokens(["plays", "play"], tiny_bert.VOCABULARY, 4) == [101, 5, 7, 102]


def test_the_pretrained_network_has_its_weights_and_reads_no_padding(folder):
    weights, sizes = tiny_bert.weights(), tiny_bert.sizes(folder, classes=3)
    model = sizes.build()
    own = dict(model.named_parameters())
    for ours, theirs in (
        ("blocks.0.value.weight", "encoder.layer.0.attention.self.value.weight"),
        ("blocks.0.proj.bias", "encoder.layer.0.attention.output.dense.bias"),
        ("blocks.0.norm2.weight", "encoder.layer.0.output.LayerNorm.weight"),
    ):
        assert torch.equal(own[ours], weights[theirs].float())
    texts = posts.load_texts("newsgroups20", folder)
    assert texts.y_train.tolist() == texts.y_test.tolist() == [1, 0]
    x = texts.x_train
    assert x[1, :4].tolist() == [101, 5, 6, 100]
    mean = dataclasses.replace(sizes, pooling="mean").build()
    mean.load_state_dict(model.state_dict())
    for network in (model, mean):
        whole = network(x)
        assert whole.shape == (2, 3)
        torch.testing.assert_close(network(x[:, :5]), whole)
        assert not torch.allclose(network(x[:, :2]), whole)
    assert not torch.allclose(model(x), mean(x))


def test_without_a_directory_the_same_network_comes_from_the_hub(folder, fake_hub):
    models = []
    for where in (folder, None):
        torch.manual_seed(0)
        models.append(tiny_bert.sizes(where).build())
    assert fake_hub == [hub.MODEL]
    fetched = models[1].state_dict()
    for name, value in models[0].state_dict().items():
        assert fetched[name].dtype == torch.float32
        assert torch.equal(fetched[name], value)


def test_without_a_directory_subjects_and_bodies_come_through_scikit_learn(fake_hub):
    texts = posts.load_texts("newsgroups20", None, 8)
    assert fake_hub == ["train", hub.MODEL, "test", hub.MODEL]
    assert texts.x_train.tolist() == [[101, 5, 7, 5, 100, 5, 102, 0], [101, 5, 6, 102, 0, 0, 0, 0]]
    assert torch.equal(texts.x_test, texts.x_train)
    assert texts.y_train.tolist() == texts.y_test.tolist() == [1, 0]
    assert all(values.dtype == torch.int64 for values in texts)


def test_what_is_not_there_is_named(tmp_path, monkeypatch, fake_hub):
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        posts.load_texts("newsgroups20", tmp_path)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        tiny_bert.sizes(tmp_path).build()
    with pytest.raises(DataError, match=r"reuters_r8.*--data-dir or MEMAOP_TRITON_DATA_DIR"):
        posts.load_texts("reuters_r8", None)

    def offline(name):
        raise OSError("no\nroute")

    for kind in ("AutoModel", "AutoTokenizer"):
        monkeypatch.setattr(getattr(sys.modules["transformers"], kind), "from_pretrained", offline)
    for load in (hub.pretrained_weights, lambda: hub.tokens_of(["x"], 8)):
        with pytest.raises(DataError, match=r"no route.*--data-dir"):
            load()
    for module, load in {
        "transformers": tiny_bert.sizes().build,
        "sklearn": lambda: posts.load_texts("newsgroups20", None),
    }.items():
        monkeypatch.setitem(sys.modules, module, None)
        words = rf"{module} is not installed: pip install 'memaop-triton\[finetune\]'.*--data-dir"
        with pytest.raises(DataError, match=words):
            load()
