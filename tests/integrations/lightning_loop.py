"""A small net in Lightning's `Trainer`, with converted layers."""

import os
import signal

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from memaop_triton import MemAOPConfig, Rows, memory_state_dict
from memaop_triton.integrations.lightning import MemAOPCallback

BATCHES = 5
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
CONFIG = MemAOPConfig(ratio=1 / 4, selection="topk", memory=Rows(signed=True))


class Net(pl.LightningModule):
    """Has dropout, whose draws come from the same generator as those of the layers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        torch.rand(())  # as whatever else draws between a checkpoint's reading and the first step
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Killed(pl.Callback):
    """Ends the process at a step, without any warning."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *others):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def loader(shuffle=True):
    draws = torch.Generator().manual_seed(5)
    x = torch.randn(16 * PROCESSES * BATCHES, 12, generator=draws)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16, shuffle=shuffle)


def trainer(folder, steps, callback=None, callbacks=(), **settings):
    """One that saves a checkpoint at the end of the epoch that ends half-way."""
    epochs = max(1, steps // (2 * BATCHES))
    saving = pl.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_epochs=epochs, save_top_k=-1
    )
    return pl.Trainer(
        # Not max_steps: Lightning would take a checkpoint of an epoch's end for one of its middle.
        max_epochs=steps // BATCHES,
        accelerator="cpu",
        devices=PROCESSES,
        strategy="ddp" if PROCESSES > 1 else "auto",
        callbacks=[callback or MemAOPCallback(CONFIG), saving, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **({"logger": False} | settings),
    )


def train(folder, steps, resume_at=None, kill_at=None):
    """Train, from the checkpoint of a step if one is given, and return what came of it."""
    torch.manual_seed(0 if resume_at is None else 50)
    killed = [] if kill_at is None else [Killed(kill_at)]
    run, net = trainer(folder, steps, callbacks=killed), Net()
    run.fit(net, loader(), ckpt_path=resume_at and folder / f"step={resume_at}.ckpt")
    return {
        "model": net.state_dict(),
        "optimizer": run.optimizers[0].state_dict(),
        "memories": memory_state_dict(net),
        "draws": torch.get_rng_state(),
    }
