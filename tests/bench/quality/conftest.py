import pytest

from memaop_triton.bench.studies.quality import data
from memaop_triton.bench.studies.quality.store import Store
from memaop_triton.bench.studies.quality.tasks import TASKS
from tests.bench.quality import tiny


@pytest.fixture
def task():
    """The tiny task, as the only one there is; afterwards the others are in their order again."""
    before = dict(TASKS)
    TASKS.clear()
    TASKS["tiny"] = tiny.TASK
    yield tiny.TASK
    TASKS.clear()
    TASKS.update(before)


@pytest.fixture
def store(task, tmp_path):
    return Store(tmp_path / "quality")


@pytest.fixture(scope="session")
def source():
    """The data of the tiny task."""
    return data.load(tiny.TASK, None)
