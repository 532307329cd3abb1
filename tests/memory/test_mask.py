"""Which numbers dropout kept, in bits."""

import pytest
import torch

from memaop_triton.memory.mask import Mask, pack_bits, unpack_bits
from memaop_triton.memory.stash import Stash


@pytest.mark.parametrize("columns", [1, 3, 8, 17, 64, 130])
def test_bits_are_what_was_packed(columns):
    for kept in (torch.rand(9, columns) < 0.7, (torch.rand(columns, 9) < 0.7).T):
        bits = pack_bits(kept)
        assert bits.shape == (9, -(-columns // 8))
        assert bits.dtype == torch.uint8
        assert torch.equal(unpack_bits(bits, columns), kept.to(torch.uint8))


def test_every_byte_is_one_of_its_own():
    kept = torch.arange(256)[:, None] >> torch.arange(8) & 1 == 1
    assert len(set(pack_bits(kept).flatten().tolist())) == 256


def test_no_rows():
    assert unpack_bits(pack_bits(torch.empty(0, 20, dtype=torch.bool)), 20).shape == (0, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_masked_rows(dtype):
    kept = torch.rand(30, 20) < 0.5
    mask = Mask.of(kept, 1.25)
    rows, indices = torch.randn(30, 20, dtype=dtype), torch.tensor([29, 3, 3, 0])
    assert torch.equal(mask.apply(rows), rows * kept * 1.25)
    assert torch.equal(mask.apply(rows[indices], indices), (rows * kept * 1.25)[indices])
    assert mask.apply(rows).dtype == dtype


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_restored_is_masked(bits):
    x, g, kept = torch.randn(2100, 24), torch.randn(2100, 3), torch.rand(2100, 24) < 0.8
    plain = Stash.of(x, bits)
    mask = Mask.of(kept, 1.25)
    stash = Stash.from_tensors((*mask, *plain.tensors), bits, x.dtype)
    assert len(stash.tensors) == len(plain.tensors) + 2
    expected = plain[0:2100] * kept * 1.25
    assert torch.equal(stash[5:2000], expected[5:2000])
    indices = torch.tensor([7, 2099, 1024])
    rows, of_g, weights = stash.rest_and_rows_of(g, indices, torch.ones(3))
    rows, of_g = rows.matrix(), of_g.matrix()
    assert torch.equal(rows, expected[indices])
    assert torch.equal(of_g, g[indices])
    assert torch.equal(weights, torch.ones(3))
    torch.testing.assert_close(stash.transposed_mm(g), g.T @ expected, rtol=1e-4, atol=1e-3)
