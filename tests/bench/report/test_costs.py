"""What a call has to compute and move, and what a method is."""

import pytest

from memaop_triton.bench.report.data import Method, Spread, load
from memaop_triton.bench.report.methods import base_name, traffic
from memaop_triton.bench.report.tables import definitions
from tests.bench.report import made


def test_traffic_counts_what_the_design_counts(saved):
    case = load(saved([made.weight_grad("dw", 4096, 1024, 512, 1 / 8)])).cases[0]
    unit = 4096 * (1024 + 512) * 4
    flops = 2 * 512 * 1024 * 512
    expected = {
        "dense": (2 * 4096 * 1024 * 512, 0, unit),
        "priority": (flops, unit, unit / 8),
        "topk-signed": (flops, 3 * unit, unit / 8),
        "default": (flops + 2 * 4096 * 16 * 1536, 1.5 * unit, unit / 8),
    }
    for name, numbers in expected.items():
        cost = traffic(case, case.methods[name])
        assert (cost.flops, cost.pass_bytes, cost.gemm_bytes) == numbers
    assert traffic(case, case.methods["vcas"]) is None


def test_costs_at_the_rates_of_the_machine(saved):
    run = load(saved([made.weight_grad("dw", 4096, 1024, 512, 1 / 8)]))
    case, unit = run.cases[0], 4096 * (1024 + 512) * 4
    product = 2 * 512 * 1024 * 512 / made.GFLOPS / 1e6
    passes = {
        "priority": unit / made.READ_GBS / 1e6,
        "topk-signed": 3 * unit / made.UPDATE_GBS / 1e6,
    }
    for name, passed in passes.items():
        cost = traffic(case, case.methods[name])
        assert cost.milliseconds(run.machine, "float32") == pytest.approx((passed, product))


def test_what_is_done_to_the_input_gradient_is_said():
    times = Spread(1.0, 1.0, 1.0)
    names = ("default", "default, sampled dX", "default, projected dX", "topk")
    table = definitions([Method(name, "ours", name, times, times, 0) for name in names])
    exact, sampled, projected, topk = ([cell.text for cell in row] for row in table.rows)
    assert [row[1] for row in (exact, sampled, projected, topk)] == ["yes", "yes", "no", "no"]
    assert sampled[2] == f"{exact[2]} The input gradient comes from K rows too."
    assert projected[2].startswith(f"{exact[2]} The input gradient's rows lie in a subspace")


@pytest.mark.parametrize(
    ("role", "name", "key"),
    [
        ("ours", "topk-residual", "topk-residual"),
        ("ours", "default, sampled dX", "default"),
        ("ours", "topkish", None),
        ("ours", "vcas", None),
        ("baseline", "vcas", "vcas"),
        ("baseline", "topk-crs", "topk-crs"),
        ("baseline", "topk", None),
        ("limit", "topk", None),
    ],
)
def test_what_a_name_stands_for(role, name, key):
    times = Spread(1.0, 1.0, 1.0)
    assert base_name(Method(name, role, name, times, times, 0)) == key
