"""The page of predicted times: current, and consistent with its text."""

from bench.microscope import predict
from bench.microscope.predict import PAGE, SETTINGS, SHAPES, dense_product, stashed, weight_grad
from memaop_triton import MemAOPConfig
from memaop_triton.kernels.targets import TARGETS
from tests.judging import figures


def test_the_command_writes_the_committed_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "PAGE", tmp_path / "results" / "predicted.md")
    predict.main()
    written = predict.PAGE.read_text(encoding="utf-8")
    committed = PAGE.read_text(encoding="utf-8")
    assert figures(written) == figures(committed), "run `python -m bench.microscope.predict`"
    assert written.startswith("# PREDICTED")
    assert "predicted.md" in capsys.readouterr().out


def test_what_the_page_says_in_words_is_above_what_cannot_be_avoided():
    m, n, p = SHAPES[0]
    for target in (TARGETS["sm_90"], TARGETS["gfx942"]):
        plain, topk, randk, default = (
            weight_grad(target, SHAPES[0], MemAOPConfig(ratio=1 / 8, **setting)).seconds
            for setting in SETTINGS.values()
        )
        dense = dense_product(target, m, n, p)
        assert plain < default < randk < topk < dense
        one_pass = 2 * m * (n + p) / target.chip.memory_rate
        product = 2 * m * n * p / target.chip.flops("half")
        assert dense > product
        assert plain > one_pass + product / 8
        assert topk > 3 * one_pass + product / 8
        assert randk > 2.5 * one_pass + product / 8


def test_a_stash_is_predicted_above_what_cannot_be_avoided():
    m, n, p = SHAPES[0]
    for target in (TARGETS["sm_90"], TARGETS["gfx942"]):
        without, beside = (
            stashed(target, SHAPES[0], MemAOPConfig(ratio=1 / 8, memory=memory, stash="int4"))
            for memory in ("none", "subspace")
        )
        assert without.seconds < beside.seconds
        assert without.round > 2.5 * m * n / target.chip.memory_rate  # 2 bytes read, ½ written
        assert without.score > 2 * m * p / target.chip.memory_rate
        product = 2 * m * n * p / target.chip.flops("half")
        assert without.product > product / 8
