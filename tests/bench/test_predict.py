"""The page of predicted times: current, marked, and true to what it says in words."""

import pytest

from bench.microscope import predict
from bench.microscope.predict import (
    PAGE,
    SETTINGS,
    SHAPES,
    dense_product,
    operations,
    page,
    pytorch,
    version_of_page,
    weight_grad,
)
from memaop_triton import MemAOPConfig
from memaop_triton.kernels.targets import TARGETS

H100, MI300X = TARGETS["sm_90"], TARGETS["gfx942"]


def test_the_command_writes_the_committed_page(tmp_path, monkeypatch, capsys):
    if version_of_page() != pytorch():
        pytest.skip(f"written with PyTorch {version_of_page()}, this is {pytorch()}")
    monkeypatch.setattr(predict, "PAGE", tmp_path / "results" / "predicted.md")
    predict.main()
    written = predict.PAGE.read_text(encoding="utf-8")
    assert written == PAGE.read_text(encoding="utf-8"), "run `python -m bench.microscope.predict`"
    assert "predicted.md" in capsys.readouterr().out


def test_every_table_is_marked_as_predicted():
    lines = page().splitlines()
    assert lines[0].startswith("# PREDICTED")
    tables = [lines[i - 1] for i, line in enumerate(lines) if line.startswith("|---")]
    assert [head for head in tables if "PREDICTED" not in head] == [tables[-1]]
    assert tables[-1].startswith("| chip |")  # the rates it starts from


def test_operations_of_a_selection_are_counted():
    # At least: no NaN among the scores, the rows and their weights, both in order.
    assert 5 <= operations("topk") < operations("randk") < operations("priority") < 30


@pytest.mark.parametrize("target", [H100, MI300X])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_call_is_the_sum_of_its_parts_and_takes_longer_than_what_it_cannot_avoid(
    setting, shape, target
):
    m, n, p = shape
    some, fewer = (MemAOPConfig(ratio=r, **setting) for r in (1 / 8, 1 / 16))
    ours = weight_grad(target, shape, some)
    assert {part for part, seconds in ours.parts.items() if seconds} == {
        "select",
        "GEMM",
        {"none": "score", "residual": "memory", "subspace": "subspace"}[some.memory_name],
    }
    passes = 3 if some.row_memory and some.selection == "topk" else 1
    chip = target.chip
    floor = 2 * passes * m * (n + p) / chip.memory_rate + m * n * p / 4 / chip.flops("half")
    assert ours.seconds > floor
    assert weight_grad(target, shape, fewer).seconds < ours.seconds


def test_what_the_page_says_in_words():
    shape = SHAPES[0]
    plain, topk, randk, default = (
        weight_grad(H100, shape, MemAOPConfig(ratio=1 / 8, **s)).seconds for s in SETTINGS.values()
    )
    dense = dense_product(H100, *shape)
    assert plain < default < topk < randk < dense
    assert 0.78e-3 < dense < 0.82e-3
