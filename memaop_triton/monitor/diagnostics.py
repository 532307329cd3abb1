"""What a monitor reports about a layer: figures, a warning where needed, and a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from memaop_triton.monitor.kept import HEADING, KeptBytes, shown
from memaop_triton.sampling.variance import variance_at

if TYPE_CHECKING:
    from rich.table import Table


_PLOTTED = (
    *("ratio", "captured", "effective_sample_size", "nonzero_rows", "nonfinite_rows"),
    *("relative_variance", "sampling_variance", "dropped_bound"),
    *("gradient_square", "batch_variance"),
    *("outside_subspace", "memory_norm", "staleness"),
)


@dataclasses.dataclass(frozen=True)
class LayerDiagnostics:
    """A layer's recent backward passes, averaged; every average is exponential.

    Variances are of the weight gradient, summed over its entries, in its own units squared. With a
    loss scale they carry its square. Where tensor parallelism divides a layer, all numbers are of
    the part in this process.

    Attributes:
        rows: M of the last observed pass.
        k: Rows that it computed. `bernoulli` draws so many on average.
        observations: Passes in the averages.
        skipped: Passes that were observed and left out, because a value was not finite.
        nonfinite_rows: Rows that were not finite in all observed passes together.
        captured: Σ_S s / Σ s in [0, 1], the computed rows' fraction of the summed scores.
        effective_sample_size: (Σc)²/Σc² of what the computed rows add, c = w·s (Kish 1965). At most
            K; far below it, a few rows make up the gradient.
        nonzero_rows: Rows with a score above zero.
        sampling_variance: E‖dW_sampled − dW‖², estimated without bias from the rows drawn, an upper
            bound for `wta`; `memaop_triton.monitor.estimates` has the formulas. 0 for an exact
            pass, NaN for a policy of the paper, whose error is no variance.
        dropped_bound: (Σ_{m∉S} s)², which bounds the squared norm of what a policy of the paper
            left out, or left to the memory; NaN for an unbiased one.
        gradient_square: ‖dW‖² of the dense gradients, estimated from the sampled ones; NaN for a
            policy of the paper.
        batch_variance: M/(M−1)·(Σ‖g_m‖²‖x_m‖² − ‖dW‖²/M), the variance of the dense gradient from
            batch to batch if rows are independent samples. Tokens of one sequence are not: then it
            is too small. For the paper's policies without the last term.
        score_sum: Σ s.
        variance_curve: Shares of rows and variances: see `variance_of`.
        outside_subspace: Share of Σ‖x_m‖² outside the subspace, or of Σ‖g_m‖² if it is one of G;
            `None` without one.
        memory_norm: √(Σ s² of what a row memory holds / Σ s² of the batch's own rows), norms of
            outer products; `None` without one.
        staleness: Mean number of passes since a slot was emptied; `None` without a row memory.
        auto_ratio: K/M that the library gives the layer, 1 for an exact gradient; `None` unless it
            has `ratio="auto"`.
        auto_noise: V/D with this K/M or, where it is 1, with half of them, by the steps that the
            decision is based on (`memaop_triton.auto`). NaN if none was since this monitor began.
        kept: Bytes that its last forward pass kept of the inputs; `None` without a stash.
    """

    rows: int
    k: int
    observations: int
    skipped: int
    nonfinite_rows: int
    captured: float
    effective_sample_size: float
    nonzero_rows: float
    sampling_variance: float
    dropped_bound: float
    gradient_square: float
    batch_variance: float
    score_sum: float
    variance_curve: tuple[tuple[float, ...], tuple[float, ...]]
    outside_subspace: float | None = None
    memory_norm: float | None = None
    staleness: float | None = None
    auto_ratio: float | None = None
    auto_noise: float | None = None
    kept: KeptBytes | None = None

    @property
    def ratio(self) -> float:
        """K/M of the last observed pass."""
        return self.k / self.rows

    @property
    def relative_variance(self) -> float:
        """Sampling variance over the batch's own.

        At 1 the gradient has the variance of a dense one from half of the batch, at v of one from
        1/(1+v) of it. Uniform draws of K rows have M/K − 1.
        """
        if self.batch_variance > 0:
            return self.sampling_variance / self.batch_variance
        return math.inf if self.sampling_variance > 0 else self.sampling_variance

    def variance_of(self, k: int) -> float:
        """E‖dW_sampled − dW‖² if `k` of the rows were drawn by `priority` or `bernoulli`.

        For all rows 0. Beside a subspace as it is now; at most 2 % of Σ s² too large.
        """
        return variance_at(k / self.rows, *self.variance_curve)

    def scalars(self) -> dict[str, float]:
        """The figures to plot by name, without those that this layer does not have."""
        values = {name: getattr(self, name) for name in _PLOTTED}
        return {
            name: float(value)
            for name, value in values.items()
            if value is not None and not math.isnan(value)
        }

    def complaint(self, starving: float) -> str | None:
        """Why the layer computes too few rows, and what to do; `None` if it does not.

        Args:
            starving: A relative variance above it is a reason to complain where the sampling
                variance is also above the squared norm of the gradient itself.
        """
        # If all rows of a batch agree, its own variance is near zero and the ratio means nothing.
        hides_gradient = self.sampling_variance > self.gradient_square
        if self.relative_variance > starving and hides_gradient:
            return (
                f"sampling adds {self.relative_variance:.3g} times the variance that its batch "
                f"has itself, above starving={starving:g}: compute more rows (ratio is "
                f"{self.ratio:.3g}; allocate_ moves rows between layers), use memory='subspace' "
                "or a larger rank, or leave the layer dense."
            )
        # Averages of integers have rounding errors.
        if self.k < self.rows and self.nonzero_rows < self.k - 0.01:
            return (
                f"only {self.nonzero_rows:.3g} of {self.rows} rows have a gradient, fewer than the "
                f"{self.k} that are computed: look for dead units or masked rows, or lower the "
                "ratio, which costs nothing then."
            )
        return None


def diagnostics_table(
    layers: Mapping[str, LayerDiagnostics], starving: float, summaries: Sequence[str] = ()
) -> Table:
    """A row for every layer; those that starve are red. With a stash, what is kept of inputs.

    Args:
        layers: By name.
        starving: As for `LayerDiagnostics.complaint`.
        summaries: Lines below the table; with any there are columns for `ratio="auto"`.
    """
    from rich import box
    from rich.table import Table

    caption = "\n".join(summaries)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("layer", overflow="fold")
    headings = ["K of M", "captured", "eff. rows", "sampling / batch variance", "memory"]
    has_stash = any(layer.kept is not None for layer in layers.values())
    headings += ["auto K/M", "noise V/D"] if summaries else []
    headings += [HEADING] if has_stash else []
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, layer in layers.items():
        noise = layer.relative_variance
        table.add_row(
            name or "(the model)",
            f"{layer.k} of {layer.rows}",
            f"{layer.captured:.1%}",
            f"{layer.effective_sample_size:.4g}",
            "biased" if math.isnan(noise) else f"{noise:.3g}",
            _memory(layer),
            *(_decided(layer) if summaries else ()),
            *([shown(layer.kept)] if has_stash else []),
            style="red" if layer.complaint(starving) else None,
        )
    return table


def _decided(layer: LayerDiagnostics) -> tuple[str, str]:
    ratio, noise = layer.auto_ratio, layer.auto_noise
    if ratio is None or noise is None:
        return "–", "–"
    share = "exact" if ratio == 1 else f"1/{round(1 / ratio)}"
    return share, "–" if math.isnan(noise) else f"{noise:.3g}"


def _memory(layer: LayerDiagnostics) -> str:
    if layer.outside_subspace is not None:
        return f"{layer.outside_subspace:.1%} outside"
    if layer.memory_norm is not None and layer.staleness is not None:
        return f"{layer.memory_norm:.3g}× the batch, {layer.staleness:.3g} steps old"
    return "–"
