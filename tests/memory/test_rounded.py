"""Tensors of any shape in 8 bits a number."""

import math

import pytest
import torch

from memaop_triton.memory.rounded import RoundedTensor, is_dense


def random(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(*shape).to(dtype)


def restored(a):
    return RoundedTensor(a).restore(a.shape, a.stride())


LAYOUTS = {
    "matrix": random(96, 64),
    "odd": random(7, 13, 19),
    "transposed": random(4, 24, 3, 32).transpose(1, 2),
    "channels last": random(2, 16, 9, 9).to(memory_format=torch.channels_last),
    "a slice": random(40, 512)[8:24],
    "a row": random(1, 2048).expand(1, 2048),
    "without dimensions": random(1)[0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_restores_numbers_shape_and_strides(name, dtype):
    a = LAYOUTS[name].to(dtype)  # keeps the strides
    again = restored(a)
    assert (again.shape, again.stride(), again.dtype) == (a.shape, a.stride(), dtype)
    whole = a.numel() // 512 * 512
    flat, flat_again = (b.as_strided((b.numel(),), (1,)) for b in (a, again))
    assert torch.equal(flat_again[whole:], flat[whole:])
    blocks, errors = (b[:whole].double().view(-1, 64) for b in (flat, flat_again - flat))
    # No rotated number is longer than its block, and is rounded by half a step at most; the step
    # is a 128th too large at most. The result is rounded to its dtype.
    most = 8 * (0.5 / 127 * (1 + 1 / 128)) + torch.finfo(dtype).eps
    assert (errors.norm(dim=1) <= most * blocks.norm(dim=1)).all()
    assert (errors.norm(dim=1) > 1e-3 * blocks.norm(dim=1)).all()


def test_the_error_has_mean_zero():
    a = random(24, 64)
    draws = torch.stack([restored(a) - a for _ in range(400)]).double()
    error = draws.mean(0) / (draws.std(0) / math.sqrt(len(draws)))
    assert error.abs().max() < 4.5  # of 1,536
    assert 0.9 < error.square().mean() < 1.1


def test_restores_the_same_numbers_in_every_call():
    rounded = RoundedTensor(random(64, 33))
    first, second = (rounded.restore(torch.Size((64, 33)), (33, 1)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    few = RoundedTensor(random(3))
    assert few.restore(torch.Size((3,)), (1,)).zero_().data_ptr() not in (0, few._rest.data_ptr())
    assert torch.equal(few.restore(torch.Size((3,)), (1,)), random(3))


def test_bytes():
    """A number has a byte, 64 a scale of two, and 512 a norm of four."""
    assert RoundedTensor(random(64, 512)).nbytes == 64 * (512 + 16 + 4) + 8  # a seed
    assert RoundedTensor(random(100)).nbytes == 400


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_makes_its_block_nan(value):
    a = random(16, 64)
    a[3, 5] = value
    again = restored(a)
    assert again[3].isnan().all()
    assert torch.cat((again[:3], again[4:])).isfinite().all()


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        *((a, True) for a in LAYOUTS.values()),
        (random(4, 8).t(), True),
        (random(4, 8)[:, :4], False),
        (random(4, 8)[::2], False),
        (random(1, 8).expand(4, 8), False),
        (random(0, 8), True),
    ],
)
def test_is_dense(a, expected):
    assert is_dense(a) == expected
