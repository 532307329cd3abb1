"""Calls where ours does not win are reported, with the reason."""

import pytest

from memaop_triton.bench.report.data import load
from memaop_triton.bench.report.findings import findings
from tests.bench.report import made


def misses(path):
    return {
        one.claim.replace("\N{NO-BREAK SPACE}", " "): one.misses for one in findings(load(path))
    }


@pytest.fixture
def winning():
    """A case in which ours beats everything."""
    case = made.weight_grad("dw", 8192, 1024, 1024, 1 / 8)
    return case | {"wanted": {"priority": 7.0}}


def test_nothing_is_lost_where_nothing_is(saved, written, winning):
    assert not any(misses(saved([winning])).values())
    page, markdown = written([winning])
    assert "Where it wins" in page
    assert "Where it does not win" not in page
    assert "Every call is faster than every baseline." in markdown


@pytest.mark.parametrize(
    ("name", "role", "ms", "claim", "what"),
    [
        ("priority", "ours", 100.0, "slower than dense", "0.80×"),
        ("vcas", "baseline", 10.2, "slower than a baseline", "7.62×"),
        ("limit", "limit", 9.0, "below 90 % of the limit", "86 %"),
    ],
)
def test_losers_are_named(saved, written, winning, name, role, ms, claim, what):
    winning["methods"][name] = made.method(name, role, ms)
    loser = "priority" if role == "ours" else "topk"
    miss = next(one for one in misses(saved([winning]))[claim] if one.method == loser)
    assert miss.what.replace("\N{NO-BREAK SPACE}", " ") == what
    _, markdown = written([winning])
    assert "\n- 8192×1024×1024, r = 1/8: `" in markdown
    assert markdown.index(f"`{loser}` {what}") < markdown.index("## One weight gradient")


def test_a_wanted_speedup_that_is_missed_says_what_could_be_reached(written, winning):
    winning["wanted"] = {"priority": 9.0}
    speeds = {"default": 1.2, "default, sampled dX": 1.5}
    step = made.step("MLP", speeds, {"default": 1.3, "default, sampled dX": 1.9})
    _, markdown = written([winning, step])
    assert "`priority` 8.00×, wanted 9.00× – the limit measured in this run is 8.08×" in markdown
    # A third of the FLOPs to 1/8, or two thirds.
    reached = "by FLOPs alone, linear layers could reach"
    assert f"`default` 1.20×, wanted 1.30× – {reached} 1.41×" in markdown
    assert f"wanted 1.90× – {reached} 2.40×" in markdown


def test_a_baseline_counts_as_timed_beside_the_call(saved, winning):
    """In another case of the same shape it may have been faster or slower, by the machine."""
    other = made.weight_grad("dw", 8192, 1024, 1024, 1 / 8) | {"title": "subspace"}
    other["methods"] = {n: other["methods"][n] for n in ("dense", "default", "vcas")}
    del winning["methods"]["default"]
    winning["methods"]["vcas"] = made.method("vcas", "baseline", 11.0)
    other["methods"]["vcas"] = made.method("vcas", "baseline", 10.7)
    (miss,) = misses(saved([winning, other]))["slower than a baseline"]
    assert miss.method == "default"
    assert "vcas, 7.48×" in miss.beside


def test_work_that_the_baseline_does_too_is_no_excuse(saved, winning):
    winning["methods"]["topk-residual"] = made.method("topk-residual", "ours", 14.0)
    (miss,) = misses(saved([winning]))["slower than a baseline"]
    assert (miss.method, miss.why.more_work) == ("topk-residual", True)
    winning["methods"]["authors"] = made.method("authors", "baseline", 11.0)
    (miss,) = misses(saved([winning]))["slower than a baseline"]
    assert "authors, 7.27×" in miss.beside
    assert (miss.why.more_work, miss.why.cause) == (False, "memory")


def test_overhead_and_growth_are_checked(saved):
    slow = made.weight_grad("overhead", 64, 64, 64, 1 / 8)
    slow["methods"]["topk"]["ms"] = made.DENSE + 0.101
    sweep = [made.weight_grad("sweep_rows", 2**i, 64, 64, 1 / 8) for i in range(10, 16)]
    for case in sweep:
        for name, one in case["methods"].items():
            one["ms"] = 1e-3 * case["m"] ** (1.2 if name == "priority" else 1)
    found = misses(saved([slow, *sweep]))
    assert [one.method for one in found["an overhead above 100 µs"]] == ["topk"]
    (growing,) = found["a time that grows faster than M"]
    assert (growing.method, growing.what) == ("priority", "M^1.20")
