"""LoRA of PEFT with a stash: losses and gradients, and what is held."""

import copy

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPConfig, MemAOPLinear, convert_, model_report
from memaop_triton.bench.measure import clock_for
from memaop_triton.monitor.kept import kept_lines
from tests.integrations.lora_models import (
    EXACT,
    INT8,
    LORA_LLAMA,
    MODELS,
    adapted,
    check_right_in_the_mean,
    close,
    gradients,
    ids,
    llama,
    loss_of,
    make,
    pair,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers", "ignore:.*should not be instantiated:DeprecationWarning"
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_loss_is_the_same_and_so_are_gradients_but_for_the_rounding(name, dtype):
    theirs, ours = pair(name, dtype=dtype)
    assert torch.equal(loss_of(theirs), loss_of(ours))
    exact, rounded = gradients(theirs), gradients(ours)
    assert list(exact) == list(rounded)
    # Attention keeps its result in float32, so that there is no stash of it.
    keeps = "o_proj" if dtype == torch.float32 else "nothing"
    assert {n for n in exact if not torch.equal(exact[n], rounded[n])} == {
        n for n in exact if "lora_A" in n and keeps not in n
    }


@pytest.mark.parametrize("name", MODELS)
def test_with_one_seed_dropout_is_the_same_where_no_stash_draws(name):
    theirs, ours = pair(name, dropout=0.2, config=EXACT)
    assert torch.equal(loss_of(theirs), loss_of(ours))
    exact, same = gradients(theirs), gradients(ours)
    assert all(torch.equal(exact[n], same[n]) for n in exact)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_are_right_in_the_mean(name):
    theirs, ours = pair(name)
    exact = gradients(theirs)
    draws = [gradients(ours, seed) for seed in range(60)]
    names = [n for n in exact if "lora_A" in n and "o_proj" not in n]
    assert len(names) >= 6
    for n in names:
        check_right_in_the_mean(torch.stack([one[n] for one in draws]), exact[n])


@pytest.mark.parametrize("ratio", [1, 1 / 4])
def test_gradients_behind_dropout_are_right_in_the_mean(ratio):
    """Of one layer and one mask, whose exact gradient is that of PEFT's layer."""
    model = nn.Sequential(nn.Linear(64, 32))
    model = adapted(model, {"target_modules": ["0"]}, 0.3)
    x, g = torch.randn(48, 64) * torch.rand(48, 1), torch.randn(48, 32)
    layer = model.base_model.model[0]
    weights = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.manual_seed(5)
    exact = torch.autograd.grad(layer(x), weights, g)
    convert_(model, MemAOPConfig(ratio=ratio, memory="none", stash="int4"), targets="lora")
    draws = []
    for seed in range(100):
        torch.manual_seed(5)
        y = layer.lora_dropout["default"](x)
        torch.manual_seed(seed)
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        draws.append(torch.autograd.grad(b(a(y)) * layer.scaling["default"], weights, g))
    check_right_in_the_mean(torch.stack([da for da, _ in draws]), exact[0])
    assert all(torch.equal(db, exact[1]) for _, db in draws)


@pytest.mark.parametrize(
    ("dropout", "dtype", "most"),
    [
        (0.0, torch.float32, 0.80),
        (0.0, torch.bfloat16, 0.55),
        (0.1, torch.float32, 0.50),
        (0.1, torch.bfloat16, 0.40),
    ],
)
def test_bytes_held(dropout, dtype, most):
    clock = clock_for(torch.device("cpu"))
    held = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = adapted(llama(dtype, width=256, depth=2), LORA_LLAMA, dropout)
        model = convert_(model, targets="lora") if convert else model
        held.append(clock.held_bytes(lambda m=model: loss_of(m, ids(8, 64))))
    assert held[1] <= most * held[0], held[1] / held[0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_layers_with_the_same_inputs_share_a_stash(dropout, dtype):
    ours = convert_(make(dropout=dropout, dtype=dtype), targets="lora")
    loss = loss_of(ours)
    layers = {n: m.layer_state.kept for n, m in ours.named_modules() if isinstance(m, MemAOPLinear)}
    stashes = {}
    for name, kept in layers.items():
        stashes.setdefault(id(kept.stash), []).append(name.split(".")[6])
        assert kept.mask_bytes == (kept.input_bytes // 8 // 4 if dropout else 0)
    shared = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert list(stashes.values()) == 2 * shared
    report = "\n".join(kept_lines(ours))
    assert report.count("shared with") == 6
    assert "shared with" in model_report(ours)
    loss.backward()


def test_autocast():
    theirs, ours = pair(config=INT8)
    results = []
    for model in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    close(results[1], results[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    """With dropout, whose masks are drawn again: the same in both forward passes."""
    theirs, ours = pair(config=INT8)
    for model in (theirs, ours):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    close(gradients(ours), gradients(theirs))
    ours = convert_(make(dropout=0.2), INT8, targets="lora")
    plain = gradients(ours)
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    close(gradients(ours), plain)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiled(dropout):
    """Each layer has a stash of its own there, of what was dropped out."""
    torch.compiler.reset()
    ours = convert_(make(dropout=dropout), INT8, targets="lora")
    compiled = torch.compile(copy.deepcopy(ours), backend="aot_eager")
    plain, graph = gradients(ours), gradients(compiled)
    assert [n.removeprefix("_orig_mod.") for n in graph] == list(plain)
    assert all(g.isfinite().all() for g in graph.values())
    if not dropout:
        close({n.removeprefix("_orig_mod."): g for n, g in graph.items()}, plain)
