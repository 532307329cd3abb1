"""Steps of every memory with every policy, against the equations in float64."""

import dataclasses

import pytest
import torch

from memaop_triton import MemAOPConfig, ResidualMemory, Rows, new_memory
from memaop_triton.bench.first_run import oracle
from tests.gpu.helpers import batches, stream
from tests.schemes import LEGAL, label

ROW_SCHEMES = [one for one in LEGAL if one["memory"] in ("residual", "signed")]


@pytest.mark.parametrize("scheme", LEGAL, ids=label)
def test_steps_compute_what_the_equations_say(scheme, device, shape, half, on_gpu):
    config = MemAOPConfig(ratio=1 / 4, **scheme)
    memory = new_memory(config, *shape[1:])
    generator = torch.Generator(device).manual_seed(1)
    for x, g in batches(shape, on_gpu(10, 2), half, device):
        oracle.check_step(oracle.take_step(config, memory, x, g, generator))


@pytest.mark.parametrize("scheme", ROW_SCHEMES, ids=label)
def test_a_float32_memory_of_half_precision_rows(scheme, device, shape, on_gpu):
    rows = Rows(signed=scheme["memory"] == "signed", dtype=torch.float32)
    config = MemAOPConfig(ratio=1 / 4, selection=scheme["selection"], memory=rows)
    dtype = on_gpu(torch.bfloat16, torch.float16)
    memory = new_memory(config, *shape[1:])
    for x, g in batches(shape, on_gpu(4, 2), dtype, device):
        oracle.check_step(oracle.take_step(config, memory, x, g))
        assert memory.x.dtype == memory.g.dtype == torch.float32


@pytest.mark.parametrize("scheme", ROW_SCHEMES, ids=label)
def test_a_row_that_is_not_finite_is_forgotten(scheme, device, shape, half):
    """It shows in the gradient of its step, also of one that selects without scores."""
    config = MemAOPConfig(ratio=1 / 4, **scheme)
    memory = new_memory(config, *shape[1:])
    data = batches(shape, 4, half, device)
    data[1][0][5, 3] = torch.nan
    data[1][1][9, 2] = torch.inf
    results = [oracle.take_step(config, memory, x, g).weight for x, g in data]
    assert not results[1].isfinite().all()
    assert all(one.isfinite().all() for one in (results[0], *results[2:]))
    assert memory.x[memory.filled].isfinite().all()
    assert memory.g[memory.filled].isfinite().all()


@pytest.mark.parametrize("scheme", LEGAL, ids=label)
def test_two_streams_compute_what_one_does(scheme, device, shape, half, on_gpu):
    """Steps of two layers, in turns and without waiting for each other."""
    config = MemAOPConfig(ratio=1 / 4, **scheme)
    if config.subspace is not None:
        # Which side is chosen depends on when a measurement arrives on the host.
        side = dataclasses.replace(config.subspace, side="input", refresh_every=2)
        config = dataclasses.replace(config, memory=side)
    data = [batches(shape, on_gpu(12, 2), half, device, seed) for seed in (1, 2)]

    def run(in_turns):
        memories = [new_memory(config, *shape[1:]) for _ in data]
        draws = [torch.Generator(device).manual_seed(seed) for seed in (3, 4)]
        streams = [stream(device) for _ in data]
        order = [(i, j) for i in range(len(data)) for j in range(len(data[0]))]
        if in_turns:
            order.sort(key=lambda both: both[1])
        found = {}
        for i, j in order:
            with streams[i]:
                found[i, j] = oracle.take_step(config, memories[i], *data[i][j], draws[i]).weight
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        held = [m.x if isinstance(m, ResidualMemory) else None for m in memories]
        return found, held

    (alone, kept), (together, kept_then) = run(False), run(True)
    for key, one in alone.items():
        assert torch.equal(together[key], one), f"layer {key[0]}, step {key[1]}"
    for one, other in zip(kept, kept_then, strict=True):
        assert one is None or torch.equal(one, other)
