"""A loop of Accelerate, whose checkpoints also hold what converted layers remember.

python examples/accelerate_loop.py --steps 100
"""

import copy
import tempfile

import torch
from accelerate import Accelerator
from side_by_side import arguments, images, rows_of_step, show, take_turns
from torch import nn
from torch.nn import functional as F

from memaop_triton import MemAOPConfig, attach_optimizer, convert_
from memaop_triton.integrations.accelerate import MemAOPState

BATCH = 512

args = arguments(__doc__, steps=100)
data = images()
pixels = data.x_train.shape[1]
accelerator = Accelerator()

dense = nn.Sequential(
    nn.Linear(pixels, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
)
ours = convert_(copy.deepcopy(dense), MemAOPConfig(ratio=1 / 8), overrides={"4": None})


def training(model):
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    if model is not dense:
        # Two lines more than for a dense model.
        attach_optimizer(model, optimizer, accelerator.scaler)
        accelerator.register_for_checkpointing(MemAOPState(model))

    def step(number):
        rows = rows_of_step(number, len(data.x_train), BATCH)
        x, y = data.x_train[rows].to(accelerator.device), data.y_train[rows].to(accelerator.device)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        return loss.detach()

    return step


step_of_dense, step_of_ours = training(dense), training(ours)
show(take_turns(args.steps, dense=step_of_dense, converted=step_of_ours))

with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    first = [step_of_ours(args.steps + i).item() for i in range(5)]
    accelerator.load_state(folder)
    again = [step_of_ours(args.steps + i).item() for i in range(5)]
print("five steps after the checkpoint, and again from it:", "equal" if first == again else "not")
