r"""When not to minimise a conditional loss at all: naive Bayes against logistic regression.

Both are linear classifiers on fixed features $x\in\mathbb R^n$. Logistic regression minimises the
log loss of $p(y|x)$; Gaussian naive Bayes fits $p(x|y)$ by counting, with class means $\mu_k$,
priors $\pi_k$ and one diagonal variance for all classes, and scores

$$s_k(x) = \log\pi_k - \frac12\sum_{j=1}^n\frac{(x_j-\mu_{kj})^2}{v_j},\qquad
  v_j = \sum_k\pi_k\,\widehat{\mathrm{Var}}(x_j\,|\,y=k) + \varepsilon .$$

Each mean is estimated alone, so that $O(\log n)$ samples bring all of them near their limits at
once; logistic regression weighs all features jointly and needs $O(n)$. Naive Bayes may have the
higher error in the limit: then two regimes meet at a crossing point. That the log loss is a fit
stand-in for the error follows from

$$R_{01}-R_{01}^* \le \sqrt2\,(R_{\log}-R_{\log}^*)^{1/2}.$$

Reference: Zheng, Wu, Bao, Cao, Li and Zhu (2023), "Revisiting Discriminative vs. Generative
Classifiers: Theory and Implications", arXiv 2302.02334; Ng and Jordan (2001) for two classes.

*Not included*: logistic regression by SGD (the problem is convex, and L-BFGS solves it); the
backbones ViT, ResNet, CLIP, MoCo, SimCLR, MAE and SimMIM on CIFAR, whose weights and images no
package carries (`learning_curves` takes their features if you have them); the theorems on sample
complexity, which are upper bounds up to constants: here samples are counted. The inequality above
is checked for all scores, where H-consistency bounds excess risk.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
from scipy.special import log_softmax, xlog1py
from scipy.stats import norm
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.preprocessing import MinMaxScaler

from workbench.lab import checks
from workbench.losses.naive_bayes import SharedVarianceNB

Array = np.ndarray[Any, np.dtype[Any]]

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Values of C among which a tuned logistic regression chooses."""
SMOOTHINGS = (1e-9, 1e-4, 1e-3, 1e-2, 1e-1)
"""Values of eps among which a tuned naive Bayes chooses."""


# --- the generator of the simulation -------------------------------------------------------------


@dataclass(frozen=True)
class GaussianClasses:
    r"""Equally likely Gaussian classes whose means lie on one line.

    Class 0 has the mean $-\mathbf 1$, class $k$ the mean $2^{k-1}\mathbf 1$; the first half of the
    features has variance n, the rest 1. With ``correlation`` c any two features correlate by c,
    which naive Bayes cannot see.

    Args:
        K: number of classes, >= 2.
        n: number of features, >= 1.
        correlation: in [0, 1); the paper's is 0.
        separation: if given, all means are scaled such that the nearest two are so many standard
            deviations apart whatever n is (Mahalanobis); the paper's move apart as n grows.

    Reference: Zheng et al. (2023), arXiv 2302.02334, simulation.
    """

    K: int
    n: int
    correlation: float = 0.0
    separation: float | None = None

    def __post_init__(self) -> None:
        checks.count(self.K, "K", minimum=2)
        checks.count(self.n, "n")
        checks.fraction(self.correlation, "correlation", one=False)
        if self.separation is not None:
            checks.positive(self.separation, "separation")

    @property
    def places(self) -> Array:
        """(K,) every coordinate of each class mean."""
        places = np.array([-1.0, *(2.0**k for k in range(self.K - 1))])
        if self.separation is None:
            return places
        return places * self.separation / (np.diff(places).min() * self._spread)

    @property
    def std(self) -> Array:
        """(n,) standard deviations."""
        return np.where(np.arange(self.n) < self.n // 2, np.sqrt(self.n), 1.0)

    def sample(self, m: int, random_state: Any = None) -> tuple[Array, Array]:
        """Features (m, n) and labels (m,); the first K rows hold one of each class."""
        rng = checks.as_rng(random_state)
        checks.count(m, "m", minimum=self.K)
        y = np.concatenate([np.arange(self.K), rng.integers(self.K, size=m - self.K)])
        z = np.sqrt(1 - self.correlation) * rng.standard_normal((m, self.n))
        z += np.sqrt(self.correlation) * rng.standard_normal((m, 1))
        return self.places[y][:, None] + z * self.std, y

    @property
    def bayes_error(self) -> float:
        r"""Least error $\frac2K\sum_i\Phi(-\frac12g_i\sqrt S)$.

        Here $S=\mathbf 1^T\Sigma^{-1}\mathbf 1$. The means lie on a line, so the sufficient
        statistic is a number and classes meet between neighbours, whose gaps $g_i$ are 2, 1, 2, 4,
        8, ...
        """
        return float(2 / self.K * norm.sf(np.diff(self.places) * self._spread / 2).sum())

    @property
    def _spread(self) -> float:
        r"""$\sqrt S$: standard deviations between two means whose coordinates differ by 1."""
        c, inverse = self.correlation, 1 / self.std
        shared = c * inverse.sum() ** 2 / (1 - c + c * self.n)
        return float(np.sqrt(((inverse**2).sum() - shared) / (1 - c)))

    def error(self, model: Any, draws: int = 20_000) -> float:
        """Error of a fitted linear classifier, without a test set.

        Within a class the K scores are Gaussian with a mean and a covariance that follow from the
        weights: for two classes the error is a normal probability, for more ``draws`` vectors of
        scores a class are drawn (always the same).
        """
        weights, shift = np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)
        c, scaled = self.correlation, weights * self.std
        means = self.places[:, None] * weights.sum(1) + shift
        if len(shift) == 1:
            spread = np.sqrt((1 - c) * (scaled**2).sum() + c * scaled.sum() ** 2)
            return float(norm.cdf(np.array([1, -1]) * means[:, 0] / spread).mean())
        factor = np.vstack([np.sqrt(1 - c) * scaled.T, np.sqrt(c) * scaled.sum(1)])
        root = np.linalg.qr(factor, mode="r")
        noise = np.random.default_rng(0).standard_normal((draws, len(root))) @ root
        wrong = [((noise + mean).argmax(1) != k).mean() for k, mean in enumerate(means)]
        return float(np.mean(wrong))


class Generator(Protocol):
    """What `sample_complexity` draws from; `error` judges a fitted model."""

    def sample(self, m: int, random_state: Any = None) -> tuple[Array, Array]:
        """m rows with their labels, every class among them."""

    def error(self, model: Any) -> float:
        """Error of a fitted model."""


def paper_models(C: float = 1.0, eps: float = 1e-9) -> dict[str, Any]:
    """The two classifiers compared: ``nb``, and ``lr`` with an L2 penalty by L-BFGS."""
    return {"nb": SharedVarianceNB(eps), "lr": LogisticRegression(C=C, max_iter=1000)}


def error_curves(
    models: Mapping[str, Any],
    generator: Generator,
    sizes: Sequence[int],
    *,
    until: float = 0.0,
    repeats: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Errors of several models on the same growing samples.

    Args:
        models: unfitted classifiers by name.
        generator: has `sample` and `error`.
        sizes: numbers of training rows, rising.
        until: stop after the first size at which every model has come down to this error.
        repeats: samples a size, over which errors are averaged.
        seed: of the samples.

    Returns:
        One row a size: ``m`` and a column of errors a model.
    """
    checks.count(repeats, "repeats")
    rng, rows = np.random.default_rng(seed), []
    first = dict.fromkeys(models, np.inf)
    for m in _sizes(sizes):
        errors = dict.fromkeys(models, 0.0)
        for _ in range(repeats):
            X, y = generator.sample(m, rng)
            for name, model in models.items():
                errors[name] += generator.error(_fitted(model, X, y)) / repeats
        rows.append({"m": m, **errors})
        first = {name: min(first[name], error) for name, error in errors.items()}
        if max(first.values()) <= until:
            break
    return pd.DataFrame(rows)


def first_passage(sizes: Any, errors: Any, target: float) -> float:
    """Samples at which a curve first comes down to an error; inf if it never does.

    Between two sizes the error is taken as linear in the logarithm of the size.

    Args:
        sizes: (s,) rising numbers of samples.
        errors: (s,) errors there.
        target: the error to reach.
    """
    sizes, errors = np.asarray(_sizes(sizes), float), np.asarray(errors, float)
    checks.same_length(sizes=sizes, errors=errors)
    reached = np.flatnonzero(errors <= target)
    if not len(reached):
        return float("inf")
    i = int(reached[0])
    if i == 0:
        return float(sizes[0])
    share = (errors[i - 1] - target) / (errors[i - 1] - errors[i])
    return float(sizes[i - 1] * (sizes[i] / sizes[i - 1]) ** share)


def sample_complexity(
    model: Any,
    generator: Generator,
    target: float,
    *,
    sizes: Sequence[int],
    repeats: int = 1,
    seed: int = 0,
) -> float:
    """Samples with which a classifier first comes down to an error.

    The paper raises m by log n from 2 K on; any rising sizes do, and between two of them the
    error is interpolated.

    Args:
        model: unfitted classifier; it is cloned.
        generator: has `sample` and `error`, such as `GaussianClasses`.
        target: error to reach; the paper takes the Bayes error + 0.01.
        sizes: numbers of samples to try, rising.
        repeats: samples a size, over which the error is averaged.
        seed: of the samples.

    Returns:
        The number of samples, inf where no size is enough.

    Reference: Zheng et al. (2023), arXiv 2302.02334, simulation.
    """
    curve = error_curves(
        {"model": model}, generator, sizes, until=target, repeats=repeats, seed=seed
    )
    return first_passage(curve.m, curve.model, target)


def growth_exponent(n: Any, m: Any) -> float:
    """Slope of log m against log n: 1 where samples grow linearly with n, 0 where they do not."""
    n, m = checks.as_floats(np.asarray(n, float), "n"), checks.as_floats(np.asarray(m, float), "m")
    return float(np.polyfit(np.log(n), np.log(m), 1)[0])


# --- features of your own ------------------------------------------------------------------------


def learning_curves(
    features: Any,
    y: Any,
    sizes: Sequence[int],
    *,
    repeats: int = 10,
    test: float = 0.4,
    balanced: bool = False,
    models: Mapping[str, Any] | None = None,
    tune: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Errors of both classifiers on fixed features, over the number of training rows.

    A stratified test part is set aside; training rows are drawn from the rest, one of each class
    first, larger samples containing the smaller ones. Features are scaled to [0, 1] by the least
    and largest value in the training rows.

    Args:
        features: (N, n) of any network or table.
        y: (N,) labels.
        sizes: numbers of training rows, rising, at least one a class.
        repeats: splits, numbered by ``seed`` and upwards.
        test: share of the rows to test on.
        balanced: draw the same number of each class; by default rows at random, as the paper.
        models: unfitted classifiers by name; by default `paper_models()`, ``nb`` and ``lr``.
        tune: add ``nb_tuned`` and ``lr_tuned``, whose eps and C are chosen by threefold cross
            validation within the training rows, each among five values; with fewer than three rows
            of some class nothing can be chosen, and the paper's values are kept.
        seed: of the first split.

    Returns:
        One row a split and size: ``n``, ``K``, ``m``, ``seed`` and a column of errors a model.

    Raises:
        ValueError: too few rows for a size, or a size below the number of classes.

    Reference: Zheng et al. (2023), arXiv 2302.02334, linear evaluation of pretrained networks.
    """
    X = checks.as_floats(checks.to_numpy(features), "features", ndim=2)
    labels = checks.to_numpy(y)
    checks.same_length(features=X, y=labels)
    K, sizes = len(np.unique(labels)), _sizes(sizes)
    models = paper_models() if models is None else models
    if sizes[0] < K:
        raise ValueError(f"sizes: expected at least {K} rows, one a class, got {sizes[0]}")
    rows = []
    for repeat in range(checks.count(repeats, "repeats")):
        split = seed + repeat
        pool, held = train_test_split(
            np.arange(len(X)), test_size=test, stratify=labels, random_state=split
        )
        order = pool[_order(labels[pool], balanced, np.random.default_rng(split))]
        if sizes[-1] > len(order):
            raise ValueError(f"sizes: expected at most {len(order)} training rows, got {sizes[-1]}")
        for m in sizes:
            scaler = MinMaxScaler().fit(X[order[:m]])
            train, seen = scaler.transform(X[order[:m]]), labels[order[:m]]
            unseen, truth = scaler.transform(X[held]), labels[held]
            fitted = {name: _fitted(model, train, seen) for name, model in models.items()}
            if tune:
                enough = np.unique(seen, return_counts=True)[1].min() >= 3
                choose = _tuned if enough else _fitted
                for name, model in paper_models().items():
                    fitted[f"{name}_tuned"] = choose(model, train, seen)
            errors = {q: float((fit.predict(unseen) != truth).mean()) for q, fit in fitted.items()}
            rows.append({"n": X.shape[1], "K": K, "m": m, "seed": split, **errors})
    return pd.DataFrame(rows)


def crossing(sizes: Any, nb: Any, lr: Any) -> float:
    """Number of samples from which logistic regression has the lower error; inf if it never does.

    Interpolates the difference of the errors linearly in the logarithm of the size; the first size
    where it is lower throughout.
    """
    sizes, gap = np.asarray(_sizes(sizes), float), np.asarray(lr, float) - np.asarray(nb, float)
    checks.same_length(sizes=sizes, errors=gap)
    above = np.flatnonzero(gap >= 0)
    if not len(above):
        return float(sizes[0])
    i = int(above[-1])
    if i == len(gap) - 1:
        return float("inf")
    return float(sizes[i] * (sizes[i + 1] / sizes[i]) ** (gap[i] / (gap[i] - gap[i + 1])))


# --- from the log loss to the error --------------------------------------------------------------


def conditional_regrets(logits: Any, probs: Any) -> tuple[Array, Array]:
    r"""What scores lose at one point x: in error $\max_k p_k - p_{\hat k}$, in log loss $KL(p\|q)$.

    Args:
        logits: (N, K) scores; $\hat k$ is the first largest, $q$ their softmax.
        probs: (N, K) true class probabilities p.

    Returns:
        Regret in error (N,) and in log loss (N,), nats.
    """
    scores, p = (
        checks.as_logits(np.asarray(logits, float)),
        checks.as_probs(np.asarray(probs, float)),
    )
    if scores.shape != p.shape:
        raise ValueError(f"probs: expected the shape of logits {scores.shape}, got {p.shape}")
    chosen = np.take_along_axis(p, scores.argmax(1)[:, None], 1)[:, 0]
    entropy = np.log(p, out=np.zeros_like(p), where=p > 0)
    return p.max(1) - chosen, (p * (entropy - log_softmax(scores, axis=1))).sum(1)


def least_log_regret(beta: Any) -> Array:
    r"""Least regret in log loss of scores that lose $\beta$ in error, for any number of classes.

    $T(\beta) = \frac{1+\beta}2\log(1+\beta) + \frac{1-\beta}2\log(1-\beta) \ge \beta^2/2$.
    """
    beta = np.asarray(beta, float)
    if not ((beta >= 0) & (beta <= 1)).all():
        raise ValueError("beta: expected regrets in [0, 1]")
    value: Array = (xlog1py(1 + beta, beta) + xlog1py(1 - beta, -beta)) / 2
    return value


def error_bound(regret: Any, *, tight: bool = False) -> Array:
    r"""Largest regret in error that a regret in log loss allows.

    $\sqrt{2\,(R_{\log}-R_{\log}^*)}$, or with ``tight`` the inverse of `least_log_regret`, which
    no bound in terms of this regret alone can better; both at most 1.

    Args:
        regret: excess log loss, nats, of any shape, >= 0.
        tight: use the exact inverse.

    Reference: Zheng et al. (2023), arXiv 2302.02334, logistic H-consistency bound; Mao, Mohri and
    Zhong (2023), arXiv 2304.07288, for the inverse.
    """
    regret = np.asarray(regret, float)
    if not (regret >= 0).all():
        raise ValueError("regret: expected excess losses of at least 0")
    if not tight:
        return np.minimum(np.sqrt(2 * regret), 1.0)
    low, high = np.zeros_like(regret), np.ones_like(regret)
    for _ in range(52):  # halvings, to the last bit
        middle = (low + high) / 2
        below = least_log_regret(middle) < regret
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return high


# --- details -------------------------------------------------------------------------------------


def _fitted(model: Any, X: Array, y: Array) -> Any:
    """A fitted clone; an L-BFGS that stops at its limit of iterations is the paper's procedure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return clone(model).fit(X, y)


def _tuned(model: Any, X: Array, y: Array) -> Any:
    grid = {"eps": SMOOTHINGS} if isinstance(model, SharedVarianceNB) else {"C": STRENGTHS}
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    return _fitted(GridSearchCV(model, grid, cv=folds), X, y)


def _order(y: Array, balanced: bool, rng: np.random.Generator) -> Array:
    """Rows at random, but one of each class first; or every class in turn."""
    shuffled = rng.permutation(len(y))
    _, codes, sizes = np.unique(y[shuffled], return_inverse=True, return_counts=True)
    by_class = np.argsort(codes, kind="stable")
    rank = np.empty(len(y), int)
    rank[by_class] = np.arange(len(y)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    if not balanced:
        rank = np.minimum(rank, 1)
    order: Array = shuffled[np.argsort(rank, kind="stable")]
    return order


def _sizes(sizes: Any) -> list[int]:
    found = [checks.count(m, "sizes") for m in np.asarray(sizes).ravel()]
    if not found or (np.diff(found) <= 0).any():
        raise ValueError(f"sizes: expected rising numbers of samples, got {found}")
    return found
