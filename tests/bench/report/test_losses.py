"""Where ours does not win is said, with the reason."""

import pytest

from memaop_triton.bench.report.data import load
from memaop_triton.bench.report.findings import findings
from tests.bench.report import made


def misses(path):
    return {one.claim: one.misses for one in findings(load(path))}


@pytest.fixture
def winning():
    """A case in which ours beats everything."""
    case = made.weight_grad("dw", 8192, 1024, 1024, 1 / 8)
    case["methods"] = {
        "dense": made.method("dense", "dense", 80.0, 80.0),
        "priority": made.method("priority", "ours", 10.0, 80.0),
        "limit": made.method("limit", "limit", 9.5, 80.0),
        "vcas": made.method("vcas", "baseline", 12.0, 80.0),
    }
    return case | {"wanted": {"priority": 7.0}}


def test_nothing_is_lost_where_nothing_is(saved, written, winning):
    assert not any(misses(saved([winning])).values())
    page, markdown = written([winning])
    assert "Where it wins" in page
    assert "Where it does not win" not in page
    assert "Every call is faster than every baseline." in markdown


@pytest.mark.parametrize(
    ("change", "claim", "what"),
    [
        ({"priority": ("ours", 100.0)}, "slower than dense", "0.80×"),
        ({"vcas": ("baseline", 8.0)}, "slower than a baseline", "8.00×"),
        ({"limit": ("limit", 8.9)}, "below 90\N{NO-BREAK SPACE}% of the limit", "89"),
    ],
)
def test_losers_are_named(saved, written, winning, change, claim, what):
    for name, (role, ms) in change.items():
        winning["methods"][name] = made.method(name, role, ms, 80.0)
    (miss,) = misses(saved([winning]))[claim]
    assert (miss.method, miss.where) == ("priority", "8192×1024×1024, r = 1/8")
    assert miss.what.startswith(what)
    _, markdown = written([winning])
    line = next(one for one in markdown.splitlines() if f"`priority` {what}" in one)
    assert line.startswith("- 8192×1024×1024, r = 1/8")
    assert markdown.index(line) < markdown.index("## One weight gradient")


def test_a_wanted_speedup_that_is_missed_says_what_the_limit_allows(written, winning):
    winning["wanted"] = {"priority": 9.0}
    _, markdown = written([winning])
    assert "`priority` 8.00×, wanted 9.00× – the limit measured in this run is 8.42×" in markdown


def test_one_line_per_place_with_the_worst_of_each_method(written, winning):
    """A call that was timed in two sweeps is listed once; what another cause holds, apart."""
    slow = {
        name: made.method(name, "ours", ms, 80.0)
        for name, ms in (("priority", 200.0), ("topk", 400.0))
    }
    winning["methods"] |= slow
    again = winning | {"kind": "sweep_ratio", "methods": winning["methods"] | {
        "priority": made.method("priority", "ours", 160.0, 80.0),
        "topk-residual": made.method("topk-residual", "ours", 81.0, 80.0),
    }}  # fmt: skip
    _, markdown = written([winning, again])
    listed = markdown.split("slower than dense")[1].split("###")[0]
    lines = [line for line in listed.splitlines() if line.startswith("- ")]
    assert [line.partition(" – ")[0] for line in lines] == [
        "- 8192×1024×1024, r = 1/8: `topk` 0.20×, `priority` 0.40×",
        "- 8192×1024×1024, r = 1/8: `topk-residual` 0.99× (quartiles reach 1)",
    ]


def test_reasons(saved):
    kinds = [("overhead", 64, 64), ("sweep_width", 4096, 64), ("dw", 8192, 1024)]
    found = misses(saved([made.weight_grad(kind, m, n, n, 1 / 8) for kind, m, n in kinds]))
    small = [one for one in found["slower than dense"] if one.where.startswith("64×64×64")]
    assert {one.why.cause for one in small} == {"small"}
    narrow = [one for one in found["slower than dense"] if one.where.startswith("4096×64×64")]
    assert {one.why.cause for one in narrow} == {"memory"}
    # What also updates a memory is not excused beside a baseline that does so too.
    beside = found["slower than a baseline"]
    assert {one.method for one in beside if "row memory" in one.why.text} == {
        "topk-residual", "topk-signed",
    }  # fmt: skip
    order = [one.why.more_work for one in beside]
    assert order == sorted(order)
    # Nor is it what takes the time of a call that is over before it has begun.
    tiny = {one.why.cause for one in beside if one.where.startswith("64×64×64")}
    assert tiny == {"small"}


def test_a_baseline_counts_as_timed_beside_the_call(saved, winning):
    """In another case of the same shape it may have been faster or slower, by the machine."""
    beside = {"default": made.method("default", "ours", 11.0, 80.0)}
    methods = {"dense": winning["methods"]["dense"], "vcas": winning["methods"]["vcas"] | {}}
    other = winning | {"title": "subspace", "methods": methods | beside, "wanted": {}}
    assert not misses(saved([winning, other]))["slower than a baseline"]
    other["methods"]["vcas"] = made.method("vcas", "baseline", 10.5, 80.0)
    (miss,) = misses(saved([winning, other]))["slower than a baseline"]
    assert miss.method == "default"
    assert "vcas, 7.62×" in miss.beside


def test_work_that_the_baseline_does_too_is_no_excuse(saved, winning):
    winning["methods"]["topk-residual"] = made.method("topk-residual", "ours", 14.0, 80.0)
    (miss,) = misses(saved([winning]))["slower than a baseline"]
    assert (miss.method, miss.why.more_work) == ("topk-residual", True)
    winning["methods"]["authors"] = made.method("authors", "baseline", 11.0, 80.0)
    (miss,) = misses(saved([winning]))["slower than a baseline"]
    assert "authors, 7.27×" in miss.beside
    assert not miss.why.more_work
    assert miss.why.cause == "memory"


def test_overhead_and_growth_are_checked(saved):
    slow = made.weight_grad("overhead", 64, 64, 64, 1 / 8)
    slow["methods"]["topk"]["ms"] = slow["methods"]["dense"]["ms"] + 0.101
    sweep = [made.weight_grad("sweep_rows", 2**i, 64, 64, 1 / 8) for i in range(10, 16)]
    for case in sweep:
        case["methods"]["priority"]["ms"] = 1e-3 * case["m"] ** 1.2
    found = misses(saved([slow, *sweep]))
    assert [one.method for one in found["an overhead above 100\N{NO-BREAK SPACE}µs"]] == ["topk"]
    (growing,) = found["a time that grows faster than M"]
    assert (growing.method, growing.what) == ("priority", "M^1.20")


def test_a_step_can_reach_what_its_flops_allow(written):
    case = made.step(
        "MLP",
        {"default": 1.2, "default, sampled dX": 1.5},
        {"default": 1.3, "default, sampled dX": 1.9},
    )
    _, markdown = written([case])
    # A third of the FLOPs to 1/8, or two thirds.
    assert (
        "`default` 1.20×, wanted 1.30× – by FLOPs alone, linear layers could reach 1.41×"
        in markdown
    )
    assert "wanted 1.90× – by FLOPs alone, linear layers could reach 2.40×" in markdown
