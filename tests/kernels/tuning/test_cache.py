"""The files of tuned configurations: shared, broken, foreign, out of reach, and killed writers."""

import ast
import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from memaop_triton.kernels.tuning import cache as config_cache
from memaop_triton.kernels.tuning import cache_files
from memaop_triton.kernels.tuning.cache_entries import (
    ConfigFile,
    ConfigFileError,
    Gpu,
    config_of,
    parse,
)
from memaop_triton.kernels.tuning.defaults import GemmConfig, RowConfig
from memaop_triton.kernels.tuning.problem import KERNELS, Problem

ROOT = Path(__file__).resolve().parents[3]
GPU = Gpu("Fake GPU (1)", "9.0", 132)
CONFIG = GemmConfig(128, 64, 64, 4, 3, split_k=6)
OTHER = GemmConfig(64, 64, 32, 4, 3)
PROBLEM = Problem("gather_gemm", torch.bfloat16, 4096, 512, 1024, 768, flags=("weighted",))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The file of the problem's kernel, in an empty cache."""
    monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(tmp_path))
    config_cache.forget()
    yield tmp_path / "configs" / "fake-gpu-1" / "gather_gemm.json"
    config_cache.forget()


def entry(config=CONFIG, problem=PROBLEM, **changes):
    return replace(config_cache.entry_for(problem, config, 0.25, 0.5), **changes)


def add(config=CONFIG, problem=PROBLEM, **changes):
    config_cache.add(GPU, problem.kernel, entry(config, problem, **changes))


def found(problem=PROBLEM):
    one = config_cache.find(GPU, problem)
    return None if one is None else one.config


def content(path):
    return json.loads(path.read_text())


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
    entries = cache_files.read(cache).entries
    assert len({one.problem for one in entries}) == len(entries) == 100


def test_a_writer_that_is_killed_leaves_a_file_that_loads(cache, tmp_path):
    # How many writes come through before a kill depends on the machine; none lost is what counts.
    assert int(run("kill", tmp_path)) > 0
    assert cache_files.read(cache).entries


def test_an_entry_comes_back_as_it_was(cache):
    assert found() is None
    kept = entry()
    config_cache.add(GPU, "gather_gemm", kept)
    for _ in range(2):
        one = config_cache.find(GPU, PROBLEM)
        assert (one.config, one.entry, one.is_stale, one.origin) == (CONFIG, kept, False, "cache")
        config_cache.forget()
    assert cache_files.read(cache) == ConfigFile(GPU, "gather_gemm", (kept,))
    header = {k: v for k, v in content(cache).items() if k != "entries"}
    assert header == {
        "schema": 1,
        "gpu": "Fake GPU (1)",
        "capability": "9.0",
        "processors": 132,
        "kernel": "gather_gemm",
    }


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
    keys = {replace(PROBLEM, **{name: value}).key for name, value in changes.items()}
    single = replace(PROBLEM, dtype=torch.float32)
    keys |= {PROBLEM.key, single.key, replace(single, precision="tf32").key}
    assert len(keys) == len(changes) + 2


def test_what_another_process_adds_is_kept(cache):
    add()
    second = replace(PROBLEM, n=2048)
    cache_files.merge_into(
        cache, ConfigFile(GPU, "gather_gemm", (entry(OTHER, second),)), source=""
    )
    add(OTHER, replace(PROBLEM, n=512))
    assert found(second) == OTHER
    assert len(content(cache)["entries"]) == 3


def test_of_two_about_the_same_the_later_stays(cache):
    add(OTHER, tuned="2999-01-01T00:00:00.000000+00:00")  # by a clock that is wrong
    add()
    assert found() == CONFIG
    older = entry(OTHER, tuned="2020-01-01T00:00:00.000000+00:00")
    file = ConfigFile(GPU, "gather_gemm", (older,))
    merged = cache_files.merge_into(cache, file, source=older.source)
    assert [one.config for one in merged.entries] == [asdict(CONFIG)]


def test_other_kernel_sources_say_nothing_and_lose_nothing(cache, monkeypatch):
    add(OTHER)
    monkeypatch.setattr(config_cache, "source_hash", lambda kernel: "other")
    config_cache.forget()
    assert found() is None
    add()
    assert found() == CONFIG
    monkeypatch.undo()
    monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(cache.parents[2]))
    config_cache.forget()
    assert found() == OTHER


def test_entries_of_other_sources_go_after_a_month(cache):
    for source, day in (("old", "2020-01-01"), ("new", None)):
        one = entry(OTHER, source=source)
        if day:
            one = replace(one, tuned=f"{day}T00:00:00.000000+00:00")
        file = ConfigFile(GPU, "gather_gemm", (one,))
        cache_files.merge_into(cache, file, source=one.source)
    own = config_cache.source_hash("gather_gemm")
    old = entry(OTHER, replace(PROBLEM, n=8), tuned="2020-01-01T00:00:00.000000+00:00")
    merged = cache_files.merge_into(
        cache, ConfigFile(GPU, "gather_gemm", (entry(), old)), source=own
    )
    assert sorted(one.source for one in merged.entries) == sorted([own, own, "new"])


def test_another_triton_makes_an_entry_stale(cache):
    add(OTHER, triton="1.0")
    one = config_cache.find(GPU, PROBLEM)
    assert (one.config, one.is_stale) == (OTHER, True)
    add(tuned="2020-01-01T00:00:00.000000+00:00")
    assert found() == CONFIG, "that of this Triton, although it is older"
    assert len(content(cache)["entries"]) == 2


def test_a_stale_entry_of_the_user_comes_after_a_fresh_one_that_is_shipped(
    cache, monkeypatch, tmp_path
):
    monkeypatch.setattr(config_cache, "SHIPPED", tmp_path / "shipped")
    add(OTHER, triton="1.0")
    path = config_cache.path_of(tmp_path / "shipped", GPU, "gather_gemm")
    cache_files.merge_into(path, ConfigFile(GPU, "gather_gemm", (entry(),)), source="")
    assert config_cache.find(GPU, PROBLEM).origin == "shipped"


def broken(cache, text):
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_bytes(text.encode() if isinstance(text, str) else text)
    config_cache.forget()


def test_a_file_cut_off_anywhere_is_refused_as_a_whole(cache):
    add()
    whole = cache.read_text()
    for length in range(0, len(whole) - 1, 7):
        cache.write_text(whole[:length])
        with pytest.raises(ConfigFileError) as refused:
            cache_files.read(cache)
        assert refused.value.replaceable


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"hello": 1}',
        '{"schema": 1}',
        b"\xff\xfe\x00",
        "[" * 100_000,
        '{"schema": 1, "gpu": "\\u0000", "capability": "9.0", "processors": 132, '
        '"kernel": "gather_gemm", "entries": []}',
        '{"schema": 1, "gpu": "Fake GPU (1)", "capability": "9.0", "processors": -1, '
        '"kernel": "gather_gemm", "entries": []}',
        '{"schema": 1, "gpu": "Fake GPU (1)", "capability": "9.0", "processors": 132, '
        '"kernel": "../../x", "entries": []}',
        '{"schema": 1, "gpu": "Fake GPU (1)", "capability": "9.0", "processors": 132, '
        '"kernel": "gather_gemm", "entries": {}}',
        '{"schema": 1, "x": ' + "9" * 10_000 + "}",
    ],
    ids=range(11),
)
def test_a_broken_file_is_warned_of_once_and_replaced(cache, text):
    broken(cache, text)
    with pytest.warns(RuntimeWarning, match=r"gather_gemm\.json are not used") as told:
        assert found() is None
    assert len(told) == 1
    assert found(replace(PROBLEM, n=2)) is None
    add()
    config_cache.forget()
    assert found() == CONFIG


@pytest.mark.parametrize(
    ("field", "value"), [("schema", 2), ("gpu", "Other GPU"), ("processors", 114)]
)
def test_a_file_of_others_is_warned_of_and_left_alone(cache, field, value):
    add(OTHER)
    broken(cache, json.dumps(content(cache) | {field: value}))
    before = cache.read_bytes()
    with pytest.warns(RuntimeWarning, match="are not used") as told:
        assert found() is None
    assert len(told) == 1
    with pytest.warns(RuntimeWarning, match="are not kept"):
        add()
    assert found() == CONFIG, "in memory"
    add(OTHER, replace(PROBLEM, n=2))
    assert cache.read_bytes() == before


WRONG_CONFIGS = {
    "unknown": {"block_n": 128, "evil": 1},
    "type": {"num_warps": "4"},
    "bool": {"num_warps": True},
    "flag": {"x_columns_first": 1},
    "float": {"block_n": 128.0},
    "null": {"block_k": None},
    "no power of two": {"block_n": 96},
    "zero": {"num_stages": 0},
    "negative": {"block_p": -64},
    "huge": {"block_p": 1 << 60},
    "many parts": {"split_k": 100_000},
    "missing": {"block_n": ...},
}
WRONG_ENTRIES = {
    "milliseconds": [0, -1, float("nan"), float("inf"), "1", True, None, 10**400],
    "heuristic_milliseconds": [0, "1"],
    "tuned": ["yesterday", "2025-01-01T00:00:00", 5, "2025-01-01T00:00:00+02:00"],
    "problem": [5, "", "a\nb", "x" * 501],
    "source": [None],
    "triton": ["\x1b[31m"],
    "torch": [{}],
    "config": [[], None, "block_n"],
}


def wrong_entries():
    for name, changes in WRONG_CONFIGS.items():
        config = asdict(CONFIG) | changes
        yield pytest.param(
            {"config": {k: v for k, v in config.items() if v is not ...}}, id=f"config {name}"
        )
    for name, values in WRONG_ENTRIES.items():
        for value in values:
            yield pytest.param({name: value}, id=f"{name} {value!r}"[:40])


@pytest.mark.parametrize("change", list(wrong_entries()))
def test_a_wrong_entry_is_left_out_and_the_others_serve(cache, change):
    good = replace(PROBLEM, n=2048)
    add(OTHER, good)
    file = content(cache)
    wrong = json.loads(json.dumps(file["entries"][0])) | {"problem": PROBLEM.key} | change
    broken(cache, json.dumps(file | {"entries": [wrong, *file["entries"]]}))
    with pytest.warns(RuntimeWarning, match="1 of the tuned configurations in") as told:
        assert found() is None
    assert len(told) == 1
    assert found(good) == OTHER


def test_a_configuration_has_all_fields_of_its_kernel():
    assert config_of("gather_gemm", asdict(CONFIG)) == CONFIG
    with pytest.raises(ValueError, match="missing or unknown: block_k, block_m, block_n"):
        config_of("row_scores", asdict(CONFIG) | {"block_c": 64})


def test_a_pipe_in_place_of_a_file_is_not_waited_for(cache):
    cache.parent.mkdir(parents=True)
    os.mkfifo(cache)
    with pytest.warns(RuntimeWarning, match="it is not a file"):
        assert found() is None


def test_a_file_that_is_far_too_large_is_not_read(cache, monkeypatch):
    add()
    monkeypatch.setattr(cache_files, "_MOST_BYTES", 10)
    config_cache.forget()
    with pytest.warns(RuntimeWarning, match="more than 10 bytes"):
        assert found() is None


def fails(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("owner", "name", "code"),
    [
        (os, "fsync", errno.ENOSPC),
        (os, "replace", errno.EROFS),
        (Path, "open", errno.EACCES),
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
    add(OTHER, replace(PROBLEM, n=2))  # there is room again
    assert len(content(cache)["entries"]) == 2


def test_a_file_in_place_of_the_folder(cache):
    cache.parents[1].write_text("in the way")
    assert found() is None
    with pytest.warns(RuntimeWarning, match="MEMAOP_TRITON_CACHE_DIR moves them"):
        add()
    assert found() == CONFIG


def test_a_file_that_cannot_be_read(cache, monkeypatch):
    add()
    config_cache.forget()
    monkeypatch.setattr(Path, "read_bytes", fails(errno.EIO))
    with pytest.warns(RuntimeWarning, match="Input/output error"):
        assert found() is None


def test_a_lock_that_is_never_given_back_is_not_waited_for_twice(cache, monkeypatch):
    waited = []
    merge_into = cache_files.merge_into

    def noting(*args, timeout, **kwargs):
        waited.append(timeout)
        return merge_into(*args, timeout=timeout, **kwargs)

    monkeypatch.setattr(cache_files, "LOCK_SECONDS", 0.1)
    monkeypatch.setattr(cache_files, "merge_into", noting)
    cache.parent.mkdir(parents=True)
    with FileLock(f"{cache}.lock"):
        with pytest.warns(RuntimeWarning, match="are not kept in"):
            add()
        add(OTHER, replace(PROBLEM, n=2))
        assert found() == CONFIG
        assert not cache.exists()
    assert waited == [0.1, 0.0]
    add(OTHER, replace(PROBLEM, n=4))
    assert len(content(cache)["entries"]) == 3


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
    slugs = [Gpu(name, "9.0", 1).slug for name in names]
    assert slugs == ["nvidia-h100-80gb-hbm3", "etc", "gpu", "gpu", "gpu"]


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


def test_what_is_parsed_is_what_was_written():
    file = ConfigFile(GPU, "gather_gemm", (entry(), entry(OTHER, heuristic_milliseconds=None)))
    assert parse(json.loads(json.dumps(file.to_json()))) == file
