"""The documents name tests, files, messages and versions that exist."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import memaop_triton

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = document.read_text()
    for target in (
        *re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text),
        *re.findall(r'src="(?!https?:)([^"]+)"', text),
    ):
        assert (document.parent / target).exists(), target


def test_every_line_about_pytorch_names_tests_that_exist():
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    lines = (ROOT / "docs" / "pytorch.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")][2:]
    assert len(table) > 30
    for line in table:
        shown_by = line.split("|")[3]
        file = ""
        names = re.findall(r"`([^`]+)`", shown_by)
        assert names, line
        for name in names:
            path, _, function = name.rpartition("::")
            if name.endswith(".py"):
                path, function = name, ""
            file = Path(path).name if path else file
            assert file in sources, line
            assert not function or f"def {function}(" in sources[file], name


def modules():
    """The syntax trees of the package's files."""
    for folder in ("memaop_triton", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            yield ast.parse(path.read_text())


def calls():
    """Every call in them."""
    for tree in modules():
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def template(node):
    """A string of the source with "…" for what is filled in, None for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join("…" if template(part) is None else part.value for part in node.values)
    is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value if is_string else None


def quotes():
    """The messages that the page quotes."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^```text\n(.*?)\n```$", page, re.DOTALL | re.MULTILINE)


def test_every_message_that_is_quoted_is_one_of_the_library():
    texts = {template(node) for tree in modules() for node in ast.walk(tree)} - {None}
    assert len(quotes()) > 50
    for quote in quotes():
        assert any(quote in text for text in texts), quote


def test_every_warning_has_an_entry():
    warned = [
        text
        for call in calls()
        if ast.unparse(call.func) in ("warnings.warn", "_warn_once")
        for text in map(template, call.args)
        if text is not None
    ]
    assert len(warned) > 5
    for text in warned:
        assert text in quotes(), text


def test_the_changelog_has_an_entry_for_the_version_that_release_notes_are_made_of():
    changes = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\](.*)$", changes, re.MULTILINE)
    assert [name for name, _ in versions][:2] == ["Unreleased", VERSION]
    dates = dict(versions)
    assert re.fullmatch(r" - (unreleased|\d{4}-\d\d-\d\d)", dates[VERSION])
    notes = subprocess.run(
        ["make", "--silent", "notes"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert len(notes) > 500
    assert notes in changes
    assert not re.search(r"^## ", notes, re.MULTILINE)
    assert "### Added" in notes
    other = ["make", "--silent", "notes", "VERSION=9.9.9"]
    assert subprocess.run(other, cwd=ROOT, capture_output=True, check=False).returncode


def test_the_citation_has_what_the_format_requires():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert citation["title"].startswith("memaop-triton")
    assert citation["authors"] == [{"name": "memaop-triton contributors"}]
    assert citation["version"] == VERSION == memaop_triton.__version__
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert "2110.09164" in paper["url"]
    assert {"type", "title", "authors"} <= paper.keys()


def test_what_the_security_page_says_of_saved_states_is_so():
    page = (ROOT / "SECURITY.md").read_text()
    assert "## Reporting" in page
    assert "calls no unpickler itself" in page
    called = {ast.unparse(call.func) for call in calls()}
    assert called.isdisjoint({"torch.load", "pickle.load", "pickle.loads"})
