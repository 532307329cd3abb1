"""Selections and memories that go together, as keyword arguments of a configuration."""

from memaop_triton.config import MEMORIES, ROW_MEMORIES, SELECTIONS, UNBIASED_SELECTIONS

RANDK_RESCALED = {"selection": "randk", "rescale": True}
UNBIASED = [{"selection": name} for name in UNBIASED_SELECTIONS] + [RANDK_RESCALED]
PAPER = [{"selection": name} for name in SELECTIONS if name not in UNBIASED_SELECTIONS]
LEGAL = [scheme | {"memory": memory} for scheme in PAPER for memory in MEMORIES] + [
    scheme | {"memory": memory}
    for scheme in UNBIASED
    for memory in MEMORIES
    if memory not in ROW_MEMORIES
]


def label(scheme):
    return "-".join("rescale" if value is True else str(value) for value in scheme.values())
