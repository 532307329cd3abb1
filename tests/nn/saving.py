"""Models and batches of which what is saved is looked at."""

import torch

from memaop_triton.bench.suites.models import TransformerBlock
from memaop_triton.experiments.bert import MiniLm
from memaop_triton.nn.saved_operands import new_nodes, saved_by

ROWS, SIZE = 256, 128  # 128 KiB of float32


def block(*, causal, width=SIZE, **kwargs):
    torch.manual_seed(0)
    return TransformerBlock(width, 4, causal=causal).to(**kwargs)


def bert():
    torch.manual_seed(0)
    return MiniLm(width=SIZE, depth=2, heads=4, vocabulary=200, positions=64).build_untrained()


def rows(*shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (ROWS, SIZE), generator=generator).to(dtype)


def made(x):
    """As made by another part of a network, which does not keep it."""
    return x.requires_grad_() * 1


def tokens():
    batch = torch.randint(1, 200, (16, 48), generator=torch.Generator().manual_seed(1))
    batch[::2, 40:] = 0  # no token
    return batch


MODELS = {
    "GPT": lambda: (block(causal=True), lambda: made(rows(8, 64, SIZE))),
    "ViT": lambda: (block(causal=False), lambda: made(rows(8, 49, SIZE))),
    "BERT": lambda: (bert(), tokens),
}


def gradients(model, x):
    """Of all parameters, as one vector, for a random gradient of the output."""
    model.zero_grad()
    y = model(x)
    y.backward(rows(*y.shape, dtype=y.dtype, seed=2))
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def held_exactly(y):
    """The nodes and tensors behind `y` that are saved as they are."""
    return [(node.name(), saved) for node in new_nodes([y], set()) for saved in saved_by(node)]
