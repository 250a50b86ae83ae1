"""The planes that the explorer looks at: random, sharpest, of a training path, given."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.loss_landscapes.figures_field import Evaluate, Slice
from workbench.loss_landscapes.geometry import Objective, Plane, random_plane, top_eigs

FITTED = 0.85  # share of the radius within which a training path is drawn
WORDS = {
    "filter": "filter-normalised directions",
    "layer": "layer-normalised directions",
    "adaptive": "random directions in the weights' scale",
    "none": "Gaussian directions",
}


class Planes:
    """Makes planes through the present parameters of an objective.

    Args:
        objective: the loss, on a copy of the user's model.
        radius: half the side of what is looked at.
        seed: of the first draw of random directions.
    """

    def __init__(self, objective: Objective, radius: float, seed: int) -> None:
        self.objective, self.radius, self.seed = objective, radius, seed
        self.origin = objective.theta

    def vector(self, direction: Any, name: str) -> Float[Tensor, " D"]:
        """A direction as a vector."""
        return self.objective.parameters.vector(direction, name)

    def random(self, kind: str, draw: int) -> Slice:
        """The `draw`-th pair of random directions of a kind."""
        normalize = None if kind == "none" else kind
        seed = self.seed + draw - 1
        first, second = random_plane(self.objective, normalize=normalize, generator=seed)
        return self.span(f"{WORDS[kind]}, draw {draw}", first, second)

    def eigenvectors(self) -> Slice:
        """The two leading eigenvectors of the Hessian, as long as the weights."""
        found = top_eigs(self.objective, 2, theta=self.origin, generator=self.seed)
        weights = self.objective.unflatten(self.origin).values()
        length = torch.cat([w.reshape(-1) for w in weights if w.ndim > 1] or [self.origin]).norm()
        first, second = found.vectors.to(self.origin) * length
        values = " and ".join(f"{value:.3g}" for value in found.values)
        return self.span(f"the sharpest directions, λ = {values}", first, second)

    def trajectory(self, plane: Plane) -> Slice:
        """The plane of a training path, moved and scaled so that the path fits."""
        low, high = plane.coordinates.min(0), plane.coordinates.max(0)
        middle, unit = (low + high) / 2, float((high - low).max()) / (2 * FITTED * self.radius)
        x, y = (float(v) for v in middle)
        origin = plane.origin + x * plane.d1 + y * plane.d2
        share = f"{plane.explained.sum():.0%}"
        return self.span(
            f"the training path, {share} of its variance", unit * plane.d1, unit * plane.d2,
            origin=origin, path=(plane.coordinates - middle) / unit,
        )  # fmt: skip

    def span(
        self,
        title: str,
        first: Tensor,
        second: Tensor,
        *,
        origin: Tensor | None = None,
        path: np.ndarray | None = None,
    ) -> Slice:
        """The plane of two directions through `origin`, by default the present parameters."""
        g11, g12, g22 = (
            float(u.double() @ v.double())
            for u, v in ((first, first), (first, second), (second, second))
        )
        start = self.origin if origin is None else origin
        return Slice(
            title,
            self._along(start, first, second),
            (g11, g12, g22),
            np.empty((0, 2)) if path is None else path,
        )

    def _along(self, origin: Tensor, first: Tensor, second: Tensor) -> Evaluate:
        def evaluate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            pairs = zip(a.tolist(), b.tolist(), strict=True)
            return np.array(
                list(self.objective.values(origin + x * first + y * second for x, y in pairs))
            )

        return evaluate
