r"""EnsLoss: why choose one loss? Draw a new calibrated one at every step.

Stochastic gradient descent sees a margin loss only through its slope: with $z_i=y_if(x_i)$ the
gradient of $\frac1b\sum_i\phi(z_i)$ is $\frac1b\sum_i\phi'(z_i)\,y_i\nabla f(x_i)$. A convex loss
is calibrated exactly when $\phi'(0)<0$, so any negative numbers $g_i$ that do not fall as the
margins rise are the slopes of a calibrated loss at this batch. Draw them:

$$\xi_i\sim N(0,1),\qquad g_i=-\min\big(BC_\lambda^{-1}(\xi_i),1\big),\qquad
  BC_\lambda^{-1}(\xi)=(1+\lambda\xi)_+^{1/\lambda}\ \ (e^\xi\text{ at }\lambda=0),$$

give the most negative to the smallest margin, the next to the next (convexity), divide by $z_i$
where $z_i>1$ (confident rows lose weight), and subtract $10^{-6}$ (no slope is 0). The step
descends $\frac1b\sum_ig_iz_i$ with $g$ held constant: its gradient is that of the drawn loss, its
value is not a loss and means nothing from one step to the next.

The paper asks for slopes that vanish faster than $1/z$, so that the loss is bounded below. The
factor $1/z$ of the released code is the borderline: its integral is $-\log z$, and the $10^{-6}$
keeps slopes from vanishing at all. It does no harm within a batch, which fixes the drawn loss at
its own margins only: beyond the largest it can be continued so that it is bounded.

`staircase` does the last three steps from given draws; `random_derivatives` draws first. `implied`
integrates the slopes, for those who want to see the loss. Leading dimensions are independent sets,
each with its own draws. `average_derivatives` replaces the draws by the quantiles of their
distribution: the same shapes without the chance, to tell what the randomness adds (ours).
`one_vs_rest` sums K binary problems (ours: the paper is about two classes).

Reference: Dai (2024), "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in
Classification", arXiv 2409.00908, Algorithm 1; code statmlben/ensLoss.

*Not included*: the searches over $\lambda$ that are commented out in the released training loop.
Baselines (logistic, hinge, exponential, focal) are in `margins`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.lab.checks import count, number, one_of
from workbench.losses import conventions

FLOOR = 1e-6
"""No slope is above minus this."""

Generator = torch.Generator | None


def magnitude(xi: Float[Tensor, "*n"], lam: float | Tensor = 0.0) -> Float[Tensor, "*n"]:
    r"""$\min(BC_\lambda^{-1}(\xi),1)$: how steep a drawn slope is, in [0, 1].

    Computed as $\exp\min(\log(1+\lambda\xi)_+/\lambda,0)$, which neither overflows nor cancels;
    where $1+\lambda\xi\le0$ it is 0 for $\lambda>0$ and 1 for $\lambda<0$, the formula's limits.

    Args:
        xi: draws of a standard normal.
        lam: lambda of the Box-Cox transformation; a tensor broadcasts against ``xi``.

    Reference: Dai (2024), arXiv 2409.00908, Algorithm 1.
    """
    lam = torch.as_tensor(lam, dtype=xi.dtype, device=xi.device)
    power = torch.log1p((lam * xi).clamp(min=-1)) / torch.where(lam == 0, 1, lam)
    return torch.where(lam == 0, xi, power).clamp(max=0).exp()


def staircase(
    z: Float[Tensor, "*sets n"], xi: Float[Tensor, "*sets n"], lam: float | Tensor = 0.0
) -> Float[Tensor, "*sets n"]:
    r"""Slopes of a calibrated convex loss at the margins z, from given draws.

    Args:
        z: margins; of equal ones the earlier gets the more negative slope.
        xi: draws, one a margin, in any order.
        lam: lambda, one for all or of shape (\*sets,) one a set.

    Returns:
        Slopes in [-1 - 1e-6, -1e-6] that do not fall as z rises; constants for autograd.

    Raises:
        ValueError: the shapes differ.

    Reference: Dai (2024), arXiv 2409.00908, Algorithm 1.
    """
    if z.shape != xi.shape:
        raise ValueError(f"xi: expected shape {tuple(z.shape)}, got {tuple(xi.shape)}")
    with torch.no_grad(), conventions.single(z):
        z, xi = conventions.full(z), conventions.full(xi)
        lam = lam[..., None] if isinstance(lam, Tensor) and lam.ndim else lam
        ascending = (-magnitude(xi, lam)).sort(-1).values
        slopes = torch.empty_like(ascending).scatter(-1, z.argsort(stable=True, dim=-1), ascending)
        return slopes / z.clamp(min=1) - FLOOR


def random_derivatives(
    z: Float[Tensor, "*sets n"], lam: float | Tensor = 0.0, generator: Generator = None
) -> Float[Tensor, "*sets n"]:
    r"""Slopes of a freshly drawn calibrated convex loss at the margins z.

    Args:
        z: margins y f(x).
        lam: lambda of the inverse Box-Cox transformation; the paper's default is 0.
        generator: of the draws; None takes torch's global one (and can be compiled).

    Returns:
        As `staircase`.

    Reference: Dai (2024), arXiv 2409.00908, Algorithm 1.
    """
    return staircase(z, _normal(z, generator), lam)


def average_derivatives(
    z: Float[Tensor, "*sets n"], lam: float | Tensor = 0.0
) -> Float[Tensor, "*sets n"]:
    """The slopes with every draw replaced by its place in the distribution: no chance left.

    The draws of a set of n are the normal quantiles at (i + 1/2) / n. Ours, as a control.
    """
    places = (torch.arange(z.shape[-1], device=z.device) + 0.5) / z.shape[-1]
    xi = torch.special.ndtri(places.to(conventions.full(z).dtype))
    return staircase(z, xi.expand(z.shape), lam)


def ensloss(
    scores: Float[Tensor, "*sets n"],
    y01: Tensor,
    *,
    lam: float | Tensor = 0.0,
    generator: Generator = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Pseudo-loss $\frac1n\sum_ig_iz_i$, whose gradient is that of a randomly drawn loss.

    $\partial/\partial f_i=y_ig_i/n$. Second derivatives are 0: give it to a first-order
    optimiser. For a curve to look at, evaluate a fixed loss or the accuracy.

    Args:
        scores: f(x); positive predicts class 1. Leading dimensions are independent sets.
        y01: labels 0 or 1, same shape, any dtype.
        lam: lambda of the inverse Box-Cox transformation, one for all or one a set.
        generator: of the draws; None takes torch's global one (and can be compiled).
        reduction: over n: ``mean``, ``sum`` or ``none``.

    Returns:
        One number a set, or (\*sets, n) for ``none``; float32 for half precision.

    Raises:
        TypeError: ``scores`` are not floating-point numbers.
        ValueError: shapes differ, the set is empty, or a label is neither 0 nor 1.

    Reference: Dai (2024), arXiv 2409.00908, Algorithm 1.
    """
    conventions.floating(scores, "scores")
    if y01.shape != scores.shape:
        raise ValueError(f"y01: expected shape {tuple(scores.shape)}, got {tuple(y01.shape)}")
    _labels(y01)
    one_of(reduction, conventions.REDUCTIONS, "reduction")
    with conventions.single(scores):
        z = margins_of(scores, y01)
        values = random_derivatives(z, lam, generator) * z
        return _over_rows(values, reduction)


def one_vs_rest(
    logits: Tensor,
    y: Tensor,
    *,
    lam: float | Tensor = 0.0,
    generator: Generator = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Sum over K classes of the binary pseudo-loss "class k or not" (our extension).

    Every class draws its own loss at each step. A row costs $w_y\sum_kg_{ik}z_{ik}$ with
    $z_{ik}=\pm h_{ik}$; the mean divides by $\sum_iw_{y_i}$ as in torch. Ignored rows take no draw.

    Args:
        logits: (\*sets, n, K).
        y: (\*sets, n) class indices.
        lam: lambda of the inverse Box-Cox transformation, one number.
        generator: of the draws; None takes torch's global one (and can be compiled).
        weight: (K,), of each class; default 1.
        ignore_index: class index of rows that do not count.
        reduction: over n: ``mean``, ``sum`` or ``none``.

    Returns:
        One number a set, or (\*sets, n) for ``none``; float32 for half precision.

    Raises:
        TypeError: ``logits`` are not floating-point numbers.
        ValueError: shapes disagree or a class index is out of range.
    """
    conventions.floating(logits, "logits")
    if logits.ndim < 2 or y.shape != logits.shape[:-1]:
        raise ValueError(
            f"y: expected the shape of logits (..., n, k) without k, got {tuple(y.shape)} "
            f"for {tuple(logits.shape)}"
        )
    one_of(reduction, conventions.REDUCTIONS, "reduction")
    kept = y != ignore_index
    classes = torch.where(kept, y, 0).long()
    conventions.in_range(classes, logits.shape[-1], "y")
    with conventions.single(logits):
        hot = nn.functional.one_hot(classes, logits.shape[-1])
        z = margins_of(logits, hot).movedim(-1, -2)  # (*sets, k, n)
        # Ignored rows go to the end of the order, and as many draws become the mildest there is.
        ranked = torch.where(kept[..., None, :], z.detach(), torch.inf)
        drawn = torch.arange(z.shape[-1], device=z.device) < kept.sum(-1)[..., None, None]
        xi = torch.where(drawn, _normal(z, generator), -torch.inf)
        values = (staircase(ranked, xi, lam) * z).sum(-2)
        share = torch.ones_like(values) if weight is None else weight.to(values)[classes]
        share = torch.where(kept, share, 0)
        if reduction == "mean":
            return (values * share).sum(-1) / share.sum(-1)
        return _over_rows(values * share, reduction)


def margins_of(scores: Tensor, y01: Tensor) -> Tensor:
    """y f(x) with labels -1 and 1, in float32 or wider."""
    return conventions.full(scores) * (2 * y01.to(conventions.full(scores).dtype) - 1)


def implied(
    z: Float[Tensor, " n"], slopes: Float[Tensor, " n"], at: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    r"""A convex loss with these slopes at the margins, $\phi(0)=1$.

    Between two margins the slope rises in a straight line (any rise between the two would do), and
    beyond the outermost it stays: $\phi(z)=1+\int_0^z\phi'$, exact for that $\phi'$.

    Args:
        z: margins, in any order.
        slopes: of the loss at them, for instance `random_derivatives`.
        at: where to evaluate.

    Returns:
        The loss at ``at``.

    Raises:
        ValueError: the shapes differ, or a slope falls as the margin rises.
    """
    if z.ndim != 1 or z.shape != slopes.shape:
        raise ValueError(f"slopes: expected shape {tuple(z.shape)} of one dimension")
    order = z.argsort(stable=True)
    x, g = z[order], slopes[order]
    if bool((g.diff() < 0).any()):
        raise ValueError("slopes: expected numbers that do not fall as the margin rises")
    area = torch.cat([g.new_zeros(1), ((g[1:] + g[:-1]) / 2 * x.diff()).cumsum(0)])

    def integral(t: Tensor) -> Tensor:
        """From the smallest margin to t."""
        below = torch.searchsorted(x, t.detach(), right=True)  # margins at or below t
        left, right = (below - 1).clamp(min=0), below.clamp(max=len(x) - 1)
        between = right > left  # else beyond an end, where the slope stays
        bend = torch.where(between, g[right] - g[left], 0)
        bend = bend / torch.where(between, x[right] - x[left], 1)
        step = t - x[left]
        return area[left] + step * g[left] + step.square() * bend / 2

    return 1 + integral(at) - integral(at.new_zeros(1))


class EnsLoss(nn.Module):
    r"""`ensloss` as a module, with the paper's optional redrawing of $\lambda$ between epochs.

    Call `next_epoch` when an epoch begins: in every ``period``-th it draws
    $\lambda\sim U(-1,1)$. Lambda and the number of epochs are part of the state.

    Args:
        lam: lambda at the start; default 0.
        period: epochs between redraws; None (default, as in the paper's benchmarks) never.
        generator: of all draws; None takes torch's global one (and can be compiled).
        reduction: ``mean``, ``sum`` or ``none``.

    Raises:
        ValueError: ``period`` is not a whole number above 0.

    Reference: Dai (2024), arXiv 2409.00908, Algorithm 1.
    """

    lam: Tensor
    epoch: Tensor

    def __init__(
        self,
        lam: float = 0.0,
        *,
        period: int | None = None,
        generator: Generator = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.register_buffer("lam", torch.tensor(number(lam, "lam")))
        self.register_buffer("epoch", torch.tensor(0))
        self.period = None if period is None else count(period, "period")
        self.generator = generator
        self.reduction = one_of(reduction, conventions.REDUCTIONS, "reduction")

    def next_epoch(self) -> float:
        """Count an epoch, draw lambda if it is due, and return lambda."""
        self.epoch += 1
        if self.period is not None and int(self.epoch) % self.period == 0:
            self.lam.copy_(2 * _uniform(self.generator) - 1)
        return float(self.lam)

    def forward(self, scores: Tensor, y01: Tensor) -> Tensor:
        """The pseudo-loss of a batch, with fresh draws."""
        return ensloss(
            scores, y01, lam=self.lam, generator=self.generator, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """Lambda, period and reduction."""
        return f"lam={float(self.lam):g}, period={self.period}, reduction={self.reduction!r}"


def _normal(z: Tensor, generator: Generator) -> Tensor:
    """Standard normal draws of z's shape, made where the generator lives."""
    if generator is None:
        return torch.randn_like(conventions.full(z))
    draws = torch.randn(
        z.shape, generator=generator, device=generator.device, dtype=conventions.full(z).dtype
    )
    return draws.to(z.device)


def _uniform(generator: Generator) -> Tensor:
    if generator is None:
        return torch.rand(())
    return torch.rand((), generator=generator, device=generator.device)


def _labels(y01: Tensor) -> None:
    """Refuse an empty set and labels other than 0 and 1; not looked at while compiling."""
    if not y01.numel():
        raise ValueError("y01: is empty; expected at least one row")
    if conventions.looks(y01) and not bool(((y01 == 0) | (y01 == 1)).all()):
        raise ValueError("y01: expected labels 0 and 1")


def _over_rows(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    return values.mean(-1) if reduction == "mean" else values.sum(-1)
