import pytest
import torch

from memaop_triton import MemAOPConfig, Rows, Subspace, new_memory
from memaop_triton.backward.weight_grad import weight_and_bias_grad, weight_grad
from memaop_triton.reference import weight_grad_reference
from memaop_triton.sampling.selection import Selection
from tests.judging import LAYOUTS, laid_out
from tests.pairwise import pairwise
from tests.schemes import LEGAL, flat_config

SHAPES = [(17, 3, 129), (129, 17, 3), (3, 129, 17), (129, 1, 1), (1, 17, 3), (3, 1, 129)]
LOW = [torch.float32, torch.bfloat16, torch.float16]


def operands(rows, inputs, outputs, dtype=torch.float64):
    return torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)


def dequantized(*tensors):
    return tuple(None if t is None else t.double() for t in tensors)


SIDES = [{"selection": "priority", "memory": "subspace", "side": s} for s in ("input", "grad")]


@pytest.mark.parametrize(
    ("scheme", "shape", "budget"),
    pairwise(LEGAL + SIDES, SHAPES, [{"k": 1}, {"ratio": 1 / 3}, {"ratio": 1.0}]),
)
def test_steps_equal_the_reference(scheme, shape, budget, generator):
    """And their factors multiply to them, and the operands are not changed."""
    config = flat_config(rank=4, refresh_every=2, **budget, **scheme)
    rows, inputs, outputs = shape
    memory = new_memory(config, inputs, outputs)
    ours, theirs = generator(1), generator(1)
    slots = None
    for step in range(4):
        x, g = operands(rows, inputs, outputs)
        basis = None
        if config.memory_name == "subspace" and config.num_rows(rows) < rows:
            if step == 0:
                memory.begin_step(x, g, config, ours)
                theirs.set_state(ours.get_state())
            basis = memory.basis.clone()
        side = getattr(memory, "side", "input")
        expected = weight_grad_reference(
            x, g, config, memory=slots, basis=basis, side=side, generator=theirs
        )
        slots, before, factors = expected.memory, (x.clone(), g.clone()), []
        dw, db = weight_and_bias_grad(x, g, config, memory, generator=ours, factors=factors)
        torch.testing.assert_close(dw, expected.weight_grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(db, g.sum(0))
        assert len(factors) == 1 or config.num_rows(rows) == rows
        for pair in factors:
            torch.testing.assert_close(pair.g.T @ pair.x, dw)
        assert torch.equal(x, before[0])
        assert torch.equal(g, before[1])
        if config.row_memory and memory.rows == 0:
            # All rows were computed, and none was ever left: nothing is made, no sign is drawn.
            assert config.num_rows(rows) == rows
            assert not slots[0].any()
            theirs.set_state(ours.get_state())
        elif slots is not None:
            stored = memory.state_dict()
            torch.testing.assert_close(stored["x"], slots[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(stored["g"], slots[1], rtol=1e-10, atol=1e-10)
    assert torch.equal(ours.get_state(), theirs.get_state())


def plain(x, g, selection, slots=None, basis=None):
    """The weight gradient and the slots after it, in the dtype of the operands throughout."""
    indices, weights = selection
    if slots is not None:
        x, g = slots[0] + x, slots[1] + g
    dw = torch.zeros(g.shape[1], x.shape[1], dtype=x.dtype)
    rest = x
    if basis is not None:
        z = x @ basis
        dw = (g.T @ z) @ basis.T
        rest = x - z @ basis.T
    dw = dw + (weights.to(g.dtype).unsqueeze(1) * g[indices]).T @ rest[indices]
    emptied = torch.ones(len(x), 1, dtype=x.dtype).index_fill_(0, indices, 0)
    return dw, (x * emptied, g * emptied)


@pytest.mark.parametrize(
    ("scheme", "shape", "dtype", "k"),
    pairwise(
        [("priority", "none"), ("weightedk", "residual"), ("priority", "subspace")],
        [*SHAPES, (129, 129, 17)],
        LOW,
        [1, 17, 128],
    ),
)
def test_rounding_error_is_at_most_twice_that_of_torch(scheme, shape, dtype, k, selections):
    config = flat_config(k=k, rank=4, side="input", selection=scheme[0], memory=scheme[1])
    memory = new_memory(config, *shape[1:])
    slots = {torch.float64: None, dtype: None}
    if config.row_memory:
        for kept in slots:
            slots[kept] = tuple(torch.zeros(shape[0], n, dtype=kept) for n in shape[1:])
    for _ in range(3):
        x, g = operands(*shape, dtype)
        selections.clear()
        dw = weight_grad(x, g, config, memory)
        assert dw.dtype == dtype
        everything = Selection(torch.arange(shape[0]), torch.ones(shape[0]))
        selection = selections[0] if selections else everything
        basis = None
        if config.memory_name == "subspace" and selections:
            basis = memory.basis.to(dtype)
        results = {}
        for kept, (a, b, q) in ((torch.float64, dequantized(x, g, basis)), (dtype, (x, g, basis))):
            results[kept], after = plain(a, b, selection, slots[kept], q)
            slots[kept] = after if config.row_memory else None
        exact, torchs = results[torch.float64], results[dtype].double()
        tiny = torch.finfo(dtype).eps * exact.abs().max()
        assert (dw.double() - exact).abs().max() <= 2 * (torchs - exact).abs().max() + tiny


def test_float16_gradient_that_dense_can_hold_does_not_overflow():
    config = MemAOPConfig(k=32, memory=Subspace(rank=4))
    memory = new_memory(config, 1024, 8)
    x, g = torch.ones(512, 1024).half(), torch.full((512, 8), 8.0).half()
    for _ in range(2):
        dw = weight_grad(x, g, config, memory)
        torch.testing.assert_close(dw, g.T @ x, rtol=1e-2, atol=0)


def test_weights_do_not_overflow_float16():
    config = MemAOPConfig(k=1, selection="uniform", memory="none")
    x, g = torch.full((1024, 4), 1e-2).half(), torch.full((1024, 3), 100.0).half()
    torch.testing.assert_close(weight_grad(x, g, config), g.T @ x, rtol=1e-2, atol=0)


EXPANDED = {
    "expanded-rows": lambda t: t[:1].expand_as(t),
    "expanded-columns": lambda t: t[:, :1].expand_as(t),
    "expanded-scalar": lambda t: t[0, 0].expand_as(t),
}


@pytest.mark.parametrize("layout", [*LAYOUTS[1:], *EXPANDED])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_strides_do_not_matter(memory_scheme, layout, dtype, generator):
    config = flat_config(k=7, rank=2, **memory_scheme)
    memories = [new_memory(config, 12, 9) for _ in range(2)]
    # Z is rounded to bfloat16 before its norms are taken, or after, by whoever takes the layout.
    size = 1e-9 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    for seed in range(3):
        x, g = operands(33, 12, 9, dtype)
        x, g = (EXPANDED[layout](t) if layout in EXPANDED else laid_out(t, layout) for t in (x, g))
        strided = weight_grad(x, g, config, memories[0], generator=generator(seed))
        x, g = x.clone(memory_format=torch.contiguous_format), g.contiguous()
        dense = weight_grad(x, g, config, memories[1], generator=generator(seed))
        close = {"rtol": size, "atol": size * dense.abs().max().item()}
        torch.testing.assert_close(strided, dense, **close)


def test_empty_batch_gives_zeros_and_leaves_the_memory_alone(scheme, generator, contents, same):
    dtype = torch.float32
    config = flat_config(k=3, rank=2, **scheme)
    memory = new_memory(config, 12, 5)
    weight_grad(*operands(17, 12, 5, dtype), config, memory)
    before = contents(memory)
    draws = generator()
    state = draws.get_state()
    dw = weight_grad(*operands(0, 12, 5, dtype), config, memory, generator=draws)
    assert dw.dtype == dtype
    assert torch.equal(dw, torch.zeros(5, 12, dtype=dtype))
    assert same(contents(memory), before)
    assert torch.equal(draws.get_state(), state)


@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
@pytest.mark.parametrize("rows", [15, 129, 257])
@pytest.mark.parametrize("memory", ["none", "residual"])
def test_blocks_are_picked_whole_by_the_sum_of_their_scores(block_rows, rows, memory):
    config = MemAOPConfig(ratio=0.5, selection="topk", memory=memory, block_rows=block_rows)
    kept, (x, g) = new_memory(config, 6, 4), operands(rows, 6, 4)
    scores = x.norm(dim=1) * g.norm(dim=1)
    blocks = scores.split(block_rows)
    count = max(1, (config.num_rows(rows) + block_rows // 2) // block_rows)
    best = sorted(range(len(blocks)), key=lambda b: -blocks[b].sum())[:count]
    chosen = torch.cat([torch.arange(rows).split(block_rows)[b] for b in best])
    torch.testing.assert_close(weight_grad(x, g, config, kept), g[chosen].T @ x[chosen])
    if memory == "residual" and len(chosen) < rows:
        assert torch.equal((~kept.filled).nonzero()[:, 0], chosen.sort().values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_memory_dtype_is_the_storage_and_not_the_result(dtype, stored):
    config = MemAOPConfig(k=5, selection="topk", memory=Rows(dtype=stored))
    memory = new_memory(config, 12, 9)
    slots = None
    for _ in range(2):
        x, g = operands(17, 12, 9, dtype)
        expected = weight_grad_reference(*dequantized(x, g), config, memory=slots)
        slots = expected.memory
        dw = weight_grad(x, g, config, memory)
        assert dw.dtype == dtype
        assert memory.x.dtype == memory.g.dtype == stored
        eps = max(torch.finfo(stored).eps, torch.finfo(dtype).eps)
        torch.testing.assert_close(dw.double(), expected.weight_grad, rtol=8 * eps, atol=16 * eps)


@pytest.mark.parametrize("memory", ["none", "subspace"])
def test_bernoulli_that_draws_no_row_has_the_part_in_the_subspace_alone(memory):
    config = flat_config(k=1, selection="bernoulli", memory=memory, rank=3, side="input")
    memory = new_memory(config, 12, 5)
    x, g = operands(17, 12, 5)
    basis = torch.zeros(12, 1, dtype=torch.float64)
    if memory is not None:
        memory.begin_step(x, g, config)
        basis = memory.basis.clone()
    selection = Selection(torch.arange(5), torch.zeros(5, dtype=torch.float64))
    poison = torch.full((5, 12), torch.nan, dtype=torch.float64)
    del poison
    dw = weight_grad(x, g, config, memory, selection=selection)
    torch.testing.assert_close(dw, g.T @ (x @ basis) @ basis.T)
