"""The heuristic's choices and the candidates for tuning, over many problems and all targets."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench.microscope.building import by_name
from bench.microscope.cases import float32_products
from bench.microscope.compiling import compile_call, record
from bench.microscope.reading import read
from memaop_triton.kernels.targets import TARGETS
from memaop_triton.kernels.tuning import defaults, tuner
from memaop_triton.kernels.tuning.cache import SOURCES
from memaop_triton.kernels.tuning.config import (
    GemmConfig,
    Problem,
    RowConfig,
    occupancy,
    shared_memory,
)
from memaop_triton.kernels.tuning.cost_model import predict
from memaop_triton.kernels.tuning.search import candidates

HALF, SINGLE = torch.bfloat16, torch.float32
# M, K, N, P: usual ones, and such as nobody would plan for.
SIZES = [
    (16384, 2048, 4096, 4096),
    (4096, 512, 768, 3072),
    (64, 8, 64, 64),
    (1, 1, 1, 1),
    (5, 1, 1, 3),
    (129, 17, 17, 1),
    (1 << 22, 1 << 19, 4096, 11008),
    (1 << 22, 1, 33, 8192),
    (17, 0, 16, 16),
]


def problems(sizes):
    for m, k, n, p in sizes:
        for dtype, precision in ((HALF, "ieee"), (SINGLE, "ieee"), (SINGLE, "tf32")):
            given = {"dtype": dtype, "precision": precision, "rows": m}
            for flags in ((), ("weighted",), ("uneven",), ("blocks", "weighted")):
                yield Problem("gather_gemm", k=k, n=n, p=p, rank=16, flags=flags, **given)
            for rank, flags in itertools.product((1, 16, 64), ((), ("uneven",))):
                yield Problem("project", k=m, n=n, p=0, rank=rank, flags=flags, **given)
                flags = ("norms", "sums", *flags)
                yield Problem("transposed_mm", k=m, n=n, p=0, rank=rank, flags=flags, **given)
            for flags in ((), ("sums",)):
                yield Problem("row_scores", k=m, n=n, p=p, flags=flags, **given)
                yield Problem(
                    "accumulate_and_score", k=m, n=n, p=p, stored=dtype, flags=flags, **given
                )


@pytest.mark.parametrize("target", TARGETS)
def test_the_heuristic_ships_what_was_compiled_and_fits(target):
    target, seen = TARGETS[target], set()
    for problem in problems(SIZES):
        if problem.precision == "tf32" and not target.has_tf32:
            continue
        config = defaults.heuristic(problem, target)
        split = "split_k" if isinstance(config, GemmConfig) else "split"
        assert replace(config, **{split: 1}) in defaults.tiles(problem, target), problem
        assert occupancy(problem, config, target) >= 1, problem
        seen.add(problem.kernel)
    assert seen == SOURCES.keys()


@pytest.mark.parametrize(
    ("sizes", "tile", "split"),
    [
        # The wide tile where there is work for all, narrower ones or shares where there is not.
        ((16384, 2048, 4096, 4096), (256, 128), 1),
        ((16384, 2048, 1024, 1024), (128, 64), 1),
        ((65536, 8192, 256, 256), (128, 128), 16),
        ((16384, 2048, 16, 4096), (16, 64), 4),
        ((16384, 2048, 16, 16), (16, 64), 4),
    ],
)
def test_choices_on_an_h100(sizes, tile, split):
    m, k, n, p = sizes
    problem = Problem("gather_gemm", HALF, m, k, n, p, flags=("weighted",))
    config = defaults.heuristic(problem, TARGETS["sm_90"])
    assert ((config.block_n, config.block_p), config.split_k) == (tile, split)


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942"])
def test_candidates(target):
    target = TARGETS[target]
    of_default_rank = [p for p in problems([SIZES[0], SIZES[4]]) if p.rank in (0, 16)]
    # One of every kernel, type and size.
    chosen = {(p.kernel, p.dtype, p.precision, p.rows): p for p in of_default_rank}
    for problem in chosen.values():
        if problem.precision == "tf32" and not target.has_tf32:
            continue
        found = candidates(problem, target)
        assert defaults.heuristic(problem, target) in found, problem
        assert 1 <= len(found) <= 40
        assert len(set(found)) == len(found)
        times = [predict(problem, config, target).seconds for config in found]
        assert times == sorted(times), problem
        for config in found:
            assert occupancy(problem, config, target) >= 1
            check_valid(problem, config, target)
        assert found == candidates(replace(problem), target)


def check_valid(problem, config, target):
    """What the kernels ask of a tile."""
    assert config.num_warps in (2, 4, 8)
    if isinstance(config, RowConfig):
        assert not config.block_m & (config.block_m - 1)
        assert not config.block_c & (config.block_c - 1)
        if problem.rank:
            assert min(config.block_m, config.block_c) >= 16
        else:
            assert config.split == 1
        return
    assert min(config.block_n // config.tiles_n, config.block_p, config.block_k) >= 16
    assert config.tiles_n in (1, 2)
    assert config.tiles_n == 1 or problem.kernel == "gather_gemm"


# A sample, compiled. -----------------------------------------------------------------------------


class AskedError(Exception):
    """Holds the problem that a launcher asks a configuration for."""


def problem_of(case, target):
    """What a case launches."""

    def choose(problem, *_):
        raise AskedError(problem)

    with pytest.MonkeyPatch.context() as patch, float32_products(case.precision):
        patch.setattr(tuner, "choose", choose)
        with pytest.raises(AskedError) as asked:
            record(partial(case.call, config=None), target)
    return asked.value.args[0]


@pytest.mark.parametrize(
    ("target", "title", "kind", "number"),
    [
        ("sm_90", "gather rows, weighted + C", "bf16", 0),
        ("sm_90", "gather rows, weighted + C", "tf32", 3),
        ("sm_80", "gather rows, weighted + C", "bf16", 1),
        ("gfx942", "gather rows, weighted + C", "bf16", 0),
        ("sm_100", "gather rows, weighted + C", "fp32", 0),
    ],
)
def test_a_candidate_compiles_and_fits_as_estimated(target, title, kind, number):
    cases, target = by_name(target), TARGETS[target]
    name = next(n for n in cases if n.startswith(title) and n.endswith(kind))
    problem = problem_of(cases[name], target)
    config = candidates(problem, target)[number]
    with float32_products(problem.precision):
        (compiled, *_) = compile_call(partial(cases[name].call, config=config), target)
    counts = read(compiled)
    assert counts.shared <= shared_memory(problem, config, target)
    assert counts.shared <= target.shared_memory
    if problem.is_exact:
        assert not counts.matrix, "not multiplied exactly"
