"""The user's model, by its name on the command line, and inputs for it."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memaop_triton.errors import CommandError

INPUT_FORMAT = "[NAME=]SIZES[:DTYPE[:BOUND]]"
_INPUT = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d+(?:x\d+)*)(?::(?P<dtype>\w+)(?::(?P<bound>\d+))?)?"
)
_INTEGERS = ("int32", "int64")
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class InputSpec(NamedTuple):
    """A random tensor for the model's forward pass.

    Attributes:
        name: Keyword argument that takes it, or "" for the next positional one.
        sizes: Its shape.
        dtype: `None` for the dtype that the model computes in.
        bound: Integers are below it.
    """

    name: str
    sizes: tuple[int, ...]
    dtype: torch.dtype | None
    bound: int

    def make(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Random values: normal ones, integers from 0 up to the bound, or true and false."""
        wanted = self.dtype or dtype
        if wanted == torch.bool:
            return torch.rand(self.sizes, device=device) < 0.5
        if self.bound:
            return torch.randint(self.bound, self.sizes, dtype=wanted, device=device)
        return torch.randn(self.sizes, dtype=wanted, device=device)


def parse_input(text: str) -> InputSpec:
    """`32x512x1024`, `32x512:int64:50257` (integers below 50257), `mask=32x512:bool`.

    Raises:
        CommandError: The text has another form.
    """
    found = _INPUT.fullmatch(text)
    if found is None:
        raise CommandError(
            f"--input={text!r} is not {INPUT_FORMAT}, for example 32x512x1024 or "
            "input_ids=32x512:int64:50257."
        )
    dtype, bound = found["dtype"], int(found["bound"] or 0)
    if dtype not in (None, "bool", *_INTEGERS, *_FLOATS):
        known = ", ".join((*_FLOATS, *_INTEGERS, "bool"))
        raise CommandError(f"--input={text!r}: {dtype!r} is not one of {known}.")
    if (dtype in _INTEGERS) != (bound > 0):
        raise CommandError(
            f"--input={text!r}: integers, and nothing else, need a bound above 0, as in "
            "32x512:int64:50257 for integers below 50257."
        )
    return InputSpec(found["name"] or "", parse_sizes(found["sizes"]), _dtype(dtype), bound)


def parse_sizes(text: str) -> tuple[int, ...]:
    """`32x512` as (32, 512)."""
    return tuple(map(int, text.split("x")))


def parse_shape(option: str, text: str) -> tuple[int, int, int]:
    """`8192x1024x1024` as M, N, P.

    Raises:
        CommandError: The text has another form; the message names `option`.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise CommandError(f"{option}={text!r} is not MxNxP, for example 8192x1024x1024.")
    m, n, p = parse_sizes(text)
    return m, n, p


def make_inputs(
    specs: Iterable[InputSpec], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Example inputs: a tuple, or a dictionary if they are named.

    Raises:
        CommandError: Some are named and others are not, or a name comes twice.
    """
    specs = list(specs)
    names = [spec.name for spec in specs]
    tensors = [spec.make(dtype, device) for spec in specs]
    if not any(names):
        return tuple(tensors)
    if not all(names) or len(set(names)) < len(names):
        raise CommandError("--input: give each a name of its own (NAME=SIZES), or none of them.")
    return dict(zip(names, tensors, strict=True))


def load_model(reference: str) -> nn.Module:
    """The model that `package.module:function` makes; modules of the current folder are found.

    Errors of the user's code are raised unchanged.

    Raises:
        CommandError: It does not exist, needs arguments, or returns no `nn.Module`.
    """
    where = f"--model={reference!r}"
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise CommandError(
            f"{where} is not MODULE:FUNCTION, for example mypackage.models:make_model."
        )
    target: Any = _import(module_name, where)
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise CommandError(f"{where}: {getattr(target, '__name__', target)} has no {part!r}.")
        target = getattr(target, part)
    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise CommandError(f"{where} must be a function or class, not {type(target).__name__}.")
    try:
        inspect.signature(target).bind()
    except TypeError as error:
        raise CommandError(
            f"{where} must be callable without arguments ({error}): name a function that is."
        ) from None
    except ValueError:  # a callable without a signature
        pass
    model = target()
    if not isinstance(model, nn.Module):
        raise CommandError(f"{where} returned {type(model).__name__}, not a torch.nn.Module.")
    return model


def _import(name: str, where: str) -> Any:
    # A console script has its own folder on the path, not the user's.
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            where += f": no module {missing!r}, neither installed nor in the current folder."
        else:
            where += f" imports {missing!r}, which is not installed."
        raise CommandError(where) from None


def _dtype(name: str | None) -> torch.dtype | None:
    dtype: torch.dtype | None = None if name is None else getattr(torch, name)
    return dtype
