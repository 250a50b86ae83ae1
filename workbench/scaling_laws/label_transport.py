"""Optimal transport between labelled data sets, and from mixtures of sources to one target.

Moving a labelled point costs the squared distance of the features plus, for a change of label, the
squared Wasserstein distance between the classes:

    d((x, y), (x', y')) = |x - x'|^2 + c W_2^2(y, y').

The linear programme is solved by POT (optional extra ``scaling_laws``). What a mixture's shares do
to its value is read off the dual potentials.

Reference: Alvarez-Melis and Fusi, 2020, arXiv 2002.02923 (OTDD); Kang, Just, Sahu and Jia, 2023,
arXiv 2307.02460.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from workbench.lab import checks

Dataset = tuple[ArrayLike, ArrayLike]  # features (n, d), labels (n,)


def label_distances(Xa: ArrayLike, ya: ArrayLike, Xb: ArrayLike, yb: ArrayLike) -> np.ndarray:
    r"""Squared 2-Wasserstein distance between classes, each taken for a Gaussian.

    $$W_2^2 = \|m_a - m_b\|^2 + \mathrm{tr}(S_a + S_b) - 2\,\|S_a^{1/2} S_b^{1/2}\|_*$$

    with the nuclear norm (sum of singular values) in place of the usual
    tr (S_a^{1/2} S_b S_a^{1/2})^{1/2}, which it equals.

    Args:
        Xa, Xb: (n, d) and (m, d) features.
        ya, yb: labels; classes are taken in sorted order.

    Returns:
        (classes of a, classes of b), in squared units of the features.

    Raises:
        ValueError: features and labels of a set do not match, are empty or not finite.

    Reference: Alvarez-Melis and Fusi, 2020, arXiv 2002.02923 (distance of Gaussian classes).
    """
    (mean_a, root_a), (mean_b, root_b) = _moments(Xa, ya, "a"), _moments(Xb, yb, "b")
    cross = np.linalg.svd(root_a[:, None] @ root_b[None], compute_uv=False).sum(-1)
    spread_a, spread_b = (np.square(root).sum((1, 2)) for root in (root_a, root_b))
    squared = _squared(mean_a, mean_b) + spread_a[:, None] + spread_b[None] - 2 * cross
    return np.maximum(squared, 0.0)


def ground_cost(
    Xa: ArrayLike, ya: ArrayLike, Xb: ArrayLike, yb: ArrayLike, *, label_weight: float = 1.0
) -> np.ndarray:
    r"""Cost of moving a labelled point to another: $\|x - x'\|^2 + c\,W_2^2(y, y')$, (n, m).

    Args:
        Xa, ya, Xb, yb: as of `label_distances`.
        label_weight: c; 0 compares features alone.

    Raises:
        ValueError: as of `label_distances`, or ``label_weight`` is negative.

    Reference: Alvarez-Melis and Fusi, 2020, arXiv 2002.02923 (distance of labelled points).
    """
    weight = checks.positive(label_weight, "label_weight", zero=True)
    (a, labels_a), (b, labels_b) = _dataset(Xa, ya, "a"), _dataset(Xb, yb, "b")
    cost = _squared(a, b)
    if weight > 0:
        rows, columns = (np.unique(y, return_inverse=True)[1] for y in (labels_a, labels_b))
        cost += weight * label_distances(a, labels_a, b, labels_b)[np.ix_(rows, columns)]
    return cost


def ot_label_distance(
    Xa: ArrayLike,
    ya: ArrayLike,
    Xb: ArrayLike,
    yb: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    label_weight: float = 1.0,
    reg: float = 0.0,
) -> tuple[float, np.ndarray]:
    """Optimal transport between two labelled data sets, and the potentials of the first.

    Args:
        Xa, ya: (n, d) features and (n,) labels of the training set.
        Xb, yb: (m, d) and (m,) of the validation set, whose points weigh the same.
        weights: n shares of mass that sum to one; by default equal ones.
        label_weight: c of `ground_cost`.
        reg: 0 solves the linear programme; above, the entropic problem (in units of the cost).

    Returns:
        The cost, and n dual potentials, defined up to a constant: the derivative of the cost by
        the points' mass.

    Raises:
        ValueError: an argument is out of range; the message names it. ImportError: POT is absent.
    """
    cost = ground_cost(Xa, ya, Xb, yb, label_weight=label_weight)
    n = len(cost)
    mass = np.full(n, 1 / n) if weights is None else checks.as_floats(weights, "weights", ndim=1)
    if len(mass) != n or mass.min() < 0 or not math.isclose(mass.sum(), 1.0, rel_tol=1e-6):
        raise ValueError(f"weights: expected {n} shares of at least 0 that sum to 1")
    value, dual, _ = _solve(cost, mass, checks.positive(reg, "reg", zero=True))
    return value, dual


@dataclass
class Transport:
    """OT from mixtures of k sources to one validation set, as a function of the shares.

    The points of source i weigh q_i / n_i each. A class of one source and the same class of another
    count as two labels, so the ground cost does not depend on q, and OT(q) is convex. Solved
    mixtures are kept: as OT(q) is the largest of its supporting planes, they bound it from below
    everywhere (`bound`).

    Args:
        sources: k pairs of features (n_i, d) and labels (n_i,).
        target: the validation set, features and labels.
        label_weight, reg: as of `ot_label_distance`.
    """

    sources: Sequence[Dataset]
    target: Dataset
    label_weight: float = 1.0
    reg: float = 0.0
    slopes: list[np.ndarray] = field(init=False, repr=False, default_factory=list)
    offsets: list[float] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        sets = [_dataset(X, y, f"sources[{i}]") for i, (X, y) in enumerate(self.sources)]
        if len(sets) < 2:
            raise ValueError(f"sources: expected at least two, got {len(sets)}")
        self.owner = np.repeat(np.arange(len(sets)), [len(y) for _, y in sets])
        self.sizes = np.bincount(self.owner)
        labels = np.concatenate([y for _, y in sets])
        both = self.owner * (labels.max() + 1) + labels
        X = np.concatenate([X for X, _ in sets])
        self.cost = ground_cost(X, both, *self.target, label_weight=self.label_weight)
        self._warm: tuple[np.ndarray, np.ndarray] | None = None

    def __call__(self, q: ArrayLike) -> tuple[float, np.ndarray]:
        """OT of the mixture q, and a potential per source (the mean over its points).

        For dq that sums to zero, dOT = sum of potentials * dq.
        """
        shares = as_shares(q, len(self.sizes))
        value, dual, self._warm = _solve(
            self.cost, (shares / self.sizes)[self.owner], self.reg, self._warm
        )
        potentials: np.ndarray = np.bincount(self.owner, dual) / self.sizes
        self.slopes.append(potentials)
        self.offsets.append(value - float(shares @ potentials))
        return value, potentials

    def many(self, Q: ArrayLike) -> np.ndarray:
        """OT of every row of Q, shape (m,)."""
        return np.array([self(q)[0] for q in np.atleast_2d(Q)])

    def bound(self, Q: ArrayLike) -> np.ndarray:
        """The largest supporting plane found so far at every row of Q: at most OT, shape (m,)."""
        planes: np.ndarray = np.asarray(Q, float) @ np.array(self.slopes).T + np.array(self.offsets)
        return planes.max(-1)


def calibrated_gradient(potentials: ArrayLike, q: ArrayLike) -> np.ndarray:
    r"""The paper's dOT/dq_i: mean potential of source i less the mean over all other points.

    $$\frac{1}{n_i}\Big(\sum_{j \in i} f_j - \frac{n_i}{n - n_i}\sum_{j \notin i} f_j\Big)$$

    is the derivative along which q_i grows and the others shrink in proportion. The constant up to
    which potentials are defined cancels. A source with q_i = 1 has no others: 0.

    Args:
        potentials: k means over the sources' points.
        q: k shares.

    Returns:
        k derivatives.

    Raises:
        ValueError: the shares do not match the potentials, or are none.

    Reference: Kang, Just, Sahu and Jia, 2023, arXiv 2307.02460 (data source selection).
    """
    f = checks.as_floats(potentials, "potentials", ndim=1)
    q = as_shares(q, len(f))
    rest = 1 - q
    return np.where(rest > 1e-12, (f - q @ f) / np.maximum(rest, 1e-12), 0.0)


# --- inside


def pot() -> Any:
    """The POT library, loaded on first use."""
    try:
        return importlib.import_module("ot")
    except ModuleNotFoundError:
        raise ImportError(
            "optimal transport needs POT: pip install 'paper-workbench[scaling-laws]'"
        ) from None


def _solve(
    cost: np.ndarray,
    mass: np.ndarray,
    reg: float,
    warm: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[float, np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """Value, potentials of the rows, and what to start the next problem from.

    Rows without mass leave the problem; their potential is the largest feasible one, which is what
    a first bit of mass on them would cost.
    """
    ot = pot()
    there = mass > 0
    target = np.full(cost.shape[1], 1 / cost.shape[1])
    part, weight = cost[there], mass[there] / mass[there].sum()
    if reg == 0:
        start = None if warm is None else (warm[0][there], warm[1])
        _, log = ot.emd(weight, target, part, log=True, potentials_init=start)
        dual = np.where(there, 0.0, (cost - log["v"]).min(1))
        dual[there] = log["u"]
        return float(log["cost"]), dual, (dual, log["v"])
    _, log = ot.sinkhorn(weight, target, part, reg, method="sinkhorn_log", log=True)
    v = reg * log["log_v"]
    inner = np.log(target) + (v - reg * np.log(target) - cost) / reg
    top = inner.max(1, keepdims=True)
    dual = -reg * (top[:, 0] + np.log(np.exp(inner - top).sum(1)))
    return float(weight @ dual[there] + target @ (v - reg * np.log(target))), dual, None


def _dataset(X: ArrayLike, y: ArrayLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    features = np.asarray(checks.as_floats(X, f"X of {name}", ndim=2), float)
    labels = np.asarray(checks.as_labels(y, name=f"y of {name}"))
    if len(features) != len(labels):
        raise ValueError(f"X and y of {name}: {len(features)} rows but {len(labels)} labels")
    return features, labels


def _moments(X: ArrayLike, y: ArrayLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean (L, d) and symmetric root of the covariance (L, d, d) of every class."""
    features, labels = _dataset(X, y, name)
    groups = [features[labels == label] for label in np.unique(labels)]
    means = np.array([g.mean(0) for g in groups])
    spread = [(g - m).T @ (g - m) / len(g) for g, m in zip(groups, means, strict=True)]
    values, vectors = np.linalg.eigh(np.array(spread))
    roots = np.sqrt(np.maximum(values, 0.0))
    return means, (vectors * roots[:, None]) @ vectors.swapaxes(1, 2)


def _squared(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    from scipy.spatial.distance import cdist

    distances: np.ndarray = cdist(A, B, "sqeuclidean")
    return distances


def as_shares(q: ArrayLike, k: int, name: str = "q") -> np.ndarray:
    """Shares of k sources: at least 0, summing to one (within rounding)."""
    shares = np.asarray(checks.as_floats(q, name, ndim=1))
    if len(shares) != k or shares.min() < -1e-9 or not math.isclose(shares.sum(), 1, abs_tol=1e-6):
        raise ValueError(f"{name}: expected {k} shares of at least 0 that sum to 1")
    return np.maximum(shares, 0.0)
