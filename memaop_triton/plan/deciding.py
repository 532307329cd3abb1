"""What `ratio="auto"` would decide about layers, by times and by the noise of a few batches."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from memaop_triton.auto.evidence import SHARES, layer_of
from memaop_triton.auto.savings import Savings
from memaop_triton.auto.worth import (
    EXACT,
    WORTH_A_CHANGE,
    Layer,
    Worth,
    best_choice,
    obstacle_to,
    worth_of,
)
from memaop_triton.memory.kinds import SubspaceMemory, new_memory
from memaop_triton.plan.noise import Noise
from memaop_triton.plan.request import LayerRequest
from memaop_triton.plan.result import LayerPlan, OptionPlan, Verdict

#: A smaller gain does not count: with other contents of the caches it may be a loss.
LEAST_GAIN = 1.02
_ROUNDS = 5
_UNKNOWN = (
    "the noise of sampling is unknown, because the sum of the outputs is no loss: pass loss_fn, or "
    "let the model return its loss"
)

_UNSEEN = "no finite gradient in training mode was seen"


class Decision(NamedTuple):
    """What `ratio="auto"` would come to.

    Attributes:
        rows: By layer.
        predicted: What the choice promises; `None` if the noise is unknown.
        text: In one line, without a full stop at its end.
        remarks: On the noise, in sentences.
    """

    rows: dict[str, LayerPlan]
    predicted: Worth | None
    text: str
    remarks: str


def decide(
    requests: Sequence[LayerRequest],
    noise: Noise | None,
    step_seconds: float | None,
    total: int,
) -> Decision:
    """Choose among exact gradients and the shares of rows that a layer may get.

    Args:
        requests: Layers with `ratio="auto"`, those that are to be measured.
        noise: `None` if it is unknown.
        step_seconds: Of a forward and backward pass while these layers are exact; `None` only if
            there is no noise.
        total: How many layers have `ratio="auto"`, those with nothing to gain included.
    """
    known: dict[str, Layer] = {}
    seconds = _seconds(requests)
    for request in requests:
        seen = noise.seen[request.name] if noise is not None else []
        if seen:
            known[request.name] = layer_of(seen, seconds[request.name])
    predicted, text, remarks = None, _UNKNOWN, ""
    if noise is not None:
        assert step_seconds is not None
        predicted, text = _choice(known, step_seconds, total)
        remarks = _remarks(noise)
    shares = {} if predicted is None else predicted.shares
    rows = {
        request.name: request.row(Verdict.LEAVE_DENSE, note=_UNSEEN)
        if noise is not None and request.name not in known
        else _row(request, seconds[request.name], known.get(request.name), shares)
        for request in requests
    }
    return Decision(rows, predicted, text, remarks)


def _seconds(requests: Sequence[LayerRequest]) -> dict[str, dict[float, float]]:
    """Of the weight gradients of a step, by layer and K/M.

    Timed as in training, and the median of several rounds: there, trials correct an odd time.
    """
    found: dict[str, list[dict[float, float]]] = {request.name: [] for request in requests}
    for savings in (Savings() for _ in range(_ROUNDS)):
        for request in requests:
            configs = {share: request.config.spending(ratio=share) for share in (EXACT, *SHARES)}
            # dX is exact in any case, and does not count.
            uses = [
                u._replace(needs_input=False) for u in request.uses.elements() if u.needs_weight
            ]
            found[request.name].append(savings.seconds(uses, configs))
    return {
        name: {share: statistics.median(one[share] for one in rounds) for share in rounds[0]}
        for name, rounds in found.items()
    }


def _choice(layers: Mapping[str, Layer], seconds: float, total: int) -> tuple[Worth | None, str]:
    if not layers:
        return None, "nothing to decide: no layer has a weight gradient that could be sampled"
    best = best_choice(layers, seconds)
    if best.progress < WORTH_A_CHANGE:
        exact = worth_of(layers, dict.fromkeys(layers, EXACT), seconds)
        return exact, f"dense is best here: {obstacle_to(layers, seconds)}"
    count = sum(share < EXACT for share in best.shares.values())
    unit = "times dense's progress per second"
    return best, f"predicted {best.progress:.2f} {unit}; sampling {count} of {total} layers"


def _remarks(noise: Noise) -> str:
    batches = "one batch" if noise.batches == 1 else f"{noise.batches} batches"
    text = (
        f"Noise V/D is that of {batches} at the weights that the model has now; it grows as "
        "training goes on."
    )
    if noise.is_bound:
        text += " One batch shows it without a subspace only, at its most: pass more as batches."
    return text


def _row(
    request: LayerRequest,
    seconds: Mapping[float, float],
    layer: Layer | None,
    shares: Mapping[str, float],
) -> LayerPlan:
    share = shares.get(request.name)
    noises = {} if layer is None or layer.square <= 0 else {
        option.share: option.variance / layer.square for option in layer.options
    }  # fmt: skip
    options = tuple(OptionPlan(s, cost, noises.get(s)) for s, cost in seconds.items())
    if share is None:
        is_faster = seconds[EXACT] > LEAST_GAIN * min(seconds.values())
        verdict = Verdict.UNKNOWN if is_faster else Verdict.LEAVE_DENSE
        return request.row(verdict, dense_seconds=seconds[EXACT], options=options)
    return request.row(
        Verdict.LEAVE_DENSE if share == EXACT else Verdict.CONVERT,
        dense_seconds=seconds[EXACT],
        ours_seconds=seconds[share],
        memory_bytes=0 if share == EXACT else _held(request),
        share=share,
        options=options,
    )


def _held(request: LayerRequest) -> int:
    """Bytes of the layer's memory, once it has bases."""
    sizes = request.in_features, request.out_features
    memory = new_memory(request.config.spending(ratio=EXACT), *sizes)
    if not isinstance(memory, SubspaceMemory):
        return 0
    dtypes = [torch.promote_types(use.dtype, torch.float32) for use in request.uses]
    numbers = sum(basis.features * basis.rank for basis in memory.bases.values())
    return numbers * max(dtype.itemsize for dtype in dtypes)
