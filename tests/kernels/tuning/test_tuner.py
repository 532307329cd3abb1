"""Which configuration a launch gets."""

import logging
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from triton.runtime.errors import OutOfResources, PTXASError

from memaop_triton.kernels import targets
from memaop_triton.kernels.gpu.gather_gemm import gather_gemm
from memaop_triton.kernels.gpu.score import row_scores
from memaop_triton.kernels.tuning import cache, defaults, search, tuner
from memaop_triton.kernels.tuning.config import GemmConfig, Problem, RowConfig
from tests.traffic import interpreted

PROBLEM = Problem("gather_gemm", torch.float16, 1000, 800, 256, 256)
DEVICE = torch.device("cpu")
TARGET = targets.current(DEVICE)
HEURISTIC = defaults.heuristic(PROBLEM.bucketed(), TARGET)
OTHERS = [c for c in search.candidates(PROBLEM.bucketed(), TARGET) if c != HEURISTIC]


@pytest.fixture(autouse=True)
def _few_are_tried(monkeypatch):
    assert len(OTHERS) > 3
    monkeypatch.setattr(tuner, "FIRST_USE_CANDIDATES", 4)


def choose(problem=PROBLEM, device=DEVICE, run=lambda config: None):
    return tuner.choose(problem, device, lambda: partial(run), GemmConfig)


def origin(problem=PROBLEM, device=DEVICE):
    return tuner.choices()[problem.bucketed(), device].origin


@pytest.fixture
def best(fake_gpu):
    """The third candidate is the fastest."""
    fake_gpu.milliseconds = lambda config: 0.5 if config == OTHERS[2] else 1.0
    return OTHERS[2]


@pytest.fixture
def keep(fake_gpu):
    """Writes an entry for the problem into the cache, as another process would."""

    def write(config):
        entry = cache.entry_for(PROBLEM.bucketed(), config, 0.5, 1.0)
        cache.add(fake_gpu.gpu, PROBLEM.kernel, entry)
        tuner.forget()

    return write


def test_the_best_is_found_once_and_kept(fake_gpu, best):
    assert choose() == best
    assert len(fake_gpu.timed) == len(set(fake_gpu.timed)) == tuner.FIRST_USE_CANDIDATES
    assert fake_gpu.timed[0] == HEURISTIC
    assert choose() == best
    assert origin() == "tuned"
    tuner.forget()  # as another process
    assert choose() == best
    assert origin() == "cache"
    assert len(fake_gpu.timed) == tuner.FIRST_USE_CANDIDATES


def test_batches_of_like_size_share_an_outcome(fake_gpu, best):
    for rows, k in ((1000, 800), (1024, 1000), (999, 513)):
        assert choose(replace(PROBLEM, rows=rows, k=k)) == best
    assert len(fake_gpu.timed) == tuner.FIRST_USE_CANDIDATES
    choose(replace(PROBLEM, rows=1025))
    assert len(fake_gpu.timed) == 2 * tuner.FIRST_USE_CANDIDATES


def test_a_configuration_that_is_given_is_taken(fake_gpu, monkeypatch):
    monkeypatch.setattr(tuner, "choose", lambda *_: pytest.fail("asked"))
    x, g = torch.randn(32, 16), torch.randn(32, 16)
    with interpreted():
        gather_gemm(x, g, torch.arange(8), config=GemmConfig(16, 16, 16, 4, 2, split_k=2))
        row_scores(x, g, config=RowConfig(16, 16, 4))


def test_force_tunes_anew_once_per_process_and_tries_everything(fake_gpu, keep, best, monkeypatch):
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "force")
    keep(OTHERS[1])
    for _ in range(2):
        assert choose() == best
    assert set(fake_gpu.timed) == {HEURISTIC, *OTHERS}
    assert len(fake_gpu.timed) == 1 + len(OTHERS)
    tuner.forget()
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "off")
    assert choose() == best


def capture(monkeypatch):
    monkeypatch.setattr(targets, "is_capturing", lambda device: True)


def launch_two(monkeypatch):
    """What torchrun sets for the first of two processes, before they have met."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")


def initialise_two(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


def never(config):
    pytest.fail("launched")


@pytest.mark.parametrize("begin", [lambda patch: None, launch_two, initialise_two])
def test_a_command_that_was_asked_to_tune_does_so_everywhere(fake_gpu, best, monkeypatch, begin):
    begin(monkeypatch)
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "off")
    assert choose() == HEURISTIC
    walked = []

    def walk(problem, configs):
        walked.append((problem, *configs))
        return iter(configs)

    with tuner.forced(walk) as outcomes:
        assert choose() == best
    assert walked == [(PROBLEM.bucketed(), HEURISTIC, *OTHERS)]
    assert [(problem, entry.config) for problem, entry in outcomes] == [(PROBLEM.bucketed(), best)]
    assert tuner.mode() == "off"


def test_modes(fake_gpu, monkeypatch):
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "always")
    with pytest.raises(ValueError, match="AUTOTUNE='always' is not one of 'off', 'first-use', 'f"):
        choose()
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "")
    assert tuner.mode() == "first-use"
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "off")
    assert choose(run=never) == HEURISTIC
    assert origin() == "heuristic"


def test_nothing_is_tuned_on_a_cpu(monkeypatch):
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", "force")
    assert choose(run=never) == HEURISTIC


@pytest.mark.parametrize("begin", [capture, launch_two, initialise_two])
@pytest.mark.parametrize("mode", ["first-use", "force", "off"])
def test_in_a_capture_and_on_every_rank_files_and_the_heuristic_serve(
    fake_gpu, best, keep, monkeypatch, begin, mode
):
    monkeypatch.setenv("MEMAOP_TRITON_AUTOTUNE", mode)
    with monkeypatch.context() as patch:
        begin(patch)
        assert choose(run=never) == HEURISTIC
        keep(OTHERS[1])
        assert choose(run=never) == OTHERS[1]
    if begin is not capture:  # what is chosen in a capture is chosen anew in any case
        tuner.forget()
    assert choose() == (best if mode == "force" else OTHERS[1])


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
    assert len(fake_gpu.timed) == tuner.FIRST_USE_CANDIDATES - 2
    (entry,) = kept(fake_gpu).entries
    assert entry.heuristic_milliseconds is None


def kept(fake_gpu):
    return cache.read(cache.path_of(cache.folder(), fake_gpu.gpu, PROBLEM.kernel))


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
        raise OutOfResources(300_000, 232_448, "shared memory")

    for run in (too_large, never):  # asked once
        assert choose(run=run) == HEURISTIC
    assert kept(fake_gpu) is None


def test_without_memory_for_the_copies_the_heuristic_serves_and_it_is_said_once(fake_gpu):
    def make_benchmark_call():
        raise torch.OutOfMemoryError("no room")

    tuner._warn_of_memory.cache_clear()
    with pytest.warns(RuntimeWarning, match="not enough GPU memory to tune"):
        assert tuner.choose(PROBLEM, DEVICE, make_benchmark_call, GemmConfig) == HEURISTIC
    other = replace(PROBLEM, n=512)
    with warnings.catch_warnings(action="error"):
        tuner.choose(other, DEVICE, make_benchmark_call, GemmConfig)
    assert origin(other) == "heuristic"


def test_a_gain_within_the_noise_is_none(fake_gpu):
    fake_gpu.milliseconds = lambda config: 1.0 if config == HEURISTIC else 0.985
    assert choose() == HEURISTIC


def test_first_use_tells_one_line(fake_gpu, best, caplog):
    with caplog.at_level(logging.INFO, "memaop_triton"):
        choose()
        choose()
    (message,) = [r.getMessage() for r in caplog.records if r.name == "memaop_triton"]
    for words in (f"gather_gemm {PROBLEM.bucketed().key}", "0.5 ms (heuristic 1 ms)", "block_n="):
        assert words in message
