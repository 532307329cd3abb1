"""A net in Lightning's Trainer, with converted layers by one added line.

python examples/lightning_trainer.py --steps 200
"""

import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from side_by_side import arguments, images, show
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from memaop_triton import MemAOPConfig
from memaop_triton.integrations.lightning import MemAOPCallback

args = arguments(__doc__, steps=100)
data = images()
examples = TensorDataset(data.x_train, data.y_train)


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        pixels = data.x_train.shape[1]
        self.net = nn.Sequential(
            nn.Linear(pixels, 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Linear(1024, 10),
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Losses(pl.Callback):
    """Keeps the loss and the seconds of every step."""

    def __init__(self):
        self.losses, self.seconds = [], []

    def on_train_batch_start(self, *_):
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.seconds.append(time.perf_counter() - self.start)
        self.losses.append(outputs["loss"].item())


def train(path, *callbacks):
    pl.seed_everything(0, verbose=False)
    losses = Losses()
    trainer = pl.Trainer(
        max_steps=args.steps, accelerator="cpu", callbacks=[*callbacks, losses], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(examples, batch_size=512, shuffle=True, drop_last=True))
    trainer.save_checkpoint(path)
    return (losses.losses, losses.seconds), torch.load(path, weights_only=True)


with tempfile.TemporaryDirectory() as folder:
    dense, saved = train(Path(folder) / "dense.ckpt")
    # The one line is the callback; without an argument the library decides.
    ours, our_saved = train(Path(folder) / "ours.ckpt", MemAOPCallback(MemAOPConfig(ratio=1 / 8)))
show({"dense": dense, "converted": ours})
print("added to the checkpoint:", *(our_saved.keys() - saved.keys()))
