"""The section on what training steps hold."""

import re

import pytest

from memaop_triton.bench.report.data import load
from memaop_triton.bench.report.memory import AVAILABLE_BYTES, largest_batch, samples_per_second
from tests.bench.report import made

MIB = 1 << 20


def case(**changes):
    """A case with a stash that is slower than dense, and a baseline that holds less."""
    found = made.step("a net", {"int4": 0.8}) | {"kind": "memory", "samples": 8, "small_samples": 2}
    found["methods"]["checkpoint"] = made.method("checkpoint", "baseline", 100.0)
    for name, held in {"dense": 100, "int4": 75, "checkpoint": 10}.items():
        found["methods"][name] |= {
            "saved_bytes": held * MIB,
            "resident_bytes": 40 * MIB,
            "peak_bytes": (20 + 8 * held) * MIB,
            "batch_bytes": (20 + 8 * held) * MIB,
            "small_batch_bytes": (20 + 2 * held) * MIB,
            "small_ms": 35.0,
        }
        found["methods"][name] |= changes
    return found


def test_the_largest_batch_is_that_which_fits(saved):
    (found,) = load(saved([case()])).cases
    for name, held in {"dense": 100, "int4": 75, "checkpoint": 10}.items():
        batch = largest_batch(found, found.methods[name])
        assert (40 + 20 + batch * held) * MIB <= AVAILABLE_BYTES
        assert (40 + 20 + (batch + 1) * held) * MIB > AVAILABLE_BYTES
    assert largest_batch(found, found.dense, 50 * MIB) == 0
    (found,) = load(saved([case(small_batch_bytes=900 * MIB)])).cases
    assert largest_batch(found, found.dense) is None


@pytest.mark.parametrize(
    ("small_ms", "rate"), [(35.0, 160e3 / (20 + 160 * 7.5)), (5.0, 100.0), (90.0, 2000.0)]
)
def test_samples_a_second_of_a_large_batch(saved, small_ms, rate):
    """80 ms for 8: a fixed part of 20 and 7.5 a sample; with no fixed part; with nothing else."""
    (found,) = load(saved([case(small_ms=small_ms)])).cases
    assert samples_per_second(found, found.dense, 160) == pytest.approx(rate)


def test_the_page_has_one_table_and_says_where_ours_is_behind(written):
    page, markdown = written([case()])
    lines = [line.split(" | ") for line in markdown.splitlines() if line.startswith("| a net")]
    assert [line[1] for line in lines] == ["dense", "int4", "checkpoint"]
    dense, ours, other = lines
    assert dense[2:6] == ["100 MiB", "820 MiB", "80.0 ms", "–"]
    assert ours[2:4] == ["75.0 MiB (75 %)", "620 MiB (76 %)"]
    assert ours[5] == "0.80× (0.78–0.82)"
    assert other[2:4] == ["**10.0 MiB** (10 %)", "**100 MiB** (12 %)"]
    assert [line[6] for line in lines] == ["163", "217", "1,632"]
    assert (
        "- a net: `int4` has 0.80× of dense's speed, a larger graph than `checkpoint`, "
        "a larger peak than `checkpoint`."
    ) in markdown
    assert "memaop-triton bench --suite memory" in markdown
    assert "Not measured" not in markdown
    assert "limit" not in markdown
    assert re.search("<td[^>]*>75.0 MiB<small>75 %</small>", page)


def test_a_stash_that_holds_more_than_dense(written):
    worse = case()
    worse["methods"]["int4"]["saved_bytes"] = 101 * MIB
    worse["methods"]["int4"]["speedup"] = made.spread(1.2)
    _, markdown = written([worse])
    assert "`int4` has a larger graph than dense, a larger peak than `checkpoint`." in markdown


def test_beside_other_cases_the_section_is_one_of_many(written):
    _, markdown = written([made.weight_grad("dw", 512, 64, 64, 1 / 8), case()])
    assert "## One weight gradient" in markdown
    assert "## What a training step holds" in markdown
    assert "below a wanted" not in markdown
    assert "a net" not in markdown[: markdown.index("## What a training step holds")]
    _, without = written([made.weight_grad("dw", 512, 64, 64, 1 / 8)])
    assert "holds" not in without[without.index("Not measured") :].splitlines()[0]
