"""The cross terms of the row memory: by definition, and predicted from moments."""

import math
from statistics import fmean

import pytest
import torch

from memaop_triton import MemAOPConfig
from memaop_triton.bench.studies.quality import crossterms, tables
from memaop_triton.bench.studies.quality.capture import Rows, capture
from memaop_triton.bench.studies.quality.crossterms import CrossTerms, predicted_ratio
from tests.bench.quality import tiny


def made(seed, related, shift_x, shift_g):
    """32 batches of independent rows, g a function of x or not."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, 6, generator=generator)
    found = []
    for _ in range(32):
        x = torch.randn(64, 12, generator=generator) + shift_x
        g = related * x @ mix + torch.randn(64, 6, generator=generator) + shift_g
        found.append(Rows(x, g))
    return found


RELATED, UNRELATED = (0, 0.3, 0.7, 0.2), (1, 0.0, 2.0, 0.0)


def compare(batches, selection, memory, draw=0, ratio=1 / 8):
    config = MemAOPConfig(ratio=ratio, selection=selection, memory=memory)
    return crossterms.compare(batches, config, draw)


def test_cross_terms_of_one_slot_by_hand():
    # The first row is selected twice, the second one, three batches old, at last.
    rows = [
        Rows(torch.tensor([[9.0], [a]]), torch.tensor([[9.0], [b]])) for a, b in ((2, 7), (3, 5))
    ]
    rows.append(Rows(torch.tensor([[1.0], [40.0]]), torch.tensor([[1.0], [50.0]])))
    found = compare(rows, "topk", "residual", ratio=1 / 2)
    returned = 81 + 81 + (2 + 3 + 40) * (7 + 5 + 50)
    dense = 81 + 81 + 1 + 2 * 7 + 3 * 5 + 40 * 50
    cross = 2 * (5 + 50) + 3 * (7 + 50) + 40 * (7 + 5)
    assert found == pytest.approx((returned / dense, 1, cross / dense))
    assert math.isnan(compare(rows, "topk", "none").cross)


@pytest.mark.parametrize(
    ("rows", "memory", "ratio", "within"),
    [(RELATED, memory, r, 0.08) for memory in ("residual", "signed") for r in (1 / 2, 1 / 8)]
    + [(UNRELATED, "residual", 1 / 8, 0.12)],  # only scatter is left
)
def test_prediction_holds_for_independent_rows(rows, memory, ratio, within):
    batches = made(*rows)
    norms = [compare(batches, "randk", memory, draw, ratio).norm for draw in range(12)]
    predicted = predicted_ratio(batches, ratio, signed=memory == "signed")
    assert math.sqrt(fmean(norm**2 for norm in norms)) == pytest.approx(predicted, rel=within)


def test_rows_are_those_of_the_frozen_network(source):
    found, again = (capture(tiny.TASK, source, steps=3, batches=2) for _ in range(2))
    first, second = found["hidden1"], found["hidden2"]
    assert [(*one.x.shape, *one.g.shape) for one in first + second] == [
        *[(64, 64, 64, 24)] * 2,
        *[(64, 24, 64, 16)] * 2,
    ]
    # The second layer's input is the first one's output.
    assert (second[0].x >= 0).all()
    assert torch.equal(second[0].x, again["hidden2"][0].x)


def test_lines_of_another_ratio_stay(task, tmp_path, monkeypatch):
    monkeypatch.setattr(crossterms, "BATCHES", 2)
    path = tmp_path / "crossterms.csv"
    for ratio in ("1/8", "1/2", "1/8"):
        assert list(crossterms.run("tiny", ratio, path, None)) == ["hidden1", "hidden2"]
    lines = tables.read(path, CrossTerms)
    methods = 3 * crossterms.DRAWS + crossterms.DRAWS + 2  # topk alone draws nothing
    assert [line.ratio for line in lines] == [1 / 2] * 2 * methods + [1 / 8] * 2 * methods
    predicted = {line[2:4] for line in lines if not math.isnan(line.predicted)}
    assert predicted == {("randk", "residual"), ("randk", "signed")}
