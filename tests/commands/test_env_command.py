"""`memaop-triton env`: facts for a bug report, and nothing that is private."""

import json
import logging
import os
import re
from pathlib import Path

import pytest
import torch

import memaop_triton
from memaop_triton import dispatch
from memaop_triton.commands import cli, machine
from memaop_triton.kernels.cpu import library
from memaop_triton.monitor.units import human_bytes, milliseconds
from tests.test_dispatch import OnGpu


@pytest.fixture
def env(monkeypatch):
    """Runs the description with these variables, and no others of ours."""
    ours = {name for name in os.environ if name.startswith("MEMAOP_TRITON_")}
    for name in ours | machine.VARIABLES.keys():
        monkeypatch.delenv(name, raising=False)

    def run(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        library._compiled.cache_clear()
        return machine.describe()

    yield run
    library._compiled.cache_clear()


def test_text_and_json_say_the_same(capsys, tmp_path):
    path = tmp_path / "folder" / "env.json"
    assert cli.run(["env", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    content = json.loads(path.read_text())
    for title, facts in content.items():
        assert f"\n{title}:\n" in f"\n{text}"
        for name, fact in facts.items():
            assert f"  {name}" in text
            assert fact in text
    assert {"versions", "PyTorch", "CPU", "GPU", "variables", "cache"} <= content.keys()
    assert content["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert content["PyTorch"]["threads"] == str(torch.get_num_threads())


def test_the_home_directory_and_other_variables_stay_private(env, monkeypatch, tmp_path):
    home = tmp_path / "somebody"
    (home / "cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SOME_TOKEN", "a-secret")
    report = env(MEMAOP_TRITON_CACHE_DIR=f"{home}/cache", MEMAOP_TRITON_BACKEND="torch")
    text = json.dumps(report)
    assert "somebody" not in text
    assert "SOME_TOKEN" not in text
    assert "a-secret" not in text
    assert report["cache"]["directory"] == "~/cache"
    assert report["variables"]["MEMAOP_TRITON_CACHE_DIR"].startswith("'~/cache' ")


def test_only_the_home_directory_is_abbreviated(monkeypatch):
    text = "/home/jo/x, '/home/jo':/home/jo, /home/joan/x, /mnt/home/jo"
    monkeypatch.setenv("HOME", "/home/jo")
    assert machine.without_home(text) == "~/x, '~':~, /home/joan/x, /mnt/home/jo"
    monkeypatch.setenv("HOME", "/")
    assert machine.without_home(text) == text


def test_variables_are_shown_with_their_meaning_and_misspelt_ones_are_named(env):
    variables = env(MEMAOP_TRITON_BACKEND="torch", MEMAOP_TRITON_BAKEND="x")["variables"]
    assert variables["MEMAOP_TRITON_BACKEND"].startswith("'torch' (torch or triton: which impl")
    assert variables["MEMAOP_TRITON_CACHE_DIR"].startswith("not set (folder of compiled C code")
    assert variables["MEMAOP_TRITON_BAKEND"] == "'x' (no such variable: is it misspelt?)"


def test_every_variable_that_the_package_reads_is_explained():
    folders = Path(memaop_triton.__file__).parent, Path(library.__file__).parents[1]
    sources = [path.read_text() for folder in folders for path in folder.rglob("*.py")]
    names = r"\bMEMAOP_TRITON_[A-Z_]*[A-Z]|(?<=environ\.get\(\")\w+|(?<=environ\[\")\w+"
    read = set(re.findall(names, "\n".join(sources)))
    assert {"MEMAOP_TRITON_BACKEND", "MEMAOP_TRITON_AUTOTUNE", "CC"} <= read
    assert read <= machine.VARIABLES.keys()


@pytest.mark.skipif(not library.is_compiled(), reason="needs a C compiler")
def test_row_passes_that_are_compiled(env, compiled_before, tmp_path):
    facts = env(MEMAOP_TRITON_CACHE_DIR=str(tmp_path))
    rows = facts["row passes in C"]
    assert rows["used"] == "yes, for float32, float64, bfloat16 on a CPU"
    assert rows["vectors"] == torch.backends.cpu.get_cpu_capability()
    own = "compiled too" if library.prefers_own_gemm(torch.float32) else "PyTorch's"
    assert rows["gather GEMM"] == own
    (kept,) = (tmp_path / "native").iterdir()
    assert rows["file"] == f"kept in {kept}"
    assert facts["cache"]["holds"].startswith("1 files, ")
    assert facts["what works on"]["cpu float32"] == "PyTorch and C: the default on a CPU"
    assert facts["what works on"]["cpu bfloat16"] == "PyTorch and C: the default on a CPU"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CC": "/nowhere/cc"}, "/nowhere/cc did not run"),
        ({"CC": "false"}, "false failed"),
        ({"PATH": "", "CC": ""}, "no C compiler"),
        ({"MEMAOP_TRITON_BACKEND": "torch"}, "MEMAOP_TRITON_BACKEND='torch' leaves them out"),
        ({"MEMAOP_TRITON_BACKEND": "cuda"}, "MEMAOP_TRITON_BACKEND='cuda' is not one of"),
    ],
)
@pytest.mark.skipif(not library.is_compiled(), reason="needs a C compiler")
def test_row_passes_that_are_not_used_and_why(env, tmp_path, caplog, variables, reason):
    with caplog.at_level(logging.INFO):
        facts = env(MEMAOP_TRITON_CACHE_DIR=str(tmp_path), **variables)
    rows = facts["row passes in C"]
    assert rows["used"].startswith(f"no: {reason}")
    assert rows.get("gather GEMM", "PyTorch's") == "PyTorch's"
    assert not facts["what works on"]["cpu float32"].startswith("PyTorch and C")
    if "MEMAOP_TRITON_BACKEND" not in variables:
        assert f"plain PyTorch: {reason}" in caplog.text
        assert not library.is_compiled()


@pytest.mark.skipif(not library.is_compiled(), reason="needs a C compiler")
def test_a_cache_that_cannot_be_written(env, compiled_before, tmp_path, caplog):
    (tmp_path / "native").write_text("in the way")
    with caplog.at_level(logging.INFO):
        rows = env(MEMAOP_TRITON_CACHE_DIR=str(tmp_path))["row passes in C"]
    assert rows["used"].startswith("yes")
    assert rows["file"].startswith("not kept, compiled by every process; wanted in")
    assert "not kept in" in caplog.text


def test_a_cache_that_does_not_exist_yet(env, tmp_path):
    folder = tmp_path / "deep" / "cache"
    cache = env(MEMAOP_TRITON_CACHE_DIR=str(folder), MEMAOP_TRITON_BACKEND="torch")["cache"]
    assert cache == {"directory": str(folder), "holds": "0 files, 0 B", "can be written": "yes"}


@pytest.mark.parametrize("backend", ["", "torch", "triton"])
@pytest.mark.parametrize("interpreter", ["", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("is_installed", [False, True])
def test_what_is_explained_is_what_happens(
    monkeypatch, backend, interpreter, dtype, on_gpu, is_installed
):
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", backend)
    monkeypatch.setenv("TRITON_INTERPRET", interpreter)
    monkeypatch.setattr(dispatch, "_is_installed", lambda: is_installed)
    rows = torch.ones(8, 4, dtype=dtype)
    rows = rows.as_subclass(OnGpu) if on_gpu else rows
    try:
        happens = "Triton kernels" if dispatch.runs_triton(rows) else "PyTorch"
    except RuntimeError:
        happens = "an error"
    path, reason = dispatch.explain(rows).split(": ", 1)
    assert path == happens
    assert reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu_and_why(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert dict(machine._gpus()) == {"available": "no: this PyTorch is built for a CPU"}
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert dict(machine._gpus()) == {"available": "no: none is found"}


@pytest.mark.parametrize(
    ("write", "number", "text"),
    [
        (milliseconds, 0, "0"),
        (milliseconds, 1.2345e-5, "0.0123"),
        (milliseconds, 0.12345, "123"),
        (milliseconds, -0.0012, "-1.20"),
        (human_bytes, 1023, "1023 B"),
        (human_bytes, 1024, "1.0 KiB"),
        (human_bytes, 135168, "132 KiB"),
        (human_bytes, 2**40, "1024 GiB"),
    ],
)
def test_units(write, number, text):
    assert write(number) == text
