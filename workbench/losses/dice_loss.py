r"""Dice losses: one minus a soft F1, of each example or of the whole batch.

With p the probability of the positive class, y its label and $\gamma$ a smoothing term, the paper's
losses of one example are

$$DL = 1-\frac{2py+\gamma}{p^2+y^2+\gamma},\qquad
  TL = 1-\frac{py+\gamma}{py+\alpha\,p(1-y)+\beta\,(1-p)y+\gamma},\qquad
  DSC = 1-\frac{2(1-p)^\alpha p\,y+\gamma}{(1-p)^\alpha p+y+\gamma},$$

with $\alpha=\beta=\frac12$ in the second the dice of one example without squares, and
$(1-p)^\alpha$ in the third (self-adjusting dice) meant to weigh easy examples down. The third has a
trap: $(1-p)^\alpha p$ rises only up to $p=1/(1+\alpha)$, so with the paper's $\alpha=1$ a positive
costs least at p = 1/2, and a negative as little at p = 1 as at p = 0. ``detach_weight`` keeps the
weight out of the gradient, which restores the direction of every step.

Per example there is no F1 in these formulas; it is in the sums. `batch_dice` adds numerator and
denominator over the rows of a set and has, for class k of a softmax with $s_{ik} =
(1-p_{ik})^\alpha p_{ik}$,

$$L_k = 1-\frac{2\sum_i s_{ik}y_{ik}+\epsilon}{\sum_i s_{ik}+\sum_i y_{ik}+\epsilon},$$

which for hard predictions is one minus the F1 of class k. Only the three class sums are needed, so
large inputs go through in blocks, without one-hot labels and without a second copy.

Functions on probabilities carry the names of the formulas; ``softmax_*`` and the modules take
logits of K classes, one against the rest, and add the classes.

Reference: Li, Sun, Meng, Liang, Wu and Li (2020), "Dice Loss for Data-imbalanced NLP Tasks", ACL,
arXiv 1911.02855, table of losses; sums and hard negatives as the authors' released code.

*Not included*: the BERT taggers and readers of the paper (new in it are the losses), and three
habits of the released code. Its multi-class default sums the denominator over the batch but not the
numerator, which is neither of the paper's two forms (its gradient is that of `batch_dice` divided
by the batch size). Its threshold for hard negatives keeps two fewer than asked, and none at all
when labels come as a column, as its scripts pass them. Its power $\alpha=0.01$ gives NaN once p
rounds to 1; here log(1 - p) is taken from the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.lab import checks
from workbench.losses import conventions, streaming

Element = Callable[[Tensor, Tensor], Tensor]  # p, y -> losses, element by element
Sums = tuple[Tensor, ...]


# --- of one example ------------------------------------------------------------------------------


def dice_loss(
    p: Float[Tensor, "*n"],
    y: Tensor,
    *,
    gamma: float = 1.0,
    squared: bool = True,
    reduction: str = "mean",
    reduce: str | None = None,
) -> Tensor:
    r"""Dice loss of each example, $1-\frac{2py+\gamma}{p^2+y^2+\gamma}$.

    Args:
        p: probability of the positive class, any shape.
        y: labels in [0, 1], broadcasts with ``p``.
        gamma: smoothing; at 0 a negative costs 1 whatever its p (and NaN at p = 0).
        squared: False for $p+y$ in the denominator.
        reduction: ``mean``, ``sum`` or ``none``.
        reduce: another name of ``reduction``.

    Returns:
        Scalar, or one loss an example; float32 for half precision.

    Raises:
        TypeError: ``p`` is not a tensor of floating-point numbers.
        ValueError: ``p`` or ``y`` leaves [0, 1], or ``gamma`` is negative.

    Reference: Li et al. (2020), arXiv 1911.02855, DL.
    """
    _not_negative(gamma=gamma)
    return _each(p, y, _dice(gamma, squared), reduce or reduction)


def tversky_loss(
    p: Float[Tensor, "*n"],
    y: Tensor,
    alpha: float = 0.5,
    beta: float = 0.5,
    *,
    gamma: float = 1.0,
    reduction: str = "mean",
    reduce: str | None = None,
) -> Tensor:
    r"""Tversky loss of each example, $1-\frac{py+\gamma}{py+\alpha p(1-y)+\beta(1-p)y+\gamma}$.

    Args:
        p, y, reduction, reduce: as for `dice_loss`.
        alpha: price of false positives.
        beta: price of false negatives.
        gamma: smoothing.

    Reference: Li et al. (2020), arXiv 1911.02855, TL.
    """
    _not_negative(alpha=alpha, beta=beta, gamma=gamma)
    return _each(p, y, _tversky(alpha, beta, gamma), reduce or reduction)


def dsc_loss(
    p: Float[Tensor, "*n"],
    y: Tensor,
    alpha: float = 1.0,
    gamma: float = 1.0,
    detach_weight: bool = False,
    *,
    reduction: str = "mean",
    reduce: str | None = None,
) -> Tensor:
    r"""Self-adjusting dice loss of each example, $1-\frac{2wpy+\gamma}{wp+y+\gamma}$.

    The weight is $w=(1-p)^\alpha$.

    Args:
        p, y, reduction, reduce: as for `dice_loss`.
        alpha: how fast confident examples lose their weight; 0 is dice without squares.
        gamma: smoothing.
        detach_weight: treat w as a constant in the gradient; then a step never moves p away from
            its label, which with the formula as printed it does beyond $p=1/(1+\alpha)$.

    Reference: Li et al. (2020), arXiv 1911.02855, DSC.
    """
    _not_negative(alpha=alpha, gamma=gamma)
    plain = _dice(gamma, False)

    def of(p: Tensor, y: Tensor) -> Tensor:
        rest = 1 - p
        inside = rest > 0  # at p = 1 the slope of a power below one is infinite
        w = torch.where(inside, torch.where(inside, rest, 1) ** alpha, 0) if alpha else 1 + 0 * p
        return plain((w.detach() if detach_weight else w) * p, y)

    return _each(p, y, of, reduce or reduction)


# --- of one row of logits, classes added ---------------------------------------------------------


def softmax_dice(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 1.0,
    squared: bool = True,
    **options: Any,
) -> Tensor:
    """`dice_loss` of the softmax, one class against the rest, classes added.

    Args:
        logits: (n, K) or (n, K, d1, ...), at least two classes.
        target: class indices, or probabilities of the shape of ``logits``, whose loss is the
            expectation over them.
        gamma, squared: as for `dice_loss`.
        **options: ``weight``, ``ignore_index`` and ``reduction`` as for
            `torch.nn.functional.cross_entropy`.

    Raises:
        TypeError, ValueError: as `conventions.labelled`.
    """
    _not_negative(gamma=gamma)
    return _labelled(logits, target, _dice(gamma, squared), **options)


def softmax_tversky(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
    **options: Any,
) -> Tensor:
    """`tversky_loss` of the softmax; arguments as `softmax_dice` and `tversky_loss`."""
    _not_negative(alpha=alpha, beta=beta, gamma=gamma)
    return _labelled(logits, target, _tversky(alpha, beta, gamma), **options)


def softmax_dsc(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    gamma: float = 1.0,
    detach_weight: bool = False,
    **options: Any,
) -> Tensor:
    """`dsc_loss` of the softmax; arguments as `softmax_dice` and `dsc_loss`."""
    _not_negative(alpha=alpha, gamma=gamma)
    scores = partial(_adjusted, alpha=alpha, detach=detach_weight)
    return _labelled(logits, target, _dice(gamma, False), scores, **options)


# --- of a set ------------------------------------------------------------------------------------


def batch_dice(
    logits: Float[Tensor, "*sets n k"],
    y: Tensor,
    *,
    smooth: float = 1e-4,
    alpha: float = 0.0,
    ohem_ratio: float = 0.0,
    squared: bool = False,
    weight: Float[Tensor, " k"] | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
) -> Float[Tensor, "*sets"]:
    r"""Dice of the sums over a set: one minus a soft F1 of each class, classes added.

    $$\sum_k\bigg(1-\frac{2\sum_is_{ik}y_{ik}+\epsilon}{\sum_is_{ik}+\sum_iy_{ik}+\epsilon}\bigg),
      \qquad s=(1-p)^\alpha p,$$

    where p is the softmax, or the sigmoid of a single column. (To give probabilities, give their
    logarithms.) A class that has no row in the set costs nearly 1 and pushes its probability down
    everywhere; with ``ohem_ratio`` it costs nothing.

    Args:
        logits: rows of one set, or of several along leading dimensions.
        y: class indices (\*sets, n), 0 or 1 with one column; or probabilities of the shape of
            ``logits``.
        smooth: $\epsilon$, not negative; counts as half that many rows guessed right.
        alpha: power of the self-adjusting weight; the released scripts use 0.01.
        ohem_ratio: if above 0, each class keeps its positives and, of its negatives, only the
            ``floor(ohem_ratio * positives)`` with the highest p.
        squared: squares of s and y in the denominator, as the released scripts train.
        weight: of each class; a zero leaves a class out, such as the background.
        ignore_index: class index of rows that do not count.
        reduction: over classes: ``sum``, ``mean`` (weighted) or ``none`` (\*sets, k).

    Returns:
        One loss a set; float32 for half precision.

    Raises:
        TypeError: ``logits`` is not a tensor of floating-point numbers.
        ValueError: shapes disagree, labels or settings are out of range, or hard negatives are
            asked for with soft labels.

    Reference: Li et al. (2020), arXiv 1911.02855, and its released code; Milletari et al. (2016),
    arXiv 1606.04797, for the squared form.
    """
    conventions.floating(logits, "logits")
    _not_negative(smooth=smooth, alpha=alpha, ohem_ratio=ohem_ratio)
    checks.one_of(reduction, conventions.REDUCTIONS, "reduction")
    if logits.ndim < 2 or not logits.numel():
        raise ValueError(f"logits: expected (..., n, k), not empty, got {tuple(logits.shape)}")
    classes = logits.shape[-1]
    if weight is not None and tuple(weight.shape) != (classes,):
        raise ValueError(f"weight: expected ({classes},), got {tuple(weight.shape)}")
    power = 2 if squared else 1
    with conventions.single(logits):
        labels, kept = _labels(logits, y, ignore_index)
        if ohem_ratio:
            if y.is_floating_point():
                raise ValueError("y: expected class indices with ohem_ratio, got probabilities")
            full = conventions.full(logits)
            sums = _hardest(ohem_ratio, alpha, power, full, labels, kept)
        else:
            closed = alpha == 0 and not labels.is_floating_point()
            sums = streaming.sums(
                partial(_sums, alpha, power), logits, labels, kept,
                slope=partial(_slope, power) if closed else None,
            )  # fmt: skip
        both, predicted, labelled = sums
        values = 1 - (2 * both + smooth) / (predicted + labelled + smooth)
        if weight is not None:
            values = values * weight.to(values)
        if reduction == "none":
            return values
        total = values.sum(-1)
        if reduction == "sum":
            return total
        return total / (classes if weight is None else weight.to(values).sum())


# --- modules -------------------------------------------------------------------------------------


class DiceLoss(conventions.Loss):
    """`softmax_dice` as a module."""

    function = staticmethod(softmax_dice)

    def __init__(self, *, gamma: float = 1.0, squared: bool = True, **torch_options: Any) -> None:
        super().__init__(gamma=gamma, squared=squared, **torch_options)


class TverskyLoss(conventions.Loss):
    """`softmax_tversky` as a module."""

    function = staticmethod(softmax_tversky)

    def __init__(
        self, *, alpha: float = 0.5, beta: float = 0.5, gamma: float = 1.0, **torch_options: Any
    ) -> None:
        super().__init__(alpha=alpha, beta=beta, gamma=gamma, **torch_options)


class DSCLoss(conventions.Loss):
    """`softmax_dsc` as a module."""

    function = staticmethod(softmax_dsc)

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        gamma: float = 1.0,
        detach_weight: bool = False,
        **torch_options: Any,
    ) -> None:
        super().__init__(alpha=alpha, gamma=gamma, detach_weight=detach_weight, **torch_options)


class BatchDice(conventions.Loss):
    """`batch_dice` as a module; the reduction is over classes."""

    function = staticmethod(batch_dice)

    def __init__(
        self,
        *,
        smooth: float = 1e-4,
        alpha: float = 0.0,
        ohem_ratio: float = 0.0,
        squared: bool = False,
        reduction: str = "sum",
        **torch_options: Any,
    ) -> None:
        super().__init__(
            smooth=smooth, alpha=alpha, ohem_ratio=ohem_ratio, squared=squared,
            reduction=reduction, **torch_options,
        )  # fmt: skip


# --- within --------------------------------------------------------------------------------------


def _not_negative(**numbers: float) -> None:
    for name, value in numbers.items():
        conventions.positive(value, name, zero=True)


def _dice(gamma: float, squared: bool) -> Element:
    power = 2 if squared else 1

    def of(p: Tensor, y: Tensor) -> Tensor:
        return 1 - (2 * p * y + gamma) / (_raised(p, power) + _raised(y, power) + gamma)

    return of


def _tversky(alpha: float, beta: float, gamma: float) -> Element:
    def of(p: Tensor, y: Tensor) -> Tensor:
        missed = alpha * p * (1 - y) + beta * (1 - p) * y
        return missed / (p * y + missed + gamma)

    return of


def _raised(values: Tensor, power: int) -> Tensor:
    return values if power == 1 else values.square()


def _probabilities(h: Tensor) -> Tensor:
    return h.sigmoid() if h.shape[-1] == 1 else h.softmax(-1)


def _adjusted(h: Tensor, alpha: float, detach: bool = False) -> Tensor:
    r"""$(1-p)^\alpha p$ of logits."""
    p = _probabilities(h)
    if not alpha:
        return p
    # Below one the power magnifies the rounding of 1 - p (1e-8 to the 0.01 is 0.8, 0 gives 0).
    w = (1 - p) ** alpha if alpha >= 1 else (alpha * _log_rest(h, p)).exp()
    return (w.detach() if detach else w) * p


def _log_rest(h: Tensor, p: Tensor) -> Tensor:
    """log(1 - p): of the likeliest class as the share of the others, of these from p itself."""
    if h.shape[-1] == 1:
        return torch.nn.functional.logsigmoid(-h)
    top = h.argmax(-1, keepdim=True)
    others = h.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    small = p.scatter(-1, top, 0.0)
    return (-small).log1p().scatter(-1, top, others - h.logsumexp(-1, keepdim=True))


def _each(p: Tensor, y: Tensor, element: Element, reduction: str) -> Tensor:
    conventions.floating(p, "p")
    with conventions.single(p):
        p = conventions.full(p)
        y = torch.as_tensor(y, device=p.device).to(p.dtype)
        conventions.within(p, 0, 1, "p")
        conventions.within(y, 0, 1, "y")
        return conventions.reduced(element(p, y), reduction)


def _labelled(
    logits: Tensor,
    target: Tensor,
    element: Element,
    scores: Callable[[Tensor], Tensor] = _probabilities,
    **options: Any,
) -> Tensor:
    """Every class against the rest: the negatives' loss everywhere, then the label's put right."""

    conventions.floating(logits, "logits")
    if logits.ndim and logits.shape[0 if logits.ndim == 1 else 1] < 2:
        raise ValueError(
            "logits: expected two classes or more; for one output give its sigmoid to dice_loss"
        )

    def gain(p: Tensor) -> Tensor:
        return element(p, p.new_ones(())) - element(p, p.new_zeros(()))

    def hard(h: Tensor, y: Tensor) -> Tensor:
        p = scores(h)
        own = p.gather(1, y[:, None])[:, 0]
        return element(p, p.new_zeros(())).sum(1) + gain(own)

    def soft(h: Tensor, q: Tensor) -> Tensor:
        p = scores(h)
        return q.sum(1) * element(p, p.new_zeros(())).sum(1) + (q * gain(p)).sum(1)

    return conventions.labelled(logits, target, hard, soft, **options)


def _labels(logits: Tensor, y: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Class indices, or probabilities like the logits (one column: always), and which rows count.

    The probabilities of rows that do not count are 0.
    """
    if not checks.is_tensor(y):
        raise TypeError(f"y: expected a tensor, got {type(y).__name__}")
    wide = conventions.full(logits).dtype
    if y.is_floating_point():
        if y.shape != logits.shape:
            raise ValueError(
                f"y: expected probabilities of shape {tuple(logits.shape)}, got {tuple(y.shape)}"
            )
        conventions.within(y, 0, 1, "y")
        return y.to(wide), torch.ones(logits.shape[:-1], dtype=wide, device=logits.device)
    if y.shape != logits.shape[:-1]:
        raise ValueError(f"y: expected shape {tuple(logits.shape[:-1])}, got {tuple(y.shape)}")
    kept = y != ignore_index
    classes = torch.where(kept, y, 0).long()
    conventions.in_range(classes, max(2, logits.shape[-1]), "y")
    if logits.shape[-1] == 1:
        return classes[..., None].to(wide), kept.to(wide)
    return classes, kept.to(wide)


def _sums(alpha: float, power: int, h: Tensor, labels: Tensor, kept: Tensor) -> Sums:
    """Three sums a class: of s on its own rows, of s (squared) on all, and of the labels."""
    s = _adjusted(conventions.full(h), alpha)
    # a product with the row of ones and zeros is the masked sum, in one pass
    predicted = (kept[..., None, :] @ _raised(s, power))[..., 0, :]
    if labels.is_floating_point():
        return (s * labels).sum(-2), predicted, _raised(labels, power).sum(-2)
    own = s.gather(-1, labels[..., None])[..., 0] * kept
    nothing = torch.zeros_like(predicted)
    number = nothing.detach().scatter_add(-1, labels, kept)
    return nothing.scatter_add(-1, labels, own), predicted, number


def _slope(power: int, h: Tensor, grads: Sums, labels: Tensor, kept: Tensor) -> Tensor:
    """Gradient of the first two of `_sums` in the logits (n, k), at alpha = 0, for classes."""
    p, at = conventions.full(h).softmax(-1), labels[:, None]
    steep = p * (2 * grads[1]) if power == 2 else grads[1].expand_as(p).contiguous()
    steep.scatter_add_(1, at, grads[0][at])
    return streaming.through_softmax(p, steep.mul_(kept[:, None]))


def _hardest(
    ratio: float, alpha: float, power: int, h: Tensor, labels: Tensor, kept: Tensor
) -> Sums:
    """`_sums` over each class's positives and its hardest negatives."""
    p, s = _probabilities(h), _adjusted(h, alpha)
    counts = kept[..., None] > 0
    if labels.is_floating_point():  # one column
        positive = (labels > 0) & counts
    else:
        positive = (labels[..., None] == torch.arange(p.shape[-1], device=p.device)) & counts
    own, number = torch.where(positive, s, 0), positive.sum(-2)
    hardness = p.detach().masked_fill(positive | ~counts, -1)
    hardness, order = hardness.sort(dim=-2, descending=True)
    rank = torch.arange(p.shape[-2], device=p.device)[:, None]
    chosen = (rank < (ratio * number).floor()[..., None, :]) & (hardness >= 0)
    negatives = torch.where(chosen, s.gather(-2, order), 0)
    predicted = _raised(own, power).sum(-2) + _raised(negatives, power).sum(-2)
    return own.sum(-2), predicted, number.to(p)
