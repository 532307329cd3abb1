"""What PyTorch is set to, by its old settings and by its new ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
from memaop_triton.commands import machine_facts
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.primitives import precision
from memaop_triton.kernels.targets import TARGETS
target = TARGETS["sm_90"]
print(precision(target, torch.float32), precision(target, torch.bfloat16))
print(precision(TARGETS["gfx950"], torch.float32))
gather_gemm(torch.ones(16, 16), torch.ones(16, 16), torch.arange(8))
print(dict(machine_facts._pytorch())["float32 products on a GPU"])
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_how_float32_is_multiplied_follows_every_setting(setting):
    """In a process of its own: PyTorch has no way back from a mix of old and new settings."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(setting=setting)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    formed = SETTINGS[setting]
    shown = {"tf32": "tf32", "ieee": "exact"}[formed]
    assert done.stdout.split() == [formed, "ieee", "ieee", shown]
