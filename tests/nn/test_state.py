import io

import pytest
import torch
from torch import nn

from memaop_triton import (
    MemAOPConfig,
    attach_optimizer,
    convert_,
    load_memory_state_dict,
    memory_state_dict,
    reset_memory,
)
from tests.schemes import flat_config

ROWS = {"selection": "topk", "memory": "residual"}
SIGNED = {"selection": "topk", "memory": "signed"}
SUBSPACE = {"selection": "priority", "memory": "subspace"}


def converted(scheme):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    return convert_(model, flat_config(k=3, rank=2, refresh_every=3, **scheme))


class Training:
    """A converted model with its optimizer and schedule."""

    def __init__(self, scheme):
        self.model = converted(scheme)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        attach_optimizer(self.model, self.optimizer)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.8)

    def run(self, steps, seed):
        draws = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.randn(17, 12, generator=draws)).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()
        return self


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_resumed_run_equals_the_uninterrupted_run_bit_for_bit(scheme):
    whole = Training(scheme).run(4, seed=5)
    saved = through_a_file(
        {
            "model": whole.model.state_dict(),
            "memory": memory_state_dict(whole.model),
            "optimizer": whole.optimizer.state_dict(),
            "scheduler": whole.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        }
    )
    whole.run(5, seed=6)

    resumed = Training(scheme).run(1, seed=99)
    resumed.model.load_state_dict(saved["model"])
    load_memory_state_dict(resumed.model, saved["memory"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.scheduler.load_state_dict(saved["scheduler"])
    torch.set_rng_state(saved["rng"])
    resumed.run(5, seed=6)
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


def test_memory_before_the_first_step_is_saved_loaded_and_reset_to(scheme):
    state = through_a_file(memory_state_dict(converted(scheme)))
    for empty in (lambda model: load_memory_state_dict(model, state), reset_memory):
        model = Training(scheme).run(2, seed=5).model
        empty(model)
        assert memory_state_dict(model) == state
        assert all(layer.memory is None or layer.memory.nbytes == 0 for layer in model[::2])


def test_loaded_memory_is_a_copy():
    training, other = Training(ROWS).run(2, seed=5), converted(ROWS)
    load_memory_state_dict(other, memory_state_dict(training.model))
    before = other[0].memory.x.clone()
    training.run(1, seed=5)
    assert torch.equal(other[0].memory.x, before)


def test_loaded_basis_is_laid_out_as_it_was():
    """Products are rounded by the layout, which not every checkpoint keeps."""
    model, other = Training(SUBSPACE).run(1, seed=5).model, converted(SUBSPACE)
    state = {
        name: memory | {side: memory[side].contiguous() for side in ("input", "grad")}
        for name, memory in memory_state_dict(model).items()
    }
    load_memory_state_dict(other, state)
    for ours, theirs in zip(other[::2], model[::2], strict=True):
        assert ours.memory.basis.stride() == theirs.memory.basis.stride()


def misshapen(field):
    def change(state):
        old = state["2"][field]
        new = torch.zeros(*old.shape[:-1], 9, dtype=old.dtype)
        return state | {"2": state["2"] | {field: new}}

    return change


def without(field):
    return lambda state: state | {"2": {n: v for n, v in state["2"].items() if n != field}}


@pytest.mark.parametrize(
    ("saved", "loaded", "change", "message"),
    [
        (SIGNED, ROWS, dict, "layer '0': state is of a 'signed' memory, this one is 'resid"),
        (SUBSPACE, ROWS, dict, "layer '0': state is of a 'subspace' memory, this one is 'resid"),
        (ROWS, ROWS, misshapen("x"), r"layer '2': x has shape \(17, 9\), .* needs \(17, 8\)"),
        (ROWS, ROWS, misshapen("g"), r"layer '2': g has shape \(17, 9\), .* needs \(17, 8\)"),
        (ROWS, ROWS, misshapen("filled"), r"layer '2': filled has shape \(9,\), .* \(17,\)"),
        (SUBSPACE, SUBSPACE, misshapen("input"), r"layer '2': input has shape \(8, 9\), .* \(8, 2"),
        (ROWS, ROWS, without("g"), "layer '2'.* lacks g:"),
        (ROWS, ROWS, without("filled"), "layer '2'.* lacks filled:"),
        (SUBSPACE, SUBSPACE, without("step"), "layer '2'.* lacks step:"),
        (
            ROWS,
            ROWS,
            lambda state: {name.replace("2", "9"): m for name, m in state.items()},
            r"state does not fit.*missing \['2'\], unknown \['9'\]",
        ),
    ],
)
def test_state_that_does_not_fit_is_named_and_changes_nothing(saved, loaded, change, message):
    state = change(memory_state_dict(Training(saved).run(1, seed=5).model))
    model = converted(loaded)
    with pytest.raises(ValueError, match=message):
        load_memory_state_dict(model, state)
    assert model[0].memory.nbytes == 0


def test_layers_without_memory_are_not_in_the_state():
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    convert_(model, MemAOPConfig(k=3), overrides={"0": MemAOPConfig(memory="none"), "2": None})
    assert list(memory_state_dict(model)) == ["1"]
