"""Projektor: accuracy of any mixture of partly revealed sources, at sizes nobody has seen.

Sources i = 1..k show pilots; q_i is the share of source i. Stage 1, at each of two revealed sizes
n0 < n1, regresses accuracy V on the shares and on the distance OT(q) from the mixture to the
validation set:

    V(q) = sum_i (b2_i q_i^2 + b1_i q_i + b0_i) OT(q) + sum_i (c2_i q_i^2 + c1_i q_i + c0_i).

Stage 2 has no parameter: log-linear in n through both,

    V(q, n) = [ln(n/n0) V(q, n1) - ln(n/n1) V(q, n0)] / ln(n1/n0).

Selection climbs V(q, n) on the simplex of shares; OT's derivative comes from its dual potentials.

Reference: Kang, Just, Sahu and Jia, 2023, arXiv 2307.02460; the ground cost is that of
Alvarez-Melis and Fusi, 2020, arXiv 2002.02923 (OTDD).

Not included: the debiased entropic distance of the released code (`reg` gives the plain one), and
its network that embeds images: features are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from workbench.lab import checks
from workbench.scaling_laws.label_transport import (
    Transport,
    as_shares,
    calibrated_gradient,
    ground_cost,
    label_distances,
    ot_label_distance,
    pot,
)

__all__ = [
    "FORMS", "RIDGES", "Projector", "Stage1", "Transport", "calibrated_gradient", "fit_stage1",
    "ground_cost", "label_distances", "ot_label_distance", "project", "select", "simplex_grid",
]  # fmt: skip

FORMS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "projektor": (("q", "q2"), ("1", "q", "q2")),
    "released": (("q",), ("1", "q", "q2 but last")),
    "linear": (("q",), ()),
    "pseudo-quadratic": (("q", "q2"), ()),
    "quadratic": (("q", "q2", "pairs"), ()),
}
"""Stage 1: functions of the shares that enter as they are, and those multiplied by OT.

"projektor" is the paper's; "released" the regression of the authors' notebook, which leaves out the
squares outside OT and one source; the others are the paper's baselines without OT.
"""
RIDGES = tuple(float(f"{a:g}") for a in np.logspace(-6, 1, 15))


# --- stage 1


@dataclass(frozen=True)
class Stage1:
    """Accuracy as a function of shares and distance at one size.

    Attributes:
        form: name in `FORMS`.
        plain, moving: coefficients of the functions as they are, and of those multiplied by OT.
        intercept: c0.
        ridge: penalty chosen by leaving one mixture out.
        error: root mean square error of leaving one mixture out, in units of the accuracy.
    """

    form: str
    plain: np.ndarray
    moving: np.ndarray
    intercept: float
    ridge: float
    error: float

    def predict(self, Q: ArrayLike, ot: ArrayLike) -> np.ndarray:
        """Accuracy at the rows of Q (m, k) whose distances are ot (m,)."""
        Q = np.atleast_2d(np.asarray(Q, float))
        plain, moving = (_functions(Q, names) for names in FORMS[self.form])
        fitted: np.ndarray = (
            self.intercept + plain @ self.plain + (moving @ self.moving) * np.asarray(ot, float)
        )
        return fitted

    def gradient(self, q: ArrayLike, ot: float, potentials: ArrayLike) -> np.ndarray:
        """dV/dq by the product rule; exact for moves within the simplex, shape (k,)."""
        q = np.asarray(q, float)
        plain, moving = (_slopes(q, names) for names in FORMS[self.form])
        factor = float((_functions(q[None], FORMS[self.form][1]) @ self.moving)[0])
        return self.plain @ plain + (self.moving @ moving) * ot + factor * np.asarray(potentials)


def fit_stage1(
    Q: ArrayLike,
    ot: ArrayLike,
    acc: ArrayLike,
    *,
    form: str = "projektor",
    ridges: Sequence[float] = RIDGES,
) -> Stage1:
    """Regress accuracy on shares and distance at one size.

    The paper solves ordinary least squares. Shares sum to one, so its columns are dependent, and k
    sources bring 4k coefficients or so: a ridge, chosen by leaving one mixture out, settles both.
    One tiny ridge gives the least-squares fit of least norm.

    Args:
        Q: (m, k) shares of the mixtures trained on.
        ot: m distances.
        acc: m accuracies, in any unit.
        form: name in `FORMS`.
        ridges: penalties to choose from, on standardised columns.

    Returns:
        The fit.

    Raises:
        ValueError: rows of Q are no shares, lengths differ, or the form is unknown.

    Reference: Kang, Just, Sahu and Jia, 2023, arXiv 2307.02460 (first stage).
    """
    shares = _mixtures(Q)
    distance, accuracy = (
        np.asarray(checks.as_floats(v, n, ndim=1)) for v, n in ((ot, "ot"), (acc, "acc"))
    )
    checks.same_length(Q=shares, ot=distance, acc=accuracy)
    plain, moving = (
        _functions(shares, names) for names in FORMS[checks.one_of(form, FORMS, "form")]
    )
    raw = np.hstack([plain, moving * distance[:, None]])
    scaler = StandardScaler().fit(raw)
    model = RidgeCV(ridges, gcv_mode="svd", store_cv_results=True).fit(
        scaler.transform(raw), accuracy
    )
    coefficients = model.coef_ / scaler.scale_
    chosen = list(ridges).index(float(model.alpha_))
    return Stage1(
        form,
        coefficients[: plain.shape[1]],
        coefficients[plain.shape[1] :],
        float(model.intercept_ - scaler.mean_ @ coefficients),
        float(model.alpha_),
        float(np.sqrt(model.cv_results_[:, chosen].mean())),
    )


# --- stage 2 and selection


def project(n: Any, n0: float, n1: float, v0: Any, v1: Any) -> Any:
    r"""Extrapolate log-linearly through two sizes; nothing is clipped.

    $$V(n) = \Big[\ln\tfrac{n}{n_0}\,V(n_1) - \ln\tfrac{n}{n_1}\,V(n_0)\Big] \Big/
    \ln\tfrac{n_1}{n_0}$$

    Args:
        n: size asked for, a number or an array.
        n0, n1: two different sizes.
        v0, v1: values there (accuracy, its logarithm, or gradients), numbers or arrays.

    Returns:
        The value at n, broadcast over n, v0 and v1.

    Raises:
        ValueError: a size is not positive, or n0 equals n1.

    Reference: Kang, Just, Sahu and Jia, 2023, arXiv 2307.02460 (second stage).
    """
    n0, n1 = checks.positive(n0, "n0"), checks.positive(n1, "n1")
    if n0 == n1:
        raise ValueError(f"n0, n1: expected two different sizes, got {n0:g} twice")
    n = np.asarray(n, float)
    if not (n > 0).all():
        raise ValueError("n: expected sizes above 0")
    step = np.log(n / n0) / math.log(n1 / n0)
    return step * np.asarray(v1, float) + (1 - step) * np.asarray(v0, float)


@dataclass
class Projector:
    """Both stages: fits and transports at n0 and n1, read at any size.

    Args:
        n0, n1: the revealed sizes.
        fits: stage 1 at n0 and at n1.
        transports: distances at n0 and at n1.
    """

    n0: float
    n1: float
    fits: Sequence[Stage1]
    transports: Sequence[Transport]

    def predict(self, Q: ArrayLike, n: Any, *, ot: Sequence[ArrayLike] | None = None) -> np.ndarray:
        """Accuracy of the mixtures Q (m, k) at size n; ``ot`` if the distances are known."""
        distances = [t.many(Q) for t in self.transports] if ot is None else ot
        low, high = (f.predict(Q, d) for f, d in zip(self.fits, distances, strict=True))
        value: np.ndarray = project(n, self.n0, self.n1, low, high)
        return value

    def gradient(self, q: ArrayLike, n: float) -> np.ndarray:
        """Derivative of the projected accuracy by the shares, within the simplex, shape (k,)."""
        low, high = (f.gradient(q, *t(q)) for f, t in zip(self.fits, self.transports, strict=True))
        value: np.ndarray = project(n, self.n0, self.n1, low, high)
        return value


def select(
    projector: Projector,
    n: float,
    start: ArrayLike | None = None,
    *,
    step: float = 5e-4,
    decay: float = 0.9,
    iterations: int = 100,
    tolerance: float = 1e-5,
) -> np.ndarray:
    """Climb the projected accuracy on the simplex: q <- projection of q + step decay^t gradient.

    The defaults are the authors', for accuracies in per cent: all steps together move a share by at
    most ``step / (1 - decay)`` times the gradient, so accuracies in [0, 1] would hardly move it.

    Args:
        projector: both stages.
        n: size to choose for.
        start: k shares; by default equal ones.
        step: of the first iteration, in shares per unit of the gradient.
        decay: factor of the step from one iteration to the next.
        iterations: at most.
        tolerance: stop once a step moves every share by less.

    Returns:
        The path, (iterations + 1, k) at most; its last row is the choice.

    Raises:
        ValueError: the start is no vector of shares, or ``iterations`` is not positive.

    Reference: Kang, Just, Sahu and Jia, 2023, arXiv 2307.02460 (data source selection).
    """
    ot = pot()
    k = len(projector.transports[0].sizes)
    path = [np.full(k, 1 / k) if start is None else as_shares(start, k, "start")]
    for t in range(checks.count(iterations, "iterations")):
        ascent = projector.gradient(path[-1], n)
        path.append(ot.utils.proj_simplex(path[-1] + step * decay**t * (ascent - ascent.mean())))
        if np.abs(path[-1] - path[-2]).max() < tolerance:
            break
    return np.array(path)


def simplex_grid(k: int, parts: int) -> np.ndarray:
    """All mixtures of k sources in multiples of 1 / parts, shape (m, k)."""
    k, parts = checks.count(k, "k", minimum=2), checks.count(parts, "parts")
    counts = np.indices((parts + 1,) * (k - 1)).reshape(k - 1, -1).T
    counts = counts[counts.sum(1) <= parts]
    return np.column_stack([counts, parts - counts.sum(1)]) / parts


# --- inside


def _mixtures(Q: ArrayLike) -> np.ndarray:
    shares = np.asarray(checks.as_floats(Q, "Q", ndim=2))
    if shares.min() < -1e-9 or not np.allclose(shares.sum(1), 1, atol=1e-6):
        raise ValueError("Q: expected shares of at least 0, every row summing to 1")
    return shares


def _functions(Q: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Columns of stage 1 at the rows of Q (m, k)."""
    first, second = np.triu_indices(Q.shape[1], 1)
    parts = {
        "1": np.ones((len(Q), 1)), "q": Q, "q2": Q**2, "q2 but last": Q[:, :-1] ** 2,
        "pairs": Q[:, first] * Q[:, second],
    }  # fmt: skip
    return np.hstack([np.empty((len(Q), 0)), *(parts[name] for name in names)])


def _slopes(q: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Derivatives of the columns at q by the shares, (columns, k)."""
    k = len(q)
    first, second = np.triu_indices(k, 1)
    eye = np.eye(k)
    parts = {
        "1": np.zeros((1, k)), "q": eye, "q2": np.diag(2 * q), "q2 but last": np.diag(2 * q)[:-1],
        "pairs": eye[first] * q[second, None] + eye[second] * q[first, None],
    }  # fmt: skip
    return np.vstack([np.empty((0, k)), *(parts[name] for name in names)])
