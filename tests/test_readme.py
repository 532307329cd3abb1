"""README's Python runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPLinear, revert_

README = Path(__file__).resolve().parent.parent / "README.md"


# Layers this small may stay dense.
@pytest.mark.filterwarnings("ignore:nothing is converted:UserWarning")
def test_every_block_of_python_runs(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(256, 256)})}) for _ in range(2)
            )
            self.head = nn.Linear(256, 8)

        def forward(self, x):
            for block in self.blocks:
                x = block["mlp"]["up"](x)
            return self.head(x)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {
        "model": model,
        "batch": torch.randn(512, 256),
        "optimizer": optimizer,
        "path": tmp_path / "checkpoint.pt",
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, names)
        if any(isinstance(module, MemAOPLinear) for module in model.modules()):
            revert_(model)
