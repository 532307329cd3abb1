"""Selections and memories that go together, as keyword arguments of a configuration."""

import dataclasses

from memaop_triton.config import (
    MEMORIES,
    ROW_MEMORIES,
    SELECTIONS,
    UNBIASED_SELECTIONS,
    MemAOPConfig,
    Projected,
)

UNBIASED = [{"selection": name} for name in UNBIASED_SELECTIONS]
PAPER = [{"selection": name} for name in SELECTIONS if name not in UNBIASED_SELECTIONS]
LEGAL = [scheme | {"memory": memory} for scheme in PAPER for memory in MEMORIES] + [
    scheme | {"memory": memory}
    for scheme in UNBIASED
    for memory in MEMORIES
    if memory not in ROW_MEMORIES
]
_OF_MEMORIES = {
    "subspace": ("rank", "side", "refresh_every"),
    "residual": ("decay", "dtype"),
    "signed": ("decay", "dtype"),
    "none": (),
}


def label(scheme):
    return "-".join(map(str, scheme.values()))


def flat_config(**settings):
    """`MemAOPConfig` with the settings of its memory beside the others; others' are dropped."""
    own = {name for names in _OF_MEMORIES.values() for name in names}
    of_memory = {name: settings.pop(name) for name in own & settings.keys()}
    if "grad_input_budget" in settings:
        settings["grad_input"] = Projected(settings.pop("grad_input_budget"))
    config = MemAOPConfig(**settings)
    if config.memory is None:
        return config
    changed = {n: v for n, v in of_memory.items() if n in _OF_MEMORIES[config.memory_name]}
    memory = dataclasses.replace(config.memory, **changed)
    return dataclasses.replace(config, memory=memory)
