r"""Six constants that predict a whole training curve: size, steps and batch in one law.

A model of $N$ parameters (embeddings not counted) trained for $S$ steps of $B$ tokens at a constant
learning rate reaches the loss $L$ that solves

$$L = \Big(\frac{N_c}{N}\Big)^{\alpha_N} + \Big(\frac{S_c}{S_{\min}}\Big)^{\alpha_S},
  \qquad S_{\min} = \frac{S}{1 + B_{crit}(L)/B},
  \qquad B_{crit}(L) = B_* L^{-1/\alpha_B}.$$

$S_{\min}$ is the number of steps that an infinite batch would need for the same loss. Steps and
tokens $E = SB$ trade along a hyperbola,

$$\Big(\frac{S}{S_{\min}} - 1\Big)\Big(\frac{E}{E_{\min}} - 1\Big) = 1
  \iff \frac{S_{\min}}{S} + \frac{E_{\min}}{E} = 1, \qquad B_{crit} = \frac{E_{\min}}{S_{\min}},$$

whose second form is linear in what is sought. The paper estimates the constants in three steps,
each a straight line (`three_steps`): (a) minimum losses of converged models against $N$; (b) where
runs at several batch sizes reach the same losses, a hyperbola per loss and its critical batch size
against the loss; (c) the excess over the minimum against $S_{\min}$. `fit_trajectory` minimises one
objective over all six at once, from many starts; it does not need converged runs.

The constants hold for one data set, context length and recipe. There is no irreducible term: do
not mix these exponents with those of laws that have one.

Reference: Su, Tian, Shen and Cai (2024), "Unraveling the Mystery of Scaling Laws: Part I", arXiv
2403.06563; the law is that of Kaplan et al. (2020), arXiv 2001.08361.

*Not included*: loss as a function of data set size for repeated data (the paper trains on less than
one epoch), and the paper's sweeps over learning rates and contexts, which repeat the estimation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.lab import checks
from workbench.scaling_laws.fit import LawFit, fit_law
from workbench.scaling_laws.implicit import kaplan_loss
from workbench.scaling_laws.laws import LAWS
from workbench.scaling_laws.table import prepare

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Constants:
    """The law's six constants; all positive.

    Attributes:
        N_c, a_N: minimum loss ``(N_c / N)**a_N``.
        S_c, a_S: excess over it ``(S_c / S_min)**a_S``.
        B_star, a_B: critical batch size ``B_star * L**(-1 / a_B)``, in tokens.
    """

    N_c: float
    a_N: float
    S_c: float
    a_S: float
    B_star: float
    a_B: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            checks.positive(value, name)


KAPLAN = Constants(N_c=6.5e13, a_N=0.077, S_c=2.1e3, a_S=0.76, B_star=2.1e8, a_B=0.21)
"""Kaplan et al. (2020), WebText2, context 1024; per token of its vocabulary of 50,257."""

_NO_BATCH = {"B_star": 1e-300, "a_B": 1.0}
_EXPONENTS = {"a_N": (1e-3, 10.0), "a_S": (1e-2, 10.0), "a_B": (1e-2, 10.0)}


# --- the law, in all four directions --------------------------------------------------------------


def loss_at(N: Any, S: Any, B: Any, law: Constants) -> Float[Tensor, "*n"]:
    """Loss after ``S`` steps of ``B`` tokens of a model with ``N`` parameters.

    Args:
        N: parameters without embeddings; broadcasts with the others, inf allowed in each.
        S: steps since the beginning.
        B: tokens a step.
        law: the constants.

    Returns:
        Nats a token, float64.

    Raises:
        ValueError: a size is not positive.

    Reference: Su et al. (2024), arXiv 2403.06563, the loss trajectory at any batch size.
    """
    sizes = [_positive(v, name) for v, name in ((N, "N"), (S, "S"), (B, "B"))]
    return kaplan_loss(*sizes, **asdict(law))


def minimum_loss(N: Any, law: Constants) -> Float[Tensor, "*n"]:
    """Loss that no amount of training passes, ``(N_c / N)**a_N``."""
    return (law.N_c / _positive(N, "N")) ** law.a_N


def critical_batch(loss: Any, law: Constants) -> Float[Tensor, "*n"]:
    """Batch size at which a loss costs twice the least steps and twice the least tokens."""
    return law.B_star * _positive(loss, "loss") ** (-1 / law.a_B)


def steps_to(loss: Any, N: Any, B: Any, law: Constants) -> Float[Tensor, "*n"]:
    r"""Steps to a loss, $S = S_c (L - L(N))^{-1/\alpha_S} (1 + B_{crit}(L)/B)$; inf if never.

    The law read the other way needs no root: the loss is given. The least steps are those at
    ``B = inf``, the least tokens ``steps_to(B=inf) * critical_batch``.
    """
    loss, batch = _positive(loss, "loss"), _positive(B, "B")
    excess = (loss - minimum_loss(N, law)).clamp(min=0)
    least = law.S_c * excess ** (-1 / law.a_S)
    return least * (1 + critical_batch(loss, law) / batch)


# --- the three steps -----------------------------------------------------------------------------


def crossing_steps(S: Array, loss: Array, levels: Array) -> Array:
    """Steps at which a curve first reaches each level, NaN where it does not or began below.

    The curve is the lowest loss so far, interpolated linearly in the logarithms of both.
    """
    S, loss = checks.as_floats(S, "S", ndim=1), checks.as_floats(loss, "loss", ndim=1)
    checks.same_length(S=S, loss=loss)
    steps, values = np.asarray(S, float), np.minimum.accumulate(np.asarray(loss, float))
    if not (np.diff(steps) > 0).all():
        raise ValueError("S: expected steps that rise along the curve; sort it, one run at a time")
    first = np.concatenate([[True], np.diff(values) < 0])
    x, y = -np.log(values[first]), np.log(steps[first])
    return np.exp(np.interp(-np.log(levels), x, y, left=np.nan, right=np.nan))


def fit_hyperbola(S: Any, E: Any) -> tuple[Array, Array]:
    r"""Least steps and tokens from pairs that reach the same loss at different batch sizes.

    Minimises $\sum_i (S_{\min}/S_i + E_{\min}/E_i - 1)^2$ in closed form.

    Args:
        S: steps, shape (\*levels, batches); NaN leaves a pair out.
        E: tokens, same shape.

    Returns:
        ``S_min`` and ``E_min`` of shape (\*levels); NaN where fewer than two batch sizes reach the
        level or the pairs contradict the hyperbola (a constant would not be positive).

    Reference: Kaplan et al. (2020), arXiv 2001.08361, the trade of steps and examples.
    """
    S, E = np.asarray(S, float), np.asarray(E, float)
    if S.shape != E.shape or S.ndim == 0:
        raise ValueError(f"S and E: expected the same shape, got {S.shape} and {E.shape}")
    if (S <= 0).any() or (E <= 0).any():
        raise ValueError("S and E: expected positive steps and tokens")
    known = np.isfinite(S) & np.isfinite(E)
    x, y = np.where(known, 1 / S, 0.0), np.where(known, 1 / E, 0.0)
    xx, yy, xy = (x * x).sum(-1), (y * y).sum(-1), (x * y).sum(-1)
    sx, sy, determinant = x.sum(-1), y.sum(-1), xx * yy - xy * xy
    with np.errstate(divide="ignore", invalid="ignore"):
        least = np.stack([yy * sx - xy * sy, xx * sy - xy * sx]) / determinant
    sound = (determinant > 1e-12 * xx * yy) & (least > 0).all(0)
    steps, tokens = np.where(sound, least, np.nan)
    return steps, tokens


def fit_line(x: Any, y: Any, what: str) -> tuple[float, float]:
    r"""``(c, a)`` of $y = (c/x)^a$ by least squares on logarithms; rows with NaN are left out.

    Raises:
        ValueError: fewer than two different x are left, or y does not fall with x; ``what`` names
            the data in the message.
    """
    x, y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    kept = np.isfinite(x) & np.isfinite(y)
    if len(np.unique(x[kept])) < 2:
        raise ValueError(f"{what}: {kept.sum()} usable points; a line needs two different ones")
    slope, intercept = np.polyfit(x[kept], y[kept], 1)
    if slope >= 0:
        raise ValueError(f"{what}: does not fall (slope {slope:+.3g} in logarithms)")
    return float(np.exp(np.clip(-intercept / slope, -700, 700))), float(-slope)


@dataclass(frozen=True)
class ThreeSteps:
    """Constants estimated the paper's way, and what each line was drawn through.

    Attributes:
        law: the constants.
        minima: per size the minimum loss taken (a).
        hyperbolas: per run group and loss level ``S_min``, ``E_min`` and ``B_crit`` (b).
        excess: ``S_min`` and loss above the minimum of every row used (c).
    """

    law: Constants
    minima: pd.Series = field(repr=False)
    hyperbolas: pd.DataFrame = field(repr=False)
    excess: pd.DataFrame = field(repr=False)


def three_steps(
    runs: pd.DataFrame,
    *,
    columns: Mapping[str, str] | None = None,
    minima: Mapping[float, float] | None = None,
    levels: int = 12,
) -> ThreeSteps:
    """Estimate the six constants by three regressions, as the paper does.

    Args:
        runs: rows along training at a constant learning rate, after warm-up, of several sizes and
            at least two batch sizes; a column ``run`` (or ``seed``) keeps repeated runs apart.
        columns: which columns hold ``N`` (parameters), ``S`` (steps), ``B`` (tokens a step) and
            ``loss``, where they are called otherwise.
        minima: loss of each size after convergence; by default the lowest in the table, which is
            what the paper takes and is right only where runs have converged.
        levels: losses read off the runs of each size, evenly spaced in their logarithm.

    Raises:
        ValueError: a column is missing or not positive, or a line cannot be drawn.

    Reference: Su et al. (2024), arXiv 2403.06563, steps for N_c and a_N, B_* and a_B, S_c and a_S.
    """
    table = _table(runs, columns)
    lowest = table.groupby("N").loss.min() if minima is None else pd.Series(dict(minima))
    n_c, a_n = fit_line(lowest.index, lowest, "minima: loss against N")
    hyperbolas = pd.concat([_hyperbolas(group, levels) for _, group in table.groupby("N")])
    root, power = fit_line(hyperbolas.loss, hyperbolas.B_crit, "critical batch size against loss")
    # (root / L)^power = B_star L^(-1 / a_B)
    b_star, a_b = root**power, 1 / power
    critical = b_star * table.loss ** (-1 / a_b)
    excess = pd.DataFrame(
        {
            "N": table.N,
            "S_min": table.S / (1 + critical / table.B),
            "excess": table.loss - (n_c / table.N) ** a_n,
        }
    )
    excess = excess[excess.excess > 0]
    s_c, a_s = fit_line(excess.S_min, excess.excess, "loss above the minimum against S_min")
    law = Constants(n_c, a_n, s_c, a_s, b_star, a_b)
    return ThreeSteps(law, lowest, hyperbolas, excess)


def _hyperbolas(group: pd.DataFrame, count: int) -> pd.DataFrame:
    """Hyperbolas of one size: seeds are averaged in the logarithm of the crossing steps."""
    curves = [curve for _, curve in group.groupby(["B", "run"])]
    low = max(curve.loss.min() for curve in curves)
    high = min(curve.loss.max() for curve in curves)
    levels = np.geomspace(high, low, count + 2)[1:-1] if high > low else np.array([low])
    crossings = pd.DataFrame(
        [
            np.log(crossing_steps(curve.S.to_numpy(), curve.loss.to_numpy(), levels))
            for curve in curves
        ],
        index=pd.Index([curve.B.iloc[0] for curve in curves], name="B"),
    )
    means = crossings.groupby("B").mean()
    steps = np.exp(means.to_numpy().T)
    least_steps, least_tokens = fit_hyperbola(steps, steps * means.index.to_numpy())
    return pd.DataFrame(
        {
            "N": group.N.iloc[0],
            "loss": levels,
            "S_min": least_steps,
            "E_min": least_tokens,
            "B_crit": least_tokens / least_steps,
        }
    )


# --- all constants at once -----------------------------------------------------------------------


def fit_trajectory(
    runs: pd.DataFrame,
    *,
    columns: Mapping[str, str] | None = None,
    starts: int = 40,
    seed: int = 0,
    **options: Any,
) -> LawFit:
    """Fit the six constants together: Huber loss on log residuals, from several starts.

    Runs need not have converged. ``Constants(**fit.params)`` are the constants.

    Args:
        runs: as for `three_steps`.
        columns: as for `three_steps`.
        starts: drawn uniformly over the law's box of starting values.
        seed: of the starts.
        options: more of `fit.fit_law`, such as ``bootstrap``.

    Raises:
        ValueError: a column is missing or not positive, or there is one size or batch size only.
    """
    return fit_law(
        runs, "kaplan", columns=columns, starts=starts, seed=seed, bounds=_EXPONENTS, **options
    )


def fit_without_batch(
    runs: pd.DataFrame,
    *,
    columns: Mapping[str, str] | None = None,
    starts: int = 40,
    seed: int = 0,
    **options: Any,
) -> LawFit:
    """The same fit of a law that does not know the batch size, ``(N_c/N)^a_N + (S_c/S)^a_S``.

    It is the law with a critical batch size of 0, and comes back as that. Give tokens as the column
    ``S`` for a law of tokens. Arguments are those of `fit_trajectory`.
    """
    return fit_trajectory(
        runs, columns=columns, starts=starts, seed=seed, fixed=_NO_BATCH, **options
    )


def _positive(value: Any, name: str) -> Tensor:
    """As float64, with inf allowed."""
    plain = value if checks.is_tensor(value) else np.array(value, float)
    tensor = torch.as_tensor(plain, dtype=torch.float64)
    if not bool((tensor > 0).all()):
        raise ValueError(f"{name}: expected positive numbers")
    return tensor


def _table(runs: pd.DataFrame, columns: Mapping[str, str] | None) -> pd.DataFrame:
    """Columns N, S, B, loss and run, checked, sorted along each run."""
    table = prepare(runs, LAWS["kaplan"], columns).frame
    several = [q for q in ("run", "seed") if q in runs]
    table = table.assign(run=runs.loc[table.index, several[0]] if several else 0)
    table = table.sort_values(["N", "B", "run", "S"], ignore_index=True)
    if table.duplicated(["N", "B", "run", "S"]).any():
        raise ValueError("runs: two rows for one step of one run; name the runs in a column 'run'")
    return table
