"""Learning traces on real curves: classifiers of digits, taggers of code, small language models."""

import math
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import kendalltau
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.naive_bayes import BernoulliNB, GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier

from workbench import lab
from workbench.scaling_laws.experiments.learning_curve_taggers import TAGGERS, corpus
from workbench.scaling_laws.learning_curve_traces import (
    FIRST,
    Trace,
    learning_trace,
    prediction_level,
    stop_level,
    working_level,
)
from workbench.scaling_laws.power_profile import EXPONENTS

CLASSIFIERS = {
    "Gaussian naive Bayes": partial(GaussianNB, var_smoothing=1e-2),
    "Bernoulli naive Bayes": partial(BernoulliNB, binarize=0.3),
    "multinomial naive Bayes": MultinomialNB,
    "1-nearest neighbour": partial(KNeighborsClassifier, 1),
    "5-nearest neighbours": partial(KNeighborsClassifier, 5),
    "ridge": RidgeClassifier,
    "averaged support vectors": partial(
        SGDClassifier, average=True, max_iter=4, tol=None, random_state=0
    ),
    "logistic regression": partial(LogisticRegression, C=0.1, max_iter=1000, tol=1e-3),
}
"""Learners of the image data, with fixed settings."""

SOURCES = ("mnist5000", "digits", "stdlib")
TRAIN = {"mnist5000": 4000, "digits": 1280, "stdlib": 100_000}
TEST_TOKENS = 8_000
OPT_VOCABULARY = 50_272


def accuracy_curves(
    seed: int, source: str, levels: int = 40, share: float = 1.0
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sizes (levels,) and the accuracy in percent of every learner at each of them.

    A seed shuffles the data once: the first rows train (nested samples, equal steps), the last are
    the test set at every size. `share` takes that part of the training data.
    """
    step = int(TRAIN[source] * share) // levels
    sizes = step * np.arange(1, levels + 1)
    if source == "stdlib":
        text = corpus(seed, int(sizes[-1]), int(TEST_TOKENS * share))
        return sizes, {name: learner(text, sizes) for name, learner in TAGGERS.items()}
    data = lab.data.digits() if source == "digits" else lab.data.mnist5000()
    x = data.x if source == "digits" else data.x.reshape(-1, 14, 2, 14, 2).mean((2, 4))
    x, y = x.reshape(len(data), -1), data.y
    order = np.random.default_rng(seed).permutation(len(y))
    train, test = order[: sizes[-1]], order[TRAIN[source] :]

    def accuracy(learner: ClassifierMixin, size: int) -> float:
        part = train[:size]
        return 100 * learner.fit(x[part], y[part]).score(x[test], y[test])

    return sizes, {
        name: np.array([accuracy(make(), int(size)) for size in sizes])
        for name, make in CLASSIFIERS.items()
    }


def trace_study(
    seed: int,
    *,
    sources: tuple[str, ...] = SOURCES,
    levels: int = 40,
    share: float = 1.0,
    tolerance: float = 0.2,
    look: int = 5,
    tau: float = 1.0,
    rank_at: float = 0.4,
) -> dict:
    """Traces of all learners on all sources for one shuffle, and how well they forecast.

    Args:
        tolerance: how far the asymptote may move in one step, in points: the paper's setting is
            0.1 (2e-5 a word, steps of 5,000 words).
        tau: remaining gain at which training would stop, in points.
        rank_at: share of the sizes after which learners are ranked.

    Returns:
        Errors of forecasts for the full training set, in points, averaged over the curves that
        reach a prediction level, and know it, before the end (0 where none does): `at` at it,
        `before` on the levels before it (at the first level where there are none), `same` when the
        accuracy at that level is the forecast; `known` and `known_same` at the level at which it is
        known to be one (look + 1 after the working level); `after` and `after_anchored` on all
        later levels. `reached` and `reached_strict` (tolerance 0.1) count curves, `n_curves` all.
        `kept` is the share of stopped curves that gained at most tau afterwards, `saved` the share
        of the data they left; `kept_known` and `saved_known` when training stops no earlier than
        the level is known. `rank`, `rank_same`: Kendall's tau with the final ranking. Arrays:
        `sizes` (sources, levels), `curves` (curves, levels), `coef` and `coef_anchored` (curves,
        levels - 2, 3), `level` and `stop` of each curve.
    """
    sizes: list[np.ndarray] = []
    curves: list[np.ndarray] = []
    groups: list[int] = []
    for number, source in enumerate(sources):
        x, found = accuracy_curves(seed, source, levels, share)
        sizes.append(x)
        curves += found.values()
        groups += [number] * len(found)
    group, y = np.array(groups), np.stack(curves)
    x = np.stack(sizes)[group]
    # The step in place of the example as unit of x: nu / (1 - nu) is then points a step.
    step = x / x[:, :1]

    def rule(points: float) -> dict:
        return {"nu": points / (1 + points), "look": look}

    plain = learning_trace(step, y)
    steady = learning_trace(step, y, anchor=True, **rule(tolerance))
    level = prediction_level(plain, **rule(tolerance))
    known = np.maximum(level, working_level(plain, **rule(tolerance)) + look + 1)
    stop = stop_level(plain, tau, **rule(tolerance))
    final, rank_level = y[:, -1], round(rank_at * levels)
    errors, anchored = (np.abs(_at_full(t) - final[:, None]) for t in (plain, steady))
    same = np.abs(y - final[:, None])
    rows = np.flatnonzero((level > 0) & (known < levels))
    stopped = np.flatnonzero(stop)
    later = np.minimum(np.maximum(stop, known), levels)  # a stop that needs no hindsight
    taus = [
        [_kendall(guess[group == g], final[group == g]) for g in range(len(sources))]
        for guess in (_at_full(plain)[:, rank_level - FIRST], y[:, rank_level - 1])
    ]

    def mean(values: list[float]) -> float:
        return float(np.mean(values)) if values else 0.0

    return {
        "at": mean([errors[i, level[i] - FIRST] for i in rows]),
        "before": mean([errors[i, : max(1, level[i] - FIRST)].mean() for i in rows]),
        "same": mean([same[i, level[i] - 1] for i in rows]),
        "known": mean([errors[i, known[i] - FIRST] for i in rows]),
        "known_same": mean([same[i, known[i] - 1] for i in rows]),
        "after": mean([errors[i, level[i] - FIRST + 1 : -1].mean() for i in rows]),
        "after_anchored": mean([anchored[i, level[i] - FIRST + 1 : -1].mean() for i in rows]),
        "reached": len(rows),
        "reached_strict": int((prediction_level(plain, **rule(0.1)) > 0).sum()),
        "n_curves": len(y),
        "kept": mean([float(final[i] - y[i, stop[i] - 1] <= tau) for i in stopped]),
        "saved": mean([1 - stop[i] / levels for i in stopped]),
        "kept_known": mean([float(final[i] - y[i, later[i] - 1] <= tau) for i in stopped]),
        "saved_known": mean([1 - later[i] / levels for i in stopped]),
        "n_stopped": len(stopped),
        "rank": float(np.mean(taus[0])),
        "rank_same": float(np.mean(taus[1])),
        "sizes": np.stack(sizes),
        "curves": y,
        "coef": plain.coef,
        "coef_anchored": steady.coef,
        "level": level,
        "stop": stop,
    }


def learner_names(sources: tuple[str, ...] = SOURCES) -> list[tuple[str, str]]:
    """(source, learner) of the rows of `trace_study`'s arrays."""
    return [(s, name) for s in sources for name in (TAGGERS if s == "stdlib" else CLASSIFIERS)]


def stopped_curves(frame: pd.DataFrame) -> pd.DataFrame:
    """Curves that reached a stop level, in all rows of `trace_study`'s frame.

    Returns:
        Columns `stop`, the level, and `gain`, the points gained between it and the full set.
    """
    rows = [
        (int(stop), float(curve[-1] - curve[stop - 1]))
        for curves, stops in zip(frame["curves"], frame["stop"], strict=True)
        for curve, stop in zip(curves, stops, strict=True)
        if stop
    ]
    return pd.DataFrame(rows, columns=["stop", "gain"])


def loss_forecasts(
    frame: pd.DataFrame,
    run: Sequence[str] = ("N", "batch", "seed"),
    *,
    uniform: float = math.log(256),
    share: float = 1 / 3,
) -> pd.DataFrame:
    """End of training forecast from its first part, for every run of a table.

    Accuracy is the share of a uniform code that the model saves, 100 (1 - loss / `uniform`): it
    grows, and cannot exceed 100.

    Args:
        frame: columns `tokens` and `loss`, one row a checkpoint.
        run: columns that tell runs apart.
        uniform: loss of a model that knows nothing, log of the vocabulary, in the loss's unit.
        share: part of the run's tokens that is seen.

    Returns:
        One row a run: its settings, the final loss `final`, `forecast` by the trace's last level
        before `share`, `same` (the loss there), `log` (a straight line in log tokens through the
        same losses), their absolute errors `error`, `error_same` and `error_log`, the exponent `b`
        and the `ceiling` in percent.
    """
    rows = []
    for setting, part in frame.sort_values("tokens").groupby(list(run)):
        tokens, loss = part.tokens.to_numpy(float), part.loss.to_numpy(float)
        seen = tokens <= share * tokens[-1]
        trace = learning_trace(tokens[seen], 100 * (1 - loss[seen] / uniform))
        forecast = uniform * (1 - trace.predict(tokens[-1])[-1] / 100)
        here, final = loss[seen][-1], loss[-1]
        line = np.polynomial.Polynomial.fit(np.log(tokens[seen]), loss[seen], 1)(np.log(tokens[-1]))
        rows.append(
            dict(zip(run, setting, strict=True))
            | {"final": final, "forecast": forecast, "same": here, "log": line}
            | {"error": abs(forecast - final), "error_same": abs(here - final)}
            | {"error_log": abs(line - final)}
            | {"b": trace.coef[-1, 1], "ceiling": trace.asymptote[-1]}
        )
    return pd.DataFrame(rows)


def released_opt(folder: Path) -> pd.DataFrame:
    """Validation losses along the training of six OPT models, from the "hitchhikers" tables.

    Returns:
        Columns `size`, `tokens`, `loss` (nats a token).
    """
    table = pd.read_csv(folder / "aggregated_eval" / "opt_trajectories.csv")
    found = pd.DataFrame(
        {"size": table.model_size, "tokens": 10.0**table.num_token, "loss": np.log(table.ppl)}
    )
    return found.dropna().drop_duplicates(["size", "tokens"]).reset_index(drop=True)


def loop_trace(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same trace by a loop over `curve_fit(method="trf")`: coef (n-2, 3) and sse (n-2,).

    The same bounds, sizes scaled by their geometric mean, the analytic Jacobian, and each level
    started at the one before it: the loop is given what it needs to be fast.
    """
    origin = np.exp(np.log(x).mean())
    u, (low, high) = x / origin, EXPONENTS
    start = np.array([max(y[FIRST - 1] - y[0], 1e-3), 0.5, max(y[FIRST - 1], 1e-3)])
    coef, sse = np.empty((len(x) - 2, 3)), np.empty(len(x) - 2)
    with warnings.catch_warnings():
        # Three points and three parameters leave no covariance to estimate.
        warnings.simplefilter("ignore", OptimizeWarning)
        for level in range(FIRST, len(x) + 1):
            found, _, info, *_ = curve_fit(
                _power, u[:level], y[:level], p0=start, jac=_power_slope, method="trf",
                bounds=([0, low, 0], [np.inf, high, np.inf]), max_nfev=10_000, full_output=True,
            )  # fmt: skip
            coef[level - FIRST] = found * [origin ** found[1], 1, 1]
            sse[level - FIRST] = (info["fvec"] ** 2).sum()
            start = np.clip(found, [1e-9, low * 1.01, 1e-9], [np.inf, high * 0.99, np.inf])
    return coef, sse


def _power(u: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    return c - a * u**-b


def _power_slope(u: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    power = u**-b
    return np.stack([-power, a * power * np.log(u), np.ones_like(u)], axis=1)


def _at_full(trace: Trace) -> np.ndarray:
    """Every level's forecast at the last size, (m, n-2)."""
    a, b, c = (trace.coef[..., j] for j in range(3))
    return c - a * trace.x[:, -1:] ** -b


def _kendall(guess: np.ndarray, truth: np.ndarray) -> float:
    found = float(kendalltau(guess, truth).statistic)
    return found if math.isfinite(found) else 0.0
