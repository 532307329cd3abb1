"""What the operations of a model save, in 8 bits: what is held, what is left, what stays legal."""

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memaop_triton import CompressedSaved, MemAOPConfig, compress_saved, convert_, model_report
from memaop_triton.bench.measure import Clock
from tests.nn.saving import ROWS, SIZE, bert, block, gradients, held_exactly, made, rows, tokens

CLOCK = Clock(torch.device("cpu"))


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 0.27), (torch.bfloat16, 0.54)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("causal", [True, False], ids=["GPT", "ViT"])
def test_bytes_of_a_block(causal, dtype, most):
    model, x = block(causal=causal, dtype=dtype), rows(8, 64, SIZE, dtype=dtype)
    dense = CLOCK.held_bytes(lambda: model(made(x)))
    compressed = compress_saved(model)
    ours = CLOCK.held_bytes(lambda: model(made(x)))
    assert ours - x.nbytes <= most * (dense - x.nbytes)  # without the output
    assert dense - ours == compressed.exact_bytes - compressed.held_bytes


def test_parameters_masks_integers_statistics_and_batches_stay_as_they_are():
    model = bert()
    model.blocks[0].register_forward_hook(lambda module, args, y: F.dropout(y, 0.1) * model.scale)
    model.register_buffer("scale", torch.full((16, 48, SIZE), 1.5))
    compressed = compress_saved(model)
    left = held_exactly(model(tokens()))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    others = [one for one in left if one[1].tensor.untyped_storage().data_ptr() not in parameters]
    assert len(left) - len(others) > 10
    shown = {(name, str(saved.tensor.dtype)[6:], *saved.tensor.shape) for name, saved in others}
    assert shown == {
        ("EmbeddingBackward0", "int64", 16, 48),
        ("NativeLayerNormBackward0", "float32", 16, 48, 1),
        ("ScaledDotProductFlashAttentionForCpuBackward0", "float32", 16, 4, 48),  # sums
        ("ScaledDotProductFlashAttentionForCpuBackward0", "float32", 16, 1, 1, 48),  # the mask
        ("MulBackward0", "float32", 16, 48, SIZE),  # of the dropout, and the buffer
    }
    assert compressed.held_bytes < 0.27 * compressed.exact_bytes
    assert not any(saved.tensor.requires_grad for name, saved in others if "Mul" in name)


def test_bytes_of_convolutions():
    torch.manual_seed(0)
    parts = [(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(2)]
    model = nn.Sequential(*parts[0], nn.MaxPool2d(2), *parts[1])
    x = rows(16, 16, 32, 32)
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        batch = x.to(memory_format=layout)
        exact = gradients(model, made(batch))
        dense = CLOCK.held_bytes(lambda batch=batch: model(made(batch)))
        with compress_saved(model):
            ours = CLOCK.held_bytes(lambda batch=batch: model(made(batch)))
            error = (gradients(model, made(batch)) - exact).norm() / exact.norm()
        indices = x.numel() // 4 * 8  # of the maxima, integers
        output = x.nbytes // 4
        assert ours - indices - output < 0.27 * (dense - indices)
        assert 0.001 < error < 0.02


def test_a_leaf_and_its_views_stay_with_their_owner():
    model = nn.Sequential(nn.GELU(), nn.LayerNorm(SIZE))
    compressed = compress_saved(model)
    leaf = rows(2 * ROWS, SIZE).requires_grad_()
    for x in (leaf, leaf.view(ROWS, 2, SIZE), leaf.split(ROWS)[1]):
        model(x)
        assert compressed.exact_bytes == x.nbytes  # the norm's input
    with torch.autocast("cpu"):
        torch.manual_seed(0)
        layer = nn.Linear(256, 256)
        compressed = compress_saved(layer)
        layer(made(rows(ROWS, 256)))
        assert compressed.exact_bytes == ROWS * 256 * 2  # not the weight that was cast


def test_a_tensor_is_rounded_once_for_all_that_save_it():
    class Shared(nn.Module):
        def forward(self, x):
            return (
                F.gelu(x) + F.layer_norm(x, (SIZE,)) + x.t().reshape(SIZE, ROWS).t().sigmoid() * x
            )

    module, x = Shared(), rows()
    compressed = compress_saved(module)
    module(made(x))
    # x, and the result of the sigmoid.
    assert compressed.exact_bytes == 2 * x.nbytes


def test_attention_and_the_layer_behind_it_share_its_result():
    model, x = block(causal=False), rows(8, 64, SIZE)
    compressed = compress_saved(model)
    model(made(x))
    # Inputs of norms and what they make, 3 of q, k and v, the result, 2 · 4 around the GELU.
    assert compressed.exact_bytes == (4 + 3 + 1 + 8) * x.nbytes


def test_a_tensor_that_was_changed_before_is_autograds_error():
    class Careless(nn.Module):
        def forward(self, x):
            y = F.gelu(x)
            x.add_(1)
            return y

    module = Careless()
    compressed = compress_saved(module)
    y = module(made(rows()))
    assert compressed.exact_bytes == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_tensor_may_be_changed_afterwards():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.gelu = nn.GELU()

        def forward(self, x, change):
            y = self.gelu(x)
            x.add_(change)
            return y + F.silu(x)  # the same place, other numbers

    module, x = Careful(), rows()
    compressed = compress_saved(module)
    for change in (0.0, 10.0):
        ours, exact = (x.clone().requires_grad_() for _ in range(2))
        module(ours * 1, change).sum().backward()
        (F.gelu(exact) + F.silu(exact + change)).sum().backward()
        assert (ours.grad - exact.grad).norm() < 0.01 * exact.grad.norm()
    assert compressed.exact_bytes == 2 * x.nbytes


def test_with_a_stash():
    model, x = block(causal=True), rows(8, 64, SIZE)
    exact = gradients(model, made(x))
    dense = CLOCK.held_bytes(lambda: model(made(x)))
    convert_(model, MemAOPConfig(ratio=1, memory=None, stash="int4"))
    compressed = compress_saved(model)
    ours = CLOCK.held_bytes(lambda: model(made(x)))
    # Two norms' inputs, q, k and v, the result of the attention, the input of the GELU.
    assert compressed.exact_bytes == (2 + 3 + 1 + 4) * x.nbytes
    assert ours - x.nbytes < 0.24 * (dense - x.nbytes)
    left = [saved.tensor for name, saved in held_exactly(model(made(x))) if "Eager" in name]
    assert sum(a.dtype == torch.uint8 for a in left) == 3  # all but behind the attention
    error = (gradients(model, made(x)) - exact).norm() / exact.norm()
    assert 0.02 < error < 0.2  # of 4 bits
    line = r"^saved by operations, in 8 bits, MiB \(as it was\): 0\.\d+ \(2\.5\)$"
    assert re.search(line, model_report(model), re.MULTILINE)


def test_the_report_of_a_model_that_is_only_compressed():
    model = block(causal=True)
    compressed = compress_saved(model)
    model(made(rows(8, 64, SIZE)))
    assert model_report(model).startswith("saved by operations, in 8 bits")
    compressed.remove()
    with pytest.raises(ValueError, match="has a stash"):
        model_report(model)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_nothing_is_rounded_under_checkpointing(use_reentrant):
    inner = block(causal=True)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    outer, x = Outer(), rows(8, 64, SIZE)
    exact = gradients(outer, made(x))
    compressed = compress_saved(outer)
    assert torch.equal(gradients(outer, made(x)), exact)
    assert compressed.exact_bytes == 0
    compressed.remove()
    # The region that is recomputed, called from outside.
    compress_saved(inner)
    error = (gradients(outer, made(x)) - exact).norm() / exact.norm()
    assert error < 0.01


@pytest.mark.parametrize(
    "hooks",
    [
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda a: a),
    ],
    ids=["offloading", "of tensors"],
)
def test_other_saved_tensor_hooks_go_first(hooks):
    model, x = nn.Sequential(block(causal=True), nn.Tanh()), rows(8, 64, SIZE)
    exact = gradients(model, made(x))
    compressed = compress_saved(model)
    with hooks():
        assert torch.equal(gradients(model, made(x)), exact)
    assert compressed.exact_bytes == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled():
    model, x = block(causal=True), rows(8, 64, SIZE)
    x.requires_grad_()
    exact = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    compressed = compress_saved(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(gradients(compiled, x), exact)
    assert compressed.exact_bytes == 0
    # What is around a compiled part is rounded.
    net = nn.Sequential(nn.LayerNorm(SIZE), compiled, nn.LayerNorm(SIZE))
    compressed = compress_saved(net)
    gradients(net, x)
    assert compressed.exact_bytes == x.nbytes  # the last norm's input


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
def test_scripted_and_traced_parts_and_what_is_converted_later():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh()))
    model, x = nn.Sequential(scripted, nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE)), rows()
    with compress_saved(model) as compressed:
        model(made(x))
        assert compressed.exact_bytes >= x.nbytes  # the norm's input at least
        convert_(model, MemAOPConfig(ratio=1, memory=None, stash="int4"))
        model(made(x))
        names = [
            name for name, saved in held_exactly(model(made(x))) if saved.tensor.shape == x.shape
        ]
        assert "NativeLayerNormBackward0" not in names
    assert not any(module._forward_hooks for module in model.modules())
    plain = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU())
    with compress_saved(plain):
        traced = torch.fx.symbolic_trace(plain)
    assert [node.op for node in traced.graph.nodes][1:-1] == ["call_module"] * 2


def test_copies_and_pickles_compress_with_their_own_tensors():
    model, x = block(causal=True), rows(8, 64, SIZE)
    exact = gradients(model, made(x))
    compressed = compress_saved(model)
    model(made(x))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for p in other.parameters():
            p.data.mul_(0.5)
        dense = copy.deepcopy(other)
        (hook,) = {h.__self__ for h in dense._forward_hooks.values()}
        hook.remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())
        assert other._forward_hooks
        expected = gradients(dense, made(x))
        error = (gradients(other, made(x)) - expected).norm() / expected.norm()
        assert 0.001 < error < 0.02
    compressed.remove()
    assert torch.equal(gradients(model, made(x)), exact)


def test_ends_with_its_context_and_survives_errors():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.GELU(), nn.GELU())

        def forward(self, x, fails):
            x = self.part(x)
            if fails:
                raise ArithmeticError
            return x

    module, x = Failing(), rows()
    with compress_saved(module) as compressed:
        assert isinstance(compressed, CompressedSaved)
        for _ in range(2):
            with pytest.raises(ArithmeticError):
                module(made(x), True)
            module(made(x), False)
            assert compressed.exact_bytes == 2 * x.nbytes
        module.part(made(x))  # a part that is called by itself
        assert compressed.exact_bytes == 2 * x.nbytes
        with torch.no_grad():  # an evaluation
            module(x, False)
        assert compressed.exact_bytes == 2 * x.nbytes
    y = module(made(x), False)
    assert compressed.exact_bytes == 2 * x.nbytes, "of when it was compressed"
    assert len(held_exactly(y)) > 1


def test_what_made_the_inputs_is_not_looked_at():
    before, model, x = nn.GELU(), nn.LayerNorm(SIZE), rows()
    compressed = compress_saved(model)
    h = before(made(x))
    y = model(h)
    assert compressed.exact_bytes == h.nbytes
    names = [name for name, saved in held_exactly(y) if saved.tensor.numel() == x.numel()]
    assert names == ["GeluBackward0"]


def test_in_evaluation_and_under_autocast():
    model, x = block(causal=True).eval(), rows(8, 64, SIZE)
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            exact = gradients(model, made(x))
            with compress_saved(model) as compressed:
                error = (gradients(model, made(x)) - exact).norm() / exact.norm()
        assert compressed.exact_bytes > 10 * x.nbytes * dtype.itemsize / 4
        assert 0.001 < error < 0.02


def test_second_derivatives():
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, 1))

    def gradient_of_a_penalty():
        model.zero_grad()
        leaf = rows().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf * 1).sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        return model[0].weight.grad.clone()

    torch.manual_seed(0)
    exact = gradient_of_a_penalty()
    compressed = compress_saved(model)
    error = (gradient_of_a_penalty() - exact).norm() / exact.norm()
    assert compressed.exact_bytes > 0
    assert 1e-4 < error < 0.02


def test_transforms_of_torch_func_see_exact_tensors():
    model, x = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU()), rows()

    def loss(parameters):
        return torch.func.functional_call(model, parameters, x).square().sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    exact = torch.func.grad(loss)(parameters)
    compressed = compress_saved(model)
    for name, gradient in torch.func.grad(loss)(parameters).items():
        assert torch.equal(gradient, exact[name])
    assert compressed.exact_bytes == 0


def test_other_dtypes_and_small_tensors_stay_as_they_are():
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU(), nn.LayerNorm(SIZE))
    for a in (rows(100), rows(ROWS, dtype=torch.float64)):
        x = a.unsqueeze(1).expand(-1, SIZE).contiguous()
        model.to(x.dtype)
        compressed = compress_saved(model)
        exact = gradients(model, made(x))
        assert torch.equal(gradients(model, made(x)), exact)
        assert compressed.exact_bytes == 0
