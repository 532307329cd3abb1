"""Settings of PyTorch, by its old interface and its new one, and the folder of cached files."""

import contextlib
import sys

import pytest

from memaop_triton.kernels import env
from tests.processes import run_python

SETTINGS = {
    "": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.set_float32_matmul_precision('medium')": "tf32",
    "torch.set_float32_matmul_precision('highest')": "ieee",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'": (
        "ieee"
    ),
}
PROBE = """
import torch
{setting}
from memaop_triton.commands import machine
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.primitives import precision
from memaop_triton.kernels.targets import TARGETS
target = TARGETS["sm_90"]
print(precision(target, torch.float32), precision(target, torch.bfloat16))
print(precision(TARGETS["gfx950"], torch.float32))
gather_gemm(torch.ones(16, 16), torch.ones(16, 16), torch.arange(8))
print(dict(machine._pytorch())["float32 products on a GPU"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_how_float32_is_multiplied_follows_every_setting(setting):
    """In a process of its own: PyTorch has no way back from a mix of old and new settings."""
    formed = SETTINGS[setting]
    shown = {"tf32": "tf32", "ieee": "exact"}[formed]
    printed = run_python(PROBE.format(setting=setting), TRITON_INTERPRET="1")
    assert printed.split() == [formed, "ieee", "ieee", shown]


@pytest.mark.parametrize(
    ("chosen", "below"),
    [
        ("MEMAOP_TRITON_CACHE_DIR", ""),
        ("XDG_CACHE_HOME", "memaop-triton"),
        ("HOME", ".cache/memaop-triton"),
    ],
)
def test_the_cache_folder_is_the_same_without_platformdirs(chosen, below, tmp_path, monkeypatch):
    for name in ("MEMAOP_TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(chosen, str(tmp_path))
    usual = env.cache_folder("native")
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert env.cache_folder("native") == usual == tmp_path / below / "native"
    monkeypatch.setattr(sys, "platform", "win32")
    wanted = "install platformdirs or set MEMAOP_TRITON_CACHE_DIR"
    with pytest.raises(ModuleNotFoundError, match=wanted) if below else contextlib.nullcontext():
        env.cache_folder("native")
