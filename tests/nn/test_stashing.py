"""Layers that keep their inputs in a few bits: what is held, what is shared, what stays legal."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memaop_triton import MemAOPConfig, MemAOPLinear, Rows, convert_
from memaop_triton.nn import stashing

ROWS, SIZE = 512, 256
INT4 = MemAOPConfig(ratio=1 / 8, stash="int4")


def layer(config=INT4, inputs=SIZE, outputs=SIZE, **kwargs):
    torch.manual_seed(0)
    return MemAOPLinear(inputs, outputs, config=config, **kwargs)


def rows(*shape, **kwargs):
    return torch.randn(*(shape or (ROWS, SIZE)), **kwargs)


class Held:
    """Bytes that a graph holds for the backward pass, every storage once, without Parameters."""

    def __init__(self, model):
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages = {}

    def pack(self, a):
        storage = a.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return a

    @property
    def nbytes(self):
        return sum(self.storages.values())


def held_by(model, x):
    held = Held(model)
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda a: a):
        y = model(x)
    y.sum().backward()
    return held.nbytes


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 0.16), (torch.bfloat16, 0.30)], ids=["float32", "bfloat16"]
)
def test_bytes_of_the_default_memory(dtype, most):
    ours = layer(inputs=1024, outputs=64, dtype=dtype)
    x = rows(2048, 1024, dtype=dtype)
    ours(x).sum().backward()  # the basis
    assert held_by(ours, x) <= most * x.nbytes


def test_bytes_of_int8_are_a_quarter():
    ours = layer(MemAOPConfig(memory=None, stash="int8"))
    x = rows()
    assert held_by(ours, x) == ROWS * (SIZE + 2 * SIZE // 64 + 4) + 8


class Attention(nn.Module):
    """Three layers that are fed by one tensor, which nobody else keeps."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(SIZE, SIZE) for _ in range(3))

    def forward(self, x):
        x = x + 1
        return self.q(x) + self.k(x) + self.v(x)


@pytest.mark.parametrize("memory", ["none", "subspace"])
def test_layers_that_are_fed_by_one_tensor_share_a_stash(memory):
    config = MemAOPConfig(memory=memory, stash="int4")
    model, alone = convert_(Attention(), config), layer(config)
    x = rows(requires_grad=True)
    for _ in range(10):  # until every layer has a basis
        (model(x).sum() + alone(x).sum()).backward()
    assert held_by(model, x) <= 1.01 * held_by(alone, x * 1)


def test_nothing_is_shared_by_another_version_or_tensor():
    model = layer(MemAOPConfig(memory=None, stash="int4"))
    x = rows() + 1
    first = model(x).grad_fn.saved_tensors[2].clone()
    assert not torch.equal(model(x).grad_fn.saved_tensors[2], first)  # the first graph is gone
    y1 = model(x)
    y2 = model(x)
    assert all(map(torch.equal, y1.grad_fn.saved_tensors[2:], y2.grad_fn.saved_tensors[2:]))
    x += 1
    assert not torch.equal(model(x).grad_fn.saved_tensors[2], y1.grad_fn.saved_tensors[2])
    assert not torch.equal(model(x + 0).grad_fn.saved_tensors[2], y1.grad_fn.saved_tensors[2])


def test_a_stash_goes_with_the_last_of_its_layers():
    model = layer()
    x = rows()
    y = model(x)
    (kept,) = [one for one in stashing._recent.made if one.source() is x]
    assert kept.tensors[0]() is not None
    y.sum().backward()
    gc.collect()
    assert kept.tensors[0]() is None
    assert kept.source() is x


KEPT = {
    "relu": F.relu,
    "relu-in-place": lambda x: F.relu_(x * 1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softmax": lambda x: F.softmax(x, 1),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "exp": torch.exp,
    "elu-in-place": lambda x: F.elu_(x * 1),
    "leaky_relu-in-place": lambda x: F.leaky_relu_(x * 1),
    "a view of it": lambda x: F.relu(x).view(2, -1, SIZE).transpose(0, 1)[:, :1].squeeze(1),
}
FREED = {
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "layer_norm": lambda x: F.layer_norm(x, (SIZE,)),
    "sum": lambda x: x + 1,
    "a copy": lambda x: F.relu(x).clone(),
    "dropout": F.dropout,
}


@pytest.mark.parametrize("name", KEPT | FREED)
def test_what_its_maker_keeps_anyway_is_kept_as_it_is(name):
    make = (KEPT | FREED)[name]
    x = make(rows(requires_grad=True))
    # By what autograd says itself.
    node, storages = x.grad_fn, set()
    while node is not None:
        saved = (getattr(node, n) for n in dir(node) if n.startswith("_saved_"))
        storages |= {a.untyped_storage().data_ptr() for a in saved if isinstance(a, torch.Tensor)}
        node = next((n for n, _ in node.next_functions), None)
    assert (x.untyped_storage().data_ptr() in storages) == (name in KEPT)
    ours = layer(MemAOPConfig(memory=None, stash="int4"))
    saved = ours(x).grad_fn.saved_tensors
    assert (saved[0] is not None) == (name in KEPT)
    assert len(saved) == (2 if name in KEPT else 8)


def test_parameters_as_inputs_are_kept_as_they_are():
    ours, x = layer(), nn.Parameter(rows())
    assert len(ours(x).grad_fn.saved_tensors) == 2
    assert len(ours(x.view(2, -1, SIZE)).grad_fn.saved_tensors) == 2


def test_a_frozen_weight_and_inference_keep_nothing():
    ours = layer().requires_grad_(False)
    y = ours(rows(requires_grad=True))
    assert len(y.grad_fn.saved_tensors) == 2
    assert y.grad_fn.saved_tensors[0] is None
    ours = layer()
    with torch.no_grad():
        ours(rows())
    with torch.inference_mode():
        ours(rows())
    assert ours.eval()(rows()).grad_fn.name() == "AddmmBackward0"


def test_inputs_that_were_made_in_inference_mode():
    with torch.inference_mode():
        x = rows()
    ours = layer()
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        nn.Linear(SIZE, SIZE)(x)  # a dense layer would have to save it
    ours(x).sum().backward()
    assert ours.weight.grad.isfinite().all()


def test_inputs_may_change_once_they_were_used():
    ours, x = layer(MemAOPConfig(ratio=1, memory=None, stash="int8")), rows()
    exact = torch.ones(SIZE, ROWS) @ x
    y = ours(x)
    x.zero_()
    y.sum().backward()
    torch.testing.assert_close(ours.weight.grad, exact, rtol=0, atol=0.05 * exact.std().item())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("memory", ["none", "subspace"])
def test_activation_checkpointing_draws_the_same_bits(reentrant, memory):
    """Both forward passes of a checkpointed block begin from the same state of the generator."""
    config = MemAOPConfig(ratio=1, memory=memory, stash="int4")
    one, two = layer(config), layer(config)
    x = rows(requires_grad=True)

    def block(model):
        return lambda a: model(a * 2)

    torch.manual_seed(4)
    checkpoint(block(one), x, use_reentrant=reentrant).sum().backward()
    torch.manual_seed(4)
    block(two)(x).sum().backward()
    assert torch.equal(one.weight.grad, two.weight.grad)


def test_offloading_by_saved_tensor_hooks():
    one, two = layer(), layer()
    x = rows()
    torch.manual_seed(4)
    with torch.autograd.graph.save_on_cpu():
        y = one(x)
    y.sum().backward()
    torch.manual_seed(4)
    two(x).sum().backward()
    assert torch.equal(one.weight.grad, two.weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_shares_what_it_has_cast(dtype):
    config = MemAOPConfig(ratio=1, memory=None, stash="int4")
    model = convert_(Attention(), config)
    with torch.autocast("cpu", dtype):
        nbytes = held_by(model, rows(requires_grad=True))
    stash = ROWS * (SIZE // 2 + 2 * SIZE // 64 + 4) + 8
    weights = 3 * SIZE * SIZE * 2  # casts of the Parameters
    assert nbytes <= stash + weights
    assert model.q.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("grad_input", "memory"),
    [("sampled", "none"), ("sampled", "subspace"), ("projected", "subspace")],
)
def test_an_approximate_input_gradient(grad_input, memory):
    ours = layer(MemAOPConfig(memory=memory, grad_input=grad_input, stash="int4"))
    x = rows(requires_grad=True)
    for _ in range(3):
        (ours(x * 1) ** 2).sum().backward()
    assert ours.weight.grad.isfinite().all()
    assert x.grad.isfinite().all()


def test_second_derivatives_are_refused():
    ours, x = layer(), rows(requires_grad=True)
    with pytest.raises(RuntimeError, match="stash='exact'"):
        torch.autograd.grad(ours(x * 1).sum(), x, create_graph=True)


def test_a_budget_and_any_number_of_rows():
    for config in (
        MemAOPConfig(budget=0.3, stash="int4"),
        MemAOPConfig(k=1000, stash="int8"),
        MemAOPConfig(k=1, memory=None, stash="int8", block_rows=16),
    ):
        ours = layer(config)
        for shape in ((SIZE,), (1, SIZE), (0, SIZE), (3, 70, SIZE), (2, 0, SIZE)):
            for _ in range(2):
                ours(rows(*shape)).sum().backward()
                assert ours.weight.grad.isfinite().all()


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (80, 3), (3, 80), (130, 65)])
def test_any_size(inputs, outputs):
    for memory in ("none", "subspace"):
        ours = layer(MemAOPConfig(memory=memory, stash="int4"), inputs, outputs)
        for _ in range(3):
            ours(rows(64, inputs)[::2] + 1).sum().backward()
        assert ours.weight.grad.isfinite().all()


def test_layouts_give_the_same_gradient():
    x = rows(64, 96)
    results = []
    for given in (x, x.T.contiguous().T, F.pad(x, (2, 3))[:, 2:-3], x.view(4, 16, 96)):
        ours = layer(MemAOPConfig(ratio=1, memory=None, stash="int8"), 96, 8)
        ours(given).sum().backward()
        results.append(ours.weight.grad)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0.1, atol=0.2)


def test_copies_and_settings():
    ours = layer()
    ours(rows()).sum().backward()
    twin = copy.deepcopy(ours)
    twin.set_ratio_(1 / 4)
    assert twin.config.stash == "int4"
    assert "stash=int4" in repr(twin)
    twin(rows()).sum().backward()


@pytest.mark.parametrize("memory", ["residual", "signed", Rows(decay=0.5)])
def test_memories_of_rows_are_refused(memory):
    with pytest.raises(ValueError, match="stash='int4'"):
        MemAOPConfig(selection="topk", memory=memory, stash="int4")


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="int2"):
        MemAOPConfig(stash="int2")


def test_a_layer_without_data():
    ours = convert_(nn.Linear(SIZE, SIZE, device="meta"), INT4)
    y = ours(torch.empty(ROWS, SIZE, device="meta"))
    assert y.grad_fn.saved_tensors[2].shape == (ROWS, SIZE // 2)
    with torch.no_grad():
        assert ours(torch.empty(ROWS, SIZE, device="meta")).shape == (ROWS, SIZE)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_equal_models_are_compiled_one_after_the_other():
    """The second one is traced with a symbolic handle."""
    torch.compiler.reset()
    for _ in range(2):
        model = convert_(Attention(), MemAOPConfig(ratio=1, memory=None, stash="int4"))
        torch.compile(model, backend="aot_eager", fullgraph=True)(rows()).sum().backward()
        assert model.q.weight.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_leaves_dropout_what_it_is(reentrant):
    """Layers draw as many seeds in both forward passes, whether they share a stash or not."""
    model, seen = convert_(Attention(), INT4), []

    def block(x):
        y = F.dropout(model(x))
        seen.append(y == 0)
        return y + model.q(F.relu(y))

    checkpoint(block, rows(requires_grad=True), use_reentrant=reentrant).sum().backward()
    first, again = seen
    assert torch.equal(first, again)
