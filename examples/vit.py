"""A ViT with a quarter of the rows, which `allocate_` gives to the layers that need them most.

python examples/vit.py --steps 300
"""

import copy

import torch
from side_by_side import arguments, images, rows_of_step, show, take_turns
from torch import nn
from torch.nn import functional as F

from memaop_triton import MemAOPConfig, allocate_, convert_, monitor

BATCH, WIDTH, HEADS, DEPTH = 64, 96, 4, 3
FIRST = 20  # steps after which rows are given to other layers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, WIDTH)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, patches, pixels):
        super().__init__()
        self.embed = nn.Linear(pixels, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(patches, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, patches):
        return self.head(self.blocks(self.embed(patches) + self.positions).mean(1))


def training(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(number):
        rows = rows_of_step(number, len(x_train), BATCH)
        loss = F.cross_entropy(model(x_train[rows]), data.y_train[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


args = arguments(__doc__, steps=100)
data = images()
side = round(data.x_train.shape[1] ** 0.5)
patch = 4 if side > 8 else 2
squares = data.x_train.view(-1, 1, side, side)
x_train = F.unfold(squares, patch, stride=patch).transpose(1, 2)  # [images, patches, pixels]

dense = Vit(*x_train.shape[1:])
ours = convert_(copy.deepcopy(dense), MemAOPConfig(ratio=1 / 4, memory=None))  # the one line
train_dense, train_ours = training(dense), training(ours)
first = min(FIRST, args.steps // 2)
with monitor(ours, every=1) as watched:
    for number in range(first):
        train_dense(number)
        train_ours(number)
    ratios = allocate_(ours, watched, budget=1 / 4)
for name, ratio in ratios.items():
    print(f"{name:16} K/M = {ratio:.3f}")
show(take_turns(args.steps - first, dense=train_dense, converted=train_ours))
