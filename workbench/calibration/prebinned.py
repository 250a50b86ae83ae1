r"""Sufficient statistics of a large table at 97 temperatures, so that a slider only looks up.

Dividing logits by T moves every row's confidence, so statistics of one temperature say nothing
about another. They are therefore collected once for $T = 2^{j/16}$, $j = -48, \dots, 48$ (from 1/8
to 8): for each temperature, count and sum of confidences in fine cells, apart for right and wrong
predictions, and mean and standard error of the NLL and the Brier score.

*Cells.* 2,970 cells of width 1/3000 up to 0.99, then cells of $1 - c$ whose width halves with each
octave down to $2^{-24}$. Every number of equal-width bins that divides 3000 (5, 10, 15, 20, 25, 30,
50, 60, 75, 100) is a union of cells: its statistics are exact. Equal-mass bins end at the cell edge
nearest to the quantile; moving m rows to a neighbouring bin changes the ECE by at most 2m/n, which
`BinnedTable.snapped` bounds for given bins.

*Cost.* Halving T squares each $e^{z/T}$, so only 16 exponentials per logit are taken; all else is
products and sums on blocks that stay in the cache. The sum of the squared exponentials that the
Brier score needs is the plain sum at T/2, which is in hand as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from workbench.calibration.bins import SCHEMES, BinStats, Scheme
from workbench.lab import checks

STEPS, OCTAVES = 16, 6
TEMPERATURES = 2.0 ** (np.arange(-STEPS * OCTAVES // 2, STEPS * OCTAVES // 2 + 1) / STEPS)
UNIFORM = 3000
WHOLE = 2970  # uniform cells below 0.99
_SHIFT = 19  # keeps 4 bits of the mantissa: 16 cells per octave of 1 - c
_SMALLEST = np.float32(2.0**-24)
_BLOCK = 16_384


def _code(values: Float[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
    """Exponent and leading mantissa bits of a float32, as an integer that rises with it."""
    return np.asarray(values, np.float32).view(np.int32) >> _SHIFT


_TOP_CODE = int(_code(np.nextafter(np.float32(0.01), np.float32(0))))
_LOW_CODE = int(_code(_SMALLEST))
CELLS = WHOLE + _TOP_CODE - _LOW_CODE + 1


def _edges() -> Float[np.ndarray, " c1"]:
    codes = np.arange(_TOP_CODE, _LOW_CODE, -1, dtype=np.int32)
    lower = (codes << _SHIFT).view(np.float32).astype(np.float64)  # of 1 - c, for each cell
    return np.concatenate([np.arange(WHOLE + 1) / UNIFORM, 1 - lower, [1.0]])


EDGES = _edges()


def cell_index(
    confidence: Float[np.ndarray, " n"], rest: Float[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Cell of each confidence; `rest` is 1 minus it, computed without cancellation."""
    whole = np.ceil(confidence * np.float32(UNIFORM)).astype(np.int32) - 1
    tail = (WHOLE + _TOP_CODE) - np.maximum(_code(rest), _LOW_CODE)
    return np.where(rest < np.float32(0.01), tail, np.clip(whole, 0, WHOLE - 1))


@dataclass(frozen=True)
class BinnedTable:
    """Statistics of n rows at each of `temperatures`, in `CELLS` cells of confidence.

    `nll` and `brier` hold mean and standard error per temperature.
    """

    temperatures: Float[np.ndarray, " t"]
    count: Float[np.ndarray, "t c 2"]
    total: Float[np.ndarray, "t c 2"]
    nll: Float[np.ndarray, "t 2"]
    brier: Float[np.ndarray, "t 2"]

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.count[0].sum())

    def nearest(self, temperature: float) -> int:
        """Index of the temperature nearest to `temperature` on a logarithmic scale."""
        checks.positive(temperature, "temperature")
        return int(np.abs(np.log(self.temperatures / temperature)).argmin())

    def cells(self, index: int) -> BinStats:
        """The statistics in cells at temperature `index`; within a cell confidences count equal."""
        count, total = self.count[index], self.total[index]
        square = np.divide(total**2, count, out=np.zeros_like(total), where=count > 0)
        return BinStats(EDGES, count, total, square)

    def bins(self, index: int, bins: int, scheme: Scheme = "equal-width") -> BinStats:
        """The statistics in bins at temperature `index`."""
        checks.one_of(scheme, SCHEMES, "scheme")
        cells = self.cells(index)
        if scheme == "equal-width":
            if UNIFORM % bins or bins > 100:
                raise ValueError(f"bins: expected a divisor of {UNIFORM} up to 100, got {bins}")
            return cells.merge(np.arange(bins) * (UNIFORM // bins))
        if scheme == "equal-mass":
            return cells.merge(self._starts(cells, bins))
        best = cells.merge(self._starts(cells, 1))
        for more in range(2, CELLS):
            starts = self._starts(cells, more)
            finer = cells.merge(starts)
            if len(starts) < more or (np.diff(finer.accuracy) < 0).any():
                break
            best = finer
        return best

    def snapped(self, index: int, bins: int) -> float:
        """Bound on the ECE's error from equal-mass bins that end at cell edges."""
        cumulated = np.cumsum(self.cells(index).size)
        wanted = np.arange(1, bins) * self.n / bins
        moved = np.abs(cumulated[:, None] - wanted).min(0)
        return float(2 * moved.sum() / self.n)

    def _starts(self, cells: BinStats, bins: int) -> Int[np.ndarray, " b"]:
        cumulated = np.cumsum(cells.size)
        wanted = np.arange(1, bins) * self.n / bins
        after = np.minimum(np.searchsorted(cumulated, wanted), CELLS - 1)
        before = np.maximum(after - 1, 0)
        nearer = np.where(wanted - cumulated[before] < cumulated[after] - wanted, before, after)
        ends = np.unique(nearer[(cumulated[nearer] > 0) & (cumulated[nearer] < self.n)])
        ends = ends[np.concatenate([[True], np.diff(cumulated[ends]) > 0])] if len(ends) else ends
        return np.concatenate([[0], ends + 1])


def collect(
    scores: Float[np.ndarray, "n k"],
    labels: Int[np.ndarray, " n"],
    *,
    octaves: int = OCTAVES,
    steps: int = STEPS,
    progress: Callable[[], Any] | None = None,
) -> BinnedTable:
    """Collect the statistics of logits (or log-probabilities) and labels.

    Args:
        scores: (n, k) logits.
        labels: (n,) class indices.
        octaves: even number of doublings of T, half of them below 1; 0 for T = 1 alone.
        steps: temperatures per octave.
        progress: called after each of `blocks(n)` blocks of rows.
    """
    fractions = steps if octaves else 1
    t = octaves * fractions + 1
    count, total = np.zeros((t, 2 * CELLS)), np.zeros((t, 2 * CELLS))
    losses = np.zeros((t, 4))
    for start in range(0, len(labels), _BLOCK):
        rows = slice(start, start + _BLOCK)
        _block(scores[rows], labels[rows], octaves, fractions, count, total, losses)
        if progress is not None:
            progress()
    n = len(labels)
    mean, square = losses[:, ::2] / n, losses[:, 1::2] / n
    error = np.sqrt(np.maximum(square - mean**2, 0.0) / max(n - 1, 1))
    found = np.stack([mean, error], axis=-1)[::-1]  # by rising temperature, not its inverse
    return BinnedTable(
        2.0 ** ((np.arange(t) - t // 2) / fractions),
        count.reshape(t, CELLS, 2)[::-1],
        total.reshape(t, CELLS, 2)[::-1],
        found[:, 0],
        found[:, 1],
    )


def blocks(n: int) -> int:
    """How often `collect` calls `progress`."""
    return -(-n // _BLOCK)


def _block(
    scores: np.ndarray,
    labels: np.ndarray,
    octaves: int,
    fractions: int,
    count: np.ndarray,
    total: np.ndarray,
    losses: np.ndarray,
) -> None:
    """Add one block of rows at every temperature; classes run along axis 0 from here on."""
    z = np.ascontiguousarray(scores.T, dtype=np.float32)
    columns = np.arange(z.shape[1])
    best = z.argmax(0)
    z -= z[best, columns]
    own = z[labels, columns]
    right = best == labels
    z[best, columns] = -np.inf  # the predicted class is the 1 in 1 + sum
    lowest = 2.0 ** (-octaves / 2)
    for f in range(fractions):
        beta = lowest * 2.0 ** (f / fractions)
        power = np.exp(z * np.float32(beta))
        rest = power.sum(0)
        for octave in range(octaves + (f == 0)):
            power *= power
            squares = power.sum(0)
            index = octave * fractions + f
            _add(rest, squares, own * np.float32(beta), right, index, count, total, losses)
            rest, beta = squares, 2 * beta


def _add(
    rest: np.ndarray,
    squares: np.ndarray,
    own: np.ndarray,
    right: np.ndarray,
    index: int,
    count: np.ndarray,
    total: np.ndarray,
    losses: np.ndarray,
) -> None:
    confidence = 1 / (1 + rest)
    cell = 2 * cell_index(confidence, rest * confidence) + right
    count[index] += np.bincount(cell, minlength=2 * CELLS)
    total[index] += np.bincount(cell, confidence, minlength=2 * CELLS)
    nll = np.log1p(rest) - own
    brier = (1 + squares) * confidence**2 - 2 * np.exp(-nll) + 1
    sums = (v.sum(dtype=np.float64) for v in (nll, nll * nll, brier, brier * brier))
    losses[index] += list(sums)
