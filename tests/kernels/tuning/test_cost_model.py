"""The cost model: what no prediction may break, and its counts beside those of the compiler."""

import re
from dataclasses import replace

import pytest
import torch

from bench.microscope.building import REPORTED, by_name
from bench.microscope.kernel_report import PAGE as REPORT
from memaop_triton.kernels.targets import TARGETS
from memaop_triton.kernels.tuning import config as launches
from memaop_triton.kernels.tuning import defaults
from memaop_triton.kernels.tuning.config import GemmConfig, Problem
from memaop_triton.kernels.tuning.cost_model import count_work, predict
from tests.kernels.tuning.test_search import problem_of, problems

HALF, SINGLE = torch.bfloat16, torch.float32
H100 = TARGETS["sm_90"]
M, K = 16384, 2048


def flops_and_bytes(problem):
    """What nobody can avoid: each operand read once, each result written once."""
    rows = problem.k if "gemm" in problem.kernel else problem.rows
    size, columns = problem.dtype.itemsize, problem.n + problem.p
    stored = problem.stored.itemsize if problem.stored else 0
    if problem.kernel == "accumulate_and_score":
        return 0, rows * columns * (size + 2 * stored)
    if "gemm" in problem.kernel:
        out = problem.n * problem.p * size
        return 2 * rows * problem.n * problem.p, rows * columns * (size + stored) + out
    return 2 * rows * columns * problem.rank, rows * columns * size


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_nothing_is_faster_than_its_bytes_and_its_flops(target):
    for problem in problems([(M, K, 4096, 4096)]):
        flops, moved = flops_and_bytes(problem)
        unit = "half" if problem.dtype == HALF else "single" if problem.is_exact else "tf32"
        peak = 1e12 * getattr(target.chip, unit)
        floor = max(flops / peak, moved / (1e12 * target.chip.bandwidth))
        config = defaults.heuristic(problem, target)
        assert floor < predict(problem, config, target).seconds < 40 * floor + 40e-6, problem
        work = count_work(problem, config, target)
        assert work.memory_bytes + sum(work.extra_bytes) >= moved, problem


def test_a_large_product_is_limited_by_the_matrix_units_and_a_pass_by_memory():
    gemm = Problem("gather_gemm", HALF, M, K, 4096, 4096)
    scores = Problem("row_scores", HALF, M, M, 4096, 4096)
    tiny = Problem("gather_gemm", HALF, 64, 8, 64, 64)
    limits = [
        predict(p, defaults.heuristic(p, H100), H100).limited_by for p in (gemm, scores, tiny)
    ]
    assert limits == ["matrix units", "memory", "launches"]


def test_rows_that_many_tiles_read_come_from_memory_again_where_the_cache_is_small():
    problem = Problem("gather_gemm", HALF, 1 << 20, 1 << 17, 16384, 4096)
    config = GemmConfig(128, 128, 64, 8, 3, group=8)
    once, out = (1 << 17) * (16384 + 4096) * 2, 16384 * 4096 * 2

    def moved(cache, config=config):
        chip = replace(H100.chip, cache=cache)
        return count_work(problem, config, replace(H100, chip=chip)).memory_bytes

    assert moved(1 << 20) == once + out
    assert 2 * once < moved(1) < 5 * once
    assert moved(1, replace(config, group=1)) > 1.5 * moved(1)
    assert moved(1, replace(config, block_n=64)) > moved(1)


# What the compiler says. -------------------------------------------------------------------------


def lines_of_the_report(target):
    """Shared memory, registers and instructions that the page has for each case, by its name."""
    section = REPORT.read_text("utf-8").partition(f"\n## {target}: ")[2].partition("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        # Nothing chooses the tile of `rescale`.
        if len(cells) == 10 and re.match(r"\d+x", cells[2]) and cells[0] != "rescale":
            title, kind, tile, _, _, registers, shared, _, _, loop = cells
            said = float(shared) * 1024, int(registers.split()[0]), float(loop)
            yield f"{title}, {tile}, {kind}", said


@pytest.mark.parametrize("target", REPORTED)
def test_estimates_are_near_what_the_compiler_reports(target):
    """Shared memory from above; registers and instructions within a factor, as their use allows."""
    lines = dict(lines_of_the_report(target))
    assert len(lines) > 30
    cases, target = by_name(target), TARGETS[target]
    for name, (shared, registers, loop) in lines.items():
        problem, config = problem_of(cases[name], target), cases[name].config
        room = launches.shared_memory(problem, config, target)
        assert shared <= room <= 1.8 * shared + 20 * 1024, name
        assert 0.45 <= launches.registers(problem, config, target) / registers <= 2.8, name
        assert 0.44 <= count_work(problem, config, target).instructions / loop <= 2, name
