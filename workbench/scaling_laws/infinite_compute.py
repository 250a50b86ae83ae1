r"""How low can the loss go when the data are fixed and computation is free? Compare asymptotes.

With $D$ tokens and any amount of training, a recipe is worth the limit it tends to, not the loss at
one budget. The standard recipe (repeat the data, grow the model, weight decay 0.1) has no limit:
its loss turns up. Three recipes that have one are compared.

*Regularised.* For every size $N$, epochs, learning rate and weight decay are tuned jointly until no
neighbour on the grid is better; then $L(N) = E + A N^{-\alpha}$, and $E$ is the recipe's value.

*Ensemble.* $K$ models differ in seed and order only; their logits are averaged. With members $p_k$
and $\bar p \propto \exp(\frac1K \sum_k \ln p_k)$,

$$-\ln \bar p_y = \frac1K \sum_k (-\ln p_{k,y}) - \frac1K \sum_k KL(\bar p \,\|\, p_k):$$

an ensemble gains exactly by what its members disagree, on every token. To second order in their
logits' variance the gain grows as $1 - 1/K$, so $L(K) = E + A K^{-\alpha}$ with $\alpha$ near 1.

*Joint scaling.* First $K \to \infty$ for every $N$, then $N \to \infty$ of those limits.

*Data efficiency* is how many tokens the standard recipe would need for the same loss, over $D$. A
*distilled* student learns from real text mixed with text that the ensemble writes.

Reference: Kim, Kotha, Liang and Hashimoto (2025), "Pre-training under infinite compute", arXiv
2509.14786. Averaging probabilities instead of logits is offered beside it.

*Not included*: downstream tasks and continued pre-training, which apply the same recipes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.lab import checks, models
from workbench.scaling_laws.laws import LAWS
from workbench.scaling_laws.solve import solve

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Average: TypeAlias = Literal["logits", "probs"]
AVERAGES: tuple[Average, ...] = ("logits", "probs")
EXPONENTS = (0.2, 4.0)  # below the lower one, three or four points say nothing about a limit

PUBLISHED = {
    "regularised": 3.43, "ensemble": 3.34, "joint": 3.17, "data_efficiency": 5.17,
    "distilled_gain": 0.83, "decay_over_default": 30.0,
}  # fmt: skip
"""At 200M tokens of DCLM: asymptotes in nats a token, and what else the abstract reports."""


# --- asymptotes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """One saturating power law ``E + A x^-alpha``, or an array of them."""

    A: Array
    alpha: Array
    E: Array
    rms: Array

    def __call__(self, x: Any) -> Array:
        """Values at ``x``, which broadcasts with the laws."""
        return np.asarray(self.E + self.A * np.asarray(x, float) ** -self.alpha)

    def inverse(self, y: Any) -> Array:
        """The ``x`` at which a value is reached; inf at or below the asymptote."""
        excess = np.asarray(y, float) - self.E
        with np.errstate(divide="ignore", invalid="ignore"):
            reached = (self.A / excess) ** (1 / self.alpha)
        return np.where(excess > 0, reached, np.inf)


def power_asymptote(
    x: Any, y: Any, *, alpha: tuple[float, float] = EXPONENTS, starts: int = 6
) -> PowerLaw:
    r"""Fit $E + A x^{-\alpha}$ by least squares, one law a curve, all in one batch.

    Given the exponent, $A$ and $E$ follow from a line: several exponents so completed are the
    starts of `solve.solve`.

    Args:
        x: (n,) positive, at least three different values.
        y: (\*curves, n) positive.
        alpha: bounds of the exponent. With few points a tiny exponent fits any slow decline and
            puts the limit at zero.
        starts: exponents to begin at, evenly spaced in their logarithm.

    Returns:
        A law with arrays of shape (\*curves).

    Raises:
        ValueError: shapes do not fit, a value is not positive, or fewer than three ``x`` differ.

    Reference: Kim et al. (2025), arXiv 2509.14786, parameter and ensemble scaling (unweighted least
    squares, coefficients not negative).
    """
    xs = np.asarray(checks.as_floats(x, "x", ndim=1), float)
    values = np.asarray(checks.as_floats(y, "y"), float)
    if values.ndim == 0 or values.shape[-1] != len(xs):
        raise ValueError(f"y: expected {len(xs)} values a curve, got shape {values.shape}")
    if (xs <= 0).any() or (values <= 0).any():
        raise ValueError("x and y: expected positive numbers")
    if len(np.unique(xs)) < 3:
        raise ValueError(f"x: three parameters need three different values, got {np.unique(xs)}")
    low, high = alpha
    if not 0 < low < high:
        raise ValueError(f"alpha: expected 0 < lower < upper, got {alpha}")
    curves = torch.tensor(values.reshape(-1, len(xs)))
    q, unit = len(curves), xs.min()
    scaled = torch.tensor(xs / unit)
    exponents = torch.logspace(math.log10(low), math.log10(high), starts, dtype=torch.float64)
    z = scaled ** -exponents[:, None]  # (starts, n)
    z_mean, y_mean = z.mean(1), curves.mean(1)
    slope = (curves - y_mean[:, None]) @ (z - z_mean[:, None]).T / z.var(1, correction=0) / len(xs)
    slope = slope.clamp(min=1e-9)
    floor = (y_mean[:, None] - slope * z_mean).clamp(min=1e-9)
    theta = torch.stack([slope.log(), floor.log(), exponents.expand(q, -1)], -1).view(-1, 3)
    wall = math.log(1e-9)
    found = solve(
        LAWS["power"],
        {"x": scaled},
        curves.repeat_interleave(starts, 0),
        theta,
        objective="lsq",
        lower=torch.tensor([wall, wall, low], dtype=torch.float64),
        upper=torch.tensor([math.inf, math.inf, high], dtype=torch.float64),
    )
    best = found.objective.view(q, starts).argmin(1) + torch.arange(q) * starts
    log_a, log_e, power = found.theta[best].T.numpy()
    shape = values.shape[:-1]
    rms = np.sqrt(2 * found.objective[best].clamp(min=0).numpy() / len(xs))
    parts = np.exp(log_a + power * np.log(unit)), power, np.exp(log_e), rms
    return PowerLaw(*(part.reshape(shape) for part in parts))


@dataclass(frozen=True)
class JointAsymptote:
    """The double limit: ``members`` holds a law in K for every N, ``sizes`` the law of their E."""

    members: PowerLaw
    sizes: PowerLaw

    @property
    def E(self) -> Array:
        """Loss with unlimited members of unlimited size."""
        return self.sizes.E


def joint_asymptote(
    sizes: Any,
    losses: Float[np.ndarray, "*b nN nK"],
    counts: Any = None,
    *,
    alpha: tuple[float, float] = EXPONENTS,
) -> JointAsymptote:
    """First K to infinity for each size, then the size to infinity.

    Args:
        sizes: (nN,) parameters.
        losses: (..., nN, nK).
        counts: (nK,) members; default 1, 2, ... nK. Any quantity whose limit is taken first.
        alpha: bounds of both exponents.

    Raises:
        ValueError: fewer than three sizes or members, or see `power_asymptote`.

    Reference: Kim et al. (2025), arXiv 2509.14786, joint scaling recipe.
    """
    table = np.asarray(checks.as_floats(losses, "losses"), float)
    if table.ndim < 2:
        raise ValueError(f"losses: expected (..., sizes, members), got shape {table.shape}")
    first = np.arange(1, table.shape[-1] + 1.0) if counts is None else counts
    members = power_asymptote(first, table, alpha=alpha)
    return JointAsymptote(members, power_asymptote(sizes, members.E, alpha=alpha))


def data_efficiency(loss: Any, D: float, law: PowerLaw) -> Array:
    """Tokens that the law's recipe needs for a loss, over ``D``; inf where it never gets there.

    Args:
        loss: reached from ``D`` tokens by another recipe.
        D: tokens.
        law: of the standard recipe's loss against tokens.

    Reference: Kim et al. (2025), arXiv 2509.14786, effective data.
    """
    return law.inverse(loss) / checks.positive(D, "D")


# --- ensembles -----------------------------------------------------------------------------------


def average(members: Float[Tensor, "K *n v"], how: Average = "logits") -> Float[Tensor, "*n v"]:
    """Log probabilities of an ensemble from its members' logits (or log probabilities).

    Args:
        members: logits.
        how: "logits" (the paper's; a geometric mean of probabilities) or "probs".
    """
    checks.one_of(how, AVERAGES, "how")
    log_probs = members.log_softmax(-1)
    if how == "probs":
        return log_probs.logsumexp(0) - math.log(len(members))
    return log_probs.mean(0).log_softmax(-1)


def disagreement(members: Float[Tensor, "K *n v"]) -> Float[Tensor, " *n"]:
    """Mean divergence of the ensemble from its members, in nats: what averaging logits gains."""
    log_probs = members.log_softmax(-1)
    together = average(members)
    return (together.exp() * (together - log_probs)).sum(-1).mean(0)


def ensemble_losses(
    members: Float[Tensor, "M n v"], labels: Int[Tensor, " n"], how: Average = "logits"
) -> Float[Tensor, " M"]:
    """Mean loss of ensembles of 1, 2, ... M of the given members, over all ways to choose them.

    Args:
        members: logits at n positions.
        labels: what came there.
        how: see `average`.

    Returns:
        Nats a position. Averaging over all choices removes the luck of their order.

    Raises:
        ValueError: shapes do not fit.
    """
    if members.ndim != 3 or members.shape[1] != len(labels):
        raise ValueError(
            f"members: expected (M, {len(labels)}, vocabulary), got {tuple(members.shape)}"
        )
    checks.one_of(how, AVERAGES, "how")
    log_probs = members.log_softmax(-1)
    said = log_probs.gather(-1, labels.expand(len(members), -1)[..., None])[..., 0]  # (M, n)
    total = len(members)
    out = said.new_zeros(total)
    for k in range(1, total + 1):
        for chosen in itertools.combinations(range(total), k):
            rows = list(chosen)
            if how == "probs":
                loss = math.log(k) - said[rows].logsumexp(0).mean()
            else:
                loss = log_probs[rows].mean(0).logsumexp(-1).mean() - said[rows].mean()
            out[k - 1] += loss / math.comb(total, k)
    return out


def ensemble_loss(
    predictors: Sequence[Callable[[Tensor], Tensor]],
    tokens: Int[Tensor, "b t"],
    how: Average = "logits",
) -> Float[Tensor, " K"]:
    """`ensemble_losses` of next-token predictors (tokens (b, t) to logits (b, t, v)) on a batch."""
    members = torch.stack([predict(tokens[:, :-1]).flatten(0, 1) for predict in predictors])
    return ensemble_losses(members, tokens[:, 1:].flatten(), how)


def distill_sequences(
    predictors: Sequence[Callable[[Tensor], Tensor]],
    prompts: Int[Tensor, "n t"],
    length: int,
    *,
    how: Average = "logits",
    ctx: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "n length"]:
    """Sequences that an ensemble writes: each next token is drawn from the averaged prediction.

    Args:
        predictors: members, tokens (n, t) to logits (n, t, v).
        prompts: how the sequences begin; they count towards ``length``.
        length: tokens of each sequence.
        how: see `average`.
        ctx: tokens that members can look back.
        generator: of the draws.

    Reference: Kim et al. (2025), arXiv 2509.14786, sequence-level distillation.
    """
    if checks.count(length, "length") <= prompts.shape[1]:
        raise ValueError(f"length: expected more than the prompts' {prompts.shape[1]} tokens")

    def together(tokens: Tensor) -> Tensor:
        return average(torch.stack([predict(tokens)[:, -1:] for predict in predictors]), how)

    new = length - prompts.shape[1]
    return models.generate(together, prompts, new, generator=generator, ctx=ctx)


# --- tuning --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """A recipe that no neighbour on its grid beats.

    Attributes:
        recipe: the values chosen.
        loss: theirs.
        at_edge: names whose value is the first or last of its grid.
        tried: every recipe evaluated, as tuples of positions in the grid, and its loss.
    """

    recipe: dict[str, Any]
    loss: float
    at_edge: tuple[str, ...]
    tried: dict[tuple[int, ...], float] = field(repr=False)


def tune_recipe(
    evaluate: Callable[..., float],
    grid: Mapping[str, Sequence[Any]],
    start: Mapping[str, Any] | None = None,
) -> Tuned:
    """Coordinate descent over a grid until every neighbouring recipe is no better.

    Args:
        evaluate: ``evaluate(**recipe)`` gives a loss; each recipe is asked for once.
        grid: ordered values of each setting.
        start: where to begin; default the first value of each.

    Raises:
        ValueError: the grid is empty, or ``start`` is not on it.

    Reference: Kim et al. (2025), arXiv 2509.14786, locally optimal hyper-parameters.
    """
    names = list(grid)
    values = [list(grid[name]) for name in names]
    if not names or not all(values):
        raise ValueError("grid: expected at least one setting, each with values")
    begin = dict(start or {name: v[0] for name, v in zip(names, values, strict=True)})
    for name, v in zip(names, values, strict=True):
        if begin.get(name) not in v:
            raise ValueError(f"start: {name} = {begin.get(name)!r} is not among {v}")
    at = tuple(v.index(begin[name]) for name, v in zip(names, values, strict=True))
    tried: dict[tuple[int, ...], float] = {}

    def loss(point: tuple[int, ...]) -> float:
        if point not in tried:
            recipe = {name: v[i] for name, v, i in zip(names, values, point, strict=True)}
            tried[point] = float(evaluate(**recipe))
        return tried[point]

    moved = True
    while moved:
        moved = False
        for axis, v in enumerate(values):
            for step in (-1, 1):
                while 0 <= at[axis] + step < len(v):
                    there = (*at[:axis], at[axis] + step, *at[axis + 1 :])
                    if loss(there) >= loss(at):
                        break
                    at, moved = there, True
    edge = tuple(
        name
        for name, v, i in zip(names, values, at, strict=True)
        if len(v) > 1 and i in (0, len(v) - 1)
    )
    recipe = {name: v[i] for name, v, i in zip(names, values, at, strict=True)}
    return Tuned(recipe, loss(at), edge, tried)
