r"""Several methods on several data sets: mean ranks, and which differences are more than chance.

Scores are matrices (n, k): a row is a block (a data set, say), a column a method. Demšar (2006)
gives the reasons for ranks, for the tests below and for the diagram that shows them
(`workbench.plots.rank_diagram`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from workbench.lab import checks

if TYPE_CHECKING:
    import pandas as pd

Scores = Float[np.ndarray, "n k"]


def _scores(scores: Any, rows: int = 1) -> Scores:
    values: Scores = np.asarray(checks.as_floats(scores, "scores", ndim=2), float)
    if values.shape[1] < 2 or len(values) < rows:
        raise ValueError(
            f"scores: expected at least {rows} block(s) of at least 2 methods, got {values.shape}"
        )
    return values


def ranks(scores: Any, better: str = "higher") -> Float[np.ndarray, "n k"]:
    """Ranks within each block, 1 for the best; equal scores share the mean of their ranks.

    Args:
        scores: (n, k) finite numbers, blocks by methods.
        better: ``higher`` or ``lower``: which scores are good.
    """
    from scipy.stats import rankdata

    sign = {"higher": -1.0, "lower": 1.0}[checks.one_of(better, ("higher", "lower"), "better")]
    found: Float[np.ndarray, "n k"] = rankdata(sign * _scores(scores), axis=1)
    return found


@dataclass(frozen=True)
class Friedman:
    """Friedman's test: is any method different?

    Attributes:
        statistic: chi square with k - 1 degrees of freedom, corrected for ties.
        p: its probability under equal methods.
        f: Iman and Davenport's less conservative form, F with k - 1 and (k - 1)(n - 1) degrees.
        f_p: its probability.
    """

    statistic: float
    p: float
    f: float
    f_p: float


def friedman(scores: Any) -> Friedman:
    r"""Friedman's test with Iman and Davenport's $F=\frac{(n-1)\chi^2}{n(k-1)-\chi^2}$.

    Args:
        scores: (n, k), n and k at least 2; which direction is good does not matter.

    Reference:
        Demšar (2006), Statistical comparisons of classifiers over multiple data sets, JMLR 7,
        section 3.2.2.
    """
    from scipy.stats import chi2
    from scipy.stats import f as f_law

    order = ranks(_scores(scores, rows=2))
    n, k = order.shape
    between = n**2 * float(((order.mean(0) - (k + 1) / 2) ** 2).sum())
    within = float(((order - (k + 1) / 2) ** 2).sum()) / (k - 1)
    statistic = between / within if within else 0.0
    rest = n * (k - 1) - statistic
    f = (n - 1) * statistic / rest if rest > 1e-12 * n * k else math.inf
    return Friedman(
        statistic,
        float(chi2.sf(statistic, k - 1)),
        f,
        float(f_law.sf(f, k - 1, (k - 1) * (n - 1))),
    )


def critical_difference(k: int, blocks: int, alpha: float = 0.05) -> float:
    r"""Nemenyi's critical difference of mean ranks, $q_\alpha\sqrt{k(k+1)/(6n)}$.

    $q_\alpha$ is the quantile of the range of k standard normal numbers, divided by $\sqrt2$.

    Args:
        k: number of methods, at least 2.
        blocks: number of blocks n.
        alpha: chance that any of k equal methods is found different.

    Reference:
        Demšar (2006), section 3.2.2 and table 5.
    """
    from scipy.stats import studentized_range

    k, blocks = checks.count(k, "k", minimum=2), checks.count(blocks, "blocks")
    alpha = checks.fraction(alpha, "alpha", zero=False, one=False)
    q = float(studentized_range.ppf(1 - alpha, k, np.inf)) / math.sqrt(2)
    return q * math.sqrt(k * (k + 1) / (6 * blocks))


def holm(p: Any) -> Float[np.ndarray, " m"]:
    """Probabilities adjusted for m tests by Holm's step-down method; compare them with alpha."""
    values = np.asarray(checks.as_unit(p, "p"), float)
    order = np.argsort(values)
    steps = np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values))))
    out: Float[np.ndarray, " m"] = np.empty(len(values))
    out[order] = np.minimum(steps, 1.0)
    return out


def wilcoxon(
    scores: Any, names: Sequence[str] | None = None, *, against: str | None = None
) -> pd.DataFrame:
    """Wilcoxon's signed-rank test of pairs of methods, adjusted by Holm for all pairs tested.

    Blocks without a difference count half for either side. The law is exact where all differences
    have different sizes (up to 50 blocks), else normal.

    Args:
        scores: (n, k), or a data frame, whose columns give the names.
        names: of the k methods.
        against: test each method against this one only; all pairs when None.

    Returns:
        A row a pair: ``first``, ``second``, ``difference`` (mean of first - second), ``p``, and
        ``adjusted``.
    """
    import pandas as pd
    from scipy import stats

    names = _names(scores, names)
    values = _scores(scores)
    if against is not None:
        checks.one_of(against, names, "against")
    pairs = [
        (i, j) if against is None or names[j] == against else (j, i)
        for i, j in combinations(range(len(names)), 2)
        if against is None or against in (names[i], names[j])
    ]
    rows = []
    for i, j in pairs:
        d = values[:, i] - values[:, j]
        # the exact law holds without ties; scipy's permutations for the rest take long
        way = "exact" if len(np.unique(np.abs(d[d != 0]))) == len(d) <= 50 else "approx"
        p = float(stats.wilcoxon(d, zero_method="zsplit", method=way).pvalue) if d.any() else 1.0
        rows.append((names[i], names[j], float(d.mean()), p))
    found = pd.DataFrame(rows, columns=["first", "second", "difference", "p"])
    found["adjusted"] = holm(found["p"].to_numpy())
    return found


def _names(scores: Any, names: Sequence[str] | None) -> list[str]:
    if names is None:
        columns = getattr(scores, "columns", None)
        width = np.shape(scores)[1] if np.ndim(scores) == 2 else 0
        return [str(c) for c in (range(width) if columns is None else columns)]
    if len(names) != np.shape(scores)[-1] or len(set(names)) != len(names):
        raise ValueError(f"names: expected {np.shape(scores)[-1]} different ones, got {names!r}")
    return list(names)


def groups(order: Any, alike: Bool[np.ndarray, "k k"]) -> list[tuple[int, ...]]:
    """Largest sets of neighbours in rank order of which no two are distinguishable.

    Args:
        order: (k,) mean ranks.
        alike: (k, k), symmetric: whether two methods cannot be told apart.

    Returns:
        Sets of at least two methods as indices in rank order, the best first; none lies in another.
    """
    by_rank = np.argsort(np.asarray(order, float), kind="stable")
    same, k = np.asarray(alike, bool), len(by_rank)
    if same.shape != (k, k) or not (same == same.T).all():
        raise ValueError(f"alike: expected a symmetric {k} x {k} matrix, got shape {same.shape}")
    same = same[np.ix_(by_rank, by_rank)]
    found: list[tuple[int, ...]] = []
    last = 0
    for start in range(k):
        end = start + 1
        while end < k and same[start : end + 1, end][:-1].all():
            end += 1
        if end - start > 1 and end > last:
            found.append(tuple(int(i) for i in by_rank[start:end]))
        last = max(last, end)
    return found


@dataclass(frozen=True)
class Ranking:
    """Methods by mean rank.

    Attributes:
        ranks: mean rank by name, the best first.
        cd: Nemenyi's critical difference.
        groups: names that cannot be told apart at ``alpha``, largest sets only.
        test: Friedman's test of all methods together.
        blocks: how many blocks were ranked.
        alpha: level of ``cd``.
    """

    ranks: dict[str, float]
    cd: float
    groups: tuple[tuple[str, ...], ...]
    test: Friedman
    blocks: int
    alpha: float


def ranking(
    scores: Any,
    names: Sequence[str] | None = None,
    *,
    better: str = "higher",
    alpha: float = 0.05,
) -> Ranking:
    """Mean ranks with Friedman's test, Nemenyi's critical difference and its groups.

    Blocks must be independent of each other: different data sets. Folds or seeds of one data set
    are not, and make the difference look smaller than it is.

    Args:
        scores: (n, k) blocks by methods, n at least 2; a data frame brings its columns' names.
        names: of the methods.
        better: ``higher`` or ``lower``.
        alpha: chance that any of k equal methods is found different.

    Raises:
        ValueError: a score is not finite, or there are too few rows or columns.
    """
    names = _names(scores, names)
    mean = ranks(scores, better).mean(0)
    values = _scores(scores, rows=2)
    cd = critical_difference(len(names), len(values), alpha)
    alike = np.abs(mean[:, None] - mean) <= cd
    order = np.argsort(mean, kind="stable")
    return Ranking(
        {names[i]: float(mean[i]) for i in order},
        cd,
        tuple(tuple(names[i] for i in group) for group in groups(mean, alike)),
        friedman(values),
        len(values),
        alpha,
    )


@dataclass(frozen=True)
class Resampled:
    """Mean difference over overlapping training sets.

    Attributes:
        mean: of the differences.
        low, high: ends of its 95% interval.
        p: two-sided probability under no difference.
    """

    mean: float
    low: float
    high: float
    p: float


def resampled(differences: Any, ratio: float) -> Resampled:
    r"""Nadeau and Bengio's corrected t interval of paired differences over folds.

    The training sets of J folds (or repeated splits) overlap, so their differences are correlated
    and the usual interval is too narrow. The variance of the mean is taken as
    $\hat\sigma^2\left(\frac1J+\frac{n_{test}}{n_{train}}\right)$ in place of $\hat\sigma^2/J$.

    Args:
        differences: (J,) differences, J at least 2, one a fold of each repeat.
        ratio: rows tested divided by rows trained on; 1 / (folds - 1) in cross-validation.

    Reference:
        Nadeau and Bengio (2003), Inference for the generalization error, Machine Learning 52;
        Bouckaert and Frank (2004) for repeated cross-validation.
    """
    from scipy.stats import t

    d = np.asarray(checks.as_floats(differences, "differences", ndim=1), float)
    if len(d) < 2:
        raise ValueError(f"differences: expected at least 2, got {len(d)}")
    ratio = checks.positive(ratio, "ratio")
    mean = float(d.mean())
    error = math.sqrt(float(d.var(ddof=1)) * (1 / len(d) + ratio))
    if error <= 1e-12 * max(1e-300, float(np.abs(d).max())):
        return Resampled(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    half = float(t.ppf(0.975, len(d) - 1)) * error
    return Resampled(mean, mean - half, mean + half, float(2 * t.sf(abs(mean) / error, len(d) - 1)))
