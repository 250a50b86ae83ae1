r"""Bootstrap intervals for measures of calibration.

Rows are drawn with replacement, but never the rows themselves: what is resampled is additive.

- Measures of the predicted class are functions of counts and confidence sums in cells
  (`BinStats`). A bootstrap sample makes the counts multinomial, which is exact; the confidence sum
  of a cell is drawn given its count (see `BinStats.resample`). Binned measures use their own bins;
  measures without bins use one cell per distinct confidence, or 2,048 equal-mass cells.
- Measures of all classes and mean scores are sums over rows. Rows are put at random into 500 parts
  and the parts are resampled (with fewer rows, each row is a part: the ordinary bootstrap). The
  width so found has a relative standard error of about 3%.
- Anything else is computed again on resampled rows.

**Which interval.** A calibration error cannot be negative, and noise in the bins only adds to it:
the bootstrap sees the noise twice, so its percentiles lie *above* the truth (for a calibrated
model the percentile interval misses always). The interval here is the basic one, reflected about
the estimate and so rid of that bias, with two changes. The quantiles are those of the measure
*linearised* at the data (its difference quotient towards each replicate), because folding at zero
would narrow them. And the lower end is 0 unless the measure exceeds the 97.5% quantile of what a
calibrated model with the same confidences would show (consistency resampling, Broecker and Smith
2007). The estimate itself may therefore lie above its interval: then most of it is bias. In
simulations of 300 to 100,000 rows with true ECE from 0 to 0.1 the 95% interval of the ECE covered
in 91 to 98% of 300 runs (percentile interval: 0 to 96%), those of the other measures of the
predicted class, at 1,000 rows, in 89 to 98% of 100 runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri as norm_quantile

from workbench.calibration import kernels, measures
from workbench.calibration.bins import (
    BinStats,
    TopLabel,
    bin_index,
    bin_statistics,
    equal_mass_edges,
    top_label,
)
from workbench.lab import checks

FINE_CELLS = 2048
GROUPS = 500
_STEP = 0.01  # of the difference quotient that linearises a measure at the data

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]  # count, total -> one number each


class Interval(NamedTuple):
    """An estimate with a bootstrap interval for the quantity it estimates."""

    value: float
    low: float
    high: float


def interval(
    measure: Callable[..., Any] | str,
    probs: Any,
    labels: Any,
    *,
    n: int = 1000,
    level: float = 0.95,
    random_state: np.random.Generator | int | None = 0,
    **settings: Any,
) -> Interval:
    """A measure with its bootstrap interval.

    Args:
        measure: a function of `workbench.calibration.measures`, its name in `MEASURES`, or any
            callable of (probs, labels) that returns a number.
        probs: (rows, k) probabilities.
        labels: (rows,) class indices; for `ood_auroc` the probabilities of the foreign rows.
        n: bootstrap replicates.
        level: coverage aimed at.
        random_state: seed or NumPy generator.
        settings: passed on to the measure, e.g. `bins=15`.
    """
    if isinstance(measure, str):
        measure = measures.MEASURES[checks.one_of(measure, measures.MEASURES, "measure")]
    n, rng = checks.count(n, "n", minimum=2), checks.as_rng(random_state)
    tails = (1 - checks.fraction(level, "level", zero=False, one=False)) / 2
    if measure in _BINNED:
        return _binned(measure, top_label(probs, labels), n, tails, rng, **settings)
    if measure in _POINTWISE:
        return _pointwise(measure, top_label(probs, labels), n, tails, rng, **settings)
    if measure in (measures.classwise_ece, measures.top_label_ece):
        return _classwise(measure, probs, labels, n, tails, rng, **settings)
    if measure in (measures.nll, measures.brier):
        return _mean(measure, probs, labels, n, tails, rng)
    if measure is measures.ood_auroc:
        return _auroc(probs, labels, n, tails, rng)
    return _rows(measure, probs, labels, n, tails, rng, settings)


def ece_interval(
    stats: BinStats,
    norm: measures.Norm = "l1",
    *,
    n: int = 1000,
    level: float = 0.95,
    random_state: np.random.Generator | int | None = 0,
) -> Interval:
    """Interval of the calibration error in some norm, from its binned statistics alone."""
    rng, tails = checks.as_rng(random_state), (1 - level) / 2

    def statistic(count: np.ndarray, total: np.ndarray) -> np.ndarray:
        return measures.gap_error(count, total, norm)

    return _from_cells(stats, statistic, n, tails, rng)


def closed_form(stats: BinStats, norm: measures.Norm = "l1", *, level: float = 0.95) -> Interval:
    r"""Interval of the calibration error without resampling, for figures that follow a slider.

    With $s_b^2 = \bar a_b(1-\bar a_b)/(n_b-1)$ the variance of a bin's accuracy and $w_b = n_b/n$:

    - "l1": the debiased estimate $\pm z\,(\sum_b w_b^2 s_b^2)^{1/2}$; the lower end is 0 unless the
      error exceeds mean plus z standard deviations of a calibrated model's.
    - "l2": root of the debiased $\sum_b w_b(g_b^2 - s_b^2) \pm z\,(\sum_b w_b^2(4g_b^2s_b^2 +
      2s_b^4))^{1/2}$.
    - "max": largest $|g_b| \mp z_B s_b$ over the B bins, $z_B$ by Bonferroni.
    """
    full = stats.size > 0
    size, accuracy, gap = stats.size[full], stats.accuracy[full], np.abs(stats.gap[full])
    weight, tail = size / stats.n, (1 + level) / 2
    s2 = accuracy * (1 - accuracy) / np.maximum(size - 1, 1)
    z, value = norm_quantile(tail), float(measures.gap_error(stats.count, stats.total, norm))
    if norm == "max":
        reach = norm_quantile(1 - (1 - tail) / len(size)) * np.sqrt(s2)
        return Interval(value, max(0.0, float((gap - reach).max())), float((gap + reach).max()))
    if norm == "l2":
        centre = (weight * (gap**2 - s2)).sum()
        reach = z * np.sqrt((weight**2 * (4 * gap**2 * s2 + 2 * s2**2)).sum())
        low, high = np.sqrt(np.maximum([centre - reach, centre + reach], 0.0))
        return Interval(value, float(low), float(high))
    centre = 2 * value - measures.folded_mean(gap, s2) @ weight
    reach = z * np.sqrt((weight**2 * s2).sum())
    spread = np.maximum(stats.total.sum(1) - stats.square.sum(1), 0.0)
    noise = np.sqrt(2 / np.pi) * np.sqrt(spread).sum()
    noise += z * np.sqrt((1 - 2 / np.pi) * spread.sum())
    low = 0.0 if value <= noise / stats.n else max(0.0, centre - reach)
    return Interval(value, float(low), float(max(0.0, centre + reach)))


# ---- from cells


def _from_cells(
    stats: BinStats,
    statistic: Statistic,
    n: int,
    tails: float,
    rng: np.random.Generator,
    *,
    value: float | None = None,
    spread: bool = True,
) -> Interval:
    count, total = stats.resample(n, rng, spread=spread)
    plain = float(statistic(stats.count, stats.total))
    value = plain if value is None else value
    bias = statistic(count, total).mean() - plain
    near = [whole + _STEP * (part - whole)
            for whole, part in ((stats.count, count), (stats.total, total))]  # fmt: skip
    draws = plain + (statistic(*near) - plain) / _STEP + bias
    calibrated = statistic(*_calibrated(stats, n, rng))
    return _basic(value, plain, draws, tails, calibrated)


def _calibrated(stats: BinStats, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Counts of right predictions if each had its confidence as its probability of being right."""
    mean, size = stats.total.sum(1), stats.size
    deviation = np.sqrt(np.maximum(mean - stats.square.sum(1), 0.0))
    right = mean + deviation * rng.standard_normal((n, len(mean)))
    total = np.stack([np.zeros_like(mean), mean], axis=-1)
    return np.stack([size - right, right], axis=-1), np.broadcast_to(total, (n, *total.shape))


def _basic(
    value: float,
    plain: float,
    draws: np.ndarray,
    tails: float,
    calibrated: np.ndarray | None = None,
    bounds: tuple[float, float] = (0.0, np.inf),
) -> Interval:
    """Reflect the quantiles of the draws (centred on `plain`) about the estimate."""
    below, above = np.quantile(draws, [tails, 1 - tails]) - plain
    low, high = np.clip([value - above, value - below], *bounds)
    if calibrated is not None and plain <= np.quantile(calibrated, 1 - tails):
        low = 0.0
    return Interval(float(value), float(low), float(high))


def _binned(
    measure: Callable[..., Any],
    top: TopLabel,
    n: int,
    tails: float,
    rng: np.random.Generator,
    *,
    bins: int = 15,
    **settings: Any,
) -> Interval:
    if measure is measures.oe:
        _no_more(settings)
        stats = measures.reliability_of(top, bins, "equal-width")
        return _from_cells(stats, measures.overconfidence, n, tails, rng)
    norm = "max" if measure is measures.mce else settings.pop("norm", "l1")
    checks.one_of(norm, measures.NORMS, "norm")
    scheme = "equal-mass" if measure is measures.aece else settings.pop("scheme", "equal-width")
    debias = settings.pop("debias", False)
    _no_more(settings)
    stats = measures.reliability_of(top, bins, scheme)
    found = ece_interval(stats, norm, n=n, level=1 - 2 * tails, random_state=rng)
    return found._replace(value=measures.debiased_error(stats, norm)) if debias else found


def fine_cells(top: TopLabel) -> BinStats:
    """A cell per distinct confidence, or `FINE_CELLS` equal-mass cells; none is empty."""
    distinct = np.unique(top.confidence)
    if len(distinct) <= FINE_CELLS:
        edges = np.concatenate([[0.0], distinct[:-1], [1.0]])
    else:
        edges = equal_mass_edges(top.confidence, FINE_CELLS)
    stats = bin_statistics(top.confidence, top.correct, edges)
    return stats.merge(np.flatnonzero(stats.size > 0))


def _pointwise(
    measure: Callable[..., Any],
    top: TopLabel,
    n: int,
    tails: float,
    rng: np.random.Generator,
    **settings: Any,
) -> Interval:
    points = measures.point_masses(top)
    stats = fine_cells(top)
    position, rows = stats.confidence, float(stats.n)
    width = checks.positive(settings.pop("width", kernels.WIDTH), "width")
    settings.pop("bins", None)
    _no_more(settings)
    bandwidth = measures.kde_bandwidth(points)
    run: dict[Callable[..., Any], Callable[..., np.ndarray]] = {
        measures.ks_error: lambda c, r, h, m, grid: kernels.ks(r, rows),
        measures.mmce: lambda c, r, h, m, grid: kernels.mmce(c, r, rows, width),
        measures.smooth_ece: lambda c, r, h, m, grid: kernels.smooth_ece(c, r, rows, cells=grid),
        measures.kde_ece: lambda c, r, h, m, grid: kernels.kde_ece(c, h, m, bandwidth, cells=grid),
    }

    def statistic(count: np.ndarray, total: np.ndarray) -> np.ndarray:
        right, size = count[..., 1], count.sum(-1)
        return run[measure](position, right - total.sum(-1), right, size, 1024)

    value = run[measure](points.position, points.residual, points.hits, points.count, 4096)
    return _from_cells(
        stats, _in_blocks(statistic), n, tails, rng, value=float(value), spread=False
    )


def _in_blocks(statistic: Statistic, rows: int = 100) -> Statistic:
    def blocked(count: np.ndarray, total: np.ndarray) -> np.ndarray:
        if count.ndim == 2:
            return statistic(count, total)
        starts = range(0, len(count), rows)
        parts = [statistic(count[i : i + rows], total[i : i + rows]) for i in starts]
        return np.concatenate(parts)

    return blocked


# ---- from sums over rows


def _parts(rows: int, limit: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    groups = min(rows, limit)
    return (np.arange(rows) if groups == rows else rng.integers(groups, size=rows)), groups


def _weights(groups: int, n: int, rng: np.random.Generator) -> Float[np.ndarray, "n groups"]:
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=n).astype(np.float64)


def _classwise(
    measure: Callable[..., Any],
    probs: Any,
    labels: Any,
    n: int,
    tails: float,
    rng: np.random.Generator,
    **settings: Any,
) -> Interval:
    collect = (
        measures.classwise_gaps if measure is measures.classwise_ece else measures.top_label_gaps
    )
    rows, bins = len(labels), settings.get("bins", 15)
    k = int(np.shape(probs)[1])
    group, groups = _parts(rows, max(50, min(GROUPS, 20_000_000 // (k * bins))), rng)
    gaps = collect(probs, labels, group=group, groups=groups, **settings)
    scale = rows * (k if measure is measures.classwise_ece else 1)
    sums = gaps.residual.sum(0)
    plain = np.abs(sums).sum() / scale
    drawn = _weights(groups, n, rng) @ gaps.residual
    bias = np.abs(drawn).sum(1).mean() / scale - plain
    draws = drawn @ np.sign(sums) / scale + bias
    noise = np.abs(rng.standard_normal((n, gaps.variance.size)) * np.sqrt(gaps.variance))
    return _basic(plain, plain, draws, tails, noise.sum(1) / scale)


def _mean(
    measure: Callable[..., Any],
    probs: Any,
    labels: Any,
    n: int,
    tails: float,
    rng: np.random.Generator,
) -> Interval:
    rows = measures.row_nll if measure is measures.nll else measures.row_brier
    return mean_interval(checks.to_numpy(rows(probs, labels)), n=n, tails=tails, rng=rng)


def mean_interval(
    values: Float[np.ndarray, " rows"], *, n: int, tails: float, rng: np.random.Generator
) -> Interval:
    """Interval of a mean over rows."""
    values = np.asarray(values, np.float64)
    group, groups = _parts(len(values), GROUPS, rng)
    weights = _weights(groups, n, rng)
    sums, sizes = np.bincount(group, values, groups), np.bincount(group, minlength=groups)
    mean = float(values.mean())
    draws = (weights @ sums) / (weights @ sizes)
    return _basic(mean, mean, draws, tails, bounds=(-np.inf, np.inf))


def _auroc(probs: Any, foreign: Any, n: int, tails: float, rng: np.random.Generator) -> Interval:
    value = measures.ood_auroc(probs, foreign)
    scores = [checks.to_numpy(checks.as_probs(p)).max(1) for p in (probs, foreign)]
    edges = equal_mass_edges(np.concatenate(scores), FINE_CELLS)
    counts = [np.bincount(bin_index(s, edges), minlength=len(edges) - 1) for s in scores]
    own, other = (rng.multinomial(c.sum(), c / c.sum(), size=n).astype(float) for c in counts)

    def share(own: np.ndarray, other: np.ndarray) -> np.ndarray:
        below = np.cumsum(other, axis=-1) - other / 2
        return (own * below).sum(-1) / own.sum(-1) / other.sum(-1)

    plain, replicates = float(share(*counts)), share(own, other)
    return _basic(value, plain, replicates, tails, bounds=(0.0, 1.0))


def _rows(
    measure: Callable[..., Any],
    probs: Any,
    labels: Any,
    n: int,
    tails: float,
    rng: np.random.Generator,
    settings: dict[str, Any],
) -> Interval:
    probs = checks.as_probs(probs)
    labels = checks.as_labels(labels, probs.shape[1])
    rows = checks.same_length(probs=probs, labels=labels)
    value = float(measure(probs, labels, **settings))
    draws = np.empty(n)
    for i in range(n):
        chosen = rng.integers(rows, size=rows)
        draws[i] = float(measure(probs[chosen], labels[chosen], **settings))
    return _basic(value, value, draws, tails, bounds=(-np.inf, np.inf))


def _no_more(settings: dict[str, Any]) -> None:
    if settings:
        raise TypeError(f"interval: the measure takes no {', '.join(map(repr, settings))}")


_BINNED = (measures.ece, measures.aece, measures.mce, measures.oe)
_POINTWISE = (measures.ks_error, measures.mmce, measures.smooth_ece, measures.kde_ece)
