"""GPUs that are listed, their relatives, and those that are left to PyTorch."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from memaop_triton import dispatch
from memaop_triton.commands import machine
from memaop_triton.kernels import targets
from memaop_triton.kernels.targets import TARGETS
from memaop_triton.kernels.tuning.cache import Gpu, gpu_of
from memaop_triton.kernels.tuning.config import GemmConfig, Problem
from memaop_triton.kernels.tuning.cost_model import count_work
from tests.test_dispatch import OnGpu

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def plug_in(monkeypatch):
    """Makes a GPU the only one: `plug_in(12, 1)`, or `plug_in("gfx1100")` of AMD's."""

    def plug(major, minor=0, **changes):
        arch = f"{major}:sramecc+:xnack-" if isinstance(major, str) else ""
        properties = SimpleNamespace(
            name="Some GPU", major=major, minor=minor, gcnArchName=arch, multi_processor_count=48
        )
        vars(properties).update(
            shared_memory_per_block_optin=101376,
            shared_memory_per_multiprocessor=102400,
            max_threads_per_multi_processor=1536,
            regs_per_multiprocessor=65536,
            L2_cache_size=24 << 20,
            warp_size=32,
            total_memory=80 << 30,
        )
        if arch:  # ROCm's PyTorch says less
            vars(properties).update(major=11, minor=0, warp_size=64)
            del properties.shared_memory_per_block_optin
        vars(properties).update(changes)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.version, "hip", "6.4" if arch else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        targets.find.cache_clear()

    yield plug
    targets.find.cache_clear()


@pytest.mark.parametrize("name", TARGETS)
def test_a_listed_gpu_has_the_limits_of_the_list(plug_in, name):
    listed = TARGETS[name]
    plug_in(*((name,) if listed.backend == "hip" else divmod(listed.arch, 10)), L2_cache_size=1)
    found = targets.find(DEVICE)
    assert (found.name, found.shared_memory) == (name, listed.shared_memory)
    assert found.processors == 48
    assert found.chip.cache == listed.chip.cache
    assert targets.current(DEVICE) is found
    assert gpu_of.__wrapped__(DEVICE) == Gpu("Some GPU", name, 48)
    facts = f"Some GPU, {name}, 48 processors, 80.0 GiB, kernels chosen for {name}"
    assert dict(machine._gpus())["cuda:0"] == facts


@pytest.mark.parametrize(
    ("capability", "relative", "shared", "warps"),
    [
        ((12, 1), "sm_120", 99 << 10, 48),
        ((10, 3), "sm_100", 227 << 10, 64),
        ((8, 7), "sm_86", 163 << 10, 48),
    ],
)
def test_a_newer_relative_has_limits_of_its_own(plug_in, capability, relative, shared, warps):
    plug_in(
        *capability,
        shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared + 1024,
        max_threads_per_multi_processor=32 * warps,
        regs_per_multiprocessor=1 << 15,
    )
    found, listed = targets.find(DEVICE), TARGETS[relative]
    assert found.name == "sm_{}{}".format(*capability)
    assert (found.arch, found.has_tensor_copies) == (listed.arch, listed.has_tensor_copies)
    assert (found.shared_memory, found.processor_shared_memory) == (shared, shared + 1024)
    assert (found.processor_warps, found.processor_registers) == (warps, 1 << 15)
    assert (found.processors, found.chip.cache) == (48, 24)
    assert found.chip.rate("half") == listed.chip.rate("half")
    problem = Problem("gather_gemm", torch.bfloat16, 4096, 512, 1024, 1024)
    config = GemmConfig(64, 64, 64, 4, 3)
    works = [count_work(problem, config, target).instructions for target in (found, listed)]
    assert works[0] == works[1], "the same instructions"


@pytest.mark.parametrize("which", [(7, 5), (11, 0), ("gfx1100",), ("gfx90a",)])
def test_another_gpu_is_left_to_pytorch_which_is_said(plug_in, monkeypatch, which):
    plug_in(*which)
    name = which[0] if isinstance(which[0], str) else "sm_{}{}".format(*which)
    assert targets.find(DEVICE) is None
    assert dict(machine._gpus())["cuda:0"].endswith("no kernels for it")
    with pytest.raises(RuntimeError, match=f"no measured limits for cuda:0, {name}"):
        targets.current(DEVICE)
    monkeypatch.setattr(dispatch, "_is_installed", lambda: True)
    monkeypatch.setattr(OnGpu, "device", DEVICE, raising=False)
    rows = torch.ones(8, 4).as_subclass(OnGpu)
    monkeypatch.delenv("MEMAOP_TRITON_BACKEND", raising=False)
    assert not dispatch.runs_triton(rows)
    assert dispatch.explain(rows) == f"PyTorch: there are no measured limits for {name} (cuda:0)"
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=f"cannot be followed: there are no .* for {name}"):
        dispatch.runs_triton(rows)


@pytest.mark.parametrize(
    ("driver", "chip", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 3.35),
        ("NVIDIA H100 PCIe", "H100 PCIe", 2.0),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB", 1.555),
        ("AMD Instinct MI300X", "MI300X", 5.3),
        ("GeForce GT 710", "H100 SXM", 3.35),
    ],
)
def test_a_driver_names_its_chip(plug_in, driver, chip, bandwidth):
    plug_in(9, name=driver)
    found = targets.find(DEVICE).chip
    assert (found.name, found.bandwidth) == (chip, bandwidth)


def test_a_smaller_chip_of_a_make_does_less():
    h100 = TARGETS["sm_90"].chip
    half = targets.with_processors(h100, 66)
    assert (half.half, half.cache_bandwidth) == (h100.half / 2, h100.cache_bandwidth / 2)
    assert half.rate("half") == h100.rate("half")
    assert half.bandwidth == h100.bandwidth


def test_a_capture_is_asked_for_on_the_devices_own_stream(monkeypatch):
    second, current = torch.device("cuda", 1), []

    @contextlib.contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current == [second])
    assert targets.is_capturing(second)
    assert not targets.is_capturing(DEVICE)
    assert not targets.is_capturing(torch.device("cpu"))
