r"""Learning when only the mean response of each bag is known: bag loss, instance loss, between.

n = mk examples lie in m random bags of k, and only the bag means $\bar y_a$ are released. The bag
loss compares a bag's mean prediction with it, the instance loss every prediction:

$$L_{bag} = \frac1m\sum_a\ell\Big(\bar y_a, \frac1k\sum_{i\in a}f(x_i)\Big), \qquad
  L_{inst} = \frac1{mk}\sum_a\sum_{i\in a}\ell(\bar y_a, f(x_i)), \qquad
  L_\rho = (1-\rho)L_{bag} + \rho L_{inst}.$$

For the squared loss $L_\rho = L_{bag} + \rho\cdot$ (mean variance of the predictions within a bag):
$\rho$ trades the variance of few bags for the bias of predicting the same within one.

For isotropic Gaussian inputs, a linear model $y = x^\top\theta + \varepsilon$ with noise variance
$s^2$ and $d, m\to\infty$ at $\alpha=m/d$, the risk $\|\hat\theta_\rho-\theta\|^2$ has a closed
limit. Bag means and deviations are independent Gaussians (m and n - m of them); with $t$ the
positive root of

$$\frac1t = \frac{\alpha}{1+t} + \frac{\alpha(k-1)\rho}{1+\rho t}
  \iff \rho(1-\alpha k)t^2 + (1+\rho-\alpha-\alpha(k-1)\rho)t + 1 = 0,$$

$c=\alpha t/(1+t)$ is how much of $\theta$ survives, and with $u=\alpha t^2/(1+t)^2$,
$v=\alpha(k-1)\rho^2t^2/(1+\rho t)^2$

$$R = (1-c)^2\|\theta\|^2 + \frac{u\,((1-c)^2\|\theta\|^2+s^2) + v\,c^2\|\theta\|^2}{1-u-v}.$$

Limits: $\rho=0$ gives $s^2/(\alpha-1)$, the large-d form of the exact $s^2d/(m-d-1)$; $\rho=1$
gives $(1-\frac1k)^2\|\theta\|^2+\frac{(1-1/k)\|\theta\|^2+s^2}{k(\alpha k-1)}$, where
$E\hat\theta=\theta/k$ exactly.

Label privacy: responses are clipped to [-C, C] and Laplace noise of scale $2C/(k\varepsilon)$ is
added to each bag mean; one changed response moves a mean by at most 2C/k, so the release is
$\varepsilon$-label-differentially private. It acts as noise: $s^2=\sigma^2+8C^2/(k\varepsilon^2)$.

Reference: Javanmard, Chen, Mirrokni, Badanidiyuru and Fu (2024), "Learning from Aggregate
responses: Instance Level versus Bag Level Loss Functions", arXiv 2401.11081. The limit is derived
here (leave-one-out, as above) and tested against simulation.

*Not included*: bags chosen by features or earlier predictions (a later paper of the authors), and
means of class indicators for more than two classes, which the paper does not treat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.lab import checks
from workbench.losses.conventions import floating, fraction, full, single

Pointwise = Callable[[Tensor, Tensor], Tensor]  # predictions, responses -> losses, same shape


def squared(pred: Tensor, response: Tensor) -> Tensor:
    """``(pred - response)**2``."""
    return (pred - response).square()


# --- losses --------------------------------------------------------------------------------------


def bag_loss(
    pred: Float[Tensor, "*s m k"], ybar: Float[Tensor, "*s m"], loss: Pointwise = squared
) -> Float[Tensor, "*s"]:
    """Mean loss of each bag's mean prediction.

    Args:
        pred: predictions of the k examples of each of m bags; leading axes are separate models.
        ybar: mean responses of the bags.
        loss: of predictions and responses, element by element; for 0/1 responses with predicted
            probabilities for instance ``torch.nn.functional.binary_cross_entropy`` with
            ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument is no floating-point tensor, or shapes disagree.
    """
    pred, ybar = _bags(pred, ybar)
    with single(pred):
        return loss(pred.mean(-1), ybar).mean(-1)


def instance_loss(
    pred: Float[Tensor, "*s m k"], ybar: Float[Tensor, "*s m"], loss: Pointwise = squared
) -> Float[Tensor, "*s"]:
    """Mean loss of every prediction against its bag's mean response; arguments as `bag_loss`."""
    pred, ybar = _bags(pred, ybar)
    with single(pred):
        return loss(pred, ybar[..., None].expand_as(pred)).mean((-2, -1))


def interpolated_loss(
    pred: Float[Tensor, "*s m k"],
    ybar: Float[Tensor, "*s m"],
    rho: float | Tensor,
    loss: Pointwise = squared,
) -> Float[Tensor, "*s"]:
    """``(1 - rho) bag_loss + rho instance_loss``.

    Args:
        pred, ybar, loss: as of `bag_loss`.
        rho: from 0 (bag) to 1 (instance); a tensor of the leading shape gives each model its own.

    Raises:
        ValueError: rho lies outside [0, 1], or as of `bag_loss`.

    Reference: Javanmard et al. (2024), arXiv 2401.11081, the interpolating loss.
    """
    if not isinstance(rho, Tensor):
        rho = fraction(rho, "rho")
    bag, instance = bag_loss(pred, ybar, loss), instance_loss(pred, ybar, loss)
    return bag + rho * (instance - bag)


class AggregateLoss(nn.Module):
    """`interpolated_loss` as a module: ``AggregateLoss(rho=0.1)(pred, ybar)``."""

    def __init__(self, rho: float, loss: Pointwise = squared) -> None:
        super().__init__()
        self.rho, self.loss = checks.fraction(rho, "rho"), loss

    def forward(self, pred: Tensor, ybar: Tensor) -> Tensor:
        """The loss of predictions (..., m, k) with mean responses (..., m)."""
        return interpolated_loss(pred, ybar, self.rho, self.loss)

    def extra_repr(self) -> str:
        """Interpolation and pointwise loss."""
        return f"rho={self.rho:g}, loss={getattr(self.loss, '__name__', self.loss)}"


# --- bags ----------------------------------------------------------------------------------------


def random_bags(n: int, k: int, generator: Any = None) -> Int[Tensor, "m k"]:
    """Row numbers of ``n // k`` random bags; what does not fill a bag is left out.

    Args:
        n: examples.
        k: of each bag.
        generator: torch generator or seed.
    """
    m = checks.count(n, "n") // checks.count(k, "k")
    if m < 1:
        raise ValueError(f"k: expected at most n = {n}, got {k}")
    return torch.randperm(n, generator=checks.as_generator(generator))[: m * k].view(m, k)


def private_bags(
    y: Any, k: int, eps: float, C: float, generator: Any = None
) -> tuple[Int[Tensor, "m k"], Float[Tensor, " m"]]:
    """Random bags and their mean responses with label-differential privacy.

    Args:
        y: responses (n,).
        k: bag size.
        eps: privacy budget for one response; inf adds no noise (responses are still clipped).
        C: responses are clipped to [-C, C], in their unit.
        generator: torch generator or seed.

    Returns:
        Row numbers (m, k) and private means (m,).

    Reference: Javanmard et al. (2024), arXiv 2401.11081, the private mechanism.
    """
    responses = torch.as_tensor(checks.as_floats(y, "y", ndim=1))
    bound = checks.positive(C, "C")
    source = checks.as_generator(generator)
    bags = random_bags(len(responses), k, source)
    means = responses.clamp(-bound, bound)[bags].mean(-1)
    if eps == float("inf"):
        return bags, means
    scale = 2 * bound / (k * checks.positive(eps, "eps"))
    u = torch.rand(len(bags), generator=source, dtype=torch.float64) - 0.5
    noise = -torch.sign(u) * torch.log1p(-2 * u.abs()) * scale
    return bags, means + noise.to(means)


def noise_variance(sigma: Any, k: Any, eps: float = float("inf"), C: float = 1.0) -> Any:
    """Variance of a response that gives means the same noise, ``sigma^2 + 8 C^2 / (k eps^2)``.

    Clipping is taken to change nothing; choose C beyond almost all responses.
    """
    return np.asarray(sigma, float) ** 2 + 8 * C**2 / (np.asarray(k, float) * eps**2)


# --- linear models -------------------------------------------------------------------------------


def interpolated_ols(X: Any, ybar: Any, bags: Tensor, rho: Any) -> Float[Tensor, "*r d"]:
    r"""The linear model that minimises the interpolated squared loss, in closed form.

    $\hat\theta_\rho=(W_1+\rho W_2)^{-1}k\bar X^\top\bar y$ with $W_1=k\bar X^\top\bar X$ and $W_2$
    the scatter of the inputs within bags. A column of ones has none and is not shrunk.

    Args:
        X: inputs (n, d), n >= mk.
        ybar: mean responses (m,).
        bags: row numbers (m, k).
        rho: a number or (r,) numbers in [0, 1].

    Returns:
        (d,), or (r, d) for several rho; float64. Of least norm where it is not unique.

    Raises:
        ValueError: shapes disagree or rho lies outside [0, 1].
    """
    inputs = torch.as_tensor(checks.as_floats(X, "X", ndim=2)).double()
    means = torch.as_tensor(checks.as_floats(ybar, "ybar", ndim=1)).double()
    rows = torch.as_tensor(bags)
    if rows.ndim != 2 or len(rows) != len(means):
        raise ValueError(f"bags: expected ({len(means)}, k) rows, got {tuple(rows.shape)}")
    weights = torch.as_tensor(rho, dtype=torch.float64)
    if weights.ndim > 1 or not bool(((weights >= 0) & (weights <= 1)).all()):
        raise ValueError("rho: expected a number or (r,) numbers in [0, 1]")
    grouped = inputs[rows]
    middle, k = grouped.mean(1), rows.shape[1]
    apart = (grouped - middle[:, None]).flatten(0, 1)
    between, within = k * middle.T @ middle, apart.T @ apart
    system = between + weights[..., None, None] * within
    target = k * middle.T @ means
    return (torch.linalg.pinv(system, hermitian=True) @ target[:, None])[..., 0]


class Risk(NamedTuple):
    """Limit of the risk and its parts: ``risk = bias + variance``.

    ``bias`` is what remains without noise, ``kept`` the share of theta in the mean estimate.
    """

    risk: Any
    bias: Any
    variance: Any
    kept: Any


def limiting_risk(
    bags_per_dim: Any, k: Any, rho: Any, *, noise: Any = 1.0, signal: float = 1.0
) -> Risk:
    """Risk of `interpolated_ols` as d grows at a fixed number of bags per dimension.

    Args:
        bags_per_dim: m / d; all arguments broadcast.
        k: bag size.
        rho: in [0, 1].
        noise: variance of a response given its input, `noise_variance` with privacy.
        signal: squared norm of theta.

    Returns:
        Risks; inf where the estimate is not unique (fewer bags than inputs at rho = 0, or fewer
        examples than inputs).

    Raises:
        ValueError: an argument is out of range.
    """
    a, k, rho, noise = np.broadcast_arrays(
        *(np.asarray(v, float) for v in (bags_per_dim, k, rho, noise))
    )
    checks.positive(signal, "signal", zero=True)
    if not ((a > 0).all() and (k >= 1).all() and (noise >= 0).all()):
        raise ValueError("bags_per_dim, k, noise: expected > 0, >= 1 and >= 0")
    if not ((rho >= 0) & (rho <= 1)).all():
        raise ValueError("rho: expected numbers in [0, 1]")
    rho = np.where(k == 1, 1.0, rho)  # nothing within a bag of one: all rho are one estimate
    unique = (a * k > 1) & ((rho > 0) | (a > 1))
    linear = 1 + rho - a - a * (k - 1) * rho
    root = np.sqrt(linear**2 + 4 * rho * np.where(unique, a * k - 1, 1))
    # the positive root of rho (a k - 1) t^2 - linear t - 1 = 0, without cancellation
    t = np.where(
        linear > 0,
        (linear + root) / np.where(rho > 0, 2 * rho * np.where(unique, a * k - 1, 1), 1),
        2 / np.where(unique, root - linear, 1),
    )
    kept = a * t / (1 + t)
    u = a * (t / (1 + t)) ** 2
    v = a * (k - 1) * (rho * t / (1 + rho * t)) ** 2
    left = np.where(unique, 1 - u - v, 1)
    shrunk = (1 - kept) ** 2 * signal
    bias = shrunk + (u * shrunk + v * kept**2 * signal) / left
    variance = u * noise / left
    inf = np.inf
    return Risk(
        np.where(unique, bias + variance, inf), np.where(unique, bias, inf),
        np.where(unique, variance, inf), np.where(unique, kept, 0.0),
    )  # fmt: skip


def risk_curve(d: int, k: int, m: int, sigma: float, rho: Any, *, signal: float = 1.0) -> Any:
    """`limiting_risk` of a finite problem: m bags of k in d dimensions, noise ``sigma``.

    At rho = 0 it is the exact ``sigma^2 d / (m - d - 1)``; elsewhere the limit at m / d.
    """
    rho = np.asarray(rho, float)
    found = limiting_risk(m / d, k, rho, noise=sigma**2, signal=signal).risk
    exact = sigma**2 * d / (m - d - 1) if m > d + 1 else np.inf
    return np.where((rho == 0) & (k > 1), exact, found)


def best_bag_size(
    n: int,
    d: int,
    *,
    sigma: float,
    eps: float,
    C: float,
    sizes: Any = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
    rhos: Any = None,
    signal: float = 1.0,
) -> tuple[int, float, float]:
    """Bag size and rho of least predicted risk for n examples under label privacy.

    Args:
        n, d: examples and inputs.
        sigma: standard deviation of a response given its input.
        eps, C: privacy budget and clipping bound, as of `private_bags`.
        sizes: bag sizes to choose from.
        rhos: interpolations to choose from; by default 41 from 0.001 to 1, and 0.
        signal: squared norm of theta.

    Returns:
        ``(k, rho, risk)``.

    Reference: Javanmard et al. (2024), arXiv 2401.11081, optimal bag size; here jointly with rho.
    """
    k = np.asarray(sizes, float)[:, None]
    rho = np.r_[0, np.geomspace(1e-3, 1, 41)] if rhos is None else np.asarray(rhos, float)
    noise = noise_variance(sigma, k, eps, C)
    found = limiting_risk(n / k / d, k, rho[None], noise=noise, signal=signal).risk
    i, j = np.unravel_index(found.argmin(), found.shape)
    return int(k[i, 0]), float(rho[j]), float(found[i, j])


def _bags(pred: Tensor, ybar: Tensor) -> tuple[Tensor, Tensor]:
    """Both in single precision at least, with agreeing shapes."""
    floating(pred, "pred")
    floating(ybar, "ybar")
    if pred.ndim < 2 or ybar.shape != pred.shape[:-1]:
        raise ValueError(
            f"ybar: expected the shape of pred (..., m, k) without k, got {tuple(ybar.shape)} "
            f"beside {tuple(pred.shape)}"
        )
    return full(pred), full(ybar)
