"""The study of cheap scores: variances against draws, and what is resumed."""

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
from memaop_triton.experiments.data import DataError
from tests.bench.quality import tiny


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


def test_a_task_reads_its_weights_from_the_data_directory(tmp_path):
    with pytest.raises(DataError, match=r"model\.safetensors"):
        cheap_scores.TASKS["minilm"].located(tmp_path).network.build()
