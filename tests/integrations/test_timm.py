"""A ViT of timm."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memaop_triton import (
    MemAOPConfig,
    MemAOPLinear,
    attach_optimizer,
    convert_,
    coverage,
    revert_,
)

try:
    import timm
except (ImportError, RuntimeError, OSError) as error:
    # A torchvision for another build of torch fails with an error of its own.
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)


def vit():
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=4
    )


@pytest.mark.parametrize(
    "config",
    [
        MemAOPConfig(ratio=1 / 2),
        MemAOPConfig(ratio=1 / 2, memory=None),
        MemAOPConfig(ratio=1 / 2, stash="int4"),
        MemAOPConfig.paper(ratio=1 / 2),
    ],
    ids=lambda config: f"{config.memory_name}-{config.stash}",
)
def test_a_vit_is_converted_and_trains(config):
    model = vit()
    names = list(model.state_dict())
    # Row memories and stashes are not for a convolution, here that of the patches.
    is_for_linear = config.row_memory is not None or config.stash != "exact"
    convert_(model, config, **({"targets": "linear"} if is_for_linear else {}))
    for block in model.blocks:
        layers = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
        assert all(isinstance(layer, MemAOPLinear) for layer in layers)
    assert coverage(model).share > 0.9
    assert list(model.state_dict()) == names
    labels = torch.arange(16) % 4
    images = torch.randn(16, 3, 16, 16) + torch.randn(4, 3, 16, 16)[labels]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    attach_optimizer(model, optimizer)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert type(revert_(model).blocks[0].mlp.fc1) is nn.Linear
