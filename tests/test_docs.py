"""The documents name tests and files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
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
