"""What the processes of a data-parallel run agree on, so that all of them decide alike.

The optimizer sees the mean of the processes' gradients. Its square D is the square of the mean of
their *sketches*, small linear images of dW. Its variance V is the sum of their variances over the
square of their number, because each of them draws for itself. Seconds are the means of theirs.

A process takes part in a collective because of the number of the step alone, and never because of
what it measured: what a process does not know is NaN, and then no process knows it.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from memaop_triton.auto.layer_timing import Use
from memaop_triton.auto.observing import Seen, StepObserver
from memaop_triton.nn.linear import MemAOPLayer

#: Rows and columns of a sketch at most, the bits of one random number.
SKETCH = 64


class SeenByAll(NamedTuple):
    """One step of a layer, as the mean over the processes shows it; otherwise like `Seen`.

    Attributes:
        uses: What each backward pass of the layer computed in this process.
        computed: ‖mean of Σ dW‖², estimated by its sketch.
        included: The variance that `computed` has from passes that sampled their rows.
        variances: V by K/M below 1.
    """

    uses: list[Use]
    computed: float
    included: float
    variances: dict[float, float]

    def variance_of(self, share: float) -> float:
        """V of the step with this share of the rows."""
        return 0.0 if share >= 1 else self.variances[share]

    @property
    def square(self) -> float:
        """D of the step, an estimate."""
        return max(0.0, self.computed - self.included)

    @property
    def is_finite(self) -> bool:
        """Whether the step is of use; it is not, if it was not in one of the processes."""
        total = self.computed + self.included + sum(self.variances.values())
        return total - total == 0


class Processes:
    """The processes that train copies, or shards, of one model.

    One process by itself calls no collective and computes no sketch. Copies of this object stand
    for the same processes, and unpickled ones for all processes.

    Args:
        group: Their process group; all processes if `None`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Processes, ()

    @property
    def size(self) -> int:
        """How many there are."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self._group)

    def check_alike(self, what: str, device: torch.device) -> None:
        """Compare a description of the layers and what is decided about them.

        Raises:
            RuntimeError: In all processes, if it is not the same everywhere.
        """
        if self.size == 1:
            return
        mark = int.from_bytes(hashlib.sha256(what.encode()).digest()[:7], "big")
        # The largest one and the smallest one.
        both = torch.tensor([mark, -mark], device=self._device(device))
        dist.all_reduce(both, dist.ReduceOp.MAX, self._group)
        largest, smallest = both.tolist()
        if largest != -smallest:
            raise RuntimeError(
                f"ratio='auto': {self.size} processes decide together, but they have different "
                "layers, configurations or earlier decisions. Convert the same layers and load the "
                "same decisions in all of them, or give convert_ the process_group of those that "
                "train copies of this model."
            )

    def mean(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """Element by element over the processes; NaN where one of them has NaN."""
        if self.size == 1:
            return list(numbers)
        vector = torch.tensor(numbers, dtype=torch.float64, device=self._device(device))
        dist.all_reduce(vector, group=self._group)
        means: list[float] = (vector / self.size).tolist()
        return means

    def sketcher(self, seed: int) -> Callable[[Tensor], Tensor] | None:
        """What observers add up in place of dW; `None` for one process by itself."""
        return None if self.size == 1 else functools.partial(sketch, seed=seed)

    def seen(
        self,
        observers: Mapping[str, StepObserver],
        shapes: Mapping[str, tuple[int, int]],
        shares: Sequence[float],
        copies: int,
        device: torch.device,
    ) -> dict[str, Seen | SeenByAll | None]:
        """What all processes together saw of each layer in a step; `None` if none of them used it.

        Args:
            observers: Of this process. A layer that has none here is not finite anywhere.
            shapes: Of the gradients of all layers, the same in all processes.
            shares: K/M whose variances are wanted.
            copies: Of how many processes each draws the same numbers.
            device: Of the layers.
        """
        found = {name: observer.read() for name, observer in observers.items()}
        if self.size == 1:
            return {**found}
        device, parts, sizes = self._device(device), [], []
        for name, shape in shapes.items():
            size = math.prod(min(side, SKETCH) for side in shape)
            sizes.append(size + len(shares) + 2)
            part = torch.zeros(sizes[-1], dtype=torch.float64, device=device)
            seen = found.get(name)
            if name not in observers:
                part.fill_(math.nan)
            elif seen is not None:
                gradient = observers[name].gradient
                assert gradient is not None
                variances = [seen.included, *map(seen.variance_of, shares)]
                # Over the number of processes once more, beside the division of the mean.
                variances = [v * copies / self.size for v in variances]
                part[:size] = gradient.flatten()
                part[size:] = torch.tensor([*variances, 1.0], dtype=torch.float64)
            parts.append(part)
        vector = torch.cat(parts)
        dist.all_reduce(vector, group=self._group)
        vector /= self.size
        together: dict[str, Seen | SeenByAll | None] = {}
        for name, part in zip(shapes, vector.split(sizes), strict=True):
            variances_and_count = len(shares) + 2
            computed = part[:-variances_and_count].square().sum()
            numbers = torch.cat([computed[None], part[-variances_and_count:]]).tolist()
            square, included, *variances, count = numbers
            seen = found.get(name)
            uses = [] if seen is None else seen.uses
            by_share = dict(zip(shares, variances, strict=True))
            together[name] = SeenByAll(uses, square, included, by_share) if count else None
        return together

    def _device(self, device: torch.device) -> torch.device:
        # NCCL sends nothing that is on the CPU, where an offloaded layer is.
        if device.type == "cpu" and dist.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return device


def sketch(dw: Tensor, seed: int) -> Tensor:
    """A linear image S of a matrix that keeps its square on average: E ‖S‖² = ‖dW‖².

    S = A dW B with random signs A / 8, [64, P], and B / 8, [N, 64], which all processes make alike
    from the seed. Matrices of one seed have the same A and B, so the sketch of a mean is the mean
    of the sketches. A side of at most 64 stays as it is.

    The relative variance of ‖S‖² is at most ρ/16 · (1 + 1/128) + 1/2048, where ρ = ‖dW dWᵀ‖² /
    ‖dW‖⁴ lies between 1 / rank and 1 (with normal instead of sign entries it is just that): a
    standard error of 25 % for a matrix of rank 1, 8 % for one of ten equal singular values, and
    2.2 % at least. With another seed in every step and for every layer such errors average out, and
    are part of the interval that a decision is based on.

    Args:
        dw: [P, N], float32 or float64.
        seed: Of A and B. The default generators are not used.

    Returns:
        [min(P, 64), min(N, 64)], dtype and device of `dw`.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        if len(dw) > SKETCH:
            dw = _signs(len(dw), generator, dw) @ dw
        dw = dw.t()
    return dw


def _signs(count: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """±1/8, [64, count]: the bits of `count` numbers."""
    numbers = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator).to(like.device)
    bits = numbers >> torch.arange(SKETCH, device=like.device).unsqueeze(1) & 1
    return (2 * bits - 1).to(like.dtype) / math.sqrt(SKETCH)


def divided_among(layer: MemAOPLayer) -> int:
    """The processes among which tensor parallelism may divide a layer's weight; 1 if it does not.

    A layer that is fully sharded on top shows it from its first sampled or observed pass on.
    """
    shards = layer.layer_state.shards
    if shards is not None:
        return dist.get_world_size(shards.group)
    mesh = getattr(layer.weight_parameter, "device_mesh", None)
    # `fully_shard` gathers the whole weight before the layer computes with it.
    if mesh is None or getattr(layer, "_is_fsdp_managed_module", False):
        return 1
    size: int = mesh.size()
    return size
