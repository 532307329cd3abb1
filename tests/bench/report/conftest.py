import json

import pytest

from memaop_triton.bench.report import write
from tests.bench.report import made


@pytest.fixture
def saved(tmp_path):
    """The path of a file with these cases, on the usual machine unless told otherwise."""

    def save(cases, machine=made.MACHINE):
        path = tmp_path / "results.json"
        path.write_text(json.dumps(made.results(cases, machine)), encoding="utf-8")
        return path

    return save


@pytest.fixture
def written(saved, tmp_path):
    """HTML and Markdown of a report on these cases, with plain spaces."""

    def write_report(cases, *args):
        paths = write(saved(cases, *args), tmp_path / "out")
        return [path.read_text("utf-8").replace("\N{NO-BREAK SPACE}", " ") for path in paths]

    return write_report
