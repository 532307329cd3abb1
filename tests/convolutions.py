"""Convolutions that hypothesis draws, with their inputs, and what is checked of them."""

import itertools

import torch
from hypothesis import strategies as st
from torch import nn

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw, *, groups=(1, 2, 3), paddings=("zeros", "reflect", "replicate", "circular")):
    """A dense layer in float64 and inputs that it takes; a few hundred patches at most."""
    dims = draw(st.sampled_from((1, 2, 2, 3)))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    largest = {1: 5, 2: 4, 3: 3}[dims]
    kernel, stride, dilation = each(1, largest), each(1, 3), each(1, 2)
    spans = [gap * (taps - 1) + 1 for taps, gap in zip(kernel, dilation, strict=True)]
    mode = draw(st.sampled_from(paddings))
    padding = each(0, 2)
    if draw(st.integers(0, 4)) == 0:
        padding, stride = "same", (1,) * dims
    sizes = [span + draw(st.integers(2, 4)) for span in spans]
    parts = draw(st.sampled_from(groups))
    per_group = draw(st.integers(2 if parts > 1 else 1, 3)), draw(st.integers(1, 3))
    channels, outputs = (parts * count for count in per_group)
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    layer = CLASSES[dims](
        channels,
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        parts,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=torch.float64,
    )
    batch = draw(st.integers(1, 3))
    x = torch.randn(batch, channels, *sizes, dtype=torch.float64)
    if draw(st.booleans()):
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return layer, x


def patches_one_by_one(x, geometry):
    """[groups, M, N], every number picked by itself: tap after tap, channel after channel."""
    padded = torch.nn.functional.pad(
        x, [pad for pad in reversed(geometry.padding) for _ in range(2)]
    )
    positions = geometry.positions(tuple(x.shape[2:]))
    rows = []
    for sample in padded:
        for place in itertools.product(*map(range, positions)):
            row = []
            for tap in itertools.product(*map(range, geometry.kernel_size)):
                at = tuple(
                    here * stride + there * gap
                    for here, stride, there, gap in zip(
                        place, geometry.stride, tap, geometry.dilation, strict=True
                    )
                )
                row.append(sample[(slice(None), *at)].view(geometry.groups, -1))
            rows.append(torch.cat(row, 1))
    return torch.stack(rows, 1)


def gradients(layer, x, g=None):
    """Of weight, bias (if there is one) and input."""
    x = x.detach().requires_grad_()
    y = layer(x)
    g = torch.ones_like(y) if g is None else g
    return torch.autograd.grad(y, [*layer.parameters(), x], g)
