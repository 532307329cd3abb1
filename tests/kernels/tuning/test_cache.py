"""The files of tuned configurations: shared, broken, stale, out of reach, and killed writers."""

import errno
import json
import os
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock

from memaop_triton.kernels.tuning import cache as config_cache
from memaop_triton.kernels.tuning.cache import Choice, ConfigFile, Gpu
from memaop_triton.kernels.tuning.config import GemmConfig, Problem, RowConfig
from tests.processes import ROOT, run, run_python

GPU = Gpu("Fake GPU (1)", "sm_90", 132)
CONFIG = GemmConfig(128, 64, 64, 4, 3, split_k=6)
OTHER = GemmConfig(64, 64, 32, 4, 3)
PROBLEM = Problem("gather_gemm", torch.bfloat16, 4096, 512, 1024, 768, flags=("weighted",))
SECOND = replace(PROBLEM, n=2048)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The file of the problem's kernel, in an empty cache."""
    monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(tmp_path))
    config_cache.forget()
    yield tmp_path / "configs" / "fake-gpu-1-sm-90-132" / "gather_gemm.json"
    config_cache.forget()


def entry(config=CONFIG, problem=PROBLEM, **changes):
    return replace(config_cache.entry_for(problem, config, 0.25, 0.5), **changes)


def add(config=CONFIG, problem=PROBLEM, **changes):
    config_cache.add(GPU, problem.kernel, entry(config, problem, **changes))


def found(problem=PROBLEM):
    one = config_cache.find(GPU, problem)
    return None if one is None else one.config


def by_another_process(path, *entries):
    config_cache.merge_into(path, ConfigFile(GPU, "gather_gemm", entries))


def held(path):
    return config_cache.read(path).entries


@pytest.mark.slow
def test_writers_at_once_lose_no_entry_and_killed_ones_leave_a_file_that_loads(tmp_path):
    command = [sys.executable, "-m", "tests.kernels.tuning.cache_worker"]
    run(*command, MEMAOP_TRITON_CACHE_DIR=str(tmp_path))


def test_an_entry_comes_back_as_it_was_from_the_file_of_its_kernel(cache):
    rows = replace(PROBLEM, kernel="row_scores", flags=())
    assert found() is None
    kept = [entry(), entry(OTHER, SECOND, heuristic_milliseconds=None)]
    for one in kept:
        config_cache.add(GPU, "gather_gemm", one)
    add(RowConfig(8, 256, 4), rows)
    for _ in range(2):
        assert config_cache.find(GPU, PROBLEM) == Choice(CONFIG, "cache")
        assert found(rows) == RowConfig(8, 256, 4)
        config_cache.forget()
    assert config_cache.read(cache) == ConfigFile(GPU, "gather_gemm", tuple(kept))


def test_everything_that_a_problem_is_made_of_is_in_its_key():
    changes = {
        "dtype": torch.float32,
        "rows": 8192,
        "k": 1024,
        "n": 2048,
        "p": 512,
        "rank": 16,
        "stored": torch.float32,
        "flags": (),
        "block_rows": 64,
    }
    assert {field.name for field in fields(Problem)} == {*changes, "kernel", "precision"}
    keys = {replace(PROBLEM, **{name: value}).key for name, value in changes.items()}
    single = replace(PROBLEM, dtype=torch.float32)
    keys |= {PROBLEM.key, single.key, replace(single, precision="tf32").key}
    assert len(keys) == len(changes) + 2


def test_what_another_process_adds_is_kept_and_what_is_tuned_anew_replaces(cache):
    add(OTHER)
    by_another_process(cache, entry(OTHER, SECOND, tuned="2999-01-01T00:00:00+00:00"))
    add(CONFIG)
    assert (found(), found(SECOND)) == (CONFIG, OTHER)
    add(CONFIG, SECOND)  # by a clock that is right
    config_cache.forget()
    assert (found(), found(SECOND)) == (CONFIG, CONFIG)
    assert len(held(cache)) == 2


def test_entries_of_other_kernel_sources_are_dropped(cache, monkeypatch):
    add(OTHER)
    with monkeypatch.context() as patch:
        patch.setattr(config_cache, "source_hash", lambda kernel: "other")
        config_cache.forget()
        assert found() is None
        add(CONFIG, SECOND)
        assert found(SECOND) == CONFIG
    config_cache.forget()
    assert found() is None
    assert len(held(cache)) == 1


def test_an_entry_of_another_triton_stays_and_is_not_used(cache):
    add(OTHER, triton="1.0")
    assert found() is None
    add()
    config_cache.forget()
    assert found() == CONFIG
    assert len(held(cache)) == 2


def test_the_users_entry_comes_before_one_that_is_shipped(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(config_cache, "SHIPPED", tmp_path / "shipped")
    by_another_process(config_cache.path_of(tmp_path / "shipped", GPU, "gather_gemm"), entry())
    assert config_cache.find(GPU, PROBLEM) == Choice(CONFIG, "shipped")
    add(OTHER)
    assert config_cache.find(GPU, PROBLEM) == Choice(OTHER, "cache")


@pytest.mark.parametrize(
    "spoilt",
    [
        '{"schema": 1, "ker',
        "[]",
        "\ud800",
        {"schema": 99},
        {"kernel": "../../x"},
        {"entries": 5},
        {"entries": [{}]},
        {"entries": [{"config": {}}]},
    ],
)
def test_a_broken_file_is_warned_of_once_and_replaced(cache, spoilt):
    add(OTHER)
    if isinstance(spoilt, dict):
        spoilt = json.dumps(json.loads(cache.read_text()) | spoilt)
    cache.write_text(spoilt, errors="surrogatepass")
    config_cache.forget()
    with pytest.warns(RuntimeWarning, match=r"gather_gemm\.json are not used") as told:
        assert found() is None
    assert len(told) == 1
    assert found(SECOND) is None
    add()
    config_cache.forget()
    assert found() == CONFIG


def fails(code):
    return Mock(side_effect=OSError(code, os.strerror(code)))


@pytest.mark.parametrize(
    ("owner", "name", "code"),
    [
        (os, "fsync", errno.ENOSPC),
        (os, "replace", errno.EROFS),
        (config_cache, "FileLock", errno.EACCES),
        (Path, "mkdir", errno.EROFS),
    ],
)
def test_a_folder_that_cannot_be_written_is_warned_of_once(cache, monkeypatch, owner, name, code):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails(code))
        with pytest.warns(RuntimeWarning, match="are not kept in") as told:
            add()
        assert len(told) == 1
        second = replace(PROBLEM, kernel="row_scores", flags=())
        add(RowConfig(8, 256, 4), second)
        assert (found(), found(second)) == (CONFIG, RowConfig(8, 256, 4))
    assert not cache.exists()
    if cache.parent.exists():
        assert not [path for path in cache.parent.iterdir() if path.suffix != ".lock"]
    add(OTHER, SECOND)  # there is room again
    assert len(held(cache)) == 2


def test_a_file_in_place_of_the_folder(cache):
    cache.parents[1].write_text("in the way")
    with pytest.warns(RuntimeWarning, match="MEMAOP_TRITON_CACHE_DIR moves them"):
        add()
    config_cache.forget()
    assert found() is None


def test_a_file_that_cannot_be_read_is_left_alone(cache, monkeypatch):
    add(OTHER)
    config_cache.forget()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails(errno.EIO))
        with pytest.warns(RuntimeWarning, match="Input/output error"):
            assert found() is None
        with pytest.warns(RuntimeWarning, match="are not kept in"):
            add(CONFIG, SECOND)
        assert found(SECOND) == CONFIG, "in memory"
    config_cache.forget()
    assert (found(), found(SECOND)) == (OTHER, None)


def test_a_lock_that_is_never_given_back_is_not_waited_for_twice(cache, monkeypatch):
    monkeypatch.setattr(config_cache, "LOCK_SECONDS", 0.1)
    merging = Mock(wraps=config_cache.merge_into)
    monkeypatch.setattr(config_cache, "merge_into", merging)
    cache.parent.mkdir(parents=True)
    with FileLock(f"{cache}.lock"):
        with pytest.warns(RuntimeWarning, match="are not kept in"):
            add()
        add(OTHER, SECOND)
        assert found() == CONFIG
        assert not cache.exists()
    assert [call.args[-1] for call in merging.mock_calls] == [0.1, 0.0]
    add(OTHER, replace(PROBLEM, n=4))
    assert len(held(cache)) == 3


def test_without_filelock_it_is_said_once_that_there_is_no_lock(cache, monkeypatch):
    monkeypatch.setattr(config_cache, "FileLock", None)
    with pytest.warns(RuntimeWarning, match="filelock is not installed"):
        add()
    add(OTHER, SECOND)  # a second warning would be an error
    assert (found(), found(SECOND)) == (CONFIG, OTHER)
    assert len(held(cache)) == 2
    assert not list(cache.parent.glob("*.lock"))


def test_the_module_loads_without_filelock():
    run_python(
        "import sys; sys.modules['filelock'] = None\n"
        "from memaop_triton.kernels.tuning import cache; assert cache.FileLock is None"
    )


def test_what_a_killed_writer_left_is_removed(cache):
    add()
    left = cache.with_name(f".{cache.name}.123-abc")
    left.write_text("{")
    add(OTHER)
    assert not left.exists()


def test_the_umask_decides_who_can_read(cache):
    before = os.umask(0o027)
    try:
        add()
    finally:
        os.umask(before)
    assert cache.stat().st_mode & 0o777 == 0o640


def test_kinds_of_gpus_have_safe_folders_of_their_own():
    assert Gpu("../../NVIDIA H100", "sm_90", 132).slug == "nvidia-h100-sm-90-132"
    assert Gpu("NVIDIA H100", "sm_80", 114).slug == "nvidia-h100-sm-80-114"


def test_a_key_of_a_hash_is_made_of_every_file_that_its_kernel_is_made_of():
    folder = ROOT / "kernels" / "gpu"
    texts = {path.name: path.read_text() for path in folder.glob("*.py")}
    programs = {name for name, text in texts.items() if "@triton.jit" in text} | {"launch.py"}
    for kernel, listed in config_cache.SOURCES.items():
        imported = {
            f"{name}.py"
            for file in listed
            for name in re.findall(
                r"^from memaop_triton\.kernels\.gpu[. ](?:import )?(\w+)", texts[file], re.M
            )
        }
        # The products of a projection are multiplied by the gather GEMM, which has its own file.
        assert (imported & programs) - {"gather_gemm.py"} <= set(listed), kernel


def test_a_hash_changes_with_the_text_of_its_kernel(monkeypatch, tmp_path):
    for name in config_cache.SOURCES["gather_gemm"]:
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(config_cache, "_PROGRAMS", tmp_path)
    before = config_cache.source_hash.__wrapped__("gather_gemm")
    (tmp_path / "primitives.py").write_text("2")
    assert config_cache.source_hash.__wrapped__("gather_gemm") != before
