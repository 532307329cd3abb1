"""Fine-tuning a BERT, where sampled weight gradients lose least: half of the rows, or fewer.

Uses the pretrained MiniLM and 20 Newsgroups of the data folder, or else a small BERT with random
weights, and texts that are made here.

MEMAOP_TRITON_DATA_DIR=... python examples/finetune_bert.py --steps 170
"""

import copy
from types import SimpleNamespace

import torch
from side_by_side import arguments, data_folder, rows_of_step, show, take_turns
from torch.nn import functional as F

from memaop_triton import MemAOPConfig, convert_, coverage
from memaop_triton.experiments.bert import MiniLm
from memaop_triton.experiments.posts import load_texts

BATCH, TOKENS, TESTED = 32, 64, 300


def generated(vocabulary=200, classes=4, count=512):
    """Texts in which one word in eight belongs to the class, whose first words these are."""
    y = torch.randint(classes, (count,))
    x = torch.randint(classes + 1, vocabulary, (count, TOKENS))
    x[:, 8::8] = 1 + y[:, None]
    return SimpleNamespace(x_train=x, y_train=y, x_test=x, y_test=y)


args = arguments(__doc__, steps=20)
folder = data_folder()
if folder:
    data = load_texts("newsgroups20", folder, TOKENS)
    dense = MiniLm(folder, classes=int(data.y_train.max()) + 1).build()
else:
    data = generated()
    dense = MiniLm(width=64, depth=2, heads=4, classes=4, vocabulary=200).build_untrained()
# The one line: a quarter of the floating-point operations of the weight gradients.
ours = convert_(copy.deepcopy(dense), MemAOPConfig(budget=1 / 4))


def training(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4 if folder else 1e-3)
    # The learning rate falls to zero, and the sampling noise with it.
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)

    def step(number):
        rows = rows_of_step(number, len(data.x_train), BATCH)
        loss = F.cross_entropy(model(data.x_train[rows]), data.y_train[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        return loss.detach()

    return step


def accuracy(model):
    with torch.no_grad():
        tested = rows_of_step(0, len(data.x_test), TESTED)
        right = model.eval()(data.x_test[tested]).argmax(1) == data.y_test[tested]
    return f"{right.float().mean():.1%}"


found = take_turns(args.steps, dense=training(dense), converted=training(ours))
show(found, accuracy=[accuracy(dense), accuracy(ours)])
print(coverage(ours))
