"""Tiny models of transformers in a `Trainer`, with converted layers."""

import os
import signal

import torch
import transformers

from memaop_triton import MemAOPConfig, Rows, Subspace, load_memory_state_dict, memory_state_dict
from memaop_triton.integrations.transformers import MemAOPCallback

VOCABULARY, TOKENS, PIXELS = 40, 12, 16
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SUBSPACE = Subspace(rank=4, refresh_every=3)
CONFIGS = {
    "gpt2": MemAOPConfig(ratio=1 / 4, memory=SUBSPACE),
    # The learning rate falls, which row memories follow.
    "vit": MemAOPConfig(ratio=1 / 4, selection="topk", memory=Rows(signed=True)),
    "decided": MemAOPConfig(ratio="auto", memory=SUBSPACE),
}
SHARE = 1 / 4  # K/M of half of the layers of "decided"
WORTH = {"seconds": 0.5, "speedup": 1.25, "noise": 0.1, "progress": 1.14}


def build(name):
    """A model with dropout, whose draws come from the same generator as those of the layers."""
    if name == "vit":
        shape = {"image_size": PIXELS, "patch_size": 4, "num_channels": 1}
        dropout = {"hidden_dropout_prob": 0.1}
        config = transformers.ViTConfig(**SIZES, intermediate_size=48, **shape, **dropout)
        return transformers.ViTForImageClassification(config)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    sizes = {"n_layer": 2, "n_embd": 24, "n_head": 2, "n_positions": TOKENS}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **ids)
    )


def examples(name, count=44):
    """Not a whole number of batches, and fewer than the steps."""
    draws = torch.Generator().manual_seed(5)
    if name == "vit":
        images = torch.randn(count, 1, PIXELS, PIXELS, generator=draws)
        return [{"pixel_values": x, "labels": int(x[0, 0, 0] > 0)} for x in images]
    texts = torch.randint(3, VOCABULARY, (count, TOKENS), generator=draws)
    return [{"input_ids": ids, "labels": ids} for ids in texts]


class Decided(transformers.TrainerCallback):
    """As if every second layer had been found worth sampling, and the decision been frozen."""

    def on_train_begin(self, args, state, control, model, **others):
        if state.global_step == 0:
            saved = memory_state_dict(model)
            decisions = saved["ratio=auto 0"]
            names = list(decisions["shares"])
            decisions["shares"] |= dict.fromkeys(names[::2], SHARE)
            decisions |= {"phase": "frozen", "predicted": list(WORTH.values()), "realised": 1.12}
            load_memory_state_dict(model, saved)


class Killed(transformers.TrainerCallback):
    """Ends the process at a step, without any warning."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **others):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(folder, steps, name="gpt2", callbacks=(), callback=None, model=None, **settings):
    """One that trains `build(name)` with converted layers, saves, and logs."""
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        **({"learning_rate": 1e-2, "save_steps": steps // 2, "logging_steps": 5} | settings),
    )
    transformers.set_seed(7)
    # Row memories are not for a convolution, here that of the patches.
    targets = {"targets": "linear"} if name == "vit" else {}
    callback = callback or MemAOPCallback(CONFIGS[name], **targets)
    decided = [Decided()] if name == "decided" else []
    return transformers.Trainer(
        model or build(name),
        arguments,
        train_dataset=examples(name),
        callbacks=[callback, *decided, *callbacks],
    )


def train(folder, steps, name="gpt2", resume_at=None, kill_at=None):
    """Train, from the checkpoint of a step if one is given, and return what came of it."""
    killed = [] if kill_at is None else [Killed(kill_at)]
    checkpoint = None if resume_at is None else str(folder / f"checkpoint-{resume_at}")
    model = None
    if checkpoint and name == "vit":
        # A ViT is saved under older names, which `from_pretrained` translates; a Trainer of
        # transformers 5.24 does not when it resumes, also with a dense model.
        model = transformers.ViTForImageClassification.from_pretrained(checkpoint)
    run = trainer(folder, steps, name, killed, model=model)
    run.train(checkpoint)
    return outcome(run)


def outcome(run):
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "memories": memory_state_dict(run.model),
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "draws": torch.get_rng_state(),
    }
