import io

import pytest
import torch
from torch import nn

from memaop_triton import (
    MemAOPConfig,
    convert_,
    load_memory_state_dict,
    memory_state_dict,
    reset_memory,
)
from tests.nn.training import Training, batches, converted
from tests.schemes import flat_config

SHARED = {"k": 3, "rank": 2, "refresh_every": 3}
ROWS = flat_config(selection="topk", memory="residual", **SHARED)
SIGNED = flat_config(selection="topk", memory="signed", **SHARED)
SUBSPACE = flat_config(**SHARED)


def trained(config, steps):
    training = Training(config)
    training.run(batches(steps))
    return training.model


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_resumed_run_equals_the_uninterrupted_run_bit_for_bit(scheme):
    config = flat_config(**SHARED, **scheme)
    parts = ("model", "optimizer", "scheduler", "scaler")
    whole, resumed = Training(config), Training(config)
    whole.run(batches(4))
    saved = {name: getattr(whole, name).state_dict() for name in parts}
    saved |= {"memory": memory_state_dict(whole.model), "rng": torch.get_rng_state()}
    saved = through_a_file(saved)
    whole.run(batches(5, seed=6))

    resumed.run(batches(1, seed=99))
    for name in parts:
        getattr(resumed, name).load_state_dict(saved[name])
    load_memory_state_dict(resumed.model, saved["memory"])
    torch.set_rng_state(saved["rng"])
    resumed.run(batches(5, seed=6))
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))


def test_memory_before_the_first_step_is_saved_loaded_and_reset_to(scheme):
    config = flat_config(**SHARED, **scheme)
    state = through_a_file(memory_state_dict(converted(config)))
    for empty in (lambda model: load_memory_state_dict(model, state), reset_memory):
        model = trained(config, steps=2)
        empty(model)
        assert memory_state_dict(model) == state
        assert all(layer.memory is None or layer.memory.nbytes == 0 for layer in model[::2])


def test_loaded_memory_is_a_copy():
    training, other = Training(ROWS), converted(ROWS)
    training.run(batches(2))
    load_memory_state_dict(other, memory_state_dict(training.model))
    before = other[0].memory.x.clone()
    training.run(batches(1))
    assert torch.equal(other[0].memory.x, before)


def test_loaded_basis_is_laid_out_as_it_was():
    """Products are rounded by the layout, which not every checkpoint keeps."""
    model, other = trained(SUBSPACE, steps=1), converted(SUBSPACE)
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
    state = change(memory_state_dict(trained(saved, steps=1)))
    model = converted(loaded)
    with pytest.raises(ValueError, match=message):
        load_memory_state_dict(model, state)
    assert model[0].memory.nbytes == 0


def test_layers_without_memory_are_not_in_the_state():
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    convert_(model, MemAOPConfig(k=3), overrides={"0": MemAOPConfig(memory="none"), "2": None})
    assert list(memory_state_dict(model)) == ["1"]
