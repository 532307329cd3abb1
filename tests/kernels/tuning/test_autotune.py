"""Which configuration a launch gets, and that looking for it changes nothing but that."""

import logging
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources, PTXASError

from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.residual_gemm import residual_gemm
from memaop_triton.kernels.gpu.score import (
    accumulate_and_score,
    accumulate_rest,
    row_norms,
    row_scores,
)
from memaop_triton.kernels.gpu.subspace import project, project_gradient, transposed_mm
from memaop_triton.kernels.tuning import (
    autotune,
    cache,
    cache_files,
    defaults,
    search,
    timing,
    tuner,
)
from memaop_triton.kernels.tuning.cache_entries import ConfigFile, Gpu, fields_of
from memaop_triton.kernels.tuning.defaults import GemmConfig
from memaop_triton.kernels.tuning.problem import Problem, flags
from tests.traffic import interpreted

PROBLEM = Problem("gather_gemm", torch.float16, 1000, 800, 256, 256)
DEVICE = torch.device("cpu")
TARGET = targets.current(DEVICE)
HEURISTIC = defaults.heuristic(PROBLEM.bucketed(), TARGET)
OTHERS = [c for c in search.candidates(PROBLEM.bucketed(), TARGET) if c != HEURISTIC]


@pytest.fixture(autouse=True)
def _few_are_tried(monkeypatch):
    assert len(OTHERS) > 3
    monkeypatch.setattr(autotune, "FIRST_USE_CANDIDATES", 4)


def launched(config):
    """Stands for a launch that runs in every configuration."""


def choose(problem=PROBLEM, device=DEVICE, run=launched):
    return autotune.choose(problem, device, lambda: partial(run), GemmConfig)


def origin(problem=PROBLEM, device=DEVICE):
    return autotune.choices()[problem.bucketed(), device].origin


@pytest.fixture
def best(fake_gpu):
    """The third candidate is the fastest."""
    fake_gpu.milliseconds = lambda config: 0.5 if config == OTHERS[2] else 1.0
    return OTHERS[2]


@pytest.fixture
def keep(fake_gpu):
    """Writes an entry for the problem into a folder of files, as another process would."""

    def write(config, root=None, **changes):
        entry = cache.entry_for(PROBLEM.bucketed(), config, 0.5, 1.0)
        file = ConfigFile(fake_gpu.gpu, PROBLEM.kernel, (replace(entry, **changes),))
        path = cache.path_of(root or cache.folder(), file.gpu, file.kernel)
        cache_files.merge_into(path, file, source="")

    return write


def test_the_best_is_found_once_and_kept(fake_gpu, best):
    assert choose() == best
    assert len(fake_gpu.timed) == len(set(fake_gpu.timed)) == autotune.FIRST_USE_CANDIDATES
    assert fake_gpu.timed[0] == HEURISTIC
    assert choose() == best
    assert origin() == "tuned"
    autotune.forget()  # as another process
    assert choose() == best
    assert origin() == "cache"
    assert len(fake_gpu.timed) == autotune.FIRST_USE_CANDIDATES


def test_a_problem_that_was_met_costs_a_lookup(fake_gpu, monkeypatch):
    first = choose()
    monkeypatch.setattr(autotune, "_choose", lambda *_: pytest.fail("chosen again"))
    assert choose() is first


def test_batches_of_like_size_share_an_outcome(fake_gpu, best):
    for rows, k in ((1000, 800), (1024, 1000), (999, 513)):
        assert choose(replace(PROBLEM, rows=rows, k=k)) == best
    assert len(fake_gpu.timed) == autotune.FIRST_USE_CANDIDATES
    choose(replace(PROBLEM, rows=1025))
    assert len(fake_gpu.timed) == 2 * autotune.FIRST_USE_CANDIDATES


def test_many_sizes_of_batches_are_not_all_remembered(fake_gpu, monkeypatch):
    monkeypatch.setattr(autotune, "_MOST_LAUNCHES", 10)
    for rows in range(900, 940):
        choose(replace(PROBLEM, rows=rows))
    assert len(autotune._by_launch) <= 10
    assert len(autotune.choices()) == 1


def test_a_configuration_that_is_given_is_taken(fake_gpu, monkeypatch):
    monkeypatch.setattr(autotune, "choose", lambda *_: pytest.fail("asked"))
    x, g = torch.randn(32, 16), torch.randn(32, 16)
    with interpreted():
        gather_gemm(x, g, torch.arange(8), config=replace(OTHERS[0], block_n=16, block_p=16))
        row_scores(x, g, config=defaults.RowConfig(16, 16, 4))


def test_shipped_files_serve_after_the_users_own(fake_gpu, keep, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "SHIPPED", tmp_path / "shipped")
    keep(OTHERS[0], tmp_path / "shipped")
    assert choose() == OTHERS[0]
    assert origin() == "shipped"
    keep(OTHERS[1])
    autotune.forget()
    assert choose() == OTHERS[1]
    assert origin() == "cache"
    assert not fake_gpu.timed


def test_off(fake_gpu, keep, monkeypatch):
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "off")
    assert choose() == HEURISTIC
    assert origin() == "heuristic"
    keep(OTHERS[1])
    autotune.forget()
    assert choose() == OTHERS[1]
    assert not fake_gpu.timed


def test_force_tunes_anew_once_per_process_and_tries_everything(fake_gpu, keep, best, monkeypatch):
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "force")
    keep(OTHERS[1])
    for _ in range(2):
        assert choose() == best
    assert set(fake_gpu.timed) == {HEURISTIC, *OTHERS}
    assert len(fake_gpu.timed) == 1 + len(OTHERS)
    autotune.forget()
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "off")
    assert choose() == best


def test_inside_forced_everything_is_tuned_anew_whatever_the_environment_says(
    fake_gpu, best, monkeypatch
):
    class Heard(tuner.Observer):
        calls = ()

        def begin(self, problem, count):
            self.calls += (("begin", problem, count),)

        def end(self, problem, tuned):
            self.calls += (("end", tuned.config),)

    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "off")
    assert choose() == HEURISTIC
    heard = Heard()
    with autotune.forced(heard):
        assert choose() == best
    assert heard.calls == (("begin", PROBLEM.bucketed(), 1 + len(OTHERS)), ("end", best))
    assert autotune.mode() == "off"


def test_an_unknown_mode_names_the_known_ones(fake_gpu, monkeypatch):
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "always")
    with pytest.raises(ValueError, match="AUTOTUNE='always' is not one of 'off', 'first-use', 'f"):
        choose()
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "")
    assert autotune.mode() == "first-use"


def test_nothing_is_tuned_on_a_cpu(fake_gpu, monkeypatch):
    monkeypatch.setattr(autotune, "describe", lambda device: None)
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "force")
    assert choose(run=lambda config: pytest.fail("launched")) == HEURISTIC


def test_during_a_capture_nothing_is_tuned_or_settled(fake_gpu, best, keep, monkeypatch):
    monkeypatch.setattr(autotune, "_is_capturing", lambda device: True)
    assert choose() == HEURISTIC
    assert not fake_gpu.timed
    monkeypatch.setattr(autotune, "_is_capturing", lambda device: False)
    assert choose() == best
    monkeypatch.setattr(autotune, "_is_capturing", lambda device: True)
    autotune.forget()
    assert choose() == best


def test_a_stale_entry_is_not_tried_during_a_capture(fake_gpu, keep, monkeypatch):
    monkeypatch.setattr(autotune, "_is_capturing", lambda device: True)
    keep(OTHERS[1], triton="1.0")
    assert choose(run=lambda config: pytest.fail("launched")) == HEURISTIC


def make_rank(monkeypatch, rank, how):
    if how == "launched":
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
    else:
        distributed = torch.distributed
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(distributed, "get_world_size", lambda: 2)


@pytest.mark.parametrize("how", ["launched", "initialised"])
@pytest.mark.parametrize("mode", ["first-use", "force"])
def test_ranks_but_the_first_do_not_tune(fake_gpu, best, keep, monkeypatch, how, mode):
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", mode)
    make_rank(monkeypatch, 1, how)
    assert choose() == HEURISTIC
    keep(OTHERS[1])
    autotune.forget()
    assert choose() == OTHERS[1]
    assert not fake_gpu.timed
    autotune.forget()
    make_rank(monkeypatch, 0, how)
    assert choose() == (best if mode == "force" else OTHERS[1])


@pytest.mark.parametrize("how", ["launched", "initialised"])
def test_the_first_rank_does_not_keep_the_others_waiting(fake_gpu, best, monkeypatch, how):
    monkeypatch.setattr(autotune, "_seconds_spent", 2 * autotune.SHARED_RUN_SECONDS)
    with monkeypatch.context() as patch:
        make_rank(patch, 0, how)
        assert choose() == HEURISTIC
    autotune.forget()
    assert choose() == best


def test_a_stale_entry_is_tuned_anew_where_that_is_allowed(fake_gpu, best, keep, monkeypatch):
    keep(OTHERS[1], triton="1.0")
    assert choose() == best
    autotune.forget()
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "off")
    assert choose() == best  # the stale one is still in the file


def test_a_stale_entry_serves_where_nothing_is_tuned_if_it_runs(fake_gpu, keep, monkeypatch):
    keep(OTHERS[1], triton="1.0")
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "off")
    ran = []
    assert choose(run=lambda config: ran.append(config)) == OTHERS[1] == ran[0]
    autotune.forget()

    def too_large(config):
        raise OutOfResources(300_000, 232_448, "shared memory")

    assert choose(run=too_large) == HEURISTIC


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300_000, 232_448, "shared memory"),
        PTXASError("syntax"),
        torch.OutOfMemoryError("too many parts"),
        RuntimeError("PassManager::run failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_candidates_that_do_not_run_are_passed_over(fake_gpu, best, error):
    def some(config):
        if config in (HEURISTIC, OTHERS[0]):
            raise error

    assert choose(run=some) == best
    assert len(fake_gpu.timed) == autotune.FIRST_USE_CANDIDATES - 2
    (entry,) = cache_files.read(path(fake_gpu)).entries
    assert entry.heuristic_milliseconds is None


def path(fake_gpu):
    return cache.path_of(cache.folder(), fake_gpu.gpu, PROBLEM.kernel)


@pytest.mark.parametrize(
    "error", [RuntimeError("an illegal memory access"), torch.AcceleratorError, IndexError()]
)
def test_other_errors_are_not_hidden(fake_gpu, error):
    def broken(config):
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        choose(run=broken)


def test_where_no_candidate_runs_the_heuristic_serves(fake_gpu):
    def too_large(config):
        calls.append(config)
        raise OutOfResources(300_000, 232_448, "shared memory")

    calls = []
    for _ in range(2):
        assert choose(run=too_large) == HEURISTIC
    assert len(calls) == autotune.FIRST_USE_CANDIDATES
    assert not path(fake_gpu).exists()


def test_without_memory_for_the_copies_the_heuristic_serves_and_it_is_said_once(fake_gpu):
    def rehearse():
        raise torch.OutOfMemoryError("no room")

    autotune._warn_of_memory.cache_clear()
    with pytest.warns(RuntimeWarning, match="not enough GPU memory to tune"):
        assert autotune.choose(PROBLEM, DEVICE, rehearse, GemmConfig) == HEURISTIC
    other = replace(PROBLEM, n=512)
    chosen = autotune.choose(other, DEVICE, rehearse, GemmConfig)  # a warning would be an error
    assert chosen == defaults.heuristic(other.bucketed(), TARGET)


def test_a_gain_within_the_noise_is_none(fake_gpu):
    fake_gpu.milliseconds = lambda config: 1.0 if config == HEURISTIC else 0.985
    assert choose() == HEURISTIC


def test_gpus_of_two_kinds_have_files_of_their_own(fake_gpu, monkeypatch):
    kinds = [Gpu("Fake GPU (1)", "8.0", 108), Gpu("Fake GPU (2)", "9.0", 132)]
    monkeypatch.setattr(autotune, "describe", lambda device: kinds[device.index])
    for index in range(2):
        fake_gpu.milliseconds = lambda config, i=index: 0.5 if config == OTHERS[i] else 1.0
        assert choose(device=torch.device("cpu", index)) == OTHERS[index]
    autotune.forget()
    for index in range(2):
        assert choose(device=torch.device("cpu", index)) == OTHERS[index]
    assert sorted(p.name for p in cache.folder().iterdir()) == ["fake-gpu-1", "fake-gpu-2"]


def test_first_use_tells_one_line(fake_gpu, best, caplog):
    with caplog.at_level(logging.INFO, "memaop_triton"):
        choose()
        choose()
    (record,) = [r for r in caplog.records if r.name == "memaop_triton"]
    for words in (f"gather_gemm {PROBLEM.bucketed().key}", "0.5 ms (heuristic 1 ms)", "block_n="):
        assert words in record.getMessage()


def test_flags_are_known_and_in_order():
    assert flags(weighted=True, accumulate=True, sums=False) == ("accumulate", "weighted")
    with pytest.raises(ValueError, match="flag 'wieghted' is not one of accumulate"):
        flags(wieghted=True)


def full(filled):
    """A row memory of half its slots, the others never written."""
    mx, mg = torch.randn(64, 32), torch.randn(64, 48)
    mx[~filled], mg[~filled] = torch.nan, torch.nan
    return mx, mg, filled.clone()


def operands():
    torch.manual_seed(0)
    filled = torch.arange(64) % 2 == 0
    return SimpleNamespace(
        x=torch.randn(64, 32),
        g=torch.randn(64, 48),
        memory=full(filled),
        indices=torch.arange(0, 64, 3),
        weights=torch.rand(22),
        carry=torch.full((1,), 0.5),
        seed=torch.tensor([7]),
        lost=torch.zeros(1),
        taken=torch.arange(64) % 3 == 0,
        out=torch.randn(48, 32),
        z=torch.randn(64, 4),
        basis=torch.linalg.qr(torch.randn(32, 4)).Q.contiguous(),
        rest=torch.rand(64),
    )


LAUNCHES = {
    "row_norms": lambda o: row_norms(o.x),
    "row_scores": lambda o: row_scores(o.x, o.g, bias_grad=True),
    "accumulate_and_score": lambda o: accumulate_and_score(
        o.memory, o.x, o.g, o.carry, o.seed, signed=True
    ),
    "accumulate_rest": lambda o: accumulate_rest(
        o.memory, o.x, o.g, o.carry, o.seed, o.taken, o.lost, bias_grad=True
    ),
    "project": lambda o: project(o.x, o.basis, 4.0),
    "project_gradient": lambda o: project_gradient(o.g, o.z, o.rest, bias_grad=True),
    "transposed_mm": lambda o: transposed_mm(o.z, o.x),
    "gather_gemm": lambda o: gather_gemm(o.x, o.g, o.indices, o.weights, out=o.out),
    "gather_gemm, new": lambda o: gather_gemm(o.x, o.g, o.indices),
    "residual_gemm": lambda o: residual_gemm(
        o.memory, o.x, o.g, o.indices, o.carry, o.seed, o.lost
    ),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_tuning_changes_nothing_that_a_launch_is_given(name, fake_gpu, monkeypatch):
    monkeypatch.setattr(autotune, "FIRST_USE_CANDIDATES", 2)
    monkeypatch.setattr(tuner, "LEAST_GAIN", 2.0)  # the heuristic's wins: results must agree
    given = operands()
    before = operands()
    held = []

    def check(config):
        for part, was in zip(tensors(given), tensors(before), strict=True):
            assert torch.equal(part.nan_to_num(7.0), was.nan_to_num(7.0))
        held.append(config)
        return 1.0

    fake_gpu.milliseconds = check
    with interpreted():
        tuned = LAUNCHES[name](given)
        assert len(held) == 2, "both candidates have run, and the launch itself not yet"
        monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "off")
        monkeypatch.setattr(autotune, "describe", lambda device: None)
        autotune.forget()
        plain = LAUNCHES[name](before)
    for one, other in zip(
        [*tensors(given), *leaves(tuned)], [*tensors(before), *leaves(plain)], strict=True
    ):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def tensors(given):
    return leaves(tuple(vars(given).values()))


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value.float()]
    return [] if value is None else [leaf for part in value for leaf in leaves(part)]


@pytest.mark.parametrize("name", ["accumulate_and_score", "accumulate_rest", "residual_gemm"])
def test_row_memories_are_tuned_as_they_are_in_the_middle_of_training(name, fake_gpu, monkeypatch):
    monkeypatch.setattr(autotune, "FIRST_USE_CANDIDATES", 1)
    given, seen = operands(), []
    time_candidate = timing.time_candidate

    def looking(call, device, best):
        time_candidate(call, device, best)
        seen.append(call.args[0][2].all().item())
        return 1.0

    monkeypatch.setattr(timing, "time_candidate", looking)
    with interpreted():
        LAUNCHES[name](given)
    assert seen == [True]


@pytest.mark.parametrize(
    ("milliseconds", "best", "batches"),
    [
        ([0.1] * 3 + [0.2] * 60, 1.0, [timing.FIRST, timing.MOST]),
        ([2.0] * 60, 1.9, [timing.FIRST, 15]),
        ([100.0] * 60, 100.0, [timing.FIRST, timing.LEAST]),
        ([2.0, 9.0, 2.0], 1.0, [timing.FIRST]),
    ],
)
def test_repetitions_follow_the_time_of_a_call(monkeypatch, milliseconds, best, batches):
    times, taken = list(milliseconds), []

    def cold(call, flush, repetitions):
        taken.append(repetitions)
        assert flush.numel() == 1 << 20
        return [times.pop(0) for _ in range(repetitions)]

    class Guard:
        def __init__(self, device):
            assert device == DEVICE

        def __enter__(self):
            warm.append("device")

        def __exit__(self, *_):
            warm.append("left")

    warm = []
    monkeypatch.setattr(timing, "_cold_times", cold)
    monkeypatch.setattr(timing, "_flush_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: warm.append("synchronize"))
    median = timing.time_candidate(lambda: warm.append("call"), DEVICE, best)
    assert median == milliseconds[-1]
    assert taken == batches
    assert warm == ["device", "call", "synchronize", "left"]


def test_every_timed_call_finds_the_cache_overwritten(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("mark")

        def elapsed_time(self, end):
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    flush = SimpleNamespace(zero_=lambda: log.append("flush"))
    assert timing._cold_times(lambda: log.append("call"), flush, 2) == [1.5, 1.5]
    assert log == ["flush", "mark", "call", "mark"] * 2 + ["wait"]


def test_every_candidate_is_one_that_a_file_may_hold():
    """What tuning finds must be accepted when it is read back."""
    from memaop_triton.kernels.tuning.cache_entries import config_of

    for target in targets.TARGETS.values():
        for problem in problems():
            for config in search.candidates(problem, target):
                assert config_of(problem.kernel, fields_of(config)) == config


def problems():
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (1, 1 << 12, 1 << 20):
            for n, p in ((1, 3), (4096, 4096)):
                for k in {max(1, rows // 8), rows}:
                    yield Problem("gather_gemm", dtype, rows, k, n, p, flags=("weighted",))
                    yield Problem("residual_gemm", dtype, rows, k, n, p, stored=dtype)
                for rank in (16, 64):
                    yield Problem("project", dtype, rows, rows, n, 0, rank=rank)
                    yield Problem("transposed_mm", dtype, rows, rows, n, 0, rank=rank)
                yield Problem("row_scores", dtype, rows, rows, n, p, flags=("sums",))
                yield Problem("accumulate_and_score", dtype, rows, rows, n, p, stored=dtype)
