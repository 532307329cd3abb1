"""A GPT-2 in the Trainer of transformers, with converted layers by one added line.

Made from its configuration; nothing is downloaded.

python examples/hf_trainer.py --steps 60
"""

import tempfile
import time
from pathlib import Path

import torch
import transformers
from side_by_side import arguments, show, text

from memaop_triton import MemAOPConfig
from memaop_triton.integrations.transformers import MemAOPCallback

CONTEXT, BATCH = 64, 16

args = arguments(__doc__, steps=40)
corpus = text()
alphabet = sorted(set(corpus))
number_of = {character: i for i, character in enumerate(alphabet)}
ids = torch.tensor([number_of[character] for character in corpus[: 400 * CONTEXT]])
examples = [{"input_ids": part, "labels": part} for part in ids.split(CONTEXT)[:-1]]


class Clock(transformers.TrainerCallback):
    """Keeps the seconds of every step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start)


def train(folder, *callbacks):
    transformers.set_seed(0)
    sizes = {"n_positions": CONTEXT, "n_embd": 192, "n_layer": 2, "n_head": 4}
    tokens = {"vocab_size": len(alphabet), "bos_token_id": 0, "eos_token_id": 0}
    settings = {"max_steps": args.steps, "save_steps": args.steps, "logging_steps": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    clock = Clock()
    trainer = transformers.Trainer(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens)),
        transformers.TrainingArguments(
            folder, **settings, **quiet, per_device_train_batch_size=BATCH, learning_rate=1e-3
        ),
        train_dataset=examples,
        callbacks=[*callbacks, clock],
    )
    trainer.remove_callback(transformers.PrinterCallback)  # the table below has the losses
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    checkpoint = Path(folder) / f"checkpoint-{args.steps}"
    return (losses, clock.seconds), {
        path.name: path.stat().st_size for path in checkpoint.iterdir()
    }


with tempfile.TemporaryDirectory() as folder:
    dense, files = train(f"{folder}/dense")
    # The one line is the callback; without an argument the library decides.
    ours, our_files = train(f"{folder}/ours", MemAOPCallback(MemAOPConfig(ratio=1 / 4)))
show({"dense": dense, "converted": ours})
for name in our_files.keys() - files.keys():
    print(f"added to the checkpoint: {name}, {our_files[name]:,} bytes")
