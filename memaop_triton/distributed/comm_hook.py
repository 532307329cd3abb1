"""Gradient exchange of `DistributedDataParallel` by factors instead of weight gradients.

A converted layer computes dW = Gᵀ X from R rows: R (N + P) numbers determine the N P numbers of dW.
Where that is less, the processes gather each other's factors and multiply them:

    (1/W) Σ_r dW_r = (1/W) Σ_r G_rᵀ X_r          r over the W processes, X_r [R_r, N], G_r [R_r, P]

The factors describe only what the layer's sampled backward passes added. A gradient may hold more
(a regulariser in the loss, a second user of the weight, a micro-batch computed exactly) or less (a
hook that scales it, a `zero_grad` between two `no_sync` passes), so before every exchange each
process compares the images of one random vector v: that of the gradient it is about to send, and
the sum of those of the dW which the passes returned. They differ unless the gradient is that sum
(Freivalds 1977). The processes exchange the outcome and their numbers of rows; a weight for which
the check fails in any of them is all-reduced by all.
"""

# Without `from __future__ import annotations`: DDP compares the annotations of a hook with types.
import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket  # torch.distributed's, with its types
from torch.nn.parallel import DistributedDataParallel

from memaop_triton.distributed.collected_factors import FACTOR_DTYPES, CollectedFactors
from memaop_triton.nn.autograd import no_autocast
from memaop_triton.nn.layer_choice import converted_layers


class FactorAllGather:
    """Averages gradients over the processes by factors where these are smaller.

    For every bucket of gradients, the processes exchange 16 bytes for each weight of a converted
    layer: how many rows of factors they have, and of which dtype. A weight takes part if the
    factors of all processes hold the gradient and

        rows · (N + P) · world size · bytes per factor  <  N · P · bytes per gradient

    with the largest number of rows of any process. Then a ring all-gather sends at most half of
    what a ring all-reduce does, which outweighs multiplying the factors. All other gradients of the
    bucket are packed and all-reduced. The result is that of plain DDP up to rounding, and bit for
    bit the same in all processes, as with plain DDP, if their devices are alike.

    A weight is all-reduced for the step whenever its gradient holds anything but the sum of the
    layer's sampled backward passes since the last exchange: contributions from elsewhere in the
    loss, a layer in evaluation mode, a batch of at most K rows, a gradient changed by a hook, NaN.
    So are gradients of half precision to which more than one pass contributed, because their sum
    was rounded. What is noticed must exceed about 4e-6 of the gradient's norm (1e-14 in float64).
    A layer used several times, a weight shared by converted layers, micro-batches under `no_sync`,
    batches of different sizes and layers unused in some process are gathered.

    The hook blocks the backward pass, bucket by bucket, until the 16 bytes of every process have
    arrived; factors and gradients are then sent while it continues. Factors are kept only while
    they may be gathered: at most N P numbers a weight divided by the number of processes.

    Use `FactorAllGather.register(ddp)`, which returns the hook, rather than the constructor.

    Args:
        ddp: A model with converted layers. Layers converted later are not registered.

    Attributes:
        bytes_sent: What this process sent so far instead of weight gradients: its part of each
            ring all-gather, (world size − 1) times its factors, padded to those of the process
            with the most, and as much for the header.
        bytes_replaced: What ring all-reduces of the same weights would have sent,
            2 (world size − 1) / world size · N · P · bytes per gradient each.

    Raises:
        TypeError: `ddp` is not a `DistributedDataParallel`.
        ValueError: It has no converted layer with a trainable weight of its own, the factors of a
            layer are collected by something else already, or the processes hold different layers.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        if not isinstance(ddp, DistributedDataParallel):
            raise TypeError(
                f"ddp must be a DistributedDataParallel, got {type(ddp).__name__}: wrap the "
                "converted model first."
            )
        self.group: dist.ProcessGroup = ddp.process_group
        self.world = self.group.size()
        self.bytes_sent = 0
        self.bytes_replaced = 0
        layers = {
            name: layer
            for name, layer in converted_layers(ddp.module)
            if isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad
        }
        if not layers:
            raise ValueError(
                "ddp has no converted layer with a trainable weight: call convert_(model, config) "
                "before DistributedDataParallel(model)."
            )
        for name, layer in layers.items():
            if layer.layer_state.factors is not None:
                raise ValueError(
                    f"the factors of layer {name!r} are collected already: register one "
                    "FactorAllGather for a model."
                )
        self._check_agreement([(name, tuple(m.weight.shape)) for name, m in layers.items()])
        self._layers = [
            layer for layer in layers.values() if _may_be_gathered(layer.weight, self.world)
        ]
        # By weight, which layers may share.
        self._collected = {
            id(layer.weight): CollectedFactors(layer.weight, self.world) for layer in self._layers
        }

    @classmethod
    def register(cls, ddp: DistributedDataParallel) -> "FactorAllGather":
        """Make `ddp` exchange its gradients by a new hook, in all processes; returns the hook.

        Call it once, after `convert_` and before the first backward pass. The arguments and errors
        are those of the class; the hook lives as long as `ddp`.

        Raises:
            RuntimeError: `ddp` has a communication hook already.
        """
        hook = cls(ddp)
        ddp.register_comm_hook(hook, _exchange)
        for layer in hook._layers:
            collected = hook._collected[id(layer.weight)]
            layer.layer_state.factors = collected.factors
            layer.layer_state.on_weight_grad = collected.add
        return hook

    def _check_agreement(self, mine: list[tuple[str, tuple[int, ...]]]) -> None:
        """Raise `ValueError` unless the converted layers are the same everywhere."""
        everyone: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(self.world)]
        dist.all_gather_object(everyone, mine, group=self.group)
        for rank, theirs in enumerate(everyone):
            if theirs != everyone[0]:
                odd = sorted(set(theirs) ^ set(everyone[0])) or "the same ones in another order"
                raise ValueError(
                    f"ddp must have the same converted layers in all processes, but process {rank} "
                    f"differs from process 0 in {odd}: convert the model alike everywhere."
                )

    def _run(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        gradients = bucket.gradients()
        weights = [
            _Weight(gradient, self._collected[id(parameter)])
            for parameter, gradient in zip(bucket.parameters(), gradients, strict=True)
            if id(parameter) in self._collected
        ]
        chosen = self._agree(weights) if weights else []
        if not chosen:
            return self._all_reduce(bucket.buffer())
        taken = {id(weight.gradient) for weight in chosen}
        others = [gradient.view(-1) for gradient in gradients if id(gradient) not in taken]
        return self._gather(bucket.buffer(), chosen, others)

    def _agree(self, weights: "Sequence[_Weight]") -> "list[_Weight]":
        """Exchange rows and dtypes; the weights to gather, the same ones in all processes."""
        header = torch.stack([weight.collected.header(weight.gradient) for weight in weights])
        headers = header.new_empty((self.world, *header.shape))
        dist.all_gather(list(headers.unbind()), header, group=self.group)
        self.bytes_sent += (self.world - 1) * header.nbytes
        entries = headers.tolist()
        for number, weight in enumerate(weights):
            weight.factors = weight.collected.take()
            weight.agree([entry[number] for entry in entries])
        return [weight for weight in weights if weight.is_gathered]

    def _all_reduce(self, buffer: Tensor) -> torch.futures.Future[Tensor]:
        """The mean over the processes, in place; divided first, which float16 needs."""
        work = dist.all_reduce(buffer.div_(self.world), group=self.group, async_op=True)
        future: torch.futures.Future[Tensor] = work.get_future().then(lambda _: buffer)
        return future

    def _gather(
        self, buffer: Tensor, chosen: "Sequence[_Weight]", others: Sequence[Tensor]
    ) -> torch.futures.Future[Tensor]:
        """Average `chosen` by factors and `others` as they are, all of them parts of `buffer`."""
        gathered = [
            self._start(dtype, part)
            for dtype in FACTOR_DTYPES
            if (part := [weight for weight in chosen if weight.dtype == dtype])
        ]
        futures = [future for _, future in gathered if future is not None]
        if others:
            packed = torch.cat(list(others))
            futures.append(self._all_reduce(packed))

        def finish(_: object) -> Tensor:
            # On another thread or stream than the backward pass.
            with torch.no_grad(), no_autocast(buffer.device.type):
                for exchange, _future in gathered:
                    exchange.finish()
                if others:
                    _used_here(packed)
                    sizes = [part.numel() for part in others]
                    for part, mean in zip(others, packed.split(sizes), strict=True):
                        part.copy_(mean)
            return buffer

        if futures:
            return torch.futures.collect_all(futures).then(finish)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(finish(None))
        return done

    def _start(
        self, dtype: torch.dtype, weights: "Sequence[_Weight]"
    ) -> "tuple[_Exchange, torch.futures.Future[Tensor] | None]":
        """Send the factors of one dtype in one buffer; no future if no process has any."""
        length = max(sum(w.size(rank) for w in weights) for rank in range(self.world))
        mine = torch.zeros(length, dtype=dtype, device=weights[0].gradient.device)
        parts = [
            matrix.reshape(-1)
            for weight in weights
            for matrices in weight.factors
            for matrix in matrices
        ]
        if parts:
            torch.cat(parts, out=mine[: sum(part.numel() for part in parts)])
        everyone = mine.new_empty((self.world, length))
        exchange = _Exchange(mine, everyone, weights)
        for weight in weights:
            self.bytes_replaced += 2 * (self.world - 1) * weight.gradient.nbytes // self.world
        self.bytes_sent += (self.world - 1) * mine.nbytes
        if length == 0:
            return exchange, None
        # As bytes: not every backend supports every dtype.
        slots = list(everyone.view(torch.uint8).unbind())
        work = dist.all_gather(slots, mine.view(torch.uint8), group=self.group, async_op=True)
        return exchange, work.get_future()


def _exchange(hook: FactorAllGather, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """The communication hook: mean of `bucket` over the processes, as a future of its buffer."""
    # Backward may be called in an autocast region, which would round the comparisons.
    with torch.no_grad(), no_autocast(bucket.buffer().device.type):
        return hook._run(bucket)


@dataclasses.dataclass
class _Weight:
    """One weight of a converted layer in one exchange.

    Attributes:
        gradient: Its part of the bucket, [P, N].
        collected: Where its factors come from.
        factors: This process's, X and G apart.
        rows: Number of rows of every process.
        dtype: Of the factors.
        is_gathered: Whether the factors are exchanged, not the gradient.
    """

    gradient: Tensor
    collected: CollectedFactors
    factors: tuple[list[Tensor], list[Tensor]] = ([], [])
    rows: Sequence[int] = ()
    dtype: torch.dtype = torch.float32
    is_gathered: bool = False

    def agree(self, entries: Sequence[Sequence[int]]) -> None:
        """Decide from the headers of all processes, and from nothing else."""
        self.rows = [rows for rows, _ in entries]
        dtypes = {number for rows, number in entries if rows > 0}
        if min(self.rows) < 0 or len(dtypes) > 1:
            return
        self.dtype = FACTOR_DTYPES[dtypes.pop()] if dtypes else self.gradient.dtype
        self.is_gathered = True

    def size(self, rank: int) -> int:
        """Number of elements in the factors of a process."""
        return self.rows[rank] * sum(self.gradient.shape)

    def average(self, x: Tensor, g: Tensor) -> None:
        """gradient ← Gᵀ X / world size, for x [R, N] and g [R, P]."""
        same = self.dtype == self.gradient.dtype
        product = self.gradient if same else x.new_empty(self.gradient.shape)
        product.addmm_(g.t(), x, beta=0, alpha=1 / len(self.rows))
        if not same:
            self.gradient.copy_(product)


@dataclasses.dataclass
class _Exchange:
    """One all-gather under way.

    Attributes:
        mine: Flat: for one weight after another its rows of X, then those of G, then padding.
        everyone: The same of all processes, [world size, length].
        weights: Whose factors these are.
    """

    mine: Tensor
    everyone: Tensor
    weights: Sequence[_Weight]

    def finish(self) -> None:
        """Average the gradients."""
        _used_here(self.mine, self.everyone)
        offsets = [0] * self.everyone.shape[0]
        for weight in self.weights:
            p, n = weight.gradient.shape
            xs, gs = [], []
            for r, rows in enumerate(weight.rows):
                part = self.everyone[r, offsets[r] :][: weight.size(r)]
                offsets[r] += weight.size(r)
                xs.append(part[: rows * n].view(rows, n))
                gs.append(part[rows * n :].view(rows, p))
            # One product, in the order of the processes: every process rounds alike.
            weight.average(torch.cat(xs), torch.cat(gs))


def _may_be_gathered(weight: Tensor, world: int) -> bool:
    """Whether a single row of the smallest dtype would be."""
    return world > 1 and sum(weight.shape) * FACTOR_DTYPES[0].itemsize * world < weight.nbytes


def _used_here(*tensors: Tensor) -> None:
    """Keep the memory of tensors of another stream until this one has read them."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            tensor.record_stream(torch.accelerator.current_stream(tensor.device))
