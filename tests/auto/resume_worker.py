"""Trains a net whose layers are decided about, and goes on from its checkpoint in another process.

Run as a script: `resume_worker.py {killed,resumed} FOLDER`.

killed    Trains until something is decided, freezes that, saves a checkpoint, trains on, saves how
          it ends, and is killed.
resumed   Goes on from the checkpoint, and fails unless it ends the same to the bit.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from memaop_triton import MemAOPConfig, auto_freeze, load_memory_state_dict, memory_state_dict
from memaop_triton.distributed.checkpoint import load_memory, memory_entries
from tests.auto.conftest import Training
from tests.distributed.resume_worker import differences

DECIDED, MORE = 60, 12
CASES = {
    "no memory": MemAOPConfig(ratio="auto", memory="none"),
    "subspace": MemAOPConfig(ratio="auto"),
    "subspace, dcp": MemAOPConfig(ratio="auto"),
}
FAST = {1 / 2: 0.6, 1 / 4: 0.35, 1 / 8: 0.2, 1 / 16: 0.15}


class Patches:
    """What `Training` replaces stays replaced: this process does nothing else."""

    def setattr(self, *target):
        setattr(*target)


def training(config):
    return Training(Patches(), rows=512, noise=0.0, true=lambda r: FAST.get(r, 1.0), config=config)


def state(run):
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "draws": torch.get_rng_state(),
    }


def killed(name, config, folder):
    run = training(config)
    run.step(DECIDED)
    assert run.controller.phase == "sampling", name
    auto_freeze(run.model)
    run.step(3)
    if name.endswith("dcp"):
        dcp.save(state(run) | memory_entries(run.model), checkpoint_id=folder / name)
    else:
        torch.save(state(run) | {"memory": memory_state_dict(run.model)}, folder / name)
    run.step(MORE)
    torch.save([state(run), memory_state_dict(run.model)], folder / f"{name}, end")


def resumed(name, config, folder):
    run = training(config)
    run.step(2)  # other weights and draws
    if name.endswith("dcp"):
        saved = state(run)
        dcp.load(saved, checkpoint_id=folder / name)
        load_memory(run.model, folder / name)
    else:
        saved = torch.load(folder / name, weights_only=True)
        load_memory_state_dict(run.model, saved["memory"])
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["draws"])
    del run.modes[:]
    run.step(MORE)
    assert all(run.modes), name
    whole = torch.load(folder / f"{name}, end", weights_only=True)
    found = differences(whole, [state(run), memory_state_dict(run.model)])
    assert found == [], (name, found)


def main(mode, folder):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"torch\.")
    for name, config in CASES.items():
        {"killed": killed, "resumed": resumed}[mode](name, config, folder)
    if mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
