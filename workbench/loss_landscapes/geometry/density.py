"""Spectral densities: quadratures of a spectral measure, smoothed for drawing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from workbench.lab import checks

_CHUNK = 500  # grid points taken together, so that intermediate results stay in cache
Quadrature = tuple[np.ndarray, np.ndarray]  # nodes and weights of one draw


@dataclass(frozen=True)
class Density:
    """Distribution of a Hessian's eigenvalues, smoothed for drawing, as a quadrature inside.

    Attributes:
        grid: (g,) positions.
        density: (g,) of total mass 1, the mean over draws.
        error: (g,) its standard error over draws; 0 for a single one.
        nodes: (n,) quadrature nodes of all draws.
        weights: (n,) their weights, of sum 1.
        sigma: standard deviation of the Gaussian at each node.
        draws: random vectors used.
        complete: False if interrupted.
    """

    grid: Float[np.ndarray, " g"]
    density: Float[np.ndarray, " g"]
    error: Float[np.ndarray, " g"]
    nodes: Float[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]
    sigma: float
    draws: int
    complete: bool

    def moment(self, power: int) -> float:
        r"""Estimate of $\mathrm{tr}(H^p)/D$, the mean of the p-th powers of the eigenvalues."""
        return float(self.weights @ self.nodes**power)

    def mass(self, low: float = -math.inf, high: float = math.inf) -> float:
        """Estimated share of the eigenvalues in [low, high]."""
        return float(self.weights[(self.nodes >= low) & (self.nodes <= high)].sum())


@dataclass(frozen=True)
class Smoothing:
    """From quadratures to a curve."""

    points: int
    sigma2: float
    grid: np.ndarray | None

    @classmethod
    def checked(cls, points: int, sigma2: float, grid: Any) -> Smoothing:
        """From the arguments of a public function."""
        if grid is not None:
            grid = checks.to_numpy(checks.as_floats(grid, "grid", ndim=1)).astype(np.float64)
        return cls(
            checks.count(points, "points", minimum=2), checks.positive(sigma2, "sigma2"), grid
        )

    def __call__(self, found: list[Quadrature], draws: int, finished: int) -> Density:
        """The density of what was found; an unfinished draw counts only if it is all there is."""
        if not found:
            raise KeyboardInterrupt
        found = found[: max(finished, 1)]
        nodes = np.concatenate([x for x, _ in found])
        low, high = float(nodes.min()), float(nodes.max())
        rounding = 1e-9 * max(abs(low), abs(high))
        extent = high - low if high - low > rounding else max(abs(low), abs(high)) or 1.0
        sigma = self.sigma2**0.5 * extent
        grid = self.grid
        if grid is None:
            grid = np.linspace(low - 6 * sigma, high + 6 * sigma, self.points)
        curves = np.stack([_mixture(grid, x, w, sigma) for x, w in found])
        n = len(curves)
        error = curves.std(0, ddof=1) / n**0.5 if n > 1 else np.zeros_like(grid)
        return Density(
            grid=grid,
            density=curves.mean(0),
            error=error,
            nodes=nodes,
            weights=np.concatenate([w for _, w in found]) / n,
            sigma=sigma,
            draws=n,
            complete=finished == draws,
        )


def _mixture(grid: np.ndarray, nodes: np.ndarray, weights: np.ndarray, sigma: float) -> np.ndarray:
    out = np.empty(len(grid))
    for start in range(0, len(grid), _CHUNK):
        z = (grid[start : start + _CHUNK, None] - nodes) / sigma
        z *= z
        z *= -0.5
        out[start : start + _CHUNK] = np.exp(z, out=z) @ weights
    return out / (sigma * math.sqrt(2 * math.pi))
