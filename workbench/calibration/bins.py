r"""Binned sufficient statistics of confidence and correctness.

Every binned calibration measure needs only, for each bin $b$ and separately for wrong and right
predictions, the count, the sum of confidences and the sum of squared confidences. `BinStats` holds
these three $(B, 2)$ tables: measures, reliability diagrams and bootstrap replicates are computed
from them without touching the rows again.

Bins are closed on the right, $(e_b, e_{b+1}]$; a confidence of exactly 0 belongs to the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from workbench.lab import checks

Scheme = Literal["equal-width", "equal-mass", "adaptive"]
SCHEMES = ("equal-width", "equal-mass", "adaptive")

_BLOCK_BYTES = 1 << 20  # rows are read in blocks that stay in the cache
_TOLERANCE = 1e-3  # of the sum of a row of probabilities, as in `checks.as_probs`


class TopLabel(NamedTuple):
    """The predicted class of each row: its probability, whether it is right, which it is."""

    confidence: Float[np.ndarray, " n"]
    correct: Bool[np.ndarray, " n"]
    predicted: Int[np.ndarray, " n"]


def top_label(probs: Any, labels: Any) -> TopLabel:
    """Confidence, correctness and predicted class of each row (the first of tied classes).

    Args:
        probs: (n, k) probabilities; NumPy, torch or pandas.
        labels: (n,) class indices.

    Raises:
        ValueError: rows that are not probabilities, labels outside 0..k-1, different lengths.
    """
    if not (isinstance(probs, np.ndarray) and probs.dtype.kind == "f" and probs.ndim == 2):
        probs = checks.as_probs(probs)
    if len(probs) == 0:
        checks.as_probs(probs)
    labels = checks.to_numpy(checks.as_labels(labels, probs.shape[1]))
    n = checks.same_length(probs=probs, labels=labels)
    if checks.is_tensor(probs) and probs.device.type != "cpu":
        best = probs.detach().max(1)
        confidence, predicted = checks.to_numpy(best.values), checks.to_numpy(best.indices)
    else:
        confidence, predicted = _top(checks.to_numpy(probs), n)
    # Rows may sum to slightly more than one; a confidence may not exceed it.
    return TopLabel(np.minimum(confidence, 1, out=confidence), predicted == labels, predicted)


def _top(probs: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """One pass over the table: each block is checked and reduced while it is in the cache."""
    confidence, predicted = np.empty(n, probs.dtype), np.empty(n, np.int64)
    step = max(1, _BLOCK_BYTES // probs[:1].nbytes)
    first = np.arange(step) * probs.shape[1]
    for start in range(0, n, step):
        rows = slice(start, start + step)
        block = np.ascontiguousarray(probs[rows])
        if not _are_probs(block):
            checks.as_probs(probs)  # names the row in the whole table
        predicted[rows] = best = block.argmax(1)
        confidence[rows] = block.reshape(-1).take(first[: len(block)] + best)
    return confidence, predicted


def _are_probs(block: np.ndarray) -> bool:
    """Whether rows are not negative and sum to one; a doubtful answer is no."""
    if block.itemsize < 4 or block.shape[1] < 2:
        checks.as_probs(block)
        return True
    sums = block @ np.ones(block.shape[1], block.dtype)
    return bool(block.min() >= 0 and sums.min() >= 1 - _TOLERANCE and sums.max() <= 1 + _TOLERANCE)


@dataclass(frozen=True)
class BinStats:
    """Additive statistics of rows in bins; axis 1 separates wrong (0) from right (1).

    `count`, `total` and `square` are the numbers of rows, sums of confidences and sums of squared
    confidences. Two objects with equal edges add up.
    """

    edges: Float[np.ndarray, " b1"]
    count: Float[np.ndarray, "b 2"]
    total: Float[np.ndarray, "b 2"]
    square: Float[np.ndarray, "b 2"]

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.count.sum())

    @property
    def size(self) -> Float[np.ndarray, " b"]:
        """Rows per bin."""
        return self.count.sum(1)

    @property
    def accuracy(self) -> Float[np.ndarray, " b"]:
        """Share of right predictions per bin; NaN where the bin is empty."""
        return _ratio(self.count[:, 1], self.size)

    @property
    def confidence(self) -> Float[np.ndarray, " b"]:
        """Mean confidence per bin; NaN where the bin is empty."""
        return _ratio(self.total.sum(1), self.size)

    @property
    def gap(self) -> Float[np.ndarray, " b"]:
        """Accuracy minus mean confidence per bin; NaN where the bin is empty."""
        return self.accuracy - self.confidence

    def __add__(self, other: BinStats) -> BinStats:
        if not np.array_equal(self.edges, other.edges):
            raise ValueError("other: expected statistics over the same edges")
        return BinStats(
            self.edges,
            self.count + other.count,
            self.total + other.total,
            self.square + other.square,
        )

    def merge(self, starts: Int[np.ndarray, " m"]) -> BinStats:
        """Join neighbouring bins: new bin `j` begins at old bin `starts[j]`."""
        joined = (np.add.reduceat(a, starts, axis=0) for a in (self.count, self.total, self.square))
        return BinStats(np.append(self.edges[starts], self.edges[-1]), *joined)

    def resample(
        self, replicates: int, rng: np.random.Generator, *, spread: bool = True
    ) -> tuple[Float[np.ndarray, "r b 2"], Float[np.ndarray, "r b 2"]]:
        """Counts and confidence sums of bootstrap samples of the rows.

        Drawing n rows with replacement makes the cell counts multinomial: exact. Given its count, a
        cell's confidence sum is a sum of that many draws from the cell's confidences; it is drawn
        from the normal law with the same mean and variance (which bin width keeps small next to
        that of the counts). `spread=False` leaves that variance out, for cells so fine that it is
        nothing.
        """
        cells = self.count.ravel()
        drawn = rng.multinomial(self.n, cells / self.n, size=replicates).astype(np.float64)
        mean = _ratio(self.total.ravel(), cells, empty=0.0)
        totals = drawn * mean
        if spread:
            variance = _ratio(self.square.ravel(), cells, empty=0.0) - mean**2
            noise = rng.standard_normal(drawn.shape)
            totals += np.sqrt(drawn * np.maximum(variance, 0.0)) * noise
        shape = (replicates, *self.count.shape)
        return drawn.reshape(shape), totals.reshape(shape)


def _ratio(a: np.ndarray, b: np.ndarray, empty: float = np.nan) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(b), empty), where=b > 0)


def bin_statistics(
    confidence: Shaped[np.ndarray, " n"],
    correct: Shaped[np.ndarray, " n"],
    edges: Shaped[np.ndarray, " b1"],
) -> BinStats:
    """Counts, sums and sums of squares of `confidence` per bin and correctness."""
    cell = 2 * bin_index(confidence, edges) + correct
    b = len(edges) - 1
    tables = (
        np.bincount(cell, weights, minlength=2 * b).reshape(b, 2).astype(np.float64, copy=False)
        for weights in (None, confidence, np.square(confidence))
    )
    return BinStats(np.asarray(edges, np.float64), *tables)


def bin_index(
    values: Shaped[np.ndarray, " n"], edges: Shaped[np.ndarray, " b1"]
) -> Int[np.ndarray, " n"]:
    """Index of the right-closed bin of each value; values outside go to the end bins.

    Edges are rounded to the values' precision, so that a float32 confidence of 0.3 lies on the
    edge 0.3.
    """
    rounded = edges.astype(values.dtype, copy=False)
    bins = len(edges) - 1
    if len(values) < 4096 or values.itemsize < 4 or not _equal_width(edges):
        return np.searchsorted(rounded[1:-1], values, side="left")
    index = np.minimum((values * values.dtype.type(bins)).astype(np.int32), bins - 1)
    np.maximum(index, 0, out=index)
    index -= values <= rounded[index]  # the product was rounded: look at both edges
    index += values > rounded[index + 1]
    return np.clip(index, 0, bins - 1, out=index)


def _equal_width(edges: np.ndarray) -> bool:
    return np.array_equal(edges, np.linspace(0.0, 1.0, len(edges)))


def equal_width_edges(bins: int) -> Float[np.ndarray, " b1"]:
    """`bins` intervals of equal width over [0, 1]."""
    return np.linspace(0.0, 1.0, checks.count(bins, "bins") + 1)


def equal_mass_edges(
    confidence: Shaped[np.ndarray, " n"], bins: int, *, ordered: bool = False
) -> Float[np.ndarray, " b1"]:
    """Edges at the quantiles: bins of equal counts, but equal confidences are never separated.

    With many ties there are fewer than `bins` bins; many zeros have a bin of width 0 to themselves.
    `ordered=True` says that the confidences are sorted already.
    """
    n, bins = len(confidence), checks.count(bins, "bins")
    upper = confidence if ordered else np.sort(confidence)
    last = -(-np.arange(1, bins) * n // bins) - 1  # ceil(j n / bins)th smallest, from 0
    inner = np.unique(upper[last])
    return np.concatenate([[0.0], inner[inner < upper[-1]], [1.0]])


def sweep_edges(
    confidence: Shaped[np.ndarray, " n"], correct: Shaped[np.ndarray, " n"]
) -> Float[np.ndarray, " b1"]:
    """Equal-mass edges with as many bins as keep accuracy increasing from bin to bin.

    Reference: Roelofs, Cain, Shlens, Mozer 2022, "Mitigating bias in calibration error
    estimation", arXiv 2012.08668, algorithm 1 (the sweep stops at the first count that breaks
    the order).
    """
    order = np.argsort(confidence, kind="stable")
    ordered, hits = confidence[order], np.concatenate([[0], np.cumsum(correct[order])])
    best = equal_mass_edges(ordered, 1, ordered=True)
    for bins in range(2, len(ordered) + 1):
        edges = equal_mass_edges(ordered, bins, ordered=True)
        ends = np.searchsorted(ordered, edges[1:].astype(ordered.dtype), side="right")
        accuracy = np.diff(hits[np.concatenate([[0], ends])]) / np.diff(ends, prepend=0)
        if (np.diff(accuracy) < 0).any() or len(edges) <= bins:
            return best
        best = edges
    return best


def scheme_edges(
    confidence: Shaped[np.ndarray, " n"],
    correct: Shaped[np.ndarray, " n"],
    bins: int,
    scheme: Scheme,
) -> Float[np.ndarray, " b1"]:
    """Edges of a binning scheme; "adaptive" chooses the number of bins itself (`sweep_edges`)."""
    checks.one_of(scheme, SCHEMES, "scheme")
    if scheme == "equal-width":
        return equal_width_edges(bins)
    if scheme == "equal-mass":
        return equal_mass_edges(confidence, bins)
    return sweep_edges(confidence, correct)
