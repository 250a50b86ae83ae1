r"""Deep quantile aggregation (DQA): one distribution out of the quantiles of several models.

With predictions :math:`\hat g_j(x; v)` of p base models at m levels, the aggregate at level u is

.. math::
    \hat g(x; u) = \sum_j w_j \hat g_j(x; u)        \quad\text{(coarse)} \\
    \hat g(x; u) = \sum_j w_j^u \hat g_j(x; u)      \quad\text{(medium)} \\
    \hat g(x; u) = \sum_{j,v} w_{jv}^u \hat g_j(x; v) \quad\text{(fine)}

with weights >= 0 that sum to one (softmax): free parameters (*global*) or the output of an ELU
network of x (*local*). They minimise the mean pinball loss of out-of-fold base predictions plus
:math:`\lambda` times a penalty on crossing quantiles; afterwards, or inside the loss, rows are made
monotone. Global coarse is quantile regression averaging (QRA), local fine is DQA.

Reference: Fakoor, Kim, Mueller, Smola, Tibshirani: Flexible Model Aggregation for Quantile
Regression (2021), arXiv 2103.00083, Sections 3 to 5. Scores, orders and the conformal corrections
stand in `quantiles`.

*Not included*: the search over 20 random settings of the network (the chosen ones are arguments),
and the released code's validation predictions from base models that were refitted on the
validation rows; here validation rows are out-of-fold too (`fit_aggregator` takes any `validation`,
so that variant can still be run).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.model_selection import KFold
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from workbench.calibration.quantiles import (
    _crossing,
    _pinball,
    as_levels,
    as_tensor,
    isotonize,
)
from workbench.lab import checks, seeded, train

KINDS = ("coarse", "medium", "fine")


class QuantileModel(Protocol):
    """What a base model offers: fit on rows, then (n, m) predictions at fixed levels."""

    def fit(self, X: NDArray, y: NDArray) -> Any:
        """Learn from (n, d) rows and (n,) targets."""

    def predict(self, X: NDArray) -> NDArray:
        """Quantiles at the model's levels, (n, m)."""


class Aggregator(nn.Module):
    """Convex combination of base quantiles.

    Args:
        p: base models. m: levels.
        kind: ``coarse``, ``medium`` or ``fine``.
        d_x: features that a local aggregator's network reads; None makes it global.
        hidden, layers, dropout: of that network (ELU between layers; the paper searches 64/128,
            2/3 and 0/.05/.1).
        diagonal: for ``fine``, a constant added to the logits of a level's own level. 0 is the
            paper's start, at which every level predicts the mean over all models *and levels*.
    """

    def __init__(
        self,
        p: int,
        m: int,
        kind: str = "fine",
        *,
        d_x: int | None = None,
        hidden: int = 64,
        layers: int = 2,
        dropout: float = 0.0,
        diagonal: float = 0.0,
    ) -> None:
        super().__init__()
        self.p, self.m = checks.count(p, "p"), checks.count(m, "m")
        self.kind = checks.one_of(kind, KINDS, "kind")
        self.shape = {"coarse": (p, 1), "medium": (p, m), "fine": (p * m, m)}[kind]
        self.d_x = None if d_x is None else checks.count(d_x, "d_x")
        size = self.shape[0] * self.shape[1]
        if d_x is None:
            self.logits = nn.Parameter(torch.zeros(size))
        else:
            widths, blocks = [d_x] + [checks.count(hidden, "hidden")] * layers, []
            for i in range(checks.count(layers, "layers")):
                blocks += [nn.Linear(widths[i], hidden), nn.ELU()]
                if i < layers - 1:
                    blocks.append(nn.Dropout(checks.fraction(dropout, "dropout", one=False)))
            self.network = nn.Sequential(*blocks, nn.Linear(hidden, size))
        own = torch.eye(m).repeat(p, 1) if kind == "fine" else torch.zeros(1)
        self.register_buffer("start", checks.number(diagonal, "diagonal") * own)

    def weights(self, x: Float[Tensor, "n d"] | None = None) -> Float[Tensor, "n inputs out"]:
        """Convex weights: (n or 1, inputs, outputs), summing to one over the inputs.

        Inputs are models (coarse, medium) or models times levels (fine: index j m + v); outputs are
        levels, or one column for all levels (coarse).
        """
        if self.d_x is None:
            logits = self.logits[None]
        else:
            if x is None or x.ndim != 2 or x.shape[1] != self.d_x:
                found = "none" if x is None else tuple(x.shape)
                raise ValueError(f"x: expected (n, {self.d_x}) features, got {found}")
            logits = self.network(x)
        return (logits.unflatten(1, self.shape) + self.start).softmax(1)

    def forward(
        self, z: Float[Tensor, "n p m"], x: Float[Tensor, "n d"] | None = None
    ) -> Float[Tensor, "n m"]:
        """Aggregated quantiles, possibly crossing.

        Args:
            z: predictions of the base models. x: features, for local weights.
        """
        if z.ndim != 3 or z.shape[1:] != (self.p, self.m):
            raise ValueError(f"z: expected (n, {self.p}, {self.m}), got {tuple(z.shape)}")
        w = self.weights(x)
        if self.kind != "fine":
            return (z * w).sum(1)
        z = z.flatten(1)
        return z @ w[0] if len(w) == 1 else torch.einsum("nk,nku->nu", z, w)


class _Packed(nn.Module):
    """An aggregator that takes z and x side by side, as the training loop has one input."""

    def __init__(self, aggregator: Aggregator) -> None:
        super().__init__()
        self.aggregator = aggregator

    def forward(self, rows: Tensor) -> Tensor:
        a = self.aggregator
        z, x = rows.split([a.p * a.m, rows.shape[1] - a.p * a.m], 1)
        return a(z.unflatten(1, (a.p, a.m)), None if a.d_x is None else x)


def aggregation_loss(
    q: Float[Tensor, "n m"],
    y: Float[Tensor, " n"],
    levels: Float[Tensor, " m"],
    *,
    penalty: float = 1.0,
    margin: float = 1e-3,
    inside: str | None = None,
) -> Float[Tensor, ""]:
    r"""Mean pinball loss + penalty * crossing penalty.

    Args:
        q: aggregated quantiles. y: targets. levels: (m,).
        penalty: :math:`\lambda`; margin: :math:`\delta`, see `quantiles.crossing_penalty`.
        inside: an order of `quantiles.isotonize` applied before the pinball loss, with gradient.
    """
    crossing = _crossing(q, torch.as_tensor(margin).to(q)) if penalty else 0.0
    q = isotonize(q, inside) if inside else q
    return _pinball(q, y, levels).mean() + penalty * crossing


def fit_aggregator(
    aggregator: Aggregator,
    z: ArrayLike,
    y: ArrayLike,
    levels: ArrayLike,
    x: ArrayLike | None = None,
    *,
    validation: tuple[Any, ...] | float = 0.2,
    penalty: float = 1.0,
    margin: float = 1e-3,
    monotone: str | None = "pava",
    inside: bool = False,
    lr: float = 1e-3,
    weight_decay: float = 1e-7,
    batch_size: int = 64,
    steps: int = 2000,
    every: int = 100,
    patience: int = 5,
    seed: int = 0,
) -> train.History:
    """Train an aggregator in place on out-of-fold predictions, stopping early.

    Features and targets should be standardised (`DQA` does it): margins and rates are on that
    scale. Adam is the AMSGrad variant of the released code.

    Args:
        z: (n, p, m) out-of-fold base predictions. y: (n,). x: (n, d) for local aggregators.
        validation: share of the rows held out, or ``(z, y)`` / ``(z, y, x)`` of their own.
        penalty, margin: of crossing quantiles; the paper searches .5-10 and 1e-4-1e-2.
        monotone: order in which validation is scored, and the loss too when `inside`.
        steps, every, patience: at most `steps`; validation each `every`; stop after `patience`
            reports without improvement, with the best weights.

    Returns:
        The history of the training loop.
    """
    rows, y = _rows(aggregator, z, y, x)
    u = as_levels(levels, aggregator.m).to(rows)
    if isinstance(validation, tuple):
        held, held_y = _rows(aggregator, *validation)
    else:
        order = np.random.default_rng(seed).permutation(len(rows))
        cut = round(checks.fraction(validation, "validation", zero=False, one=False) * len(rows))
        if not 0 < cut < len(rows):
            raise ValueError(f"validation: leaves {cut} of {len(rows)} rows")
        held, held_y, rows, y = (
            *(t[order[:cut]] for t in (rows, y)),
            *(t[order[cut:]] for t in (rows, y)),
        )

    def loss(q: Tensor, target: Tensor) -> Tensor:
        return aggregation_loss(
            q, target, u, penalty=penalty, margin=margin, inside=monotone if inside else None
        )

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        q = model.eval()(held)
        return float(_pinball(isotonize(q, monotone) if monotone else q, held_y, u).mean())

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, amsgrad=True)

    return train.fit(
        _Packed(aggregator), loss, (rows, y), steps=steps, batch_size=min(batch_size, len(rows)),
        optimizer=adam, validation=score, every=every, early_stop=patience, seed=seed,
    )  # fmt: skip


def out_of_fold(
    models: Sequence[QuantileModel],
    X: ArrayLike,
    y: ArrayLike,
    *,
    folds: int = 5,
    seed: int = 0,
) -> tuple[NDArray, NDArray, list[list[QuantileModel]]]:
    """Predictions of each model on rows it was not fitted on.

    Returns:
        z (n, p, m), the fold (n,) of each row, and the fitted models, one list a fold (`cv_plus`
        needs their predictions). The models given stay unfitted.
    """
    X, y = np.asarray(X), np.asarray(y)
    fold, fitted = np.empty(len(y), int), []
    parts: list[NDArray] = []
    for f, (rest, out) in enumerate(KFold(folds, shuffle=True, random_state=seed).split(X)):
        fitted.append([deepcopy(model) for model in models])
        for model in fitted[-1]:
            model.fit(X[rest], y[rest])
        fold[out] = f
        parts.append(stack(fitted[-1], X[out]))
    z = np.empty((len(y), *parts[0].shape[1:]))
    for f, part in enumerate(parts):
        z[fold == f] = part
    return z, fold, fitted


def stack(models: Sequence[QuantileModel], X: ArrayLike) -> NDArray:
    """Predictions of fitted models side by side, (n, p, m)."""
    return np.stack([np.asarray(model.predict(X)) for model in models], 1)


class DQA(BaseEstimator):
    """Base models and their aggregator as one estimator; `predict` gives (n, m) quantiles.

    Args:
        models: unfitted base models that all predict at `levels`.
        levels: (m,) rising, in (0, 1).
        kind, local: the aggregator; ``kind="coarse", local=False`` is QRA.
        monotone: order of the output (`quantiles.isotonize`) or None; `inside` trains through it.
        folds: of the out-of-fold predictions.
        options: further arguments of `Aggregator` and `fit_aggregator`.
        random_state: an integer seed.

    Attributes:
        aggregator_, models_, history_, oof_ (n, p, m), fold_ (n,), fold_models_.
    """

    def __init__(
        self,
        models: Sequence[QuantileModel] = (),
        levels: ArrayLike = (0.1, 0.5, 0.9),
        *,
        kind: str = "fine",
        local: bool = True,
        monotone: str | None = "pava",
        inside: bool = False,
        folds: int = 5,
        options: dict[str, Any] | None = None,
        random_state: int = 0,
    ) -> None:
        self.models, self.levels = models, levels
        self.kind, self.local = kind, local
        self.monotone, self.inside = monotone, inside
        self.folds, self.options = folds, options
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> DQA:
        """Fit the base models out of fold and on all rows, then the aggregator."""
        if not len(self.models):
            raise ValueError("models: expected at least one base model")
        X, y = validate_data(self, X, y, y_numeric=True)
        self.oof_, self.fold_, self.fold_models_ = out_of_fold(
            self.models, X, y, folds=self.folds, seed=self.random_state
        )
        self.models_ = [deepcopy(model) for model in self.models]
        for model in self.models_:
            model.fit(X, y)
        return self.fit_weights(X, y)

    def fit_weights(self, X: ArrayLike, y: ArrayLike) -> DQA:
        """Fit the aggregator only, on the base predictions that are there (``oof_``)."""
        X, y = np.asarray(X, float), np.asarray(y, float)
        self.shift_, self.scale_ = X.mean(0), X.std(0) + 1e-12
        self.y_shift_, self.y_scale_ = y.mean(), y.std() + 1e-12
        options = dict(self.options or {})
        shape = {k: options.pop(k) for k in ("hidden", "layers", "dropout", "diagonal")
                 if k in options}  # fmt: skip
        _, p, m = self.oof_.shape
        with seeded(self.random_state):
            self.aggregator_ = Aggregator(
                p, m, self.kind, d_x=X.shape[1] if self.local else None, **shape
            )
        if isinstance(options.get("validation"), tuple):
            z, target, *features = options["validation"]
            options["validation"] = self._scaled(z, features[0], target)
        z, y, x = self._scaled(self.oof_, X, y)
        self.history_ = fit_aggregator(
            self.aggregator_, z, y, self.levels, x, monotone=self.monotone, inside=self.inside,
            seed=self.random_state, **options,
        )  # fmt: skip
        return self

    def predict(self, X: ArrayLike) -> NDArray:
        """Quantiles at the levels, (n, m)."""
        check_is_fitted(self, "aggregator_")
        X = validate_data(self, X, reset=False)
        return self.combine(stack(self.models_, X), X)

    def combine(self, z: NDArray, X: NDArray) -> NDArray:
        """Quantiles out of base predictions (n, p, m) that are there already."""
        z, _, x = self._scaled(z, X)
        with torch.no_grad():
            q = self.aggregator_(z, x)
        q = q.double().numpy() * self.y_scale_ + self.y_shift_
        return isotonize(q, self.monotone) if self.monotone else q

    def weights(self, X: ArrayLike) -> NDArray:
        """Convex weights at X: (n, inputs, outputs), see `Aggregator.weights`."""
        x = torch.as_tensor((np.asarray(X) - self.shift_) / self.scale_).float()
        with torch.no_grad():
            return self.aggregator_.weights(x).expand(len(x), -1, -1).numpy()

    def _scaled(self, z: NDArray, X: NDArray, y: NDArray | None = None) -> tuple[Any, Any, Any]:
        float32: Callable[[Any], Tensor] = lambda v: torch.as_tensor(v).float()  # noqa: E731
        z = float32((np.asarray(z) - self.y_shift_) / self.y_scale_)
        x = float32((np.asarray(X) - self.shift_) / self.scale_) if self.local else None
        y = None if y is None else float32((np.asarray(y) - self.y_shift_) / self.y_scale_)
        return z, y, x


def _rows(
    aggregator: Aggregator, z: Any, y: Any, x: Any = None
) -> tuple[Float[Tensor, "n inputs"], Float[Tensor, " n"]]:
    """Checked z and x in one array, and the targets, in the aggregator's precision and place."""
    like = next(aggregator.parameters())
    z, y = as_tensor(z, "z", 3).to(like), as_tensor(y, "y", 1).to(like)
    checks.same_length(z=z, y=y)
    if z.shape[1:] != (aggregator.p, aggregator.m):
        raise ValueError(f"z: expected (n, {aggregator.p}, {aggregator.m}), got {tuple(z.shape)}")
    parts = [z.flatten(1)]
    if aggregator.d_x is not None:
        if x is None:
            raise ValueError(f"x: expected (n, {aggregator.d_x}) features, got none")
        parts.append(as_tensor(x, "x", 2).to(like))
        checks.same_length(z=z, x=parts[1])
        if parts[1].shape[1] != aggregator.d_x:
            raise ValueError(f"x: expected {aggregator.d_x} columns, got {parts[1].shape[1]}")
    return torch.cat(parts, 1), y
