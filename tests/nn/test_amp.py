"""Mixed precision with a loss scaler: scales carry over, and an overflowed step does no harm."""

import pytest
import torch

from memaop_triton import MemAOPConfig, memory_state_dict
from tests.nn.training import Training, batches
from tests.schemes import flat_config


def is_finite(model):
    states = memory_state_dict(model).values()
    tensors = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
    return all(t.isfinite().all() for t in tensors)


@pytest.mark.parametrize("memory", ["residual", "signed"])
def test_remembered_rows_follow_the_loss_scale(memory):
    config = MemAOPConfig(k=3, selection="topk", memory=memory)
    runs = []
    for scale, follow_scale in ((0, True), (4.0, True), (4.0, False)):
        training = Training(config, scale, follow_scale=follow_scale)
        training.run(batches(8))
        runs.append(training.parameters())
    # Every scale is a power of two, so nothing is rounded differently.
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not all(map(torch.equal, runs[0], runs[2]))


@pytest.mark.parametrize("every", [1, 2, 9])  # more rows than K, or fewer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_overflowed_step_is_skipped_and_training_goes_on(memory_scheme, dtype, every):
    config = flat_config(k=3, rank=2, **memory_scheme)
    training = Training(config, 2.0**12, growth=1000, dtype=dtype)
    model, data = training.model, batches(1) * 40
    losses = training.run(data[:20])
    before = training.parameters()
    x, y = data[0]
    x = x.clone()
    x[::every] = torch.inf  # these rows of X and of every gradient are not finite
    training.step(x, y)
    assert all(map(torch.equal, training.parameters(), before))
    assert training.scaler.get_scale() == 2.0**11
    assert is_finite(model)
    for layer in model[::2]:
        if layer.config.row_memory:
            assert not layer.memory.filled[::every].any()
    losses += training.run(data[20:])
    assert is_finite(model)
    assert losses[-1] < losses[19] < losses[0]
