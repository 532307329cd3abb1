"""The Python of README and of the documentation runs as it stands.

The blocks of a page run one after the other, as a reader would type them. `model`, `batch`,
`optimizer` and `path` are there from the start; before a block that converts a model, what an
earlier one has converted is reverted. A block that cannot run here says what it needs in the title
of its fence: ```python title="Needs a GPU".
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from memaop_triton import MemAOPLayer, revert_

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
LONG = {"watching.md", "integrations.md"}
NEEDS = re.compile(r' title="Needs \w[^"]+"')


def fences_of(page):
    return list(FENCE.finditer(page.read_text(encoding="utf-8")))


def blocks_of(page):
    """The code of those that run here."""
    return [fence["code"] for fence in fences_of(page) if not fence["options"]]


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


def of_trainers(folder):
    """What a user of transformers or Lightning has at hand, tiny."""
    reason = "an optional extra that is not installed"
    transformers = pytest.importorskip("transformers", reason=reason)
    lightning = pytest.importorskip("lightning.pytorch", reason=reason)
    pytest.importorskip("accelerate", reason=reason)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    ids = torch.randint(50, (8, 8))

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(16, 16)

        def training_step(self, batch, _):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return {
        "gpt2": transformers.GPT2LMHeadModel(config),
        "arguments": transformers.TrainingArguments(
            str(folder / "trainer"), max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True
        ),
        "texts": [{"input_ids": one, "labels": one} for one in ids],
        "module": Module(),
        "loader": torch.utils.data.DataLoader(torch.randn(8, 16), batch_size=4),
    }


def is_converted(model):
    return any(isinstance(module, MemAOPLayer) for module in model.modules())


# Layers this small may stay dense.
@pytest.mark.filterwarnings("ignore:nothing is converted:UserWarning")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, Leaf:FutureWarning")  # Lightning's
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")  # of its loader
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.filterwarnings("ignore:.*ensorboard.*:UserWarning")  # which it would log to
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in LONG else [], id=page.name)
        for page in PAGES
        if blocks_of(page)
    ],
)
def test_every_block_of_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Net()
    names = {
        "torch": torch,
        "nn": nn,
        "model": model,
        "batch": torch.randn(512, 256),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "path": tmp_path / "checkpoint.pt",
        "folder": tmp_path / "checkpoint",
    }
    if page.name == "memory.md":
        peft = pytest.importorskip("peft", reason="an optional extra that is not installed")
        adapters = peft.LoraConfig(r=2, target_modules=["up"])
        names["peft_model"] = peft.get_peft_model(Net(), adapters)
    if page.name == "integrations.md":
        names |= of_trainers(tmp_path)
    for block in blocks_of(page):
        if re.search(r"\bconvert_\(\s*model", block) and is_converted(names["model"]):
            revert_(names["model"])
        exec(compile(block, page.name, "exec"), names)


def test_blocks_that_do_not_run_say_what_they_need():
    for page in PAGES:
        fences = fences_of(page)
        assert len(fences) == page.read_text(encoding="utf-8").count("\n```python"), page
        for fence in fences:
            assert not fence["options"] or NEEDS.fullmatch(fence["options"]), fence[0]


def test_pages_that_show_python_are_found():
    assert {page.name for page in PAGES if blocks_of(page)} >= {
        "README.md",
        "index.md",
        "memory.md",
        "paper.md",
        "settings.md",
        "watching.md",
    }
