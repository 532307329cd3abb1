"""Dropout in front of a layer with a stash: bits of a mask, beside a stash of what came before."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memaop_triton import MemAOPConfig, MemAOPLinear
from memaop_triton.monitor.kept import kept_bytes
from memaop_triton.nn.dropout import MaskedDropout

ROWS, INPUTS, OUTPUTS = 96, 64, 4
P = 0.3
EXACT = MemAOPConfig(ratio=1, memory="none", stash="int4")
INT8 = MemAOPConfig(ratio=1, memory="none", stash="int8")
SAMPLED = MemAOPConfig(ratio=1 / 4, memory="none", stash="int4")
STASH_BYTES = ROWS * (INPUTS // 2 + 2 + 4) + 8
MASK_BYTES = ROWS * INPUTS // 8 + 8


def layer(config=EXACT, **kwargs):
    return MemAOPLinear(INPUTS, OUTPUTS, bias=False, config=config, **kwargs)


def inputs():
    return torch.randn(ROWS, INPUTS) + 1  # made by an operation that keeps nothing


def close(gradient, exact):
    """As close as a stash of 8 bits makes it."""
    torch.testing.assert_close(gradient, exact, rtol=0, atol=0.05 * exact.abs().max().item())


def seeded(call, seed=3):
    torch.manual_seed(seed)
    return call()


class Held:
    """Bytes of the storages that autograd saved, the weights' left out."""

    def __init__(self, model):
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.sizes = {}

    def __call__(self, a):
        storage = a.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return a

    @classmethod
    def by(cls, model, call):
        held = cls(model)
        with torch.autograd.graph.saved_tensors_hooks(held, lambda a: a):
            result = call()
        return result, sum(held.sizes.values())


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(16, 24), (3, 5, 7), (11,)])
def test_it_equals_pytorchs_with_one_seed(p, shape):
    x = torch.randn(shape, requires_grad=True)
    g = torch.randn(shape)
    ours, theirs = MaskedDropout(p), nn.Dropout(p)
    y, expected = seeded(lambda: ours(x)), seeded(lambda: theirs(x))
    assert y.grad_fn.name() == "_DropoutBackward"
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(a, x, g)[0] for a in (y, expected)))


def test_strides_do_not_matter():
    x = torch.randn(24, 16).T.requires_grad_()
    y = seeded(lambda: MaskedDropout(P)(x))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx * x.detach(), y.detach())


def test_the_second_derivative():
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    drop = MaskedDropout(P)
    assert torch.autograd.gradgradcheck(lambda a: seeded(lambda: drop(a) ** 3), x)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_or_everything_is_dropped(p):
    x = torch.randn(5, 8, requires_grad=True)
    y = MaskedDropout(p)(x)
    assert torch.equal(y, nn.Dropout(p)(x))
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((5, 8), 1 - p))


def test_without_training_or_gradients_nothing_is_kept():
    x = inputs().requires_grad_()
    assert MaskedDropout(P).eval()(x) is x
    with torch.no_grad():
        expected = seeded(lambda: nn.Dropout(P)(x))
        assert torch.equal(seeded(lambda: MaskedDropout(P)(x)), expected)


@pytest.mark.parametrize("config", [EXACT, SAMPLED], ids=["exact", "sampled"])
def test_the_weight_gradient_is_right_in_the_mean(config):
    ours, drop, count = layer(config), MaskedDropout(P), 300
    # The rows differ much, so that those that are sampled matter.
    x, g = inputs() * torch.rand(ROWS, 1) * 2, torch.randn(ROWS, OUTPUTS) * torch.rand(ROWS, 1)
    dropped = drop(x)
    exact = g.T @ dropped.detach()
    draws = [torch.autograd.grad(ours(dropped), ours.weight, g)[0].clone() for _ in range(count)]
    draws = torch.stack(draws)
    assert ours.layer_state.kept.mask_bytes
    assert not torch.equal(draws[0], draws[1])
    square_error = (draws.mean(0) - exact).square().sum()
    expected = draws.var(0).sum() / count
    assert square_error <= expected * (1 + 4 * (2 / exact.numel()) ** 0.5)


def test_the_input_gradient_is_exact():
    ours, drop, x = layer(), MaskedDropout(P), inputs().requires_grad_()
    dense = nn.Linear(INPUTS, OUTPUTS, bias=False)
    dense.load_state_dict(ours.state_dict())
    for model, dropout in ((ours, drop), (dense, nn.Dropout(P))):
        seeded(lambda d=dropout, m=model: m(d(x)).square().sum().backward())
    both = x.grad
    x.grad = None
    seeded(lambda: ours(drop(x)).square().sum().backward())
    assert torch.equal(both, 2 * x.grad)


@pytest.mark.parametrize("layers", [1, 3])
def test_bytes_of_a_stash_and_a_mask_for_each_layer(layers):
    model = nn.ModuleList(layer() for _ in range(layers))
    drop, x = MaskedDropout(P), inputs()
    _, nbytes = Held.by(model, lambda: [one(drop(x)) for one in model])
    assert nbytes == STASH_BYTES + layers * MASK_BYTES
    kept = [one.layer_state.kept for one in model]
    assert len({id(one.stash) for one in kept}) == 1
    counted = kept_bytes({str(i): one.layer_state for i, one in enumerate(model)}).values()
    assert [one.ours for one in counted] == [
        STASH_BYTES * (i == 0) + ROWS * INPUTS // 8 for i in range(layers)
    ]


def test_a_layer_without_dropout_shares_the_stash():
    model, x = nn.ModuleList([layer(), layer()]), inputs()
    drop = MaskedDropout(P)
    _, nbytes = Held.by(model, lambda: (model[0](drop(x)), model[1](x)))
    assert nbytes == STASH_BYTES + MASK_BYTES


def test_autocast_shares_a_stash_of_the_cast():
    model = nn.ModuleList(layer(INT8) for _ in range(3))
    drop, x = MaskedDropout(P), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        dropped = [drop(x) for _ in model]
        results, nbytes = Held.by(model, lambda: list(map(nn.Module.__call__, model, dropped)))
    weights = 3 * INPUTS * OUTPUTS * 2  # casts of the Parameters
    assert nbytes <= STASH_BYTES + ROWS * INPUTS // 2 + 3 * MASK_BYTES + weights
    for one, result, given in zip(model, results, dropped, strict=True):
        result.sum().backward()
        close(one.weight.grad, torch.ones(OUTPUTS, ROWS) @ given)


def test_a_stash_beside_a_subspace_is_not_for_masked_rows():
    config = MemAOPConfig(ratio=1 / 4, stash="int8")
    beside = MemAOPLinear(INPUTS, 48, config=config)
    ours, drop = layer(MemAOPConfig(ratio=1 / 4, memory="none", stash="int8")), MaskedDropout(P)
    for _ in range(3):
        x = inputs()
        y = beside(x)
        y.square().sum().backward(retain_graph=True)
    has_inside = beside(x).grad_fn.saved_tensors[-1].shape[0] > 0
    assert has_inside
    y = beside(x)
    z = ours(drop(x))
    assert z.grad_fn.saved_tensors[-1].shape[0] == 0
    assert y.grad_fn.saved_tensors[-1].shape[0] > 0
    z.sum().backward()
    assert ours.weight.grad.isfinite().all()


def test_inputs_that_changed_since_are_not_what_was_dropped():
    for change in ("source", "result"):
        ours, x = layer(INT8), inputs()
        dropped = MaskedDropout(P)(x)
        (x if change == "source" else dropped.detach()).mul_(10)
        exact = torch.ones(OUTPUTS, ROWS) @ dropped.detach()
        ours(dropped).sum().backward()
        assert ours.layer_state.kept.mask_bytes == 0
        close(ours.weight.grad, exact)


def test_dropout_of_dropout():
    ours, x = layer(INT8), inputs()
    dropped = MaskedDropout(P)(MaskedDropout(P)(x))
    ours(dropped).sum().backward()
    exact = torch.ones(OUTPUTS, ROWS) @ dropped.detach()
    close(ours.weight.grad, exact)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(reentrant):
    """Of later dropouts too: as many seeds are drawn when the block is computed again."""
    seen = []

    class Recorded(MaskedDropout):
        def forward(self, x):
            y = super().forward(x)
            seen.append((y == 0).detach().clone())
            return y

    drop, layers = Recorded(P), [layer() for _ in range(3)]

    def block(x):
        y = sum(one(drop(x + 1)) + one(drop(x)) for one in layers) + layers[0](torch.relu(x))
        return y + drop(x).sum()

    checkpoint(block, inputs().requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert len(seen) >= 13  # the last one is not needed again
    assert all(torch.equal(*both) for both in zip(seen[:7], seen[7:], strict=False))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("transform", ["compile", "functorch"])
def test_in_graphs_and_transforms_it_is_pytorchs(transform):
    ours, drop, x = layer(), MaskedDropout(P), inputs()

    def loss(weight):
        return (drop(x) @ weight.T).square().sum()

    def gradient():
        if transform == "functorch":
            return torch.func.grad(loss)(ours.weight)
        compiled = torch.compile(lambda: ours(drop(x)).sum(), backend="aot_eager", fullgraph=True)
        return torch.autograd.grad(compiled(), ours.weight)[0]

    assert gradient().isfinite().all()
    assert ours.layer_state.kept is None or ours.layer_state.kept.mask_bytes == 0


def test_copies():
    drop = copy.deepcopy(MaskedDropout(P))
    assert type(drop) is MaskedDropout
    assert drop.p == P
