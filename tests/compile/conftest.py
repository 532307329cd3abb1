import pytest

from bench.microscope.building import Builder


@pytest.fixture(scope="session")
def builder(request):
    """Compiles in the background what the tests that were collected will ask for.

    They stand in one file: where files run in several processes, each with a second file that asks
    for kernels would compile all of them again.
    """
    with Builder() as builder:
        mine = [item for item in request.session.items if "builder" in item.fixturenames]
        calls = (getattr(item, "callspec", None) for item in mine)
        builder.start(call.params["key"] for call in calls if call and "key" in call.params)
        yield builder


@pytest.fixture
def built(builder, key):
    """The kernels of the case that `key` names, its own one first."""
    return builder[key]
