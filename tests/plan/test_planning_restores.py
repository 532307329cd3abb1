"""A model that was planned is the model it was before."""

import contextlib
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memaop_triton import MemAOPConfig, convert_, memory_state_dict, plan


class Busy(nn.Module):
    """Draws, counts, writes to its parameters, freezes one, and raises if it is told to."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("absent", None)
        self.register_buffer("expanded", torch.ones(1).expand(3))
        self.failure = None
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, torch.is_grad_enabled()))
        self.calls = self.calls + 1
        self.head.weight.data.clamp_(-0.1, 0.1)
        self.norm.bias.requires_grad_(False)
        x = x + random.random() + np.random.rand()
        y = self.head(self.drop(self.norm(self.layer(x))))
        if self.failure == "in the forward pass":
            raise KeyError("forward")
        if self.failure == "in the backward pass":
            y.register_hook(self._fail)
        return y

    @staticmethod
    def _fail(_):
        raise KeyError("backward")


def fingerprint(model):
    """Everything of a model that a training step might change, in numbers that can be compared."""
    parameters, tensors = list(model.parameters()), [*model.parameters(), *model.buffers()]
    hooks = [hooks for m in model.modules() for name, hooks in vars(m).items() if "_hooks" in name]
    for parameter in parameters:
        hooks += [parameter._backward_hooks, parameter._post_accumulate_grad_hooks]
    return {
        "objects": [id(t) for t in tensors],
        "values": [t.tolist() for t in tensors],
        "versions": [p._version for p in parameters],
        "gradients": [id(p.grad) for p in parameters],
        "values of gradients": [p.grad.tolist() for p in parameters if p.grad is not None],
        "requires_grad": [p.requires_grad for p in parameters],
        "modes": [m.training for m in model.modules()],
        "hooks": [list(found.values()) for found in hooks if isinstance(found, dict)],
        "memories": {
            name: {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
            for name, state in memory_state_dict(model).items()
        },
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }


def square(output):
    return output.square().mean()


FIXED = {"config": MemAOPConfig()}
AUTO = {"loss_fn": square, "batches": [torch.ones(6, 4), torch.randn(6, 4)]}


@pytest.fixture(autouse=True)
def _quick(measured, savings):
    """Measuring takes no time."""


def with_a_history(model):
    """Gradients, a memory, hooks, and parts that are frozen."""
    convert_(model, MemAOPConfig.paper(k=2), filter_fn=lambda module, name: name == "head")
    model(torch.randn(6, 4)).sum().backward()
    model.norm.eval()
    model.layer.bias.requires_grad_(False)
    model.layer.register_forward_hook(lambda *_: None)
    model.head.register_full_backward_hook(lambda *_: None)
    model.head.weight.register_hook(lambda g: g)


def in_evaluation(model):
    model.eval()
    model.drop.train()


@pytest.mark.parametrize("settings", [FIXED, AUTO], ids=["fixed", "auto"])
@pytest.mark.parametrize("failure", [None, "in the forward pass", "in the backward pass"])
@pytest.mark.parametrize(
    "prepare", [lambda m: None, with_a_history, in_evaluation], ids=["new", "used", "evaluation"]
)
def test_a_planned_model_is_what_it_was(prepare, failure, settings):
    model = Busy()
    prepare(model)
    model.failure, model.modes = failure, []
    x = torch.randn(6, 4, requires_grad=True)
    x.grad = kept = torch.ones(6, 4)
    before = fingerprint(model)
    with pytest.raises(KeyError) if failure else contextlib.nullcontext():
        found = plan(
            model,
            example_inputs={"x": x},
            filter_fn=lambda m, _: type(m) is nn.Linear,
            **settings,
        )
        assert found.layers[0].calls == 1
        assert (found.predicted is None) == (settings is FIXED)
    after = fingerprint(model)
    for what, value in before.items():
        assert after[what] == value, what
    assert set(model.modes) == {(True, True)}
    assert x.grad is kept
    assert torch.equal(kept, torch.ones(6, 4))


@pytest.mark.parametrize(("training", "inside"), [(True, [True, False]), (False, [True, True])])
def test_what_is_frozen_in_a_model_in_training_stays_frozen(training, inside):
    """A model in evaluation mode is put in training mode as a whole."""
    model, seen = Busy().train(training), []
    model.norm.eval()
    model.norm.register_forward_hook(lambda *_: seen.append([model.training, model.norm.training]))
    plan(model, MemAOPConfig(), example_inputs=torch.randn(6, 4))
    assert seen == [inside, inside]
    plan(model, example_inputs=torch.randn(6, 4), loss_fn=square)
    assert seen[2:] == [inside] * 7, "once to see uses, five times for time, once for noise"


@pytest.mark.parametrize("failure", ["in the forward pass", "in the backward pass"])
def test_a_batch_that_fails_while_noise_is_observed_leaves_nothing_behind(failure):
    model = Busy()

    def batches():
        torch.rand(1)  # as a loader draws that shuffles
        yield torch.randn(6, 4)
        model.failure = failure
        yield torch.randn(6, 4)

    before = fingerprint(model)
    with pytest.raises(KeyError):
        plan(model, example_inputs=torch.ones(6, 4), loss_fn=square, batches=batches())
    assert fingerprint(model) == before
    assert type(model.layer) is type(model.head) is nn.Linear


def test_an_optimizer_that_steps_in_the_backward_pass_rests():
    model, steps = nn.Linear(4, 4), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(steps.append)
    plan(model, example_inputs=torch.ones(6, 4), loss_fn=square)
    assert not steps
    model(torch.ones(6, 4)).sum().backward()
    assert len(steps) == 2


def test_other_processes_hear_nothing(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(4, 4), gradient_as_bucket_view=True)
        sent = []

        def hook(_, bucket):
            sent.append(bucket)
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, hook)
        x = torch.ones(6, 4)
        model(x).sum().backward()
        before = fingerprint(model)
        plan(model, example_inputs=x, loss_fn=square)
        assert len(sent) == 1
        assert fingerprint(model) == before
        model(x).sum().backward()
        assert len(sent) == 2
    finally:
        dist.destroy_process_group()
