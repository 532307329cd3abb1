"""The seeds of kernels follow from a generator's state, and no two are alike."""

import torch

from memaop_triton.kernels import draws


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_seeds_follow_from_the_generator():
    source, again = generator(1), generator(1)
    cpu = torch.device("cpu")

    seeds = [draws.draw_seed(cpu, source) for _ in range(20)]

    assert seeds == [draws.draw_seed(cpu, again) for _ in range(20)]
    assert len(set(seeds)) == 20
    assert all(1 << 62 <= seed < 1 << 63 for seed in seeds)


def test_a_gpus_seeds_differ_by_its_generators_seed_and_offset():
    seeds = {draws._mixed(seed, count) for seed in (0, 1, 42, (1 << 64) - 1) for count in range(99)}

    assert len(seeds) == 4 * 99
    assert all(1 << 62 <= seed < 1 << 63 for seed in seeds)
