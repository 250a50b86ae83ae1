r"""The metric itself as a loss: soft counts of the confusion matrix through a steep sigmoid.

A metric such as F1 is a function of four counts, and a count of hard decisions has no gradient.
AnyLoss pushes each probability towards 0 or 1 with

$$\hat y_i = A(p_i) = \frac{1}{1+e^{-L(p_i-1/2)}}, \qquad L = 73,$$

counts as if $\hat y$ were decisions, $TP=\sum y_i\hat y_i$, $FN=\sum y_i-TP$, $FP=\sum\hat y_i-TP$,
$TN=n-\sum y_i-FP$, and minimises $1-\text{metric}(TP,FP,FN,TN)$ over a batch:

$$\frac{TP+TN}{n}, \qquad F_\beta=\frac{(1+\beta^2)TP}{\beta^2\sum y+\sum\hat y}, \qquad
  \sqrt{\frac{TP}{\sum y}\frac{TN}{n-\sum y}}, \qquad
  \frac12\Big(\frac{TP}{\sum y}+\frac{TN}{n-\sum y}\Big).$$

The gradient reaches the score behind $p_i=\sigma(z_i)$ through $L\hat y_i(1-\hat y_i)p_i(1-p_i)$
(`gradient_window`): at L = 73 it is 4.6 at $p=1/2$, 0.012 at 0.6 and 1e-12 at 0.9. A confident
mistake does not move.

A batch without a class says nothing about it: the rate of an absent class counts as 1 and has no
gradient, and F is then 0. The released network code divides batch sums by the size of the training
set instead of the batch's; `scaled_counts` reproduces that.

Reference: Han, Moniz and Chawla (2024), "AnyLoss: Transforming Classification Metrics into Loss
Functions", arXiv 2405.14745. Score-oriented losses: Marchetti et al. (2022), arXiv 2103.15522.
Bayesian sign test: Benavoli et al. (2017), JMLR 18, section 4.1.

*Not included*: the paper's 102 data sets (its results on them are read by the experiments), its
image experiment (a ResNet; `one_vs_rest` is what that needs) and its timing of learning curves. The
paper treats two classes; the macro average over classes is our extension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.lab import checks
from workbench.losses import streaming
from workbench.losses.conventions import floating, full, in_range, positive, single, within

Metric = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Counts(NamedTuple):
    """Soft counts of a confusion matrix, each of shape (...)."""

    tp: Tensor
    fp: Tensor
    fn: Tensor
    tn: Tensor


def amplify(p: Float[Tensor, "*s"], L: float | Tensor = 73.0) -> Float[Tensor, "*s"]:
    """Probabilities pushed towards 0 and 1, ``1 / (1 + exp(-L (p - 1/2)))``.

    Args:
        p: probabilities, any shape.
        L: steepness, positive: small ones forget p, infinity gives decisions; tensors broadcast.

    Raises:
        ValueError: ``L`` is not positive.

    Reference: Han et al. (2024), arXiv 2405.14745, the approximation function.
    """
    if not isinstance(L, Tensor):
        positive(L, "L")
    return torch.sigmoid((full(floating(p, "p")) - 0.5) * L)


def gradient_window(p: Float[Tensor, "*s"], L: float | Tensor = 73.0) -> Float[Tensor, "*s"]:
    r"""What reaches the score behind a probability, $L\hat y(1-\hat y)\,p(1-p)$."""
    hat, p = amplify(p, L), full(p)
    return L * hat * (1 - hat) * p * (1 - p)


def soft_confusion(
    p: Float[Tensor, "*s n"],
    y: Tensor,
    L: float | Tensor = 73.0,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Counts:
    """Soft counts over the last axis; leading axes are separate sets.

    Args:
        p: probability of the positive class, (..., n).
        y: labels 0 or 1 of the same shape, or probabilities: counts are linear in them.
        L: steepness of `amplify`.
        weight: how often each example counts, broadcast to p's shape; default 1.
        ignore_index: label, a whole number, of examples that do not count.

    Returns:
        ``(tp, fp, fn, tn)`` of shape (...); float32 for half precision.

    Raises:
        TypeError: p is no tensor of floating-point numbers. ValueError: shapes disagree, or a
            number lies outside [0, 1].
    """
    with single(floating(p, "p")):
        labels, share = _examples(p, y, weight, ignore_index)
        return _counts(amplify(p, L), labels, share)


def anyloss(
    p: Float[Tensor, "*s n"],
    y: Tensor,
    *,
    metric: str | Metric = "f1",
    beta: float = 1.0,
    L: float = 73.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Float[Tensor, "*s"]:
    """One minus a metric of the soft counts.

    Args:
        p: probability of the positive class, (..., n): one set of n examples per leading index.
        y: labels as of `soft_confusion`.
        metric: a name in `METRICS`, or any differentiable function of the four counts.
        beta: of ``f1`` and ``fbeta``; above 1 recall counts more.
        L, weight, ignore_index: as of `soft_confusion`.

    Returns:
        (...), between 0 and 1 for the named metrics (``mcc``: 0 to 2).

    Raises:
        TypeError, ValueError: as of `soft_confusion`, or the metric has no such name.

    Reference: Han et al. (2024), arXiv 2405.14745, the losses of accuracy, F-beta, G-mean and
    balanced accuracy.
    """
    counts = soft_confusion(p, y, L, weight=weight, ignore_index=ignore_index)
    return 1 - _metric(metric, beta)(*counts)


class AnyLoss(nn.Module):
    """`anyloss` as a module: ``AnyLoss(metric="balanced_accuracy")(p, y)``."""

    def __init__(
        self,
        *,
        metric: str | Metric = "f1",
        beta: float = 1.0,
        L: float = 73.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        _metric(metric, beta)
        self.metric, self.beta, self.L = metric, beta, positive(L, "L")
        self.ignore_index = ignore_index

    def forward(self, p: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of probabilities (..., n), shape (...)."""
        return anyloss(
            p, y, metric=self.metric, beta=self.beta, L=self.L, weight=weight,
            ignore_index=self.ignore_index,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Metric and steepness."""
        return f"metric={self.metric!r}, beta={self.beta:g}, L={self.L:g}"


def one_vs_rest(
    logits: Float[Tensor, "*s n k"],
    y: Tensor,
    *,
    metric: str | Metric = "f1",
    beta: float = 1.0,
    L: float = 73.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Float[Tensor, "*s"]:
    """Our extension to k classes: the mean over classes of each class's loss against the rest.

    Probabilities are the softmax of the logits; at most one class of a row exceeds one half, as one
    decision does. Large inputs are counted in blocks of rows, with exact gradients.

    Args:
        logits: (..., n, k).
        y: class indices (..., n).
        metric, beta, L: as of `anyloss`.
        weight: (k,), of each class in the mean; default equal.
        ignore_index: class index of rows that do not count.

    Raises:
        TypeError, ValueError: an argument has the wrong kind, shape or range.
    """
    floating(logits, "logits")
    if logits.ndim < 2 or y.shape != logits.shape[:-1]:
        raise ValueError(
            f"y: expected the shape of logits (..., n, k) without k, got {tuple(y.shape)} beside "
            f"{tuple(logits.shape)}"
        )
    positive(L, "L")
    classes = logits.shape[-1]
    with single(logits):
        kept = y != ignore_index
        labels = torch.where(kept, y, 0)
        in_range(labels, classes, "y")

        def totals(h: Tensor, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            hat = torch.sigmoid((full(h).softmax(-1) - 0.5) * L)
            own = hat.gather(-1, c[..., None])[..., 0] * w
            hits = torch.zeros_like(hat[..., 0, :]).scatter_add(-1, c, own)
            return (w[..., None, :] @ hat)[..., 0, :], hits

        def slope(h: Tensor, grads: tuple[Tensor, ...], c: Tensor, w: Tensor) -> Tensor:
            p, at = full(h).softmax(-1), c[:, None]
            hat = p.mul(L).sub_(L / 2).sigmoid_()
            own = hat.gather(1, at)
            steep = torch.addcmul(hat, hat, hat, value=-1).mul_(grads[0])
            steep.scatter_add_(1, at, own * (1 - own) * grads[1][at])
            return streaming.through_softmax(p, steep.mul_(L * w[:, None]))

        share = kept.to(full(logits).dtype)
        predicted, tp = streaming.sums(totals, logits, labels, share, slope=slope)
        support = torch.zeros_like(tp).scatter_add(-1, labels, share)
        fp = predicted - tp
        tn = share.sum(-1, keepdim=True) - support - fp
        losses = 1 - _metric(metric, beta)(tp, fp, support - tp, tn)
        if weight is None:
            return losses.mean(-1)
        if tuple(weight.shape) != (classes,):
            raise ValueError(f"weight: expected ({classes},), got {tuple(weight.shape)}")
        return (losses * weight.to(losses)).sum(-1) / weight.to(losses).sum()


def score_oriented(
    p: Float[Tensor, "*s n"],
    y: Tensor,
    *,
    metric: str | Metric = "f1",
    beta: float = 1.0,
    delta: float | None = None,
    weight: Tensor | None = None,
) -> Float[Tensor, "*s"]:
    r"""Score-oriented loss: counts expected under a random threshold with distribution function F.

    $\hat y=F(p)$ takes the place of $A(p)$: the uniform threshold gives $F(p)=p$, the raised cosine
    on $[1/2-\delta,1/2+\delta]$ gives $F=\frac12(1+u+\sin(\pi u)/\pi)$ with $u=(p-1/2)/\delta$ cut
    to [-1, 1].

    Args:
        p, y, metric, beta, weight: as of `anyloss`.
        delta: half width of the raised cosine, at most 1/2; None for the uniform threshold.

    Reference: Marchetti et al. (2022), arXiv 2103.15522, equations for the expected matrix.
    """
    with single(floating(p, "p")):
        labels, share = _examples(p, y, weight, None)
        hat = full(p)
        if delta is not None:
            checks.fraction(delta, "delta", zero=False)
            u = ((hat - 0.5) / delta).clamp(-1, 1)
            hat = (1 + u + torch.sin(math.pi * u) / math.pi) / 2
        return 1 - _metric(metric, beta)(*_counts(hat, labels, share))


def scaled_counts(counts: Counts, n: float) -> Counts:
    """Counts as the released network code takes them: TN from the size n of the training set.

    Sums over a batch stand beside it, so balanced accuracy and G-mean see specificities near
    1 whatever the model does.
    """
    tp, fp, fn, _ = counts
    return Counts(tp, fp, fn, n - tp - fn - fp)


def bayesian_sign_test(
    differences: Any, rope: float = 0.01, *, draws: int = 50_000, random_state: Any = 0
) -> tuple[float, float, float]:
    """Probability that the first, neither or the second of two methods is better most often.

    Counts of differences below, within and above [-rope, rope] with a prior observation within give
    a Dirichlet posterior; returned is how often each of the three is the most probable.

    Args:
        differences: (n,) second minus first, one per data set.
        rope: half width of what counts as no difference.
        draws: samples of the posterior.
        random_state: seed or generator.

    Returns:
        ``(first, neither, second)``, which sum to 1.

    Reference: Benavoli et al. (2017), JMLR 18, section 4.1; the paper uses it with rope 0.01.
    """
    d = np.asarray(checks.as_floats(differences, "differences", ndim=1))
    checks.positive(rope, "rope", zero=True)
    counts = np.array([(d < -rope).sum(), (np.abs(d) <= rope).sum() + 1, (d > rope).sum()])
    rng = checks.as_rng(random_state)
    best = rng.dirichlet(counts + 1e-4, checks.count(draws, "draws")).argmax(1)
    first, neither, second = np.bincount(best, minlength=3) / draws
    return float(first), float(neither), float(second)


# --- metrics of the four counts ------------------------------------------------------------------


def _rate(hits: Tensor, total: Tensor) -> Tensor:
    """Share of a class that is met; 1 where the class is absent."""
    return torch.where(total > 0, hits / torch.where(total > 0, total, 1), 1)


def _root(values: Tensor) -> Tensor:
    """Square root whose slope stays finite at 0."""
    return values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()


def _accuracy(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return (tp + tn) / (tp + fp + fn + tn)


def _balanced(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return (_rate(tp, tp + fn) + _rate(tn, tn + fp)) / 2


def _gmean(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _root(_rate(tp, tp + fn)) * _root(_rate(tn, tn + fp))


def _jaccard(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return tp / (tp + fp + fn).clamp(min=torch.finfo(tp.dtype).tiny)


def _mcc(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    scale = _root(tp + fp) * _root(tp + fn) * _root(tn + fp) * _root(tn + fn)
    return (tp * tn - fp * fn) / scale


def f_beta(beta: float) -> Metric:
    """The metric F-beta of the four counts."""
    square = positive(beta, "beta") ** 2

    def metric(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
        below = (1 + square) * tp + square * fn + fp
        return (1 + square) * tp / below.clamp(min=torch.finfo(tp.dtype).tiny)

    return metric


METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced,
    "gmean": _gmean,
    "jaccard": _jaccard,
    "mcc": _mcc,
}
"""Named metrics of ``(tp, fp, fn, tn)``, beside ``f1`` and ``fbeta``."""


def _metric(metric: str | Metric, beta: float) -> Metric:
    if callable(metric):
        return metric
    if checks.one_of(metric, ("f1", "fbeta", *METRICS), "metric") in METRICS:
        return METRICS[metric]
    return f_beta(beta)


def _examples(
    p: Tensor, y: Tensor, weight: Tensor | None, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """Labels and how often each example counts, both of p's shape."""
    if p.ndim == 0 or p.shape != y.shape:
        raise ValueError(f"y: expected the shape of p, {tuple(p.shape)}, got {tuple(y.shape)}")
    within(p, 0, 1, "p")
    values = full(p)
    share = torch.ones_like(values) if weight is None else weight.to(values).expand_as(values)
    labels = y.to(values)
    if ignore_index is not None and not y.is_floating_point():
        kept = y != ignore_index
        labels, share = torch.where(kept, labels, 0), torch.where(kept, share, 0)
    within(labels, 0, 1, "y")
    return labels, share


def _counts(hat: Tensor, labels: Tensor, share: Tensor) -> Counts:
    weighed = hat * share
    tp = (weighed * labels).sum(-1)
    fp = weighed.sum(-1) - tp
    positives = (labels * share).sum(-1)
    return Counts(tp, fp, positives - tp, share.sum(-1) - positives - fp)
