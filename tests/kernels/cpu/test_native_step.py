"""A weight gradient in one call of the C code is that of its passes one by one, to the bit."""

from unittest.mock import Mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from memaop_triton import MemAOPConfig, new_memory
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.kernels.cpu import library, native, native_step
from memaop_triton.monitor.observer import LayerObserver
from tests.compiled import needs_compiler
from tests.pairwise import pairwise
from tests.schemes import flat_config

pytestmark = needs_compiler
DTYPES = library.DTYPES
CPU = torch.device("cpu")
FENCE = 64


@pytest.fixture(autouse=True)
def _rooms_have_a_fence(monkeypatch):
    """Every room is exactly as large as it was asked for, and nothing behind it is written to."""
    fences = []

    def room_for(number, count):
        size = count * number.itemsize
        whole = torch.full((size + FENCE + 64,), 123, dtype=torch.uint8)
        room = whole[-whole.data_ptr() % 64 :]
        fences.append(room[size : size + FENCE])
        return room

    for module in (native, native_step):
        monkeypatch.setattr(module, "room_for", room_for)
    yield
    for fence in fences:
        assert (fence == 123).all()


@pytest.fixture
def calls(monkeypatch):
    """What the calls of `native_step.run` that applied have computed."""
    made, run = [], native_step.run

    def counting(*args, **kwargs):
        step = run(*args, **kwargs)
        made.extend([] if step is None else [step])
        return step

    monkeypatch.setattr(native_step, "run", counting)
    return made


@pytest.fixture
def one_by_one(monkeypatch):
    """Switches the single call off from the moment it is called."""
    return lambda: monkeypatch.setattr(native_step, "run", lambda *_, **__: None)


def gradients(config, shape, dtype, *, watched=False, bad=None):
    """What three steps of one layer compute and keep; a first and a last row may be `bad`."""
    rows, n, p = shape
    torch.manual_seed(1)
    memory, found = new_memory(config, n, p), []
    observer = LayerObserver(2, 0.5, CPU) if watched else None
    for _ in range(3):
        factors = [] if watched else None
        x, g = torch.randn(rows, n).to(dtype), torch.randn(rows, p).to(dtype)
        if bad is not None:
            x[[0, -1], 7] = bad
            g[0] = 0
        both = weight_and_bias_grad(x, g, config, memory, factors=factors, observer=observer)
        found.append((both, factors))
    if memory is not None:
        found.append(memory.state_dict())
    if observer is not None:
        found += [observer._sums, observer._counts]
    return found


def agree(first, second):
    for one, other in zip(tree_leaves(first), tree_leaves(second), strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


SCHEMES = [
    {"selection": "priority", "memory": "none"},
    {"selection": "topk", "memory": "none"},
    {"selection": "topk", "memory": "residual", "decay": 0.9},
    {"selection": "topk", "memory": "signed", "decay": 0.9},
    *(
        {"memory": "subspace", "side": side, "rank": rank, "refresh_every": 2}
        for side in ("auto", "input", "grad")
        for rank in (4, 16, 20, 64)
    ),
]


@pytest.mark.parametrize(
    ("scheme", "shape", "count", "dtype", "is_own", "watched", "bad"),
    pairwise(
        SCHEMES,
        [(2, 16, 16), (300, 131, 33), (60, 272, 256), (513, 256, 272)],
        [1, 2, 3],
        DTYPES,
        [True, False],
        [True, False],
        [None, torch.nan, torch.inf],
    ),
)
def test_it_is_the_passes_one_by_one(
    scheme, shape, count, dtype, is_own, watched, bad, monkeypatch, calls, one_by_one, threads
):
    monkeypatch.setattr(library, "prefers_own_gemm", lambda dtype: is_own)
    threads(count)
    config = flat_config(k=max(1, shape[0] // 9), **scheme)
    found = gradients(config, shape, dtype, watched=watched, bad=bad)
    assert len(calls) == 3
    for step in calls:
        infinite = step.scores.isinf().nonzero().flatten().tolist()
        assert infinite == ([] if bad is None else [0, shape[0] - 1])
    one_by_one()
    agree(found, gradients(config, shape, dtype, watched=watched, bad=bad))


def test_all_rows_of_a_memory(calls, one_by_one):
    config = MemAOPConfig(k=60, selection="topk", memory="residual")

    def both():
        torch.manual_seed(0)
        memory, found = new_memory(config, 32, 48), []
        for rows in (90, 60):  # the second batch is computed whole, with what the first has left
            x, g = torch.randn(rows, 32), torch.randn(rows, 48)
            found.append(weight_and_bias_grad(x, g, config, memory).weight)
        return found

    found = both()
    assert len(calls) == 1
    one_by_one()
    agree(found, both())


def test_rows_with_room_between_them_and_a_basis_of_any_layout(own_gemm, generator):
    wide = torch.randn(100, 96)
    a, b = wide[:, :64], torch.randn(120, 32)[20:]
    basis = torch.linalg.qr(torch.randn(64, 8)).Q.t().contiguous().t()

    def run(a, b, **choices):
        return native_step.run(a, b, 30, basis, **choices, generator=generator(3))

    step, same = run(a, b, sums=True), run(a.clone(), b.clone(), sums=True)
    agree(list(step), list(same))
    turned = run(a, b, transposed=True)
    assert turned.sums is None
    assert torch.equal(turned.product, step.product.t())
    # Row after row it would be read wrongly: left to the passes one by one.
    assert native_step.run(a, b, 30, basis.contiguous()) is None


def added(rows=9, p=64, dtype=torch.float32):
    return native_step.Added(torch.randn(rows, 64), torch.randn(9, p), torch.ones(9, dtype=dtype))


@pytest.mark.parametrize(
    ("a", "b", "other"),
    [
        (torch.randn(9, 8), torch.randn(9, 64), {}),
        (torch.randn(9, 64), torch.randn(9, 64).double(), {}),
        (torch.randn(9, 64).half(), torch.randn(9, 64).half(), {}),
        (torch.randn(64, 9).t(), torch.randn(9, 64), {}),
        (torch.randn(9, 64), torch.randn(9, 64), {"added": added(rows=8)}),
        (torch.randn(9, 64), torch.randn(9, 64), {"added": added(p=48)}),
        (torch.randn(9, 64), torch.randn(9, 64), {"added": added(dtype=torch.float64)}),
        (torch.randn(9, 64), torch.randn(9, 64), {"basis": torch.randn(6, 64).t()}),
        (torch.randn(9, 64), torch.randn(9, 64), {"basis": torch.randn(68, 64).t()}),
        (torch.randn(9, 64), torch.randn(9, 64), {"basis": torch.randn(8, 64).double().t()}),
    ],
)
def test_what_the_passes_do_not_take_is_left_alone(a, b, other):
    taken = torch.randn(9, 64)
    for fine in ({}, {"basis": torch.randn(8, 64).t()}, {"added": added()}):
        assert native_step.run(taken, taken.clone(), 3, **fine) is not None
    assert native_step.run(a, b, 3, **other) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"block_rows": 16}, 0),
        ({"selection": "bernoulli"}, 0),
        ({"selection": "topk", "memory": "residual", "dtype": torch.float32}, 3),
        ({"selection": "topk", "memory": "residual", "dtype": torch.bfloat16}, 0),
    ],
)
def test_other_selections_and_storage_go_their_own_way(change, expected, calls):
    gradients(flat_config(**{"k": 32, "rank": 8} | change), (200, 64, 80), torch.float32)
    assert len(calls) == expected


@pytest.mark.parametrize("memory", ["none", "residual", "subspace"])
def test_processes_that_share_a_layer_select_together(memory, calls):
    shards = Mock()  # another process that holds as much as this one
    shards.all_reduce_scores.side_effect = lambda scores: 2 * scores
    shards.broadcast_selection.side_effect = lambda selection: selection
    selection = "topk" if memory == "residual" else "priority"
    config = flat_config(k=20, rank=8, selection=selection, memory=memory)
    operands = torch.randn(200, 64), torch.randn(200, 80)
    weight_and_bias_grad(*operands, config, new_memory(config, 64, 80), shards=shards)
    assert calls == []
    shards.all_reduce_scores.assert_called_once()
