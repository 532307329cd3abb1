"""Inputs in a few bits: what is stored, what is held, and gradients in the mean."""

import pytest
import torch

from memaop_triton import MemAOPConfig, Subspace, memaop_linear, new_memory
from memaop_triton.bench import measure
from tests.gpu.helpers import batches, no_synchronisation
from tests.stash_checks import check_not_finite, check_rounded

MEMORIES = [None, Subspace(8, "input", 4), Subspace(8, "grad", 4)]


def layer(shape, dtype, device, **settings):
    """A call that takes X and G and returns dW, X being overwritten before the backward pass."""
    config = MemAOPConfig(**settings)
    memory = new_memory(config, *shape[1:])
    weight = torch.zeros(shape[2], shape[1], dtype=dtype, device=device, requires_grad=True)

    def gradient(x, g):
        rows, weight.grad = x.clone(), None
        out = memaop_linear(rows, weight, None, config, memory)
        rows.fill_(torch.nan)
        out.backward(g)
        return weight.grad

    return gradient


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("columns", [256, 203])
def test_what_is_stored_is_restored(bits, rank, columns, device, half, on_gpu):
    rows = on_gpu(3000, 40)
    check_rounded((rows, columns), bits, half, rank=rank, device=device)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of numpy, in the interpreter
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_are_not_finite_are_marked(bits, half, device):
    check_not_finite(bits, half, device)


@pytest.mark.slow  # in the interpreter
@pytest.mark.parametrize("memory", MEMORIES, ids=str)
@pytest.mark.parametrize("ratio", [1 / 4, 1])
def test_gradients_are_right_in_the_mean(memory, ratio, device, shape, half, on_gpu):
    gradient = layer(shape, half, device, ratio=ratio, memory=memory, stash="int4")
    ((x, g),) = batches(shape, 1, half, device)
    exact = g.double().T @ x.double()
    count = on_gpu(64, 9)
    errors = [gradient(x, g).double() - exact for _ in range(count)]
    one = sum(error.square().sum() for error in errors) / count
    mean = sum(errors).div(count).square().sum()
    # Of errors that are independent the mean's square is 1/count of theirs.
    assert one > 0
    assert mean < 2 * one / count + (1e-5 * exact.square().sum())


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
def test_a_step_does_not_wait_for_the_device(memory, device, shape, half):
    gradient = layer(shape, half, device, ratio=1 / 4, memory=memory, stash="int4")
    data = batches(shape, 4, half, device)
    for x, g in data[:2]:  # makes the basis and compiles
        gradient(x, g)
    with no_synchronisation(device):
        for x, g in data[2:]:
            gradient(x, g)


def test_bytes_held():
    device = torch.device("cuda")
    x = torch.randn(8192, 1024, device=device, dtype=torch.bfloat16)
    w = torch.randn(1024, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
    clock, out = measure.clock_for(device), 2 * len(x) * 1024

    def held(config):
        def call():
            rows = x.clone()
            return memaop_linear(rows, w, None, config) if config else rows @ w.t()

        return clock.held_bytes(call) - out

    dense = held(None)
    assert dense == x.nbytes
    stash = held(MemAOPConfig(ratio=1 / 8, memory="none", stash="int4"))
    assert 0 < stash <= 0.3 * dense
