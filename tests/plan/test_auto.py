"""What `plan` says of layers with `ratio="auto"`: noise, the choice, and what is not known."""

import json
import math
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memaop_triton import MemAOPConfig, Subspace, convert_, plan
from memaop_triton.auto.worth import progress_of
from memaop_triton.plan import deciding
from memaop_triton.plan.planning import plan_shapes
from memaop_triton.plan.result import Verdict
from memaop_triton.sampling.selection import inclusion_probabilities

M, N, P = 256, 24, 16
PLAIN = MemAOPConfig(ratio="auto", memory="none")


@pytest.fixture(autouse=True)
def _quick(measured, savings):
    """Measuring takes no time."""


class Fitting(nn.Module):
    """Two layers that learn targets made of their inputs, and of noise; returns its loss."""

    def __init__(self, noise=0.0, width=N):
        super().__init__()
        self.noise = noise
        self.body = nn.Sequential(nn.Linear(N, width), nn.Tanh(), nn.Linear(width, P))

    def forward(self, x):
        error = self.body(x) - x[:, :P]
        return (error + self.noise * torch.randn_like(error)).square().mean()


def batches(count, rows=M, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(rows, N) * torch.rand(rows, 1) for _ in range(count)]


def mean_square(output):
    return output.square().mean()


def options_of(row):
    return {option.share: option.noise for option in row.options}


def definition(layer, data, share):
    """V/D over some batches, by sums over rows; and the unit in which V may be too large."""
    variance, square = 0.0, 0.0
    for x in data:
        g = 2 * layer(x).detach() / (len(x) * P)
        scores = x.norm(dim=1) * g.norm(dim=1)
        p = inclusion_probabilities(scores, round(share * len(x)))
        variance += (scores.square() * (1 / p - 1)).sum().item()
        square += (g.T @ x).square().sum().item()
    return variance / square, scores.square().sum().item() * len(data) / square


@pytest.mark.parametrize("count", [1, 4])
def test_noise_is_that_of_all_batches_by_its_definition(count):
    layer, (first, *more) = nn.Linear(N, P), batches(count)
    (row,) = plan(
        layer, PLAIN, example_inputs=first, batches=iter(more), loss_fn=mean_square
    ).layers
    found = options_of(row)
    assert found[1.0] == 0
    for share in (1 / 2, 1 / 4, 1 / 8, 1 / 16):
        noise, unit = definition(layer, [first, *more], share)
        assert noise * (1 - 1e-3) <= found[share] <= noise + 0.02 * unit


def test_rows_of_a_layer_that_is_used_twice_or_recomputed_count_as_in_training():
    """As many passes as there are uses: their V adds up, and D is that of their sum."""
    layer, (x,) = nn.Linear(N, N), batches(1)

    class Twice(nn.Module):
        def __init__(self, is_recomputed):
            super().__init__()
            self.layer, self.is_recomputed = layer, is_recomputed

        def forward(self, x):
            y = self.layer(x)
            if self.is_recomputed:
                return checkpoint(self.layer, y, use_reentrant=False)
            return self.layer(y)

    once, again = (
        plan(Twice(kind), PLAIN, example_inputs=x, loss_fn=mean_square).layers[0]
        for kind in (False, True)
    )
    assert once.calls == again.calls == 2
    assert options_of(once) == pytest.approx(options_of(again), rel=1e-5)
    y = layer(x).detach().requires_grad_()
    out = layer(y)
    out.retain_grad()
    out.square().mean().backward()
    inner = (x, y.grad), (y.detach(), out.grad)
    variance = 0.0
    for rows, g in inner:
        scores = rows.norm(dim=1) * g.norm(dim=1)
        p = inclusion_probabilities(scores, M // 4)
        variance += (scores.square() * (1 / p - 1)).sum().item()
    square = sum(g.T @ rows for rows, g in inner).square().sum().item()
    assert options_of(once)[1 / 4] == pytest.approx(variance / square, rel=0.1)


def test_noise_is_that_under_autocast_of_a_frozen_net_with_one_trained_layer():
    model = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N).requires_grad_(False), nn.Linear(N, P))
    with torch.autocast("cpu", torch.bfloat16):
        _, frozen, trained = plan(
            model, PLAIN, example_inputs=batches(1)[0], loss_fn=mean_square
        ).layers
    assert (frozen.note, frozen.options) == ("weight is frozen", ())
    assert trained.dtypes == ("bfloat16",)
    expected = plan(model, PLAIN, example_inputs=batches(1)[0], loss_fn=mean_square).layers[2]
    assert options_of(trained)[1 / 2] == pytest.approx(options_of(expected)[1 / 2], rel=0.1)


def low_rank(directions, rows=M):
    return torch.randn(rows, 3) @ directions + 0.05 * torch.randn(rows, N)


@pytest.mark.parametrize(("is_same", "few", "most"), [(True, 0.0, 0.1), (False, 0.5, 1.5)])
def test_noise_beside_a_subspace_is_that_of_batches_that_did_not_make_it(is_same, few, most):
    """A basis leaves next to nothing of rows of three directions that it was made from."""
    torch.manual_seed(0)
    directions = torch.randn(3, N)
    layer, config = nn.Linear(N, 64), MemAOPConfig(ratio="auto", memory=Subspace(4, side="input"))
    data = [low_rank(directions), low_rank(directions if is_same else torch.randn(3, N))]
    more = {"example_inputs": data[0], "batches": data[1:], "loss_fn": mean_square}
    (beside,) = plan(layer, config, **more).layers
    (alone,) = plan(layer, PLAIN, example_inputs=data[1], loss_fn=mean_square).layers
    assert few <= options_of(beside)[1 / 4] / options_of(alone)[1 / 4] < most


def test_one_batch_shows_the_noise_without_a_subspace_and_says_so():
    layer, config = nn.Linear(N, 64), MemAOPConfig(ratio="auto", memory=Subspace(4))
    torch.manual_seed(0)
    x = low_rank(torch.randn(3, N))
    one = plan(layer, config, example_inputs=x, loss_fn=mean_square)
    alone = plan(layer, PLAIN, example_inputs=x, loss_fn=mean_square)
    assert options_of(one.layers[0]) == options_of(alone.layers[0])
    assert "One batch shows it without a subspace only, at its most" in str(one)
    assert "without a subspace" not in str(alone)
    more = plan(layer, config, example_inputs=x, loss_fn=mean_square, batches=[x])
    assert "without a subspace" not in str(more)
    assert "that of 2 batches at the weights that the model has now; it grows" in str(more)


def test_a_last_block_that_is_cut_short_is_no_reason_to_fail():
    config = MemAOPConfig(ratio="auto", block_rows=16)
    found = plan(
        nn.Linear(N, P),
        config,
        example_inputs=batches(1, rows=100)[0],
        batches=batches(2, rows=100),
        loss_fn=mean_square,
    )
    assert found.layers[0].options[1].noise > 0


# The choice


def test_where_the_batch_is_large_the_choice_is_the_best_of_its_price():
    found = plan(Fitting(), example_inputs=batches(1)[0], batches=batches(3, seed=1))
    count = sum(row.share < 1 for row in found.layers)
    assert count > 0
    assert found.predicted.noise < 0.5
    saved = sum(row.dense_seconds - row.ours_seconds for row in found.layers)
    assert found.predicted.speedup == pytest.approx(10 / (10 - saved))
    progress = found.predicted.speedup * progress_of(found.predicted.noise)
    assert found.predicted.progress == pytest.approx(progress)
    assert progress > 1.02
    line = (
        f"redicted {progress:.2f} times dense's progress per second; sampling {count} of 2 layers"
    )
    assert line in str(found)
    assert found.decision == f"p{line}"
    assert found.faster == tuple(row.name for row in found.layers if row.share < 1)
    # They are what convert_ takes as they are named.
    model = convert_(Fitting(), filter_fn=lambda _, name: name in found.faster)
    assert sum("MemAOP" in type(module).__name__ for module in model.modules()) == count


def test_where_it_is_too_small_dense_is_best_and_by_what_factor_is_said(savings):
    savings.update({share: seconds / 10 for share, seconds in savings.items()})
    found = plan(Fitting(noise=30.0), example_inputs=batches(1, rows=16)[0], batches=batches(3, 16))
    assert [row.verdict for row in found.layers] == [Verdict.LEAVE_DENSE] * 2
    assert (found.faster, found.predicted.progress, found.predicted.noise) == ((), 1.0, 0.0)
    assert found.decision.startswith("dense is best here: the noise of sampling would have to be ")
    assert "layers get faster" not in str(found)


def test_layers_that_get_no_faster_are_left_alone(savings):
    savings.update(dict.fromkeys(savings, 4.0))
    found = plan(Fitting(), example_inputs=batches(1)[0])
    assert found.decision == "dense is best here: the layers are too small to get faster"


def test_an_odd_time_does_not_decide(monkeypatch, savings):
    rounds = []

    class Disturbed:
        def __init__(self):
            rounds.append(self)

        def seconds(self, uses, configs):
            return savings | ({1.0: 100.0} if len(rounds) in (1, 4) else {})

    monkeypatch.setattr(deciding, "Savings", Disturbed)
    found = plan(Fitting(), example_inputs=batches(1)[0])
    assert {row.dense_seconds for row in found.layers} == {savings[1.0]}


def test_layers_with_a_ratio_of_their_own_are_as_they_are_set(measured):
    """What they save is of the step that the others are compared with."""
    x, model = batches(1)[0], Fitting()
    measured.times[M, N, N] = [5.0] * 3, [1.0] * 3
    both = plan(model, PLAIN, example_inputs=x)
    one = plan(model, PLAIN, example_inputs=x, overrides={"body.0": MemAOPConfig(ratio=1 / 4)})
    fixed, auto = one.layers
    assert (fixed.share, fixed.verdict, fixed.options) == (None, Verdict.CONVERT, ())
    assert auto.share < 1
    assert [row.share for row in both.layers][1] <= auto.share
    saved = auto.dense_seconds - auto.ours_seconds
    assert one.predicted.speedup == pytest.approx((10 - 4) / (10 - 4 - saved))
    for words in ("backward passes of a step", 'ratio="auto"', "1 of 1 layers get faster"):
        assert words in str(one)


def test_layers_in_evaluation_mode_and_frozen_ones_stay_exact_and_count_as_layers():
    model = nn.Sequential(*(nn.Linear(N, N) for _ in range(3)))
    model[1].eval()
    model[2].requires_grad_(False)
    found = plan(model, PLAIN, example_inputs=batches(1)[0], loss_fn=mean_square)
    assert [row.note for row in found.layers] == [
        "",
        "no finite gradient in training mode was seen",
        "weight is frozen",
    ]
    assert found.decision.endswith("sampling 1 of 3 layers")
    assert "exact: weight is frozen" in str(found)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_noise_is_seen_whatever_the_caller_has_switched_off(off):
    layer, config = nn.Linear(N, P), MemAOPConfig(ratio="auto")
    data = batches(2)
    with off():
        found = plan(layer, config, example_inputs=data[0], batches=data[1:], loss_fn=mean_square)
    assert found.layers[0].options[1].noise > 0


# What is a loss


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


@pytest.mark.parametrize(
    ("wrap", "is_known"),
    [
        (lambda y, loss: loss, True),
        (lambda y, loss: (loss, y), True),
        (lambda y, loss: OrderedDict(loss=loss, logits=y), True),
        (lambda y, loss: Output(y, loss), True),
        (lambda y, loss: y, False),
        (lambda y, loss: y[:1, :1], False),
        (lambda y, loss: (y, loss), False),
        (lambda y, loss: (), False),
        (lambda y, loss: {"logits": y}, False),
        (lambda y, loss: Output(y), False),
        (lambda y, loss: {"loss": loss.detach(), "logits": y}, False),
    ],
)
def test_noise_is_known_where_there_is_a_loss(wrap, is_known):
    model, x = nn.ModuleList([nn.Linear(N, P)]), batches(1)[0]

    def forward(x):
        y = model[0](x)
        return wrap(y, y.square().mean())

    model.forward = forward
    if not wrap(torch.ones(1, 1), torch.ones(())) and not is_known:
        with pytest.raises(ValueError, match="no floating-point tensor"):
            plan(model, PLAIN, example_inputs=x)
        return
    found = plan(model, PLAIN, example_inputs=x, batches=batches(1))
    assert (found.predicted is not None) == is_known
    (row,) = found.layers
    assert [option.seconds for option in row.options] == [4.0, 2.2, 1.2, 0.8, 0.6]
    if is_known:
        # Of the loss alone, not of the outputs beside it.
        expected = plan(model[0], PLAIN, example_inputs=x, loss_fn=mean_square, batches=batches(1))
        assert options_of(row) == options_of(expected.layers[0])
    else:
        assert {option.noise for option in row.options} == {None}
        assert (row.verdict, row.share, row.ours_seconds) == (Verdict.UNKNOWN, None, None)
        assert "The noise of sampling is unknown" in str(found)
        assert found.faster == ()


def test_without_a_loss_a_layer_that_gets_no_faster_is_still_seen(savings):
    savings.update(dict.fromkeys(savings, 4.0))
    (row,) = plan(nn.Linear(N, P), PLAIN, example_inputs=batches(1)[0]).layers
    assert row.verdict is Verdict.LEAVE_DENSE


def test_a_generator_hands_each_batch_its_targets():
    """Batches are taken one by one, so what `loss_fn` compares with is that of the batch."""
    targets, ran = [torch.zeros(M, P)], []

    def more():
        for number, x in enumerate(batches(2), 1):
            targets[0] = torch.full((M, P), float(number))
            yield x

    def loss_fn(output):
        ran.append(targets[0][0, 0].item())
        return (output - targets[0]).square().mean()

    plan(nn.Linear(N, P), PLAIN, example_inputs=batches(1)[0], batches=more(), loss_fn=loss_fn)
    assert ran == [0.0] * 7 + [1.0, 2.0]


def test_batches_that_are_not_finite_are_not_read():
    layer, (x, bad) = nn.Linear(N, P), batches(2)
    bad[3] = math.inf
    expected = plan(layer, PLAIN, example_inputs=x, loss_fn=mean_square).layers
    assert (
        plan(layer, PLAIN, example_inputs=x, batches=[bad], loss_fn=mean_square).layers == expected
    )
    only = plan(layer, PLAIN, example_inputs=bad, loss_fn=mean_square)
    assert only.predicted is None
    assert (only.layers[0].verdict, only.layers[0].options) == (Verdict.LEAVE_DENSE, ())
    assert only.decision.startswith("nothing to decide")


# What is printed


def test_table_and_json(savings):
    found = plan(Fitting(), example_inputs=batches(1)[0], batches=batches(2))
    first = found.layers[0]
    (line,) = (s.split() for s in str(found).splitlines() if s.strip().startswith("body.0"))
    assert line[:4] == ["body.0", f"{M}×{N}×{N}", "1", "4000"]
    assert line[4:6] == ["2200", f"({first.options[1].noise:.2g})"]
    assert line[-1] == f"1/{round(1 / first.share)}"
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["decision"] == found.decision
    assert content["predicted"]["progress"] == found.predicted.progress
    assert content["layers"][0]["share"] == first.share
    assert content["layers"][0]["options"][2] == {
        "share": 0.25, "seconds": 1.2, "noise": first.options[2].noise,
    }  # fmt: skip


def test_memory_is_that_of_the_bases_of_the_layers_that_are_sampled():
    config = MemAOPConfig(ratio="auto", memory=Subspace(4))
    found = plan(Fitting(), config, example_inputs=batches(1)[0], batches=batches(2))
    sampled = [row for row in found.layers if row.share < 1]
    sizes = {"body.0": (N + N) * 4 * 4, "body.2": (N + P) * 4 * 4}
    assert sampled
    assert found.memory_bytes == sum(sizes[row.name] for row in sampled)
    converted = convert_(Fitting(), MemAOPConfig(ratio=1 / 2, memory=Subspace(4)))
    converted(batches(1)[0]).backward()
    assert [converted.body[i].memory.nbytes for i in (0, 2)] == list(sizes.values())


def test_shapes_have_times_and_no_noise():
    found = plan_shapes([(M, N, P)], MemAOPConfig(ratio="auto"))
    assert (found.layers[0].verdict, found.predicted) == (Verdict.UNKNOWN, None)
    assert "The noise of sampling is unknown" in str(found)
