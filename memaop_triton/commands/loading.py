"""The user's model, by its name on the command line, and inputs for it."""

from __future__ import annotations

import importlib
import inspect
import operator
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memaop_triton.errors import CommandError

INPUT_FORMAT = "[NAME=]SIZES[:DTYPE[:BOUND]]"
_INPUT = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d+(?:x\d+)*)(?::(?P<dtype>\w+)(?::(?P<bound>\d+))?)?"
)
_INTEGERS = ("int32", "int64")
_DTYPES = ("float16", "bfloat16", "float32", "float64", *_INTEGERS, "bool")


def parse_shape(option: str, text: str) -> tuple[int, int, int]:
    """`8192x1024x1024` as M, N, P.

    Raises:
        CommandError: The text has another form; the message names `option`.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise CommandError(f"{option}={text!r} is not MxNxP, for example 8192x1024x1024.")
    m, n, p = map(int, text.split("x"))
    return m, n, p


def make_inputs(
    texts: Iterable[str], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Random example inputs: a tuple, or a dictionary if they are named.

    Args:
        texts: `32x512x1024` (normal numbers), `32x512:int64:50257` (integers from 0 up to, and
            without, the bound), `mask=32x512:bool`.
        dtype: Of normal numbers whose text names none.
        device: Of all of them.

    Raises:
        CommandError: A text has another form, some are named and others are not, or a name comes
            twice.
    """
    inputs = [_make_input(text, dtype, device) for text in texts]
    names = [name for name, _ in inputs]
    if not any(names):
        return tuple(tensor for _, tensor in inputs)
    if not all(names) or len(set(names)) < len(names):
        raise CommandError("--input: give each a name of its own (NAME=SIZES), or none of them.")
    return dict(inputs)


def _make_input(text: str, default: torch.dtype, device: torch.device) -> tuple[str, Tensor]:
    """The name, "" without one, and the tensor."""
    found = _INPUT.fullmatch(text)
    if found is None:
        raise CommandError(
            f"--input={text!r} is not {INPUT_FORMAT}, for example 32x512x1024 or "
            "input_ids=32x512:int64:50257."
        )
    kind, bound = found["dtype"], int(found["bound"] or 0)
    if kind not in (None, *_DTYPES):
        raise CommandError(f"--input={text!r}: {kind!r} is not one of {', '.join(_DTYPES)}.")
    if (kind in _INTEGERS) != (bound > 0):
        raise CommandError(
            f"--input={text!r}: integers, and nothing else, need a bound above 0, as in "
            "32x512:int64:50257 for integers below 50257."
        )
    sizes = tuple(map(int, found["sizes"].split("x")))
    dtype = default if kind is None else getattr(torch, kind)
    if dtype == torch.bool:
        tensor = torch.rand(sizes, device=device) < 0.5
    elif bound:
        tensor = torch.randint(bound, sizes, dtype=dtype, device=device)
    else:
        tensor = torch.randn(sizes, dtype=dtype, device=device)
    return found["name"] or "", tensor


def load_model(reference: str) -> nn.Module:
    """The model that `package.module:function` makes, or that it is.

    Errors of the user's code are raised unchanged.

    Raises:
        CommandError: As `load`, or the function needs arguments, or returns no `nn.Module`.
    """
    option = "--model"
    target = load(option, reference)
    model = target if isinstance(target, nn.Module) else _called(target, option, reference)
    if not isinstance(model, nn.Module):
        raise CommandError(
            f"{option}={reference!r} returned {type(model).__name__}, not a torch.nn.Module."
        )
    return model


def load_batches(reference: str, device: torch.device) -> list[Any]:
    """All batches that `package.module:function` returns, with their tensors on `device`.

    Errors of the user's code are raised unchanged.

    Raises:
        CommandError: As `load`, or the function needs arguments, or returns no batches.
    """
    option = "--batches"
    found = _called(load(option, reference), option, reference)
    batches = [_moved(batch, device) for batch in found] if isinstance(found, Iterable) else []
    if not batches or isinstance(found, Tensor | Mapping):
        raise CommandError(
            f"{option}={reference!r} returned {type(found).__name__}, not a list of batches with "
            "at least one."
        )
    return batches


def load(option: str, reference: str) -> Any:
    """What `package.module:name` is; modules of the current folder are found.

    Raises:
        CommandError: It does not exist. The message names `option`.
    """
    where = f"{option}={reference!r}"
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise CommandError(
            f"{where} is not MODULE:FUNCTION, for example mypackage.models:make_model."
        )
    # A console script has its own folder on the path, not the user's.
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise CommandError(
            f"{where}: {error}, neither installed nor in the current folder."
        ) from None
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise CommandError(f"{where}: {error}.") from None


def _called(function: Any, option: str, reference: str) -> Any:
    """What a function without arguments returns."""
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError) as error:
        raise CommandError(
            f"{option}={reference!r} must be callable without arguments ({error}): name a function "
            "that is."
        ) from None
    return function()


def _moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; tuples stand for lists too."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_moved(value, device) for value in batch)
    return batch
