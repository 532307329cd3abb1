import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch

from memaop_triton import MemAOPConfig
from memaop_triton.config import SELECTIONS, UNBIASED_SELECTIONS
from memaop_triton.config.parts import MEMORIES, ROW_MEMORIES, Rows, Sampled, Subspace
from memaop_triton.sampling.selection import select

# What is built, its arguments, the error, and words of its message.
REFUSED = [
    (MemAOPConfig, {"ratio": 0.0}, ValueError, "ratio=0.0 must be in (0, 1]"),
    (MemAOPConfig, {"ratio": 1.5}, ValueError, "ratio=1.5 must be in (0, 1]: it is K/M, 0.125"),
    (MemAOPConfig, {"ratio": float("nan")}, ValueError, "ratio=nan must be"),
    (MemAOPConfig, {"ratio": "1/8"}, TypeError, "ratio must be a number in (0, 1], got '1/8'"),
    (MemAOPConfig, {"ratio": True}, TypeError, "ratio must be a number"),
    (MemAOPConfig, {"k": 0}, ValueError, "k=0 must be at least 1"),
    (MemAOPConfig, {"k": 2.0}, TypeError, "k must be an int (rows), got 2.0"),
    (MemAOPConfig, {"k": True}, TypeError, "k must be an int"),
    (MemAOPConfig, {"budget": 1.0}, ValueError, "budget=1 is what dense costs"),
    (MemAOPConfig, {"budget": 1.5}, ValueError, "budget=1.5 must be in (0, 1]"),
    (MemAOPConfig, {"ratio": 0.5, "k": 3}, ValueError, "ratio=0.5 and k=3 say the same thing"),
    (MemAOPConfig, {"k": 8, "budget": 0.5}, ValueError, "k=8 and budget=0.5 say the same"),
    (MemAOPConfig, {"block_rows": 8}, ValueError, "block_rows=8 is not one of (1, 16, 32"),
    (MemAOPConfig, {"block_rows": True}, ValueError, "block_rows=True"),
    (MemAOPConfig, {"memory": 16}, TypeError, "memory must be a Subspace or Rows, a string or"),
    (MemAOPConfig, {"memory": Sampled()}, TypeError, "memory must be a Subspace or Rows"),
    (MemAOPConfig, {"grad_input": Subspace()}, TypeError, "grad_input must be a Sampled or Proj"),
    (MemAOPConfig, {"grad_input": "projected", "memory": None}, ValueError, "'projected' needs"),
    (MemAOPConfig, {"scores": "norm"}, ValueError, "scores='norm' is not one of 'norms', 'col"),
    (MemAOPConfig, {"scores": "grad"}, ValueError, "scores='grad' saves no pass with memory='sub"),
    (
        MemAOPConfig,
        {"scores": "columns", "selection": "topk", "memory": "signed"},
        ValueError,
        "memory='signed', which reads all rows anyway, to store or to project them: use memory='n",
    ),
    (MemAOPConfig.paper, {"selection": "priority"}, ValueError, "selection='priority' is not one"),
    (MemAOPConfig.paper, {"memory": "signed"}, ValueError, "memory='signed' is not one of"),
    (Subspace, {"rank": 1.5}, TypeError, "rank must be an int (dimensions of the subspace)"),
    (Subspace, {"refresh_every": 0}, ValueError, "refresh_every=0 must be at least 1"),
    (Subspace, {"side": "gard"}, ValueError, "side='gard' is not one of 'auto', 'input', 'grad'. "),
    (Rows, {"decay": 0.0}, ValueError, "decay=0.0 must be in (0, 1]"),
    (Rows, {"decay": 1.01}, ValueError, "decay=1.01 must be"),
    (Rows, {"dtype": torch.int8}, ValueError, "dtype=torch.int8 is not a floating-point dtype"),
    (Rows, {"dtype": "float32"}, ValueError, "dtype='float32' is not"),
]


@pytest.mark.parametrize(("build", "arguments", "error", "words"), REFUSED)
def test_setting_that_cannot_be(build, arguments, error, words):
    with pytest.raises(error, match=re.escape(words)):
        build(**arguments)


def test_the_default_and_the_paper():
    config = MemAOPConfig()
    assert (config.ratio, config.k) == (1 / 8, None)
    assert (config.selection, config.memory) == ("priority", Subspace(rank=16))
    assert config.is_unbiased
    assert not config.row_memory
    config = MemAOPConfig.paper(k=18)
    assert (config.k, config.ratio) == (18, None)
    assert (config.selection, config.memory) == ("topk", Rows(signed=False, decay=1.0))
    assert not config.is_unbiased
    assert config.row_memory


def test_config_is_frozen_hashable_and_comparable():
    config = MemAOPConfig(k=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 4
    assert {config: 1}[MemAOPConfig(k=3)] == 1


@pytest.mark.parametrize(
    ("settings", "rows", "expected"),
    [
        ({"ratio": 1 / 8}, 64, 8),
        ({"ratio": 1 / 8}, 68, 9),
        ({"ratio": 1 / 8}, 67, 8),
        ({"ratio": 1 / 8}, 1, 1),
        ({"ratio": 1 / 8}, 0, 0),
        ({"ratio": np.float32(0.125)}, 64, 8),
        ({"ratio": 1}, 17, 17),
        ({"k": 5}, 64, 5),
        ({"k": 5}, 3, 3),
        ({"k": 5}, 0, 0),
        ({"k": np.int64(8)}, 64, 8),
        ({}, 80, 10),
        ({"block_rows": 128}, 64, 64),
        ({"block_rows": 64}, 128, 64),
        ({"block_rows": 16}, 256, 32),
        ({"block_rows": 64}, 1000, 128),
        ({"ratio": 1, "block_rows": 16}, 20, 20),
        ({"k": 20, "block_rows": 16}, 20, 20),
        ({"k": 19, "block_rows": 16}, 20, 16),
    ],
)
def test_num_rows(settings, rows, expected):
    config = MemAOPConfig(memory="none", **settings)
    assert config.num_rows(rows) == expected
    if rows:
        assert len(select(torch.rand(rows), config, expected).indices) == expected


@pytest.mark.parametrize(("features", "rank"), [(1, 1), (3, 1), (8, 2), (64, 16), (784, 16)])
@pytest.mark.parametrize("side", ["input", "grad", "auto"])
def test_rank_is_cut_to_a_quarter_of_the_rows(features, rank, side):
    sizes = {"input": (features, 9), "grad": (9, features), "auto": (1000, features)}[side]
    assert MemAOPConfig(memory=Subspace(side=side)).rank_for(256, *sizes) == rank


@pytest.mark.parametrize("setting", ["rank", "side", "refresh_every", "decay", "dtype"])
def test_a_setting_of_a_memory_cannot_stand_beside_another_one(setting):
    with pytest.raises(TypeError, match=setting):
        MemAOPConfig(**{setting: 1})


@pytest.mark.parametrize(
    ("argument", "typo", "nearest", "names"),
    [
        ("selection", "topK", "topk", SELECTIONS),
        ("selection", "randomk", "randk", SELECTIONS),
        ("selection", "zzz", None, SELECTIONS),
        ("memory", "sub-space", "subspace", MEMORIES),
        ("grad_input", "sample", "sampled", ("exact", "sampled", "projected")),
    ],
)
def test_unknown_name_lists_all_and_suggests_the_nearest(argument, typo, nearest, names):
    with pytest.raises(ValueError, match=f"{argument}='{typo}'") as error:
        MemAOPConfig(**{argument: typo})
    listed, _, hint = str(error.value).partition(" Did you mean ")
    assert all(repr(name) in listed for name in names)
    assert hint == ("" if nearest is None else f"{nearest!r}?")


def test_selections_that_a_memory_or_a_sampled_input_gradient_refuses():
    for selection, memory in itertools.product(UNBIASED_SELECTIONS, ROW_MEMORIES):
        with pytest.raises(ValueError, match=f"memory='{memory}'.*count rows twice.*'subspace'"):
            MemAOPConfig(selection=selection, memory=memory)
    for selection in ("topk", "weightedk", "randk"):
        with pytest.raises(ValueError, match=f"grad_input='sampled'.*'{selection}'.*'priority'"):
            MemAOPConfig(selection=selection, memory="none", grad_input="sampled")
