"""An MLP, with the weight gradients of its layers computed from one row of a batch in eight.

python examples/mlp.py --steps 500
"""

import copy

import torch
from side_by_side import arguments, images, rows_of_step, show, take_turns
from torch import nn
from torch.nn import functional as F

from memaop_triton import MemAOPConfig, convert_

BATCH = 512

args = arguments(__doc__, steps=200)
data = images()
pixels = data.x_train.shape[1]

dense = nn.Sequential(
    nn.Linear(pixels, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
)
# The one line. The output layer has ten columns, too few to be worth it: it stays as it is.
ours = convert_(copy.deepcopy(dense), MemAOPConfig(ratio=1 / 8), overrides={"4": None})


def training(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(number):
        rows = rows_of_step(number, len(data.x_train), BATCH)
        loss = F.cross_entropy(model(data.x_train[rows]), data.y_train[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def accuracy(model):
    with torch.no_grad():
        right = model.eval()(data.x_test).argmax(1) == data.y_test
    return f"{right.float().mean():.2%}"


found = take_turns(args.steps, dense=training(dense), converted=training(ours))
show(found, accuracy=[accuracy(dense), accuracy(ours)])
