"""Trains, is killed after a checkpoint, and goes on from it in another process.

Run as a script, by itself or by torchrun: `killed_worker.py {killed,resumed} LOOP FOLDER [NAME]`.

killed    Trains 200 steps of the module LOOP, which saves half-way, and is killed at the 130th.
resumed   Goes on from the checkpoint, and fails unless it ends as a training of 200 steps does that
          nothing interrupted, to the bit.
"""

import importlib
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.resume_worker import differences

STEPS, SAVED_AT, KILLED_AT = 200, 100, 130


def main(mode, loop, folder, *name):
    torch.set_num_threads(1)
    # What others say about themselves is looked at in the tests of shorter trainings.
    warnings.simplefilter("ignore")
    train = importlib.import_module(f"tests.integrations.{loop}").train
    if mode == "killed":
        train(folder / "run", STEPS, *name, kill_at=KILLED_AT)
    outcome = train(folder / "run", STEPS, *name, resume_at=SAVED_AT)
    whole = train(folder / "whole", STEPS, *name)
    assert differences(whole, outcome) == []
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3], Path(sys.argv[3]), *sys.argv[4:])
