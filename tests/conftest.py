import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from memaop_triton import dispatch
from memaop_triton.backward import step
from memaop_triton.config.parts import MEMORIES, ROW_MEMORIES
from memaop_triton.kernels.cpu import native_step
from memaop_triton.sampling.selection import Selection
from tests.schemes import LEGAL, UNBIASED, label

HERE = Path(__file__).parent


# Each of these folders as a whole takes minutes: compilers, ttsem, groups of processes.
SLOW_FOLDERS = {"compile", "distributed", "sanitize"}


def is_slow(path):
    return path.is_relative_to(HERE) and path.relative_to(HERE).parts[0] in SLOW_FOLDERS


def pytest_ignore_collect(collection_path, config):
    # Their cases alone take seconds to count.
    if config.option.markexpr == "not slow" and collection_path != HERE:
        return is_slow(collection_path) or None
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if is_slow(item.path):
            item.add_marker("slow")


def pytest_configure():
    # The shapes here are tiny: waiting for a second thread on a busy machine takes far longer.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_is_tuned(monkeypatch):
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "off")


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """Tensors of the CPU count as those of a GPU, whose times `milliseconds(config)` says.

    The launches are real (in the interpreter), and so is the cache, in an empty folder. `timed` has
    the configurations in the order in which they ran.
    """
    from memaop_triton.kernels.tuning import cache, tuner

    gpu = SimpleNamespace(
        gpu=cache.Gpu("Fake GPU (1)", "8.0", 108), timed=[], milliseconds=lambda config: 1.0
    )

    def time_candidate(call, device):
        call()
        gpu.timed.append(call.keywords["config"])
        return gpu.milliseconds(gpu.timed[-1])

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "first-use")
    monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "gpu_of", lambda device: gpu.gpu)
    monkeypatch.setattr(tuner, "time_candidate", time_candidate)
    tuner.forget()
    yield gpu
    tuner.forget()


@pytest.fixture
def compiled_before(monkeypatch):
    """The file that this machine keeps of the C code; compiling copies it, which takes no time."""
    from memaop_triton.kernels.cpu import build, library

    if not library.is_compiled():
        pytest.skip("needs the C code: a C compiler on Linux")
    kept = build.find_recipe().file
    if not kept.exists():
        pytest.skip("the cache folder cannot be written")
    monkeypatch.setattr(build, "_compile", lambda *_: kept)
    return kept


@pytest.fixture(params=LEGAL, ids=label)
def scheme(request):
    """Keyword arguments of every legal selection and memory."""
    return request.param


@pytest.fixture(params=UNBIASED, ids=label)
def unbiased(request):
    """Keyword arguments of every unbiased selection."""
    return request.param


@pytest.fixture(params=MEMORIES)
def memory_scheme(request):
    """Keyword arguments of one random selection for every memory."""
    selection = "weightedk" if request.param in ROW_MEMORIES else "priority"
    return {"selection": selection, "memory": request.param}


@pytest.fixture
def generator():
    """A fresh generator by seed."""
    return lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture
def selections(monkeypatch):
    """Every selection that the pipeline makes from now on, in order."""
    made = []
    select, on_device, run = step.select, dispatch.select_on_device, native_step.run

    def recording(*args, **kwargs):
        made.append(select(*args, **kwargs))
        return made[-1]

    def recording_device(*args, **kwargs):
        found = on_device(*args, **kwargs)
        made.append(found.selection)
        return found

    def recording_step(*args, **kwargs):
        step = run(*args, **kwargs)
        if step is not None:
            made.append(Selection(step.indices, step.weights))
        return step

    monkeypatch.setattr(step, "select", recording)
    monkeypatch.setattr(dispatch, "select_on_device", recording_device)
    monkeypatch.setattr(native_step, "run", recording_step)
    return made


@pytest.fixture
def mean_agrees():
    """Fails unless the mean of some draws lies within 4 standard errors of what is expected.

    Judged along the expectation itself, where a wrong weight shows most, and along random
    directions.
    """

    def check(draws, expected):
        errors = (torch.stack(draws) - expected).flatten(1).double()
        directions = torch.randn(8, expected.numel(), generator=torch.Generator().manual_seed(7))
        directions = torch.cat([expected.reshape(1, -1), directions]).double()
        along = errors @ directions.T
        mean, error_bar = along.mean(0), along.std(0) / math.sqrt(len(draws))
        assert (mean.abs() <= 4 * error_bar + 1e-12).all(), (mean / error_bar).tolist()

    return check


@pytest.fixture
def train_step():
    """One forward and backward pass of a squared loss and, with an optimizer, its step."""

    def step(model, x, y=0.0, optimizer=None):
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        if optimizer is not None:
            optimizer.step()

    return step


@pytest.fixture
def contents():
    """A copy of what a memory holds: tensors by name, nothing for `None`."""

    def read(memory):
        state = {} if memory is None else memory.state_dict()
        return {n: torch.as_tensor(v).clone() for n, v in state.items() if not isinstance(v, str)}

    return read


@pytest.fixture
def same():
    """Whether two dictionaries of tensors agree bit for bit."""

    def equal(one, other):
        return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)

    return equal
