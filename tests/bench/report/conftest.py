from pathlib import Path

import pytest

from memaop_triton.bench.report import write
from tests.bench.report import made

RESULTS = Path(__file__).parents[3] / "bench" / "results" / "cpu-2core.json"


@pytest.fixture
def saved(tmp_path):
    """The path of a file with these cases, on the usual machine unless told otherwise."""

    def save(cases, machine=None, *, with_machine=True, name="cpu"):
        record = (machine or made.machine()) if with_machine else None
        return made.save(tmp_path / f"{name}.json", made.results(cases, record))

    return save


@pytest.fixture
def written(saved, tmp_path):
    """HTML and Markdown of a report on these cases."""

    def write_report(cases, *args, **kwargs):
        paths = write(saved(cases, *args, **kwargs), tmp_path / "out")
        return [path.read_text("utf-8") for path in paths]

    return write_report


@pytest.fixture(scope="session")
def full(tmp_path_factory):
    """The committed results, with all kinds of cases, and the two paths of their report."""
    return RESULTS, *write(RESULTS, tmp_path_factory.mktemp("full"))
