"""The page and the Markdown as files: well formed, self-contained, escaped, the same."""

import re
from html.parser import HTMLParser

from memaop_triton.bench.report import write
from tests.bench.report import made
from tests.bench.report.made import markdown_tables


class Page(HTMLParser):
    """Fails at a tag that closes another than the last that was opened; collects attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def values(self, name, tag=None):
        return [v for t, n, v in self.attributes if n == name and tag in (None, t)]


def test_page_is_well_formed_and_asks_for_nothing(full):
    text = full[1].read_text("utf-8")
    page = Page(text)
    # One link, to the paper; nothing is loaded from anywhere.
    outside = [link for link in page.values("href") if not link.startswith("#")]
    assert outside == ["https://arxiv.org/abs/2110.09164"]
    assert text.count("http") == 1
    assert not page.values("src")
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", text)
    ids = page.values("id")
    assert len(set(ids)) == len(ids)
    inner = set(page.values("href")) - set(outside) | set(re.findall(r"url\((#\w+)\)", text))
    assert inner <= {f"#{name}" for name in ids}


def test_every_section_and_chart_is_there(full):
    page = Page(full[1].read_text("utf-8"))
    sections = page.values("id", "section")
    assert sections == [
        "losses", "weight-gradient", "roofline", "ratio", "width", "break-even", "rows", "steps",
        "kernels", "overhead", "method",
    ]  # fmt: skip
    assert [link[1:] for link in page.values("href", "a")][:-1] == sections
    assert page.values("aria-label", "svg") == [
        "Roofline, float32", "Roofline, float64", "8192×256×256, float32",
        "8192×1024×1024, float32", "1024×256×256, float32", "1024×1024×1024, float32",
        "M = 4096, r = 1/8, float32", "M = 512, r = 1/8, float32", "default, r = 1/4",
        "default, r = 1/8", "default, r = 1/16", "N = 512, P = 512, r = 1/8, float32",
        "Forward and backward of a layer", "Training step",
    ]  # fmt: skip


def test_the_same_numbers_give_the_same_files(full, tmp_path):
    results, *pages = full
    again = write(results, tmp_path)
    assert [page.read_bytes() for page in again] == [page.read_bytes() for page in pages]


def test_the_committed_page_is_that_of_the_committed_results(full):
    results, _, markdown = full
    assert markdown.read_text("utf-8") == results.with_suffix(".md").read_text("utf-8")


def test_page_and_markdown_have_the_same_tables(full):
    html = re.findall(r"<tbody>(.*?)</tbody>", full[1].read_text("utf-8"), flags=re.DOTALL)
    in_html = [body.count("<tr>") for body in html]
    tables = markdown_tables(full[2].read_text("utf-8"))
    # The first of Markdown's is the list of facts.
    assert in_html == [len(table) - 2 for table in tables[1:]]
    assert len(in_html) > 8
    for table in tables:
        assert len({len(row) for row in table}) == 1, table[0]


def test_what_comes_from_the_file_is_escaped(written):
    evil = "<script>alert(1)</script> | [x](http://example.org) & `co"
    case = made.weight_grad("dw", 512, 64, 64, 1 / 8)
    layer = made.step(evil, {"default": 1.3})
    case["methods"][evil] = case["methods"]["vcas"] | {"label": evil}
    page, markdown = written([case, layer], made.machine(name=evil))
    for content in (page, markdown):
        assert "<script" not in content
        assert "alert(1)" in content
    assert not re.search(r"(?<!\\)\]\(http", markdown)
    Page(page)
    for table in markdown_tables(markdown):
        assert len({len(row) for row in table}) == 1, table[0]
