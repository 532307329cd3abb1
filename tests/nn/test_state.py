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


def converted(scheme):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    return convert_(model, flat_config(k=3, rank=2, refresh_every=3, **scheme))


def steps(model, optimizer, scheduler, count, seed):
    draws = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(17, 12, generator=draws)).square().mean().backward()
        optimizer.step()
        scheduler.step()


def trainer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach_optimizer(model, optimizer)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_resumed_run_equals_the_uninterrupted_run_bit_for_bit(scheme):
    model = converted(scheme)
    optimizer, scheduler = trainer(model)
    steps(model, optimizer, scheduler, 4, seed=5)
    saved = through_a_file(
        {
            "model": model.state_dict(),
            "memory": memory_state_dict(model),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        }
    )
    steps(model, optimizer, scheduler, 5, seed=6)

    resumed = converted(scheme)
    optimizer, scheduler = trainer(resumed)
    steps(resumed, optimizer, scheduler, 1, seed=99)
    resumed.load_state_dict(saved["model"])
    load_memory_state_dict(resumed, saved["memory"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    torch.set_rng_state(saved["rng"])
    steps(resumed, optimizer, scheduler, 5, seed=6)
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_memory_before_the_first_step_can_be_saved_and_loaded(scheme):
    model, other = converted(scheme), converted(scheme)
    optimizer, scheduler = trainer(other)
    steps(other, optimizer, scheduler, 2, seed=5)
    load_memory_state_dict(other, through_a_file(memory_state_dict(model)))
    assert all(m.nbytes == 0 for m in (layer.memory for layer in other[::2]) if m is not None)


def test_loaded_memory_is_a_copy():
    model, other = (converted({"selection": "topk", "memory": "residual"}) for _ in range(2))
    optimizer, scheduler = trainer(model)
    steps(model, optimizer, scheduler, 2, seed=5)
    load_memory_state_dict(other, memory_state_dict(model))
    before = other[0].memory.x.clone()
    steps(model, optimizer, scheduler, 1, seed=5)
    assert torch.equal(other[0].memory.x, before)


def test_loaded_basis_is_laid_out_as_it_was():
    """Products are rounded by the layout, which not every checkpoint keeps."""
    model, other = (converted(saved("subspace")) for _ in range(2))
    state = memory_state_dict(filled(saved("subspace"), model))
    state = {
        name: memory | {side: memory[side].contiguous() for side in ("input", "grad")}
        for name, memory in state.items()
    }
    load_memory_state_dict(other, state)
    for ours, theirs in zip(other[::2], model[::2], strict=True):
        assert ours.memory.basis.stride() == theirs.memory.basis.stride()


def test_reset_memory_forgets_every_layer(scheme):
    model = converted(scheme)
    optimizer, scheduler = trainer(model)
    steps(model, optimizer, scheduler, 2, seed=5)
    reset_memory(model)
    assert memory_state_dict(model) == memory_state_dict(converted(scheme))
    assert all(layer.memory is None or layer.memory.nbytes == 0 for layer in model[::2])


def filled(scheme, model=None):
    model = converted(scheme) if model is None else model
    model(torch.randn(17, 12)).sum().backward()
    return model


def saved(memory):
    return {"selection": "topk" if memory != "subspace" else "priority", "memory": memory}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("signed", r"memory of layer '0': state is of a 'signed' memory, this one is 'resid"),
        ("subspace", r"memory of layer '0': state is of a 'subspace' memory, this one is 'resid"),
    ],
)
def test_memory_of_another_kind_names_the_layer(other, message):
    state = memory_state_dict(filled(saved(other)))
    with pytest.raises(ValueError, match=message):
        load_memory_state_dict(converted(saved("residual")), state)


@pytest.mark.parametrize(
    ("memory", "field", "message"),
    [
        ("residual", "x", r"memory of layer '2': x has shape \(17, 9\), .* needs \(17, 8\)"),
        ("residual", "g", r"memory of layer '2': g has shape \(17, 9\), .* needs \(17, 8\)"),
        ("residual", "filled", r"memory of layer '2': filled has shape \(9,\), .* needs \(17,\)"),
        ("subspace", "input", r"memory of layer '2': input has shape \(8, 9\), .* needs \(8, 2\)"),
    ],
)
def test_memory_of_another_shape_names_the_layer_and_changes_nothing(memory, field, message):
    state = memory_state_dict(filled(saved(memory)))
    old = state["2"][field]
    state["2"] = state["2"] | {field: torch.zeros(*old.shape[:-1], 9, dtype=old.dtype)}
    model = converted(saved(memory))
    with pytest.raises(ValueError, match=message):
        load_memory_state_dict(model, state)
    assert model[0].memory.nbytes == 0


@pytest.mark.parametrize(
    ("memory", "field"),
    [("residual", "g"), ("residual", "filled"), ("subspace", "step")],
)
def test_incomplete_memory_names_the_layer_and_the_missing_field(memory, field):
    state = memory_state_dict(filled(saved(memory)))
    state["2"] = {name: value for name, value in state["2"].items() if name != field}
    with pytest.raises(ValueError, match=f"memory of layer '2'.*{field}"):
        load_memory_state_dict(converted(saved(memory)), state)


def test_state_of_other_layers_names_them():
    state = memory_state_dict(filled(saved("residual")))
    state["9"] = state.pop("2")
    with pytest.raises(ValueError, match=r"state does not fit.*missing \['2'\], unknown \['9'\]"):
        load_memory_state_dict(converted(saved("residual")), state)


def test_layers_without_memory_are_not_in_the_state():
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    convert_(model, MemAOPConfig(k=3), overrides={"0": MemAOPConfig(memory="none"), "2": None})
    assert list(memory_state_dict(model)) == ["1"]
