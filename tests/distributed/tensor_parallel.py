"""Two processes that share the layers of a model."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from memaop_triton import (
    MemAOPConfig,
    attach_optimizer,
    load_memory_state_dict,
    memory_state_dict,
    reset_memory,
    revert_,
)
from memaop_triton.backward.shards import ProcessShards
from memaop_triton.config import UNBIASED_SELECTIONS
from memaop_triton.sampling.selection import Selection
from tests.distributed.checks import (
    PAPER,
    batch,
    converted,
    everywhere,
    mlp,
    same_everywhere,
    whole,
)
from tests.distributed.tensor_parallel_cases import (
    ROWS,
    assert_same_gradients,
    backward,
    columns,
    linear,
    mesh,
    parallel,
    placed,
    plan,
    rank,
    recording,
    single,
    step,
    times_drawn,
)
from tests.schemes import LEGAL, flat_config

LAYOUTS = {
    "plain": plan(),
    "DTensors": plan({"use_local_output": False}, {"use_local_output": False}),
    "whole activations": plan(
        {"output_layouts": Replicate()},
        {"input_layouts": Replicate(), "output_layouts": Replicate()},
    ),
    # Activations are divided by position outside of the two layers.
    "by position": plan({"input_layouts": Shard(1)}, {"output_layouts": Shard(1)}),
}


def check_training_equals_that_of_an_undivided_model():
    for layouts, convert_first, bias in itertools.product(LAYOUTS, (True, False), (True, False)):
        model = mlp(bias=bias)
        reference = converted(copy.deepcopy(model))
        ours = parallel(model, PAPER, LAYOUTS[layouts], convert_first)
        by_position = layouts == "by position"
        trainers = []
        for trained in (reference, ours):
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
            attach_optimizer(trained, optimizer)
            trainers.append(optimizer)
        for number in range(4):
            x = batch(2, ROWS // 2, 12, step=number).requires_grad_()
            part = x.detach().chunk(2, dim=1)[rank()] if by_position else x.detach()
            part = part.clone().requires_grad_()
            theirs, mine = step(reference, x), step(ours, part)
            for one, other in ((mine, theirs), (part.grad, x.grad)):
                wanted = other.chunk(2, 1)[rank()] if by_position else other
                torch.testing.assert_close(one, wanted)
            assert_same_gradients(ours, reference)
            for optimizer in trainers:
                optimizer.step()
                optimizer.param_groups[0]["lr"] *= 0.5


def check_all_rows_give_the_dense_gradient_in_half_precision_and_under_autocast_too():
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float16
    kinds = [(dtype, False) for dtype in dtypes] + [(torch.float32, True)]
    for (dtype, autocast), memory in itertools.product(kinds, ("none", "subspace")):
        model = mlp(dtype)
        ours = parallel(model, MemAOPConfig(k=ROWS, memory=memory), plan(), True)
        dense = parallelize_module(copy.deepcopy(model), mesh(), plan())
        x = batch(ROWS, 12, dtype=dtype) / 8
        for trained in (dense, ours):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = trained(x)
            assert y.dtype == (torch.bfloat16 if autocast else dtype)
            (y.double().square().sum() / 16).backward()
        tolerance = 0.05 if autocast else 16 * torch.finfo(dtype).eps
        for mine, theirs in zip(ours.parameters(), dense.parameters(), strict=True):
            assert mine.grad.dtype == dtype
            found, expected = whole(mine.grad), whole(theirs.grad)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def check_half_precision_selects_the_rows_of_an_undivided_model():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = mlp(dtype)
        config = MemAOPConfig(k=4, selection="topk", memory="none")
        reference = converted(copy.deepcopy(model), config)
        ours = parallel(model, config, plan(), False)
        lengths = 2.0 ** torch.arange(ROWS).remainder(7).sub(3).unsqueeze(1)
        x = (torch.nn.functional.normalize(batch(ROWS, 12)) * lengths).to(dtype)
        step(reference, x, 1 / 16)
        step(ours, x, 1 / 16)
        eps = torch.finfo(dtype).eps
        assert_same_gradients(ours[2:], reference[2:], rtol=32 * eps, atol=32 * eps)


def check_shards_lose_no_digit():
    shards = ProcessShards(mesh().get_group())
    scores = torch.tensor([3e30, 4e-30, 0.0, torch.inf])
    expected = torch.tensor([2.0]).sqrt() * scores
    torch.testing.assert_close(shards.all_reduce_scores(scores), expected, rtol=1e-6, atol=0)
    first = Selection(torch.tensor([0, 2**31 + 1, 2**53 - 1]), torch.rand(3).double())
    mine = first if rank() == 0 else Selection(first.indices * 0, first.weights * 0)
    sent = everywhere(first.weights)[0]
    shared = shards.broadcast_selection(mine)
    assert torch.equal(shared.indices, first.indices)
    assert torch.equal(shared.weights, sent)


def check_blocks_cut_short_have_one_size_for_all():
    """The last block holds 4 rows of 16, and whether it is drawn differs between processes."""
    config = MemAOPConfig(k=16, block_rows=16, memory="none")
    for style in (ColwiseParallel, RowwiseParallel):
        layer, _ = single(style, config)
        counts = set()
        for number in range(24):
            x, g = batch(ROWS, 12, step=number), batch(ROWS, 8, step=99)
            x[-4:] *= 6  # so that the last block is drawn about as often as another
            with recording() as agreed:
                backward(layer, x, g)
            (selection,) = agreed.selections
            total = times_drawn(selection)
            torch.testing.assert_close(whole(layer.weight.grad), (total * g).T @ x)
            counts.add(int((selection.indices < ROWS).sum()))
        assert counts == {4, 16}


def check_saved_memories_continue_before_the_first_step():
    for memory in ("residual", "subspace"):
        config = flat_config(k=4, rank=2, selection="topk", memory=memory)
        first, second = (parallel(mlp(), config, plan(), True) for _ in range(2))
        assert second[2].memory.in_features == 4
        for number in range(3):
            step(first, batch(ROWS, 12, step=number))
        state = copy.deepcopy(memory_state_dict(first))
        load_memory_state_dict(second, state)
        for trained in (first, second):
            step(trained, batch(ROWS, 12, step=7))
        for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(ours.grad.to_local(), theirs.grad.to_local())
        reset_memory(second)
        assert second[2].memory.nbytes == 0
        step(second, batch(ROWS, 12))
        assert second[2].memory.nbytes > 0
        undivided = converted(mlp(), config)
        with pytest.raises(ValueError, match="layer '0'"):
            load_memory_state_dict(undivided, state)


def check_optimizer_stays_attached_when_the_memory_is_made_anew():
    model = converted(mlp())
    attached = torch.optim.SGD(model.parameters(), lr=0.25)
    attach_optimizer(model, attached)
    parallelize_module(model, mesh(), plan())
    step(model, batch(ROWS, 12))
    assert model[0].memory.out_features == 4
    assert model[0].memory.learning_rate == 0.25


def check_uneven_parts_and_a_mesh_of_one_process_are_exact_too():
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))["tp"]
    cases = itertools.product((ColwiseParallel, RowwiseParallel), ((9, 7, mesh()), (12, 8, alone)))
    for style, (n, p, on) in cases:
        layer, plain = single(style, PAPER, out_features=p, in_features=n, on=on)
        reference = converted(plain)
        for number in range(3):
            # Alone on its mesh, each process has a batch of its own: nobody shares anything.
            salt = 10 * rank() if on is alone else 0
            x, g = batch(ROWS, n, step=salt + number), batch(ROWS, p, step=9 + number)
            for trained in (layer, reference):
                backward(trained, x, g)
            assert_same_gradients(layer, reference)
        assert same_everywhere(whole(layer.weight.grad)) == (on is not alone)


def check_non_finite_part_of_a_row_shows_and_leaves_no_trace():
    layer, _ = single(RowwiseParallel, PAPER)
    x = batch(ROWS, 12)
    x[5, 0] = torch.inf
    backward(layer, x, batch(ROWS, 8))
    assert not whole(layer.weight.grad).isfinite().all()
    assert not layer.memory.filled[5]
    backward(layer, batch(ROWS, 12), batch(ROWS, 8))
    assert whole(layer.weight.grad).isfinite().all()


def check_replicated_weight_works_like_an_ordinary_one():
    def replicated(config):
        dense = linear()
        return converted(placed(dense, mesh(), lambda _: [Replicate()]), config), dense

    for placement, k in itertools.product((Replicate(), Shard(0)), (ROWS, 5)):
        for grad_input in ("exact", "sampled"):
            layer, dense = replicated(MemAOPConfig(k=k, memory="none", grad_input=grad_input))
            x, g = batch(ROWS, 12).requires_grad_(), batch(ROWS, 8)
            rows = distribute_tensor(x.detach(), mesh(), [placement]).requires_grad_()
            y = layer(rows)
            assert y.placements == (placement,)
            y.backward(distribute_tensor(g, mesh(), [placement]))
            for parameter in layer.parameters():
                assert parameter.grad.placements == (Replicate(),)
                assert same_everywhere(parameter.grad.to_local())
            torch.testing.assert_close(whole(layer.bias.grad), g.sum(0))
            dense(x).backward(g)
            torch.testing.assert_close(whole(y), dense(x))
            if k == ROWS:
                torch.testing.assert_close(whole(layer.weight.grad), dense.weight.grad)
            if k == ROWS or grad_input == "exact":
                torch.testing.assert_close(whole(rows.grad), x.grad)
            assert same_everywhere(whole(rows.grad))
    # The mean of two estimates: each process's own rows are in it.
    layer, dense = replicated(MemAOPConfig(k=1, memory="none"))
    x, g = batch(ROWS, 12), batch(ROWS, 8)
    layer(distribute_tensor(x, mesh(), [Replicate()])).backward(
        distribute_tensor(g, mesh(), [Replicate()])
    )
    assert torch.linalg.matrix_rank(whole(layer.weight.grad)) == 2


def check_exact_in_eval_mode_without_gradients_and_reverted():
    dense, ours = mlp(), parallel(mlp(), PAPER, plan(), True)
    x = batch(ROWS, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), dense(x))
    ours.eval()
    step(dense, x)
    step(ours, x)
    assert_same_gradients(ours, dense)
    assert ours[0].memory.nbytes == 0
    revert_(ours.train())
    assert type(ours[0]) is nn.Linear
    step(ours, x)
    assert_same_gradients(ours, dense)


def check_frozen_parameters_get_no_gradient():
    layer, _ = single(ColwiseParallel, MemAOPConfig(k=4, memory="none", grad_input="sampled"))
    layer.weight.requires_grad_(False)
    x, g = batch(ROWS, 12).requires_grad_(), batch(ROWS, 8)
    layer(x).backward(g)
    assert layer.weight.grad is None
    torch.testing.assert_close(whole(layer.bias.grad), g.sum(0))
    assert same_everywhere(x.grad)
    assert (x.grad.norm(dim=1) > 0).sum() <= 4


def check_what_cannot_be_divided_is_refused():
    x = batch(ROWS, 12)
    for style in (ColwiseParallel, RowwiseParallel):
        layer, _ = single(style, PAPER, out_features=1, in_features=1)
        with pytest.raises(
            ValueError, match=r"\(1, 1\).*Shard\(dim=.*without any.*fewer processes"
        ):
            layer(x[:, :1])
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    layer = converted(placed(linear(), both, lambda p: [Shard(0), Shard(p.dim() - 1)]))
    rows = distribute_tensor(x, both, [Replicate(), Replicate()])
    with pytest.raises(ValueError, match=r"Shard\(dim=0\), Shard\(dim=1\).*along one dimension"):
        layer(rows)
    layer, _ = single(ColwiseParallel, MemAOPConfig(budget=1 / 2, memory="none"))
    with pytest.raises(ValueError, match=r"budget=0\.5 would buy.*give ratio and rank"):
        layer(x)
    layer, _ = single(ColwiseParallel, PAPER)
    with pytest.raises(TypeError, match=r"x is a plain tensor.*Shard\(dim=0\)"):
        layer.forward(x)
    with pytest.raises(ValueError, match=r"x is on.*same mesh"):
        layer.forward(rows)


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
        layer, plain = single(style, config)
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
