"""The section of the page on what a step is worth: predicted and measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from memaop_triton.bench.report import text
from memaop_triton.bench.report.document import NOTHING, Block, Chart, Section, Table
from memaop_triton.bench.report.document import Cell as Entry
from memaop_triton.bench.studies.quality import plots, progress
from memaop_triton.bench.studies.quality.progress import BEST, Fit, Formula, Pair
from memaop_triton.bench.studies.quality.results import Results
from memaop_triton.bench.studies.quality.schemes import SCHEMES
from memaop_triton.bench.studies.quality.tasks import TASKS

_NOISES = {
    "V/D of the sampled layers": progress.total,
    "V/D, D of all Parameters": progress.total_of_all,
    "mean of min(1, V/D) over layers": progress.mean_of_layers,
    "Σ min(V, D) / Σ D": progress.capped,
}
_PROGRESS = {
    "1 − ν": progress.at_dense_rate,
    "1/(1 + ν)": progress.at_retuned_rate,
    "2/√(1 + ν) − 1": progress.with_adam,
}
_VARIANTS = {
    "weighted by the learning rate": Formula(power=1),
    "by its square": Formula(power=2),
    "after 5 steps alone": Formula(early=5),
    "after 15 steps alone": Formula(early=15),
    "after 30 steps alone": Formula(early=30),
}
FORMULAS = {
    **{
        (noise, formula): Formula(_NOISES[noise], _PROGRESS[formula])
        for noise in _NOISES
        for formula in _PROGRESS
    },
    **{("Σ min(V, D) / Σ D", f"1/(1 + ν), {name}"): one for name, one in _VARIANTS.items()},
}

INTRODUCTION = (
    "Measured progress is the share of dense's steps that ends at the loss that a run ends at, "
    "interpolated between whole dense runs of fewer steps, on all held-out data. Predicted "
    "progress is the mean over the steps of a function of their noise ν, which was measured along "
    "dense of seed 0: V is the variance that the scheme's rows add, D the squared norm of a "
    "batch's gradient.",
    "Filled points are decided: the standard error of their mean, by the scatter between seeds in "
    f"all cells of their task, is at most {progress.TOLERANCE / 2:g}. The band is the line of "
    f"equality ± {progress.TOLERANCE:g}. Not in the error is that of dense's runs.",
)


def worth_section(results: Results) -> Section:
    """Predicted progress against measured progress, and the formulas that were tried."""
    title = "What a step is worth: predicted and measured"
    known = progress.pairs(results, results.calibration)
    decided = [pair for pair in known if pair.is_decided]
    if not decided:
        return Section("worth", title, ["Not run yet."])
    blocks: list[Block] = [
        *INTRODUCTION,
        Chart(
            f"Progress of {len(known)} settings by 1/(1 + ν), ν = Σ min(V, D) / Σ D",
            plots.calibration(known, BEST.predict),
            columns=1,
            file="calibration.svg",
        ),
        _formulas_table(decided),
        _along(results, decided),
        _pairs_table(known),
    ]
    return Section("worth", title, blocks)


def _formulas_table(decided: Sequence[Pair]) -> Table:
    rows = []
    for (noise, name), formula in FORMULAS.items():
        plain = progress.without_fit(formula, decided)
        fitted = progress.leave_one_out(formula, decided)
        tone = "best" if formula == BEST else ""
        factors = fitted.by_task.values()
        rows.append(
            (
                Entry(noise),
                Entry(name, tone=tone),
                Entry(_rank_correlation(formula, decided)),
                Entry(f"{plain.rms:.3f}"),
                Entry(_within(formula, plain, decided)),
                _worst(plain, decided),
                Entry(f"{fitted.factor:.2f}", f"{min(factors):.2f} to {max(factors):.2f}"),
                Entry(f"{fitted.rms:.3f}"),
                Entry(_within(formula, fitted, decided)),
            )
        )
    head = (
        *("ν", "progress", "rank correlation", "rms miss", "within 0.1", "worst miss"),
        *("factor", "rms miss", "within 0.1"),
    )
    caption = (
        f"{text.count(len(decided), 'decided setting')}; within 0.1: all, and those with ν ≤ "
        f"{progress.MOST_NOISE:g}. On the right ν is divided by a factor of least squares; the "
        "misses of a task are by the factor of the others, whose range stands below."
    )
    groups = (("", 2), ("as it is", 4), ("with a factor, the task left out", 3))
    return Table(head, tuple(rows), 2, caption=caption, groups=groups)


def _rank_correlation(formula: Formula, pairs: Sequence[Pair]) -> str:
    """Spearman's."""
    if len(pairs) < 3:
        return NOTHING.text
    from scipy.stats import spearmanr

    predicted = [formula.predict(pair) for pair in pairs]
    return f"{spearmanr(predicted, [pair.measured for pair in pairs]).statistic:.2f}"


def _within(formula: Formula, fit: Fit, pairs: Sequence[Pair]) -> str:
    """How many are within the tolerance, of all and of those with little noise."""
    near = [abs(miss) <= progress.TOLERANCE for miss in fit.misses]
    little = [one for one, pair in zip(near, pairs, strict=True) if has_little_noise(formula, pair)]
    return f"{sum(near)} of {len(near)}, {sum(little)} of {len(little)}"


def has_little_noise(formula: Formula, pair: Pair) -> bool:
    """Whether the mean of ν over the steps, as a formula has it, is at most `MOST_NOISE`."""
    return Formula(formula.noise, lambda noise: noise).predict(pair) <= progress.MOST_NOISE


def _worst(fit: Fit, pairs: Sequence[Pair]) -> Entry:
    at = max(range(len(pairs)), key=lambda one: abs(fit.misses[one]))
    return Entry(_signed(fit.misses[at]), " ".join(pairs[at].cell))


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _along(results: Results, pairs: Sequence[Pair]) -> str:
    misses = [
        BEST.predict(pair, until=step) - measured
        for pair in pairs
        for step, measured in progress.progress_along(results, pair)
        if step < TASKS[pair.cell.task].steps
    ]
    if not misses:
        return "No point of a curve before the end can be compared."
    near = sum(abs(miss) <= progress.TOLERANCE for miss in misses)
    rms = math.sqrt(fmean(miss * miss for miss in misses))
    return (
        f"On the way, by dense's own curve: {near} of {len(misses)} points of the decided "
        f"settings' curves are within 0.1, rms {rms:.3f}, mean {_signed(fmean(misses))} "
        "(predicted less measured)."
    )


def _pairs_table(pairs: Sequence[Pair]) -> Table:
    cautious = Formula(progress.total, progress.at_dense_rate)
    rows = []
    for pair in pairs:
        predicted = BEST.predict(pair)
        miss = predicted - pair.measured
        off = pair.is_decided and abs(miss) > progress.TOLERANCE
        error = "one seed" if math.isnan(pair.error) else f"± {pair.error:.3f}"
        rows.append(
            (
                Entry(pair.cell.task),
                Entry(f"{SCHEMES[pair.cell.scheme].label}, {pair.cell.ratio}"),
                Entry(f"{Formula(BEST.noise, lambda noise: noise).predict(pair):.3f}"),
                Entry(f"{pair.measured:.3f}", f"{error}, {text.count(pair.seeds, 'pair')}"),
                Entry(f"{predicted:.3f}"),
                Entry(_signed(miss), "" if pair.is_decided else "undecided", "bad" if off else ""),
                Entry(f"{cautious.predict(pair):.3f}"),
            )
        )
    head = ("task", "scheme", "ν", "measured", "1/(1 + ν)", "miss", "1 − V/D")
    caption = "Means over the steps; ν = Σ min(V, D) / Σ D. Below a measured value its error."
    return Table(head, tuple(rows), 2, caption=caption)
