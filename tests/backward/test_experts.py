import itertools

import pytest
import torch

from memaop_triton import MemAOPConfig
from memaop_triton.backward import experts, gathered
from memaop_triton.backward.experts import experts_weight_grad
from memaop_triton.backward.step import Operands
from tests.schemes import UNBIASED, flat_config, label

ENDS = torch.tensor([10, 10, 25, 40], dtype=torch.int32)  # the second has no row
ROWS, INPUTS, OUTPUTS = 40, 16, 8


@pytest.fixture
def batch():
    """Rows whose sizes differ, also between the experts."""
    scale = torch.linspace(0.2, 2, ROWS, dtype=torch.float64).unsqueeze(1)
    x = scale * (torch.randn(ROWS, INPUTS, dtype=torch.float64) + 0.5)
    return x, scale.flip(0) * torch.randn(ROWS, OUTPUTS, dtype=torch.float64)


def dense(x, g, ends=ENDS):
    places = itertools.pairwise([0, *ends.tolist()])
    return torch.stack([g[first:end].T @ x[first:end] for first, end in places])


@pytest.mark.parametrize("is_transposed", [False, True])
def test_all_rows_give_the_gradients_themselves(batch, is_transposed):
    exact = MemAOPConfig(ratio=1, memory=None)
    found = experts_weight_grad(*batch, ENDS, exact, is_transposed=is_transposed)
    expected = dense(*batch)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected.mT if is_transposed else expected)


@pytest.mark.parametrize("unbiased", UNBIASED, ids=label)
@pytest.mark.parametrize("block_rows", [1, 16])
def test_the_mean_is_the_gradient_of_each_expert(batch, unbiased, block_rows, mean_agrees):
    config = flat_config(k=10, memory="none", block_rows=block_rows, **unbiased)
    draws = [experts_weight_grad(*batch, ENDS, config) for _ in range(400)]
    for expert, expected in enumerate(dense(*batch)):
        if expert == 1:
            assert not any(draw[expert].any() for draw in draws)
        else:
            mean_agrees([draw[expert] for draw in draws], expected)


def test_one_selection_takes_the_largest_rows_of_all_experts(batch):
    x, g = batch
    config = MemAOPConfig(k=12, selection="topk", memory=None)
    scores = x.norm(dim=1) * g.norm(dim=1)
    left = scores.argsort()[:-12]
    x[left] = 0
    torch.testing.assert_close(experts_weight_grad(*batch, ENDS, config), dense(x, g))


@pytest.mark.parametrize("has_kernel", [False, True])
def test_the_host_looks_at_the_draws_only_where_a_block_is_cut_short(
    batch, has_kernel, monkeypatch
):
    cut = []

    def recorded(self, scores, *, cut_short=True):
        cut.append(cut_short)
        return original(self, scores)

    original = Operands.select
    monkeypatch.setattr(Operands, "select", recorded)
    if has_kernel:
        pytest.importorskip("triton")
        monkeypatch.setattr(experts, "parts_for", lambda g: gathered._triton())
    config = MemAOPConfig(ratio=1 / 2, memory=None, block_rows=16)
    for rows in (32, 40):
        experts_weight_grad(*(a[:rows] for a in batch), ENDS.clamp(max=rows), config)
    assert cut == ([False, True] if has_kernel else [True, True])


def test_rows_are_as_many_whatever_the_router_does(batch, monkeypatch):
    taken = []

    def recorded(x, g, ends, is_transposed):
        taken.append((len(x), len(g), ends[-1].item()))
        return original(x, g, ends, is_transposed)

    original = experts._products
    monkeypatch.setattr(experts, "_products", recorded)
    for ends in (ENDS, torch.tensor([40, 40, 40, 40]), torch.tensor([0, 0, 0, 40])):
        found = experts_weight_grad(*batch, ends, MemAOPConfig(ratio=1 / 4, memory=None))
        places = itertools.pairwise([0, *ends.tolist()])
        assert not any(dw.any() for dw, (a, b) in zip(found, places, strict=True) if a == b)
    assert taken == [(10, 10, 10)] * 3


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("ratio", [1, 1 / 2])
def test_the_grouped_product_of_pytorch_computes_the_same(batch, is_transposed, ratio, monkeypatch):
    x, g = (a.bfloat16() for a in batch)
    found = []
    # That of the CPU stands for the kernel of a GPU, which takes the same operands.
    for is_grouped in (False, True):
        monkeypatch.setattr(experts, "_has_grouped_product", lambda *_, way=is_grouped: way)
        torch.manual_seed(0)
        config = MemAOPConfig(ratio=ratio, memory=None)
        found.append(experts_weight_grad(x, g, ENDS, config, is_transposed=is_transposed))
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=0.02)


def test_where_there_is_a_grouped_product(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    def found(dtype, columns):
        rows = torch.zeros(4, columns, dtype=dtype).as_subclass(OnGpu)
        return experts._has_grouped_product(rows, rows)

    assert found(torch.bfloat16, 24)
    assert not found(torch.bfloat16, 20), "rows that are not aligned"
    assert not found(torch.float32, 24)
    assert not experts._has_grouped_product(*[torch.zeros(4, 24).bfloat16()] * 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not found(torch.bfloat16, 24)


@pytest.mark.parametrize("sizes", [(0, INPUTS, OUTPUTS), (4, 0, OUTPUTS), (4, INPUTS, 0)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_nothing_at_all(sizes, is_transposed):
    rows, n, p = sizes
    ends = torch.tensor([0, rows])
    x, g = torch.randn(rows, n), torch.randn(rows, p)
    found = experts_weight_grad(x, g, ends, MemAOPConfig(), is_transposed=is_transposed)
    assert found.shape == ((2, n, p) if is_transposed else (2, p, n))
    assert not found.any()
