"""Losses at the nodes of a grid and along a line, filled in piece by piece, known everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator


def strides(n: int) -> list[int]:
    """Steps between the nodes of each level, the coarsest first, which has at least 3 a side."""
    found = [1]
    while (n - 1) // (2 * found[-1]) >= 2:
        found.append(2 * found[-1])
    return found[::-1]


def level(n: int, stride: int) -> np.ndarray:
    """Nodes of a level along one axis: every `stride`-th from the middle, and both ends."""
    return np.union1d([0, n - 1], np.arange((n - 1) // 2 % stride, n, stride))


class Grid:
    """Losses at the nodes of a rectangle, filled coarse to fine, the middle first.

    Args:
        a: (n,) nodes along the first direction.
        b: (n,) nodes along the second.
        guess: what is known of the losses beforehand, (n, n) or a number.
        coarsest: stride of the first level.
    """

    def __init__(self, a: np.ndarray, b: np.ndarray, guess: Any, coarsest: int = 8) -> None:
        n = len(a)
        self.a, self.b = a, b
        self.guess = np.broadcast_to(np.asarray(guess, float), (n, n)).copy()
        self.loss = np.full((n, n), np.nan)
        self.known = np.zeros((n, n), bool)
        self.shown = self.guess
        self.levels = [s for s in strides(n) if s <= coarsest]
        self._waiting = np.empty((0, 2), int)
        self._next_level()

    @property
    def evaluated(self) -> int:
        """Nodes whose loss is exact."""
        return int(self.known.sum())

    @property
    def done(self) -> bool:
        """Whether every node is exact."""
        return not len(self._waiting)

    def _next_level(self) -> None:
        """Queue the nodes of the coarsest level that is not complete."""
        n = len(self.a)
        while self.levels and not len(self._waiting):
            at = level(n, self.levels[0])
            rows, columns = np.meshgrid(at, at, indexing="ij")
            new = ~self.known[rows, columns]
            found = np.stack([rows[new], columns[new]], 1)
            apart = ((found - (n - 1) / 2) ** 2).sum(1)
            self._waiting = found[np.argsort(apart, kind="stable")]
            if not len(found):
                self.levels.pop(0)

    def points(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where to evaluate next: at most `count` points of the present level."""
        rows, columns = self._waiting[:count].T
        return self.a[columns], self.b[rows]

    def put(self, losses: np.ndarray) -> bool:
        """Take the losses of the last `points`; True when they complete a level."""
        rows, columns = self._waiting[: len(losses)].T
        self.loss[rows, columns] = losses
        self.known[rows, columns] = True
        self._waiting = self._waiting[len(losses) :]
        complete = not len(self._waiting)
        if complete:
            self._spread(level(len(self.a), self.levels.pop(0)))
            self._next_level()
        else:
            self.shown = self._filled(self.shown)
        return complete

    def _filled(self, between: np.ndarray) -> np.ndarray:
        """A new array: exact where known, `between` elsewhere; infinite losses as the largest."""
        finite = self.known & np.isfinite(self.loss)
        top = self.loss[finite].max() if finite.any() else 0.0
        return np.where(finite, self.loss, np.where(self.known, top, between))

    def _spread(self, at: np.ndarray) -> None:
        """Correct the guess everywhere by what the nodes `at` say, without overshooting."""
        exact = self._filled(self.guess)[np.ix_(at, at)]
        index = np.arange(len(self.a))
        change: Any = exact - self.guess[np.ix_(at, at)]
        for axis in (0, 1):
            change = PchipInterpolator(at, change, axis=axis)(index)
        self.shown = self._filled(self.guess + change)


class Track:
    """Losses at the stations of the drawn line, evaluated in order; `values` when all are known."""

    def __init__(self, a: np.ndarray, b: np.ndarray) -> None:
        self.a, self.b = a, b
        self.loss = np.empty(0)

    @property
    def done(self) -> bool:
        """Whether all losses are known."""
        return len(self.loss) == len(self.a)

    @property
    def evaluated(self) -> int:
        """Points whose loss is known."""
        return len(self.loss)

    @property
    def values(self) -> np.ndarray | None:
        """The losses, None until all are known (and finite)."""
        return self.loss if self.done and np.isfinite(self.loss).all() else None

    def points(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where to evaluate next."""
        here = len(self.loss)
        return self.a[here : here + count], self.b[here : here + count]

    def put(self, losses: np.ndarray) -> bool:
        """Take the losses of the last `points`; True when they are the last ones."""
        self.loss = np.append(self.loss, losses)
        return self.done
