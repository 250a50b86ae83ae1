r"""How to estimate a scaling law, and how wrong its forecast is.

A family of models, each trained once, leaves a table of losses $L$ at sizes $N$ and tokens $D$. The
law $\hat L = E + A N^{-\alpha} + B D^{-\beta}$ is fitted to the smaller models and asked for the
end of the largest one's training. Its forecast is scored by the absolute relative error

$$\mathrm{ARE} = \frac{1}{n} \sum_{i=1}^n \frac{|\hat L_i - L_i|}{L_i}$$

over the target's checkpoints after 70% of its run. What a protocol may choose: how many models,
how much of each run, from where on its checkpoints count (the first part of a run is left out), or
only the last of them. `are_grid` fits all these subsets of one table in one batch, as 0/1 weights.

Three sizes are the least from which $A$, $\alpha$ and $E$ can be told apart. With fewer, some
parameters must come from elsewhere: from another family (`borrow`), from the principal components
of the parameters of other families (`component_law`), or, without saying so, from the starting
point of the fit. Fits of the last kind are marked ``identified = False``.

How the most quoted fit came to stop early is in `early_stops`.

References: Choshen, Zhang and Andreas (2024), "A Hitchhiker's Guide to Scaling Law Estimation",
arXiv 2410.11840; Besiroglu, Erdil, Barnett and You (2024), "Chinchilla Scaling: A replication
attempt", arXiv 2404.10102; Hoffmann et al. (2022), arXiv 2203.15556, approach 3.

*Not included*: downstream accuracies instead of losses, and the paper's multiplicative law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.lab import checks
from workbench.scaling_laws.law import TermLaw
from workbench.scaling_laws.laws import LAWS
from workbench.scaling_laws.optimum import compute_optimal
from workbench.scaling_laws.solve import OBJECTIVES, Objective, solve
from workbench.scaling_laws.table import prepare

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

LAW = LAWS["chinchilla"]
NAMES = LAW.parameters  # A, B, E, alpha, beta
FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
EXPONENTS = (0.35, 0.15)  # of the starting points, the first is preferred
STEEPEST = 3.0  # exponents lie between 0 and this: a steeper term is gone after the first row
LEAST = 1e-6  # E is at least this part of the lowest loss: no forecast can tell it from zero
STEPS = 300  # of any fit: where parameters are confounded, more only move along the valley
PREFER = 1e-3  # another start must lead this much lower, relatively, to be taken instead


def are(predicted: ArrayLike, observed: ArrayLike) -> float:
    r"""Absolute relative error, $\mathrm{mean}\,|\hat L - L| / L$.

    Args:
        predicted: (n,) losses.
        observed: (n,) losses, above zero.

    Returns:
        A share: 0.04 is 4%.

    Raises:
        ValueError: the lengths differ, or an observed loss is not positive.

    Reference: Choshen et al. (2024), arXiv 2410.11840, section 4.
    """
    p = checks.to_numpy(checks.as_floats(predicted, "predicted", ndim=1))
    o = checks.to_numpy(checks.as_floats(observed, "observed", ndim=1))
    checks.same_length(predicted=p, observed=o)
    if not (o > 0).all():
        raise ValueError("observed: expected losses above zero")
    return float(np.mean(np.abs(p / o - 1)))


@dataclass(frozen=True)
class Protocol:
    """Which rows a fit sees, and how it is fitted.

    Args:
        cut: the part of each run that is left out at its beginning, in [0, 1).
        final_only: only the last checkpoint of each run (within the fraction used).
        objective: "lsq" (squared error of the loss, the paper's), "lsq_log" or "huber_log".
        delta: threshold of Huber's function.
        fixed: natural parameters held at a value, such as `borrow` gives.
        which: from which end the models are taken: "smallest" (the paper's code), or "largest",
            those next to the target.
        test_from: the target's checkpoints after this part of its run are forecast.
    """

    cut: float = 0.1
    final_only: bool = False
    objective: Objective = "lsq"
    delta: float = 1e-3
    fixed: Mapping[str, float] = field(default_factory=dict)
    which: Literal["smallest", "largest"] = "smallest"
    test_from: float = 0.7

    def __post_init__(self) -> None:
        checks.fraction(self.cut, "cut", one=False)
        checks.fraction(self.test_from, "test_from", one=False)
        checks.one_of(self.objective, OBJECTIVES, "objective")
        checks.one_of(self.which, ("smallest", "largest"), "which")
        checks.positive(self.delta, "delta")
        for name, value in self.fixed.items():
            checks.one_of(name, NAMES, "fixed")
            checks.positive(value, name, zero=name in ("alpha", "beta"))
        if len(self.fixed) == len(NAMES):
            raise ValueError("fixed: every parameter is held; nothing is left to fit")


@dataclass(frozen=True)
class Estimate:
    """A fitted law and its forecast of the target.

    Attributes:
        are: of the forecast.
        params: A, B, E, alpha, beta.
        identified: whether the rows of the fit can tell its free parameters apart.
        train: rows of the fit (model, N, D, loss).
        forecast: the target's rows, with ``predicted``.
    """

    are: float
    params: dict[str, float]
    identified: bool
    train: pd.DataFrame
    forecast: pd.DataFrame

    def predict(self, N: ArrayLike, D: ArrayLike) -> np.ndarray:
        """Losses at sizes N and tokens D."""
        return predict(self.params, N, D)


def predict(params: Mapping[str, float], N: ArrayLike, D: ArrayLike) -> np.ndarray:
    """The law's loss at sizes N and tokens D, for natural parameters."""
    A, B, E, alpha, beta = (params[q] for q in NAMES)
    size, tokens = np.asarray(N, float), np.asarray(D, float)
    return E + A * size**-alpha + B * tokens**-beta


def estimate(
    runs: pd.DataFrame,
    target: object = None,
    *,
    n_models: int | None = None,
    fraction: float = 1.0,
    columns: Mapping[str, str] | None = None,
    **protocol: Any,
) -> Estimate:
    """Fit the law to smaller models of a family and forecast the end of the target's training.

    Args:
        runs: a row a checkpoint: ``model`` (else its size names it), ``N``, ``D``, ``loss``.
        target: name of the model to forecast; default the largest.
        n_models: how many of the smaller models are used (default all).
        fraction: the part of each run that is used, in (0, 1].
        columns: your names, ``{"N": "params", "D": "tokens", "loss": "val", "model": "run"}``.
        **protocol: fields of `Protocol`.

    Raises:
        ValueError: a column is missing or not positive, there is no such target, no smaller model,
            or no row left to fit.

    Reference: Choshen et al. (2024), arXiv 2410.11840, section 4.
    """
    table, name, smaller = _family(runs, target, columns)
    k = len(smaller) if n_models is None else checks.count(n_models, "n_models")
    rules = Protocol(**protocol)
    found, masks = _grid(table, name, smaller, [k], [fraction], rules)
    row = found.iloc[0]
    params = {q: float(row[q]) for q in NAMES}
    ahead = _test_rows(table, name, rules)
    forecast = ahead.assign(predicted=predict(params, ahead.N, ahead.D))
    return Estimate(float(row["are"]), params, bool(row.identified), table[masks[0]], forecast)


def are_grid(
    runs: pd.DataFrame,
    target: object = None,
    *,
    models: Sequence[int] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    columns: Mapping[str, str] | None = None,
    **protocol: Any,
) -> pd.DataFrame:
    """ARE over number of models and fraction of training, all fits in one batch.

    Args:
        runs: a row a checkpoint: ``model`` (else its size names it), ``N``, ``D``, ``loss``.
        target: name of the model to forecast; default the largest.
        models: numbers of smaller models; default 2 up to all (1 where there is only one).
        fractions: parts of each run that are used, in (0, 1].
        columns: your names of the columns.
        **protocol: fields of `Protocol`.

    Returns:
        A row a cell: ``models``, ``fraction``, ``are``, ``rows`` of the fit, ``sizes`` in it,
        ``identified``, ``compute`` (training FLOP of the fit's runs as a share of the target's),
        ``objective``, and the parameters.

    Raises:
        ValueError: as for `estimate`.

    Reference: Choshen et al. (2024), arXiv 2410.11840, section 5.
    """
    table, name, smaller = _family(runs, target, columns)
    ks = list(models) if models is not None else list(range(min(2, len(smaller)), len(smaller) + 1))
    return _grid(table, name, smaller, ks, fractions, Protocol(**protocol))[0]


def borrow(
    params: Mapping[str, float], keep: Sequence[str] = ("A", "alpha"), *, unit: float = 1.0
) -> dict[str, float]:
    r"""Parameters of another family's law, to be held in a fit (``fixed=``).

    Args:
        params: the other family's A, B, E, alpha, beta.
        keep: which of them; the paper keeps the term of size, $A N^{-\alpha}$.
        unit: your unit of loss in theirs: losses multiplied by it multiply A, B and E.

    Raises:
        ValueError: a name is unknown or missing, or all five would be held.

    Reference: Choshen et al. (2024), arXiv 2410.11840, section 7 (one model).
    """
    checks.positive(unit, "unit")
    if len(set(keep)) >= len(NAMES):
        raise ValueError("keep: every parameter would be held; nothing is left to fit")
    for name in keep:
        checks.one_of(name, NAMES, "keep")
        checks.one_of(name, params, "params")
    return {q: float(params[q]) * (unit if q in ("A", "B", "E") else 1.0) for q in keep}


def compute_plan(params: Mapping[str, float], budget: float) -> tuple[float, float]:
    r"""Size and tokens of lowest loss for a budget of $C = 6 N D$ training FLOP.

    $N^* = G (C/6)^{\beta/(\alpha+\beta)}$ with $G = (\alpha A / \beta B)^{1/(\alpha+\beta)}$.

    Args:
        params: A, B, E, alpha, beta.
        budget: C, in FLOP.

    Returns:
        N and D.

    Reference: Hoffmann et al. (2022), arXiv 2203.15556, equation 4.
    """
    theta = LAW.internal({q: params[q] for q in NAMES})[None]
    at = torch.tensor([checks.positive(budget, "budget")], dtype=torch.float64)
    N, D, _ = compute_optimal(LAW, theta, at, {})
    return float(N), float(D)


def component_law(params: pd.DataFrame, k: int = 3) -> TermLaw:
    r"""The law along the first k principal components of other families' parameters.

    With $\theta = (\ln A, \ln B, \ln E, \alpha, \beta)$ of m families, their mean $\bar\theta$ and
    the k directions $V$ in which they differ most, the law has $\theta = \bar\theta + V z$ with
    free $z$. Fit it with `fit_law(..., fixed={"mean": 1.0})`.

    Args:
        params: a row a family with columns A, B, E, alpha, beta; losses in one unit.
        k: number of components, below 5 and below the number of families.

    Returns:
        A law of N and D with parameters ``mean`` (hold it at 1), ``z1`` ... ``zk``.

    Raises:
        ValueError: there are too few families, or k is not in 1 ... 4.

    Reference: Choshen et al. (2024), arXiv 2410.11840, section 8 (three components).
    """
    checks.count(k, "k")
    theta = np.array([LAW.internal({q: row[q] for q in NAMES}).numpy()
                      for _, row in params.iterrows()])  # fmt: skip
    if k >= len(NAMES) or k >= len(theta):
        raise ValueError(f"k: expected fewer than 5 and than the {len(theta)} families, got {k}")
    mean = theta.mean(0)
    directions = np.linalg.svd(theta - mean, full_matrices=False)[2][:k]
    basis = torch.tensor(np.vstack([mean, directions])).T  # (5, 1 + k)
    terms = LAW
    assert isinstance(terms, TermLaw)
    names = ("mean", *(f"z{j + 1}" for j in range(k)))
    return TermLaw(
        "components", ("N", "D"), names, (False,) * (k + 1),
        {"mean": (1.0,), **dict.fromkeys(names[1:], (-0.5, 0.5))},
        r"L(N, D) = E + A N^{-\alpha} + B D^{-\beta},\; \theta = \bar\theta + V z", ("N", "D"),
        features=lambda N, D: terms.features(N, D) @ basis.to(N),
    )  # fmt: skip


# --- one batch of subsets -----------------------------------------------------------------------


def _family(
    runs: pd.DataFrame, target: object, columns: Mapping[str, str] | None
) -> tuple[pd.DataFrame, Any, list[Any]]:
    """Checked rows with ``model``; the target's name; names of smaller models, smallest first."""
    named = {q: c for q, c in (columns or {}).items() if q != "model"}
    table = prepare(runs, LAW, named).frame
    label = (columns or {}).get("model", "model")
    if columns and "model" in columns and label not in runs.columns:
        raise ValueError(f"model: the frame has no column {label!r}")
    table["model"] = runs.loc[table.index, label] if label in runs.columns else table.N
    table = table.reset_index(drop=True)
    sizes = table.groupby("model").N.max().sort_values(kind="stable")
    name: Any = sizes.index[-1] if target is None else target
    if name not in sizes.index:
        raise ValueError(f"target: no model {name!r}; there are {', '.join(map(str, sizes.index))}")
    smaller = list(sizes.index[sizes < sizes[name]])
    if not smaller:
        raise ValueError(f"target: no model is smaller than {name!r}")
    return table, name, smaller


def _test_rows(table: pd.DataFrame, target: object, rules: Protocol) -> pd.DataFrame:
    own = table[table.model == target]
    return own[own["D"] >= rules.test_from * own["D"].max()]


def _train_mask(
    table: pd.DataFrame, chosen: Sequence[object], fraction: float, rules: Protocol
) -> np.ndarray:
    checks.fraction(fraction, "fraction", zero=False)
    end = table.groupby("model").D.transform("max")
    part = table.D / end
    kept = table.model.isin(chosen) & (part <= fraction * (1 + 1e-9))
    if rules.final_only:
        last = table.D.where(kept).groupby(table.model).transform("max")
        return (kept & (table["D"] == last)).to_numpy()
    return (kept & (part > rules.cut)).to_numpy()


def _identified(rows: pd.DataFrame, fixed: Mapping[str, float]) -> bool:
    """By counting: free terms against distinct points, sizes and amounts of tokens."""
    free = len(NAMES) - len(fixed)
    by_size = 1 + sum(q not in fixed for q in ("A", "alpha"))
    by_tokens = 1 + sum(q not in fixed for q in ("B", "beta"))
    points = len(rows[["N", "D"]].drop_duplicates())
    return points >= free and rows.N.nunique() >= by_size and rows.D.nunique() >= by_tokens


def _grid(
    table: pd.DataFrame,
    target: Any,
    smaller: list[Any],
    models: Sequence[int],
    fractions: Sequence[float],
    rules: Protocol,
) -> tuple[pd.DataFrame, np.ndarray]:
    ahead = _test_rows(table, target, rules)
    flop = 6 * table.groupby("model").N.max() * table.groupby("model").D.max()
    rows, masks = [], []
    for k in models:
        if checks.count(k, "models") > len(smaller):
            raise ValueError(f"models: expected at most {len(smaller)} smaller models, got {k}")
        chosen = smaller[:k] if rules.which == "smallest" else smaller[-k:]
        for fraction in fractions:
            mask = _train_mask(table, chosen, fraction, rules)
            if not mask.any():
                raise ValueError(f"fraction: no checkpoint between {rules.cut:g} and {fraction:g}")
            used = table[mask]
            masks.append(mask)
            rows.append(
                {
                    "models": k,
                    "fraction": fraction,
                    "rows": len(used),
                    "sizes": used.N.nunique(),
                    "identified": _identified(used, rules.fixed),
                    "compute": float(fraction * flop[chosen].sum() / flop[target]),
                }
            )
    weights = np.array(masks)
    theta, value = _fit(table, weights, rules)
    natural = LAW.natural(theta).numpy()
    inputs = {q: torch.tensor(ahead[q].to_numpy(float)) for q in LAW.inputs}
    predicted = LAW.loss(theta, **inputs).numpy()
    found = pd.DataFrame(rows)
    found.insert(2, "are", [are(p, ahead.loss.to_numpy()) for p in predicted])
    found["objective"] = value.numpy()
    return found.assign(**dict(zip(NAMES, natural.T, strict=True))), weights


def _fit(table: pd.DataFrame, weights: np.ndarray, rules: Protocol) -> tuple[Tensor, Tensor]:
    """Best parameters (Q, 5) and objectives (Q,) of Q subsets of the rows, as one batch.

    Among starts that lead as low, the first wins: what the rows leave open stays near exponents of
    0.35, about what the paper starts from.
    """
    used = table[pd.Series(weights.any(0), index=table.index)]
    weights = weights[:, weights.any(0)]
    starts = torch.stack([_starts(used[mask], rules.fixed) for mask in weights])  # (Q, m, 5)
    q, m = starts.shape[:2]
    bottom = math.log(LEAST * float(used.loss.min()))
    ends = {"E": (bottom, math.inf), "alpha": (0.0, STEEPEST), "beta": (0.0, STEEPEST)}
    free = {name: ends.get(name, (-math.inf, math.inf)) for name in NAMES}
    held = dict.fromkeys(rules.fixed, (-math.inf, math.inf))
    lower, upper = torch.tensor(list((free | held).values()), dtype=torch.float64).T
    found = solve(
        LAW,
        {name: torch.tensor(used[name].to_numpy(float)) for name in LAW.inputs},
        torch.tensor(used.loss.to_numpy(float)),
        starts.flatten(0, 1),
        weights=torch.tensor(weights, dtype=torch.float64).repeat_interleave(m, 0),
        objective=rules.objective,
        delta=rules.delta,
        free=torch.tensor([name not in rules.fixed for name in NAMES]),
        lower=lower,
        upper=upper,
        max_iterations=STEPS,
    )
    value = found.objective.view(q, m)
    # a fit that passes through all of its points ends at rounding errors: those are all equal
    unit = float(used.loss.min()) ** 2 if rules.objective == "lsq" else 1.0
    exact = 1e-12 * unit * torch.tensor(weights.sum(1))[:, None]
    near = value <= value.amin(1, keepdim=True) * (1 + PREFER) + exact
    first = near.to(torch.int8).argmax(1)
    rows = torch.arange(q)
    return found.theta.view(q, m, -1)[rows, first], value[rows, first]


def _starts(used: pd.DataFrame, fixed: Mapping[str, float]) -> Tensor:
    """(4, 5): exponents of all pairs; each term a fifth of the lowest loss at medium size."""
    floor = float(used.loss.min())
    points = [
        {
            "A": 0.2 * floor * float(used.N.median()) ** alpha,
            "B": 0.2 * floor * float(used.D.median()) ** beta,
            "E": 0.6 * floor,
            "alpha": alpha,
            "beta": beta,
        }
        for alpha in EXPONENTS
        for beta in EXPONENTS
    ]
    return torch.stack([LAW.internal(point | dict(fixed)) for point in points])
