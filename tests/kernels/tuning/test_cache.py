"""The files of tuned configurations: shared, broken, stale, out of reach, and killed writers."""

import ast
import errno
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from memaop_triton.kernels.tuning import cache as config_cache
from memaop_triton.kernels.tuning.cache import ConfigFile, Gpu
from memaop_triton.kernels.tuning.config import KERNELS, GemmConfig, Problem, RowConfig

ROOT = Path(__file__).resolve().parents[3]
GPU = Gpu("Fake GPU (1)", "9.0", 132)
CONFIG = GemmConfig(128, 64, 64, 4, 3, split_k=6)
OTHER = GemmConfig(64, 64, 32, 4, 3)
PROBLEM = Problem("gather_gemm", torch.bfloat16, 4096, 512, 1024, 768, flags=("weighted",))
SECOND = replace(PROBLEM, n=2048)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The file of the problem's kernel, in an empty cache."""
    monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(tmp_path))
    config_cache.forget()
    yield tmp_path / "configs" / "fake-gpu-1-9-0-132" / "gather_gemm.json"
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


def run(mode, tmp_path):
    environ = dict(
        os.environ,
        MEMAOP_TRITON_CACHE_DIR=str(tmp_path),
        MEMAOP_TRITON_AUTOTUNE="first-use",
        PYTHONPATH=str(ROOT),
    )
    command = [sys.executable, "-m", "tests.kernels.tuning.cache_worker", mode]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_lose_no_entry(cache, tmp_path):
    run("tune", tmp_path)
    assert len({one.problem for one in held(cache)}) == len(held(cache)) == 100


def test_a_writer_that_is_killed_leaves_a_file_that_loads(cache, tmp_path):
    # How many writes come through before a kill depends on the machine; none lost is what counts.
    assert int(run("kill", tmp_path)) > 0
    assert held(cache)


def test_an_entry_comes_back_as_it_was(cache):
    assert found() is None
    kept = [entry(), entry(OTHER, SECOND, heuristic_milliseconds=None)]
    for one in kept:
        config_cache.add(GPU, "gather_gemm", one)
    for _ in range(2):
        one = config_cache.find(GPU, PROBLEM)
        assert (one.config, one.is_stale, one.origin) == (CONFIG, False, "cache")
        config_cache.forget()
    assert config_cache.read(cache) == ConfigFile(GPU, "gather_gemm", tuple(kept))


def test_kernels_have_files_of_their_own(cache):
    rows = replace(PROBLEM, kernel="row_scores", flags=())
    add()
    add(RowConfig(8, 256, 4), rows)
    config_cache.forget()
    assert (found(), found(rows)) == (CONFIG, RowConfig(8, 256, 4))


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


def test_another_triton_makes_an_entry_stale(cache):
    add(OTHER, triton="1.0")
    one = config_cache.find(GPU, PROBLEM)
    assert (one.config, one.is_stale) == (OTHER, True)
    add(tuned="2020-01-01T00:00:00+00:00")
    assert found() == CONFIG, "that of this Triton, although it is older"
    assert len(held(cache)) == 2


def test_a_stale_entry_of_the_user_comes_after_a_fresh_one_that_is_shipped(
    cache, monkeypatch, tmp_path
):
    monkeypatch.setattr(config_cache, "SHIPPED", tmp_path / "shipped")
    add(OTHER, triton="1.0")
    by_another_process(config_cache.path_of(tmp_path / "shipped", GPU, "gather_gemm"), entry())
    assert config_cache.find(GPU, PROBLEM).origin == "shipped"
    add(OTHER)
    assert config_cache.find(GPU, PROBLEM).origin == "cache"


def changed(**changes):
    """What a file says, with other fields in its entry."""

    def write(content):
        one = content["entries"][0] | changes
        return json.dumps(content | {"entries": [{k: v for k, v in one.items() if v is not ...}]})

    return write


CONFIG_FIELDS = {field.name: getattr(CONFIG, field.name) for field in fields(CONFIG)}
BROKEN = {
    "empty": lambda content: "",
    "cut off": lambda content: json.dumps(content)[:-9],
    "no object": lambda content: "[]",
    "no text": lambda content: b"\xff\xfe\x00",
    "another schema": lambda content: json.dumps(content | {"schema": 99}),
    "without a schema": lambda content: json.dumps({"entries": []}),
    "unknown kernel": lambda content: json.dumps(content | {"kernel": "../../x"}),
    "entries": lambda content: json.dumps(content | {"entries": 5}),
    "no time": changed(milliseconds=...),
    "unknown field": changed(evil=1),
    "no configuration": changed(config=None),
    "unknown configuration": changed(config=CONFIG_FIELDS | {"evil": 1}),
    "text in a configuration": changed(config=CONFIG_FIELDS | {"num_warps": "4"}),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_warned_of_once_and_replaced(cache, how):
    add(OTHER)
    text = BROKEN[how](json.loads(cache.read_text()))
    cache.write_bytes(text.encode() if isinstance(text, str) else text)
    config_cache.forget()
    with pytest.warns(RuntimeWarning, match=r"gather_gemm\.json are not used") as told:
        assert found() is None
    assert len(told) == 1
    assert found(SECOND) is None
    add()
    config_cache.forget()
    assert found() == CONFIG


def fails(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


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
    assert found() is None
    with pytest.warns(RuntimeWarning, match="MEMAOP_TRITON_CACHE_DIR moves them"):
        add()
    assert found() == CONFIG


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
    waited = []
    merge_into = config_cache.merge_into

    def noting(path, new, timeout):
        waited.append(timeout)
        return merge_into(path, new, timeout)

    monkeypatch.setattr(config_cache, "LOCK_SECONDS", 0.1)
    monkeypatch.setattr(config_cache, "merge_into", noting)
    cache.parent.mkdir(parents=True)
    with FileLock(f"{cache}.lock"):
        with pytest.warns(RuntimeWarning, match="are not kept in"):
            add()
        add(OTHER, SECOND)
        assert found() == CONFIG
        assert not cache.exists()
    assert waited == [0.1, 0.0]
    add(OTHER, replace(PROBLEM, n=4))
    assert len(held(cache)) == 3


def test_what_a_killed_writer_left_is_removed(cache):
    cache.parent.mkdir(parents=True)
    left = cache.with_name(f".{cache.name}.123-abc")
    left.write_text("{")
    add()
    assert not left.exists()
    assert found() == CONFIG


def test_the_umask_decides_who_can_read(cache):
    before = os.umask(0o027)
    try:
        add()
    finally:
        os.umask(before)
    assert cache.stat().st_mode & 0o777 == 0o640


def test_names_of_gpus_make_safe_folders():
    names = ["NVIDIA H100 80GB HBM3", "../../etc", "..", "", "Ω"]
    slugs = [Gpu(name, "9.0", 132).slug for name in names]
    assert slugs == [f"{name}9-0-132" for name in ("nvidia-h100-80gb-hbm3-", "etc-", "", "", "")]


def test_a_key_of_a_hash_is_made_of_every_file_that_its_kernel_is_made_of():
    def imported(name):
        tree = ast.parse((ROOT / "kernels" / "gpu" / name).read_text())
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        for node in nodes:
            prefix, _, module = (node.module or "").rpartition(".")
            if node.module == "memaop_triton.kernels.gpu":
                yield from (f"{alias.name}.py" for alias in node.names)
            elif prefix == "memaop_triton.kernels.gpu":
                yield f"{module}.py"

    programs = {
        path.name
        for path in (ROOT / "kernels" / "gpu").glob("*.py")
        if "@triton.jit" in path.read_text() or path.name == "launch.py"
    }
    for kernel in KERNELS:
        listed = config_cache.SOURCES[kernel]
        # The products of a projection are multiplied by the gather GEMM, which has its own file.
        wanted = {n for f in listed for n in imported(f) if n in programs} - {"gather_gemm.py"}
        assert wanted <= set(listed), kernel


def test_a_hash_changes_with_the_text_of_its_kernel(monkeypatch, tmp_path):
    for name in config_cache.SOURCES["gather_gemm"]:
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(config_cache, "_PROGRAMS", tmp_path)
    compute = config_cache.source_hash.__wrapped__
    before = compute("gather_gemm")
    assert compute("gather_gemm") == before
    (tmp_path / "primitives.py").write_text("2")
    assert compute("gather_gemm") != before
