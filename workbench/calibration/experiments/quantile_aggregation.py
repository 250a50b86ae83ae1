"""Aggregating five quantile models on small regression tables."""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.ensemble import RandomForestRegressor
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeRegressor

from workbench import lab
from workbench.calibration.quantile_aggregation import DQA, stack
from workbench.calibration.quantiles import _pinball, cqr, cv_plus, isotonize, wis

LEVELS = np.arange(1, 20) / 20
NAMES = ("linear", "boosting", "forest", "network", "neighbours")
TABLES = ("diabetes", "autompg", "randhie", "engel")
KINDS = {  # the aggregators compared: (kind, local)
    "qra": ("coarse", False),
    "medium_global": ("medium", False),
    "fine_global": ("fine", False),
    "coarse_local": ("coarse", True),
    "medium_local": ("medium", True),
    "dqa": ("fine", True),
}
LR_GLOBAL = 0.02
"""Adam moves a free logit by at most its rate a step: at the networks' 1e-3 a global aggregator
could not leave the uniform weights within the steps that a local one needs."""


class LinearQuantiles(BaseEstimator):
    """Linear quantile regression at all levels at once.

    Majorise-minimise (Hunter & Lange 2000): rho_u(r) lies below a parabola in r that touches it at
    the present residual, so each round solves one weighted least squares problem a level.
    """

    def __init__(self, levels: ArrayLike = LEVELS, rounds: int = 60) -> None:
        self.levels, self.rounds = levels, rounds

    def fit(self, X: NDArray, y: NDArray) -> LinearQuantiles:
        """Fit (n, d) rows."""
        u = np.asarray(self.levels)[:, None]
        self.scaler_ = StandardScaler().fit(X)
        A, eps = self._design(X), 1e-3 * y.std() + 1e-12
        ridge = 1e-6 * len(y) * np.eye(A.shape[1])
        beta = np.zeros((len(u), A.shape[1]))
        beta[:, -1] = np.quantile(y, u[:, 0])
        for _ in range(self.rounds):
            w = 1 / (eps + np.abs(y - beta @ A.T))  # (m, n)
            gram = (A.T * w[:, None]) @ A
            right = (w * y + 2 * u - 1) @ A
            beta = np.linalg.solve(gram + ridge * w.mean(), right[..., None])[..., 0]
        self.beta_ = beta
        return self

    def predict(self, X: NDArray) -> NDArray:
        """Quantiles (n, m), sorted."""
        return np.sort(self._design(X) @ self.beta_.T, 1)

    def _design(self, X: NDArray) -> NDArray:
        return np.column_stack([self.scaler_.transform(X), np.ones(len(X))])


class BoostedQuantiles(BaseEstimator):
    """Gradient boosting of all levels with one tree a round.

    The tree fits the gradients u - 1[y < q_u] of a few levels; each leaf moves every level by
    `rate` times that level's quantile of the residuals in the leaf.
    """

    def __init__(
        self, levels: ArrayLike = LEVELS, rounds: int = 40, rate: float = 0.1, depth: int = 3,
        leaf: int = 10,
    ) -> None:  # fmt: skip
        self.levels, self.rounds, self.rate = levels, rounds, rate
        self.depth, self.leaf = depth, leaf

    def fit(self, X: NDArray, y: NDArray) -> BoostedQuantiles:
        """Fit (n, d) rows."""
        u = np.asarray(self.levels)
        shown = np.unique(np.linspace(0, len(u) - 1, 5).round().astype(int))
        self.start_, self.trees_ = np.quantile(y, u), []
        q = np.tile(self.start_, (len(y), 1))
        for _ in range(self.rounds):
            tree = DecisionTreeRegressor(
                max_depth=self.depth, min_samples_leaf=self.leaf, random_state=0
            )
            tree.fit(X, (u - (y[:, None] < q))[:, shown])
            where = tree.apply(X)
            moves = np.zeros((tree.tree_.node_count, len(u)))
            for leaf in np.unique(where):
                rest = np.sort(y[where == leaf, None] - q[where == leaf], 0)
                rank = np.ceil(u * len(rest)).astype(int) - 1
                moves[leaf] = self.rate * rest[rank, np.arange(len(u))]
            q += moves[where]
            self.trees_.append((tree, moves))
        return self

    def predict(self, X: NDArray) -> NDArray:
        """Quantiles (n, m), sorted."""
        moved = sum(moves[tree.apply(X)] for tree, moves in self.trees_)
        return np.sort(self.start_ + moved, 1)


class _WeightedQuantiles(BaseEstimator):
    """Quantiles of the training targets under weights that depend on x."""

    def predict(self, X: NDArray) -> NDArray:
        """Quantiles (n, m), sorted."""
        mass = self._weights(X)[:, self.order_].cumsum(1)
        mass /= mass[:, -1:]
        index = (mass[:, None] < np.asarray(self.levels)[:, None] - 1e-9).sum(2)
        return self.sorted_[np.minimum(index, len(self.sorted_) - 1)]

    def _keep(self, y: NDArray) -> None:
        self.order_ = np.argsort(y, kind="stable")
        self.sorted_ = y[self.order_]


class ForestQuantiles(_WeightedQuantiles):
    """Quantile regression forest (Meinshausen 2006): weights are shared leaves."""

    def __init__(
        self, levels: ArrayLike = LEVELS, trees: int = 50, leaf: int = 8, seed: int = 0
    ) -> None:
        self.levels, self.trees, self.leaf, self.seed = levels, trees, leaf, seed

    def fit(self, X: NDArray, y: NDArray) -> ForestQuantiles:
        """Fit (n, d) rows."""
        self.forest_ = RandomForestRegressor(
            self.trees, min_samples_leaf=self.leaf, max_features=0.5, random_state=self.seed
        ).fit(X, y)
        self.leaves_ = self.forest_.apply(X)
        self._keep(y)
        return self

    def _weights(self, X: NDArray) -> NDArray:
        weights = np.zeros((len(X), len(self.leaves_)))
        for found, known in zip(self.forest_.apply(X).T, self.leaves_.T, strict=True):
            same = found[:, None] == known
            weights += same / same.sum(1, keepdims=True)
        return weights


class NeighbourQuantiles(_WeightedQuantiles):
    """Quantiles of the targets of the k nearest rows."""

    def __init__(self, levels: ArrayLike = LEVELS, k: int = 30) -> None:
        self.levels, self.k = levels, k

    def fit(self, X: NDArray, y: NDArray) -> NeighbourQuantiles:
        """Fit (n, d) rows."""
        self.scaler_ = StandardScaler().fit(X)
        self.search_ = NearestNeighbors(n_neighbors=min(self.k, len(X)))
        self.search_.fit(self.scaler_.transform(X))
        self._keep(y)
        return self

    def _weights(self, X: NDArray) -> NDArray:
        return self.search_.kneighbors_graph(self.scaler_.transform(X)).toarray()


class NetworkQuantiles(BaseEstimator):
    """One small network for all levels, trained on the mean pinball loss."""

    def __init__(
        self, levels: ArrayLike = LEVELS, steps: int = 150, hidden: int = 64, lr: float = 5e-3,
        weight_decay: float = 1e-3, seed: int = 0,
    ) -> None:  # fmt: skip
        self.levels, self.steps, self.hidden = levels, steps, hidden
        self.lr, self.weight_decay, self.seed = lr, weight_decay, seed

    def fit(self, X: NDArray, y: NDArray) -> NetworkQuantiles:
        """Fit (n, d) rows."""
        self.scaler_, self.shift_, self.scale_ = StandardScaler().fit(X), y.mean(), y.std() + 1e-12
        u = torch.tensor(np.asarray(self.levels)).float()
        with lab.seeded(self.seed):
            self.net_ = lab.models.MLP([X.shape[1], self.hidden, len(u)], "tanh")
        lab.train.fit(
            self.net_, lambda q, target: _pinball(q, target, u).mean(),
            (self._x(X), torch.tensor((y - self.shift_) / self.scale_).float()),
            steps=self.steps, batch_size=64, lr=self.lr, weight_decay=self.weight_decay,
            schedule="cosine", seed=self.seed,
        )  # fmt: skip
        return self

    def predict(self, X: NDArray) -> NDArray:
        """Quantiles (n, m), sorted."""
        q = lab.train.predict(self.net_, self._x(X)).double().numpy()
        return np.sort(q * self.scale_ + self.shift_, 1)

    def _x(self, X: NDArray) -> torch.Tensor:
        return torch.tensor(self.scaler_.transform(X)).float()


def base_models(levels: ArrayLike = LEVELS, seed: int = 0, *, effort: float = 1.0) -> list[Any]:
    """The five base models, in the order of NAMES; `effort` scales rounds, trees and steps."""
    return [
        LinearQuantiles(levels, rounds=math.ceil(60 * effort)),
        BoostedQuantiles(levels, rounds=math.ceil(40 * effort)),
        ForestQuantiles(levels, trees=math.ceil(50 * effort), seed=seed),
        NetworkQuantiles(levels, steps=math.ceil(150 * effort), seed=seed),
        NeighbourQuantiles(levels),
    ]


def matrix(table: Any, seed: int, rows: int) -> tuple[NDArray, NDArray]:
    """Features with categories as indicators, and the target, of at most `rows` random rows."""
    import pandas as pd

    X = pd.get_dummies(table.X, dtype=float).to_numpy(float)
    y = table.y.to_numpy(float)
    chosen = np.random.default_rng(seed).permutation(len(y))[:rows]
    return X[chosen], y[chosen]


def interval_error(q: NDArray, y: NDArray) -> float:
    """Mean distance of the central intervals' coverage from what they promise."""
    k = q.shape[1] // 2
    inside = (q[:, :k] <= y[:, None]) & (y[:, None] <= q[:, ::-1][:, :k])
    return float(np.abs(inside.mean(0) - (1 - 2 * LEVELS[:k])).mean())


def table_study(
    seed: int,
    *,
    table: str = "diabetes",
    rows: int = 500,
    steps: int = 1000,
    every: int = 50,
    patience: int = 4,
    folds: int = 5,
    effort: float = 1.0,
    kinds: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Fit base models and aggregators on 60% of a table, conformalise on 20%, score on 20%.

    Every score is the WIS on test rows in units of the marginal quantiles' WIS there.

    Args:
        kinds: further aggregators of KINDS to fit, beside `qra` and `dqa`.

    Returns:
        `wis_{base model}`, `wis_best` (the base model best out of fold), `wis_uniform`,
        `wis_{aggregator}`, and of the local fine one: `wis_raw` (same weights, crossing left),
        `crossing` (share of rows out of order), `wis_inside` (PAVA in the loss), `wis_diagonal`
        (started at its own levels), `wis_leak` (validated on base models that saw the validation
        rows, as the released code does), `wis_cqr`, `wis_cvplus`, and `cover_{...}`, the mean error
        of interval coverage; `best` names the base model chosen, `steps` the best step of `dqa`.
    """
    X, y = matrix(lab.data.table(table), seed, rows)
    cuts = [round(0.6 * len(y)), round(0.8 * len(y))]
    (X, Xc, Xt), (y, yc, yt) = np.split(X, cuts), np.split(y, cuts)
    scale = wis(np.tile(np.quantile(y, LEVELS), (len(yt), 1)), yt, LEVELS).mean()

    def score(q: NDArray) -> float:
        return float(wis(q, yt, LEVELS).mean() / scale)

    options = {"steps": steps, "every": every, "patience": patience, "batch_size": 32}
    qra = DQA(
        base_models(seed=seed, effort=effort), LEVELS, kind="coarse", local=False, folds=folds,
        options=options | {"lr": LR_GLOBAL}, random_state=seed,
    ).fit(X, y)  # fmt: skip
    z = stack(qra.models_, Xt)
    known = wis(qra.oof_.reshape(-1, len(LEVELS)), np.repeat(y, len(NAMES)), LEVELS)
    best = int(known.reshape(len(y), -1).mean(0).argmin())
    found: dict[str, Any] = {f"wis_{name}": score(z[:, j]) for j, name in enumerate(NAMES)}
    found |= {"best": NAMES[best], "wis_best": score(z[:, best]), "wis_uniform": score(z.mean(1))}

    def again(kind: str = "fine", local: bool = True, inside: bool = False, **more: Any) -> DQA:
        other = copy(qra)  # the same base models and out-of-fold predictions
        rate = {} if local else {"lr": LR_GLOBAL}
        other.set_params(kind=kind, local=local, inside=inside, options=options | rate | more)
        return other.fit_weights(X, y)

    fitted = {"qra": qra} | {name: again(*KINDS[name]) for name in ("dqa", *kinds)}
    found |= {f"wis_{name}": score(other.combine(z, Xt)) for name, other in fitted.items()}
    dqa = fitted["dqa"]
    found["steps"] = int(dqa.history_.best_step)
    found["wis_inside"] = score(again(inside=True).combine(z, Xt))
    found["wis_diagonal"] = score(again(diagonal=5.0).combine(z, Xt))
    found["wis_leak"] = score(_released(dqa, X, y, seed).combine(z, Xt))
    q = dqa.combine(z, Xt)
    raw = copy(dqa).set_params(monotone=None).combine(z, Xt)
    found |= {"wis_raw": score(raw), "crossing": float((np.diff(raw, axis=1) < 0).any(1).mean())}
    corrected = cqr(dqa.combine(stack(dqa.models_, Xc), Xc), yc, q, LEVELS)
    by_fold = np.stack([dqa.combine(stack(m, Xt), Xt) for m in dqa.fold_models_])
    plus = cv_plus(dqa.combine(dqa.oof_, X), y, dqa.fold_, by_fold, LEVELS)
    for name, other in (("dqa", q), ("cqr", corrected), ("cvplus", plus)):
        other = isotonize(other, "sort")
        found |= {f"wis_{name}": score(other), f"cover_{name}": interval_error(other, yt)}
    found["cover_uniform"] = interval_error(z.mean(1), yt)
    return found


def _released(dqa: DQA, X: NDArray, y: NDArray, seed: int) -> DQA:
    """The same aggregator as the released code fits it.

    There the validation rows get predictions from base models that were refitted on all rows,
    these included.
    """
    order = np.random.default_rng(seed).permutation(len(y))
    held, rest = np.split(order, [round(0.2 * len(y))])
    other = copy(dqa)
    other.oof_ = dqa.oof_[rest]
    seen = (stack(dqa.models_, X[held]), y[held], X[held])
    other.set_params(options=dqa.options | {"validation": seen})
    return other.fit_weights(X[rest], y[rest])


def over_tables(frame: Any) -> Any:
    """One row a seed: the mean over tables of every number, as the claims compare them."""
    numbers = frame.drop(columns="table").select_dtypes("number")
    mean = numbers.groupby("seed", as_index=False).mean()
    mean.attrs = dict(frame.attrs)
    return mean
