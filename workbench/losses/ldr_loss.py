r"""Cross-entropy as a worst case over labels, with a temperature that each example sets itself.

The given label may be wrong, so let an adversary weigh the violations of all labels by p, and pay
for leaving the uniform distribution:

$$\psi_\lambda(h,y)=\max_{p\in\Delta}\sum_kp_k(h_k-h_y+c\,1[k\ne y])-\lambda\,
  \mathrm{KL}(p\,\|\,1/K)=\lambda\log\frac1K\sum_ke^{(h_k-h_y+c\,1[k\ne y])/\lambda}.$$

The maximum is at $p=\mathrm{softmax}((h+c(1-e_y))/\lambda)$. As $\lambda\to0$ the loss becomes that
of Crammer and Singer (one rival counts), as $\lambda\to\infty$ the mean of all violations, which is
linear in h and symmetric: the sum over y does not depend on h, which makes it robust to noise. In
between it is cross-entropy at temperature $\lambda$ on scores whose label's entry is lowered by c:
$\psi_\lambda=\lambda\,\mathrm{CE}((h-c\,e_y)/\lambda,\,y)-\lambda\log K$.

ALDR-KL gives each training example its own $\lambda_i$,

$$\max_\lambda\;\psi_\lambda(h,y)-\frac{\alpha\log K}{2\lambda_0}(\lambda-\lambda_0)^2
  \quad\Rightarrow\quad \lambda=\lambda_0\Big(1-\frac{\mathrm{KL}(p\,\|\,1/K)}{\alpha\log K}\Big),$$

and alternates: p from the stored $\lambda_i$, then $\lambda_i$ from p, then a step of the network.
A flat p keeps $\lambda_i$ near $\lambda_0$, a peaked one lowers it, at most to
$\lambda_0(1-1/\alpha)$. Scores are brought to one scale first, $h\leftarrow Kh/\|h\|_1$.

Reference: Zhu, Ying and Yang (2023), "Label Distributionally Robust Losses for Multi-class
Classification: Consistency, Robustness and Adaptivity", ICML, arXiv 2112.14869; formulas also from
the authors' released code. Where the two differ `ALDR` says so.

*Not included*: the general member of the family with other divergences than KL and with top-k
uncertainty sets, whose losses the paper analyses and does not train with; class weights and ignored
rows in ALDR, where a row is an example with a memory of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab.checks import count, one_of
from workbench.losses.conventions import (
    REDUCTIONS,
    Loss,
    floating,
    full,
    in_range,
    labelled,
    positive,
    reduced,
    single,
)
from workbench.losses.streaming import rows

LEAST_SCALE = 1e-4  # a mean absolute score below this is not scaled up any further


def normalised(logits: Float[Tensor, "*n k"], *, softplus: bool = True) -> Float[Tensor, "*n k"]:
    r"""Scores of mean absolute value one, $Kh/\|h\|_1$.

    Args:
        logits: (..., k).
        softplus: make the scores positive first, as the paper does for LDR-KL.

    Reference: Zhu et al. 2023, arXiv 2112.14869, experiments.
    """
    h = F.softplus(logits) if softplus else logits
    size = h if softplus else h.abs()
    return h / size.mean(-1, keepdim=True).clamp_min(LEAST_SCALE)


def worst_case(
    logits: Float[Tensor, "*n k"],
    y: Int[Tensor, "*n"],
    *,
    lam: float | Float[Tensor, "*n"] = 10.0,
    margin: float = 0.1,
) -> Float[Tensor, "*n k"]:
    r"""The adversary's weights $p=\mathrm{softmax}((h+c(1-e_y))/\lambda)$.

    Args:
        logits: (..., k), used as they are: not normalised.
        y: (...), classes.
        lam: price of leaving the uniform distribution, one for all rows or one each.
        margin: c.

    Returns:
        (..., k), rows sum to one.

    Raises:
        ValueError: ``lam`` is not positive, ``margin`` negative, or a class out of range.
    """
    lam = lam if isinstance(lam, Tensor) else positive(lam, "lam")
    margin, y = positive(margin, "margin", zero=True), _classes(logits, y)
    return _lowered(full(logits), y, lam, margin).softmax(-1)


def ldr_kl(
    logits: Tensor,
    target: Tensor,
    *,
    lam: float = 10.0,
    margin: float = 0.1,
    normalize: bool = True,
    softplus: bool = True,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""$\psi_\lambda=\lambda\log\frac1K\sum_k\exp((h_k-h_y+c\,1[k\ne y])/\lambda)$.

    Args:
        logits: (n, k) or (n, k, d1, ...).
        target: class indices, or probabilities of the shape of ``logits``.
        lam: $\lambda$, in the units of the (normalised) scores; 1 with ``margin=0`` and
            ``normalize=False`` is cross-entropy minus log k.
        margin: c.
        normalize: bring the scores of each row to mean absolute value one first.
        softplus: make them positive before that; without effect where ``normalize`` is False.
        weight: (k,), as of ``torch.nn.functional.cross_entropy``.
        ignore_index: class index of rows that do not count.
        reduction: ``mean``, ``sum`` or ``none``.

    Returns:
        Scalar, or one loss a row for ``none``.

    Raises:
        ValueError: ``lam`` is not positive or ``margin`` negative; and as `conventions.labelled`.

    Reference: Zhu et al. 2023, arXiv 2112.14869, LDR-KL.
    """
    lam, margin = positive(lam, "lam"), positive(margin, "margin", zero=True)

    def scores(h: Tensor) -> Tensor:
        return normalised(h, softplus=softplus) if normalize else h

    return labelled(
        logits,
        target,
        lambda h, y: _psi(scores(h), y, lam, margin),
        lambda h, q: _expected(scores(h), q, lam, margin),
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
    )


def aldr_lambda(
    scores: Float[Tensor, "*n k"],
    lam: Float[Tensor, "*n"],
    *,
    lam0: float = 10.0,
    alpha: float = 2.0,
) -> Float[Tensor, "*n"]:
    r"""One alternating update, $\lambda=\lambda_0(1-\mathrm{KL}(p\|1/K)/(\alpha\log K))$.

    Leading dimensions are free, so that m networks can keep memories of shape (m, n).

    Args:
        scores: (..., k), normalised; $p=\mathrm{softmax}(\mathrm{scores}/\lambda)$.
        lam: (...), the stored values.
        lam0: what $\lambda$ is without adaptation, and its largest value.
        alpha: above 1; the smallest value is ``lam0 * (1 - 1 / alpha)``.

    Returns:
        (...), without a graph.

    Raises:
        ValueError: ``lam0`` is not positive or ``alpha`` not above 1.

    Reference: Zhu et al. 2023, arXiv 2112.14869, ALDR-KL.
    """
    lam0, alpha = positive(lam0, "lam0"), _alpha(alpha)
    log_p = (scores.detach() / lam[..., None]).log_softmax(-1)
    uniform = math.log(scores.shape[-1])
    divergence = (log_p.exp() * log_p).sum(-1) + uniform
    return lam0 * (1 - divergence / (alpha * uniform))


def aldr_kl(
    scores: Float[Tensor, "*n k"],
    y: Int[Tensor, "*n"],
    lam: Float[Tensor, "*n"],
    *,
    lam0: float = 10.0,
    alpha: float = 2.0,
    margin: float = 0.1,
) -> Float[Tensor, "*n"]:
    r"""$\psi_{\lambda_i}(h_i,y_i)-\frac{\alpha\log K}{2\lambda_0}(\lambda_i-\lambda_0)^2$, each.

    Args:
        scores: (..., k), normalised.
        y: (...), classes.
        lam: (...), one $\lambda$ an example, constant in back-propagation.
        lam0: centre of the penalty.
        alpha: its weight.
        margin: c.

    Returns:
        (...), one loss an example.

    Raises:
        ValueError: a hyper-parameter is out of range.
    """
    lam0, alpha = positive(lam0, "lam0"), _alpha(alpha)
    margin = positive(margin, "margin", zero=True)
    flat, fixed = scores.flatten(0, -2), lam.detach().flatten()

    def psi(h: Tensor, label: Tensor, each: Tensor) -> Tensor:
        return _psi(h, label, each, margin)

    values = rows(psi, flat, y.flatten(), fixed).view(lam.shape)
    penalty = alpha * math.log(scores.shape[-1]) / (2 * lam0)
    return values - penalty * (lam.detach() - lam0) ** 2


class LDRLoss(Loss):
    """`ldr_kl` as a module."""

    function = staticmethod(ldr_kl)

    def __init__(
        self,
        *,
        lam: float = 10.0,
        margin: float = 0.1,
        normalize: bool = True,
        softplus: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            lam=positive(lam, "lam"),
            margin=positive(margin, "margin", zero=True),
            normalize=normalize,
            softplus=softplus,
            **options,
        )


class ALDR(nn.Module):
    r"""ALDR-KL: the loss with a $\lambda$ for each training example, adapted as training goes.

    In training mode each call first renews the $\lambda_i$ of its rows, then computes the loss with
    them; in evaluation mode they stay. The state holds them.

    The released code takes p without the margin, $\mathrm{softmax}(h/\lambda)$, and so does this
    class; the exact maximiser has it. Pass ``exact=True`` for that one.

    Args:
        n_train: number of training examples.
        K: number of classes.
        lam0: $\lambda_0$; the paper tries 0.1, 1 and 10.
        alpha: above 1.
        margin: c.
        normalize: bring the scores of each row to mean absolute value one first.
        softplus: make them positive before that; the paper does so for CIFAR-100 only.
        exact: let p have the margin.
        reduction: ``mean``, ``sum`` or ``none``.

    Raises:
        ValueError: an argument is out of range.

    Reference: Zhu et al. 2023, arXiv 2112.14869, ALDR-KL.
    """

    lambdas: Tensor

    def __init__(
        self,
        n_train: int,
        K: int,
        lam0: float = 10.0,
        alpha: float = 2.0,
        margin: float = 0.1,
        *,
        normalize: bool = True,
        softplus: bool = False,
        exact: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.K = count(K, "K", minimum=2)
        self.lam0, self.alpha = positive(lam0, "lam0"), _alpha(alpha)
        self.margin = positive(margin, "margin", zero=True)
        self.normalize, self.softplus, self.exact = normalize, softplus, exact
        self.reduction = one_of(reduction, REDUCTIONS, "reduction")
        self.register_buffer("lambdas", torch.full((count(n_train, "n_train"),), self.lam0))

    def forward(
        self, logits: Float[Tensor, "n k"], y: Int[Tensor, " n"], idx: Int[Tensor, " n"]
    ) -> Tensor:
        """The loss of a batch.

        Args:
            logits: (n, K).
            y: (n,), classes.
            idx: (n,), which training examples these are: fixed numbers, not places in the batch.

        Returns:
            Scalar, or (n,) for the reduction ``none``.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: shapes disagree, or a class or example number is out of range.
        """
        y = _classes(logits, y)
        if logits.ndim != 2 or logits.shape[1] != self.K:
            raise ValueError(f"logits: expected (n, {self.K}), got {tuple(logits.shape)}")
        if idx.shape != y.shape:
            raise ValueError(f"idx: expected shape {tuple(y.shape)}, got {tuple(idx.shape)}")
        in_range(idx, len(self.lambdas), "idx")
        with single(logits):
            h = full(logits)
            h = normalised(h, softplus=self.softplus) if self.normalize else h
            lam = self.lambdas[idx].to(h)
            if self.training:
                seen = _lowered(h.detach(), y, 1.0, self.margin) if self.exact else h
                lam = aldr_lambda(seen, lam, lam0=self.lam0, alpha=self.alpha)
                self.lambdas[idx] = lam.to(self.lambdas)
            each = aldr_kl(h, y, lam, lam0=self.lam0, alpha=self.alpha, margin=self.margin)
            return reduced(each, self.reduction)

    def extra_repr(self) -> str:
        """Sizes and hyper-parameters."""
        return (
            f"{len(self.lambdas)}, {self.K}, lam0={self.lam0}, alpha={self.alpha}, "
            f"margin={self.margin}, reduction={self.reduction!r}"
        )


def _lowered(h: Tensor, y: Tensor, lam: float | Tensor, margin: float) -> Tensor:
    """Scores over lambda after the label's own was lowered by the margin."""
    each = lam[..., None] if isinstance(lam, Tensor) else lam
    z = h / each
    return z.scatter_add_(-1, y[..., None], torch.full_like(z[..., :1], -margin) / each)


def _psi(h: Tensor, y: Tensor, lam: float | Tensor, margin: float) -> Tensor:
    """(n, k), (n,), one lambda or (n,) -> (n,): cross-entropy of the lowered scores."""
    z = _lowered(h, y, lam, margin)
    return lam * (F.cross_entropy(z, y, reduction="none") - math.log(h.shape[1]))


def _expected(h: Tensor, q: Tensor, lam: float, margin: float) -> Tensor:
    r"""$\sum_yq_y\psi_\lambda(h,y)$ for all labels at once.

    The rivals of y are summed from both sides, before and after it: nothing is subtracted, so
    nothing cancels where one score dominates. (``logcumsumexp`` would do this in fewer words, but
    its second derivatives are wrong in torch 2.13.)
    """
    z = h / lam
    z = z - z.amax(1, keepdim=True).detach()
    e = z.exp()
    edge = e.new_zeros(len(e), 1)
    before = torch.cat([edge, e[:, :-1].cumsum(1)], 1)
    after = torch.cat([e[:, 1:].flip(1).cumsum(1).flip(1), edge], 1)
    rivals = (before + after).clamp_min(torch.finfo(e.dtype).tiny).log() + margin / lam
    each = torch.logaddexp(rivals, z) - z - math.log(h.shape[1])
    return lam * (q * each).sum(1)


def _classes(logits: Tensor, y: Tensor) -> Tensor:
    """The labels, after a look at shapes and ranges."""
    floating(logits, "logits")
    if logits.shape[:-1] != y.shape:
        raise ValueError(
            f"y: expected one class for each row of logits {tuple(logits.shape)}, "
            f"got shape {tuple(y.shape)}"
        )
    in_range(y, logits.shape[-1], "y")
    return y.long()


def _alpha(alpha: float) -> float:
    if not torch.compiler.is_compiling() and positive(alpha, "alpha") <= 1:
        raise ValueError(f"alpha: expected a number above 1, got {alpha:g}")
    return float(alpha)
