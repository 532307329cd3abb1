"""Tables and headlines show the numbers of the file."""

import pytest

from memaop_triton.bench.report import text
from memaop_triton.bench.report.data import load
from memaop_triton.bench.report.methods import traffic
from tests.bench.report import made


def test_values_of_the_tables_are_those_of_the_file(written):
    case = made.weight_grad("dw", 8192, 1024, 512, 1 / 16)
    page, markdown = written([case])
    assert (
        "| 8192×1024×512 | 1/16 | 80.0 ms | 7.41× (7.26–7.56) | **8.00×** (7.84–8.16) |"
        " 7.62× (7.47–7.77) | 7.34× (7.19–7.49) | 0.50× (0.49–0.51) | 4.00× (3.92–4.08) |"
        " 6.67× (6.53–6.80) |"
    ) in markdown
    assert "| 92 % (9.90 ms / 10.8 ms) | 99 % (9.90 ms / 10.0 ms) |" in markdown
    assert '<p class="number">7.41×</p>' in page
    assert "Cold caches" not in markdown
    case["methods"]["topk"]["cold"] = {"ms": 1.0, "q1": 1.0, "q3": 1.0, "speedup": made.spread(2.5)}
    assert "| 8192×1024×512 | 1/16 | – | – | 2.50× (2.45–2.55) | – |" in written([case])[1]


def test_methods_of_one_shape_share_a_row_each_with_the_limit_timed_beside_it(written):
    cases = []
    for name, limit in (("default", 2.7), ("priority", 5.0)):
        case = made.weight_grad("dw", 4096, 512, 512, 1 / 8) | {"title": name}
        case["methods"] = {n: case["methods"][n] for n in ("dense", name, "vcas")}
        case["methods"]["limit"] = made.method("limit", "limit", limit)
        cases.append(case)
    _, markdown = written(cases)
    assert "| M × N × P | r | dense | default | priority | vcas |" in markdown
    assert markdown.count("| 4096×512×512 | 1/8 | 80.0 ms |") == 1
    assert "| 25 % (2.70 ms / 10.8 ms) | 50 % (5.00 ms / 10.0 ms) |" in markdown


def test_overhead_is_what_is_beyond_dense(written):
    case = made.weight_grad("overhead", 64, 64, 64, 1 / 8)
    case["methods"]["dense"]["ms"], case["methods"]["topk"]["ms"] = 0.01, 0.0525
    page, markdown = written([case])
    assert "| topk | 52.5 µs | 42.5 µs |" in markdown
    assert "| dense | 10.0 µs | – |" in markdown
    assert "overhead of a call" in page


def test_headline_is_computed(written):
    cases = [made.weight_grad("dw", m, 512, 512, r) for m in (1024, 4096) for r in (1 / 8, 1 / 16)]
    for case, speed in zip(cases, (2.0, 50.0, 8.0, 60.0), strict=True):
        case["methods"]["default"]["speedup"] = made.spread(speed)
    # Another dtype is not part of the mean.
    other = made.weight_grad("dw", 2048, 512, 512, 1 / 8) | {"dtype": "bfloat16"}
    page, markdown = written([*cases, other])
    assert '<p class="number">4.00×</p>' in page
    assert "`default` at r = 1/8, against dense; geometric mean of 2 cases, 2.00× to 8.00×" in (
        markdown
    )
    # Where no call is at 1/8, the most frequent ratio.
    cases = [made.weight_grad("dw", m, 64, 64, r) for m, r in ((8, 1 / 4), (16, 1 / 2), (8, 1 / 2))]
    assert "(`default` at r = 1/2, against dense" in written(cases)[1]


def test_traffic_counts_what_the_design_counts(saved):
    run = load(saved([made.weight_grad("dw", 4096, 1024, 512, 1 / 8)]))
    case, unit = run.cases[0], 4096 * (1024 + 512) * 4
    flops = 2 * 512 * 1024 * 512
    expected = {
        "dense": (2 * 4096 * 1024 * 512, 0, unit, made.READ_GBS),
        "priority": (flops, unit, unit / 8, made.READ_GBS),
        "topk-residual": (flops, 3 * unit, unit / 8, made.UPDATE_GBS),
        "default": (flops + 2 * 4096 * 16 * 1536, 1.5 * unit, unit / 8, made.READ_GBS),
    }
    for name, (flops, passed, moved, bandwidth) in expected.items():
        cost = traffic(case, case.methods[name])
        assert (cost.flops, cost.pass_bytes, cost.gemm_bytes) == (flops, passed, moved)
        times = passed / bandwidth / 1e6, flops / made.GFLOPS / 1e6
        assert cost.milliseconds(run.machine, "float32") == pytest.approx(times)
    assert traffic(case, case.methods["vcas"]) is None


def test_numbers_as_text():
    shown = {
        text.times(0.0456): "0.046×",
        text.times(9.994): "9.99×",
        text.times(9.996): "10.0×",
        text.duration(0.996): "996 µs",
        text.duration(-0.002): "-2.00 µs",
        text.rate(2950.0, "B"): "2.95 TB/s",
        text.ratio(1.0): "1",
        text.count(1, "call"): "1 call",
    }
    assert [one.replace("\N{NO-BREAK SPACE}", " ") for one in shown] == list(shown.values())
