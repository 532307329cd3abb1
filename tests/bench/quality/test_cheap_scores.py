"""The study of cheap scores: variances against draws, what is resumed, the pretrained BERT."""

import dataclasses
import json

import pytest
import torch

from memaop_triton import MemAOPConfig
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.bench.studies.quality import cheap_scores
from memaop_triton.bench.studies.quality.capture import Rows
from memaop_triton.bench.studies.quality.cheap_scores import Time, added_variance, scores_of
from memaop_triton.bench.studies.quality.schemes import code_of
from memaop_triton.config import SCORES
from memaop_triton.experiments import bert, posts
from memaop_triton.experiments.data import DataError
from tests.bench.quality import tiny

VOCABULARY = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "play": 5, "##ing": 6, "##s": 7}


@pytest.mark.parametrize("kind", SCORES)
def test_variance_is_that_of_draws(kind):
    m, k = 256, 32
    scale = torch.linspace(0.2, 2, m).unsqueeze(1)
    rows = Rows(scale * torch.randn(m, 192), scale[torch.randperm(m)] * torch.randn(m, 160))
    config = MemAOPConfig(k=k, memory=None, scores=kind)
    exact = rows.g.t() @ rows.x
    errors = [(weight_grad(*rows, config) - exact).square().sum() for _ in range(150)]
    found = [added_variance(rows, scores_of(kind, rows), k) for _ in range(50)]
    measured = float(torch.stack(errors).mean() / exact.square().sum())
    assert sum(found) / 50 == pytest.approx(measured, rel=0.15)
    if kind != "norms":
        assert sum(found) / 50 > 1.01 * added_variance(rows, scores_of("norms", rows), k)


def test_rows_of_zero_add_nothing():
    rows = Rows(torch.randn(8, 4), torch.randn(8, 4))
    rows.g[2:] = 0
    assert added_variance(rows, scores_of("norms", rows), 4) == 0


def test_what_is_there_is_not_measured_again(tmp_path, monkeypatch):
    taken = []

    def measured(device, share):
        taken.append(device)
        for scores in SCORES:
            yield Time(
                device, "8 x 4 x 2", "1/8", scores, 2.0, 1.0 if scores == "norms" else share, 1
            )

    monkeypatch.setitem(cheap_scores.TASKS, "tiny", tiny.TASK)
    monkeypatch.setattr(cheap_scores, "STEPS", {"tiny": 3})
    monkeypatch.setattr(cheap_scores, "measured", lambda: measured("a CPU", 0.5))
    monkeypatch.setattr(cheap_scores, "predicted", lambda: measured("a GPU", 0.25))
    path = tmp_path / "scores.json"
    lines = list(cheap_scores.run(path, None))
    assert "| a CPU | 8 x 4 x 2 | 1/8 | 2 | 0.50 | 0.50 |" in lines
    found = json.loads(path.read_text())
    kinds = {(one["kind"], one["layers"]) for one in found["variance tiny"]}
    assert kinds == {("hidden1", 1), ("hidden2", 1), ("all", 2)}
    for one in found["variance tiny"]:
        assert one["over_norms"] == 1 or one["scores"] == "grad"  # 64 columns are read whole
    del found["time"]
    path.write_text(json.dumps(found))
    monkeypatch.setattr(cheap_scores, "variances", None)
    assert sorted(cheap_scores.run(path, None)) == sorted(lines)
    assert taken == ["a CPU", "a GPU", "a CPU"]


def test_predictions_fall_with_the_bytes_that_are_read():
    lines = list(cheap_scores.predicted())
    assert len(lines) == 2 * 2 * 2 * len(SCORES)
    for norms, columns, grad in zip(*[iter(lines)] * 3, strict=True):
        assert (norms.scores, columns.scores, grad.scores) == SCORES
        assert norms.megabytes == 2 * grad.megabytes == 8 * columns.megabytes
        assert norms.over_norms == 1
        assert 0.5 < columns.over_norms < 1
        assert 0.5 < grad.over_norms < 1


def test_a_setting_that_came_later_makes_no_run_stale():
    codes = {kind: code_of(tiny.TASK, MemAOPConfig(memory=None, scores=kind)) for kind in SCORES}
    assert len(set(codes.values())) == 3
    before = MemAOPConfig(memory=None)
    object.__setattr__(before, "scores", None)  # a setting that is None does not count
    assert code_of(tiny.TASK, before) == codes["norms"]


def test_words_are_cut_into_the_longest_pieces():
    found = posts.tokens(["plays", "playing", "plaything", "x"], VOCABULARY)
    assert found[:8] == [101, 5, 7, 5, 6, 100, 100, 102]
    assert found[8:] == [0] * 56
    long = posts.tokens(["play"] * 100, VOCABULARY)
    assert long == [101, *[5] * 62, 102]


@pytest.fixture
def folder(tmp_path):
    """Files of a BERT of width 8 and one layer, and of four posts."""
    import gzip

    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embeddings.word_embeddings.weight": (110, 8),
        "embeddings.position_embeddings.weight": (64, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
        "pooler.dense.weight": (8, 8),
    }
    layer = "encoder.layer.0."
    sizes = {
        **{f"{layer}attention.self.{name}": (8, 8) for name in ("query", "key", "value")},
        f"{layer}attention.output.dense": (8, 8),
        f"{layer}intermediate.dense": (32, 8),
        f"{layer}output.dense": (8, 32),
    }
    norms = ("embeddings.", f"{layer}attention.output.", f"{layer}output.")
    for name, (outputs, inputs) in sizes.items():
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    for name in norms:
        shapes |= {f"{name}LayerNorm.{part}": (8,) for part in ("weight", "bias")}
    table, content, weights = {}, b"", {}
    for name, shape in shapes.items():
        weights[name] = torch.randn(shape, generator=generator).half()
        numbers = weights[name].numpy().tobytes()
        offsets = [len(content), len(content) + len(numbers)]
        table[name] = {"dtype": "F16", "shape": shape, "data_offsets": offsets}
        content += numbers
    table["embeddings.position_ids"] = {"dtype": "I64", "shape": [0], "data_offsets": [0, 0]}
    table["__metadata__"] = {"format": "pt"}
    head = json.dumps(table).encode()
    (tmp_path / "minilm").mkdir()
    whole = len(head).to_bytes(8, "little") + head + content
    (tmp_path / "minilm" / "model.safetensors").write_bytes(whole)
    tokenizer = json.dumps({"model": {"vocab": VOCABULARY}})
    (tmp_path / "minilm" / "tokenizer.json").write_text(tokenizer)
    for part in ("train", "test"):
        posts = "b\tplays\na\tplaying x\n"
        (tmp_path / f"newsgroups20_{part}.tsv.gz").write_bytes(gzip.compress(posts.encode()))
    return tmp_path, weights


def test_the_pretrained_network_has_its_weights_and_reads_no_padding(folder):
    path, weights = folder
    sizes = bert.MiniLm(path, 8, 1, 2, classes=3, vocabulary=110, positions=64)
    model = sizes.build()
    own = dict(model.named_parameters())
    for ours, theirs in (
        ("blocks.0.value.weight", "encoder.layer.0.attention.self.value.weight"),
        ("blocks.0.proj.bias", "encoder.layer.0.attention.output.dense.bias"),
        ("blocks.0.norm2.weight", "encoder.layer.0.output.LayerNorm.weight"),
    ):
        assert torch.equal(own[ours], weights[theirs].float())
    texts = posts.load_texts("newsgroups20", path)
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


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"--data-dir or MEMAOP_TRITON_DATA_DIR"):
        posts.load_texts("newsgroups20", None)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        posts.load_texts("newsgroups20", tmp_path)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        cheap_scores.TASKS["minilm"].located(tmp_path).network.build()
