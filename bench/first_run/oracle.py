"""Judges a step of the weight gradient against the equations in float64, on any device.

A step is watched as a monitor watches it, which says what was selected; what else it must have
computed follows from X, G, the memory before the step and the selection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memaop_triton import MemAOPConfig, ResidualMemory, SubspaceMemory, new_memory
from memaop_triton.backward.step import Operands, ProjectedRows
from memaop_triton.backward.weight_grad import weight_and_bias_grad
from memaop_triton.kernels.cpu.torch_ops import basis_scale
from memaop_triton.memory.kinds import Memory
from memaop_triton.sampling.selection import Selection, is_weighted

# How far a result may be from the exact one, in errors of PyTorch's own in the same dtypes. A row
# memory in half precision is rounded stochastically, which doubles the square of the error.
ALLOWED, ALLOWED_OF_ROW_MEMORY = 2.0, 3.0
TINY = 2e-6  # of float32 sums, beside that
NOT_ORTHONORMAL = 2e-3


class WrongResultError(AssertionError):
    """A kernel computed something else than the equations say."""


@dataclass
class Watch:
    """An observer that keeps what one step tells it, and the basis before it is refreshed."""

    memory: Memory | None
    selection: Selection | None = None
    scores: Tensor | None = None
    projected: ProjectedRows | None = None
    basis: Tensor | None = None
    side: str = ""
    is_due: bool = True

    def begin_step(self, device: torch.device) -> None:
        """Every step is observed."""

    def observe(
        self,
        operands: Operands,
        selection: Selection,
        dw: Tensor,
        scores: Tensor | None = None,
        projected: ProjectedRows | None = None,
    ) -> None:
        """Keep it."""
        self.selection, self.scores, self.projected = selection, scores, projected
        if isinstance(self.memory, SubspaceMemory) and self.memory.basis is not None:
            self.basis, self.side = self.memory.basis.clone(), self.memory.side

    def observe_exact(self, operands: Operands, dw: Tensor, memory: Memory | None) -> None:
        """Nothing was selected."""


@dataclass(frozen=True)
class Step:
    """What a step was given and what came out of it.

    Attributes:
        config: The layer's.
        memory: As the step left it.
        before: Of a row memory, copies of its slots before the step: mX, mG and which are filled.
        x: [M, N].
        g: [M, P].
        watch: What the step said of itself.
        weight: dW.
        bias: db.
    """

    config: MemAOPConfig
    memory: Memory | None
    before: list[Tensor] | None
    x: Tensor
    g: Tensor
    watch: Watch
    weight: Tensor
    bias: Tensor | None


def check_steps(
    config: MemAOPConfig, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Check two steps of one memory, the second with what the first left.

    Returns:
        Of both steps the relative errors of dW, ours and PyTorch's for the same rows.

    Raises:
        WrongResultError: A value is further from the exact one than rounding explains.
    """
    m, n, p = shape
    generator = torch.Generator(device).manual_seed(1)
    memory = new_memory(config, n, p)
    errors = []
    for _ in range(2):
        x, g = (rows_of(m, columns, dtype, generator) for columns in (n, p))
        errors.append(check_step(take_step(config, memory, x, g, generator)))
    return {"errors": errors}


def rows_of(m: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows near a space of eight dimensions, of lengths that differ, on the generator's device."""
    settings: dict[str, Any] = {"device": generator.device, "generator": generator}
    rank = min(8, columns)
    inside = torch.randn(m, rank, **settings) @ torch.randn(rank, columns, **settings)
    rows = inside + 0.3 * torch.randn(m, columns, **settings)
    return (rows * torch.rand(m, 1, **settings)).to(dtype)


def take_step(
    config: MemAOPConfig,
    memory: Memory | None,
    x: Tensor,
    g: Tensor,
    generator: torch.Generator | None = None,
) -> Step:
    """One weight gradient with db, without a host synchronisation: a graph may capture it."""
    before = None
    if isinstance(memory, ResidualMemory):
        before = [t.clone() for t in memory.slots(x.shape[0], x)]
    watch = Watch(memory)
    dw, db = weight_and_bias_grad(x, g, config, memory, generator=generator, observer=watch)
    return Step(config, memory, before, x, g, watch, dw, db)


def check_step(step: Step) -> dict[str, float]:
    """Relative errors of dW, ours and PyTorch's for the same rows; none where they are not known.

    Raises:
        WrongResultError: A value is further from the exact one than rounding explains.
    """
    x, g, watch, memory = step.x, step.g, step.watch, step.memory
    if watch.selection is None:
        raise WrongResultError("the step was exact: it selected no rows")
    if step.bias is not None:
        judge("db", step.bias, g.sum(0), g.sum(0, dtype=torch.float64), ALLOWED)
    indices = watch.selection.indices.long()
    weights = watch.selection.weights.double()
    inside = indices < x.shape[0]
    indices, weights = indices[inside], weights[inside]
    _check_selection(step.config, indices, weights, watch, x.shape[0])
    if isinstance(memory, ResidualMemory):
        return _judge_row_memory(step, memory, indices)
    if isinstance(memory, SubspaceMemory) and watch.projected is not None:
        _check_basis(memory)
        # With a basis of the gradients' side X and G are exchanged.
        a, b = (x, g) if watch.side == "input" else (g, x)
        result = step.weight if watch.side == "input" else step.weight.T
        return _judge_subspace(watch, a, b, result, indices, weights)
    exact_scores = _norms(x) * _norms(g)
    if watch.scores is not None:
        judge("scores", watch.scores, exact_scores.float(), exact_scores, ALLOWED)
    weighted = weights if is_weighted(step.config.selection) else None
    return judge(
        "dW", step.weight, _products(x, g, indices, weighted, x.dtype),
        _products(x, g, indices, weights, torch.float64), ALLOWED,
    )  # fmt: skip


def judge(
    what: str, result: Tensor, theirs: Tensor, exact: Tensor, allowed: float
) -> dict[str, float]:
    """Relative errors of a result and of PyTorch's; raises if ours is too large."""
    scale = exact.norm()
    ours, pytorch = (float((r.double() - exact).norm() / scale) for r in (result, theirs))
    if not ours <= allowed * pytorch + TINY:  # NaN is too large
        raise WrongResultError(f"{what}: relative error {ours:.3g}, PyTorch's own {pytorch:.3g}")
    return {"ours": ours, "pytorch": pytorch}


def _norms(a: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(a, dim=1, dtype=torch.float64)
    return norms


def _products(
    x: Tensor, g: Tensor, indices: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Σ w gᵀ x over the rows of `indices`, in `dtype` throughout."""
    left, right = g[indices].to(dtype), x[indices].to(dtype)
    if weights is not None:
        left = left * weights.to(dtype)[:, None]
    product: Tensor = left.T @ right
    return product


def _check_selection(
    config: MemAOPConfig, indices: Tensor, weights: Tensor, watch: Watch, rows: int
) -> None:
    """Order, number, and the weights that belong to the scores."""
    repeats = config.selection in ("crs", "wta")  # their draws are with replacement
    steps = indices.diff()
    if not bool(((steps >= 0) if repeats else (steps > 0)).all()):
        raise WrongResultError("the selected rows are not in ascending order")
    if config.selection != "bernoulli" and config.block_rows == 1:
        wanted = config.num_rows(rows)
        if indices.numel() != wanted:
            raise WrongResultError(f"{indices.numel()} rows were selected, not {wanted}")
    if watch.scores is None or config.block_rows > 1:
        return
    scores = watch.scores.double()
    chosen = scores[indices]
    if config.selection == "topk" and config.row_memory is None:
        rest = scores.clone()
        rest[indices] = 0
        if not bool(chosen.min() >= (1 - 1e-5) * rest.max()):
            raise WrongResultError("a row was left out whose score is above a selected one's")
    if config.selection in ("priority", "bernoulli"):
        # Above 1, a weight is one number over the score.
        raised = weights > 1.02
        numbers = (weights * chosen)[raised]
        if numbers.numel() and not bool(numbers.max() <= 1.02 * numbers.min()):
            raise WrongResultError("weights above 1 are not in proportion to 1/score")
    if config.selection == "uniform" and not bool((weights == weights[0]).all()):
        raise WrongResultError("uniform weights differ")


def _judge_row_memory(step: Step, memory: ResidualMemory, indices: Tensor) -> dict[str, float]:
    """dW from the rows and their memory, and what the memory holds afterwards."""
    assert step.before is not None
    x, g, (mx, mg, filled) = step.x, step.g, step.before
    after = memory.slots(x.shape[0], x)
    kept = torch.ones_like(filled).index_fill_(0, indices, False)
    if not torch.equal(after[2], kept):
        raise WrongResultError("other slots than those of the selected rows are empty")
    was_filled = (filled & kept)[:, None]
    sign = torch.ones(x.shape[0], 1, dtype=torch.float64, device=x.device)
    if memory.signed:
        added = ((after[0].double() - x.double()) * mx.double()).sum(1, keepdim=True)
        sign = torch.where(was_filled, added.sign(), sign)
    formed = [
        torch.where(filled[:, None], sign * m.double(), 0.0) + a.double()
        for m, a in ((mx, x), (mg, g))
    ]
    for held, exact in zip(after[:2], formed, strict=True):
        unit = torch.finfo(held.dtype).eps
        errors = (held.double() - exact).abs() - unit * exact.abs()
        if not bool((errors[kept] <= 1e-6 * exact.abs().max()).all()):
            raise WrongResultError("a stored row is off by more than one rounding")
    if memory.signed and bool(filled.any()):
        return {}  # the signs of the selected rows are not kept
    formed_x, formed_g = formed
    return judge(
        "dW", step.weight, _products(formed_x, formed_g, indices, None, x.dtype),
        _products(formed_x, formed_g, indices, None, torch.float64), ALLOWED_OF_ROW_MEMORY,
    )  # fmt: skip


def _judge_subspace(
    watch: Watch, a: Tensor, b: Tensor, result: Tensor, indices: Tensor, weights: Tensor
) -> dict[str, float]:
    """Bᵀ A from all rows of A inside the subspace and the selected ones outside, Z as it is."""
    assert watch.basis is not None
    assert watch.projected is not None
    q, projected = watch.basis.to(a.dtype), watch.projected
    z = projected.z.double() * basis_scale(a.shape[1])
    judge("Z", z, (a @ q).double(), a.double() @ q.double(), ALLOWED)
    left = _norms(a).square() - _norms(z).square()
    allowed = 4 * torch.finfo(a.dtype).eps * _norms(a).square()
    if not bool(((projected.rest.double().square() - left).abs() <= allowed).all()):
        raise WrongResultError("the norms of what the subspace leaves are wrong")
    drawn = (b[indices].double() * weights[:, None]).T @ z[indices]
    inside = (b.double().T @ z - drawn) @ q.double().T
    theirs = _products(a, b, indices, weights, a.dtype).double() + inside
    exact = _products(a, b, indices, weights, torch.float64) + inside
    return judge("dW", result, theirs.to(a.dtype), exact, ALLOWED)


def _check_basis(memory: SubspaceMemory) -> None:
    for side, basis in memory.bases.items():
        if basis.q is None:
            continue
        q = basis.q.double()
        off = float((q.T @ q - torch.eye(q.shape[1], device=q.device, dtype=q.dtype)).abs().max())
        if not off <= NOT_ORTHONORMAL:
            raise WrongResultError(f"the basis of the {side} rows is not orthonormal: {off:.3g}")
