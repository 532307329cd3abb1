"""How a benchmark says which suites it is in, and on which problems it runs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from memaop_triton.bench.suites import SUITES
from memaop_triton.bench.suites.problem import Problem


def in_suites(*names: str) -> pytest.MarkDecorator:
    """Mark a benchmark, or a parameter of one, as part of these suites."""
    unknown = set(names) - set(SUITES)
    if unknown:
        raise ValueError(f"{unknown} is not among the suites {list(SUITES)}.")
    return pytest.mark.suite(*names)


def on_problems(*groups: tuple[Sequence[str], Sequence[Problem]]) -> pytest.MarkDecorator:
    """Parametrise a benchmark by `problem`: pairs of suites and the problems they have."""
    suites_of: dict[Problem, set[str]] = {}
    for names, problems in groups:
        for problem in problems:
            suites_of.setdefault(problem, set()).update(names)
    return pytest.mark.parametrize(
        "problem",
        [
            pytest.param(problem, marks=in_suites(*sorted(names)), id=_id(problem))
            for problem, names in suites_of.items()
        ],
    )


def _id(problem: Problem) -> str:
    parts = [problem.shape.replace("×", "x"), problem.budget.replace("/", "_")]
    if problem.dtype != torch.float32:
        parts.append(str(problem.dtype).removeprefix("torch."))
    if problem.device != "cpu":
        parts.append(problem.device)
    if problem.block_rows > 1:
        parts.append(f"blocks{problem.block_rows}")
    return "-".join(parts)
