"""The page and the Markdown as files: what they need, what they lack, what they escape."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from memaop_triton.bench.report import write
from memaop_triton.bench.report.data import ReportError, load
from tests.bench.report import made
from tests.judging import figures

RESULTS = Path(__file__).parents[3] / "bench" / "results" / "cpu-2core.json"


def elements_of(page):
    """All elements of a page; fails where it is not well formed."""
    text = re.sub(r"<(meta[^>]*|br)>", r"<\1/>", page.removeprefix("<!doctype html>"))
    return list(ElementTree.fromstring(text).iter())


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """HTML and Markdown of the committed results, with all kinds of cases."""
    return write(RESULTS, tmp_path_factory.mktemp("full"))


def test_page_is_well_formed_and_asks_for_nothing(full):
    text = full[0].read_text("utf-8")
    elements = elements_of(text)
    links = [one.get("href") for one in elements if one.get("href")]
    # One link, to the paper; nothing is loaded from anywhere.
    outside = [link for link in links if not link.startswith("#")]
    assert outside == ["https://arxiv.org/abs/2110.09164"]
    assert text.count("http") == 1
    assert not re.search(r"<(script|link|img|iframe)|\bsrc=|@import|url\((?!#)", text)
    ids = [one.get("id") for one in elements if one.get("id")]
    assert len(set(ids)) == len(ids)
    inner = set(links) - set(outside) | set(re.findall(r"url\((#\w+)\)", text))
    sections = {f"#{one.get('id')}" for one in elements if one.tag == "section"}
    assert sections <= inner <= {f"#{name}" for name in ids}
    assert len(sections) == 11
    assert [one.tag for one in elements].count("svg") == 14


def test_the_committed_page_is_that_of_the_committed_results(full, tmp_path):
    page, markdown = full
    committed = RESULTS.with_suffix(".md").read_text("utf-8")
    assert figures(markdown.read_text("utf-8")) == figures(committed)
    assert write(RESULTS, tmp_path)[0].read_bytes() == page.read_bytes()
    # The page has the same tables, of as many rows; Markdown's first is the list of facts.
    bodies = re.findall(r"<tbody>(.*?)</tbody>", page.read_text("utf-8"), flags=re.DOTALL)
    tables = re.findall(r"(?:^\|.*\n)+", markdown.read_text("utf-8"), flags=re.MULTILINE)
    rows = [table.count("\n") - 2 for table in tables]
    assert [body.count("<tr>") for body in bodies] == rows[1:]


def test_what_comes_from_the_file_is_escaped(written):
    evil = "<script>alert(1)</script> | [x](http://example.org) & `co"
    case = made.weight_grad("dw", 512, 64, 64, 1 / 8)
    case["methods"][evil] = case["methods"]["vcas"] | {"label": evil}
    layer = made.step(evil, {"default": 1.3})
    page, markdown = written([case, layer], made.MACHINE | {"name": evil})
    for content in (page, markdown):
        assert "<script" not in content
        assert "alert(1)" in content
    assert not re.search(r"(?<!\\)\]\(http", markdown)
    assert r"/script&gt; \| \[x\]" in markdown
    elements_of(page)


@pytest.mark.parametrize("kind", ["dw", "sweep_rows", "sweep_ratio", "sweep_width", "overhead"])
def test_a_single_case_of_any_kind_without_a_machine_and_a_commit(written, kind):
    case = made.weight_grad(kind, 512, 64, 64, 1 / 8)
    del case["methods"]["limit"]
    case["methods"]["topk"] = made.method("topk", "ours", 100.0)
    page, markdown = written([case], None)
    assert "an unnamed machine" in page
    assert "\n- 512×64×64, r = 1/8: `topk` 0.80×" in markdown
    assert "Roofline, float32" not in page
    assert "| commit |" not in markdown
    (line,) = re.findall("^Not measured in this run: (.*)$", markdown, re.M)
    assert {"What the machine allows", "Kernels"} <= set(line.rstrip(".").split(", "))
    assert not re.search(r"\bnan\b", markdown.lower())


def test_gpu_results(written):
    case = made.weight_grad("dw", 16384, 4096, 4096, 1 / 8)
    case |= {"device": "cuda", "dtype": "bfloat16", "block_rows": 64}
    case["methods"]["triton-plain"] = made.method("triton-plain", "baseline", 30)
    rates = {"gemm_gflops": {"bfloat16": 7e5}, "stream_gbs": 3e3, "triad_gbs": 2.8e3}
    page, markdown = written([case], made.MACHINE | rates | {"clocks": "1980 MHz"})
    assert "Roofline, bfloat16" in page
    for said in (
        "bfloat16, blocks of 64",
        "memaop-triton bench --suite gpu",
        "triton-plain",
        "| memory | 3.00 TB/s read, 2.80 TB/s update |",
        "| commit | eaf524b0f0 |",
        "1980 MHz",
    ):
        assert said in markdown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "not what the benchmarks write.*line 1"),
        ("[]", "not what the benchmarks write"),
        ('{"benchmarks": [{"extra_info": {"kind": "dw"}}]}', "methods"),
        ('{"benchmarks": [{"extra_info": {"kind": "dw", "methods": {}}}]}', "title"),
        (
            '{"benchmarks": [], "datetime": "", "commit_info": {"id": "unversioned"}}',
            "no benchmark with results",
        ),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ReportError, match=rf"x\.json .*{message}"):
        load(path)
