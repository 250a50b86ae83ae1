"""Paths between two networks: the straight line, its barrier, and a bend that avoids it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.lab import checks
from workbench.lab.progress import Progress
from workbench.loss_landscapes.geometry.objective import Objective


@dataclass(frozen=True)
class Path:
    """Losses along a path; ``t`` runs from 0 to 1. NaN where an interruption left them out."""

    t: np.ndarray
    values: np.ndarray

    @property
    def complete(self) -> bool:
        """Whether every point was reached."""
        return not np.isnan(self.values).any()

    @property
    def barrier(self) -> float:
        """See `barrier`."""
        return barrier(self)

    @property
    def connectivity(self) -> float:
        """See `mode_connectivity`."""
        return mode_connectivity(self)

    def to_frame(self) -> pd.DataFrame:
        """Columns t and loss."""
        return pd.DataFrame({"t": self.t, "loss": self.values})


def linear_path(
    objective: Objective, theta0: Any, theta1: Any, *, points: int = 11, bend: Any = None
) -> Path:
    r"""Losses at $(1-t)\theta_0+t\theta_1$, or with ``bend`` $\phi$ along a Bezier curve.

    The curve is $(1-t)^2\theta_0+2t(1-t)\phi+t^2\theta_1$.

    Args:
        objective: the loss, or an error rate; with batch norm, "reestimate" avoids false barriers.
        theta0: first network: vector (D,), ``state_dict`` or model.
        theta1: second network.
        points: evaluated points, ends included.
        bend: (D,), control point of the curve, for instance from `bezier`.

    Returns:
        The path; after Ctrl-C what was computed so far.
    """
    if checks.count(points, "points") < 2:
        raise ValueError(f"points: expected at least both ends, got {points}")
    start, end = _ends(objective, theta0, theta1)
    control = None if bend is None else objective.parameters.vector(bend, "bend")
    t = np.linspace(0, 1, points)
    values = np.full(points, np.nan)
    found = objective.values(_point(start, end, control, float(s)) for s in t)
    with Progress("path", points) as bar, contextlib.closing(found):
        try:
            for i, value in enumerate(found):
                values[i] = value
                bar.step()
        except KeyboardInterrupt:
            pass
    return Path(t, values)


def barrier(path: Path) -> float:
    r"""How far the path rises above the line between its ends, $\max_t[L(t)-(1-t)L_0-tL_1]$.

    Reference: Frankle et al. (2020), arXiv:1912.05671; Entezari et al. (2022), arXiv:2110.06296.
    """
    chord = (1 - path.t) * path.values[0] + path.t * path.values[-1]
    return float(np.max(path.values - chord))


def signed_connectivity(values: Any) -> np.ndarray:
    r"""$mc=\tfrac12(L_0+L_1)-L(t^*)$ of profiles (..., points), for each of them.

    $t^*$ is where the path deviates most from the mean of its ends, up or down. Below 0: a
    barrier; about 0: connected; above 0: better in between than at the ends.

    Reference: Yang et al. (2021), arXiv:2107.11228, equation 5.
    """
    values = np.asarray(checks.as_floats(values, "values"))
    deviation = 0.5 * (values[..., :1] + values[..., -1:]) - values
    where = np.abs(deviation).argmax(-1)[..., None]
    return np.take_along_axis(deviation, where, -1)[..., 0]


def mode_connectivity(path: Path) -> float:
    """`signed_connectivity` of a path."""
    return float(signed_connectivity(path.values))


def bezier(
    objective: Objective,
    theta0: Any,
    theta1: Any,
    *,
    steps: int = 200,
    lr: float = 0.05,
    momentum: float = 0.9,
    generator: torch.Generator | int | None = None,
) -> Float[Tensor, " D"]:
    r"""The bend $\phi$ of a quadratic curve of low loss between two networks.

    Minimises $E_{t\sim U(0,1)}L((1-t)^2\theta_0+2t(1-t)\phi+t^2\theta_1)$ by gradient steps, each
    at one t, from the midpoint. The gradient is $2t(1-t)\nabla L$.

    Args:
        objective: a differentiable loss.
        theta0: first network: vector (D,), ``state_dict`` or model.
        theta1: second network.
        steps: gradient steps; each goes through the data once.
        lr: learning rate, falling to zero along a cosine.
        momentum: of the steps.
        generator: of t; a seed will do.

    Returns:
        $\phi$, for ``linear_path(..., bend=phi)``; after Ctrl-C as far as it came.

    Reference: Garipov et al. (2018), arXiv:1802.10026, section 3.
    """
    checks.positive(lr, "lr")
    start, end = _ends(objective, theta0, theta1)
    phi, speed = 0.5 * (start + end), torch.zeros_like(start)
    source = checks.as_generator(generator)
    with Progress("Bezier curve", checks.count(steps, "steps")) as bar:
        try:
            for step in range(steps):
                t = float(torch.rand((), generator=source))
                _, gradient = objective.gradient(_point(start, end, phi, t))
                rate = lr * 0.5 * (1 + np.cos(np.pi * step / steps))
                speed = momentum * speed + 2 * t * (1 - t) * gradient
                phi = phi - rate * speed
                bar.step()
        except KeyboardInterrupt:
            return phi
    return phi


def _ends(objective: Objective, theta0: Any, theta1: Any) -> tuple[Tensor, Tensor]:
    parameters = objective.parameters
    return parameters.vector(theta0, "theta0"), parameters.vector(theta1, "theta1")


def _point(start: Tensor, end: Tensor, bend: Tensor | None, t: float) -> Tensor:
    if bend is None:
        return torch.lerp(start, end, t)
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
