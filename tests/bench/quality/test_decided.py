"""Runs in which the library decides, their times, and what the page says of them."""

import dataclasses
import math

import pytest
import torch

from memaop_triton.auto import agenda
from memaop_triton.bench.studies.quality import decided, report, results, tables
from memaop_triton.bench.studies.quality.batches import MASKED, Batch, TextData
from memaop_triton.bench.studies.quality.decided import Decided
from memaop_triton.bench.studies.quality.deciding_section import deciding_section
from memaop_triton.bench.studies.quality.rotation import Rotation
from memaop_triton.bench.studies.quality.running import Job, pending
from memaop_triton.bench.studies.quality.schemes import AUTO, WHOLE, Cell, cells
from memaop_triton.bench.studies.quality.tasks import TASKS
from memaop_triton.bench.studies.quality.training import Trainer, evaluate, loss_of, train
from tests.bench.quality import tiny

CELL = Cell("tiny", AUTO, WHOLE)
GPT = TASKS["gpt-128"].network


def line(seed, share, **others):
    """A line of a run whose steps take a share of dense's."""
    values = {
        "task": "tiny",
        "scheme": AUTO,
        "seed": seed,
        "code": CELL.code,
        "cpu": "A CPU",
        "threads": 2,
        "steps": 20,
        "sampled": 10,
        "first": 5,
        "dense": 10.0,
        "ms": 10 * share,
        "share": share,
        "predicted": 1.2,
        "realised": 1.1,
        "summary": "1.10 times dense's progress per second",
    }
    return Decided(**values | others)


def test_a_run_is_kept_with_its_times_beside_dense(store, source, monkeypatch):
    monkeypatch.setattr(agenda, "LEFT_ALONE", 0.0)
    run, found = decided.do(Job(CELL, 3), store, None)
    assert (run.cell, run.seed) == (CELL, 3)
    assert math.isnan(run.weight_grads)
    assert store.runs()[0].loss == pytest.approx(run.loss)
    assert pending([CELL], 4, store.runs()) == [Job(CELL, seed) for seed in (0, 1, 2)]
    (kept,) = tables.read(decided.path_in(store), Decided)
    assert (kept.steps, kept.sampled, kept.first, kept.realised) == (20, 0, 0, 0)
    assert kept.summary.startswith("dense is best here")
    assert kept.share == pytest.approx(kept.ms / kept.dense, rel=1e-4)
    # Small layers stay exact, so the run is dense's.
    dense = train(Trainer(tiny.TASK, None, 3), source)
    assert dense.score.loss == pytest.approx(run.loss, rel=1e-5)
    assert len(dense.step_seconds) == 20
    assert kept.cpu.endswith(torch.backends.cpu.get_cpu_capability())
    assert found._replace(dense=0, ms=0, share=0) == kept._replace(dense=0, ms=0, share=0)


def test_every_task_is_decided_once():
    for name in TASKS:
        assert [cell for cell in cells(name) if cell.scheme == AUTO] == [Cell(name, AUTO, WHOLE)]


@pytest.mark.parametrize(
    ("accuracies", "share", "difference", "verdict"),
    [
        # Dense in 3/4 of the time: 85, 86 and 87, in all of it 90, 91 and 92.
        ((89.9, 90.9, 91.9), 0.75, "+4.90 ± 0.00", "ahead"),
        ((89.9, 90.9, 91.9), 0.74, "+4.90 ± 0.00", "ahead"),  # dense's run takes a little longer
        ((89.9, 90.9, 91.9), 0.72, "–", "undecided"),
        ((89.9, 91.0, 92.0), 1.0, "−0.03 ± 0.14", "no worse"),
        ((89.0, 91.0, 92.0), 1.0, "−0.33 ± 1.43", "undecided"),
        ((80.0, 81.0, 82.0), 1.0, "−10.00 ± 0.00", "worse"),
        ((90.0, 91.0, 92.0), 1.02, "−0.40 ± 0.00", "worse"),
    ],
)
def test_verdicts_are_by_the_worse_end_of_the_interval(
    store, accuracies, share, difference, verdict
):
    for seed, accuracy in enumerate(accuracies):
        for scheme, ratio, reached in (
            ("dense", "1", 90.0 + seed),
            ("dense-shorter", "3/4", 85.0 + seed),
            (AUTO, WHOLE, accuracy),
        ):
            store.add(*tiny.run(scheme, ratio, seed, accuracy=reached, loss=1 - reached / 100))
        path = decided.path_in(store)
        tables.update(path, Decided, [line(seed, share)], lambda one: one.seed)
    *_, table = deciding_section(results.load(store.folder)).blocks
    ((task, time, fewer, smaller, shown, said, _),) = table.rows
    assert (task.text, task.sub) == ("tiny", "3 seeds")
    assert (time.text, time.sub) == (f"{share:.3f}", "50 % of steps sampled")
    assert (fewer.text, smaller.text, shown.text) == (difference, "–", verdict)
    assert said.text == "1.20, 1.10"


def test_runs_on_other_machines_are_named(store):
    """Names alone do not tell: what the library decides hangs on the vector instructions too."""
    lines = [line(seed, 0.9) for seed in (0, 1, 2)]
    lines += [line(3, 0.9, cpu="A CPU AVX2"), line(4, 0.9, cpu="A CPU AVX2", threads=1)]
    tables.update(decided.path_in(store), Decided, lines, lambda one: one.seed)
    *_, where, _ = deciding_section(results.load(store.folder)).blocks
    assert where == (
        "On A CPU with 2 threads; on A CPU AVX2 with 1 thread tiny (seed 4); "
        "on A CPU AVX2 with 2 threads tiny (seed 3)."
    )


def test_a_task_with_nothing_but_decisions_has_a_page(store):
    store.add(*tiny.run())
    store.add(*tiny.run(AUTO, WHOLE, weight_grads=math.nan))
    tables.update(decided.path_in(store), Decided, [line(0, 0.9)], lambda one: one.seed)
    written = {path.name for path in report.write(store.folder)}
    assert "tiny-curves.svg" in written
    assert "tiny-trade.svg" not in written, "it is over FLOPs, which are not known"


def test_a_line_of_another_task_or_configuration_does_not_count(store):
    path = decided.path_in(store)
    tables.update(path, Decided, [line(0, 1.0, code="of before")], lambda one: one.seed)
    assert results.load(store.folder).decided == {}


def test_layers_take_turns():
    torch.manual_seed(0)
    trainer = Trainer(tiny.TASK, None, 0, rotating=1 / 2)
    x, y = torch.randn(8, 64), torch.randint(10, (8,))
    seen = set()
    for _ in range(20):
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.step(Batch(x, y))
        after = dict(trainer.model.named_parameters())
        moved = {n for n in before if not torch.equal(before[n], after[n])}
        assert {"head.weight", "head.bias"} <= moved
        assert len(moved) == 4
        seen.add(min(moved - {"head.weight", "head.bias"}))
    assert seen == {"hidden1.bias", "hidden2.bias"}
    one = Rotation([torch.nn.Linear(2, 2)], 1 / 4)
    one.turn()
    assert one._layers[0].weight.requires_grad  # never none


def test_prompts_are_not_predicted():
    source = TextData(torch.arange(65).repeat(4), torch.arange(64), 16, prompt=8)
    (batch,) = source.batches(4, 1, torch.Generator().manual_seed(0))
    for one in (batch, source.held_out, source.for_tuning().held_out):
        assert (one.y[:, :8] == MASKED).all()
        assert torch.equal(one.y[:, 8:], one.x[:, 8:] + 1) or one is batch
    network = dataclasses.replace(GPT, context=16).build()
    logits = network(batch.x)[:, 8:].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch.y[:, 8:].flatten())
    torch.testing.assert_close(loss_of(network, batch), expected)
    score = evaluate(network, batch)
    assert score.loss == pytest.approx(expected.item(), rel=1e-5)
    right = (logits.argmax(1) == batch.y[:, 8:].flatten()).float().mean()
    assert score.accuracy == pytest.approx(100 * right.item(), abs=1e-3)
