"""Divided layers under every selection and memory, against the definition."""

import itertools

import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
)

from memaop_triton.config import UNBIASED_SELECTIONS
from tests.distributed.checks import batch, everywhere, same_everywhere, whole
from tests.distributed.tensor_parallel_cases import (
    ROWS,
    columns,
    linear,
    parallel,
    recording,
    times_drawn,
)
from tests.schemes import LEGAL, flat_config

SCHEMES = [
    *LEGAL,
    *(s | {"grad_input": "sampled"} for s in LEGAL if s["selection"] in UNBIASED_SELECTIONS),
    {"selection": "priority", "memory": "subspace", "grad_input": "projected"},
]


def assert_input_grad(layer, dx, g_here, by_row, agreed):
    """dX of a layer with a subspace: each process splits the columns of G that it has."""
    q = layer.memory.basis_for_input_grad(g_here)
    rest = g_here - g_here @ q @ q.T
    total = times_drawn(agreed.selections[1])
    parts = everywhere((g_here - rest + total * rest) @ layer.weight.to_local())
    torch.testing.assert_close(dx, torch.cat(list(parts), 1) if by_row else parts.sum(0))
    want = everywhere(rest.square().sum(1)).sum(0)
    torch.testing.assert_close(agreed.scores[1], want.sqrt())


def check_every_selection_and_memory_adds_up_what_it_selected():
    """Weights, rows and memories against the definition, each process drawing for itself."""
    for scheme, style in itertools.product(SCHEMES, (ColwiseParallel, RowwiseParallel)):
        config = flat_config(k=6, rank=2, refresh_every=99, **scheme)
        by_row = style is RowwiseParallel
        layouts = {"": style(input_layouts=Replicate(), output_layouts=Replicate())}
        plain = linear()
        layer = parallel(plain, config, layouts, True)
        for number in range(3):
            x, g = batch(ROWS, 12, step=number), batch(ROWS, 8, step=50 + number)
            x_here, g_here = (columns(x), g) if by_row else (x, columns(g))
            filled = None if layer.memory is None else getattr(layer.memory, "filled", None)
            before = None if filled is None else (layer.memory.x.clone(), filled.clone())
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            with recording() as agreed:
                layer(leaf).backward(g)
            memory = layer.memory
            is_split = config.grad_input_name == "sampled" and config.memory_name == "subspace"
            for indices, weights in agreed.selections:
                assert same_everywhere(indices)
                assert same_everywhere(weights)
                assert indices.dtype == torch.int64
            assert len(agreed.selections) == len(agreed.scores) == (2 if is_split else 1)
            indices, scores = agreed.selections[0].indices, agreed.scores[0]
            total = times_drawn(agreed.selections[0])
            dw = layer.weight.grad.to_local()
            if config.row_memory:
                expected = memory.g[indices].T @ memory.x[indices]
                want = everywhere((memory.x.norm(dim=1) * memory.g.norm(dim=1)).square()).sum(0)
                assert same_everywhere(memory.filled)
                assert not memory.filled[indices].any()
                carried = memory.x - x_here
                old = before[0] * before[1][:, None] if before else torch.zeros_like(carried)
                if config.memory_name == "signed":
                    carried, old = carried.abs(), old.abs()
                torch.testing.assert_close(carried, old)
            elif config.memory_name == "subspace":
                q = memory.basis.to(x.dtype)
                a, b = (x_here, g_here) if memory.side == "input" else (g_here, x_here)
                rest = a - a @ q @ q.T
                expected = b.T @ (a - rest) + (total * b).T @ rest
                expected = expected if memory.side == "input" else expected.T
                want = everywhere((rest.norm(dim=1) * b.norm(dim=1)).square()).sum(0)
            else:
                expected = (total * g_here).T @ x_here
                want = (x.norm(dim=1) * g.norm(dim=1)).square()
            torch.testing.assert_close(dw, expected)
            if is_split:
                assert_input_grad(layer, leaf.grad, g_here, by_row, agreed)
            elif config.grad_input_name == "sampled":
                # Scored by G alone, of which a layer divided by rows of X has two copies.
                want = g.norm(dim=1).square() * (2 if by_row else 1)
                torch.testing.assert_close(leaf.grad, (total * g) @ plain.weight)
            elif config.grad_input_name == "projected":
                q = memory.projection.basis
                parts = everywhere(g_here @ layer.weight.to_local() @ q @ q.T)
                whole_dx = torch.cat(list(parts), 1) if by_row else parts.sum(0)
                torch.testing.assert_close(leaf.grad, whole_dx)
            torch.testing.assert_close(scores, want.sqrt())
            torch.testing.assert_close(whole(layer.bias.grad), g.sum(0))
