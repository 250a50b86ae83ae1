r"""Recalibrators: maps fitted on held-out predictions that make probabilities mean what they say.

All follow scikit-learn: `fit(X, y)`, then `transform(X)` (also `predict_proba`) gives probabilities
and `predict(X)` classes; `get_params`, `set_params` and `clone` work. `X` holds logits or
probabilities, shape (n, k); which of the two is seen from the rows (non-negative and summing to
one) when fitting, or said by `inputs=`. Logarithms of probabilities are floored at `floor`.
Torch tensors come back as tensors of the same device and dtype.

| class                | map of the scores z (logits or log-probabilities)                       |
|----------------------|-------------------------------------------------------------------------|
| `TemperatureScaling` | softmax(z / T)                                                          |
| `VectorScaling`      | softmax(w * z + b)                                                      |
| `MatrixScaling`      | softmax(W z + b), off-diagonal and intercept regularised (ODIR)         |
| `PlattScaling`       | sigmoid(a logit p_k + b) for each class, then normalised                |
| `BetaCalibration`    | sigmoid(a log p_k - b log(1 - p_k) + c) with a, b >= 0, normalised      |
| `IsotonicCalibration`| best increasing function of p_k, normalised                             |
| `HistogramBinning`   | share of class k in the bin of p_k, normalised                          |

Vector and matrix scaling depend on an offset common to a row's logits, which the softmax does not
see: logits and their log-probabilities give different fits. The last four maps treat each class
against the rest (with two classes, the second only). All but temperature scaling can change which
class is predicted.

References: Guo et al. 2017, arXiv 1706.04599 (temperature, vector, matrix); Kull et al. 2019,
arXiv 1910.12656 (ODIR); Platt 1999; Kull, Silva Filho, Flach 2017 (beta); Zadrozny and Elkan 2001,
2002 (histogram binning, isotonic, normalisation).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.isotonic import IsotonicRegression
from sklearn.utils.validation import check_is_fitted

from workbench.calibration.bins import bin_index, scheme_edges
from workbench.calibration.temperature import BOUNDS, fit_temperature
from workbench.lab import checks

__all__ = [
    "RECALIBRATORS", "BetaCalibration", "HistogramBinning", "IsotonicCalibration", "MatrixScaling",
    "PlattScaling", "TemperatureScaling", "VectorScaling", "fit_temperature", "is_probs",
    "log_scores",
]  # fmt: skip

Inputs = Literal["auto", "logits", "probs"]
FLOOR = 1e-12


def is_probs(X: Any) -> bool:
    """True if every row is non-negative and sums to one."""
    try:
        checks.as_probs(X)
    except ValueError:
        return False
    return True


def log_scores(X: Any, inputs: Inputs = "auto", floor: float = FLOOR) -> Any:
    """Logits as they are, probabilities as logarithms floored at `floor`."""
    checks.one_of(inputs, ("auto", "logits", "probs"), "inputs")
    if inputs == "auto":
        inputs = "probs" if is_probs(X) else "logits"
    if inputs == "logits":
        return checks.as_logits(X, "X")
    probs = checks.as_probs(X, "X")
    if checks.is_tensor(probs):
        return probs.clamp_min(floor).log()
    return np.log(np.maximum(probs, floor))


class _Recalibrator(TransformerMixin, BaseEstimator, ABC):
    """Door and exit shared by all: validation, logits or probabilities, tensors or arrays."""

    inputs: Inputs
    floor: float

    def fit(self, X: Any, y: Any) -> Any:
        """Fit on held-out logits or probabilities and labels. Returns the recalibrator."""
        checks.one_of(self.inputs, ("auto", "logits", "probs"), "inputs")
        seen = "probs" if self.inputs == "auto" and is_probs(X) else "logits"
        self.inputs_ = seen if self.inputs == "auto" else self.inputs
        scores = log_scores(X, self.inputs_, self.floor)
        labels = checks.as_labels(y, scores.shape[1], "y", min_classes=2)
        checks.same_length(X=X, y=y)
        self.n_features_in_ = int(scores.shape[1])
        self.classes_ = np.arange(self.n_features_in_)
        self._fit(scores, labels)
        return self

    def transform(self, X: Any) -> Any:
        """Recalibrated probabilities, shape (n, k)."""
        check_is_fitted(self)
        scores = log_scores(X, self.inputs_, self.floor)
        if scores.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X: has {scores.shape[1]} classes; expected {self.n_features_in_} as in fit"
            )
        if checks.is_tensor(scores):
            return self._map_tensor(scores)
        return self._map(scores.astype(np.float64, copy=False)).astype(scores.dtype, copy=False)

    def predict_proba(self, X: Any) -> Any:
        """The same as `transform`."""
        return self.transform(X)

    def predict(self, X: Any) -> Any:
        """The class of greatest recalibrated probability."""
        return self.transform(X).argmax(1)

    @abstractmethod
    def _fit(self, scores: Any, labels: Any) -> None: ...

    @abstractmethod
    def _map(self, scores: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]: ...

    def _map_tensor(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self._map(checks.to_numpy(scores).astype(np.float64))).to(scores)


# ---- maps of all scores together


class TemperatureScaling(_Recalibrator):
    """One temperature for all rows and classes; keeps every prediction.

    Args:
        bounds: least and greatest temperature.
        inputs: "auto", "logits" or "probs".
        floor: least probability before taking logarithms.

    Attributes:
        temperature_: the fitted temperature.
    """

    def __init__(
        self,
        bounds: tuple[float, float] = BOUNDS,
        inputs: Inputs = "auto",
        floor: float = FLOOR,
    ) -> None:
        self.bounds = bounds
        self.inputs = inputs
        self.floor = floor

    def _fit(self, scores: Any, labels: Any) -> None:
        self.temperature_ = fit_temperature(scores, labels, bounds=self.bounds)

    def _map(self, scores: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
        return softmax(scores / self.temperature_, axis=1)

    def _map_tensor(self, scores: torch.Tensor) -> torch.Tensor:
        return (scores / self.temperature_).softmax(1)


class _Affine(_Recalibrator):
    """softmax(W z + b) by L-BFGS on the mean negative log-likelihood and a penalty."""

    weight_: np.ndarray
    bias_: np.ndarray

    def _minimise(
        self,
        scores: Any,
        labels: Any,
        start: np.ndarray,
        objective: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[float, np.ndarray]],
    ) -> np.ndarray:
        z = checks.to_numpy(scores).astype(np.float64)
        y = checks.to_numpy(labels)
        found = minimize(
            objective, start, args=(z, y), jac=True, method="L-BFGS-B",
            options={"maxiter": 1000, "gtol": 1e-8, "ftol": 1e-14},
        )  # fmt: skip
        return found.x

    def _map(self, scores: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
        moved = scores * self.weight_ if self.weight_.ndim == 1 else scores @ self.weight_.T
        return softmax(moved + self.bias_, axis=1)


class VectorScaling(_Affine):
    """A weight and an intercept for each class.

    Attributes:
        weight_: (k,) factors of the scores.
        bias_: (k,) intercepts, of mean 0.
    """

    def __init__(self, inputs: Inputs = "auto", floor: float = FLOOR) -> None:
        self.inputs = inputs
        self.floor = floor

    def _fit(self, scores: Any, labels: Any) -> None:
        k = self.n_features_in_

        def objective(theta: np.ndarray, z: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
            loss, slope = _nll_slope(z * theta[:k] + theta[k:], y)
            return loss, np.concatenate([(slope * z).sum(0), slope.sum(0)])

        theta = self._minimise(scores, labels, np.repeat([1.0, 0.0], k), objective)
        self.weight_, self.bias_ = theta[:k], theta[k:] - theta[k:].mean()


class MatrixScaling(_Affine):
    r"""A full linear map, with the off-diagonal and intercept regularisation (ODIR)
    $\frac{\lambda}{k(k-1)}\sum_{i\ne j} W_{ij}^2 + \frac{\mu}{k}\sum_j b_j^2$.

    Args:
        off_diagonal: $\lambda$.
        intercept: $\mu$; by default the same as `off_diagonal`.

    Attributes:
        weight_: (k, k) matrix W.
        bias_: (k,) intercepts b.
    """

    def __init__(
        self,
        off_diagonal: float = 0.01,
        intercept: float | None = None,
        inputs: Inputs = "auto",
        floor: float = FLOOR,
    ) -> None:
        self.off_diagonal = off_diagonal
        self.intercept = intercept
        self.inputs = inputs
        self.floor = floor

    def _fit(self, scores: Any, labels: Any) -> None:
        k = self.n_features_in_
        lam = checks.positive(self.off_diagonal, "off_diagonal", zero=True)
        mu = lam if self.intercept is None else self.intercept
        mu = checks.positive(mu, "intercept", zero=True)
        off = 1 - np.eye(k)

        def objective(theta: np.ndarray, z: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
            w, b = theta[: k * k].reshape(k, k), theta[k * k :]
            loss, slope = _nll_slope(z @ w.T + b, y)
            penalty = lam * np.square(w * off).sum() / (k * (k - 1)) + mu * np.square(b).sum() / k
            slope_w = slope.T @ z + 2 * lam * w * off / (k * (k - 1))
            slope_b = slope.sum(0) + 2 * mu * b / k
            return loss + penalty, np.concatenate([slope_w.ravel(), slope_b])

        start = np.concatenate([np.eye(k).ravel(), np.zeros(k)])
        theta = self._minimise(scores, labels, start, objective)
        self.weight_, self.bias_ = theta[: k * k].reshape(k, k), theta[k * k :]


def _nll_slope(
    logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, " n"]
) -> tuple[float, Float[np.ndarray, "n k"]]:
    """Mean negative log-likelihood and its derivative by the logits."""
    log_p = log_softmax(logits, axis=1)
    rows = np.arange(len(labels))
    slope = np.exp(log_p)
    slope[rows, labels] -= 1
    return -float(log_p[rows, labels].mean()), slope / len(labels)


# ---- maps of one class against the rest


class _OneVsRest(_Recalibrator):
    """A function of each class's probability; rows are normalised afterwards."""

    def _fit(self, scores: Any, labels: Any) -> None:
        probs = softmax(checks.to_numpy(scores).astype(np.float64), axis=1)
        labels = checks.to_numpy(labels)
        first = 1 if probs.shape[1] == 2 else 0
        self.maps_ = [
            self._fit_class(probs[:, c], (labels == c).astype(np.float64))
            for c in range(first, probs.shape[1])
        ]

    def _map(self, scores: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
        probs = softmax(scores, axis=1)
        if probs.shape[1] == 2:
            second = self._map_class(self.maps_[0], probs[:, 1])
            return np.stack([1 - second, second], axis=1)
        mapped = np.stack(
            [self._map_class(m, p) for m, p in zip(self.maps_, probs.T, strict=True)], axis=1
        )
        total = mapped.sum(1, keepdims=True)
        uniform = np.full_like(mapped, 1 / mapped.shape[1])
        return np.divide(mapped, total, out=uniform, where=total > 0)

    @abstractmethod
    def _fit_class(self, p: np.ndarray, hit: np.ndarray) -> Any: ...

    @abstractmethod
    def _map_class(self, fitted: Any, p: np.ndarray) -> np.ndarray: ...

    def _logs(self, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.log(np.maximum(p, self.floor)), np.log(np.maximum(1 - p, self.floor))


class PlattScaling(_OneVsRest):
    """A logistic curve in the log-odds of each class.

    Args:
        smooth: Platt's targets (N+ + 1) / (N+ + 2) and 1 / (N- + 2) instead of 1 and 0.

    Attributes:
        maps_: (slope, intercept) of each class.
    """

    def __init__(self, smooth: bool = True, inputs: Inputs = "auto", floor: float = FLOOR) -> None:
        self.smooth = smooth
        self.inputs = inputs
        self.floor = floor

    def _fit_class(self, p: np.ndarray, hit: np.ndarray) -> Any:
        log_p, log_q = self._logs(p)
        positives = hit.sum()
        low = 1 / (len(hit) - positives + 2) if self.smooth else 0.0
        high = (positives + 1) / (positives + 2) if self.smooth else 1.0
        return _logistic(np.stack([log_p - log_q], axis=1), np.where(hit > 0, high, low))

    def _map_class(self, fitted: Any, p: np.ndarray) -> np.ndarray:
        log_p, log_q = self._logs(p)
        return expit(fitted[0] * (log_p - log_q) + fitted[1])


class BetaCalibration(_OneVsRest):
    """Likelihood ratio of two beta distributions for each class.

    A coefficient that would be negative is set to 0 and the rest fitted again, so that the map
    increases.

    Attributes:
        maps_: (a, b, c) of each class.
    """

    def __init__(self, inputs: Inputs = "auto", floor: float = FLOOR) -> None:
        self.inputs = inputs
        self.floor = floor

    def _fit_class(self, p: np.ndarray, hit: np.ndarray) -> Any:
        log_p, log_q = self._logs(p)
        a, b, c = _logistic(np.stack([log_p, -log_q], axis=1), hit)
        if a < 0:
            b, c = _logistic(-log_q[:, None], hit)
            a, b = 0.0, max(b, 0.0)
        elif b < 0:
            a, c = _logistic(log_p[:, None], hit)
            a, b = max(a, 0.0), 0.0
        return np.array([a, b, c])

    def _map_class(self, fitted: Any, p: np.ndarray) -> np.ndarray:
        log_p, log_q = self._logs(p)
        return expit(fitted[0] * log_p - fitted[1] * log_q + fitted[2])


class IsotonicCalibration(_OneVsRest):
    """The increasing step function of least squared error, for each class."""

    def __init__(self, inputs: Inputs = "auto", floor: float = FLOOR) -> None:
        self.inputs = inputs
        self.floor = floor

    def _fit_class(self, p: np.ndarray, hit: np.ndarray) -> Any:
        return IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(p, hit)

    def _map_class(self, fitted: Any, p: np.ndarray) -> np.ndarray:
        return fitted.predict(p)


class HistogramBinning(_OneVsRest):
    """The share of the class among the rows in each bin; an empty bin keeps its middle.

    Args:
        bins: number of bins.
        scheme: "equal-width" or "equal-mass".

    Attributes:
        maps_: (edges, share per bin) of each class.
    """

    def __init__(
        self,
        bins: int = 15,
        scheme: Literal["equal-width", "equal-mass"] = "equal-mass",
        inputs: Inputs = "auto",
        floor: float = FLOOR,
    ) -> None:
        self.bins = bins
        self.scheme = scheme
        self.inputs = inputs
        self.floor = floor

    def _fit_class(self, p: np.ndarray, hit: np.ndarray) -> Any:
        checks.one_of(self.scheme, ("equal-width", "equal-mass"), "scheme")
        edges = scheme_edges(p, p, self.bins, self.scheme)
        index = bin_index(p, edges)
        size = np.bincount(index, minlength=len(edges) - 1)
        hits = np.bincount(index, hit, minlength=len(edges) - 1)
        middle = (edges[:-1] + edges[1:]) / 2
        return edges, np.divide(hits, size, out=middle, where=size > 0)

    def _map_class(self, fitted: Any, p: np.ndarray) -> np.ndarray:
        edges, share = fitted
        return share[bin_index(p, edges)]


def _logistic(
    features: Float[np.ndarray, "n d"], target: Float[np.ndarray, " n"], ridge: float = 1e-9
) -> Float[np.ndarray, " d1"]:
    """Coefficients and intercept of logistic regression by damped Newton steps.

    The loss is the mean cross-entropy plus `ridge` times half the squared coefficients, which keeps
    the optimum finite when the classes are separable.
    """
    x = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    theta = np.zeros(x.shape[1])

    def loss(t: np.ndarray) -> float:
        s = x @ t
        return float((np.logaddexp(0, s) - target * s).mean() + ridge * (t @ t) / 2)

    now = loss(theta)
    for _ in range(100):
        p = expit(x @ theta)
        slope = x.T @ (p - target) / len(x) + ridge * theta
        curvature = (x * (p * (1 - p))[:, None]).T @ x / len(x) + ridge * np.eye(len(theta))
        step = np.linalg.solve(curvature, slope)
        size = 1.0
        while (then := loss(theta - size * step)) > now and size > 1e-8:
            size /= 2
        theta, before, now = theta - size * step, now, then
        if abs(step @ slope) < 1e-20 or before - now <= 1e-16 * abs(now):
            break
    return theta


RECALIBRATORS = {
    "temperature": TemperatureScaling,
    "vector": VectorScaling,
    "matrix": MatrixScaling,
    "platt": PlattScaling,
    "beta": BetaCalibration,
    "isotonic": IsotonicCalibration,
    "histogram": HistogramBinning,
}
