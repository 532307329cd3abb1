"""The cost model: what no prediction may break, and its counts beside those of the compiler."""

import re
from dataclasses import replace

import pytest
import torch

from bench.microscope.kernel_report import PAGE as REPORT
from memaop_triton.kernels.targets import TARGETS
from memaop_triton.kernels.tuning import config as launches
from memaop_triton.kernels.tuning import defaults
from memaop_triton.kernels.tuning.config import GemmConfig, Problem, RowConfig
from memaop_triton.kernels.tuning.cost_model import count_work, predict
from memaop_triton.kernels.tuning.defaults import gemm_tiles
from tests.kernels.tuning.test_search import problems

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

KINDS = {"bf16": HALF, "fp16": torch.float16, "tf32": SINGLE, "fp32": SINGLE}


def reported():
    """Problem, configuration and target of each line of the kernel report, and what it says."""
    target = None
    for line in REPORT.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## (\w+): ", line):
            target = TARGETS[heading[1]]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if target and len(cells) == 10 and re.match(r"\d+x", cells[2]):
            title, kind, tile, warps, stages, registers, shared, _, _, loop = cells
            sides = [int(side) for side in tile.split("x")]
            found = read_case(title, kind, sides, int(warps), int(stages), target)
            if found:
                said = float(shared) * 1024, int(registers.split()[0]), float(loop)
                yield pytest.param(*found, target, said, id=f"{target.name}-{title}-{kind}-{tile}")


def read_case(title, kind, sides, warps, stages, target):
    dtype, precision = KINDS[kind], "tf32" if kind == "tf32" else "ieee"
    stored = re.search(r"memory (\w+)", title)
    stored = KINDS[stored[1]] if stored else None
    rank = int((re.search(r"rank (\d+)", title) or "00")[1])
    marks = {
        "blocks": "blocks" in title,
        "norms": "GᵀZ" in title,
        "sums": "bias sums" in title or "GᵀZ" in title,
        "unscored": "rest" in title,
        "weighted": any(word in title for word in ("weighted", "split")),
    }
    flags = tuple(mark for mark, is_set in marks.items() if is_set)
    given = {"stored": stored, "precision": precision, "flags": flags}
    if len(sides) == 3:
        p, n, k = sides
        kernel = "residual_gemm" if "residual" in title else "gather_gemm"
        twin = (t for t in gemm_tiles(target, dtype, precision) if (t.block_n, t.block_p) == (n, p))
        pieces = next(twin).tiles_n if kernel == "gather_gemm" else 1
        config = GemmConfig(n, p, k, warps, stages, tiles_n=pieces)
        rank = 16 if "+ C" in title else 0
        return Problem(kernel, dtype, M, K, 4096, 4096, rank=rank, **given), config
    kernels = {"accumulate": "accumulate_and_score", "scores": "row_scores"}
    kernels |= {"Z = XQ": "project", "XᵀZ": "transposed_mm", "GᵀZ": "transposed_mm"}
    found = [kernel for word, kernel in kernels.items() if title.startswith(word)]
    if not found:
        return None
    p = 0 if rank else 4096
    config = RowConfig(*sides, warps, stages)
    return Problem(found[0], dtype, M, M, 4096, p, rank=rank, **given), config


CASES = list(reported())


def test_the_report_is_read():
    assert len(CASES) > 200


@pytest.mark.parametrize(("problem", "config", "target", "said"), CASES)
def test_estimates_are_near_what_the_compiler_reports(problem, config, target, said):
    """Shared memory from above; registers and instructions within a factor, as their use allows."""
    shared, registers, loop = said
    room = launches.shared_memory(problem, config, target)
    assert shared <= room <= 1.8 * shared + 20 * 1024
    assert 0.45 <= launches.registers(problem, config, target) / registers <= 2.8
    assert 0.44 <= count_work(problem, config, target).instructions / loop <= 2
