"""Whole steps in bfloat16 and float16: no fault, a finite result, and the right direction."""

import pytest
import torch

from memaop_triton import new_memory
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from tests.judging import operands
from tests.schemes import flat_config

SETTINGS = {
    "default": {},
    "blocks": {"block_rows": 16},
    "paper": {"selection": "topk", "memory": "residual"},
    "signed": {"selection": "weightedk", "memory": "signed"},
    "randk": {"selection": "randk", "memory": "residual", "block_rows": 16},
    "wide memory": {"selection": "topk", "memory": "residual", "dtype": torch.float32},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps(setting, dtype):
    m, n, p = 150, 72, 88
    config = flat_config(ratio=1 / 2, rank=8, refresh_every=2, **SETTINGS[setting])
    memory = new_memory(config, n, p)
    for _ in range(3):
        x, g = operands(m, n, p, dtype, device="cuda")
        dw, db = weight_and_bias_grad(x, g, config, memory)
        assert dw.dtype == db.dtype == dtype
        assert dw.isfinite().all()
        exact = g.double().T @ x.double()
        cosine = torch.nn.functional.cosine_similarity(
            dw.double().flatten(), exact.flatten(), dim=0
        )
        assert cosine > 0.25
        assert (db.double() - g.double().sum(0)).abs().max() < 0.15
