"""The page and the Markdown as files: well formed, self-contained, escaped, the same."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

from tests.bench.report import made
from tests.bench.report.made import markdown_tables


class Balanced(HTMLParser):
    """Fails at a tag that closes another than the last that was opened."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())


def test_page_is_well_formed_and_asks_for_nothing(full):
    page = full.html.read_text("utf-8")
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    # One link, to the paper; nothing is loaded from anywhere.
    assert re.findall(r'[a-z]+="(https?:[^"]*)"', page) == ["https://arxiv.org/abs/2110.09164"]
    assert page.count("http") == 1
    assert not re.search(r"<(script|link|img|iframe)|@import|url\(", page)


def test_every_picture_is_valid_xml_with_a_name(full):
    pictures = re.findall(r"<svg.*?</svg>", full.html.read_text("utf-8"), flags=re.DOTALL)
    assert len(pictures) > 15
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        width, height = (float(one) for one in root.get("viewBox").split()[2:])
        assert root.get("role") == "img"
        assert root.get("aria-label") == root.find("title").text
        for element in root.iter():
            for name in ("x", "x1", "x2", "cx"):
                assert -1 <= float(element.get(name, 0)) <= width + 1, (element.tag, element.attrib)
            for name in ("y", "y1", "y2", "cy"):
                assert -1 <= float(element.get(name, 0)) <= height + 1
            assert "nan" not in element.get("d", "") + element.get("points", "")


def test_links_of_the_contents_lead_to_sections(full):
    page = full.html.read_text("utf-8")
    assert re.findall(r'href="#([\w-]+)"', page) == re.findall(r'<section id="([\w-]+)"', page)


def test_markdown_tables_have_equal_columns(full):
    tables = markdown_tables(full.markdown.read_text("utf-8"))
    assert len(tables) > 8
    for table in tables:
        assert len({len(row) for row in table}) == 1, table[0]


def test_page_and_markdown_have_the_same_tables(full):
    html = re.findall(r"<tbody>(.*?)</tbody>", full.html.read_text("utf-8"), flags=re.DOTALL)
    in_html = [len(re.findall("<tr>", body)) for body in html]
    # The first of Markdown's is the list of facts.
    in_markdown = [len(table) - 2 for table in markdown_tables(full.markdown.read_text("utf-8"))]
    assert in_html == in_markdown[1:]


def test_what_comes_from_the_file_is_escaped(written):
    evil = "<script>alert(1)</script> | [x](http://example.org) & `co"
    case = made.weight_grad("dw", 512, 64, 64, 1 / 8)
    layer = made.step("layer 1", 10.0, {"default": 1.3}, {}) | {"title": evil}
    case["methods"]["crs"]["note"] = evil
    case["methods"][evil] = case["methods"]["vcas"] | {"label": evil}
    page, markdown = written([case, layer], made.machine(name=evil))
    for content in (page, markdown):
        assert "<script" not in content
        assert "alert(1)" in content
    assert not re.search(r"(?<!\\)\]\(http", markdown)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    for table in markdown_tables(markdown):
        assert len({len(row) for row in table}) == 1, table[0]
