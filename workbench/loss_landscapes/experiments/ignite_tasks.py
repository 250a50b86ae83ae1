"""Offline optimisation tasks: measured designs, and the truth that scores proposed ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from workbench.lab import checks, data

Truth: TypeAlias = Callable[[np.ndarray], np.ndarray]


def offline_half(y: Any, share: float = 0.5) -> np.ndarray:
    """Indices of the lowest ``share`` of the values: what an offline task lets you see."""
    values = checks.to_numpy(checks.as_floats(y, "y", ndim=1))
    kept = max(1, round(checks.fraction(share, "share", zero=False) * len(values)))
    return np.sort(np.argsort(values, kind="stable")[:kept])


@dataclass(frozen=True)
class OfflineTask:
    """Designs with values, and the truth that scores what a search proposes.

    Attributes:
        name: of the task.
        x: all measured designs, shape (n, d).
        y: their values, to be raised.
        truth: value of any design, shape (b, d) to (b,).
        bounds: lowest and highest designs, shape (d,).
        low, high: values that the score calls 0 and 1.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    truth: Truth = field(repr=False)
    bounds: tuple[np.ndarray, np.ndarray] = field(repr=False)
    low: float
    high: float

    @property
    def seen(self) -> np.ndarray:
        """Rows that the surrogate is shown: the lower half."""
        return offline_half(self.y)


def branin(x: np.ndarray) -> np.ndarray:
    """Branin's function of points (b, 2) with x1 in [-5, 10], x2 in [0, 15]; minimum 0.397887."""
    a, b = x[..., 0], x[..., 1]
    valley = b - 5.1 / (4 * np.pi**2) * a**2 + 5 / np.pi * a - 6
    return valley**2 + 10 * (1 - 1 / (8 * np.pi)) * np.cos(a) + 10


def branin2(x: np.ndarray) -> np.ndarray:
    """Minus Branin's function on the unit square; three maxima of -0.397887."""
    return -branin(np.array([-5.0, 0.0]) + 15 * x)


def branin5(x: np.ndarray) -> np.ndarray:
    """Minus two Branin functions and a parabola, on the unit cube; maximum -0.795775."""
    low, size = np.array([-5.0, 0.0]), 15.0
    pairs = branin(low + size * x[:, :2]) + branin(low + size * x[:, 2:4])
    return -pairs - 200 * (x[:, 4] - 0.5) ** 2


_HARTMANN_C = np.array([1.0, 1.2, 3.0, 3.2])
_HARTMANN_A = np.array(
    [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8],
     [17, 8, 0.05, 10, 0.1, 14]]
)  # fmt: skip
_HARTMANN_P = 1e-4 * np.array(
    [[1312, 1696, 5569, 124, 8283, 5886], [2329, 4135, 8307, 3736, 1004, 9991],
     [2348, 1451, 3522, 2883, 3047, 6650], [4047, 8828, 8732, 5743, 1091, 381]]
)  # fmt: skip


def hartmann6(x: np.ndarray) -> np.ndarray:
    """Hartmann's function with the sign of a maximisation, on the unit cube; maximum 3.32237."""
    distance = (_HARTMANN_A * (x[:, None] - _HARTMANN_P) ** 2).sum(-1)
    return np.asarray(np.exp(-distance) @ _HARTMANN_C)


def styblinski5(x: np.ndarray) -> np.ndarray:
    """Minus Styblinski and Tang's function, the unit cube stretched to [-5, 5]; maximum 195.83."""
    z = 10 * x - 5
    return -0.5 * (z**4 - 16 * z**2 + 5 * z).sum(-1)


def rbf_landscape(d: int, seed: int, bumps: int = 50) -> Truth:
    """A sum of Gaussian hills and hollows on the unit cube, drawn by ``seed``."""
    rng = np.random.default_rng([seed, d])
    centres, heights = rng.random((bumps, d)), rng.standard_normal(bumps)

    def landscape(x: np.ndarray) -> np.ndarray:
        distance = ((x[:, None] - centres) ** 2).sum(-1)
        return np.asarray(np.exp(-distance / (2 * 0.02 * d)) @ heights)

    return landscape


def offline_task(name: str, seed: int, points: int = 1000) -> OfflineTask:
    """A task by name; ``seed`` draws its data, and for landscapes the landscape.

    "branin2", "branin5", "hartmann6", "styblinski5" and "rbf<d>" are functions on the unit cube,
    known everywhere. "airfoil", "winequality_white" and "compactiv" are measured tables whose truth
    is a model: see `table_task`. "kmer8" are sequences of 8 letters: see `kmer_task`.

    Args:
        name: of the task.
        seed: of the draw.
        points: measured designs, at most as many as a table has rows.
    """
    if name == "kmer8":
        return kmer_task(seed, points)
    if name in ("airfoil", "winequality_white", "compactiv"):
        return table_task(name, seed, points)
    known: dict[str, tuple[int, Truth]] = {
        "branin2": (2, branin2),
        "branin5": (5, branin5),
        "hartmann6": (6, hartmann6),
        "styblinski5": (5, styblinski5),
    }
    if name in known:
        d, truth = known[name]
    else:
        checks.one_of(name, [*known, "rbf6", "rbf8", "rbf16"], "name")
        d = int(name[3:])
        truth = rbf_landscape(d, seed)
    rng = np.random.default_rng([seed, 1])
    x = rng.random((checks.count(points, "points", minimum=4), d))
    y = truth(x)
    return OfflineTask(name, x, y, truth, (np.zeros(d), np.ones(d)), y.min(), y.max())


def table_task(name: str, seed: int, points: int) -> OfflineTask:
    """A measured table; designs that nobody measured are scored by a forest fitted to ALL rows.

    The target is turned so that more is better (less noise of a wing section, better wine, an
    idler computer). 0 and 1 of the score are the extremes of the whole table.
    """
    table = data.table(name)
    sign = 1.0 if name.startswith("wine") else -1.0
    X, Y = table.X.to_numpy(float), sign * table.y.to_numpy(float)
    forest = _forest().fit(X, Y)
    rows = np.random.default_rng([seed, 2]).permutation(len(X))[:points]
    bounds = X.min(0), X.max(0)
    return OfflineTask(name, X[rows], Y[rows], forest.predict, bounds, Y.min(), Y.max())


def forest_r2(seed: int, name: str = "airfoil", trees: int = 100) -> dict[str, float]:
    """How well the scoring forest predicts rows it was not fitted to: R2 over 5 folds."""
    from sklearn.model_selection import KFold, cross_val_score

    table = data.table(name)
    folds = KFold(5, shuffle=True, random_state=seed)
    found = cross_val_score(
        _forest(trees), table.X.to_numpy(float), table.y.to_numpy(float), cv=folds
    )
    return {"r2": float(found.mean()), "lowest": float(found.min())}


def _forest(trees: int = 100) -> Any:
    from sklearn.ensemble import ExtraTreesRegressor

    return ExtraTreesRegressor(trees, random_state=0)


def kmer_task(seed: int, points: int) -> OfflineTask:
    """Sequences of 8 letters out of 4, as logits; a design is read off as its largest letters.

    The truth is a binding score: the best match of a hidden pattern of 6 at the three offsets, in
    a log-sum, plus pairwise terms. A letter is written as in the paper's tasks: the logarithm of
    0.6 on the letter plus 0.4 spread evenly over all. All 65,536 sequences give the score's 0 and
    1.
    """
    rng = np.random.default_rng([seed, 3])
    pattern = 1.5 * rng.standard_normal((6, 4))
    pairs = 0.4 * rng.standard_normal((8, 8, 4, 4))
    every = np.stack(np.meshgrid(*[range(4)] * 8, indexing="ij"), -1).reshape(-1, 8)

    def value(letters: np.ndarray) -> np.ndarray:
        match = np.stack([pattern[range(6), letters[:, k : k + 6]].sum(1) for k in range(3)])
        first, second = np.triu_indices(8, 1)
        mixed = pairs[first, second, letters[:, first], letters[:, second]].sum(1)
        return np.asarray(np.logaddexp.reduce(match) + mixed)

    def truth(x: np.ndarray) -> np.ndarray:
        return value(x.reshape(len(x), 8, 4).argmax(-1))

    values = value(every)
    rows = rng.permutation(len(every))[:points]
    x = np.log(0.6 * np.eye(4)[every[rows]] + 0.1).reshape(len(rows), 32)
    bounds = np.full(32, x.min()), np.full(32, x.max())
    return OfflineTask("kmer8", x, values[rows], truth, bounds, values.min(), values.max())
