import dataclasses

import numpy as np
import pytest
import torch

from memaop_triton import MemAOPConfig
from memaop_triton.config import (
    GRAD_INPUTS,
    MEMORIES,
    ROW_MEMORIES,
    SELECTIONS,
    Rows,
    Sampled,
    Subspace,
)
from memaop_triton.selection import select


def test_default_is_priority_with_a_subspace_of_rank_16_at_an_eighth():
    config = MemAOPConfig()
    assert (config.ratio, config.k) == (1 / 8, None)
    assert (config.selection, config.memory) == ("priority", Subspace(rank=16))
    assert config.is_unbiased
    assert not config.row_memory


def test_paper_is_topk_with_residual_memory():
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
    assert dataclasses.replace(config, k=4).k == 4


@pytest.mark.parametrize(
    ("budget", "rows", "expected"),
    [
        ({"ratio": 1 / 8}, 64, 8),
        ({"ratio": 1 / 8}, 68, 9),
        ({"ratio": 1 / 8}, 67, 8),
        ({"ratio": 1 / 8}, 1, 1),
        ({"ratio": 1 / 8}, 0, 0),
        ({"ratio": 1.0}, 17, 17),
        ({"ratio": 1}, 17, 17),
        ({"k": 5}, 64, 5),
        ({"k": 5}, 3, 3),
        ({"k": 5}, 0, 0),
        ({}, 80, 10),
    ],
)
def test_num_rows(budget, rows, expected):
    assert MemAOPConfig(**budget).num_rows(rows) == expected


@pytest.mark.parametrize(("features", "rank"), [(1, 1), (3, 1), (8, 2), (64, 16), (784, 16)])
@pytest.mark.parametrize("side", ["input", "grad", "auto"])
def test_rank_is_cut_to_a_quarter_of_the_rows(features, rank, side):
    sizes = {"input": (features, 9), "grad": (9, features), "auto": (1000, features)}[side]
    assert MemAOPConfig(memory=Subspace(side=side)).rank_for(256, *sizes) == rank


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.0}, r"ratio=0\.0 must be in \(0, 1\]"),
        ({"ratio": -0.5}, r"ratio=-0\.5 must be in \(0, 1\]"),
        ({"ratio": 1.5}, r"ratio=1\.5 must be in \(0, 1\].*0\.125"),
        ({"ratio": float("nan")}, "ratio=nan must be"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"k": -3}, "k=-3 must be at least 1"),
        ({"ratio": 0.5, "k": 3}, r"ratio=0\.5 and k=3.*give one of them"),
        ({"block_rows": 8}, r"block_rows=8 .*\(1, 16, 32, 64, 128\)"),
    ],
)
def test_argument_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        MemAOPConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank=0 must be at least 1"),
        ({"rank": 1.5}, TypeError, "rank must be an int .*got 1.5"),
        ({"refresh_every": 0}, ValueError, "refresh_every=0 must be at least 1"),
        ({"refresh_every": "8"}, TypeError, "refresh_every must be an int .*got '8'"),
        ({"side": "left"}, ValueError, "side='left' is not one of 'auto', 'input', 'grad'"),
    ],
)
def test_subspace_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        Subspace(**arguments)


@pytest.mark.parametrize(
    "setting",
    ["rank", "side", "refresh_every", "decay", "dtype", "memory_dtype", "grad_input_budget"],
)
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_setting_of_another_memory_cannot_be_written_down(memory, setting):
    selection = "topk" if memory in ROW_MEMORIES else "priority"
    with pytest.raises(TypeError, match=setting):
        MemAOPConfig(memory=memory, selection=selection, **{setting: 1})


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.01, float("nan")])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=rf"decay={decay} must be in \(0, 1\]"):
        MemAOPConfig.paper(k=1, memory=Rows(decay=decay))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, "float32"])
def test_memory_dtype_that_cannot_store_a_memory(dtype):
    with pytest.raises(ValueError, match=r"dtype=.* is not a floating-point dtype.*float16"):
        MemAOPConfig(selection="topk", memory=Rows(dtype=dtype))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": "1/8"}, r"ratio must be a number in \(0, 1\], got '1/8'"),
        ({"ratio": True}, "ratio must be a number"),
        ({"k": 2.0}, "k must be an int .*got 2.0"),
        ({"k": True}, "k must be an int"),
        ({"memory": 16}, "memory must be a Subspace or Rows, a string or None, got 16"),
        ({"memory": Sampled()}, "memory must be a Subspace or Rows"),
        ({"grad_input": Subspace()}, "grad_input must be a Sampled or Projected"),
    ],
)
def test_argument_of_the_wrong_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        MemAOPConfig(**arguments)


def test_numbers_of_numpy_are_numbers():
    assert MemAOPConfig(k=np.int64(8)).num_rows(64) == 8
    assert MemAOPConfig(ratio=np.float32(0.125)).num_rows(64) == 8


@pytest.mark.parametrize(
    ("rows", "block", "k"), [(64, 128, 64), (128, 64, 64), (256, 16, 32), (1000, 64, 128)]
)
def test_k_is_whole_blocks(rows, block, k):
    config = MemAOPConfig(block_rows=block, memory="none")
    assert config.num_rows(rows) == k
    assert len(select(torch.rand(rows), config, k).indices) == k


@pytest.mark.parametrize("block_rows", [16.0, True, "16"])
def test_block_rows_is_an_int(block_rows):
    with pytest.raises((TypeError, ValueError), match="block_rows"):
        MemAOPConfig(block_rows=block_rows)


@pytest.mark.parametrize(
    ("argument", "typo", "nearest", "names"),
    [
        ("selection", "topK", "topk", SELECTIONS),
        ("selection", "randomk", "randk", SELECTIONS),
        ("selection", "Bernouli", "bernoulli", SELECTIONS),
        ("memory", "residuals", "residual", MEMORIES),
        ("memory", "sub-space", "subspace", MEMORIES),
        ("grad_input", "sample", "sampled", GRAD_INPUTS),
    ],
)
def test_unknown_name_lists_all_and_suggests_the_nearest(argument, typo, nearest, names):
    with pytest.raises(ValueError, match=f"{argument}='{typo}'") as error:
        MemAOPConfig(**{argument: typo})
    assert str(error.value).endswith(f"Did you mean {nearest!r}?")
    assert all(repr(name) in str(error.value) for name in names)


def test_name_with_nothing_near_gets_no_suggestion():
    with pytest.raises(ValueError, match="selection='zzz'") as error:
        MemAOPConfig(selection="zzz")
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize("memory", ["residual", "signed"])
def test_row_memory_refuses_unbiased_policies(unbiased, memory):
    with pytest.raises(ValueError, match=f"memory='{memory}'.*count rows twice.*'subspace'"):
        MemAOPConfig(memory=memory, **unbiased)


@pytest.mark.parametrize("selection", ["topk", "weightedk", "randk"])
def test_sampled_input_gradient_needs_an_unbiased_policy(selection):
    with pytest.raises(ValueError, match=f"grad_input='sampled'.*'{selection}'.*'priority'"):
        MemAOPConfig(selection=selection, memory="none", grad_input="sampled")


@pytest.mark.parametrize("arguments", [{"selection": "priority"}, {"memory": "signed"}])
def test_paper_offers_what_the_paper_has(arguments):
    with pytest.raises(ValueError, match="is not one of"):
        MemAOPConfig.paper(k=1, **arguments)


def test_legal_combinations_are_accepted(scheme):
    MemAOPConfig(**scheme)
