r"""A loss of the standardised target score: blind to shift and scale, cheap for many classes.

The network's outputs $o \in \mathbb R^D$ are standardised over the classes and only the target's
place counts:

$$L = \frac1a\log\big(1 + e^{a(b - z_c)}\big), \qquad z_c = \frac{o_c - \mu}{\sigma}, \qquad
  \mu = \frac1D\sum_k o_k, \quad \sigma^2 = \frac1D\sum_k o_k^2 - \mu^2 .$$

$a$ and $b$ are tuned: small $a$ is nearly linear in $z_c$, large $a$ a hinge at $b$. A target score
above $b$ standard deviations costs little more, so small $b$ asks only for a place near the top
(top-k) and large $b$ for the first. $z_c \le \sqrt{D-1}$, whatever the network does: with
$b > \sqrt{D-1}$ the loss never saturates.

The loss depends on $\mu, \sigma, o_c$ alone, so it is *spherical*: `spherical.FactoredOutput`
trains the output layer exactly at a cost that does not grow with $D$. Two more losses of that
family are its rivals: squared error to the one-hot target, and the Taylor softmax, which replaces
$e^o$ by $1 + o + o^2/2 > 0$.

Not to be confused with the "z-loss" $(\log Z)^2$ that language models add to cross-entropy.

Reference: de Brébisson and Vincent (2016), "The Z-loss: a shift and scale invariant classification
loss belonging to the Spherical Family", arXiv 1604.08859.

*Not included*: the paper's recurrent and One Billion Word models, which need days of a GPU, and its
hierarchical softmax. The authors' released timing script computes $\log(1+e^{-z_c})$, that is
``a=1, b=0``, summed over the batch; here the mean is the default.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from workbench.losses.conventions import Loss, labelled, positive
from workbench.losses.spherical import (
    FactoredOutput,
    squared_form,
    standardised,
    taylor_form,
    z_curve,
    z_form,
)

__all__ = [
    "FactoredOutput",
    "SphericalMSELoss",
    "TaylorSoftmaxLoss",
    "ZLoss",
    "spherical_mse_loss",
    "taylor_softmax_loss",
    "z_loss",
    "z_scores",
]


def z_scores(logits: Tensor) -> Tensor:
    r"""Outputs standardised over the classes, $(o_k - \mu)/\sigma$; 0 where all are equal.

    Args:
        logits: (n, D).

    Returns:
        (n, D), each row of mean 0 and mean square 1.
    """
    # from the centred outputs: q / D - mu^2 would cancel where the mean is large
    centred = logits - logits.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    error = 8 * torch.finfo(logits.dtype).eps
    return standardised(centred, variance, error**2 * logits.square().mean(1, keepdim=True))


def z_loss(
    logits: Tensor,
    target: Tensor,
    *,
    a: float = 1.0,
    b: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Z-loss $\frac1a\log(1+e^{a(b-z_c)})$ with the arguments of torch's ``cross_entropy``.

    Args:
        logits: (n, D) or (n, D, d1, ...).
        target: class indices, or probabilities of the shape of ``logits``, over which the loss of
            each class is averaged.
        a: sharpness of the bend, positive.
        b: where it bends, in standard deviations; positive.
        weight: (D,), of each class.
        ignore_index: class index of rows that do not count.
        reduction: ``mean``, ``sum`` or ``none``.

    Returns:
        Scalar, or one loss a row for ``none``. A row of equal outputs costs ``log(1+exp(ab))/a``
        and has gradient 0.

    Raises:
        ValueError: ``a`` or ``b`` is not positive, or the shapes disagree.

    Reference: de Brébisson and Vincent (2016), arXiv 1604.08859, the definition of the Z-loss.
    """
    a, b = positive(a, "a"), positive(b, "b")

    def hard(o: Tensor, y: Tensor) -> Tensor:
        return z_curve(_at(z_scores(o), y), a, b)

    def soft(o: Tensor, q: Tensor) -> Tensor:
        return (q * z_curve(z_scores(o), a, b)).sum(1)

    return labelled(
        logits, target, hard, soft, weight=weight, ignore_index=ignore_index, reduction=reduction
    )


def taylor_softmax_loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    r"""Negative log of the Taylor softmax, $-\log\frac{1+o_c+o_c^2/2}{\sum_k(1+o_k+o_k^2/2)}$.

    The probabilities are positive for all outputs and sum to one, but a very negative output is as
    likely as a positive one.

    Args:
        logits: (n, D) or (n, D, d1, ...).
        target: class indices, or probabilities of the shape of ``logits``.
        **options: ``weight``, ``ignore_index``, ``reduction``.

    Reference: Vincent, de Brébisson and Bouthillier (2015), arXiv 1412.7091; de Brébisson and
    Vincent (2015), arXiv 1511.05042.
    """

    def log_terms(o: Tensor) -> Tensor:
        return torch.log1p(o * (1 + o / 2))

    def hard(o: Tensor, y: Tensor) -> Tensor:
        return torch.log((1 + o * (1 + o / 2)).sum(1)) - log_terms(_at(o, y))

    def soft(o: Tensor, q: Tensor) -> Tensor:
        total = torch.log((1 + o * (1 + o / 2)).sum(1))
        return (q * (total[:, None] - log_terms(o))).sum(1)

    return labelled(logits, target, hard, soft, **options)


def spherical_mse_loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    r"""Squared error to the one-hot target, $\sum_k(o_k-1[k=c])^2$, summed over the classes.

    Args:
        logits: (n, D) or (n, D, d1, ...).
        target: class indices, or probabilities of the shape of ``logits``.
        **options: ``weight``, ``ignore_index``, ``reduction``.

    Reference: Vincent, de Brébisson and Bouthillier (2015), arXiv 1412.7091.
    """

    def hard(o: Tensor, y: Tensor) -> Tensor:
        return o.square().sum(1) - 2 * _at(o, y) + 1

    def soft(o: Tensor, q: Tensor) -> Tensor:
        return q.sum(1) * (o.square().sum(1) + 1) - 2 * (q * o).sum(1)

    return labelled(logits, target, hard, soft, **options)


def _at(values: Tensor, y: Tensor) -> Tensor:
    return values.gather(1, y[:, None])[:, 0]


class ZLoss(Loss):
    """`z_loss` as a module; ``form`` is what `FactoredOutput` takes."""

    function = staticmethod(z_loss)
    a: float
    b: float

    def __init__(self, *, a: float = 1.0, b: float = 2.0, **options: Any) -> None:
        super().__init__(a=positive(a, "a"), b=positive(b, "b"), **options)

    @property
    def form(self) -> partial[Tensor]:
        """The loss in terms of the target's output, the sum and the sum of squares."""
        return partial(z_form, a=self.a, b=self.b)


class TaylorSoftmaxLoss(Loss):
    """`taylor_softmax_loss` as a module."""

    function = staticmethod(taylor_softmax_loss)
    form = staticmethod(taylor_form)


class SphericalMSELoss(Loss):
    """`spherical_mse_loss` as a module."""

    function = staticmethod(spherical_mse_loss)
    form = staticmethod(squared_form)
