"""The page of predicted times: current, and true to what it says in words."""

import pytest

from bench.microscope import predict
from bench.microscope.predict import PAGE, SETTINGS, SHAPES, dense_product, weight_grad
from memaop_triton import MemAOPConfig
from memaop_triton.kernels.targets import TARGETS

H100, MI300X = TARGETS["sm_90"], TARGETS["gfx942"]


def test_the_command_writes_the_committed_page(tmp_path, monkeypatch, capsys):
    if predict.version_of_page() != predict.pytorch():
        pytest.skip(f"written with PyTorch {predict.version_of_page()}, not {predict.pytorch()}")
    monkeypatch.setattr(predict, "PAGE", tmp_path / "results" / "predicted.md")
    predict.main()
    written = predict.PAGE.read_text(encoding="utf-8")
    assert written == PAGE.read_text(encoding="utf-8"), "run `python -m bench.microscope.predict`"
    assert written.startswith("# PREDICTED")
    assert "predicted.md" in capsys.readouterr().out


@pytest.mark.parametrize("target", [H100, MI300X])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_call_takes_longer_than_what_it_cannot_avoid(setting, target):
    some, fewer = (MemAOPConfig(ratio=r, **setting) for r in (1 / 8, 1 / 16))
    passes = 3 if some.row_memory and some.selection == "topk" else 1
    own_part = {"none": "score", "residual": "memory", "subspace": "subspace"}[some.memory_name]
    chip = target.chip
    for m, n, p in SHAPES:
        ours = weight_grad(target, (m, n, p), some)
        parts = {part for part, seconds in ours.parts.items() if seconds}
        assert parts == {"select", "GEMM", own_part}
        floor = 2 * passes * m * (n + p) / chip.memory_rate + m * n * p / 4 / chip.flops("half")
        assert ours.seconds > floor
        assert weight_grad(target, (m, n, p), fewer).seconds < ours.seconds


def test_what_the_page_says_in_words():
    shape = SHAPES[0]
    plain, topk, randk, default = (
        weight_grad(H100, shape, MemAOPConfig(ratio=1 / 8, **s)).seconds for s in SETTINGS.values()
    )
    dense = dense_product(H100, *shape)
    assert plain < default < topk < randk < dense
    assert 0.78e-3 < dense < 0.82e-3
