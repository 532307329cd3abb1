"""Selections and memories that go together, as keyword arguments of a configuration."""

import dataclasses

from memaop_triton.config import SELECTIONS, UNBIASED_SELECTIONS, MemAOPConfig
from memaop_triton.config.parts import MEMORIES, ROW_MEMORIES, Projected, Rows, Subspace

UNBIASED = [{"selection": name} for name in UNBIASED_SELECTIONS]
PAPER = [{"selection": name} for name in SELECTIONS if name not in UNBIASED_SELECTIONS]
LEGAL = [scheme | {"memory": memory} for scheme in PAPER for memory in MEMORIES] + [
    scheme | {"memory": memory}
    for scheme in UNBIASED
    for memory in MEMORIES
    if memory not in ROW_MEMORIES
]


def label(scheme):
    return "-".join(map(str, scheme.values()))


def flat_config(**settings):
    """`MemAOPConfig` with the settings of its memory beside the others; others' are dropped."""
    of_memory = {n: settings.pop(n) for n in settings.keys() & {*_fields(Subspace), *_fields(Rows)}}
    if "grad_input_budget" in settings:
        settings["grad_input"] = Projected(settings.pop("grad_input_budget"))
    config = MemAOPConfig(**settings)
    if config.memory is None:
        return config
    own = {n: value for n, value in of_memory.items() if n in _fields(config.memory)}
    return dataclasses.replace(config, memory=dataclasses.replace(config.memory, **own))


def _fields(memory):
    return [field.name for field in dataclasses.fields(memory)]
