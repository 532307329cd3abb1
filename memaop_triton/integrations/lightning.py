"""Lightning's `Trainer` with converted layers: `MemAOPCallback`.

Works with `lightning` and with `pytorch_lightning`: with the one that was imported before, which is
the one whose Trainer is used, else with the first that is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from memaop_triton import MemAOPConfig
from memaop_triton.integrations.conversion import (
    Conversion,
    attach,
    figures,
    gather_state,
    is_converted,
    load_gathered_state,
    own_part,
    start_empty,
)

_NAMES = ("lightning.pytorch", "pytorch_lightning")
#: Where a checkpoint has what the callback adds.
_KEY = "memaop_triton"


def _lightning() -> Any:
    """The package whose Trainer is used."""
    installed = [n for n in _NAMES if importlib.util.find_spec(n.partition(".")[0]) is not None]
    imported = [name for name in installed if name in sys.modules]
    return importlib.import_module([*imported, *installed, *_NAMES][0])


class MemAOPCallback(_lightning().Callback):  # type: ignore[misc]
    """Converts the `LightningModule`, saves what its layers remember, and logs what they do.

    ::

        trainer = Trainer(callbacks=[MemAOPCallback()])
        trainer.fit(module, loader)

    *Conversion* happens when fitting starts, in place: Parameters stay, so optimizers and wrappers
    are as good as for a dense model. *Row memories* follow the learning rates of the optimizers,
    and the scale of a `GradScaler`.

    *Checkpoints* get one more entry, `memaop_triton`: memories and decisions of every process, and
    the states of PyTorch's generators, which Lightning does not save. Everything else in them is
    what it is for a dense model, and loads where this package is not installed.
    `trainer.fit(..., ckpt_path=...)` continues from there, bit for bit if the decisions are fixed
    (a given ratio, or after `auto_freeze`) and the data continue where they were: at the end of an
    epoch, or with loaders that have a state. With `save_weights_only=True` nothing is added.

    *Logs* get the entries that `memaop_triton.integrations.conversion.figures` lists, every
    `log_every_n_steps` steps: `memaop/coverage`, `memaop/sampled_share`, and with `ratio="auto"`
    what was decided.

    Args:
        config: As for `convert_`.
        arguments: Other arguments of `convert_`, such as `overrides` or `targets`.

    Raises:
        TypeError: `convert_` has no such argument.
    """

    def __init__(self, config: MemAOPConfig | None = None, **arguments: Any) -> None:
        super().__init__()
        self._conversion = Conversion(config, arguments)
        self._saved: Mapping[str, Any] | None = None
        self._is_resuming = False
        self._logged_step = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Convert the model."""
        self._conversion.apply_(pl_module)
        self._restore_generators(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Tie the memories to the optimizers, and load what a checkpoint had.

        Not before: some strategies read a checkpoint after the start of fitting.
        """
        attach(pl_module, trainer.optimizers, getattr(trainer.precision_plugin, "scaler", None))
        saved, self._saved = self._saved, None
        is_resuming, self._is_resuming = self._is_resuming, False
        self._logged_step = trainer.global_step
        if saved is not None:
            load_gathered_state(pl_module, saved)
        elif is_resuming:
            start_empty(pl_module, f"the checkpoint has no entry {_KEY!r}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """Log what is known about the gradients."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if step == self._logged_step or not every or step % every:
            return
        self._logged_step = step
        found = figures(pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(found, step=step - 1)  # Lightning's first step is 0

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add memories, decisions and generators of all processes to a checkpoint."""
        if is_converted(pl_module):
            checkpoint[_KEY] = gather_state(pl_module, generators=_generators(pl_module))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep what was saved until training starts."""
        if trainer.state.fn == "fit":
            self._saved, self._is_resuming = checkpoint.get(_KEY), True
            self._restore_generators(pl_module)

    def _restore_generators(self, pl_module: nn.Module) -> None:
        """Before Lightning makes the iterator of the data, which draws their order.

        It does so after both the start of fitting and the reading of a checkpoint, which come in
        either order.
        """
        own = None if self._saved is None else own_part(self._saved)
        if own is not None:
            _set_generators(pl_module, own["generators"])


def _generators(model: nn.Module) -> dict[str, torch.Tensor]:
    """States of the generator of the CPU and of that of the model's device."""
    states = {"cpu": torch.get_rng_state()}
    device = _device(model)
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set_generators(model: nn.Module, states: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    device = _device(model)
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type].cpu(), device)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
