"""The package works from a checkout, as an editable install and from a wheel, run anywhere."""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from memaop_triton.kernels.cpu import build
from tests.processes import ROOT, run, run_python

TORCH_OPS = Path("kernels") / "cpu" / "torch_ops.py"
BUILD = (sys.executable, "-m", "build", "--no-isolation")
# Shadowing `kernels` would break transformers, which imports the package of that name from PyPI.
PROBE = """
import importlib.util, memaop_triton, torch
spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is None, spec
from memaop_triton.kernels.cpu import torch_ops
from memaop_triton.kernels.tuning import cache
assert (cache.SHIPPED / "fake-gpu" / "gather_gemm.json").is_file()
from memaop_triton.backward.weight_grad import weight_grad
x = torch.eye(4)
config = memaop_triton.MemAOPConfig(k=4, selection="topk", memory="none")
assert torch.equal(weight_grad(x, x, config), x)
print(torch_ops.__file__)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what git tracks or would track, so that a build leaves no trace in the checkout.

    With a shipped configuration for a GPU, of which there may be none.
    """
    copy = tmp_path_factory.mktemp("sources")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to the package")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    shipped = copy / "kernels" / "configs" / "fake-gpu" / "gather_gemm.json"
    shipped.parent.mkdir(parents=True)
    shipped.write_text("{}")
    return copy


@pytest.fixture
def environment(tmp_path):
    """A virtual environment that sees torch and the rest of this one, but not our package."""
    target = tmp_path / "venv"
    venv.create(target, with_pip=False)
    python = target / "bin" / "python"
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "memaop" not in entry.name.lower():
            (purelib / entry.name).symlink_to(entry)
    return python


def install(python, sources, *arguments):
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", *arguments]
    run(python, *pip, cwd=sources)


@pytest.mark.slow
def test_checkout_that_is_not_installed(environment, sources, tmp_path):
    assert run(environment, "-c", PROBE, cwd=sources) == str(sources / TORCH_OPS)
    elsewhere = run(environment, "-c", PROBE, cwd=tmp_path, PYTHONPATH=str(sources))
    assert elsewhere == str(sources / TORCH_OPS)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable_install(environment, sources, tmp_path, mode):
    install(environment, sources, "-e", ".", f"--config-settings=editable_mode={mode}")
    for folder in (tmp_path, sources):
        assert Path(run(environment, "-c", PROBE, cwd=folder)).name == TORCH_OPS.name


@pytest.mark.slow
def test_wheel(environment, sources, tmp_path):
    command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, sources]
    run(environment, *command, cwd=sources)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        f"memaop_triton/{TORCH_OPS.as_posix()}",
        *(
            f"memaop_triton/kernels/cpu/csrc/{file.name}"
            for file in (*build.HEADERS, *build.SOURCES)
        ),
        "memaop_triton/kernels/configs/fake-gpu/gather_gemm.json",
        "memaop_triton/py.typed",
    } <= names
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)

    install(environment, sources, wheel)
    assert "site-packages" in run(environment, "-c", PROBE, cwd=tmp_path)
    assert run(environment, "-c", PROBE, cwd=sources) == str(sources / TORCH_OPS)
    assert "demo" in run(environment.parent / "memaop-triton", "--help", cwd=tmp_path)
    modules = {name for name in names if name.startswith("memaop_triton/bench/")}
    assert "memaop_triton/bench/suites/test_dw.py" in modules
    assert not any("microscope" in name for name in modules)
    imports = [name[:-3].replace("/", ".") for name in sorted(modules) if name.endswith(".py")]
    imports = [name.removesuffix(".__init__") for name in imports if "__main__" not in name]
    run(environment, "-c", "\n".join(f"import {name}" for name in imports), cwd=tmp_path)
    bench = ["bench", "--suite", "smoke", "--only", "overhead", "--output", "results"]
    output = run(environment.parent / "memaop-triton", *bench, cwd=tmp_path)
    assert "wrote results/smoke.html" in output


@pytest.mark.slow
def test_builds_have_the_same_bytes(sources, tmp_path):
    """Of other copies at other times; also a wheel that is built from the source archive."""
    found = []
    for name, kinds in (("one", []), ("another", ["--sdist", "--wheel"])):
        copy = tmp_path / name
        shutil.copytree(sources, copy)
        for path in copy.rglob("*"):
            os.utime(path, (len(found) * 10**8, len(found) * 10**8))
        command = [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            *kinds,
            "--outdir",
            "built",
            ".",
        ]
        run(*command, cwd=copy, SOURCE_DATE_EPOCH="1700000000")
        built = sorted((copy / "built").iterdir())
        found.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in built})
    assert len(found[0]) == 2
    assert found[0] == found[1]


@pytest.mark.slow
def test_source_archive(sources, tmp_path):
    copy = tmp_path / "sources"
    shutil.copytree(sources, copy)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--sdist",
        "--outdir",
        tmp_path,
        ".",
    ]
    run(*command, cwd=copy)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= names
    assert {f"kernels/cpu/csrc/{file.name}" for file in build.SOURCES} <= names
    assert not any(name.startswith(("tests/", "docs/", "bench/results")) for name in names)


def test_a_cpu_needs_no_accelerator_and_an_import_compiles_nothing(tmp_path):
    probe = """
import pathlib, sys, torch
sys.modules["platformdirs"] = None  # a checkout does without it
import memaop_triton
assert not list(pathlib.Path().iterdir())
assert "torch.distributed.checkpoint" not in sys.modules
layer = memaop_triton.convert_(torch.nn.Linear(8, 4), memaop_triton.MemAOPConfig(ratio=0.5))
layer(torch.ones(16, 8)).sum().backward()
assert layer.weight.grad is not None
assert "memaop_triton.kernels.gpu.gather_gemm" not in sys.modules
assert not torch.cuda.is_initialized()
"""
    run_python(probe, cwd=tmp_path, MEMAOP_TRITON_CACHE_DIR=str(tmp_path))
