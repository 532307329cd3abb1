"""Two runs beside each other."""

import json

import pytest

from memaop_triton.bench.report import ReportError, write
from tests.bench.report import made


def faster(case, factor):
    """The case with the speed-ups of ours multiplied."""
    changed = json.loads(json.dumps(case))
    for one in changed["methods"].values():
        if one["role"] == "ours":
            one["speedup"] = {name: factor * value for name, value in one["speedup"].items()}
    return changed


def compared(saved, tmp_path, new, old, **kwargs):
    new, old = saved(new, name="new"), saved(old, name="old", **kwargs)
    return write(new, tmp_path, name="new", compare=old)


def test_regressions(saved, tmp_path):
    case = made.weight_grad("dw", 4096, 512, 512, 1 / 8)
    report = compared(saved, tmp_path, [faster(case, 0.9)], [case])
    assert len(report.regressions(9)) == len(made.OURS)
    assert report.regressions(11) == []
    assert any("default: " in line and "10.0 % less" in line for line in report.regressions(9))
    assert not compared(saved, tmp_path, [faster(case, 1.2)], [case]).regressions(1)


def test_a_change_within_the_spread_is_no_regression(saved, tmp_path):
    case = made.weight_grad("dw", 4096, 512, 512, 1 / 8)  # quartiles 2 % to both sides
    report = compared(saved, tmp_path, [faster(case, 0.97)], [case])
    assert report.regressions(1) == []
    assert "in the spread" in report.markdown.read_text("utf-8")


def test_changes_are_sorted_and_what_has_no_counterpart_is_named(saved, tmp_path):
    cases = [made.weight_grad("dw", m, 512, 512, 1 / 8) for m in (1024, 2048, 4096)]
    new = [faster(cases[0], 1.1), faster(cases[1], 0.8), cases[2] | {"title": "renamed"}]
    report = compared(saved, tmp_path, new, cases)
    ratios = [change.ratio for change in report.comparison.changes]
    assert ratios == sorted(ratios)
    assert ratios[0] == pytest.approx(0.8)
    assert len(ratios) == 2 * len(made.OURS)
    assert report.comparison.added[0].startswith("renamed: ")
    assert report.comparison.gone[0].startswith("dw 4096x512x512")


def test_times_are_compared_on_the_same_machine_only(saved, tmp_path):
    cases = [made.weight_grad("dw", 1024, 512, 512, 1 / 8)]
    same = compared(saved, tmp_path, cases, cases).markdown.read_text("utf-8")
    assert "time changed by" in same
    other = made.machine(name="Another CPU")
    elsewhere = compared(saved, tmp_path, cases, cases, machine=other).markdown.read_text("utf-8")
    assert "time changed by" not in elsewhere
    assert "speed-ups are compared and times are not" in elsewhere


def test_regressions_need_an_earlier_run(saved, tmp_path):
    report = write(saved([made.weight_grad("dw", 64, 8, 8, 1 / 8)]), tmp_path, name="x")
    with pytest.raises(ReportError, match="earlier run"):
        report.regressions(5)
