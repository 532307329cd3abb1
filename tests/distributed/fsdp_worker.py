"""Run by `test_fsdp.py` in two processes."""

import functools

import checks
import fsdp_checks
from torch.distributed.device_mesh import init_device_mesh


@functools.cache
def mesh():
    return init_device_mesh("cpu", (2,))


def on_one_dimension(check):
    @functools.wraps(check)
    def run():
        check(mesh())

    return run


if __name__ == "__main__":
    checks.run(
        *map(
            on_one_dimension,
            (
                fsdp_checks.gradients_are_the_means_of_single_processes,
                fsdp_checks.mixed_precision_computes_in_the_parameters_dtype,
                fsdp_checks.memories_are_saved_and_continue,
                fsdp_checks.revert_gives_the_dense_model_back,
            ),
        )
    )
