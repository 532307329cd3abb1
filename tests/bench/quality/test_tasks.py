"""Networks, data and the table of tasks and schemes."""

import dataclasses
import math
import os
from pathlib import Path

import pytest
import torch

from memaop_triton.bench.studies.quality import data
from memaop_triton.bench.studies.quality.batches import Batch, ImageData, TextData
from memaop_triton.bench.studies.quality.networks import Gpt, Vit
from memaop_triton.bench.studies.quality.schemes import SCHEMES, Cell, cells, value_of
from memaop_triton.bench.studies.quality.tasks import TASKS
from memaop_triton.bench.studies.quality.training import Trainer, evaluate
from memaop_triton.experiments.data import DataError, load_text
from memaop_triton.nn.linear import MemAOPLinear

DATA_DIR = os.environ.get("MEMAOP_TRITON_DATA_DIR")


@pytest.mark.skipif(not DATA_DIR, reason="MEMAOP_TRITON_DATA_DIR is not set")
@pytest.mark.parametrize("name", TASKS)
def test_two_steps_on_real_data(name):
    task = dataclasses.replace(TASKS[name].located(Path(DATA_DIR)), batch=4)
    source = data.load(task, Path(DATA_DIR))
    trainer = Trainer(task, Cell(name, "subspace", "1/8").config, 0)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    generator = torch.Generator().manual_seed(0)
    losses = [trainer.step(batch) for batch in source.batches(4, 2, generator)]
    classes = getattr(task.network, "classes", 65 if isinstance(task.network, Gpt) else 10)
    assert losses[0] == pytest.approx(math.log(classes), rel=0.15)  # it knows nothing yet
    after = trainer.model.parameters()
    assert not any(torch.equal(p, q) for p, q in zip(before, after, strict=True) if p.dim() > 1)
    linear = {n: m for n, m in trainer.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert [n for n, m in linear.items() if not isinstance(m, MemAOPLinear)] == ["head"]
    x, y = source.sample
    assert math.isfinite(evaluate(trainer.model, Batch(x[:2], y[:2])).loss)
    assert source.held_out.y.numel() >= (50_000 if isinstance(task.network, Gpt) else 2_000)
    assert y.numel() in (300, 2_000, 64 * 128)


def test_text_targets_are_the_next_characters():
    source = TextData(torch.arange(100), torch.arange(100, 131), context=10)
    (batch,) = source.batches(32, 1, torch.Generator().manual_seed(0))
    assert batch.x.shape == (32, 10)
    for x, y in (batch, source.held_out, source.sample):
        assert torch.equal(y, x + 1)
        assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(source.held_out.x.flatten(), torch.arange(100, 130))
    assert batch.y.max() < 100
    tuning = source.for_tuning()
    assert torch.equal(torch.cat([tuning.train, tuning.rest]), source.train)


def test_a_pass_shows_every_image_once():
    train = Batch(torch.arange(10).float()[:, None], torch.arange(10))
    batches = list(ImageData(train, train).batches(4, 5, torch.Generator().manual_seed(0)))
    labels = torch.cat([batch.y for batch in batches])
    assert labels[:10].sort().values.tolist() == labels[10:].sort().values.tolist() == [*range(10)]
    assert labels[:10].tolist() != labels[10:].tolist()
    assert all(torch.equal(x.flatten().long(), y) for x, y in batches)


def test_images_are_moved_by_up_to_two_pixels():
    x = torch.zeros(400, 6, 6)
    x[:, 2:4, 2:4] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    train = Batch(x.flatten(1), torch.arange(400))
    still, moved = (
        next(ImageData(train, train, shift=shift).batches(400, 1, torch.Generator().manual_seed(0)))
        for shift in (0, 2)
    )
    assert torch.equal(still.y, moved.y)
    assert torch.equal(still.x[0], train.x[still.y[0]])
    corners = []
    for image in moved.x.view(-1, 6, 6):
        (corner,) = (image == 1).nonzero().tolist()
        corners.append(tuple(corner))
        rows, columns = (slice(place, place + 2) for place in corner)
        assert image[rows, columns].tolist() == [[1, 2], [3, 4]]
        assert image.sum() == 10
    assert set(corners) == {(down, right) for down in range(5) for right in range(5)}
    assert ImageData(train, train, shift=2).for_tuning().shift == 2


def test_tuning_never_sees_what_is_held_out():
    images = Batch(torch.arange(12_000.0)[:, None], torch.zeros(12_000, dtype=torch.int64))
    source = ImageData(images, Batch(-images.x, images.y))
    tuning = source.for_tuning()
    assert len(tuning.held_out.y) == 2_000
    assert torch.equal(torch.cat([tuning.train.x, tuning.held_out.x]), images.x)
    assert len(source.sample.y) == 2_000
    assert torch.equal(source.sample.x, source.sample.x)


def test_gpt_sees_nothing_of_the_future():
    model = Gpt(32, 2, context=8, vocabulary=11).build()
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    one, other = model(tokens), model(changed)
    assert torch.equal(one[0, :5], other[0, :5])
    assert not torch.allclose(one[0, 5:], other[0, 5:])


def test_vit_cuts_squares():
    model = Vit(8, 1, side=4, patch=2).build()
    seen = []
    model.patches.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(torch.arange(16.0)[None])
    assert seen[0].tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]


@pytest.mark.parametrize("task", TASKS)
def test_every_cell_has_a_configuration_of_its_own(task):
    configs = {}
    for cell in cells(task):
        config = cell.config
        assert (config is None) == (cell.scheme == "rotating" or cell.scheme.startswith("dense"))
        assert cell.rotating == (value_of(cell.ratio) if cell.scheme == "rotating" else None)
        if cell.scheme.startswith("auto"):
            assert config.is_auto
            assert (config.stash == "int4") == (cell.scheme == "auto-int4")
        elif config is not None:
            share = config.ratio or config.budget / 0.9
            assert share == pytest.approx(value_of(cell.ratio))
            assert SCHEMES[cell.scheme].cheapens_both == (config.grad_input_name != "exact")
            assert configs.setdefault((config, cell.allocated), cell) is cell


def test_text_is_read_or_it_is_said_what_is_wrong(tmp_path):
    path = tmp_path / "tinyshakespeare.txt"
    with pytest.raises(DataError, match=r"input\.txt.*--data-dir"):
        load_text("tinyshakespeare")
    with pytest.raises(DataError, match=r"no file tinyshakespeare\.txt.*input\.txt"):
        load_text("tinyshakespeare", tmp_path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        load_text("tinyshakespeare", tmp_path)
    path.write_text("".join(map(chr, range(200, 300))), encoding="utf-8")
    with pytest.raises(DataError, match=r"100 different characters.*takes 65"):
        data.load(TASKS["gpt-128"], tmp_path)
