"""Every test in this folder runs its kernels under ttsem, which executes them without a GPU.

It stops at an access out of bounds, at a race between programs and at an undefined operation, and
rounds bfloat16 as a GPU does. Memory from `torch.empty` holds NaN, so what was never written
shows in the values. `make sanitize` installs it; without it these tests are skipped.
"""

import contextlib

import pytest
import torch
from triton.runtime import driver

from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu import launch
from memaop_triton.kernels.tuning import cache, tuner


class Gpu:
    """The pretended GPU of a test: `launches` kernels have run on it so far."""

    def __init__(self, session, fault):
        self._session, self._fault = session, fault

    @property
    def launches(self):
        return self._session.launches

    @contextlib.contextmanager
    def caught(self, kind, *, line="", kernel="", tensor=""):
        """Passes if what runs inside stops with a fault of this kind, and there.

        The line is unknown of what a kernel calls; the tensor is the nearest one, an argument of
        the kernel.
        """
        with pytest.raises(self._fault) as stopped:
            yield
        fault = stopped.value.fault
        assert fault.kind == kind, str(stopped.value)
        assert line in fault.source_text, str(stopped.value)
        assert kernel in ("", fault.kernel), str(stopped.value)
        assert tensor in ("", fault.buffer), str(stopped.value)


class HostState:
    """What a generator of a GPU keeps on the host."""

    def __init__(self):
        self.offset = 0

    def initial_seed(self):
        return 3

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"], autouse=True)
def gpu(request, monkeypatch, tmp_path):
    """A GPU without tensor copies and one with; tensors made for "cuda" land on it."""
    monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(tmp_path))
    # It captures no graphs, and PyTorch without CUDA cannot be asked.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # A recorded step would hand it addresses, which it cannot check.
    monkeypatch.setattr(launch, "record", lambda function, *_: (function(), None))
    monkeypatch.setattr(torch.cuda, "default_generators", (HostState(),))
    # With a build for CUDA, pinned memory and events would need a driver.
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    sanitize = pytest.importorskip("ttsem.sanitize", reason="needs ttsem: run `make sanitize`")
    pretending = pytest.importorskip("ttsem._fakedriver")
    before = driver._active
    _forget_the_gpu()
    try:
        with sanitize.session(request.param) as session:
            yield Gpu(session, sanitize.KernelFault)
    finally:  # what the session leaves behind
        driver._active = before
        pretending.unstub_torch_cuda()
        _forget_the_gpu()
    assert session.launches, "no kernel was launched"
    assert not session.races_unchecked, "too large to be searched for races: take smaller shapes"


def _forget_the_gpu():
    targets.find.cache_clear()
    cache.gpu_of.cache_clear()
    tuner.forget()
