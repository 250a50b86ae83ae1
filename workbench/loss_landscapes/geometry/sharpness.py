r"""Sharpness: how much the loss rises near a point; and SAM, which trains against it.

All versions measure $L(\theta+\epsilon)-L(\theta)$ for $\epsilon=T_\theta u$ with $\|u\|\le\rho$:
$T=I$, or with ``adaptive=True`` $T=\mathrm{diag}|\theta|$, so that the same network with weights
rescaled between its layers is as sharp.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from workbench.lab import checks
from workbench.lab.progress import Progress
from workbench.loss_landscapes.geometry.estimates import Estimate
from workbench.loss_landscapes.geometry.objective import Objective
from workbench.loss_landscapes.geometry.sam import SAM

__all__ = ["SAM", "sharpness_average", "sharpness_sam", "sharpness_worst", "worst_direction"]

BLOCK = 32  # pairs of points asked for together
_LONGEST, _SHORTEST = 10.0, 1e-3  # steps of the ascent, in radii


def sharpness_sam(
    obj: Objective, rho: float = 0.05, adaptive: bool = False, *, theta: Any = None
) -> float:
    r"""Rise of the loss at the end of one gradient step of length rho.

    $$L\Bigl(\theta+\rho\frac{T^2g}{\|Tg\|}\Bigr)-L(\theta),\qquad g=\nabla L(\theta)$$

    Args:
        obj: the objective; no data in it means whatever its closure does.
        rho: radius of the ball for u.
        adaptive: T = diag |theta| in place of the identity.
        theta: where; default at the model's present parameters.

    Returns:
        The rise; 0 where the gradient is 0.

    Raises:
        ValueError: ``rho`` is not positive.

    Reference:
        P. Foret et al., 2020, arXiv:2010.01412, equation 2; J. Kwon et al. (ASAM), 2021,
        arXiv:2102.11600.
    """
    ball = _Ball(obj, rho, adaptive, theta)
    loss, gradient = ball.gradient(torch.zeros_like(ball.centre))
    size = gradient.norm()
    return ball.value(ball.rho * gradient / size) - loss if size > 0 else 0.0


def sharpness_worst(
    obj: Objective,
    rho: float,
    steps: int = 20,
    adaptive: bool = False,
    *,
    theta: Any = None,
    generator: torch.Generator | int | None = None,
) -> float:
    r"""Largest rise of the loss found in the ball, $\max_{\|u\|\le\rho}L(\theta+Tu)-L(\theta)$.

    By projected gradient ascent; at a minimum with a small rho it is $\tfrac12\rho^2\lambda_{max}$
    (adaptive: of $THT$). A lower bound of the true maximum, never below 0 or `sharpness_sam`.
    Arguments and reference as in `worst_direction`, which also says where.
    """
    rise, _ = worst_direction(obj, rho, steps, adaptive, theta=theta, generator=generator)
    return rise


def worst_direction(
    obj: Objective,
    rho: float,
    steps: int = 20,
    adaptive: bool = False,
    *,
    theta: Any = None,
    generator: torch.Generator | int | None = None,
) -> tuple[float, Tensor]:
    r"""The worst perturbation found in the ball, by projected gradient ascent.

    $$u\leftarrow\Pi_\rho\Bigl(u+s\,\rho\,\frac{\nabla_uL}{\|\nabla_uL\|}\Bigr)$$

    from the best one so far, with a step s that starts long (on a convex bowl the iteration is then
    close to the power method for the top eigenvector) and is halved whenever the loss does not
    rise. The start is the gradient's direction with a random part, which is all of it where the
    gradient vanishes.

    Args:
        obj: the objective.
        rho: radius of the ball for u.
        steps: gradients to spend.
        adaptive: T = diag |theta| in place of the identity.
        theta: where; default at the model's present parameters.
        generator: of the random part of the start.

    Returns:
        The rise and the perturbation epsilon = T u, shape (D,). Ctrl-C ends the ascent early.

    Raises:
        ValueError: ``rho`` is not positive or ``steps`` not a whole number of at least 1.

    Reference:
        M. Andriushchenko et al., A modern look at the relationship between sharpness and
        generalization, 2023, arXiv:2302.07011 (adaptive worst case, 20 steps of ascent).
    """
    ball = _Ball(obj, rho, adaptive, theta)
    steps, rng = checks.count(steps, "steps"), checks.as_generator(generator)
    origin = torch.zeros_like(ball.centre)
    base, slope = ball.gradient(origin)
    noise = torch.randn(len(origin), generator=rng, device=rng.device).to(origin)
    uphill = slope / slope.norm() if slope.norm() > 0 else origin
    mixed = 10 * uphill + noise / noise.norm()
    starts = [ball.rho * uphill, ball.rho * mixed / mixed.norm()]
    best, height, step = origin, base, _LONGEST
    with contextlib.suppress(KeyboardInterrupt), Progress("sharpness", steps) as bar:
        values = list(ball.values(starts))
        start = starts[0] if values[0] > values[1] else starts[1]
        best, (height, slope) = start, ball.gradient(start)
        for _ in range(steps - 1):
            if slope.norm() == 0 or step < _SHORTEST:
                break
            u = ball.project(best + step * ball.rho * slope / slope.norm())
            loss, gradient = ball.gradient(u)
            if loss > height:
                best, height, slope = u, loss, gradient
            else:
                step /= 2
            bar.step()
    return (height - base, ball.scale * best) if height > base else (0.0, origin)


def sharpness_average(
    obj: Objective,
    sigma: float,
    draws: int = 100,
    generator: torch.Generator | int | None = None,
    *,
    adaptive: bool = False,
    theta: Any = None,
) -> Estimate:
    r"""Expected rise of the loss under Gaussian noise, $E_{u\sim N(0,\sigma^2I)}L(\theta+Tu)-L$.

    For a quadratic it is $\tfrac12\sigma^2\mathrm{tr}(THT)$. Noise comes in pairs u, -u, so that
    the slope cancels within a draw.

    Args:
        obj: the objective.
        sigma: standard deviation of each entry of u.
        draws: pairs, two evaluations each.
        generator: of the noise.
        adaptive: T = diag |theta| in place of the identity.
        theta: where; default at the model's present parameters.

    Returns:
        `Estimate` with standard error; ``float()`` of it is the value. After Ctrl-C that of the
        draws made.

    Raises:
        ValueError: ``sigma`` is not positive or ``draws`` not a whole number of at least 1.
    """
    ball = _Ball(obj, sigma, adaptive, theta, "sigma")
    draws, rng = checks.count(draws, "draws"), checks.as_generator(generator)
    base = obj(ball.centre)

    def points(count: int) -> Iterator[Tensor]:
        for _ in range(count):
            noise = torch.randn(obj.size, generator=rng, device=rng.device).to(ball.centre)
            yield ball.rho * noise
            yield -ball.rho * noise

    samples: list[float] = []
    with contextlib.suppress(KeyboardInterrupt), Progress("sharpness", draws) as bar:
        while len(samples) < draws:
            values = ball.values(points(min(BLOCK, draws - len(samples))))
            for plus in values:
                samples.append((plus + next(values)) / 2 - base)
                bar.step()
    return Estimate.of(samples, complete=len(samples) == draws)


class _Ball:
    """The loss as a function of u: at theta + T u."""

    def __init__(
        self, obj: Objective, radius: float, adaptive: bool, theta: Any, name: str = "rho"
    ) -> None:
        if not isinstance(obj, Objective):
            raise TypeError(f"obj: expected an Objective, got {type(obj).__name__}")
        self.obj, self.rho = obj, checks.positive(radius, name)
        self.centre = obj.theta if theta is None else obj.flatten(theta)
        self.scale = self.centre.abs() if adaptive else torch.ones_like(self.centre)

    def gradient(self, u: Tensor) -> tuple[float, Tensor]:
        """Loss and its gradient with respect to u."""
        value, gradient = self.obj.gradient(self.centre + self.scale * u)
        return value, self.scale * gradient

    def values(self, points: Any) -> Iterator[float]:
        """The loss at one u after the other."""
        return self.obj.values(self.centre + self.scale * u for u in points)

    def value(self, u: Tensor) -> float:
        """The loss at u."""
        return next(self.values([u]))

    def project(self, u: Tensor) -> Tensor:
        """The nearest point of the ball."""
        size = u.norm()
        return u * (self.rho / size) if size > self.rho else u
