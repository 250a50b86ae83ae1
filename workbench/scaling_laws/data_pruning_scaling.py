r"""Data pruning against power-law scaling: a solvable perceptron, and scores for real data.

**The perceptron.** A teacher $T$ labels Gaussian inputs, $y = \mathrm{sign}(T\cdot x)$. Of a pool
of $P = \alpha_{tot} N$ examples the share $f$ with the smallest (or largest) $|z|$ is kept, where
$z = J_{probe}\cdot x$ and the probe stands at the angle $\theta$ to the teacher. A student $J$ of
unit length separates what was kept with the largest margin $\kappa$; its error is
$\varepsilon = \arccos(R)/\pi$, $R = J\cdot T$. Write $J$'s part in the plane of probe and teacher
as $w = (\rho, b)$, with $b$ along the direction $v$ orthogonal to the probe, and $q^2 = 1 - |w|^2$.
For given $w$ the rest of $J$ can lift every example to the margin $\kappa$ as long as

$$\alpha\,\mathbb E\,(\kappa - y\,w\cdot(z, v) - q g)_+^2 \le q^2, \qquad \alpha = f\alpha_{tot},
  \quad g \sim \mathcal N(0, 1),$$

so the student is the $w$ of the largest $\kappa$. Setting its gradient to zero gives, with
$m = y\,w\cdot(z, v) + q g$,

$$\alpha\,\mathbb E[(\kappa - m)_+\, y z] = \rho\,(1 - \alpha\Pr(m<\kappa)), \quad
  \alpha\,\mathbb E[(\kappa - m)_+\, y v] = b\,(1 - \alpha\Pr(m<\kappa)), \quad
  \alpha\,\mathbb E(\kappa - m)_+^2 = q^2,$$

which are the paper's three replica equations in other coordinates. `perceptron_theory` solves them
as what they are, a maximum: with $h = w/q$ and $k = \kappa/q$ the function $k(h)$ is concave, and
$\kappa = k/\sqrt{1+|h|^2}$ is climbed by Newton's steps, many problems in one batch.

**Real data.** `prototype_scores` needs no labels: the distance of an embedding to the nearest
k-means centroid. `el2n_scores` needs labels: the error of networks early in training. `prune`
keeps the hardest or easiest share of any score.

Reference: Sorscher, Geirhos, Shekhar, Ganguli and Morcos (2022), "Beyond neural scaling laws:
beating power law scaling via data pruning", arXiv 2206.14486.

*Not included*: the information gain per example, which explains the frontier but is not needed to
compute it; the metrics of the benchmark other than the two above; training on ImageNet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import nnls
from scipy.special import ndtr, ndtri

from workbench.lab import checks

Array = np.ndarray[Any, np.dtype[np.float64]]

WHICH = ("hard", "easy")
_FAR = 8.0  # standard deviations beyond which a Gaussian is nothing
_ROOT = np.sqrt(2 * np.pi)
_ORDERS = ((16, 20), (48, 64))  # quadrature nodes a panel: along the probe, across it
_BATCH = 400_000  # nodes evaluated at a time, which bounds the memory


# --- theory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Student:
    """The max-margin student in the limit of many dimensions; arrays of one shape.

    Attributes:
        error: probability of a wrong label on fresh inputs, $\\arccos(R)/\\pi$.
        R: overlap with the teacher.
        rho: overlap with the probe.
        kappa: margin, for a student of unit length.
        support: support vectors per dimension.
    """

    error: Array
    R: Array
    rho: Array
    kappa: Array
    support: Array


def perceptron_theory(
    alpha_tot: Any, keep: Any = 1.0, *, theta: Any = 0.0, which: str = "hard"
) -> Student:
    r"""Error of a max-margin student after pruning, from the order parameters' equations.

    $\kappa = \max_w \kappa(w)$ subject to $\alpha\,\mathbb E(\kappa - m)_+^2 = 1 - |w|^2$.

    Args:
        alpha_tot: pool size over input dimension; broadcasts with ``keep`` and ``theta``.
        keep: share of the pool that is kept, in (0, 1].
        theta: angle between probe and teacher in radians, 0 (the true margin) to pi/2 (chance).
        which: "hard" keeps the smallest distances to the probe's boundary, "easy" the largest.

    Returns:
        The student's order parameters, to a relative error of about 1e-4 or less.

    Raises:
        ValueError: an argument is out of range.
        FloatingPointError: the integrals could not be resolved, which happens for easy examples of
            an imperfect probe when there are hundreds per dimension.

    Reference: Sorscher et al. (2022), arXiv 2206.14486, appendix A, equations (1)-(3).
    """
    inputs = np.broadcast_arrays(*(np.asarray(v, float) for v in (alpha_tot, keep, theta)))
    alpha, f, angle = (np.ravel(v) for v in inputs)
    if not ((alpha > 0) & np.isfinite(alpha)).all():
        raise ValueError("alpha_tot: expected positive numbers")
    if not ((f > 0) & (f <= 1)).all():
        raise ValueError("keep: expected shares in (0, 1]")
    if not ((angle >= 0) & (angle <= np.pi / 2)).all():
        raise ValueError("theta: expected angles between 0 and pi/2")
    cut = -ndtri((1 - f) / 2) if checks.one_of(which, WHICH, "which") == "hard" else -ndtri(f / 2)
    cut = np.clip(cut, 0, _FAR)
    low, high = (0 * f, cut) if which == "hard" else (cut, 0 * f + _FAR + 1)
    problem = np.stack([alpha, angle, low, high])
    found, sure = np.empty((5, alpha.size)), np.zeros(alpha.size, bool)
    for order in _ORDERS:
        for flat in (True, False):  # a perfect probe needs one integral less
            rows = np.flatnonzero(((angle < 1e-12) == flat) & ~sure)
            size = max(1, _BATCH // (4 * order[0] * order[1]))
            for start in range(0, rows.size, size):
                part = rows[start : start + size]
                found[:, part], sure[part] = _climb(problem[:, part], order, flat)
    if not sure.all():
        i = int(np.flatnonzero(~sure)[0])
        raise FloatingPointError(
            f"{(~sure).sum()} students not resolved, the first at alpha_tot = {alpha[i]:.4g}, "
            f"keep = {f[i]:.4g}, theta = {angle[i]:.4g}"
        )
    return Student(*(v.reshape(inputs[0].shape) for v in found))


def frontier(
    alpha: Any, *, theta: float = 0.0, which: str = "hard", keeps: Any = None
) -> tuple[Array, Array]:
    """Least error for a number of *kept* examples, over pools of all sizes: the Pareto front.

    Args:
        alpha: kept examples per dimension, shape (n,).
        theta: as for `perceptron_theory`.
        which: as for `perceptron_theory`.
        keeps: kept shares tried, the pool being ``alpha / keep``; by default 25 from 0.02 to 1.

    Returns:
        The best share and its error, each of shape (n,).
    """
    alpha = checks.as_floats(alpha, "alpha", ndim=1)
    keeps = np.geomspace(0.02, 1, 25) if keeps is None else checks.as_floats(keeps, "keeps", ndim=1)
    error = perceptron_theory(alpha[:, None] / keeps, keeps, theta=theta, which=which).error
    best = error.argmin(1)
    return keeps[best], error[np.arange(alpha.size), best]


def _climb(problem: Array, order: tuple[int, int], flat: bool) -> tuple[Array, Any]:
    """Rows error, R, rho, kappa, support of a batch of students, and which are to be trusted."""
    alpha, theta, low, _ = problem
    way = np.stack([np.cos(theta), np.sin(theta)], 1)
    reach = (1 + alpha) / 2  # so far out on the teacher's ray the margin is positive
    h = reach[:, None] * way
    k, slope, bend, support = _margin(
        h, reach * (low + 1) + 2 / np.sqrt(alpha), problem, order, flat
    )
    step, rise = np.ones(alpha.size), np.ones(alpha.size)
    for _ in range(80):
        size = np.hypot(1, np.hypot(*h.T))
        kappa = k / size
        gradient = slope - (kappa / size)[:, None] * h
        shell = np.eye(2) - h[:, :, None] * h[:, None, :] / (size**2)[:, None, None]
        move = -np.linalg.solve(bend - (kappa / size)[:, None, None] * shell, gradient[..., None])
        rise = np.abs((gradient * move[..., 0]).sum(1)) / size / kappa
        rows = np.flatnonzero((rise > 1e-17) & (step > 1e-5))
        if not rows.size:
            break
        # far steps would land where the nodes no longer see the few examples that bind
        cap = 0.25 * size / np.maximum(np.hypot(*move[..., 0].T), 1e-300)
        length = np.minimum(step, cap)[rows, None]
        new = h[rows] + length * move[rows, :, 0]
        # k is concave: its tangent lies above it, from where the inner Newton never overshoots
        tangent = k[rows] + (slope[rows] * (new - h[rows])).sum(1)
        tried = _margin(new, tangent, problem[:, rows], order, flat)
        better = tried[0] / np.hypot(1, np.hypot(*new.T)) >= kappa[rows] * (1 - 1e-9)
        taken = rows[better]
        h[taken] = new[better]
        for target, value in zip((k, slope, bend, support), tried, strict=True):
            target[taken] = value[better]
        step[taken] = np.minimum(1, 4 * step[taken])
        step[rows[~better]] *= 0.3
    finer = (order[0] * 3 // 2, order[1] * 3 // 2)
    again = _margin(h, k, problem, finer, flat, most=1)[0]
    size = np.hypot(1, np.hypot(*h.T))
    overlap = (h * way).sum(1) / size
    # arccos loses digits near 1; the angle's tangent does not
    across = np.hypot(1, h[:, 1] * way[:, 0] - h[:, 0] * way[:, 1])
    error = np.arctan2(across, (h * way).sum(1)) / np.pi
    sure = (rise < 1e-9) & (np.abs(again - k) < 1e-4 * np.abs(k))
    return np.stack([error, overlap, h[:, 0] / size, k / size, support]), sure


def _margin(
    h: Array, k: Array, problem: Array, order: tuple[int, int], flat: bool, most: int = 100
) -> tuple[Array, Array, Array, Array]:
    """k(h) with its gradient and Hessian, and the support; ``k`` holds starts from above.

    Newton on $(\\alpha E(k - h\\cdot x - g)_+^2 - 1)/2$, convex and rising in k.
    """
    count = k.size
    k = k.copy()
    slope, bend, support = np.empty((count, 2)), np.empty((count, 2, 2)), np.empty(count)
    rows = np.arange(count)
    for _ in range(most):
        x, y, weight = _nodes(h[rows], k[rows], problem[:, rows], order, flat)
        weight *= problem[0, rows, None]
        gap = k[rows, None] - h[rows, :1] * x - h[rows, 1:] * y
        inside = weight * ndtr(gap)
        first = gap * inside + weight * np.exp(-gap * gap / 2) / _ROOT  # E over g of (gap - g)_+
        rate = first.sum(1)
        step = ((gap * first + inside).sum(1) - 1) / 2 / rate
        dx, dy = (first * x).sum(1) / rate, (first * y).sum(1) / rate
        x, y = x - dx[:, None], y - dy[:, None]
        cross = -(inside * x * y).sum(1) / rate
        slope[rows] = np.stack([dx, dy], 1)
        bend[rows, 0, 0] = -(inside * x * x).sum(1) / rate
        bend[rows, 1, 1] = -(inside * y * y).sum(1) / rate
        bend[rows, 0, 1] = bend[rows, 1, 0] = cross
        if flat:  # nothing lies across the probe: h[:, 1] stays 0
            bend[rows, 1, 1] = -1
        support[rows] = inside.sum(1)
        k[rows] -= step
        rows = rows[np.abs(step) > 1e-9 * (1 + np.abs(k[rows]))]
        if not rows.size:
            break
    return k, slope, bend, support


def _nodes(
    h: Array, k: Array, problem: Array, order: tuple[int, int], flat: bool
) -> tuple[Array, Array, Array]:
    """Gauss-Legendre nodes (label times z, label times v) and weights of the kept density times f.

    Panels end where label and probe no longer disagree (z of a few sin(theta)) and where margins
    are beyond reach of k, so that a handful of nodes resolves every angle and density.
    """
    _, theta, low, high = problem
    h1, h2 = h.T
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        top = np.where(h1 > 0, (k + _FAR * np.hypot(1, h2)) / h1, high)
    top = np.clip(top, low + 1e-3, high)
    middle = low if flat else np.minimum(np.hypot(low, 6 * np.sin(theta)), top)
    ends = np.stack([low, middle, top], 1)
    u, du = _rule(order[0])
    width = np.diff(ends, axis=1)[:, :, None]
    z = (ends[:, :-1, None] + width * u).reshape(k.size, -1)
    weight = (width * du).reshape(k.size, -1) * 2 * np.exp(-z * z / 2) / _ROOT
    if flat:
        return z, np.zeros_like(z), weight
    z = np.concatenate([z, -z], 1)[:, :, None]  # the probe agrees with the label; it does not
    weight = np.concatenate([weight, weight], 1)[:, :, None]
    start = np.clip(-z / np.tan(theta)[:, None, None], -_FAR, _FAR)  # where T.x becomes positive
    reach = (k + _FAR)[:, None, None] - h1[:, None, None] * z
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        stop = np.where(h2[:, None, None] > 0, reach / h2[:, None, None], _FAR)
    length = np.clip(stop, start, _FAR) - start
    u, du = _rule(order[1])
    v = start + length * u
    weight = weight * length * du * np.exp(-v * v / 2) / _ROOT
    z = np.broadcast_to(z, v.shape)
    return z.reshape(k.size, -1), v.reshape(k.size, -1), weight.reshape(k.size, -1)


@lru_cache
def _rule(n: int) -> tuple[Array, Array]:
    x, w = np.polynomial.legendre.leggauss(n)
    return (x + 1) / 2, w / 2


# --- simulation ----------------------------------------------------------------------------------


def max_margin(X: Any, y: Any) -> Array:
    r"""Unit vector through the origin with the largest margin, $\max_{|J|=1}\min_i y_i J\cdot x_i$.

    Exact: the dual $\min_{\lambda\ge0} |\sum_i\lambda_i y_i x_i|^2 + (1 - \sum_i\lambda_i)^2$ is
    non-negative least squares, which scipy's active set solves.

    Args:
        X: inputs, shape (n, d).
        y: labels -1 or 1, shape (n,).

    Raises:
        ValueError: no hyperplane through the origin separates the labels.

    Reference: Lawson and Hanson (1974), "Solving Least Squares Problems", least distance
    programming.
    """
    X = np.asarray(checks.as_floats(X, "X", ndim=2), float)
    y = np.asarray(checks.as_floats(y, "y", ndim=1), float)
    checks.same_length(X=X, y=y)
    if not (np.abs(y) == 1).all():
        raise ValueError("y: expected labels -1 and 1")
    signed = X * y[:, None]
    target = np.zeros(X.shape[1] + 1)
    target[-1] = 1
    multipliers, _ = nnls(np.vstack([signed.T, np.ones(len(y))]), target)
    student: Array = signed.T @ multipliers
    if not (signed @ student).min() > 1e-9 * np.linalg.norm(student):
        raise ValueError("X: no hyperplane through the origin separates the labels")
    return student / np.linalg.norm(student)


def simulate(
    alpha_tot: float,
    keep: float = 1.0,
    *,
    n: int = 200,
    theta: float = 0.0,
    which: str = "hard",
    random_state: np.random.Generator | int | None = None,
) -> Student:
    """One draw of teacher, probe and pool in ``n`` dimensions; the student's own order parameters.

    The counterpart of `perceptron_theory`, which shares none of its code but the score's meaning.

    Args:
        alpha_tot: pool size over ``n``.
        keep: share kept.
        n: input dimension.
        theta: angle between probe and teacher in radians.
        which: "hard", "easy" or "random".
        random_state: of everything drawn.
    """
    rng = checks.as_rng(random_state)
    pool = rng.standard_normal((round(checks.positive(alpha_tot, "alpha_tot") * n), n))
    # axes are free to choose: the probe is the first, the teacher lies in the first plane
    teacher = np.zeros(n)
    teacher[:2] = np.cos(theta), np.sin(theta)
    scores = rng.random(len(pool)) if which == "random" else -np.abs(pool[:, 0])
    kept = pool[prune(scores, keep, which="hard" if which == "random" else which)]
    labels = np.where(kept @ teacher > 0, 1.0, -1.0)
    student = max_margin(kept, labels)
    margins = (kept @ student) * labels
    overlap = float(student @ teacher)
    values = (
        np.arctan2(np.linalg.norm(student - overlap * teacher), overlap) / np.pi,
        overlap,
        student[0],
        margins.min(),
        (margins < margins.min() * (1 + 1e-6)).sum() / n,
    )
    return Student(*(np.asarray(v, float) for v in values))


# --- scores for real data ------------------------------------------------------------------------


def prototype_scores(
    Z: Any, k: int, *, random_state: int | np.random.Generator | None = 0, starts: int = 4
) -> Array:
    r"""Self-supervised difficulty: $1 - \cos$ of an embedding with its k-means centroid.

    Args:
        Z: embeddings, shape (n, d); put to unit length first.
        k: clusters; about the number of classes, the paper finds little dependence.
        random_state: of k-means.
        starts: k-means runs, of which the tightest is kept.

    Returns:
        Scores of shape (n,), large for unusual examples. No label is looked at.

    Raises:
        ValueError: an embedding is zero, or there are fewer rows than clusters.

    Reference: Sorscher et al. (2022), arXiv 2206.14486, section 6 (there on SwAV embeddings).
    """
    from sklearn.cluster import KMeans

    Z = np.asarray(checks.as_floats(Z, "Z", ndim=2), float)
    if checks.count(k, "k") > len(Z):
        raise ValueError(f"k: expected at most {len(Z)} clusters, one a row, got {k}")
    norm = np.linalg.norm(Z, axis=1, keepdims=True)
    if not norm.min() > 0:
        raise ValueError("Z: a row is zero and has no direction")
    Z = Z / norm
    state = int(checks.as_rng(random_state).integers(2**31))
    clusters = KMeans(k, n_init=checks.count(starts, "starts"), random_state=state).fit(Z)
    centre = clusters.cluster_centers_[clusters.labels_]
    return 1 - (Z * centre).sum(1) / np.linalg.norm(centre, axis=1)


def el2n_scores(probs: Any, labels: Any) -> Array:
    r"""Supervised difficulty: $\mathbb E_m \|p_m(x) - e_y\|_2$ over networks early in training.

    Args:
        probs: class probabilities of the networks, shape (models, n, classes).
        labels: classes, shape (n,).

    Returns:
        Scores of shape (n,) between 0 and sqrt(2).

    Reference: Paul, Ganguli and Dziugaite (2021), arXiv 2107.07075, definition 2.2.
    """
    probs = np.asarray(checks.as_unit(probs, "probs", ndim=3), float)
    labels = np.asarray(checks.as_labels(labels, probs.shape[2]))
    if len(labels) != probs.shape[1]:
        raise ValueError(f"labels: expected {probs.shape[1]} as in probs, got {len(labels)}")
    gap = probs - np.eye(probs.shape[2])[labels]
    return np.linalg.norm(gap, axis=2).mean(0)


def prune(
    scores: Any, keep: float, *, which: str = "hard", labels: Any = None, floor: float = 0.5
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows to keep: those of the largest (hard) or smallest (easy) scores.

    Args:
        scores: difficulties, shape (n,).
        keep: share of the rows, in (0, 1]; at least one row is kept.
        which: "hard" or "easy".
        labels: with classes of shape (n,), every class keeps at least ``floor`` of what it would
            keep if all classes were pruned alike; the rest goes by score.
        floor: see ``labels``; 0.5 is the paper's balance.

    Returns:
        Indices in rising order. Equal scores go by position.

    Reference: Sorscher et al. (2022), arXiv 2206.14486, sections 3 and 6 and the appendix on class
    balance.
    """
    scores = checks.as_floats(scores, "scores", ndim=1)
    share = checks.fraction(keep, "keep", zero=False)
    sign = -1 if checks.one_of(which, WHICH, "which") == "hard" else 1
    order = np.argsort(sign * scores, kind="stable")
    total = max(1, round(share * len(scores)))
    if labels is None:
        return np.sort(order[:total])
    labels = np.asarray(checks.as_labels(labels))
    checks.same_length(scores=scores, labels=labels)
    _, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    least = np.floor(checks.fraction(floor, "floor") * share * sizes).astype(int)
    by_class = order[np.argsort(codes[order], kind="stable")]
    rank = np.empty(len(scores), int)
    rank[by_class] = np.arange(len(scores)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    first = rank < least[codes]
    return np.sort(np.concatenate([order[first[order]], order[~first[order]]])[:total])
