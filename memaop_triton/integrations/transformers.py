"""`transformers.Trainer` with converted layers: `MemAOPCallback`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from memaop_triton import MemAOPConfig, load_memory_state_dict, memory_state_dict
from memaop_triton.integrations.conversion import Conversion, attach, figures, start_empty
from memaop_triton.nn.layer_choice import converted_layers


class MemAOPCallback(transformers.TrainerCallback):
    """Converts the model of a `Trainer`, saves what the layers remember, and logs what they do.

    ::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[MemAOPCallback()])
        trainer.train()

    *Conversion* happens when training begins, in place: Parameters stay, so an optimizer of before
    is as good as one of later, and so are wrappers. *Row memories* follow the learning rate of the
    optimizer, and the scale of a `GradScaler`.

    *Checkpoints* get one more file for each process, `memaop_memory.safetensors` or, of several
    processes, `memaop_memory_<rank>.safetensors`. The Trainer's own files are what they are for a
    dense model, and load where this package is not installed.
    `trainer.train(resume_from_checkpoint=...)` continues from memories and decisions too, bit for
    bit if the decisions are fixed (a given ratio, or after `auto_freeze`). Where
    `save_only_model=True` or a hyperparameter search keeps the Trainer from resuming, nothing is
    added.

    *Logs* get the entries that `memaop_triton.integrations.conversion.figures` lists:
    `memaop/coverage`, `memaop/sampled_share`, and with `ratio="auto"` what was decided. They are in
    `trainer.state.log_history` and in what callbacks behind this one get. Reporters named by
    `report_to` come before all others; to send them the entries, pass them as callbacks behind this
    one: `report_to="none", callbacks=[MemAOPCallback(), TensorBoardCallback()]`.

    Args:
        config: As for `convert_`.
        resume_from_checkpoint: The folder that `train` resumes from, because a Trainer does not
            tell its callbacks. Needed only if it is not `checkpoint-<step>` in `output_dir`. What
            belongs to other weights is never loaded.
        arguments: Other arguments of `convert_`, such as `overrides` or `targets`.

    Raises:
        TypeError: `convert_` has no such argument.
    """

    def __init__(
        self,
        config: MemAOPConfig | None = None,
        *,
        resume_from_checkpoint: str | Path | None = None,
        **arguments: Any,
    ) -> None:
        self._conversion = Conversion(config, arguments)
        self._folder = resume_from_checkpoint

    def on_train_begin(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **objects: Any,
    ) -> None:
        """Convert the model, tie its memories to the optimizer, and load what was saved.

        Raises:
            RuntimeError: One process trains on several GPUs.
        """
        if args.n_gpu > 1:
            raise RuntimeError(
                "one process with several GPUs trains copies of the model by nn.DataParallel, in "
                "which converted layers do not work: start a process for each GPU, by torchrun or "
                "accelerate launch, or show this one a single GPU by CUDA_VISIBLE_DEVICES."
            )
        model, optimizer = objects["model"], objects["optimizer"]
        self._conversion.apply_(model)
        # A scaler belongs to the wrapper that Accelerate puts around the optimizer.
        attach(model, optimizer, getattr(optimizer, "scaler", None))
        if state.global_step > 0:
            self._resume(args, state, model)

    def on_save(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **objects: Any,
    ) -> None:
        """Write this process's memories and decisions beside the checkpoint of this step."""
        model: nn.Module = objects["model"]
        memories = memory_state_dict(model)
        if args.save_only_model or state.is_hyper_param_search or not memories:
            return
        path = _checkpoint_of(args, state) / _file_name(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, memories, world_size=str(args.world_size), weights=_digest(model))

    def on_log(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **objects: Any,
    ) -> None:
        """Add what is known about the gradients to the losses of training steps."""
        logs: dict[str, float] = objects["logs"]
        if "loss" in logs:
            found = figures(objects["model"])
            logs.update(found)
            state.log_history[-1].update(found)

    def _resume(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        model: nn.Module,
    ) -> None:
        if not memory_state_dict(model):
            return
        named = [self._folder, args.resume_from_checkpoint, _checkpoint_of(args, state)]
        folders = [Path(folder) for folder in named if isinstance(folder, str | Path)]
        digest = _digest(model)
        for path in (folder / _file_name(args) for folder in folders):
            if not path.is_file():
                continue
            memories, facts = _read(path)
            if facts["weights"] != digest:
                continue
            if facts["world_size"] == str(args.world_size):
                load_memory_state_dict(model, memories)
            else:
                world = f"{facts['world_size']} processes saved the memories"
                start_empty(model, f"{world} and {args.world_size} load them")
            return
        places = ", ".join(map(str, dict.fromkeys(folders)))
        start_empty(
            model,
            f"no {_file_name(args)} of the weights of step {state.global_step} is in {places} "
            "(MemAOPCallback(resume_from_checkpoint=...) names another folder)",
        )


def _checkpoint_of(args: transformers.TrainingArguments, state: transformers.TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _file_name(args: transformers.TrainingArguments) -> str:
    rank = "" if args.world_size == 1 else f"_{args.process_index}"
    return f"memaop_memory{rank}.safetensors"


def _write(path: Path, memories: Mapping[str, Mapping[str, Any]], **facts: str) -> None:
    """Tensors as such, and everything else as JSON in the head of the file."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for layer, state in memories.items():
        found = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        tensors |= {f"{layer}.{name}": value.contiguous() for name, value in found.items()}
        plain[layer] = {name: value for name, value in state.items() if name not in found}
    # A training that is killed meanwhile leaves no file, and not a part of one.
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"memories": json.dumps(plain), **facts})
    partial.replace(path)


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What `_write` wrote: memories, and facts by name."""
    with safe_open(path, "pt") as file:
        facts: dict[str, str] = file.metadata()
        memories: dict[str, dict[str, Any]] = json.loads(facts.pop("memories"))
        for key in file.keys():  # noqa: SIM118 - the file is no dictionary
            layer, _, name = key.rpartition(".")
            memories[layer][name] = file.get_tensor(key)
    return memories, facts


def _digest(model: nn.Module) -> str:
    """Tells the weights of one step of one training from all others, by one layer's.

    Of what this process has of them, where they are divided.
    """
    for _, layer in converted_layers(model):
        weight = layer.weight_parameter
        if weight is None or not weight.requires_grad:
            continue
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        # It may be no row of this one.
        if local.numel():
            numbers = local.detach().cpu().contiguous().flatten().view(torch.uint8)
            return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()
    return ""
