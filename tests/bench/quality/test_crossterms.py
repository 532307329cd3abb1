"""The cross terms of the row memory: summed by ages, and predicted from moments."""

import math
from statistics import fmean

import pytest
import torch

from memaop_triton.bench.studies.quality import crossterms, data
from memaop_triton.bench.studies.quality.capture import Rows, capture
from memaop_triton.bench.studies.quality.crossterms import compare, predicted_ratio
from tests.bench.quality import tiny

ROWS = 64


@pytest.fixture(scope="module")
def batches():
    """Independent rows whose means are not zero, x and g related."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 6, generator=generator)
    found = []
    for _ in range(32):
        x = torch.randn(ROWS, 12, generator=generator) + 0.7
        g = x @ mix * 0.3 + torch.randn(ROWS, 6, generator=generator) + 0.2
        found.append(Rows(x, g))
    return found


def last(batches, selection, memory, draw=0, ratio=1 / 8):
    method = (selection, memory, ratio)
    predicted = crossterms.predictions(batches, *method)
    *_, line = compare("tiny", "layer", batches, *method, draw, predicted)
    return line


@pytest.mark.parametrize("selection", ["randk", "topk"])
def test_cross_terms_explain_all_that_the_papers_memory_adds(batches, selection):
    lines = list(compare("tiny", "layer", batches, selection, "residual", 1 / 8))
    assert [line.batches for line in lines] == [1, 2, 4, 8, 16, 32]
    assert all(line.unexplained < 1e-5 for line in lines)
    assert lines[0].cross < 1e-6  # nothing to pair with yet
    assert lines[-1].cross > 1


def test_cross_terms_of_one_slot_by_hand():
    x, g = torch.tensor([[2.0], [3.0], [5.0]]), torch.tensor([[7.0], [11.0], [13.0]])
    rows = [Rows(a[None], b[None]) for a, b in zip(x, g, strict=True)]
    slots = crossterms._Slots(rows)
    slots.empty(2, torch.tensor([True]), pairing=True)
    assert slots.cross.item() == 7 * 3 + 11 * 2
    assert slots.pending(3).item() == 13 * 5
    slots.empty(3, torch.tensor([True]), pairing=True)
    assert slots.cross.item() == 7 * 3 + 11 * 2
    assert slots.pending(3).item() == 0


@pytest.mark.parametrize("ratio", [1 / 2, 1 / 8])
@pytest.mark.parametrize("memory", ["residual", "signed"])
def test_prediction_holds_for_independent_rows(batches, memory, ratio):
    lines = [last(batches, "randk", memory, draw, ratio) for draw in range(12)]
    measured = math.sqrt(fmean(line.norm**2 for line in lines))
    assert measured == pytest.approx(lines[0].predicted, rel=0.08)


def test_prediction_holds_where_only_scatter_is_left():
    generator = torch.Generator().manual_seed(1)
    shapes = [(ROWS, 12), (ROWS, 24)]
    batches = [
        Rows(*(torch.randn(shape, generator=generator) for shape in shapes)) for _ in range(32)
    ]
    batches = [Rows(x + 2, g) for x, g in batches]
    lines = [last(batches, "randk", "residual", draw) for draw in range(12)]
    measured = math.sqrt(fmean(line.norm**2 for line in lines))
    assert measured == pytest.approx(lines[0].predicted, rel=0.12)


def test_residual_inflates_and_signed_does_not(batches):
    assert last(batches, "randk", "residual").norm > 3
    norms = [last(batches, "randk", "signed", draw).norm for draw in range(12)]
    assert 0.7 < fmean(norms) < 1.3


def test_what_has_no_prediction_says_so(batches):
    none, topk = last(batches, "randk", "none"), last(batches, "topk", "signed")
    assert all(map(math.isnan, (none.cross, none.unexplained, none.predicted, topk.predicted)))
    assert not math.isnan(topk.cross)
    assert none.norm == pytest.approx(1 / 8, rel=0.3)


def test_without_memory_of_the_past_there_is_nothing_to_predict(batches):
    assert predicted_ratio(batches, 1.0, signed=False) == pytest.approx(1, rel=1e-5)


def test_rows_are_those_of_the_frozen_network():
    source = data.load(tiny.TASK, None)
    found = capture(tiny.TASK, source, steps=3, batches=2)
    assert {name: [(*r.x.shape, *r.g.shape) for r in rows] for name, rows in found.items()} == {
        "hidden1": [(64, 64, 64, 24)] * 2,
        "hidden2": [(64, 24, 64, 16)] * 2,
    }
    # Of one network: the second layer's input is the first one's output.
    hidden = found["hidden2"][0].x
    assert (hidden >= 0).all()
    assert found["hidden1"][0].x.max() == 1
    again = capture(tiny.TASK, source, steps=3, batches=2)
    assert torch.equal(hidden, again["hidden2"][0].x)


def test_lines_of_another_ratio_stay(task, tmp_path, monkeypatch):
    monkeypatch.setattr(crossterms, "BATCHES", (1, 2))
    path = tmp_path / "crossterms.csv"
    for ratio in ("1/8", "1/2", "1/8"):
        crossterms.run("tiny", ratio, path, None)
    lines = crossterms.tables.read(path, crossterms.CrossTerms)
    runs = sum(crossterms.draws(*method) for method in crossterms.METHODS)
    assert len(lines) == 2 * 2 * runs * 2  # ratios, layers, T
    assert {line.ratio for line in lines} == {1 / 8, 1 / 2}
