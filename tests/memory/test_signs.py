"""Signs of a tensor's numbers, a bit each."""

import math

import pytest
import torch

from memaop_triton.memory.signs import SignBits


@pytest.mark.parametrize("shape", [(64, 32), (7, 13, 3), (5,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_restores_ones_where_numbers_are_positive(shape, dtype):
    torch.manual_seed(0)
    a = torch.randn(shape).relu().to(dtype)
    signs = SignBits(a)
    again = signs.restore(a.shape, a.stride())
    assert (again.shape, again.dtype) == (a.shape, dtype)
    assert torch.equal(again, (a > 0).to(dtype))
    assert signs.nbytes == -(-a.numel() // 8)


def test_other_strides_and_numbers_that_are_not_finite():
    torch.manual_seed(0)
    a = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    a[0, :3, 0, 0] = torch.tensor([math.nan, math.inf, -math.inf])
    again = SignBits(a).restore(a.shape, a.stride())
    assert again.stride() == a.stride()
    assert again[0, :3, 0, 0].tolist() == [1, 1, 0]  # a NaN passes the gradient on
    assert torch.equal(again[1], (a[1] > 0).float())


def test_every_byte():
    a = torch.tensor([[byte >> bit & 1 for bit in range(8)] for byte in range(256)]).float()
    assert torch.equal(SignBits(a).restore(a.shape, a.stride()), a)
