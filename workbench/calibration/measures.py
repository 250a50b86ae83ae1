r"""Measures of calibration for class probabilities.

With confidence $c_i = \max_k p_{ik}$, correctness $a_i = 1[\arg\max_k p_{ik} = y_i]$ and bins $B_b$
holding $n_b$ rows with means $\bar a_b, \bar c_b$:

| name                  | definition                                                             |
|-----------------------|------------------------------------------------------------------------|
| `ece`                 | $\sum_b \frac{n_b}{n} |\bar a_b - \bar c_b|$, or the 2- or max-norm     |
| `aece`                | the same over equal-mass bins                                          |
| `mce`                 | $\max_b |\bar a_b - \bar c_b|$                                         |
| `oe`                  | $\sum_b \frac{n_b}{n} \bar c_b \max(\bar c_b - \bar a_b, 0)$           |
| `classwise_ece`       | mean over k of the ECE of $(p_{ik}, 1[y_i = k])$                       |
| `top_label_ece`       | ECE within each predicted class                                        |
| `ks_error`            | $\max_j \frac1n |\sum_{i \le j} (a_{(i)} - c_{(i)})|$ by rising $c$    |
| `mmce`                | kernel mean of residual products (Laplacian kernel)                    |
| `smooth_ece`          | smECE, the ECE after smoothing at its own scale                        |
| `kde_ece`             | ECE with accuracy estimated by kernel density                          |
| `nll`, `brier`        | proper scores, with `brier_decomposition`                              |
| `ood_auroc`           | does confidence tell test data from foreign data?                      |

All take `probs` of shape (n, k) and `labels` of shape (n,) as NumPy, torch, pandas or lists and
return a float. `nll`, `brier` and `mmce` return a differentiable scalar when `probs` is a tensor
that requires a gradient. `workbench.calibration.intervals.interval` puts a bootstrap interval
round any of them.

References: Naeini et al. 2015 (ECE, MCE); Nguyen and O'Connor 2015 (equal mass); Nixon et al. 2019,
arXiv 1904.01685 (classwise); Gupta and Ramdas 2022, arXiv 2107.08353 (top-label); Thulasidasan et
al. 2019, arXiv 1905.11001 (OE); Kumar, Liang, Ma 2019, arXiv 1909.10155 (debiasing); Roelofs et al.
2022, arXiv 2012.08668 (adaptive sweep); Gupta et al. 2021, arXiv 2006.12800 (KS); Kumar, Sarawagi,
Jain 2018 (MMCE); Blasiok and Nakkiran 2023, arXiv 2309.12236 (smECE); Zhang, Kailkhura, Han 2020,
arXiv 2003.07329 (KDE); Murphy 1973 and Stephenson, Coelho, Jolliffe 2008 (Brier decomposition).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import erf
from scipy.stats import rankdata

from workbench.calibration import kernels
from workbench.calibration.bins import (
    BinStats,
    Scheme,
    TopLabel,
    bin_index,
    bin_statistics,
    equal_width_edges,
    scheme_edges,
    top_label,
)
from workbench.lab import checks

if TYPE_CHECKING:
    import torch

Norm = Literal["l1", "l2", "max"]
NORMS = ("l1", "l2", "max")


# ---- binned measures of the predicted class


def reliability(
    probs: Any, labels: Any, *, bins: int = 15, scheme: Scheme = "equal-width"
) -> BinStats:
    """Statistics per bin of confidence: what a reliability diagram draws."""
    return reliability_of(top_label(probs, labels), bins, scheme)


def reliability_of(top: TopLabel, bins: int, scheme: Scheme) -> BinStats:
    """`reliability` of confidences and correctness that are known already."""
    edges = scheme_edges(top.confidence, top.correct, bins, scheme)
    return bin_statistics(top.confidence, top.correct, edges)


def gap_error(
    count: Float[np.ndarray, "*r b 2"], total: Float[np.ndarray, "*r b 2"], norm: Norm = "l1"
) -> Float[np.ndarray, "*r"]:
    """Norm of the gaps between accuracy and confidence, weighted by the share of rows per bin.

    Takes the tables of `BinStats`, with leading axes for bootstrap replicates.
    """
    size, gap = count.sum(-1), np.abs(count[..., 1] - total.sum(-1))  # gap times size
    if norm == "l1":
        return gap.sum(-1) / size.sum(-1)
    mean = np.divide(gap, size, out=np.zeros_like(gap), where=size > 0)
    if norm == "max":
        return mean.max(-1)
    return np.sqrt((gap * mean).sum(-1) / size.sum(-1))


def debiased_error(stats: BinStats, norm: Norm = "l1") -> float:
    r"""`gap_error` less an estimate of its bias from the finite number of rows per bin.

    The accuracy of a bin of $n_b$ rows has variance $s_b^2 = \bar a_b(1-\bar a_b)/(n_b-1)$, which a
    plug-in estimate takes for miscalibration. For the 2-norm $s_b^2$ is subtracted from each
    squared gap; for the 1-norm, $2\,\mathrm{ECE} - \sum_b\frac{n_b}{n}E|N(\bar a_b-\bar c_b,s_b)|$,
    whose expectation is known in closed form. Not below zero.
    """
    if norm == "max":
        raise ValueError("norm: expected 'l1' or 'l2' with debias=True, got 'max'")
    full = stats.size > 0
    size, accuracy, gap = stats.size[full], stats.accuracy[full], stats.gap[full]
    weight = size / stats.n
    s2 = accuracy * (1 - accuracy) / np.maximum(size - 1, 1)
    if norm == "l2":
        return float(np.sqrt(max(0.0, (weight * (gap**2 - s2)).sum())))
    return float(max(0.0, weight @ (2 * np.abs(gap) - folded_mean(gap, s2))))


def folded_mean(
    mean: Float[np.ndarray, " b"], variance: Float[np.ndarray, " b"]
) -> Float[np.ndarray, " b"]:
    r"""$E|X|$ of normal X: $\sigma\sqrt{2/\pi}e^{-\mu^2/2\sigma^2} + \mu\,
    \mathrm{erf}(\mu/\sigma\sqrt2)$.
    """
    s = np.sqrt(np.maximum(variance, 1e-300))
    return s * np.sqrt(2 / np.pi) * np.exp(-((mean / s) ** 2) / 2) + mean * erf(
        mean / (s * np.sqrt(2))
    )


def ece(
    probs: Any,
    labels: Any,
    *,
    bins: int = 15,
    scheme: Scheme = "equal-width",
    norm: Norm = "l1",
    debias: bool = False,
) -> float:
    """Expected calibration error of the predicted class.

    Args:
        probs: (n, k) probabilities.
        labels: (n,) class indices.
        bins: number of bins; not used by the adaptive scheme.
        scheme: "equal-width", "equal-mass", or "adaptive": equal-mass bins, as many as keep the
            accuracy increasing (ECE-sweep).
        norm: "l1" (the usual ECE), "l2" (root of the mean squared gap), "max" (MCE).
        debias: subtract the estimator's bias (see `debiased_error`).
    """
    checks.one_of(norm, NORMS, "norm")
    stats = reliability(probs, labels, bins=bins, scheme=scheme)
    return (
        debiased_error(stats, norm) if debias else float(gap_error(stats.count, stats.total, norm))
    )


def aece(probs: Any, labels: Any, *, bins: int = 15) -> float:
    """ECE over equal-mass bins: every bin holds the same number of rows (ties aside)."""
    return ece(probs, labels, bins=bins, scheme="equal-mass")


def mce(probs: Any, labels: Any, *, bins: int = 15, scheme: Scheme = "equal-width") -> float:
    """Maximum calibration error: the largest gap of any bin that holds a row."""
    return ece(probs, labels, bins=bins, scheme=scheme, norm="max")


def overconfidence(
    count: Float[np.ndarray, "*r b 2"], total: Float[np.ndarray, "*r b 2"]
) -> Float[np.ndarray, "*r"]:
    """`oe` from the tables of `BinStats`, with leading axes for bootstrap replicates."""
    size, conf = count.sum(-1), total.sum(-1)
    excess = conf * np.maximum(conf - count[..., 1], 0.0)
    return np.divide(excess, size, out=np.zeros_like(conf), where=size > 0).sum(-1) / size.sum(-1)


def oe(probs: Any, labels: Any, *, bins: int = 15) -> float:
    """Overconfidence error: gaps where confidence exceeds accuracy, weighted by confidence."""
    stats = reliability(probs, labels, bins=bins)
    return float(overconfidence(stats.count, stats.total))


# ---- binned measures of all classes


class Gaps(NamedTuple):
    """Residual sums per part of the rows and bin, and their variance if calibrated, per bin."""

    residual: Float[np.ndarray, "groups cells"]
    variance: Float[np.ndarray, " cells"]


def classwise_gaps(
    probs: Any,
    labels: Any,
    *,
    bins: int = 15,
    scheme: Scheme = "equal-width",
    group: Any = 0,
    groups: int = 1,
) -> Gaps:
    r"""$\sum_{i \in b} (1[y_i=k] - p_{ik})$ for every class k and bin b of $p_{ik}$.

    `group` assigns each row to one of `groups` parts whose sums are kept apart.
    """
    checks.one_of(scheme, ("equal-width", "equal-mass"), "scheme")
    probs = checks.as_probs(probs)
    k = probs.shape[1]
    labels = checks.to_numpy(checks.as_labels(labels, k))
    checks.same_length(probs=probs, labels=labels)
    probs = checks.to_numpy(probs)
    part = np.asarray(group) * bins
    sums, variance = np.zeros((k, groups * bins)), np.zeros((k, bins))
    for c in range(k):
        column = np.minimum(probs[:, c], 1)
        index = bin_index(column, scheme_edges(column, column, bins, scheme))
        column = column.astype(np.float64)
        residual = (labels == c) - column
        sums[c] = np.bincount(index + part, residual, minlength=groups * bins)
        variance[c] = np.bincount(index, column * (1 - column), minlength=bins)
    return Gaps(sums.reshape(k, groups, bins).swapaxes(0, 1).reshape(groups, -1), variance.ravel())


def classwise_ece(
    probs: Any, labels: Any, *, bins: int = 15, scheme: Scheme = "equal-width"
) -> float:
    """Mean over the classes of the ECE of that class's probability.

    With `scheme="equal-mass"` this is the adaptive calibration error of Nixon et al. 2019.
    """
    gaps = classwise_gaps(probs, labels, bins=bins, scheme=scheme).residual
    return float(np.abs(gaps).sum() / (gaps.size // bins) / len(labels))


def top_label_gaps(
    probs: Any, labels: Any, *, bins: int = 15, group: Any = 0, groups: int = 1
) -> Gaps:
    r"""$\sum (a_i - c_i)$ over rows with predicted class k and confidence in bin b."""
    top = top_label(probs, labels)
    confidence = top.confidence.astype(np.float64)
    cells = bins * int(top.predicted.max() + 1)
    index = bin_index(top.confidence, equal_width_edges(bins)) + bins * top.predicted
    residual = np.bincount(
        index + cells * np.asarray(group), top.correct - confidence, minlength=groups * cells
    )
    variance = np.bincount(index, confidence * (1 - confidence), minlength=cells)
    return Gaps(residual.reshape(groups, cells), variance)


def top_label_ece(probs: Any, labels: Any, *, bins: int = 15) -> float:
    """ECE with the predicted class given: bins of confidence within each predicted class."""
    return float(np.abs(top_label_gaps(probs, labels, bins=bins).residual).sum() / len(labels))


# ---- measures without bins


class PointMasses(NamedTuple):
    """Distinct confidences in rising order; right predictions and rows at each."""

    position: Float[np.ndarray, " m"]
    hits: Float[np.ndarray, " m"]
    count: Float[np.ndarray, " m"]

    @property
    def residual(self) -> Float[np.ndarray, " m"]:
        """Sum of correctness minus confidence at each position."""
        return self.hits - self.count * self.position


def point_masses(top: TopLabel) -> PointMasses:
    """Rows of equal confidence joined, so that no measure depends on the order of tied rows."""
    order = np.argsort(top.confidence, kind="stable")
    ordered = top.confidence[order].astype(np.float64)
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] > ordered[:-1]]))
    hits = np.add.reduceat(top.correct[order].astype(np.float64), starts)
    return PointMasses(ordered[starts], hits, np.diff(starts, append=len(ordered)).astype(float))


def ks_error(probs: Any, labels: Any) -> float:
    """Kolmogorov-Smirnov calibration error: largest cumulated gap in order of confidence."""
    points = point_masses(top_label(probs, labels))
    return float(kernels.ks(points.residual, points.count.sum()))


def mmce(probs: Any, labels: Any, *, width: float = kernels.WIDTH) -> Any:
    """Maximum mean calibration error with the kernel exp(-|c - c'| / width), in O(n log n).

    Differentiable in `probs` (a tensor that requires a gradient), and then equal to the weighted
    form's training loss without class weights.
    """
    width = checks.positive(width, "width")
    if _wants_gradient(probs):
        return _mmce_tensor(probs, labels, width)
    points = point_masses(top_label(probs, labels))
    return float(kernels.mmce(points.position, points.residual, points.count.sum(), width))


def _mmce_tensor(probs: torch.Tensor, labels: Any, width: float) -> torch.Tensor:
    import torch

    probs, labels = _tensors(probs, labels)
    confidence, predicted = probs.double().max(1)
    confidence, order = confidence.sort()
    residual = (predicted == labels).double()[order] - confidence
    # The kernel's factors exp(+-c / width) stay finite in double precision for widths above 1/600.
    if width < 1 / 600:
        raise ValueError(f"width: expected at least 1/600 when differentiating, got {width:g}")
    grow = torch.exp((confidence - confidence.detach()[0]) / width)
    before = torch.cumsum(residual * grow, 0) - residual * grow
    total = residual.square().sum() + 2 * (residual * before / grow).sum()
    return (total.clamp_min(1e-30).sqrt() / len(probs)).to(probs.dtype)


def smooth_ece(probs: Any, labels: Any) -> float:
    """smECE: ECE of reflected-Gaussian smoothed residuals at the bandwidth equal to the result."""
    points = point_masses(top_label(probs, labels))
    return float(kernels.smooth_ece(points.position, points.residual, points.count.sum()))


def kde_bandwidth(points: PointMasses) -> float:
    """Standard deviation of the confidences of right predictions times (2n)^(-1/5)."""
    weight = points.hits if points.hits.sum() > 1 else points.count
    mean = np.average(points.position, weights=weight)
    deviation = np.sqrt(np.average(np.square(points.position - mean), weights=weight))
    return float(max(deviation, 1e-3) * (2 * points.count.sum()) ** -0.2)


def kde_ece(probs: Any, labels: Any) -> float:
    """ECE with the accuracy at each confidence estimated by mirrored triweight kernels."""
    points = point_masses(top_label(probs, labels))
    return float(kernels.kde_ece(points.position, points.hits, points.count, kde_bandwidth(points)))


# ---- proper scores


def row_nll(probs: Any, labels: Any) -> Any:
    """Minus the log of each row's probability of its label (floored at the smallest float)."""
    probs, labels = _rows(probs, labels)
    if checks.is_tensor(probs):
        chosen = probs.gather(1, labels[:, None])[:, 0]
        return -chosen.clamp_min(_tiny(probs)).log()
    chosen = probs[np.arange(len(probs)), labels]
    return -np.log(np.maximum(chosen, np.finfo(chosen.dtype).tiny).astype(np.float64))


def nll(probs: Any, labels: Any) -> Any:
    """Mean negative log-likelihood in nats; a probability of 0 counts as the smallest float."""
    return _mean(row_nll(probs, labels))


def row_brier(probs: Any, labels: Any) -> Any:
    """Squared distance of each row of probabilities from the label's unit vector."""
    probs, labels = _rows(probs, labels)
    if checks.is_tensor(probs):
        return probs.square().sum(1) - 2 * probs.gather(1, labels[:, None])[:, 0] + 1
    chosen = probs[np.arange(len(probs)), labels].astype(np.float64)
    return np.einsum("nk,nk->n", probs, probs).astype(np.float64) - 2 * chosen + 1


def brier(probs: Any, labels: Any) -> Any:
    """Mean squared distance between probabilities and labels over all classes, from 0 to 2."""
    return _mean(row_brier(probs, labels))


class BrierParts(NamedTuple):
    """brier = reliability - resolution + uncertainty + within_variance - within_covariance."""

    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    within_variance: float
    within_covariance: float


def brier_decomposition(
    probs: Any, labels: Any, *, bins: int = 15, scheme: Scheme = "equal-width"
) -> BrierParts:
    """Murphy's three parts of the Brier score, summed over the classes.

    With forecasts that vary within a bin the three do not add up; the two within-bin terms of
    Stephenson et al. 2008 make the decomposition exact.
    """
    checks.one_of(scheme, ("equal-width", "equal-mass"), "scheme")
    probs, labels = _rows(probs, labels)
    probs, labels = checks.to_numpy(probs), checks.to_numpy(labels)
    n, parts = len(labels), np.zeros(5)
    for c in range(probs.shape[1]):
        f, o = np.minimum(probs[:, c], 1), (labels == c).astype(np.float64)
        index = bin_index(f, scheme_edges(f, f, bins, scheme))
        f = f.astype(np.float64)
        sums = np.array([np.bincount(index, w) for w in (None, f, o, f * f, f * o)])
        sums = sums[:, sums[0] > 0]
        size, mean_f, mean_o = sums[0], sums[1] / sums[0], sums[2] / sums[0]
        base = o.mean()
        parts += [
            (size * (mean_f - mean_o) ** 2).sum() / n,
            (size * (mean_o - base) ** 2).sum() / n,
            base * (1 - base),
            (sums[3] - size * mean_f**2).sum() / n,
            2 * (sums[4] - size * mean_f * mean_o).sum() / n,
        ]
    score = parts[0] - parts[1] + parts[2] + parts[3] - parts[4]
    return BrierParts(float(score), *map(float, parts))


def ood_auroc(probs: Any, foreign: Any) -> float:
    """Probability that a test row is more confident than a foreign row (ties count a half)."""
    inside = checks.to_numpy(checks.as_probs(probs)).max(1)
    outside = checks.to_numpy(checks.as_probs(foreign, "foreign")).max(1)
    ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)]
    return float((ranks.mean() - (len(inside) + 1) / 2) / len(outside))


# ---- shared


def _wants_gradient(probs: Any) -> bool:
    return checks.is_tensor(probs) and probs.requires_grad


def _tensors(probs: torch.Tensor, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    probs = checks.as_probs(probs)
    labels = checks.as_labels(labels, probs.shape[1])
    checks.same_length(probs=probs, labels=labels)
    return probs, torch.as_tensor(labels, device=probs.device)


def _rows(probs: Any, labels: Any) -> tuple[Any, Any]:
    if checks.is_tensor(probs):
        return _tensors(probs, labels)
    probs = checks.as_probs(probs)
    labels = checks.to_numpy(checks.as_labels(labels, probs.shape[1]))
    checks.same_length(probs=probs, labels=labels)
    return probs, labels


def _mean(rows: Any) -> Any:
    if checks.is_tensor(rows) and rows.requires_grad:
        return rows.mean()
    return float(checks.to_numpy(rows).mean(dtype=np.float64))


def _tiny(probs: torch.Tensor) -> float:
    import torch

    return torch.finfo(probs.dtype).tiny


MEASURES = {
    "ece": ece,
    "aece": aece,
    "mce": mce,
    "oe": oe,
    "classwise_ece": classwise_ece,
    "top_label_ece": top_label_ece,
    "ks": ks_error,
    "mmce": mmce,
    "smooth_ece": smooth_ece,
    "kde_ece": kde_ece,
    "nll": nll,
    "brier": brier,
}
