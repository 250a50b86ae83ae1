r"""Multi-class losses that the papers of this family are compared with.

All take ``(logits, target)`` and ``weight``, ``ignore_index``, ``reduction`` as
`torch.nn.functional.cross_entropy`; see `conventions.labelled`. Those that depend on the logits
through the softmax accept probabilities as target.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.losses.conventions import Loss, fraction, labelled, positive

__all__ = [
    "GCE",
    "MAE",
    "NCERCE",
    "SCE",
    "CrammerSinger",
    "Focal",
    "WestonWatkins",
    "crammer_singer",
    "focal",
    "gce",
    "mae",
    "nce_rce",
    "sce",
    "weston_watkins",
]  # fmt: skip


def _nll(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def gce(logits: Tensor, target: Tensor, *, q: float = 0.7, **options: Any) -> Tensor:
    r"""Generalised cross-entropy $(1-p_y^q)/q$, between cross-entropy (q to 0) and 1 - p (q = 1).

    Args:
        logits: (n, k) or (n, k, d1, ...).
        target: class indices, or probabilities of the shape of ``logits``.
        q: in (0, 1], default the paper's 0.7.
        **options: ``weight``, ``ignore_index``, ``reduction``.

    Raises:
        ValueError: q lies outside (0, 1].

    Reference: Zhang and Sabuncu 2018, arXiv 1805.07836, eq. 6.
    """
    q = fraction(q, "q", zero=False)
    return labelled(
        logits,
        target,
        lambda h, y: -torch.expm1(-q * _nll(h, y)) / q,
        lambda h, r: -(r * torch.expm1(q * F.log_softmax(h, 1))).sum(1) / q,
        **options,
    )


def mae(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    r"""Mean absolute error between the softmax and the one-hot label, $2(1-p_y)$.

    Reference: Ghosh, Kumar and Sastry 2017, arXiv 1712.09482.
    """
    return 2 * gce(logits, target, q=1.0, **options)


def _rce(logits: Tensor, y: Tensor, log_zero: float) -> Tensor:
    """Reverse cross-entropy: log 0 of the label's other entries is a constant."""
    return log_zero * torch.expm1(-_nll(logits, y))


def sce(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    log_zero: float = -4.0,
    **options: Any,
) -> Tensor:
    r"""Symmetric cross-entropy $\alpha\,\mathrm{CE}+\beta\,\mathrm{RCE}$.

    $\mathrm{RCE}=-\sum_kp_k\log q_k=-A(1-p_y)$ with $\log0:=A$.

    Args:
        logits: (n, k) or (n, k, d1, ...).
        target: class indices.
        alpha: weight of cross-entropy; default the paper's for 10 classes.
        beta: weight of reverse cross-entropy.
        log_zero: A, negative.
        **options: ``weight``, ``ignore_index``, ``reduction``.

    Raises:
        ValueError: a weight is negative or ``log_zero`` is not.

    Reference: Wang et al. 2019, arXiv 1908.06112, eq. 6 and 7.
    """
    alpha, beta = positive(alpha, "alpha", zero=True), positive(beta, "beta", zero=True)
    floor = -positive(-log_zero, "-log_zero")
    return labelled(
        logits, target, lambda h, y: alpha * _nll(h, y) + beta * _rce(h, y, floor), **options
    )


def nce_rce(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    log_zero: float = -4.0,
    **options: Any,
) -> Tensor:
    r"""Active-passive loss $\alpha\,\mathrm{NCE}+\beta\,\mathrm{RCE}$.

    $\mathrm{NCE}=\log p_y/\sum_k\log p_k$ is cross-entropy divided by its sum over all labels.

    Reference: Ma et al. 2020, arXiv 2006.13554, eq. 6 and section 3.2. Arguments as of `sce`.
    """
    alpha, beta = positive(alpha, "alpha", zero=True), positive(beta, "beta", zero=True)
    floor = -positive(-log_zero, "-log_zero")

    def hard(h: Tensor, y: Tensor) -> Tensor:
        log_p = F.log_softmax(h, 1)
        normalised = log_p.gather(1, y[:, None])[:, 0] / log_p.sum(1)
        return alpha * normalised + beta * _rce(h, y, floor)

    return labelled(logits, target, hard, **options)


def focal(logits: Tensor, target: Tensor, *, gamma: float = 2.0, **options: Any) -> Tensor:
    r"""Focal loss $-(1-p_y)^\gamma\log p_y$.

    Args:
        logits: (n, k) or (n, k, d1, ...).
        target: class indices, or probabilities of the shape of ``logits``.
        gamma: focusing parameter, at least 0; 0 is cross-entropy.
        **options: ``weight``, ``ignore_index``, ``reduction``.

    Raises:
        ValueError: gamma is negative.

    Reference: Lin et al. 2017, arXiv 1708.02002, eq. 4.
    """
    gamma = positive(gamma, "gamma", zero=True)

    def of(log_p: Tensor) -> Tensor:
        # at p = 1 the slope of a power below one is infinite; 1 - p never needs to be smaller
        rest = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
        return -(rest**gamma) * log_p

    return labelled(
        logits,
        target,
        lambda h, y: of(-_nll(h, y)),
        lambda h, q: (q * of(F.log_softmax(h, 1))).sum(1),
        **options,
    )


def _margins(h: Tensor, y: Tensor, margin: float) -> Tensor:
    """h_k - h_y + margin, with 0 at the label itself."""
    at = y[:, None]
    return (h - h.gather(1, at) + margin).scatter(1, at, 0.0)


def crammer_singer(
    logits: Tensor, target: Tensor, *, margin: float = 1.0, **options: Any
) -> Tensor:
    r"""Multi-class hinge $\max_k(h_k-h_y+c\,1[k\ne y])$.

    Reference: Crammer and Singer 2001, eq. 4.
    """
    margin = positive(margin, "margin", zero=True)
    return labelled(logits, target, lambda h, y: _margins(h, y, margin).amax(1), **options)


def weston_watkins(
    logits: Tensor, target: Tensor, *, margin: float = 1.0, **options: Any
) -> Tensor:
    r"""Multi-class hinge $\sum_{k\ne y}(h_k-h_y+c)_+$, divided by nothing.

    Reference: Weston and Watkins 1998, eq. 5.
    """
    margin = positive(margin, "margin", zero=True)
    return labelled(logits, target, lambda h, y: _margins(h, y, margin).relu().sum(1), **options)


class GCE(Loss):
    """`gce` as a module."""

    function = staticmethod(gce)

    def __init__(self, *, q: float = 0.7, **options: Any) -> None:
        super().__init__(q=q, **options)


class MAE(Loss):
    """`mae` as a module."""

    function = staticmethod(mae)


class SCE(Loss):
    """`sce` as a module."""

    function = staticmethod(sce)

    def __init__(
        self, *, alpha: float = 0.1, beta: float = 1.0, log_zero: float = -4.0, **options: Any
    ) -> None:
        super().__init__(alpha=alpha, beta=beta, log_zero=log_zero, **options)


class NCERCE(Loss):
    """`nce_rce` as a module."""

    function = staticmethod(nce_rce)

    def __init__(
        self, *, alpha: float = 1.0, beta: float = 1.0, log_zero: float = -4.0, **options: Any
    ) -> None:
        super().__init__(alpha=alpha, beta=beta, log_zero=log_zero, **options)


class Focal(Loss):
    """`focal` as a module."""

    function = staticmethod(focal)

    def __init__(self, *, gamma: float = 2.0, **options: Any) -> None:
        super().__init__(gamma=gamma, **options)


class CrammerSinger(Loss):
    """`crammer_singer` as a module."""

    function = staticmethod(crammer_singer)

    def __init__(self, *, margin: float = 1.0, **options: Any) -> None:
        super().__init__(margin=margin, **options)


class WestonWatkins(Loss):
    """`weston_watkins` as a module."""

    function = staticmethod(weston_watkins)

    def __init__(self, *, margin: float = 1.0, **options: Any) -> None:
        super().__init__(margin=margin, **options)
