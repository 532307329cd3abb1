"""`memaop-triton tune` and `memaop-triton cache`."""

import io
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from memaop_triton.commands import cli
from memaop_triton.commands import tuning as command
from memaop_triton.kernels.tuning import cache as config_cache
from memaop_triton.kernels.tuning import search
from memaop_triton.kernels.tuning.cache import ConfigFile, Gpu
from memaop_triton.kernels.tuning.config import GemmConfig, Problem, RowConfig
from tests.traffic import interpreted

GPUS = [Gpu("Fake GPU (1)", "sm_90", 132), Gpu("Other [red]GPU", "sm_80", 108)]
GEMM, ROWS = GemmConfig(128, 64, 64, 4, 3, split_k=6), RowConfig(8, 256, 4)
PROBLEM = Problem("gather_gemm", torch.bfloat16, 4096, 512, 1024, 768, flags=("weighted",))


def small_net():
    """Two layers, for `--model`."""
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16, bias=False))


def no_module():
    return 5


@pytest.fixture
def on_gpu(fake_gpu, monkeypatch):
    """`tune` runs on what counts as a GPU; only the first two candidates are tried."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "triton")
    monkeypatch.setattr(command, "_gpu", lambda: torch.device("cpu"))
    candidates = search.candidates
    monkeypatch.setattr(
        search, "candidates", lambda problem, target: candidates(problem, target)[:2]
    )
    with interpreted():
        yield fake_gpu


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache with one fresh, one stale and one foreign entry, and those of another GPU."""
    monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")
    config_cache.forget()
    path = put(GPUS[0], entry(), entry(replace(PROBLEM, n=64), triton="1.0"))
    content = json.loads(path.read_text())
    content["entries"].append(content["entries"][0] | {"source": "of another version"})
    path.write_text(json.dumps(content))
    put(GPUS[1], entry(replace(PROBLEM, kernel="row_scores"), ROWS), kernel="row_scores")
    yield config_cache.folder()
    config_cache.forget()


def entry(problem=PROBLEM, config=GEMM, **changes):
    return replace(config_cache.entry_for(problem, config, 0.25, 0.5), **changes)


def put(gpu, *entries, kernel="gather_gemm"):
    path = config_cache.path_of(config_cache.folder(), gpu, kernel)
    config_cache.merge_into(path, ConfigFile(gpu, kernel, entries))
    return path


def told(capsys, *arguments, code=0):
    """What a command writes to standard output; to standard error where it must fail."""
    assert cli.run(list(arguments)) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def tuned_problems():
    return [
        (path.stem, one.problem)
        for path in sorted(config_cache.folder().glob("*/*.json"))
        for one in config_cache.read(path).entries
    ]


@pytest.mark.slow
def test_tune_shapes_tunes_every_kernel_that_the_layers_use(on_gpu, capsys):
    shown = told(capsys, "tune", "--shapes", "64x32x16", "--dtype", "float32", "--rank", "4")
    problems = tuned_problems()
    kernels = {"gather_gemm", "project", "transposed_mm", "row_scores"}  # the last for the choice
    assert {kernel for kernel, _ in problems} == kernels
    products = [problem for kernel, problem in problems if kernel == "transposed_mm"]
    # For the bases of both sides, for the product with either, and with the sums of G's columns.
    assert len(products) == 5
    assert sum("sums" in problem for problem in products) == 1
    sides = [problem for kernel, problem in problems if kernel == "gather_gemm"]
    assert any("N=32 P=16" in problem for problem in sides)
    assert not any("N=16 P=32" in problem for problem in sides)
    for kernel, problem in problems:
        assert kernel in shown
        assert problem in shown
    assert "1.0000" in shown
    assert "block_n=" in shown
    assert str(config_cache.folder() / "fake-gpu-1-8-0-108") in shown.replace("\n", "")


@pytest.mark.parametrize(
    ("memory", "selection", "kernels"),
    [
        ("none", "priority", {"row_scores", "gather_gemm"}),
        ("signed", "topk", {"accumulate_and_score", "gather_gemm"}),
        ("residual", "randk", {"accumulate_and_score"}),
    ],
)
def test_tune_follows_the_setting(on_gpu, capsys, memory, selection, kernels):
    options = ["--memory", memory, "--selection", selection, "--dtype", "float32"]
    for _ in range(2):  # again, although the cache holds them
        on_gpu.timed.clear()
        told(capsys, "tune", "--shapes", "32x16x16", *options)
        assert {kernel for kernel, _ in tuned_problems()} == kernels
        assert len(on_gpu.timed) >= 2 * len(tuned_problems())


def test_tune_follows_the_scores(on_gpu, capsys):
    options = ["--memory", "none", "--scores", "grad", "--dtype", "float32"]
    told(capsys, "tune", "--shapes", "32x16x48", *options)
    scored = [problem for kernel, problem in tuned_problems() if kernel == "row_scores"]
    assert scored
    assert all("N=48 P=0" in problem for problem in scored)


@pytest.mark.slow
def test_tune_a_model(on_gpu, capsys, monkeypatch):
    name = f"{__name__}:small_net"
    told(capsys, "tune", "--model", name, "--input", "4x16x32", "--rank", "4")
    keys = " ".join(problem for kernel, problem in tuned_problems() if kernel == "gather_gemm")
    for shape in ("N=32 P=16", "N=16 P=16"):
        assert f"M=64 K=8 {shape}" in keys


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_tune_without_a_gpu_says_so(capsys):
    assert "nothing to tune" in told(capsys, "tune", "--shapes", "64x16x16", code=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--shapes MxNxP or --model"),
        (["--shapes", "1x2x3", "--model", "a:b"], "--shapes MxNxP or --model"),
        (["--shapes", "64x16xP"], "is not MxNxP"),
        (["--shapes", "64x0x16"], "is not MxNxP"),
        (["--model", "a:b"], "--input"),
        (["--shapes", "1x2x3", "--input", "5"], "--model"),
        (["--model", "a", "--input", "5"], "MODULE:FUNCTION"),
        (["--model", "no.such:f", "--input", "5"], "No module named 'no'"),
        (["--model", f"{__name__}:missing", "--input", "5"], "has no attribute 'missing'"),
        (["--model", f"{__name__}:GPUS", "--input", "5"], "is not a callable object"),
        (["--model", f"{__name__}:no_module", "--input", "5"], "returned int"),
        (["--shapes", "64x16x16", "--memory", "rows"], "memory='rows'"),
        (["--shapes", "64x16x16", "--ratio", "2"], "not in (0, 1]"),
        (["--shapes", "8x16x16", "--ratio", "1", "--dtype", "float32"], "no Triton kernel ran"),
    ],
)
def test_errors_of_tune_name_what_is_wrong(on_gpu, capsys, arguments, words):
    error = told(capsys, "tune", *arguments, code=2)
    assert words in error
    assert error.count("\n") == 1


def test_list_counts_entries_by_what_they_are_worth_and_names_broken_files(cache, capsys):
    lines = told(capsys, "cache", "list").splitlines()
    (row,) = [line for line in lines if "Fake GPU (1)" in line]
    assert [word for word in row.split() if word.isdecimal()] == ["3", "1", "1", "1"]
    assert any("Other [red]GPU" in line for line in lines), "no markup"
    assert "2 files in" in lines[-1]
    assert "0 files in" in told(capsys, "cache", "list", "--gpu", "fake", "--kernel", "project")
    (cache / GPUS[0].slug / "project.json").write_text("{")
    assert "not readable: Expecting property name" in told(capsys, "cache", "list")
    assert "left out" in told(capsys, "cache", "show", "--kernel", "project")


def test_show_has_every_entry(cache, capsys):
    shown = told(capsys, "cache", "show", "--gpu", "FAKE")
    for words in (PROBLEM.key, "0.2500", "0.5000", "split_k=6", "fresh", "stale", "unused", "1.0"):
        assert words in shown
    assert "row_scores" not in shown
    assert "row_scores" in told(capsys, "cache", "show", "--kernel", "row_scores")
    error = told(capsys, "cache", "show", "--kernel", "rows", code=2)
    assert "--kernel=rows is not one of row_scores" in error


def test_clear_deletes_what_matches(cache, capsys):
    assert "deleted 1 files" in told(capsys, "cache", "clear", "--gpu", "fake", "--yes")
    assert [path.stem for path in cache.glob("*/*.json")] == ["row_scores"]
    told(capsys, "cache", "clear", "--yes")
    assert "nothing to delete" in told(capsys, "cache", "clear", "--yes")


@pytest.mark.parametrize(("answer", "code", "left"), [("n\n", 130, 2), ("y\n", 0, 0)])
def test_clear_asks(cache, capsys, monkeypatch, answer, code, left):
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert cli.run(["cache", "clear"]) == code
    assert "Delete 2 files?" in capsys.readouterr().out
    assert len(list(cache.glob("*/*.json"))) == left
