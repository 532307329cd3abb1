import pytest

from memaop_triton.bench.report import write
from tests.bench.report import made


@pytest.fixture
def saved(tmp_path):
    """The path of a file with these cases, on the usual machine unless told otherwise."""

    def save(cases, machine=None, name="cpu", *, with_machine=True):
        record = (machine or made.machine()) if with_machine else None
        return made.save(tmp_path / f"{name}.json", made.results(cases, record))

    return save


@pytest.fixture
def written(saved, tmp_path):
    """HTML and Markdown of a report on these cases."""

    def write_report(cases, *args, **kwargs):
        report = write(saved(cases, *args, **kwargs), tmp_path / "out", name="cpu")
        return report.html.read_text("utf-8"), report.markdown.read_text("utf-8")

    return write_report


@pytest.fixture(scope="session")
def full(tmp_path_factory):
    """A report on all kinds of cases, beside an earlier run."""
    folder = tmp_path_factory.mktemp("full")
    new = made.save(folder / "cpu.json", made.results(made.every_case(), made.machine()))
    old = made.save(folder / "old.json", made.results(made.every_case(seed=5), made.machine()))
    return write(new, folder, name="cpu", compare=old)
