"""Patches of convolutions: what is computed without their matrix is what that would give."""

import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

from memaop_triton.memory.patches import Patches
from memaop_triton.nn.conv import convolution_of
from tests.convolutions import convolutions, patches_one_by_one


def patches_of(layer, x):
    """Those of a layer whose padding needs nothing added before."""
    geometry = convolution_of(layer, x).geometry
    return Patches(x, geometry), patches_one_by_one(x, geometry)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions(paddings=("zeros",)))
def test_rows_norms_and_scores(drawn):
    layer, x = drawn
    patches, rows = patches_of(layer, x)
    count = rows.shape[1]
    assert patches.shape == rows.shape[1:]
    some = torch.randint(count, (7,)).sort().values
    found = patches.rows(some)
    assert torch.equal(found if patches.groups > 1 else found[None], rows[:, some])
    norms = patches.norms()
    assert_close(norms.view(count, -1), torch.linalg.vector_norm(rows, dim=2).t())
    g = torch.randn(count, layer.out_channels, dtype=x.dtype)
    of_groups = g.view(count, patches.groups, -1).transpose(0, 1)
    alone = torch.linalg.matrix_norm(of_groups.unsqueeze(3) * rows.unsqueeze(2))
    assert_close(patches.scores(g), torch.linalg.vector_norm(alone, dim=0))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(convolutions(paddings=("zeros",)))
def test_product_with_all_rows(drawn):
    layer, x = drawn
    patches, rows = patches_of(layer, x)
    a = torch.randn(rows.shape[1], 2 * patches.groups, dtype=x.dtype)
    of_groups = a.view(len(a), patches.groups, 2).permute(1, 2, 0)
    assert_close(patches.transposed_mm(a), (of_groups @ rows).flatten(0, 1))


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (torch.nn.Conv2d(16, 8, 3, padding=1), (9, 6)),
        (torch.nn.Conv2d(24, 8, 3, stride=2, dilation=2, padding=2), (11, 8)),
        (torch.nn.Conv1d(16, 8, 5), (40,)),
        (torch.nn.Conv3d(16, 8, (1, 2, 3), stride=(1, 2, 1)), (3, 4, 7)),
        (torch.nn.Conv2d(3, 8, 7), (9, 9)),  # pieces that are too short for the C code
    ],
    ids=str,
)
def test_product_with_all_rows_of_many_channels(layer, sizes):
    x = torch.randn(3, layer.in_channels, *sizes)
    patches, (rows,) = patches_of(layer, x)
    for columns in (4, 16, 6):
        a = torch.randn(len(rows), columns)
        assert_close(patches.transposed_mm(a), a.t() @ rows, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(convolutions(groups=(1,), paddings=("zeros",)))
def test_projection(drawn):
    layer, x = drawn
    patches, (rows,) = patches_of(layer, x)
    basis = torch.linalg.qr(torch.randn(rows.shape[1], 2, dtype=x.dtype)).Q
    z, rest = patches.project(basis)
    scale = 2.0 ** round(torch.tensor(rows.shape[1]).log2().item() / 2)
    assert_close(z * scale, rows @ basis)
    left = torch.linalg.vector_norm(rows - rows @ basis @ basis.t(), dim=1)
    floor = torch.linalg.vector_norm(rows, dim=1) * torch.finfo(x.dtype).eps ** 0.5
    assert_close(rest, torch.maximum(left, floor), atol=1e-7, rtol=1e-6)


def test_some_rows_by_a_slice():
    x = torch.randn(2, 3, 6, 5)
    layer = torch.nn.Conv2d(3, 4, 3, padding=1)
    patches, (rows,) = patches_of(layer, x)
    assert torch.equal(patches[5::7], rows[5::7])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_in_the_scores_of_its_patches_alone(value):
    x = torch.ones(1, 2, 6, 6)
    x[0, 1, 2, 3] = value
    layer = torch.nn.Conv2d(2, 3, 3)
    patches, (rows,) = patches_of(layer, x)
    scores = patches.scores(torch.ones(len(rows), 3))
    assert torch.equal(scores.isinf(), ~rows.isfinite().all(1))
    assert scores.isinf().sum() == 9


def test_nothing_as_large_as_the_matrix_is_made():
    x = torch.randn(4, 8, 20, 20)
    layer = torch.nn.Conv2d(8, 4, 5, padding=2)
    patches = Patches(x, convolution_of(layer, x).geometry)
    made = []

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                made.append(result.untyped_storage().nbytes())
            return result

    with Watching():
        patches.scores(torch.randn(len(x) * 400, 4))
        patches.rows(torch.arange(0, 1600, 8))
    # An eighth of the rows is the largest.
    assert max(made) == patches.shape.numel() * 4 / 8
