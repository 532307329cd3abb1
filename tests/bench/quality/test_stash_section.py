"""What the page says of inputs that are kept in four bits."""

from memaop_triton.bench.studies.quality import results
from memaop_triton.bench.studies.quality.stash_section import stash_section
from tests.bench.quality import tiny


def test_each_is_beside_the_same_without_a_stash(store):
    for scheme, ratio, reached in (
        ("dense", "1", 90.0),
        ("stash-int4", "1", 89.5),
        ("subspace", "1/8", 88.0),
        ("stash-int4", "1/8", 87.75),
        ("auto", "1", 89.0),
        ("auto-int4", "1", 89.25),
    ):
        for seed in range(3):
            accuracy = reached + seed
            store.add(*tiny.run(scheme, ratio, seed, accuracy=accuracy, loss=1 - accuracy / 100))
    *_, table = stash_section(results.load(store.folder)).blocks
    ((task, *differences),) = table.rows
    assert task.text == "tiny"
    assert [one.text for one in differences] == ["−0.50 ± 0.00", "−0.25 ± 0.00", "+0.25 ± 0.00"]
    assert {one.sub for one in differences} == {"3 pairs"}


def test_nothing_was_run(store):
    store.add(*tiny.run())
    assert stash_section(results.load(store.folder)).blocks == ["Not run yet."]
