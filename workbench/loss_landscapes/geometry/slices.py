"""The loss along a line and over a plane of parameter space, coarse to fine."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
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
class Slice1D:
    """Losses along a line: ``values[i]`` at ``center + t[i] * d``; NaN where not computed."""

    t: np.ndarray
    values: np.ndarray

    @property
    def complete(self) -> bool:
        """Whether every point was reached, or an interruption left some out."""
        return not np.isnan(self.values).any()

    def to_frame(self) -> pd.DataFrame:
        """Columns t and loss."""
        return pd.DataFrame({"t": self.t, "loss": self.values})


@dataclass(frozen=True)
class Slice2D:
    """Losses over a plane: ``values[j, i]`` at ``center + x[i] * d1 + y[j] * d2``.

    Points that an interruption left out are NaN.
    """

    x: np.ndarray
    y: np.ndarray
    values: np.ndarray = field(repr=False)

    @property
    def complete(self) -> bool:
        """Whether every point was reached."""
        return not np.isnan(self.values).any()

    def to_frame(self) -> pd.DataFrame:
        """One row a point: a, b (steps along d1 and d2) and loss."""
        b, a = np.meshgrid(self.y, self.x, indexing="ij")
        return pd.DataFrame({"a": a.ravel(), "b": b.ravel(), "loss": self.values.ravel()})


def slice_1d(
    objective: Objective,
    d: Float[Tensor, " D"],
    *,
    center: Any = None,
    span: float = 1.0,
    points: int = 51,
    together: int | None = None,
) -> Slice1D:
    """The loss at ``center + t d`` for t from -span to span.

    Args:
        objective: the loss.
        d: direction; its length is the unit of t.
        center: (D,), default the present parameters.
        span: half the length of the line.
        points: number of points, evenly spaced.
        together: points in one batched pass, see `Objective.values`.

    Returns:
        The line; after Ctrl-C what was computed so far, NaN elsewhere.
    """
    t = np.linspace(-checks.positive(span, "span"), span, checks.count(points, "points"))
    line = _Line(objective, [("d", d)], center)
    return Slice1D(t, _evaluate(line, t[:, None], _order(points), together))


def slice_2d(
    objective: Objective,
    d1: Float[Tensor, " D"],
    d2: Float[Tensor, " D"],
    *,
    center: Any = None,
    span: float = 1.0,
    points: int = 51,
    together: int | None = None,
) -> Slice2D:
    """The loss at ``center + x d1 + y d2`` over a square, coarse to fine.

    The points are evaluated in an order in which every prefix covers the whole square, so that an
    interrupted slice is a picture as well.

    Args:
        objective: the loss.
        d1: first direction, (D,).
        d2: second direction, (D,).
        center: (D,), default the present parameters.
        span: half the side of the square, in units of the directions.
        points: points a side.
        together: points in one batched pass, see `Objective.values`.

    Returns:
        The plane; after Ctrl-C what was computed so far, NaN elsewhere.

    Reference: Li et al. (2018), arXiv:1712.09913, equation 1.
    """
    side = np.linspace(-checks.positive(span, "span"), span, checks.count(points, "points"))
    b, a = np.meshgrid(side, side, indexing="ij")
    line = _Line(objective, [("d1", d1), ("d2", d2)], center)
    at = np.stack([a.ravel(), b.ravel()], 1)
    order = np.concatenate(list(refinement(points)))
    values = _evaluate(line, at, order, together)
    return Slice2D(side, side.copy(), values.reshape(points, points))


def refinement(points: int) -> Iterator[np.ndarray]:
    """Flat indices of a square grid, level by level: first about 7 x 7, then what halving adds."""
    checks.count(points, "points")
    stride = 2 ** max(0, math.floor(math.log2(max(points - 1, 1) / 6)))
    done = np.zeros((points, points), bool)
    while stride >= 1:
        side = np.unique(np.r_[np.arange(0, points, stride), points - 1])
        level = np.zeros_like(done)
        level[np.ix_(side, side)] = True
        yield np.flatnonzero(level & ~done)
        done |= level
        stride //= 2


class _Line:
    """Points of an affine subspace, as vectors."""

    def __init__(
        self, objective: Objective, directions: list[tuple[str, Tensor]], center: Any
    ) -> None:
        parameters = objective.parameters
        self.objective = objective
        self.directions = [parameters.vector(d, name) for name, d in directions]
        self.center = objective.theta if center is None else parameters.vector(center, "center")

    def __call__(self, steps: np.ndarray) -> Iterator[Tensor]:
        out = torch.empty_like(self.center)
        for step in steps:
            torch.add(self.center, self.directions[0], alpha=float(step[0]), out=out)
            for d, t in zip(self.directions[1:], step[1:], strict=True):
                out.add_(d, alpha=float(t))
            yield out.clone()


def _evaluate(
    line: _Line, steps: np.ndarray, order: np.ndarray, together: int | None
) -> np.ndarray:
    """Losses at the steps, evaluated in the given order; Ctrl-C ends it early."""
    values = np.full(len(steps), np.nan)
    found = line.objective.values(line(steps[order]), together=together)
    with Progress("loss slice", len(order)) as bar, contextlib.closing(found):
        try:
            for i, value in zip(order, found, strict=True):
                values[i] = value
                bar.step()
        except KeyboardInterrupt:
            pass
    return values


def _order(points: int) -> np.ndarray:
    """Indices of a line, coarse to fine."""
    stride = 2 ** max(0, math.floor(math.log2(max(points - 1, 1) / 6)))
    found: list[int] = []
    while stride >= 1:
        found += [i for i in [*range(0, points, stride), points - 1] if i not in found]
        stride //= 2
    return np.array(found)
