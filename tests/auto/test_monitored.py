"""What a monitor tells of layers that the library decides about."""

import pytest
from rich.console import Console

from memaop_triton import MemAOPConfig, model_report, monitor

EASY, HARD = {"rows": 512, "noise": 0.0}, {"rows": 16, "noise": 30.0}


def fast(ratio):
    return {1 / 2: 0.6, 1 / 4: 0.35, 1 / 8: 0.2, 1 / 16: 0.15}.get(ratio, 1.0)


def text_of(watch):
    console = Console(width=200)
    with console.capture() as printed:
        console.print(watch.table())
    return printed.get()


def cells(text, layer):
    (line,) = (line.split() for line in text.splitlines() if line.split()[:1] == [layer])
    return line


@pytest.mark.parametrize(("task", "shares"), [(EASY, "1/"), (HARD, "exact")])
@pytest.mark.parametrize("memory", ["none", "subspace"])
def test_the_table_shows_what_the_report_says(training, task, shares, memory):
    run = training(**task, true=fast, config=MemAOPConfig(ratio="auto", memory=memory))
    with monitor(run.model, every=1000, starving=1e9) as watch:
        run.step(4)
        assert "exact: a training is left alone for its first 3 seconds" in text_of(watch)
        run.step(56)
        text, (summary, _, *lines, _) = text_of(watch), model_report(run.model).splitlines()
    assert summary in " ".join(text.split()), "wrapped to the width of the table"
    for line in lines:
        name, rows, share, noise, *_ = line.split()
        shown = cells(text, name)
        assert share.startswith(shares)
        assert shown[-2:] == [share, noise]
        assert shown[3] == rows


def test_every_look_of_a_decision_counts_and_no_native_pass(training):
    run = training(**HARD, true=fast)
    with monitor(run.model, every=7, starving=1e9) as watch:
        run.step(13)
        seen = watch.read()
        assert [layer.observations for layer in seen.values()] == [3, 3]
        assert {(layer.rows, layer.k, layer.auto_ratio) for layer in seen.values()} == {(16, 16, 1)}
        run.step(13)
        assert watch.read()["0"].observations == 3


def test_sampled_passes_are_observed_as_often_as_was_asked_for(training):
    run = training(**EASY, true=fast)
    run.step(72)
    with monitor(run.model, every=8, starving=1e9) as watch:
        run.step(20)  # without a look of the controller's
        (seen, _) = watch.read().values()
        assert seen.observations == 3
        # Its own figures are there at once, those of a decision with the next look.
        assert seen.auto_ratio == run.controller.shares["0"] < 1
        assert seen.auto_noise != seen.auto_noise
    assert "–" in text_of(watch)


def test_a_layer_with_a_ratio_of_its_own_has_no_decision(training):
    run = training(**EASY, true=fast)
    run.model[2].set_ratio_(1 / 4)
    with monitor(run.model, every=1, starving=1e9) as watch:
        run.step(6)
    assert watch.read()["2"].auto_ratio is None
    assert cells(text_of(watch), "2")[-2:] == ["–", "–"]
    run.model[0].set_ratio_(1 / 4)
    assert "auto" not in text_of(watch)
