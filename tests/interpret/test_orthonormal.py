"""The basis after a refresh, against Gram–Schmidt in float64, and what a refresh is made of."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from memaop_triton import new_memory
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.kernels.gpu import launch
from memaop_triton.memory.basis import Basis
from memaop_triton.memory.refresh_clock import RefreshClock
from tests.judging import LAYOUTS
from tests.orthonormal_checks import (
    PRODUCTS,
    SHAPES,
    basis,
    check_kept,
    check_leading_columns,
    check_product,
)
from tests.pairwise import pairwise
from tests.schemes import flat_config

REFRESH = ["gram_kernel", *["round_kernel"] * 4]


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize(
    ("name", "shape", "layout", "due"),
    pairwise(list(PRODUCTS), SHAPES, LAYOUTS, [None, True, [True]]),
)
def test_products(name, shape, layout, due):
    check_product(name, shape, layout, due)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [("powers", (64, 64)), ("condition 1e12", (100, 50)), ("rank 1", (4200, 3))],
)
def test_many_columns_and_shares_of_several_tiles(name, shape):
    check_product(name, shape)


@pytest.mark.parametrize(
    ("value", "due"), [(0, True), (torch.nan, True), (torch.inf, True), (None, False)]
)
def test_the_basis_is_kept(value, due):
    check_kept(value, due)


def test_leading_columns():
    check_leading_columns()


def test_a_refresh_repeats_bit_for_bit():
    product = PRODUCTS["rank r/2"](300, 16)
    first, second = basis(300, 16), basis(300, 16)
    for q in (first, second):
        Basis.take(_holding(q), product)
    assert torch.equal(first, second)


def _holding(q):
    held = Basis(*q.shape)
    held.q = q
    return held


class Recorded(TorchDispatchMode):
    """Collects the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def recorded(monkeypatch):
    """Operations of PyTorch outside the kernels; the interpreter's own do not count."""
    run = launch.launch

    def unwatched(*args, **kwargs):
        with _disable_current_modes():
            run(*args, **kwargs)

    monkeypatch.setattr(launch, "launch", unwatched)
    return Recorded()


def test_nothing_but_five_launches(traffic, recorded):
    """The other operations allocate, or look at the same memory in another way."""
    held, due = _holding(basis(70, 5)), torch.tensor([True])
    product = torch.randn(70, 5)
    with recorded:
        held.take(product, due)
    assert [launch.kernel for launch in traffic] == REFRESH
    free = {"empty", "view", "slice", "detach", "alias", "fill_"}  # filled for the test alone
    assert set(recorded.names) <= free
    assert recorded.names.count("fill_") <= recorded.names.count("empty")


def test_a_refresh_that_is_not_due_moves_nothing(traffic):
    held = _holding(basis(70, 5))
    held.take(torch.randn(70, 5), torch.tensor([False]))
    assert [launch.kernel for launch in traffic] == REFRESH
    assert sum(launch.moved for launch in traffic) == len(REFRESH) + 1  # the flags


SOLVERS = ("linalg", "qr", "ormqr", "cholesky", "svd", "eig", "solve", "lu_", "_lu", "inverse")


@pytest.mark.parametrize("side", ["input", "grad"])
def test_no_solver_in_a_step_whose_refresh_the_device_decides(side, recorded, monkeypatch):
    """As while a CUDA graph is captured: `is_due` is a tensor, and every step computes a basis."""
    config = flat_config(
        ratio=1 / 4, rank=4, selection="priority", memory="subspace", side=side, refresh_every=2
    )
    x, g, weight = torch.randn(70, 24), torch.randn(70, 40), torch.randn(40, 24)
    memory = new_memory(config, 24, 40)
    weight_and_bias_grad(x, g, config, memory)
    memory.projection.input_grad(g, weight, 4)
    monkeypatch.setattr(RefreshClock, "is_due", lambda *_: torch.ones(1, dtype=torch.bool))
    held = [memory.basis, memory.projection.basis]
    before = [(q.clone(), q.data_ptr()) for q in held]
    with recorded:
        weight_and_bias_grad(x, g, config, memory)
        memory.projection.input_grad(g, weight, 4)
    solvers = [name for name in recorded.names if any(part in name for part in SOLVERS)]
    assert [name for name in solvers if name != "linalg_vector_norm"] == []
    for q, (old, address) in zip(held, before, strict=True):
        assert not torch.equal(q, old)
        assert q.data_ptr() == address
