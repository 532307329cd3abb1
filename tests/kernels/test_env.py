"""Settings of PyTorch, by its old interface and its new one, and the folder of cached files."""

from pathlib import Path

import pytest

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


@pytest.mark.parametrize("setting", SETTINGS)
def test_how_float32_is_multiplied_follows_every_setting(setting):
    """In a process of its own: PyTorch has no way back from a mix of old and new settings."""
    formed = SETTINGS[setting]
    shown = {"tf32": "tf32", "ieee": "exact"}[formed]
    printed = run_python(PROBE.format(setting=setting), TRITON_INTERPRET="1")
    assert printed.split() == [formed, "ieee", "ieee", shown]


WITHOUT_PLATFORMDIRS = """
import sys
import platformdirs
print(platformdirs.user_cache_path("memaop-triton") / "native")
sys.modules["platformdirs"] = None
import torch
from memaop_triton import convert_
from memaop_triton.kernels.env import cache_folder
layer = convert_(torch.nn.Linear(8, 4))
before = layer.weight.detach().clone()
layer(torch.randn(64, 8)).square().sum().backward()
torch.optim.SGD(layer.parameters(), 0.1).step()
assert not torch.equal(layer.weight, before)
print(cache_folder("native"))
sys.platform = "win32"
try:
    cache_folder("native")
except ModuleNotFoundError as error:
    print(error)
"""


@pytest.mark.parametrize("chosen", ["MEMAOP_TRITON_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
def test_a_checkout_trains_without_platformdirs(chosen, tmp_path, monkeypatch):
    for name in ("MEMAOP_TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    usual, folder, *error = run_python(WITHOUT_PLATFORMDIRS, **{chosen: str(tmp_path)}).splitlines()
    below = {"XDG_CACHE_HOME": "memaop-triton", "HOME": ".cache/memaop-triton"}.get(chosen, "")
    assert Path(folder) == tmp_path / below / "native"
    wanted = "install platformdirs or set MEMAOP_TRITON_CACHE_DIR"
    assert (wanted in "".join(error) and folder == usual) if below else not error
