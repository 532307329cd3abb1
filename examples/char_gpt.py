"""A GPT that learns characters. The library finds out which layers to sample, and says why.

python examples/char_gpt.py --steps 600
"""

import copy

import torch
from side_by_side import arguments, one_by_one, rows_of_step, show, text
from torch import nn
from torch.nn import functional as F

from memaop_triton import convert_, model_report

BATCH, CONTEXT, WIDTH, HEADS, DEPTH = 16, 128, 256, 4, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    def __init__(self, characters):
        super().__init__()
        self.characters = nn.Embedding(characters, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters))

    def forward(self, ids):
        return self.head(self.blocks(self.characters(ids) + self.positions))


def training(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(number):
        starts = rows_of_step(number, len(ids) - CONTEXT - 1, BATCH)
        batch = ids[starts[:, None] + torch.arange(CONTEXT + 1)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


args = arguments(__doc__, steps=150)
corpus = text()
alphabet = sorted(set(corpus))
number_of = {character: i for i, character in enumerate(alphabet)}
ids = torch.tensor([number_of[character] for character in corpus])

dense = Gpt(len(alphabet))
ours = convert_(copy.deepcopy(dense))  # the one line; ratio="auto" is the default
show(one_by_one(args.steps, dense=training(dense), converted=training(ours)))
print(model_report(ours))
