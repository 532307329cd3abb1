import pytest

from tests.auto.training import Training


@pytest.fixture
def training(monkeypatch):
    def make(*args, **kwargs):
        return Training(monkeypatch, *args, **kwargs)

    return make
