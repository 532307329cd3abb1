"""A small residual network: what `convert_` takes of it, what it leaves, and what that is worth.

python examples/fashion_conv.py --steps 100
"""

import copy
import warnings

import torch
from side_by_side import arguments, images, one_by_one, rows_of_step, show
from torch import nn
from torch.nn import functional as F

from memaop_triton import LowCoverageWarning, convert_, coverage, model_report

BATCH = 64


class Residual(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.short = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.short(x))


def training(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(number):
        rows = rows_of_step(number, len(x_train), BATCH)
        loss = F.cross_entropy(model(x_train[rows]), data.y_train[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


args = arguments(__doc__, steps=60)
data = images()
side = round(data.x_train.shape[1] ** 0.5)
x_train = data.x_train.view(-1, 1, side, side)

dense = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    Residual(16, 32, stride=2),
    Residual(32, 64, stride=2),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(64, 10),
)
with warnings.catch_warnings():
    # The table below says it in full.
    warnings.simplefilter("ignore", LowCoverageWarning)
    ours = convert_(copy.deepcopy(dense))  # the one line
print(coverage(ours, x_train[:BATCH]))
show(one_by_one(args.steps, dense=training(dense), converted=training(ours)))
print(model_report(ours))
