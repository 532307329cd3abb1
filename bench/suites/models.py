"""Networks whose training step is timed, and the step.

Sizes are chosen so that linear layers are most of the work, as in training at scale, and the rest
of a step (attention, activations, normalisation, optimizer) is still there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransformerBlock(nn.Module):
    """A pre-norm transformer block: attention, then an MLP four times as wide.

    Args:
        width: Of the residual stream.
        heads: Of the attention.
        causal: Whether a token sees only those before it (GPT) or all (ViT).
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


@dataclass(frozen=True)
class Net:
    """A network and its batch.

    Attributes:
        name: For titles.
        make: Builds the network.
        batch: Shape of its input.
        is_inner: Whether it stands inside a larger network, so that its input has a gradient.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: tuple[int, ...]
    is_inner: bool

    @property
    def rows(self) -> int:
        """M of its linear layers."""
        return int(torch.Size(self.batch[:-1]).numel())


def mlp(width: int, rows: int, depth: int = 3) -> Net:
    """`depth` hidden layers of `width` units, and ten outputs, on `width` inputs."""

    def make() -> nn.Module:
        hidden = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(width, 10))

    name = f"MLP {'-'.join([str(width)] * (depth + 1))}-10, batch {rows}"
    return Net(name, make, (rows, width), False)


def gpt_block(width: int, tokens: int, batch: int) -> Net:
    """One block of a GPT: `batch` sequences of `tokens` tokens, heads of 64 columns."""
    name = f"GPT block d={width}, {batch} × {tokens} tokens"
    return Net(name, lambda: _block(width, causal=True), (batch, tokens, width), True)


def vit_block(width: int, batch: int, tokens: int = 197) -> Net:
    """One block of a ViT: `batch` images of 196 patches and a class token, heads of 64 columns."""
    name = f"ViT block d={width}, {batch} images of {tokens} tokens"
    return Net(name, lambda: _block(width, causal=False), (batch, tokens, width), True)


def _block(width: int, *, causal: bool) -> nn.Module:
    return TransformerBlock(width, max(1, width // 64), causal=causal)


class TrainingStep:
    """One step of training: forward, a squared loss, backward, and AdamW.

    Args:
        net: What to train, on one random batch.
        model: Made by `net.make`, converted or not.
        device: Of both.
        dtype: Of both.
    """

    def __init__(self, net: Net, model: nn.Module, device: str, dtype: torch.dtype) -> None:
        self.model = model.to(device, dtype)
        self.x = torch.randn(net.batch, device=device, dtype=dtype, requires_grad=net.is_inner)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)

    def __call__(self) -> Tensor:
        """The loss."""
        self.optimizer.zero_grad()
        self.x.grad = None
        loss: Tensor = self.model(self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss
