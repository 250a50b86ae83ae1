r"""Least-squares power laws $y = c - a x^{-b}$, many at once: search b, the rest is a line.

With $u = x/x_0$ and $z = (1 - u^{-b})/b$ the model is $y = d + s z$, where $a = s\,x_0^b/b$ and
$c = d + s/b$. For a given exponent the best line leaves the squared error

$$\varphi(b) = S_{yy} - \max(S_{zy}, 0)^2 / S_{zz} .$$

As $b \to 0$, $z \to \log u$, so that nothing degenerates at small exponents. Running sums give
$\varphi$ on a grid of exponents for every beginning of every curve; Newton's steps on $\varphi$
(its exact second derivative, inside a bracket) finish them together.

Everywhere: `place` $= \log u$, `y` and `weight` (0 or 1) are `(p, n)`, one problem a row.

Reference: Golub and Pereyra (1973), variable projection, doi 10.1137/0710036.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENTS = (0.01, 10.0)
"""Range of the exponent b."""

_GRID = 40
_INFINITY = 1e6  # log of an anchor's place: exp(-0.01 * 1e6) is 0 in float64


@dataclass(frozen=True)
class Sums:
    """Running sums over the observations at each exponent: count, z, zz, y, zy, yy."""

    grid: Tensor
    sums: Tensor  # (m, n, 6, g)


def grid_sums(place: Tensor, y: Tensor, weight: Tensor) -> Sums:
    """The running sums on the grid of exponents, spaced evenly in log b."""
    low, high = (math.log(v) for v in EXPONENTS)
    grid = torch.linspace(low, high, _GRID, dtype=y.dtype, device=y.device).exp()
    z = -torch.expm1(-place[..., None] * grid) / grid
    return Sums(grid, moments(z, y[..., None], weight[..., None]).cumsum(dim=1))


def moments(z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """What one observation adds to the six sums, (..., 6, g)."""
    z, y, weight = torch.broadcast_tensors(z, y, weight)
    return torch.stack(
        [weight, weight * z, weight * z * z, weight * y, weight * z * y, weight * y * y], dim=-2
    )


def bracket(sums: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best exponent of the grid and its two neighbours, from sums `(..., 6, g)`."""
    count, z, zz, y, zy, yy = sums.unbind(-2)
    covariance = (zy - z * y / count).clamp(min=0)
    error = yy - y * y / count - covariance.square() / (zz - z * z / count)
    best = error.argmin(dim=-1)
    last = len(grid) - 1
    return grid[best], grid[(best - 1).clamp(min=0)], grid[(best + 1).clamp(max=last)]


def refine(
    place: Tensor, y: Tensor, weight: Tensor, b: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Newton's steps on the profile from b, in a bracket that shrinks.

    Args:
        b, low, high: `(p,)` starting exponents and the bracket that holds the best ones.

    Returns:
        The best b, its d and slope, and the sum of squared errors, each `(p,)`.
    """
    b, low, high = b.clone(), low.clone(), high.clone()
    active = torch.arange(len(b), device=b.device)
    part = (place, y, weight)
    for _ in range(60):
        at = b[active]
        _, _, _, first, second = _profile(*part, at)
        low[active] = torch.where(first > 0, low[active], at)
        high[active] = torch.where(first > 0, at, high[active])
        newton = at - first / second
        inside = (second > 0) & (newton >= low[active]) & (newton <= high[active])
        step = torch.where(inside, newton, (low[active] + high[active]) / 2)
        b[active] = step
        moving = ((step - at).abs() > 1e-9 * at) & (first != 0)
        if not bool(moving.any()):
            break
        if float(moving.double().mean()) < 0.6:
            place_, y_, weight_ = part
            active, part = active[moving], (place_[moving], y_[moving], weight_[moving])
    d, slope, sse, _, _ = _profile(place, y, weight, b)
    return b, d, slope, sse


def _profile(
    place: Tensor, y: Tensor, weight: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d, slope and squared error at b, and the error's first two derivatives in b."""
    b = b[:, None]
    power = (-b * place).exp()
    z = (1 - power) / b
    z1 = (place * power - z) / b  # dz/db
    z2 = (-place * place * power - 2 * z1) / b

    def total(*factors: Tensor) -> Tensor:
        product = weight
        for factor in factors:
            product = product * factor
        return product.sum(dim=1, keepdim=True)

    count = weight.sum(dim=1, keepdim=True)
    mean_z, mean_y = total(z) / count, total(y) / count
    zc, yc = z - mean_z, y - mean_y
    szz = total(zc, zc)
    slope = total(zc, yc).clamp(min=0) / szz
    rest = yc - slope * zc
    down = total(rest, z1)
    sse, first = total(rest, rest), -2 * slope * down
    # Second derivative: that of the sum of squares, less what d and slope give way.
    curve = slope.square() * total(z1, z1) - slope * total(rest, z2)
    shift = (slope * total(z1)).square() / count
    tilt = (slope * total(z1, zc) - down).square() / szz
    second = 2 * (curve - shift - tilt)
    d = mean_y - slope * mean_z
    return d[:, 0], slope[:, 0], sse[:, 0], first[:, 0], second[:, 0]


def with_anchor(
    place: Tensor, y: Tensor, weight: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The observations and one more at x = infinity, with the values `(p, 1)`."""
    far = torch.full_like(value, _INFINITY)
    return (
        torch.cat([place, far], dim=1),
        torch.cat([y, value], dim=1),
        torch.cat([weight, torch.ones_like(value)], dim=1),
    )
