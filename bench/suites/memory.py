"""Trainings whose memory is measured, and the ways to train them that are compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memaop_triton import MemAOPConfig, compress_saved, convert_
from memaop_triton.bench.measure import Clock, Method
from memaop_triton.bench.report.methods import BASELINES, OURS
from memaop_triton.bench.suites.memory_baselines import (
    checkpoint_,
    compress_saved_,
    sample_in_forward_,
)
from memaop_triton.bench.suites.models import TransformerBlock
from memaop_triton.experiments.bert import MiniLm
from memaop_triton.nn.layer_choice import converted_layers

RATIO = 1 / 8


@dataclass(frozen=True)
class Training:
    """A model and its batch.

    Attributes:
        name: For titles.
        make: Builds the model, which is trained as far as it requires gradients.
        inputs: Of this shape; numbers of tokens where `vocabulary` is given.
        samples: Of a batch.
        blocks: The parts of a model that are checkpointed.
        width: Of the residual stream.
        vocabulary: Different tokens; 0 if the inputs are the output of another part of a network.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int
    blocks: Callable[[nn.Module], Iterable[nn.Module]]
    width: int
    vocabulary: int = 0

    @property
    def rows(self) -> int:
        """M of its linear layers."""
        return self.samples * self.shape[0]

    def batch(self, device: str, dtype: torch.dtype) -> Tensor:
        """Random inputs."""
        shape = self.samples, *self.shape
        if self.vocabulary:
            return torch.randint(1, self.vocabulary, shape, device=device)
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


def blocks(
    name: str, width: int, depth: int, tokens: int, samples: int, *, causal: bool
) -> Training:
    """Blocks of a GPT or a ViT; several, because checkpointing one holds as much as not."""

    def make() -> nn.Module:
        heads = max(1, width // 64)
        return nn.Sequential(*(TransformerBlock(width, heads, causal=causal) for _ in range(depth)))

    title = f"{depth} {name} blocks d={width}, {samples} × {tokens} tokens"
    return Training(title, make, (tokens, width), samples, nn.Module.children, width)


def lora(width: int, depth: int, tokens: int, samples: int, rank: int = 16) -> Training:
    """GPT blocks that are frozen, with a pair of small trained layers beside each linear one."""
    base = blocks("GPT", width, depth, tokens, samples, causal=True)

    def make() -> nn.Module:
        model = base.make().requires_grad_(False)
        for block in model.children():
            for name, layer in list(block.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(block, name, Adapted(layer, rank))
        return model

    title = f"{base.name}, frozen, adapters of rank {rank}"
    return Training(title, make, base.shape, samples, base.blocks, width)


def minilm(samples: int, tokens: int) -> Training:
    """The BERT of the fine-tuning experiments, untrained: bytes and times are the same."""
    bert = MiniLm()
    return Training(
        f"MiniLM, {samples} × {tokens} tokens",
        bert.build_untrained,
        (tokens,),
        samples,
        lambda model: model.get_submodule("blocks").children(),
        bert.width,
        bert.vocabulary,
    )


class Adapted(nn.Module):
    """A linear layer and what is added to it, U D x (LoRA, arXiv 2106.09685).

    Args:
        base: The layer.
        rank: Rows of D and columns of U.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


class Step:
    """A training step: forward, backward with a given gradient of the output, AdamW.

    Args:
        training: What is trained, on one random batch.
        change: What is done to the model first.
        device: Of both.
        dtype: Of both.

    Attributes:
        period: Steps after which the work repeats.
    """

    def __init__(
        self,
        training: Training,
        change: Callable[[nn.Module], object],
        device: str,
        dtype: torch.dtype,
    ) -> None:
        torch.manual_seed(0)
        self.model = training.make().to(device, dtype)
        change(self.model)
        self.period = max((one.config.period for _, one in converted_layers(self.model)), default=1)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)
        self.batch = training.batch(device, dtype)
        with torch.no_grad():
            self.gradient = torch.randn_like(self.model(self.batch))

    def forward(self, samples: int) -> Tensor:
        """The output of a part of the batch."""
        x = self.batch[:samples]
        if x.is_floating_point():
            x = x * 1  # made by another part of the network, and nobody else's
        y: Tensor = self.model(x)
        return y

    def __call__(self, samples: int) -> None:
        """One step with a part of the batch.

        It begins without gradients and ends so: what a record of allocations did not see come, it
        does not see go.
        """
        self.accumulate(samples)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.batch.grad = None

    def accumulate(self, samples: int) -> None:
        """Forward and backward with a part of the batch."""
        self.forward(samples).backward(self.gradient[:samples])

    def batch_peaks(self, clock: Clock, *samples: int) -> list[int]:
        """Peaks of `accumulate` by number of samples, while there are gradients from before.

        So they are what grows with the batch, and little else: neither gradients that come while
        activations go, nor the optimizer's temporary tensors.
        """
        self.accumulate(samples[0])
        peaks = [clock.peak_bytes(functools.partial(self.accumulate, one)) for one in samples]
        self.optimizer.zero_grad()
        self.batch.grad = None
        return peaks

    @property
    def resident_bytes(self) -> int:
        """There in every backward pass: parameters, gradients and the optimizer's state."""
        parameters = list(self.model.parameters())
        gradients = [p for p in parameters if p.requires_grad]  # of the same sizes
        state = [v for s in self.optimizer.state.values() for v in s.values()]
        return sum(t.nbytes for t in (*parameters, *gradients, *state))


def steps(training: Training, device: str, dtype: torch.dtype) -> dict[str, Step]:
    """A step for each way to train, by name: dense, ours, and the baselines."""
    ours = {
        "int8": MemAOPConfig(ratio=RATIO, stash="int8"),
        "int4": MemAOPConfig(ratio=RATIO, stash="int4"),
        "int4-all": MemAOPConfig(ratio=1, memory=None, stash="int4"),
    }
    changes: dict[str, Callable[[nn.Module], object]] = {
        "dense": lambda model: None,
        **{name: functools.partial(_convert, config=config) for name, config in ours.items()},
        "saved": compress_saved,
        "int4-saved": lambda model: compress_saved(_convert(model, ours["int4"])),
        "checkpoint": lambda model: checkpoint_(training.blocks(model)),
        "forward-wta": lambda model: sample_in_forward_(model, RATIO),
        "saved-int8": compress_saved_,
    }
    return {name: Step(training, change, device, dtype) for name, change in changes.items()}


def methods(made: dict[str, Step], samples: int) -> list[Method]:
    """Steps with so many samples, to be timed in turns."""
    found = []
    for name, step in made.items():
        role = "dense" if name == "dense" else "ours" if name in OURS else "baseline"
        label = name if name == "dense" else (OURS | BASELINES)[name].text
        found.append(Method(name, role, label, functools.partial(step, samples), step.period))
    return found


def _convert(model: nn.Module, config: MemAOPConfig) -> nn.Module:
    return convert_(
        model, config, filter_fn=lambda layer, _: type(layer) is nn.Linear and _is_trained(layer)
    )


def _is_trained(layer: nn.Module) -> bool:
    return all(p.requires_grad for p in layer.parameters())
