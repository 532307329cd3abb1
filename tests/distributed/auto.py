"""`ratio="auto"` in several processes, whose clocks say different things."""

import copy
import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from memaop_triton import (
    MemAOPConfig,
    auto_freeze,
    convert_,
    load_memory_state_dict,
    memory_state_dict,
    model_report,
)
from memaop_triton.auto.agreement import Processes
from memaop_triton.auto.observing import Seen, StepObserver
from memaop_triton.auto.savings import Savings
from memaop_triton.auto.worth import progress_of
from tests.auto.training import Training
from tests.distributed.auto_cases import (
    AUTO,
    EASY,
    HARD,
    WRAPPERS,
    Plain,
    assert_alike,
    fast,
    gathered,
    own_time,
    rank,
    running,
)
from tests.distributed.checks import case, everywhere, whole


def check_processes_with_different_clocks_decide_alike():
    tasks = {"sampling": EASY, "exact": HARD}
    for (name, wrap), (phase, task) in ((w, t) for w in WRAPPERS.items() for t in tasks.items()):
        with case(f"{name}, {phase}"), running(task, wrap=wrap) as run:
            run.step(60)
            assert_alike(run.history)
            assert run.controller.phase == phase
            assert any(run.modes) == (phase == "sampling")
            first, *_ = model_report(run.model).splitlines()
            assert_alike(first)
            if phase == "sampling":
                # The means of a clock that says 4.3 of 6 and one that says 6.04 of 6, about.
                sampled = 4 + sum(fast(r) + 1.02 for r in run.controller.shares.values()) / 2
                worth = progress_of(run.controller.predicted.noise)
                assert run.controller.realised == pytest.approx(worth * 6 / sampled)


def check_by_itself_each_would_decide_otherwise():
    """What the test above relies on; also that processes outside of a group do not count."""
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    with pytest.MonkeyPatch.context() as patch:
        run = Training(patch, **EASY, true=own_time)
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        run.model = convert_(model, AUTO, process_group=groups[rank()])
        run.linears = model[0], model[2]
        run.optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run.step(60)
    assert run.controller.phase == ("sampling" if rank() == 0 else "exact")
    assert isinstance(run.controller.seen["0"][0], Seen), "exact squares, no sketches"
    stranger = groups[1 - rank()]
    with pytest.raises(ValueError, match="process_group must be one that this process belongs to"):
        convert_(nn.Linear(4, 4), AUTO, process_group=stranger)


def check_square_is_that_of_the_mean_gradient_and_variances_add_up():
    for width, tolerance in ((16, 1e-4), (150, 0.3)):
        for name, wrap in WRAPPERS.items():
            with case(f"{name}, width {width}"), running(wrap=wrap, width=width) as run:
                local = {}
                read = StepObserver.read

                def noting(observer, read=read, local=local):
                    local[id(observer._state)] = found = read(observer)
                    return found

                run.step(4)
                with mock.patch.object(StepObserver, "read", noting):
                    run.step()
                for number, layer in (("0", run.linears[0]), ("2", run.linears[1])):
                    (seen,) = run.controller.seen[number]
                    square = whole(layer.weight.grad).double().square().sum().item()
                    assert seen.square == pytest.approx(square, rel=tolerance)
                    own = local[id(layer.layer_state)]
                    assert len(seen.uses) == len(own.uses) == 2
                    for share in (1 / 2, 1 / 16):
                        variances = gathered(own.variance_of(share))
                        expected = sum(variances) / dist.get_world_size() ** 2
                        assert seen.variance_of(share) == pytest.approx(expected)
                assert_alike([(s[0].square, s[0].variances) for s in run.controller.seen.values()])


def check_square_from_sampled_steps_is_without_their_noise():
    with running(true=fast) as run:
        run.step(60)
        assert run.controller.phase == "sampling"
        run.noise, run.optimizer.param_groups[0]["lr"] = 1.0, 0.0
        run.step(62)  # observed at 72, 97 and 122
        *_, a, b, c = run.controller.seen["0"]
        assert all(0.5 < seen.included / seen.computed < 0.9 for seen in (a, b, c))
        auto_freeze(run.model)
        squares = []
        for _ in range(20):
            run.linears[0].layer_state.is_native = True
            run.optimizer.zero_grad()
            run.backward()
            squares.append(run.linears[0].weight.grad.square().sum().item())
        mean = sum(seen.square for seen in (a, b, c)) / 3
        assert mean == pytest.approx(sum(squares) / len(squares), rel=0.5)


def check_a_layer_that_one_process_does_not_use():
    """As experts in a mixture: the gradients of the others are zero."""
    run = Plain()
    for number in range(1, 14):
        grads = run.step([str(rank())])
        if number == 5:
            square = (grads[str(rank())] / 2).square().sum().item()
            (own,) = run.controller.seen[str(rank())]
            assert own.square == pytest.approx(square)
            (other,) = run.controller.seen[str(1 - rank())]
            assert other.uses == []
            assert other.square > 0
    assert all(len(seen) == 3 for seen in run.controller.seen.values())
    assert_alike([[s.square for s in seen] for seen in run.controller.seen.values()])
    first, *_ = model_report(run.model).splitlines()
    assert_alike((first, run.controller._evidence.layers()))
    # Nobody uses one of them.
    run = Plain()
    for _ in range(13):
        run.step(["0"])
    assert [len(seen) for seen in run.controller.seen.values()] == [3, 0]
    assert list(run.controller._evidence.layers()) == ["0"]


def check_what_is_not_finite_in_one_process_is_dropped_in_all():
    for scale in (torch.nan, torch.inf):
        run = Plain()
        for number in range(1, 14):
            run.step(scale=scale if number == 9 and rank() == 1 else 1.0)
        assert [len(seen) for seen in run.controller.seen.values()] == [2, 2]


def check_a_ratio_given_in_one_process_leaves_the_layer_undecided_in_all():
    for given_after, looks in ((3, 0), (9, 2)):
        run = Plain()
        for number in range(1, 14):
            run.step()
            if number == given_after and rank() == 1:
                run.model["1"].set_ratio_(1 / 2)
        assert [len(seen) for seen in run.controller.seen.values()] == [3, looks]
        assert list(run.controller._evidence.layers()) == ["0"]
        assert run.model["1"].config.ratio == (1 / 2 if rank() == 1 else 1)


def check_different_layers_are_refused_in_all_processes():
    for options in (
        {"filter_fn": lambda module, name: rank() == 0 or name == "1"},
        {"overrides": {"1": AUTO if rank() == 0 else MemAOPConfig(ratio="auto")}},
    ):
        run = Plain(**options) if rank() == 0 or "overrides" in options else None
        if run is None:
            model = nn.ModuleDict({"0": nn.Linear(8, 6), "1": nn.Linear(8, 6)})
            convert_(model, AUTO, **options)
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with pytest.raises(RuntimeError, match=r"different layers, .* process_group"):
            optimizer.step() if run is None else run.optimizer.step()


def check_times_that_one_process_lacks_are_lacking_in_all():
    """As those of a GPU whose events have not passed when the others' have."""
    with running(true=fast) as run:
        run.step(12)
        if rank() == 1:
            run.controller._clock.forget("exact")
        run.step(5)
        assert run.controller.phase == "exact"
        run.step(96)  # decides at 113
        assert run.controller.phase == "trial"
        assert_alike(run.history)
        run.step(33)
        if rank() == 1:
            run.controller._clock.forget("sampled")
        run.step()
        assert run.controller.phase == "exact"
        assert run.controller.realised is None
        assert "no times of sampled steps" in model_report(run.model)
        run.step(300)
        assert run.controller.phase == "sampling"
        assert_alike(run.history)


def check_timing_that_fails_in_one_process_stops_that_one_only():
    with running(true=fast, wrap=lambda model: model) as run:
        run.step(12)
        seconds = Savings.seconds

        def fails(*args):
            if rank() == 1:
                raise MemoryError("none left")
            return seconds(*args)

        with mock.patch.object(Savings, "seconds", fails):
            if rank() == 1:
                with pytest.raises(MemoryError, match="none left"):
                    run.step()
            else:
                run.step()
                assert run.controller.phase == "exact"


def check_layers_divided_by_tensor_parallelism_stay_exact_and_the_others_do_not():
    mesh = init_device_mesh("cpu", (2,))

    def divided(model):
        return parallelize_module(model, mesh, {"1": ColwiseParallel()})

    run = Plain(wrap=divided)
    layer = run.model["1"].layer_state
    for _ in range(13):
        assert layer.is_native
        run.step()
    assert [len(seen) for seen in run.controller.seen.values()] == [3, 0]
    assert list(run.controller._evidence.layers()) == ["0"]
    assert model_report(run.model).splitlines()[-2].endswith("divided by tensor parallelism")
    # Both processes draw the same numbers for the other layer, so their mean has all of the noise.
    single = Plain()
    for _ in range(5):
        torch.manual_seed(7)
        run.step()
        torch.manual_seed(7)
        single.step()
    for _ in range(200 - run.controller.steps):
        torch.manual_seed(7)
        run.step()
    for _ in range(13 - single.controller.steps):
        torch.manual_seed(7)
        single.step()
    both = [one.controller.seen["0"][-1].variance_of(1 / 4) for one in (run, single)]
    assert both[0] == pytest.approx(2 * both[1])


def check_decisions_are_saved_and_loaded_alike():
    config = functools.partial(MemAOPConfig, ratio="auto")
    for memory in ("none", "subspace"):
        with running(true=fast, config=config(memory=memory)) as run:
            run.step(60)
            assert run.controller.phase == "sampling"
            state = {
                "model": copy.deepcopy(run.model.state_dict()),
                "memory": copy.deepcopy(memory_state_dict(run.model)),
            }
            draws = torch.get_rng_state()
            auto_freeze(run.model)
            run.step(3)
        with running(true=own_time, config=config(memory=memory)) as other:
            other.model.load_state_dict(state["model"])
            load_memory_state_dict(other.model, state["memory"])
            torch.set_rng_state(draws)
            other.step(3)
            for ours, theirs in zip(other.linears, run.linears, strict=True):
                assert torch.equal(ours.weight, theirs.weight)
            other.step(117)
            assert all(other.modes)
            assert other.controller.steps == 180
            assert_alike(other.history)
    with running(true=fast) as other:
        if rank() == 0:
            other.controller.load_state_dict(state["memory"]["ratio=auto 0"])
        with pytest.raises(RuntimeError, match="earlier decisions"):
            other.step()


def check_steps_of_an_optimizer_inside_of_another_are_counted_alike():
    """`ZeroRedundancyOptimizer` has one inside that holds the first weight, in one process."""
    with running(true=fast) as run:
        run.optimizer = ZeroRedundancyOptimizer(run.model.parameters(), torch.optim.SGD, lr=0.1)
        inner = {id(p) for g in run.optimizer.optim.param_groups for p in g["params"]}
        assert sorted(gathered(id(run.linears[0].weight) in inner)) == [False, True]
        run.step(60)
        assert run.controller.steps == 60
        assert run.controller.phase == "sampling"
        assert_alike(run.history)


def check_copies_decide_alike_too():
    with running(true=fast, wrap=lambda model: model) as run:
        run.step(3)
        run.model = copy.deepcopy(run.model)
        run.linears = run.model[0], run.model[2]
        run.optimizer = torch.optim.SGD(run.model.parameters(), 0.1)
        run.step(57)
        assert run.controller.steps == 57
        assert run.controller.phase == "sampling"
        assert_alike(run.history)


def check_one_reduction_for_each_look_and_one_for_each_decision():
    with running(true=fast) as run, mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce):
        counts = []
        for _ in range(60):
            run.step()
            counts.append(dist.all_reduce.call_count)
        at = [n for n, (a, b) in enumerate(zip([0, *counts], counts, strict=False), 1) if b > a]
        # The first comparison; what a step takes; looks, at the last of which is the decision; the
        # end of the trial.
        assert at == [1, 4, 5, 9, 13, 47]
        assert counts[-1] == 7


def check_the_group_is_all_processes_by_default():
    assert Processes().size == dist.get_world_size()
    assert copy.deepcopy(Processes()).size == dist.get_world_size()
    assert everywhere(torch.tensor([float(Processes().size)])).sum() == dist.get_world_size() ** 2
