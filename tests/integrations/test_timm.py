"""A ViT of timm."""

import pytest
import torch
from torch.nn import functional as F

from memaop_triton import MemAOPConfig, MemAOPLinear, convert_, coverage, revert_

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


@pytest.mark.parametrize("memory", ["none", "subspace", "signed"])
def test_a_vit_is_converted_and_trains(memory):
    model = vit()
    names, dense = list(model.state_dict()), type(model.blocks[0].mlp.fc1)
    convert_(model, MemAOPConfig(ratio=1 / 2, memory=memory))
    for block in model.blocks:
        layers = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
        assert all(isinstance(layer, MemAOPLinear) for layer in layers)
    assert coverage(model).share > 0.9
    assert list(model.state_dict()) == names
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert type(revert_(model).blocks[0].mlp.fc1) is dense
