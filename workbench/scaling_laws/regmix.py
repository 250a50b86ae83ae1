r"""Choose a data mixture by regression: many tiny models, one regression, one simulation.

1. Draw mixtures $w$ of $k$ domains around their shares of tokens (`sample_mixtures`).
2. Train a tiny proxy model on each and note a held-out loss $\ell$ (`mixture_proxies`, or your own
   table of runs).
3. Regress the loss on the mixture (`fit_mixture`): a linear model, whose coefficients are the
   losses of pure domains, or boosted trees, which see that domains substitute for one another.
4. Simulate mixtures, predict, and average the best (`best_mixture`):
   $$w^* = \frac1{|T|}\sum_{w \in T} w,\qquad
     T = \text{the 128 lowest } \hat\ell(w),\quad w \sim \mathrm{Dirichlet}(p).$$

Only the *order* of mixtures has to carry over from small to large models ("rank invariance"), so
the measure of quality is Spearman's correlation of predicted and true loss (`score`).

Reference: Liu, Zheng, Muennighoff, Zeng, Dou, Pang, Jiang and Lin (2024), "RegMix: Data Mixture as
Regression for Language Model Pre-training", arXiv 2407.01492.

*Departures of the released code*: it stops the boosting early on the very mixtures on which it
reports the correlation; here ``stop`` is a set of its own and off by default. It calls the shares
of tokens "human"; the Pile's own weights are a different mixture. The released table of mixtures is
less concentrated (median of the largest weight 0.50) than what the released sampler draws (0.64, as
does `sample_mixtures`); it is closer to strengths from 1 to 5.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression

from workbench.lab import checks
from workbench.scaling_laws.table import FitWarning

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Table: TypeAlias = "pd.DataFrame | Array"
MODELS = ("lightgbm", "trees", "linear")
EXTRA = "paper-workbench[scaling-laws]"
_POOR = (
    "mixtures: {n} rows cannot be split into leaves of {leaf}: every prediction would be the mean; "
    "train more proxies, lower leaf or choose model='linear'"
)


# --- mixtures ------------------------------------------------------------------------------------


def sample_mixtures(
    prior: pd.Series | Mapping[str, float] | Array,
    n: int = 512,
    *,
    temperature: float = 0.5,
    strength: tuple[float, float] = (0.1, 5.0),
    epochs: float = 15.0,
    floor: float = 2e-4,
    oversample: int = 100,
    random_state: np.random.Generator | int | None = 0,
) -> pd.DataFrame:
    r"""Different mixtures to train proxies on, from nearly pure to nearly the shares of tokens.

    $w \sim \mathrm{Dirichlet}(s\,q)$ with $q_i \propto p_i^{\tau}$ and $s$ one of 15 strengths
    evenly spaced in their logarithm; mixtures that use a domain too often are rejected, tiny
    weights set to zero, the rest rounded to multiples of ``floor``, repetitions dropped.

    Args:
        prior: (k,) positive shares of tokens; normalised here.
        n: mixtures wanted.
        temperature: exponent of the prior; below 1 small domains are drawn more often.
        strength: lowest and highest ``s``; low ones give nearly pure mixtures.
        epochs: how many times the share of a domain its weight may be, ``w <= epochs * p``.
        floor: smallest weight that is kept; 0 keeps all, unrounded.
        oversample: mixtures drawn for each one wanted; the result is a random subset.
        random_state: seed or generator.

    Returns:
        Frame (n, k); rows sum to 1.

    Raises:
        ValueError: an argument is out of range, or fewer than ``n`` mixtures satisfy the limits.

    Reference: Liu et al. (2024), arXiv 2407.01492, section 3.1 and the released sampler.
    """
    shares = _shares(prior)
    n, oversample = checks.count(n, "n"), checks.count(oversample, "oversample")
    low, high = (checks.positive(s, "strength") for s in strength)
    floor = checks.fraction(floor, "floor", one=False)
    rng = checks.as_rng(random_state)
    tempered = shares.to_numpy() ** checks.positive(temperature, "temperature")
    tempered /= tempered.sum()
    strengths = rng.choice(np.geomspace(low, high, 15), size=(n * oversample, 1))
    drawn = _dirichlet(strengths * tempered, rng)
    drawn = drawn[(drawn <= checks.positive(epochs, "epochs") * shares.to_numpy()).all(1)]
    if floor:
        drawn = np.where(drawn < floor, 0.0, drawn)
        drawn = np.round(drawn / drawn.sum(1, keepdims=True) / floor)
    drawn = np.unique(drawn, axis=0)
    if len(drawn) < n:
        raise ValueError(
            f"n: only {len(drawn)} of {n} mixtures satisfy the limits; raise epochs or oversample"
        )
    chosen = drawn[rng.choice(len(drawn), n, replace=False)]
    return pd.DataFrame(chosen / chosen.sum(1, keepdims=True), columns=shares.index)


def simulate(
    prior: pd.Series | Mapping[str, float] | Array,
    n: int = 100_000,
    *,
    strength: float = 1.0,
    random_state: np.random.Generator | int | None = 0,
) -> pd.DataFrame:
    """Candidates for the search, $w \\sim \\mathrm{Dirichlet}(s\\,p)$: frame (n, k)."""
    shares = _shares(prior)
    scale = checks.positive(strength, "strength") * shares.to_numpy()
    drawn = _dirichlet(np.tile(scale, (checks.count(n, "n"), 1)), checks.as_rng(random_state))
    return pd.DataFrame(drawn, columns=shares.index)


# --- regression ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixtureFit:
    """Losses as functions of the mixture; made by `fit_mixture`.

    Attributes:
        model: which regression.
        domains: columns of the mixtures, in their order.
        targets: columns of the losses.
        regressors: the fitted regression of each target.
        n: mixtures it was fitted to.
    """

    model: str
    domains: tuple[str, ...]
    targets: tuple[str, ...]
    regressors: dict[str, Any] = field(repr=False)
    n: int

    def predict(self, mixtures: Table | pd.Series) -> pd.DataFrame:
        """Predicted losses (n, targets) of mixtures; columns of a frame are matched by name."""
        if isinstance(mixtures, pd.Series):
            mixtures = mixtures.to_frame().T
        if isinstance(mixtures, pd.DataFrame):
            if missing := [d for d in self.domains if d not in mixtures]:
                raise ValueError(f"mixtures: no column {missing[0]!r}; the fit has that domain")
            mixtures = mixtures[list(self.domains)]
        weights = _mixtures(mixtures)
        if weights.shape[1] != len(self.domains):
            raise ValueError(
                f"mixtures: {weights.shape[1]} columns; the fit has {len(self.domains)} domains"
            )
        values = weights.to_numpy()
        found = {name: reg.predict(values) for name, reg in self.regressors.items()}
        return pd.DataFrame(found, index=weights.index)

    def score(self, mixtures: Table, losses: Table | pd.Series) -> pd.DataFrame:
        """`score` of the predictions for mixtures whose losses are known."""
        measured = _losses(losses, None)
        known = [name for name in self.targets if name in measured]
        if not known:
            raise ValueError(f"losses: none of the columns {list(self.targets)}")
        return score(self.predict(mixtures)[known], measured[known])

    @property
    def pure(self) -> pd.DataFrame:
        """Predicted loss of each domain alone (k, targets); extrapolates unless they were seen."""
        return self.predict(pd.DataFrame(np.eye(len(self.domains)), self.domains, self.domains))


def fit_mixture(
    mixtures: Table,
    losses: Table | pd.Series,
    model: str = "lightgbm",
    *,
    stop: tuple[Table, Table | pd.Series] | None = None,
    rounds: int = 1000,
    learning_rate: float = 0.01,
    patience: int = 3,
    leaf: int = 20,
    random_state: int = 42,
) -> MixtureFit:
    """Regress held-out losses on mixtures, one regression per target.

    Args:
        mixtures: (n, k) weights; rows sum to 1 (within the rounding of a published table, 0.01).
        losses: (n,) or (n, targets) held-out losses of the models trained on them. Of two frames
            with the same labels in another order the rows are matched by label.
        model: "lightgbm" (the paper's; optional dependency), "trees" (scikit-learn's histogram
            boosting with the same settings) or "linear" (least squares with intercept).
        stop: mixtures and losses on which LightGBM stops early; keep them out of the evaluation.
        rounds: trees.
        learning_rate: of the boosting.
        patience: rounds without improvement before it stops.
        leaf: least number of mixtures in a leaf.
        random_state: of the boosting.

    Returns:
        The fit; see `MixtureFit`.

    Raises:
        ValueError: weights or losses are not usable, or there are too few mixtures.
        ImportError: LightGBM is wanted and not installed.

    Reference: Liu et al. (2024), arXiv 2407.01492, section 3.2.
    """
    weights = _mixtures(mixtures)
    table = _losses(losses, weights)
    checks.one_of(model, MODELS, "model")
    _enough(weights, model, leaf)
    if stop is not None and model != "lightgbm":
        raise ValueError(f"stop: only LightGBM stops early, not {model!r}")
    held = None
    if stop is not None:
        other = _mixtures(stop[0])
        held = other.to_numpy(), _losses(stop[1], other)[list(table)]
    x = weights.to_numpy()
    regressors: dict[str, Any] = {}
    for name in map(str, table):
        y = table[name].to_numpy()
        if model == "lightgbm":
            library = _lightgbm()
            regressor = library.LGBMRegressor(
                n_estimators=rounds, learning_rate=learning_rate, min_child_samples=leaf,
                random_state=random_state, n_jobs=1, verbosity=-1,
            )  # fmt: skip
            watch: dict[str, Any] = {}
            if held is not None:
                watch = {
                    "eval_X": (held[0],),
                    "eval_y": (held[1][name].to_numpy(),),
                    "callbacks": [library.early_stopping(patience, verbose=False)],
                }
            regressors[name] = regressor.fit(x, y, **watch).booster_
        elif model == "trees":
            regressors[name] = HistGradientBoostingRegressor(
                max_iter=rounds, learning_rate=learning_rate, min_samples_leaf=leaf,
                early_stopping=False, random_state=random_state,
            ).fit(x, y)  # fmt: skip
        else:
            regressors[name] = LinearRegression().fit(x, y)
        flat = np.ptp(regressors[name].predict(x)) == 0
        if model != "linear" and flat and np.ptp(y) > 0:
            raise ValueError(_POOR.format(n=len(x), leaf=leaf))
    return MixtureFit(model, tuple(map(str, weights)), tuple(regressors), regressors, len(weights))


def score(predicted: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """How well predicted losses order mixtures.

    Args:
        predicted: (n, targets); rows in the order of ``measured``.
        measured: (n, targets) true losses, at whatever model size.

    Returns:
        Row per target: ``rho`` (Spearman), ``regret`` (loss of the mixture predicted best above the
        lowest one), ``spread`` (highest minus lowest loss), ``n``.
    """
    checks.same_length(predicted=predicted, measured=measured)
    rows = {}
    for name in predicted:
        guess, truth = predicted[name].to_numpy(), measured[name].to_numpy()
        flat = np.ptp(guess) == 0 or np.ptp(truth) == 0
        rows[name] = {
            "rho": 0.0 if flat else float(spearmanr(guess, truth).statistic),
            "regret": float(truth[guess.argmin()] - truth.min()),
            "spread": float(np.ptp(truth)),
            "n": len(truth),
        }
    return pd.DataFrame(rows).T.astype({"n": int})


# --- choice --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A mixture to train the large model on.

    Attributes:
        mixture: (k,) weights, the average of the best.
        predicted: predicted loss of that average.
        best: (top, k) the mixtures averaged, best first.
        losses: (top,) their predicted losses.
    """

    mixture: pd.Series
    predicted: float
    best: pd.DataFrame = field(repr=False)
    losses: Array = field(repr=False)


def best_mixture(
    fit: MixtureFit,
    candidates: Table,
    *,
    target: str | Mapping[str, float] | None = None,
    top: int = 128,
) -> Choice:
    """Average of the candidates with the lowest predicted loss.

    The single best candidate is the one whose error flatters it most; the average over the top
    cancels that.

    Args:
        fit: of `fit_mixture`.
        candidates: (n, k) mixtures, usually ``simulate(prior)``.
        target: which loss, or weights of several; by default the mean of all.
        top: how many are averaged.

    Raises:
        ValueError: a target is unknown, or there are fewer candidates than ``top``.

    Reference: Liu et al. (2024), arXiv 2407.01492, section 3.3.
    """
    parts: Mapping[str, float] = (
        {name: 1 / len(fit.targets) for name in fit.targets}
        if target is None
        else {target: 1.0}
        if isinstance(target, str)
        else target
    )
    for name in parts:
        checks.one_of(name, fit.targets, "target")
    part = MixtureFit(
        fit.model, fit.domains, tuple(parts), {q: fit.regressors[q] for q in parts}, fit.n
    )
    share = pd.Series(dict(parts), dtype=float)
    frame = _mixtures(candidates, fit.domains)
    loss = (part.predict(frame) @ share).to_numpy()
    if checks.count(top, "top") > len(loss):
        raise ValueError(f"top: {top} of {len(loss)} candidates")
    order = np.argsort(loss, kind="stable")[:top]
    best = frame.iloc[order][list(fit.domains)]
    mean = best.mean()
    return Choice(mean, float((part.predict(mean) @ share).iloc[0]), best, loss[order])


# --- checks --------------------------------------------------------------------------------------


def _lightgbm() -> Any:
    try:
        return importlib.import_module("lightgbm")
    except ImportError as error:
        raise ImportError(
            f"model 'lightgbm' needs LightGBM: pip install '{EXTRA}' (or choose model='trees')"
        ) from error


def _dirichlet(alpha: Array, rng: np.random.Generator) -> Array:
    """Rows from Dirichlet(alpha), through logarithms: tiny alpha must not end in 0/0."""
    logs = np.log(rng.standard_gamma(alpha + 1)) + np.log1p(-rng.random(alpha.shape)) / alpha
    weights = np.exp(logs - logs.max(1, keepdims=True))
    return np.asarray(weights / weights.sum(1, keepdims=True))


def _shares(prior: Any) -> pd.Series:
    named = isinstance(prior, (pd.Series, Mapping))
    series = pd.Series(prior, dtype=float) if named else pd.Series(np.asarray(prior, float))
    if not named:
        series.index = [f"domain_{i}" for i in range(len(series))]
    values = checks.as_floats(series.to_numpy(), "prior", ndim=1)
    if len(values) < 2 or not (values > 0).all():
        raise ValueError("prior: expected at least two domains with positive shares")
    return series / values.sum()


def _mixtures(mixtures: Any, domains: tuple[str, ...] | None = None) -> pd.DataFrame:
    values = checks.as_floats(mixtures, "mixtures", ndim=2)
    values = np.asarray(values, float)
    if isinstance(mixtures, pd.DataFrame):
        frame = mixtures.astype(float)
        if not frame.columns.is_unique:
            raise ValueError("mixtures: two columns share a name")
    else:
        names = domains or tuple(f"domain_{i}" for i in range(values.shape[1]))
        frame = pd.DataFrame(values, columns=list(names))
    for name in frame:
        if (frame[name] < 0).any():
            raise ValueError(f"mixtures: column {name!r} holds a negative weight")
    sums = values.sum(1)
    worst = int(np.abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > 0.01:
        hint = "; give shares, not per cent" if abs(sums[worst] - 100) < 1 else ""
        raise ValueError(
            f"mixtures: row {worst} sums to {sums[worst]:.4g}; expected 1{hint} (leave out columns "
            "that are no weights, such as an index)"
        )
    return frame


def _losses(losses: Any, mixtures: pd.DataFrame | None) -> pd.DataFrame:
    if isinstance(losses, pd.Series):
        losses = losses.to_frame(losses.name or "loss")
    if not isinstance(losses, pd.DataFrame):
        values = np.asarray(checks.as_floats(losses, "losses", ndim=(1, 2)), float)
        values = values.reshape(len(values), -1)
        names = [f"loss_{i}" for i in range(values.shape[1])] if values.shape[1] > 1 else ["loss"]
        losses = pd.DataFrame(values, columns=names)
        if mixtures is not None and len(losses) == len(mixtures):
            losses.index = mixtures.index
    for name in losses:
        if not np.isfinite(losses[name].to_numpy(float)).all():
            raise ValueError(f"losses: column {name!r} holds NaN or infinity; drop those runs")
    if mixtures is None:
        return losses
    checks.same_length(mixtures=mixtures, losses=losses)
    if not losses.index.equals(mixtures.index):
        if set(losses.index) != set(mixtures.index) or not losses.index.is_unique:
            raise ValueError("losses: its row labels are not those of the mixtures; align the two")
        losses = losses.loc[mixtures.index]
    return losses


def _enough(weights: pd.DataFrame, model: str, leaf: int) -> None:
    n, k = weights.shape
    if model == "linear" and n <= k:
        raise ValueError(f"mixtures: {n} rows for {k} domains; linear regression needs more")
    if model != "linear" and n < 2 * checks.count(leaf, "leaf"):
        raise ValueError(_POOR.format(n=n, leaf=leaf))
    fixed = [name for name in weights if np.ptp(weights[name]) == 0]
    if fixed:
        warnings.warn(
            f"mixtures: the weight of {fixed[0]!r} never changes; nothing is learnt about it",
            FitWarning,
            stacklevel=3,
        )
