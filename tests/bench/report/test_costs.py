"""What a call has to compute and move, and what a method is."""

import re

import pytest

from memaop_triton.bench.report.data import Method, Spread, load
from memaop_triton.bench.report.methods import traffic
from memaop_triton.bench.report.tables import definitions
from tests.bench.report import made


def test_traffic_counts_what_the_design_counts(saved):
    run = load(saved([made.weight_grad("dw", 4096, 1024, 512, 1 / 8)]))
    case, unit = run.cases[0], 4096 * (1024 + 512) * 4
    flops = 2 * 512 * 1024 * 512
    expected = {
        "dense": (2 * 4096 * 1024 * 512, 0, unit, made.READ_GBS),
        "priority": (flops, unit, unit / 8, made.READ_GBS),
        "topk-signed": (flops, 3 * unit, unit / 8, made.UPDATE_GBS),
        "default": (flops + 2 * 4096 * 16 * 1536, 1.5 * unit, unit / 8, made.READ_GBS),
    }
    for name, (flops, passed, moved, bandwidth) in expected.items():
        cost = traffic(case, case.methods[name])
        assert (cost.flops, cost.pass_bytes, cost.gemm_bytes) == (flops, passed, moved)
        times = passed / bandwidth / 1e6, flops / made.GFLOPS / 1e6
        assert cost.milliseconds(run.machine, "float32") == pytest.approx(times)
    assert traffic(case, case.methods["vcas"]) is None


@pytest.mark.parametrize(
    ("role", "name", "unbiased", "about"),
    [
        ("ours", "default", "yes", "Rows drawn by priority sampling .* computed exactly.$"),
        (
            "ours",
            "default, sampled dX",
            "yes",
            "Rows .* The input gradient comes from K rows too.$",
        ),
        ("ours", "default, projected dX", "no", "Rows .* The input gradient's rows lie in a sub"),
        ("ours", "topk-residual", "no", "The K rows of largest score; .* as in the paper"),
        ("ours", "topkish", "–", "about topkish"),
        ("ours", "vcas", "–", "about vcas"),
        ("baseline", "vcas", "yes", "Poisson"),
        ("baseline", "topk", "–", "about topk"),
    ],
)
def test_what_a_name_stands_for(role, name, unbiased, about):
    times = Spread(1.0, 1.0, 1.0)
    ((_, told, what),) = definitions([Method(name, role, f"about {name}", times, times, 0)]).rows
    assert told.text == unbiased
    assert re.match(about, what.text)
