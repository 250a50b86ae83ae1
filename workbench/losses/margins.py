r"""Binary losses of the margin $z=yf$ with $y=\pm1$, and what is known about each.

A loss $\phi(z)$ is *classification-calibrated* when minimising it in expectation gives the sign of
$2\eta-1$ at every $\eta=P(y=1\mid x)\ne\frac12$. A convex one is calibrated exactly when it is
differentiable at 0 with $\phi'(0)<0$. The price of the detour is the function $\psi$ of
`calibration`: the excess 0-1 risk and the excess surrogate risk of any score obey
$\psi(R-R^*)\le R_\phi-R_\phi^*$. For the set of all functions this is the H-consistency bound too.

Reference: Bartlett, Jordan and McAuliffe 2006, Convexity, classification, and risk bounds,
theorems 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.lab.checks import fraction, number

Margin = Callable[[Tensor], Tensor]


def bce(z: Tensor) -> Tensor:
    r"""Logistic loss $\log(1+e^{-z})$, in nats."""
    return F.softplus(-z)


def hinge(z: Tensor) -> Tensor:
    r"""$(1-z)_+$."""
    return F.relu(1 - z)


def squared_hinge(z: Tensor) -> Tensor:
    r"""$(1-z)_+^2$."""
    return F.relu(1 - z).square()


def exponential(z: Tensor) -> Tensor:
    r"""$e^{-z}$."""
    return torch.exp(-z)


def squared(z: Tensor) -> Tensor:
    r"""$(1-z)^2$, least squares on the labels."""
    return (1 - z).square()


def focal(z: Tensor, gamma: float = 2.0) -> Tensor:
    r"""$-(1-p)^\gamma\log p$ with $p=1/(1+e^{-z})$; not convex."""
    return torch.sigmoid(-z) ** gamma * F.softplus(-z)


def sigmoid(z: Tensor) -> Tensor:
    r"""$1/(1+e^{z})$: mean absolute error of a probability, not convex."""
    return torch.sigmoid(-z)


def savage(z: Tensor) -> Tensor:
    r"""$1/(1+e^{z})^2$; not convex (Masnadi-Shirazi and Vasconcelos 2008)."""
    return torch.sigmoid(-z).square()


def ramp(z: Tensor) -> Tensor:
    r"""Hinge cut off at 1, $\min(1,(1-z)_+/2)$ on $z\in[-1,1]$; not convex."""
    return ((1 - z) / 2).clamp(0, 1)


def perceptron(z: Tensor) -> Tensor:
    r"""$(-z)_+$: its slope jumps at 0 from -1 to 0, and f = 0 minimises it for every $\eta$."""
    return F.relu(-z)


MARGIN_LOSSES: dict[str, Margin] = {
    "logistic": bce,
    "hinge": hinge,
    "squared hinge": squared_hinge,
    "exponential": exponential,
    "least squares": squared,
    "focal": focal,
    "sigmoid (MAE)": sigmoid,
    "savage": savage,
    "ramp": ramp,
    "perceptron": perceptron,
}


@dataclass(frozen=True)
class Shape:
    """What a margin loss looks like on a grid.

    Attributes:
        z: (g,) margins.
        loss, slope, curvature: (g,), the loss and its first two derivatives (one-sided at kinks).
        convex: whether the slope never falls on the grid.
        slope_at_zero: phi'(0-) and phi'(0+); equal where phi is differentiable at 0.
        calibrated: whether `calibration` is positive at every theta looked at.
        bounded: whether the loss stays under a line of slope 1e-3 for very wrong predictions.
    """

    z: np.ndarray
    loss: np.ndarray
    slope: np.ndarray
    curvature: np.ndarray
    convex: bool
    slope_at_zero: tuple[float, float]
    calibrated: bool
    bounded: bool


def derivatives(loss: Margin, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A margin loss and its first two derivatives by automatic differentiation.

    Args:
        loss: z (g,) -> (g,), each entry of its own margin alone.
        z: (g,) margins.

    Returns:
        (g,) each; where there is a kink, the subgradient that torch takes.

    Raises:
        ValueError: the loss does not return one number a margin.
    """
    at = torch.as_tensor(np.asarray(z, float)).requires_grad_()
    value = loss(at)
    if value.shape != at.shape:
        raise ValueError(f"loss: expected shape {tuple(at.shape)}, got {tuple(value.shape)}")
    (slope,) = torch.autograd.grad(value.sum(), at, create_graph=True)
    curved = slope.requires_grad
    (bend,) = (
        torch.autograd.grad(slope.sum(), at, materialize_grads=True)
        if curved
        else (torch.zeros_like(at),)
    )
    return tuple(t.detach().numpy() for t in (value, slope, bend))  # type: ignore[return-value]


def calibration(loss: Margin, theta: np.ndarray | float, *, reach: float = 30.0) -> np.ndarray:
    r"""$\psi$ before its convex hull: the least excess surrogate risk of a wrong sign.

    With $C_\eta(f)=\eta\phi(f)+(1-\eta)\phi(-f)$ and $\eta=(1+\theta)/2$,
    $\tilde\psi(\theta)=\inf_{f\le0}C_\eta(f)-\inf_fC_\eta(f)$. A calibrated loss has
    $\tilde\psi(\theta)>0$ for all $\theta>0$.

    Args:
        loss: margins (g,) -> (g,).
        theta: excess 0-1 risk at stake, $2\eta-1$, in (0, 1].
        reach: scores are searched in [-reach, reach].

    Returns:
        Of theta's shape.

    Raises:
        ValueError: theta lies outside [0, 1].

    Reference: Bartlett et al. 2006, definition 2.
    """
    theta = np.asarray(theta, float)
    for t in theta.flat:
        fraction(float(t), "theta")
    eta = (1 + theta.reshape(-1, 1)) / 2
    grid = np.unique(np.concatenate([np.linspace(-reach, reach, 601), np.linspace(-3, 3, 601)]))

    def risks(scores: np.ndarray) -> np.ndarray:
        f = torch.as_tensor(np.ascontiguousarray(scores).reshape(-1))
        gain, price = (loss(s).numpy().reshape(scores.shape) for s in (f, -f))
        return eta * gain + (1 - eta) * price

    def least(low: float, high: float) -> np.ndarray:
        inside = grid[(grid >= low) & (grid <= high)]
        best = inside[risks(inside[None]).argmin(1)][:, None]
        width = 2 * reach / 600
        for _ in range(5):  # each time 20 times closer
            near = (best + width * np.linspace(-1, 1, 41)).clip(low, high)
            values = risks(near)
            best = np.take_along_axis(near, values.argmin(1)[:, None], 1)
            width /= 20
        return values.min(1)

    excess = least(-reach, 0.0) - least(-reach, reach)
    return np.maximum(excess, 0.0).reshape(theta.shape)


def shape(loss: Margin, low: float = -3.0, high: float = 3.0, points: int = 241) -> Shape:
    """Look at a margin loss: derivatives, convexity, calibration.

    Args:
        loss: margins (g,) -> (g,), for instance one of ``MARGIN_LOSSES`` or your own.
        low: first margin.
        high: last margin.
        points: of the grid.

    Raises:
        ValueError: the range is empty.
    """
    if number(low, "low") >= number(high, "high"):
        raise ValueError(f"low: expected less than high, got {low:g} and {high:g}")
    z = np.linspace(low, high, points)
    values, slope, bend = derivatives(loss, z)
    steps = np.diff(values) / np.diff(z)  # secants do not depend on which subgradient is taken
    near = 1e-6
    left, middle, right = (float(v) for v in loss(torch.tensor([-near, 0.0, near]).double()))
    far = loss(torch.tensor([-1e4, -2e4], dtype=torch.float64))
    return Shape(
        z=z,
        loss=values,
        slope=slope,
        curvature=bend,
        convex=bool((np.diff(steps) >= -1e-9).all()),
        slope_at_zero=((middle - left) / near, (right - middle) / near),
        calibrated=bool((calibration(loss, np.linspace(0.02, 1, 12)) > 1e-7).all()),
        bounded=bool(far[1] - far[0] < 10.0),
    )


def two_class(loss: Callable[..., Tensor]) -> Margin:
    """A loss of logits and labels as a function of the margin: two classes, scores (z, 0), label 0.

    Args:
        loss: ``loss(logits (n, 2), y (n,), reduction="none") -> (n,)``, for instance a function of
            this family or `torch.nn.functional.cross_entropy`.
    """

    def of(z: Tensor) -> Tensor:
        logits = torch.stack([z, torch.zeros_like(z)], 1)
        return loss(logits, torch.zeros(len(z), dtype=torch.long), reduction="none")

    return of


def psi(loss: Margin, theta: np.ndarray) -> np.ndarray:
    r"""$\psi$: the largest convex function below `calibration` that is 0 at 0.

    Args:
        loss: margins (g,) -> (g,).
        theta: (t,), rising from 0 to at most 1.

    Raises:
        ValueError: theta does not rise from 0.
    """
    theta = np.asarray(theta, float)
    if len(theta) < 2 or theta[0] != 0 or not (np.diff(theta) > 0).all():
        raise ValueError("theta: expected numbers that rise from 0")
    raw = calibration(loss, theta)
    raw[0] = 0.0
    hull: list[int] = []  # the lower hull, from left to right
    for i in range(len(theta)):
        while len(hull) > 1:
            a, b = hull[-2:]
            straight = raw[a] + (raw[i] - raw[a]) * (theta[b] - theta[a]) / (theta[i] - theta[a])
            if raw[b] < straight:
                break
            hull.pop()
        hull.append(i)
    return np.interp(theta, theta[hull], raw[hull])


def error_bound(loss: Margin, excess: np.ndarray, points: int = 101) -> np.ndarray:
    r"""The H-consistency bound: the most excess error that an excess surrogate risk allows.

    $\psi^{-1}(\epsilon)=\max\{\theta\le1:\psi(\theta)\le\epsilon\}$; 1 where nothing is guaranteed.

    Args:
        loss: margins (g,) -> (g,).
        excess: excess surrogate risk, at least 0.
        points: of theta at which psi is computed; straight lines between them.
    """
    theta = np.linspace(0, 1, points)
    height = np.maximum.accumulate(psi(loss, theta))
    at = np.asarray(excess, float)
    index = np.searchsorted(height, at, side="right").clip(1, points - 1)
    low, high = height[index - 1], height[index]
    share = np.where(high > low, (at - low) / np.where(high > low, high - low, 1), 1.0)
    bound = theta[index - 1] + share.clip(0, 1) / (points - 1)
    return np.where(at >= height[-1], 1.0, bound)
