"""Decisions under `torch.compile`."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

EASY = {"rows": 512, "noise": 0.0}
FAST = {1 / 2: 0.6, 1 / 4: 0.35, 1 / 8: 0.2, 1 / 16: 0.15}


# The compiler's own.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_there_are_two_graphs_whatever_is_decided(training):
    """One of plain layers, and one of operators whose number of rows is no part of the graph."""
    torch.compiler.reset()
    run = training(**EASY, true=lambda ratio: FAST.get(ratio, 1.0))
    counter = CompileCounterWithBackend("aot_eager")
    run.model = torch.compile(run.model, backend=counter, fullgraph=True)
    run.step(4)
    assert counter.frame_count == 1
    run.step(60)
    assert run.controller.phase == "sampling"
    assert counter.frame_count == 2
