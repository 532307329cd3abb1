"""Whole weight gradients by the Triton kernels, against the same in plain PyTorch."""

import contextlib
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from memaop_triton import MemAOPConfig, convert_, dispatch, flops, monitor, new_memory
from memaop_triton.backward import steps_triton
from memaop_triton.backward.weight_grad import weight_and_bias_grad, weight_grad
from memaop_triton.config.parts import ROW_MEMORIES
from memaop_triton.kernels.draws import draw_seed
from memaop_triton.kernels.gpu import launch
from memaop_triton.memory.stash import Stash
from memaop_triton.monitor.estimates import Figures
from memaop_triton.monitor.observer import LayerObserver
from memaop_triton.nn import ops
from memaop_triton.sampling.selection import Selection
from tests.kernel_checks import signs_of
from tests.pairwise import pairwise
from tests.schemes import LEGAL, flat_config, label
from tests.selecting import select_in_pytorch

SHAPES = [(70, 24, 40), (37, 16, 33), (5, 1, 3), (129, 20, 4)]


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """Chooses the backend for the rest of a test; Triton's to begin with."""

    def choose(name):
        monkeypatch.setenv("MEMAOP_TRITON_BACKEND", name)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    choose("triton")
    return choose


@pytest.fixture
def drawn_alike(monkeypatch):
    """Both backends draw in PyTorch: the selection kernel has tests of its own."""
    select_in_pytorch(monkeypatch)


def batches(shape, count=3, dtype=torch.float32):
    m, n, p = shape
    return [(torch.randn(m, n).to(dtype), torch.randn(m, p).to(dtype)) for _ in range(count)]


def run(config, data, generator):
    """dW and db of every batch in turn, and the memory afterwards."""
    memory = new_memory(config, data[0][0].shape[1], data[0][1].shape[1])
    return [
        weight_and_bias_grad(x, g, config, memory, generator=generator) for x, g in data
    ], memory


# The backends draw signs in different ways, and with them the rows: these are tested below.
ALIKE = [
    scheme
    for scheme in LEGAL
    if scheme["memory"] not in ROW_MEMORIES
    or (scheme["selection"], scheme["memory"]) == ("topk", "residual")
]

SIDES = [{"selection": "priority", "memory": "subspace", "side": s} for s in ("input", "grad")]


@pytest.mark.parametrize("scores", ["columns", "grad"])
@pytest.mark.parametrize("selection", ["priority", "bernoulli", "topk"])
@pytest.mark.usefixtures("drawn_alike")
def test_steps_with_cheap_scores_equal_those_in_pytorch(selection, scores, backend, generator):
    config = MemAOPConfig(ratio=1 / 4, selection=selection, memory=None, scores=scores)
    (x, g), results = batches((70, 200, 130), 1)[0], []
    for name in ("triton", "torch"):
        backend(name)
        results.append(weight_and_bias_grad(x, g, config, bias_grad=False, generator=generator(3)))
    torch.testing.assert_close(results[0].weight, results[1].weight, rtol=1e-4, atol=1e-4)
    backend("triton")
    db = weight_and_bias_grad(x, g, config, bias_grad=True).bias
    torch.testing.assert_close(db, g.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheme", "shape", "block_rows", "rows_per_refresh"),
    pairwise(ALIKE + SIDES, SHAPES, [1, 16, 32], [16, 1024]),
)
@pytest.mark.usefixtures("by_descriptor", "drawn_alike")
def test_steps_equal_those_in_pytorch(
    scheme, shape, block_rows, rows_per_refresh, backend, generator, monkeypatch
):
    monkeypatch.setattr(flops, "_ROWS_PER_REFRESH", rows_per_refresh)
    monkeypatch.setattr(flops, "_ROWS_PER_DIMENSION", 1)
    config = flat_config(ratio=1 / 4, rank=4, refresh_every=2, block_rows=block_rows, **scheme)
    data = batches(shape)
    ours, memory = run(config, data, generator(3))
    backend("torch")
    theirs, reference = run(config, data, generator(3))
    for (dw, db), (expected_dw, expected_db) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(dw, expected_dw, rtol=1e-4, atol=1e-4 * shape[0] ** 0.5)
        torch.testing.assert_close(db, expected_db, rtol=1e-4, atol=1e-5 * shape[0])
    if config.row_memory:
        for name, value in reference.state_dict().items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(memory.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    elif memory is not None and reference.basis is not None:
        for one, other in zip(memory.bases.values(), reference.bases.values(), strict=True):
            torch.testing.assert_close(one.q @ one.q.T, other.q @ other.q.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("scheme", "block_rows"),
    [
        (SIDES[0], 1),
        pytest.param(SIDES[1], 16, marks=pytest.mark.slow),
        ({"selection": "priority", "memory": "none"}, 16),
        ({"selection": "bernoulli", "memory": "none"}, 1),
        ({"selection": "topk", "memory": "residual"}, 1),
        ({"selection": "randk", "memory": "signed"}, 1),
    ],
)
def test_a_transposed_gradient_is_the_same_one_in_another_order(scheme, block_rows, generator):
    m, n, p = 37, 16, 33
    config = flat_config(ratio=1 / 4, rank=4, refresh_every=2, block_rows=block_rows, **scheme)
    data, results = batches((m, n, p), count=2), []
    for is_transposed in (True, False):
        memory, draws = new_memory(config, n, p), generator(3)
        results.append(
            [
                weight_and_bias_grad(
                    *batch, config, memory, generator=draws, is_transposed=is_transposed
                )
                for batch in data
            ]
        )
    for (ours, our_db), (theirs, their_db) in zip(*results, strict=True):
        assert ours.t().is_contiguous()
        assert theirs.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * m**0.5)
        torch.testing.assert_close(our_db, their_db)


@pytest.mark.parametrize("has_inside", [False, True])
@pytest.mark.parametrize("side", [None, "grad"])
@pytest.mark.parametrize("selection", ["priority", "topk"])
def test_a_transposed_gradient_of_a_stash_is_the_same_one(side, selection, has_inside, generator):
    m, n, p = 37, 16, 33
    scheme = {"memory": "none"} if side is None else {"memory": "subspace", "side": side}
    config = flat_config(ratio=1 / 4, rank=4, selection=selection, **scheme)
    basis = torch.linalg.qr(torch.randn(n, 4)).Q if has_inside else None
    data = [(Stash.of(x, 8, basis), g) for x, g in batches((m, n, p), count=2)]
    results = []
    for is_transposed in (True, False):
        memory, draws, found = new_memory(config, n, p), generator(3), []
        for stash, g in data:
            found.append(
                weight_and_bias_grad(
                    stash, g, config, memory, generator=draws, is_transposed=is_transposed
                )
            )
        results.append(found)
    for (ours, our_db), (theirs, their_db) in zip(*results, strict=True):
        assert ours.t().is_contiguous()
        assert theirs.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * m**0.5)
        torch.testing.assert_close(our_db, their_db)


@pytest.mark.parametrize("selection", ["randk", "topk", "weightedk"])
@pytest.mark.parametrize("memory", ["residual", "signed"])
@pytest.mark.parametrize("block_rows", [1, 16])
def test_row_memories_keep_what_is_not_selected(
    selection, memory, block_rows, selections, generator
):
    m, n, p = 70, 24, 40
    config = MemAOPConfig(ratio=1 / 3, selection=selection, memory=memory, block_rows=block_rows)
    state = new_memory(config, n, p)
    kept_x, kept_g = torch.zeros(m, n), torch.zeros(m, p)
    for step, (x, g) in enumerate(batches((m, n, p), count=4)):
        dw, db = weight_and_bias_grad(x, g, config, state, generator=generator(step))
        signs = torch.ones(m, 1)
        if memory == "signed":  # the seed is a step's first draw
            signs = signs_of(m, draw_seed(torch.device("cpu"), generator(step)))
        all_x, all_g = signs * kept_x + x, signs * kept_g + g
        taken = selections[-1].indices
        taken = taken[taken < m]
        filled = torch.ones(m, dtype=torch.bool).index_fill_(0, taken, False)
        torch.testing.assert_close(dw, all_g[taken].T @ all_x[taken], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(db, g.sum(0))
        assert torch.equal(state.filled, filled)
        torch.testing.assert_close(state.x[filled], all_x[filled])
        torch.testing.assert_close(state.g[filled], all_g[filled])
        kept_x, kept_g = all_x * filled.unsqueeze(1), all_g * filled.unsqueeze(1)


@pytest.mark.parametrize("scheme", LEGAL, ids=label)
@pytest.mark.parametrize("block_rows", [1, 16])
def test_the_collected_factors_are_those_of_the_gradient(scheme, block_rows):
    config = flat_config(ratio=1 / 4, rank=4, refresh_every=2, block_rows=block_rows, **scheme)
    memory = new_memory(config, 24, 40)
    for x, g in batches(SHAPES[0], count=4):
        factors = []
        dw, _ = weight_and_bias_grad(x, g, config, memory, factors=factors)
        ((left, right),) = ((f.g, f.x) for f in factors)
        torch.testing.assert_close(left.T @ right, dw, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("operand", ["x", "g"])
def test_a_row_that_is_not_finite_shows_and_is_forgotten(memory_scheme, value, operand):
    in_rows = memory_scheme["memory"] in ("residual", "signed")
    for selection in ("topk", "randk") if in_rows else ("priority",):
        config = flat_config(ratio=1 / 8, rank=4, **memory_scheme | {"selection": selection})
        memory = new_memory(config, 24, 40)
        for step in range(3):
            x, g = torch.randn(64, 24), torch.randn(64, 40)
            if step == 1:
                (x if operand == "x" else g)[5, 3] = value
            dw, _ = weight_and_bias_grad(x, g, config, memory)
            assert dw.isfinite().all() == (step != 1)


@pytest.mark.parametrize("block_rows", [1, 16])
def test_rows_of_weight_zero_cannot_spoil_a_gradient(block_rows):
    ((x, g),) = batches((70, 24, 40), count=1)
    config = MemAOPConfig(k=20, selection="bernoulli", memory=None, block_rows=block_rows)
    indices = torch.arange(16, 48)
    weights = torch.ones(32).index_fill_(0, torch.arange(16), 0)
    expected = g[32:48].T @ x[32:48]
    x[20], g[21] = torch.inf, torch.nan
    dw = weight_grad(x, g, config, selection=Selection(indices, weights))
    torch.testing.assert_close(dw, expected, rtol=1e-4, atol=1e-4)


class NoSynchronisation(TorchDispatchMode):
    """Refuses every operation that would make a host wait for its GPU."""

    FORBIDDEN = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten.equal,
        torch.ops.aten.is_nonzero,
        torch.ops.aten._unique2,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in self.FORBIDDEN, f"{func} waits for the GPU"
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{func} waits"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watched(monkeypatch):
    """A dictionary: once it holds "on", the backward operators' own operations are watched.

    Around the operators a mode would see them, and not what they are made of. The interpreter,
    which stands for the GPU, may read values.
    """
    switch = {"on": False}
    run = launch.launch

    def unwatched(*args, **kwargs):
        with _disable_current_modes():
            run(*args, **kwargs)

    def watch(function):
        def call(*args, **kwargs):
            with NoSynchronisation() if switch["on"] else contextlib.nullcontext():
                return function(*args, **kwargs)

        return call

    def unwatched_seed(*args):  # of a GPU it is computed on the host
        with _disable_current_modes():
            return draw_seed(*args)

    monkeypatch.setattr(launch, "launch", unwatched)
    for room in (dispatch, steps_triton):
        monkeypatch.setattr(room, "draw_seed", unwatched_seed)
    for name in (
        "weight_and_bias_grad",
        "select_for_both",
        "sampled_input_grad",
        "input_grad_with_subspace",
    ):
        monkeypatch.setattr(ops, name, watch(getattr(ops, name)))
    return switch


@pytest.mark.parametrize(("k", "block_rows"), [(18, 1), (18, 16), (70, 1)])
@pytest.mark.parametrize("memory", ["none", "residual", "subspace"])
def test_an_observed_step_says_what_it_says_in_pytorch(
    memory, k, block_rows, backend, generator, drawn_alike
):
    # With a row memory, draws come after that of a seed that PyTorch's steps do not need.
    selection = "topk" if memory == "residual" else "priority"
    config = flat_config(
        k=k, rank=4, refresh_every=2, block_rows=block_rows, memory=memory, selection=selection
    )
    data = batches(SHAPES[0])
    found = []
    for name in ("triton", "torch"):
        backend(name)
        observer = LayerObserver(1, 0.5, torch.device("cpu"))
        memory, draws = new_memory(config, *SHAPES[0][1:]), generator(3)
        for x, g in data:
            weight_and_bias_grad(x, g, config, memory, generator=draws, observer=observer)
        found.append((*observer.read(), observer.ages))
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=1e-6)
    assert found[0][1].tolist() == [3, 0, 0]


def test_an_observed_step_without_scores_counts_the_memory(selections):
    config = MemAOPConfig(ratio=1 / 3, selection="randk", memory="residual")
    observer = LayerObserver(1, 0.0, torch.device("cpu"))
    memory = new_memory(config, 24, 40)
    for x, g in batches((70, 24, 40)):
        weight_and_bias_grad(x, g, config, memory, observer=observer)
        held = (memory.x.norm(dim=1) * memory.g.norm(dim=1))[memory.filled]
        taken = selections[-1].indices
        drawn = (x.norm(dim=1) * g.norm(dim=1))[taken]
        figures = Figures(*observer.read()[0].tolist()[: len(Figures._fields)])
        assert figures.remembered_square_sum == pytest.approx(float(held.square().sum()), rel=1e-4)
        assert figures.computed_score_sum == pytest.approx(float(drawn.sum()), rel=1e-4)
        assert figures.score_sum == pytest.approx(float(held.sum() + drawn.sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("scheme", "block_rows"),
    [(scheme, 1) for scheme in LEGAL]
    + [(scheme, 16) for scheme in LEGAL if scheme["memory"] in ("none", "residual")]
    + [({"selection": "priority", "memory": "subspace"}, 16)],
)
def test_a_training_step_looks_at_no_value(scheme, block_rows, traffic, watched):
    config = flat_config(ratio=1 / 4, rank=4, refresh_every=2, block_rows=block_rows, **scheme)
    if config.is_unbiased:
        config = dataclasses.replace(config, ratio=1 / 4, grad_input="sampled")
    layer = convert_(torch.nn.Linear(24, 40), config)
    x = torch.randn(70, 24, requires_grad=True)
    launches = []
    for step in range(5):
        before = len(traffic)
        # The last step is observed, which launches nothing else but copies.
        watch = monitor(layer, every=1) if step == 4 else None
        loss = layer(x).square().sum()
        watched["on"] = step > 0
        loss.backward()
        launches.append([launch.kernel for launch in traffic[before:]])
    assert watch.read()[""].observations == 1
    assert launches[1] == launches[3]  # with a refresh of the subspace
    assert set(launches[2]) <= set(launches[1])
    assert len(launches[2]) <= len(launches[1]) <= 14 + 5 * (config.subspace is not None)
