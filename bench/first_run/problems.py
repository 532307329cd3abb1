"""The shapes and settings of a run, and the small ones of a dry run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memaop_triton.bench.first_run.cases import Place
from memaop_triton.bench.suites import models

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Sizes:
    """What is computed.

    Attributes:
        shapes: M, N, P of the weight gradients that are timed and predicted.
        small: M, N, P of a weight gradient that one or two programs compute.
        many_rows: M, N, P with more rows than one program selects from.
        policies: That select from these.
        dtype: Of these.
        other_dtypes: That the small one is computed in as well.
        nets: Whose training steps are timed.
        rounds: Of timing.
        candidates: Tiles to try for a problem.
        draws: For means of unbiased gradients.
    """

    shapes: tuple[Shape, ...]
    small: Shape
    many_rows: Shape
    policies: tuple[str, ...]
    dtype: torch.dtype
    other_dtypes: tuple[torch.dtype, ...]
    nets: tuple[models.Net, ...]
    rounds: int
    candidates: int
    draws: int


def sizes(place: Place) -> Sizes:
    """Those of the place; small and in float32 where the interpreter is, which has no bfloat16."""
    from bench.microscope import predict
    from memaop_triton.kernels.gpu import select

    if place.is_dry:
        return Sizes(
            shapes=((24, 32, 16),),
            small=(40, 16, 32),
            many_rows=(select.ONE_PROGRAM + 100, 2, 2),
            policies=("priority",),
            dtype=torch.float32,
            other_dtypes=(torch.float16,),
            nets=(models.mlp(16, 32, depth=1),),
            rounds=2,
            candidates=2,
            draws=12,
        )
    return Sizes(
        shapes=tuple(predict.SHAPES),
        small=(520, 72, 136),
        many_rows=(131072, 64, 128),
        policies=select.POLICIES,
        dtype=torch.bfloat16,
        other_dtypes=(torch.float16, torch.float32),
        nets=(
            models.mlp(4096, 16384),
            models.gpt_block(2048, 1024, 16),
            models.vit_block(1024, 128),
        ),
        rounds=25,
        candidates=8,
        draws=40,
    )
