r"""Comp-sum losses: one exponent from sum-exponential over cross-entropy to mean absolute error.

$$\ell_\tau(h, x, y) = \Phi^\tau\Big(\sum_{y'\ne y} e^{h(x,y') - h(x,y)}\Big), \qquad
  \Phi^\tau(u) = \frac{(1+u)^{1-\tau} - 1}{1-\tau}, \quad \Phi^1(u) = \log(1+u).$$

$\tau = 0$ is the sum-exponential loss, 1 cross-entropy, (1, 2) generalised cross-entropy with
$q = \tau - 1$, 2 the mean absolute error $1 - p_y$. Since $1 + u = 1/p_y$ the loss is a function of
the cross-entropy $c$ alone, $(e^{(1-\tau)c} - 1)/(1-\tau)$, and costs what cross-entropy costs.

The guarantee. For a hypothesis set that is symmetric and complete (all scores can be had at every
x), with $R$ the risk, $R^*$ the best in the set and $M = R^* - E_x[\text{best conditional risk}]$
the minimisability gap,

$$R_{01}(h) - R^*_{01} + M_{01} \le \Gamma_\tau\big(R_{\ell_\tau}(h) - R^*_{\ell_\tau}
  + M_{\ell_\tau}\big), \qquad \Gamma_\tau = T_\tau^{-1}.$$

`T` and `gamma` are these transforms, `conditional_regrets` both sides at points whose class
probabilities you know. `smooth_adv_loss` is the paper's loss for adversarial robustness,
`trades_loss` what it is compared with.

Reference: Mao, Mohri and Zhong (2023), "Cross-Entropy Loss Functions: Theoretical Analysis and
Applications", ICML, arXiv 2304.07288, Theorem 3.1 and section 5.

*Not included*: AutoAttack, by which the paper evaluates (attacks of its kind that need no gradient
are a library's task; `attacks.survives` runs two objectives with restarts), and the extra generated
training images of its robust experiments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import checks
from workbench.losses import attacks
from workbench.losses.conventions import Loss, full, labelled, positive, reduced, single

Model = Callable[[Tensor], Tensor]


# --- the loss -------------------------------------------------------------------------------------


def comp_sum_loss(
    logits: Tensor,
    target: Tensor,
    *,
    tau: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Comp-sum loss $\ell_\tau = (p_y^{\tau-1} - 1)/(1-\tau)$, cross-entropy at $\tau = 1$.

    Soft labels q cost $\sum_k q_k \ell_\tau(h, k)$. Where $(1-\tau)c$ would overflow an exponential
    (above 60 in float32, 600 in float64; c is the cross-entropy) the loss goes on along its
    tangent, so that it and its gradient stay finite.

    Args:
        logits: (n, k) or (n, k, d1, ...).
        target: classes (n, ...) or probabilities of the shape of ``logits``.
        tau: at least 0; default cross-entropy.
        weight, ignore_index, reduction: as of ``torch.nn.functional.cross_entropy``.

    Returns:
        Scalar, or one loss a row for ``reduction="none"``.

    Raises:
        ValueError: ``tau`` is negative, a shape is wrong or a class is out of range.

    Reference: Mao, Mohri and Zhong (2023), arXiv 2304.07288, section 2.
    """
    positive(tau, "tau", zero=True)

    def hard(h: Tensor, y: Tensor) -> Tensor:
        return _of_cross_entropy(F.cross_entropy(h, y, reduction="none"), tau)

    def soft(h: Tensor, q: Tensor) -> Tensor:
        return (q * _of_cross_entropy(-h.log_softmax(-1), tau)).sum(-1)

    return labelled(
        logits, target, hard, soft, weight=weight, ignore_index=ignore_index, reduction=reduction
    )


class CompSumLoss(Loss):
    """`comp_sum_loss` as a module: ``CompSumLoss(tau=1.5)(logits, target)``."""

    function = staticmethod(comp_sum_loss)

    def __init__(self, *, tau: float = 1.0, **conventions: Any) -> None:
        super().__init__(tau=checks.positive(tau, "tau", zero=True), **conventions)


def _of_cross_entropy(c: Tensor, tau: float) -> Tensor:
    if tau == 1:
        return c
    power = (1 - tau) * c
    if tau > 1:  # bounded by 1 / (tau - 1)
        return power.expm1() / (1 - tau)
    most = 600.0 if c.dtype == torch.float64 else 60.0
    tangent = math.exp(most) * (power - most).clamp(min=0)
    return (power.clamp(max=most).expm1() + tangent) / (1 - tau)


# --- the guarantee --------------------------------------------------------------------------------


def T(beta: Any, tau: float, n: int = 2) -> Tensor:
    r"""Least surrogate regret, $T_\tau(\beta)$, that goes with a zero-one regret of $\beta$.

    With $A = \frac12[(1+\beta)^{1/(2-\tau)} + (1-\beta)^{1/(2-\tau)}]$:
    $\frac{2^{1-\tau}}{1-\tau}(1 - A^{2-\tau})$ for $\tau < 1$,
    $\frac{1+\beta}2\log(1+\beta) + \frac{1-\beta}2\log(1-\beta)$ at 1,
    $\frac{A^{2-\tau} - 1}{(\tau-1)n^{\tau-1}}$ on (1, 2), $\frac\beta{(\tau-1)n^{\tau-1}}$ from 2.

    For $\tau \le 1$, and for two classes up to $\tau = 2$, some distribution and scores attain it;
    for more classes and $\tau > 1$ it is a lower bound of the least regret.

    Args:
        beta: zero-one regrets in [0, 1].
        tau: at least 0.
        n: number of classes; matters for ``tau > 1``.

    Returns:
        Float64 tensor of the shape of ``beta``.

    Raises:
        ValueError: an argument is out of range.

    Reference: Mao, Mohri and Zhong (2023), arXiv 2304.07288, Theorem 3.1.
    """
    checks.positive(tau, "tau", zero=True)
    classes = checks.count(n, "n", minimum=2)
    b = _float64(beta, "beta")
    if not bool(((b >= 0) & (b <= 1)).all()):
        raise ValueError("beta: expected regrets in [0, 1]")
    if tau == 1:
        return (torch.special.xlog1py(1 + b, b) + torch.special.xlog1py(1 - b, -b)) / 2
    base = 2.0 if tau < 1 else float(classes)
    scale = (tau - 1) * base ** (tau - 1)
    return (b if tau >= 2 else _log_power_mean(b, 2 - tau).expm1()) / scale


def _log_power_mean(b: Tensor, s: float) -> Tensor:
    r"""$\log A^s$, r = 1/s, in $a = \mathrm{artanh}\,\beta$: $s\log\cosh(a/s) - \log\cosh a$."""
    a = b.atanh()
    near = s * _log_cosh(a / s) - _log_cosh(a)
    far = (1 - s) * math.log(2) + s * (-2 * a / s).exp().log1p() - (-2 * a).exp().log1p()
    return torch.where(torch.maximum(a, a / s) < 1, near, far)  # each where it is exact


def _log_cosh(a: Tensor) -> Tensor:
    return (2 * (a / 2).sinh().square()).log1p()


def gamma(t: Any, tau: float, n: int = 2) -> Tensor:
    r"""Largest zero-one regret that a surrogate regret allows, $\Gamma_\tau = T_\tau^{-1}$.

    Args:
        t: surrogate regrets, at least 0.
        tau: at least 0.
        n: number of classes; matters for ``tau > 1``.

    Returns:
        Float64 tensor of the shape of ``t``; 1 where the bound says nothing.

    Raises:
        ValueError: an argument is out of range.

    Reference: Mao, Mohri and Zhong (2023), arXiv 2304.07288, Theorem 3.1.
    """
    regret = _float64(t, "t")
    if not bool((regret >= 0).all()):
        raise ValueError("t: expected regrets of at least 0")
    low, high = torch.zeros_like(regret), torch.ones_like(regret)
    for _ in range(64):  # T rises, so halving finds its inverse to the last digit
        middle = (low + high) / 2
        below = T(middle, tau, n) < regret
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def best_risk(probs: Tensor, *, tau: float = 1.0) -> Tensor:
    r"""Lowest conditional risk $\min_h\sum_kp_k\ell_\tau(h,k)$ at points with probabilities p.

    $\frac1{1-\tau}[(\sum_kp_k^{1/(2-\tau)})^{2-\tau} - 1]$ for $\tau < 2$, the entropy at 1,
    $\frac{1-\max_kp_k}{\tau-1}$ from 2. Its mean over x is what no model can go below: the
    minimisability gap is the best risk of a hypothesis set less this mean.

    Args:
        probs: (..., k).
        tau: at least 0.

    Reference: Mao, Mohri and Zhong (2023), arXiv 2304.07288, section 4.
    """
    checks.positive(tau, "tau", zero=True)
    if tau >= 2:
        return (1 - probs.amax(-1)) / (tau - 1)
    if tau == 1:
        return -torch.special.xlogy(probs, probs).sum(-1)
    s = 2 - tau
    return (s * (probs.log() / s).logsumexp(-1)).expm1() / (1 - tau)


def conditional_regrets(
    logits: Tensor, probs: Tensor, *, tau: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""Zero-one regret and surrogate regret of scores at points whose probabilities are known.

    Args:
        logits: (n, k).
        probs: (n, k), rows sum to one.
        tau: at least 0.

    Returns:
        Two tensors (n,); ``gamma(second, tau, k)`` is never below the first.
    """
    picked = probs.gather(-1, logits.argmax(-1, keepdim=True))[..., 0]
    risk = comp_sum_loss(logits, probs, tau=tau, reduction="none")
    return probs.amax(-1) - picked, risk - best_risk(probs, tau=tau)


def _float64(values: Any, name: str) -> Tensor:
    return torch.as_tensor(checks.as_floats(values, name)).to(torch.float64)


# --- adversarial ----------------------------------------------------------------------------------


def smooth_adv_loss(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    tau: float = 1.0,
    rho: float | Tensor = 1.0,
    nu: float | Tensor = 1.0,
    lam: float = 0.0,
    steps: int = 10,
    step_size: float | None = None,
    norm: str = "linf",
    box: tuple[float, float] | None = None,
    reduction: str = "mean",
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""Smooth adversarial comp-sum loss.

    $$\Phi^\tau\Big(\sum_{y'\ne y}e^{-\Delta(x,y,y')/\rho}\Big)
      + \nu\sup_{\|x'-x\|\le\epsilon}\|\bar\Delta(x',y) - \bar\Delta(x,y)\|_2 + \lambda\|h\|^2,$$

    $\Delta(x,y,y') = h(x,y) - h(x,y')$, $\bar\Delta$ the vector of all $y'\ne y$. The supremum has
    its own maximiser: `attacks.pgd` on that norm, from a small Gaussian step, batch norm and
    dropout in evaluation mode. With $\nu\ge\sqrt{k-1}/\rho$ the first two terms, divided by
    $\Phi^\tau(1)$, are an upper bound of the adversarial zero-one loss.

    Args:
        model: inputs (..., d) -> logits (..., k).
        x: inputs.
        y: classes (...).
        eps: radius of the ball.
        tau: exponent of the comp-sum loss.
        rho: scale of the margin; a number, or a tensor that broadcasts over ``y``.
        nu: weight of the supremum; likewise.
        lam: weight of the squared norm of all parameters of ``model``, a module.
        steps, step_size, norm, box, generator: of `attacks.pgd`.
        reduction: ``mean``, ``sum`` or ``none``.

    Returns:
        Scalar, or (...) for ``none``.

    Raises:
        TypeError: ``lam`` is given with a model that is no module.
        ValueError: a number is out of range.

    Reference: Mao, Mohri and Zhong (2023), arXiv 2304.07288, section 5.
    """
    rho, nu = _scale(rho, "rho", y), _scale(nu, "nu", y)
    if checks.positive(lam, "lam", zero=True) and not isinstance(model, nn.Module):
        raise TypeError("model: expected a torch.nn.Module, whose parameters lam penalises")

    def shift(points: Tensor) -> Tensor:
        return _margin_change(full(model(points)), anchor, y).square().sum(-1)

    with attacks.evaluating(model):
        with torch.no_grad():
            anchor = full(model(x))
        moved = attacks.pgd(
            shift, x, eps=eps, steps=steps, step_size=step_size, norm=norm, box=box,
            start=_nearby(x, generator),
        )  # fmt: skip
    h, there = full(model(x)), full(model(moved))
    with single(h):
        scaled = (h / rho[..., None]).flatten(0, -2)
        clean = comp_sum_loss(scaled, y.flatten(), tau=tau, reduction="none").view(y.shape)
        values = clean + nu * torch.linalg.vector_norm(_margin_change(there, h, y), dim=-1)
        if lam and isinstance(model, nn.Module):
            values = values + lam * sum(p.square().sum() for p in model.parameters())
        return reduced(values, reduction)


def trades_loss(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    beta: float | Tensor = 6.0,
    steps: int = 10,
    step_size: float | None = None,
    norm: str = "linf",
    box: tuple[float, float] | None = None,
    reduction: str = "mean",
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""The rival: cross-entropy $+\,\beta\max_{\|x'-x\|\le\epsilon}KL(p(x)\,\|\,p(x'))$.

    Args:
        beta: weight of the second term; a number, or a tensor that broadcasts over ``y``.
        model, x, y, eps, steps, step_size, norm, box, reduction, generator: of `smooth_adv_loss`.

    Reference: Zhang, Yu, Jiao, Xing, El Ghaoui and Jordan (2019), arXiv 1901.08573, equation 5.
    """
    beta = _scale(beta, "beta", y)

    def divergence(points: Tensor) -> Tensor:
        return _divergence(anchor, full(model(points)))

    with attacks.evaluating(model):
        with torch.no_grad():
            anchor = full(model(x))
        moved = attacks.pgd(
            divergence, x, eps=eps, steps=steps, step_size=step_size, norm=norm, box=box,
            start=_nearby(x, generator),
        )  # fmt: skip
    h, there = full(model(x)), full(model(moved))
    with single(h):
        clean = F.cross_entropy(h.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)
        return reduced(clean + beta * _divergence(h, there), reduction)


def _margin_change(there: Tensor, here: Tensor, y: Tensor) -> Tensor:
    """Change of the margins of y against all classes (that against itself is 0), (..., k)."""
    change = there - here
    return change.gather(-1, y[..., None]) - change


def _divergence(here: Tensor, there: Tensor) -> Tensor:
    log_p, log_q = here.log_softmax(-1), there.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _nearby(x: Tensor, generator: torch.Generator | int | None) -> Tensor:
    """A step small enough to be nothing and large enough to have a slope."""
    random = checks.as_generator(generator, device=x.device)
    noise = torch.randn(x.shape, generator=random, device=x.device, dtype=x.dtype)
    return x.detach() + 1e-3 * noise


def _scale(value: float | Tensor, name: str, y: Tensor) -> Tensor:
    found = torch.as_tensor(value, dtype=torch.float32, device=y.device)
    if not bool(((found > 0) | ((found == 0) & (name != "rho"))).all()):
        raise ValueError(f"{name}: expected {'> 0' if name == 'rho' else '>= 0'}, got {value}")
    return found
