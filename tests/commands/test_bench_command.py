"""`memaop-triton bench`: a tiny suite run for real, and what is refused."""

import json
import subprocess
import sys

import pytest

from memaop_triton.bench import run
from memaop_triton.bench.report.data import load
from memaop_triton.commands import cli

pytestmark = pytest.mark.slow  # benchmarks are run

KINDS = {
    "kernel",
    "dw",
    "layer",
    "step",
    "sweep_rows",
    "sweep_ratio",
    "sweep_width",
    "overhead",
    "memory",
}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The file of results of the smoke suite, and what was told on the way."""
    path = tmp_path_factory.mktemp("smoke") / "smoke.json"
    told = []
    outcome = run.run_suite("smoke", path, threads=1, on_progress=lambda *now: told.append(now))
    assert not outcome.failed
    return path, told


def test_results_are_what_the_report_reads(smoke):
    path, told = smoke
    found = load(path)
    assert found.machine.threads == 1
    assert {case.kind for case in found.cases} == KINDS
    for case in found.cases:
        assert 1 <= case.k <= case.m
        roles = [method.role for method in case.methods.values()]
        assert roles.count("dense") == 1
        assert "ours" in roles
        assert roles.count("limit") <= 1
        for method in case.methods.values():
            assert method.peak_bytes >= 0
            for spread in (method.ms, method.speedup):
                assert 0 < spread.q1 <= spread.median <= spread.q3
    content = json.loads(path.read_text())
    names = [benchmark["name"] for benchmark in content["benchmarks"]]
    assert told == [(done, len(names), name) for done, name in enumerate(names, 1)]
    assert "node" not in content["machine_info"]
    assert {"project", "branch"}.isdisjoint(content["commit_info"])
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=run.FOLDER, capture_output=True, text=True)
    if commit.returncode == 0:
        assert content["commit_info"]["id"] == commit.stdout.strip()


def test_results_and_report_are_written_and_stay_where_nothing_succeeds(
    capsys, tmp_path, monkeypatch
):
    options = ["--suite", "smoke", "--only", "overhead", "--output", str(tmp_path)]
    assert cli.run(["bench", *options, "--threads", "1"]) == 0
    output = capsys.readouterr().out
    for name in ("smoke.json", "smoke.log", "smoke.md", "smoke.html"):
        assert (tmp_path / name).stat().st_size > 0
        assert name in output
    results = tmp_path / "smoke.json"
    earlier = results.read_text()
    (benchmark,) = json.loads(earlier)["benchmarks"]
    assert benchmark["extra_info"]["kind"] == "overhead"
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "nonsense")
    with pytest.raises(run.BenchmarkError, match=r"nonsense.*smoke\.log"):
        run.run_suite("smoke", results, only="overhead")
    assert results.read_text() == earlier


def test_a_failing_benchmark_is_told_and_the_others_count(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = ["--suite", "smoke", "--only", "overhead or kernel and selection"]
    assert cli.run(["bench", *options, "--output", str(tmp_path)]) == 1
    assert "failed: test_overhead[64x64x64-r=1_8]" in capsys.readouterr().out
    (benchmark,) = json.loads((tmp_path / "smoke.json").read_text())["benchmarks"]
    assert benchmark["extra_info"]["kind"] == "kernel"


def error_of(capsys, *arguments):
    assert cli.run(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "everything"], ["everything", "quick", "cpu", "gpu"]),
        (["--suite", "gpu"], ["--suite", "gpu", "GPU"]),
        (["--threads", "0"], ["--threads"]),
        (["--output", "file"], ["--output"]),
    ],
)
def test_what_cannot_be_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    line = error_of(capsys, *arguments)
    assert all(word in line for word in words)


@pytest.mark.parametrize("module", ["pytest", "pytest_benchmark", "matplotlib", "scipy", "jinja2"])
def test_missing_extra_says_what_to_install(module, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'memaop-triton[bench]'" in error_of(capsys)


def test_nothing_matches_on_a_busy_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 99.0, 99.0))
    options = ["--suite", "smoke", "--only", "nosuch", "--output", str(tmp_path)]
    assert cli.run(["bench", *options]) == 2
    told = capsys.readouterr()
    assert "--only='nosuch'" in told.err
    assert "load average is 99.0" in told.out


def test_a_suite_for_gpus_has_benchmarks_of_its_own(tmp_path):
    command = run._command("gpu", tmp_path / "r.json", None, None)
    done = subprocess.run(
        [*command, "--collect-only"], env=run._environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    for name in ("test_machine", "test_dw", "test_layer", "test_step", "test_rows", "test_gpu_"):
        assert name in done.stdout
