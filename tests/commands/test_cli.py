"""The command line, its loaders and the paper's protocol."""

from __future__ import annotations

import json
import math
import os
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from memaop_triton.commands import cli
from memaop_triton.experiments import data, paper, paper_report, published
from memaop_triton.experiments.data import DataError
from memaop_triton.experiments.numbers import Value

DATA_DIR = os.environ.get(data.DATA_DIR_VARIABLE)
needs_data = pytest.mark.skipif(not DATA_DIR, reason=f"{data.DATA_DIR_VARIABLE} is not set")


def error_of(capsys, *arguments: str) -> str:
    """Run a command line that must fail; return its one line of error."""
    assert cli.run(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_help_and_version(capsys):
    assert cli.run([]) == cli.run(["--version"]) == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("demo", "reproduce", "memaop-triton 0."))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train"], "train"),
        (["demo", "--ratio", "0"], "--ratio"),
        (["demo", "--ratio", "1.5"], "--ratio"),
        (["demo", "--lr", "nan"], "--lr"),
        (["demo", "--seeds", "0"], "--seeds"),
        (["demo", "--batch-size", "5000"], "--batch-size=5000"),
        (["reproduce", "cifar"], "energy"),
        (["reproduce", "energy", "--data-dir", "nowhere"], "--data-dir"),
        (["reproduce", "energy", "--data-dir", "."], "--data-dir=. has no file"),
        (["reproduce", "mnist", "--data-dir", "."], "--data-dir=. has no file"),
        (["demo", "--output", "file"], "--output"),
        (["demo", "--output", "file/results"], "--output"),
        (["demo", "--json", "."], "--json"),
        (["demo", "--json", "file/demo.json"], "--json"),
    ],
)
def test_bad_option_is_one_line_that_names_it(arguments, named, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert named in error_of(capsys, *arguments)


def test_environment_variable_names_the_data(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, words in {".": ". has no file", "nowhere": data.DATA_DIR_VARIABLE}.items():
        monkeypatch.setenv(data.DATA_DIR_VARIABLE, folder)
        assert words in error_of(capsys, "reproduce", "energy")


@pytest.mark.parametrize("module", ["sklearn", "matplotlib"])
def test_missing_extra_says_what_to_install(module, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    line = error_of(capsys, "demo", "--output", str(tmp_path))
    assert f"{module} is not installed: pip install 'memaop-triton[demo]'" in line


def test_failed_download_says_how_to_go_on(monkeypatch):
    def offline(**query):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", offline)
    for load in (data.load_energy, lambda: data.load_images("mnist")):
        with pytest.raises(DataError, match=r"no route.*--data-dir"):
            load()


def test_archive_of_images(tmp_path):
    archive = tmp_path / "mnist.npz"
    x = np.arange(24, dtype=np.uint8).reshape(3, 2, 4)
    y = np.array([0, 9, 1], np.uint8)

    def save(**changes):
        arrays = {"x_train": x, "y_train": y, "x_test": x[:1], "y_test": y[:1]} | changes
        np.savez(archive, **{name: array for name, array in arrays.items() if array is not None})

    save()
    images = data.load_images("mnist", tmp_path)
    torch.testing.assert_close(images.x_train, torch.arange(24.0).view(3, 8) / 255)
    assert images.y_train.tolist() == [0, 9, 1]
    assert images.y_train.dtype == torch.int64
    faults = {
        "one label of 0 to 9": lambda: save(y_train=y + 1),
        "y_train": lambda: save(y_train=None),
        r"mnist\.npz": lambda: archive.write_bytes(b"not an archive"),
    }
    for words, spoil in faults.items():
        spoil()
        with pytest.raises(DataError, match=words):
            data.load_images("mnist", tmp_path)


def test_energy_preprocessing():
    # A table of the energy data's form: numbers in order, codes 2 … 5 and 0 … 5.
    table = np.linspace(1, 2, 7680).reshape(768, 10) ** np.arange(1, 11)
    table[:, 5] = 2 + np.arange(768) % 4
    table[:, 7] = np.arange(768) % 6
    problem = paper.prepare_energy(table)
    assert problem.x_train.shape == (576, 16)
    assert problem.x_val.shape == (192, 16)
    numbers, codes = problem.x_train[:, :6].double(), torch.cat([problem.x_train, problem.x_val])
    assert numbers.mean(0).abs().max() < 1e-6
    torch.testing.assert_close(numbers.std(0, correction=0), torch.ones(6).double())
    assert torch.equal(codes[:, 6:10].sum(1), torch.ones(768))
    assert torch.equal(codes[:, 10:].sum(1), torch.ones(768))
    assert codes[:, 6:10].argmax(1).tolist() == (table[:, 5] - 2).tolist()
    assert codes[:, 10:].argmax(1).tolist() == table[:, 7].tolist()
    assert problem.y_train[:, 0].tolist() == table[:576, 8].astype(np.float32).tolist()


def test_tasks_have_seeds_of_their_own():
    experiment = paper.EXPERIMENTS["energy"]
    tasks = paper.make_tasks(experiment, 10, 100, 0, None)
    assert len(tasks) == len({task.seed for task in tasks}) == 190
    fewer = paper.make_tasks(experiment, 3, 100, 0, None)
    assert fewer == tasks[: len(fewer)]
    assert set(experiment.schemes()) == set(published.ENERGY)


def test_difference_in_standard_errors():
    scheme = paper.Scheme("dense", "none", None)
    losses = np.array([[1.0], [3.0]])
    summary = paper_report.Summary(scheme, losses, losses[:, :0], Value(1.0, 2.0))
    assert summary.final == pytest.approx((2, math.sqrt(2)))
    assert summary.z == pytest.approx((2 - 1) / math.sqrt(2 / 2 + 4 / 10))


@needs_data
def test_reproduce_energy(capsys, tmp_path):
    path = tmp_path / "energy.json"
    options = ["--runs", "1", "--epochs", "2", "--output", str(tmp_path), "--json", str(path)]
    assert cli.run(["reproduce", "energy", *options]) == 0
    assert "weightedk + residual" in capsys.readouterr().out
    assert (tmp_path / "reproduce_energy.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads(path.read_text())
    assert len(content["schemes"]) == 19
    for scheme in content["schemes"]:
        assert scheme["published"] is None  # the authors' values are after 100 epochs
        assert len(scheme["loss_curve"]) == 2
        assert scheme["final_losses"] == [scheme["loss_curve"][-1]]


@needs_data
def test_dense_energy_run_agrees_with_the_authors():
    scheme = paper.Scheme("dense", "none", None)
    outcome = paper.run_task(
        paper.Task(paper.EXPERIMENTS["energy"], scheme, 100, 0, Path(DATA_DIR))
    )
    ours, theirs = outcome.losses[-1], published.ENERGY[scheme]
    assert abs(ours - theirs.mean) < 4 * theirs.sd
