import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memaop_triton import MemAOPConfig, Subspace, memaop_linear, new_memory
from memaop_triton.backward.weight_grad import weight_grad
from memaop_triton.kernels import targets
from tests.pairwise import pairwise
from tests.schemes import LEGAL, UNBIASED, flat_config


def operands(rows, inputs=12, outputs=5, dtype=torch.float64):
    return torch.randn(rows, inputs, dtype=dtype), torch.randn(rows, outputs, dtype=dtype)


def test_subspace_memory_holds_an_orthonormal_basis_whatever_the_batch():
    for side, numbers in (("input", 12 * 3), ("grad", 16 * 3), ("auto", (12 + 16) * 3)):
        config = MemAOPConfig(k=3, memory=Subspace(rank=3, side=side))
        memory = new_memory(config, 12, 16)
        for rows in (17, 170, 5):
            weight_grad(*operands(rows, 12, 16, torch.float32), config, memory)
            assert memory.nbytes == numbers * 4
            torch.testing.assert_close(memory.basis.T @ memory.basis, torch.eye(3))


@pytest.mark.parametrize("memory", ["residual", "signed"])
def test_row_memory_has_a_slot_for_every_row_of_the_longest_batch(memory):
    config = MemAOPConfig(k=2, selection="topk", memory=memory)
    kept = new_memory(config, 12, 5)
    weight_grad(*operands(8), config, kept)
    assert kept.nbytes == 8 * (12 + 5) * 8 + 8
    assert kept.filled.sum() == 6
    weight_grad(*operands(6), config, kept)
    assert kept.rows == 8
    weight_grad(*operands(11), config, kept)
    assert kept.rows == 11
    assert kept.filled.sum() == 9


def test_subspace_finds_and_follows_the_leading_directions():
    config = MemAOPConfig(k=8, memory=Subspace(rank=2, side="input", refresh_every=2))
    memory = new_memory(config, 12, 5)
    for axes in ([0, 1], [4, 7]):
        for _ in range(8):
            x, g = operands(64)
            x[:, axes] *= 30
            weight_grad(x, g, config, memory)
        assert memory.basis[axes].norm() > 0.99 * math.sqrt(2)


def test_subspace_of_float16_inputs_with_a_large_mean_follows_it():
    config = MemAOPConfig(k=8, memory=Subspace(rank=4, side="input", refresh_every=1))
    memory = new_memory(config, 256, 5)
    for _ in range(4):
        x = (10 + torch.randn(4096, 256)).half()
        weight_grad(x, torch.randn(4096, 5).half(), config, memory)
    assert (memory.basis.T @ torch.full((256,), 1 / 16.0)).norm() > 0.99


BAD_ROWS = {"one": [3], "more-than-k": [0, 2, 3, 5, 8, 9]}
SAMPLED = [
    scheme | {"memory": memory, "grad_input": "sampled"}
    for scheme in UNBIASED
    for memory in ("none", "subspace")
]


@pytest.mark.parametrize(
    ("scheme", "where", "value", "bad"),
    pairwise(LEGAL + SAMPLED, ["x", "g", "xg"], [math.nan, math.inf], BAD_ROWS),
)
def test_rows_that_are_not_finite_reach_the_gradients_and_never_stay(
    scheme, where, value, bad, contents
):
    config = flat_config(k=4, rank=2, refresh_every=1, **scheme)
    memory = new_memory(config, 12, 5)
    w = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    for is_bad in (True, False, True, False):
        x, g = operands(17)
        for name, operand in (("x", x), ("g", g)):
            if is_bad and name in where:
                operand[BAD_ROWS[bad]] = value
        x.requires_grad_()
        dx, dw = torch.autograd.grad(memaop_linear(x, w, None, config, memory), (x, w), g)
        assert dw.isfinite().any() == dw.isfinite().all() == (not is_bad)
        assert dx.isfinite().all() != (is_bad and where != "x")
        assert all(t.isfinite().all() for t in contents(memory).values())


@pytest.mark.parametrize("memory", ["residual", "signed"])
def test_clean_step_after_a_bad_row_is_that_of_the_definition(memory):
    config = MemAOPConfig(k=17, selection="topk", memory=memory)
    keep_all = MemAOPConfig(k=2, selection="topk", memory=memory)
    kept = new_memory(config, 12, 5)
    x, g = operands(17)
    x[3] = math.nan
    weight_grad(x, g, keep_all, kept)
    assert not kept.filled[3]
    mx, mg = (torch.where(kept.filled[:, None], t, 0) for t in (x, g))
    x, g = operands(17)
    torch.manual_seed(3)
    signs = torch.ones(17, 1, dtype=torch.float64)
    if memory == "signed":
        signs = 2 * torch.empty(17, dtype=torch.float64).bernoulli_(0.5)[:, None] - 1
    torch.manual_seed(3)
    dw = weight_grad(x, g, config, kept)
    torch.testing.assert_close(dw, (signs * mg + g).T @ (signs * mx + x))


class LivingBytes(TorchDispatchMode):
    """Counts the storage that operations make, while anything still refers to it."""

    def __init__(self):
        super().__init__()
        self.living, self.peak = weakref.WeakValueDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage._cdata for storage in storages_in((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = [storage for storage in storages_in(result) if storage._cdata not in given]
        self.living.update({storage._cdata: storage for storage in made})
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.living.values()))
        return result


def storages_in(values):
    return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_the_gathered_rows_and_a_few_vectors(scheme, dtype):
    rows = 4096 if dtype == torch.float32 else 32768
    inputs, outputs, rank = 256, 192, 16
    config = flat_config(ratio=1 / 8, rank=rank, **scheme)
    memory = new_memory(config, inputs, outputs)
    x, g = operands(rows, inputs, outputs, dtype)
    for _ in range(2):
        weight_grad(x, g, config, memory)
    with LivingBytes() as count:
        dw = weight_grad(x, g, config, memory)
    gathered = config.num_rows(rows) * (inputs + outputs) * x.element_size()
    vectors = 12 * rows * 8
    converted_chunks = 0 if dtype == torch.float32 else 6 * (1 << 20)
    drawn = 1.3 if config.selection == "bernoulli" else 1
    subspace = 0
    if config.memory_name == "subspace":
        subspace = 2 * rows * rank * x.element_size() + 4 * rank * (inputs + outputs) * 4
    budget = drawn * gathered + vectors + subspace + converted_chunks
    assert dw.nbytes < count.peak < dw.nbytes + budget
    assert budget < 0.8 * (x.nbytes + g.nbytes)


@pytest.mark.parametrize("refresh_every", [1, 3])
def test_the_basis_is_refreshed_every_few_steps_captured_or_not(refresh_every, monkeypatch):
    """The steps of a graph count on the device, and every replay decides there."""
    memory = Subspace(rank=3, side="input", refresh_every=refresh_every)
    config = MemAOPConfig(k=3, memory=memory)
    eager, captured = new_memory(config, 12, 5), new_memory(config, 12, 5)
    batches = [operands(17, dtype=torch.float32) for _ in range(10)]
    for memory in (eager, captured):
        torch.manual_seed(1)
        weight_grad(*batches[0], config, memory)
    captured._clock._replayed = torch.zeros(1, dtype=torch.int64)  # as on a GPU
    monkeypatch.setattr(targets, "is_capturing", lambda device: True)
    address = captured.basis.data_ptr()
    for step, batch in enumerate(batches[1:], start=2):
        before = eager.basis.clone()
        for memory in (eager, captured):
            torch.manual_seed(2)
            weight_grad(*batch, config, memory)
        assert torch.equal(eager.basis, before) == (step % refresh_every != 0)
        assert torch.equal(captured.basis, eager.basis)
        assert captured.step == eager.step == step
    assert captured.basis.data_ptr() == address
