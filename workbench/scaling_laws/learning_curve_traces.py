r"""Learning traces: refit a power law at every size of the sample and watch its asymptote settle.

Accuracy $y_i$ (in percent) is observed at growing sizes $x_1 < x_2 < \dots$ of the training set.
At every *level* $i \ge 3$ the first $i$ observations are fitted by least squares with

$$\pi_i(x) = c_i - a_i x^{-b_i}, \qquad a_i, b_i, c_i > 0 ,$$

and the sequence of curves is the *learning trace*; $c_i$ is what level $i$ takes for the accuracy
of endless data. Four numbers decide when to believe it:

* the **working level** $\omega$, the first level from which $\lambda + 1$ asymptotes move slowly,
  $|c_{j+1} - c_j| / (x_{j+1} - x_j) \le \nu^{1/\varsigma} / (1 - \nu)$ for
  $j = \omega, \dots, \omega+\lambda$;
* the **prediction level**, the first $i \ge \omega$ whose asymptote is a possible accuracy,
  $c_i \le 100$;
* the **layer of convergence** $\chi_i = |c_i - \pi_i(x_i)|$, what level $i$ thinks is left to gain;
* the **stop level**, the first prediction level or later with $\chi_i \le \tau$.

**Anchoring** steadies a trace of irregular observations: each later level is fitted with one more
point, at infinity, whose value is the asymptote of the level before.

All levels of all curves are fitted together: `power_profile` searches the exponents at once.

$\nu$ has a unit, percentage points per training example. The paper's $2\cdot10^{-5}$ with steps
of 5,000 words lets the asymptote move a tenth of a point a step; with other steps, rescale it.

Reference: Vilares Ferro, Darriba Bilbao and Ribadas Pena (2017), "Modeling of learning curves with
applications to POS tagging", arXiv 2402.02515.

*Not included*: adaptive steps and absolute thresholds, which are the authors' later papers
(arXiv 2402.02516, 2402.02522). *Not checked against the paper's text*, of which only the abstract
was at hand: the inequality and defaults above; $\chi_i$ at the level's own size; anchors that begin
after the prediction level of the trace without anchors (the first asymptote that can be an
accuracy). *Ours by choice*: the point at infinity is exact, not $10^{200}$, and $b$ is kept in
[0.01, 10], for a curve that grows like $\log x$ has no best fit ($b \to 0$, $c \to \infty$).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.lab import checks
from workbench.lab.checks import Values
from workbench.scaling_laws.power_profile import (
    Sums,
    bracket,
    grid_sums,
    moments,
    refine,
    with_anchor,
)

FIRST = 3  # the first level: three parameters need three points
NEVER = 0  # what a level function returns where the trace does not get there

_BLOCK = 8  # levels that are refined together, padded to the longest


@dataclass(frozen=True)
class Trace:
    """All levels of one curve, or of m curves.

    Arrays and tensors are of the kind the observations were. Level i (the number of observations
    it has seen) stands at index i - 3.

    Args:
        x, y: the observations, `(n,)` or `(m, n)`.
        coef: a, b, c of every level, `(..., n-2, 3)`.
        sse: their sums of squared errors, without the anchor's, `(..., n-2)`.
        start: the level after which there are anchors, `(...)`; 0 for none.
    """

    x: Any
    y: Any
    coef: Any
    sse: Any
    start: Any

    @property
    def levels(self) -> np.ndarray:
        """3 to n."""
        return np.arange(FIRST, self.x.shape[-1] + 1)

    @property
    def asymptote(self) -> Any:
        """c of every level, `(..., n-2)`."""
        return self.coef[..., 2]

    @property
    def gap(self) -> Any:
        """Layer of convergence: a x^-b at the level's own size, `(..., n-2)`."""
        return self.coef[..., 0] * self.x[..., FIRST - 1 :] ** -self.coef[..., 1]

    def predict(self, x: Any) -> Any:
        """Every level's forecast at sizes x: `(..., n-2)` for a number, `(..., n-2, k)` for k."""
        a, b, c = (self.coef[..., j] for j in range(3))
        if checks.is_tensor(x) or np.ndim(x):
            x = checks.as_floats(x, "x", ndim=1)
            x = torch.as_tensor(x).to(a) if checks.is_tensor(a) else np.asarray(x)
            a, b, c = a[..., None], b[..., None], c[..., None]
        return c - a * x**-b


def fit_power(x: Values, y: Values, anchor: Values | None = None) -> Values:
    r"""Least-squares fit of $c - a x^{-b}$, with $a \ge 0$ and b in `power_profile.EXPONENTS`.

    Args:
        x: positive, rising sizes, at least 3; `(n,)` for all curves or `(m, n)`.
        y: accuracies in percent, `(n,)` or `(m, n)`; anything that grows towards a ceiling.
        anchor: value of one more observation at x = infinity, a number for each curve.

    Returns:
        `a, b, c`, shape `(3,)` or `(m, 3)`; a is 0 (and c the mean) where the curve does not rise.

    Raises:
        ValueError: fewer than 3 sizes, sizes not positive and rising, NaN, or shapes disagree.
    """
    x, y, kind = _observations(x, y)
    place, origin = _places(x)
    problem = (place, y, torch.ones_like(y))
    if anchor is not None:
        value = checks.as_floats(np.asarray(anchor) if np.ndim(anchor) == 0 else anchor, "anchor")
        value = torch.as_tensor(value).to(y).expand(y.shape[:1])[:, None]
        problem = with_anchor(*problem, value)
    at = grid_sums(*problem)
    found = refine(*problem, *bracket(at.sums[:, -1], at.grid))
    return kind(_coefficients(torch.stack(found, dim=-1), origin[:, 0]))


def learning_trace(
    x: Values,
    y: Values,
    *,
    anchor: bool = False,
    start: Values | None = None,
    nu: float = 2e-5,
    slow: float = 1.0,
    look: int = 5,
) -> Trace:
    """Fit every level of every curve.

    Args:
        x, y: as for `fit_power`.
        anchor: anchor each level after `start` to the asymptote of the level before. Levels then
            follow from each other, so that only the curves are fitted together.
        start: level after which anchors are used, for each curve; 0 for never. By default the
            prediction level of the trace without anchors, found with `nu`, `slow` and `look`.

    Returns:
        The trace; `coef[..., i-3, :]` is a, b, c of level i.
    """
    x, y, kind = _observations(x, y)
    place, origin = _places(x)
    m, n = y.shape
    at = grid_sums(place, y, torch.ones_like(y))
    found = torch.stack([_block(place, y, at, low) for low in range(FIRST, n + 1, _BLOCK)], dim=0)
    fits = found.movedim(0, 1).flatten(1, 2)[:, : n - FIRST + 1]  # (m, n-2, 4): b, d, slope, sse
    begin = torch.zeros(m, dtype=torch.long, device=y.device)
    if anchor:
        if start is None:
            plain = Trace(x, y, _coefficients(fits, origin), fits[..., 3], begin)
            begin = torch.as_tensor(prediction_level(plain, nu=nu, slow=slow, look=look)).to(begin)
        else:
            begin = torch.as_tensor(start).to(begin).expand(m).clone()
            if bool(((begin != NEVER) & ((begin < FIRST) | (begin > n))).any()):
                raise ValueError(
                    f"start: expected 0 or levels {FIRST} to {n}, got {begin.tolist()}"
                )
        fits = _anchored(place, y, at, fits, begin)
    coef = _coefficients(fits, origin)
    return Trace(kind(x), kind(y), kind(coef), kind(fits[..., 3]), kind(begin))


def working_level(trace: Trace, nu: float = 2e-5, slow: float = 1.0, look: int = 5) -> Any:
    r"""First level from which `look + 1` asymptotes in a row move slowly.

    $$\frac{|c_{j+1} - c_j|}{x_{j+1} - x_j} \le \frac{\nu^{1/\varsigma}}{1 - \nu},
      \qquad j = i, \dots, i + \lambda .$$

    Args:
        nu: $\nu$ in (0, 1), percentage points per unit of x.
        slow: $\varsigma \ge 1$; larger is more lenient.
        look: $\lambda$, the number of further levels; the level i is known at level i + look + 1.

    Returns:
        The level for each curve (a number for one curve), 0 where it is not reached. Levels with
        a = 0, whose best fit is flat, do not count as slow: the pattern asks for a > 0.
    """
    return _first(trace, _settled(trace, nu, slow, look))


def prediction_level(
    trace: Trace, nu: float = 2e-5, slow: float = 1.0, look: int = 5, *, top: float = 100.0
) -> Any:
    """First level, from the working level on, whose asymptote does not exceed `top`."""
    checks.number(top, "top")
    return _first(trace, _from(_settled(trace, nu, slow, look)) & (_tensor(trace.asymptote) <= top))


def stop_level(
    trace: Trace,
    tau: float,
    nu: float = 2e-5,
    slow: float = 1.0,
    look: int = 5,
    *,
    top: float = 100.0,
) -> Any:
    """First level, from the prediction level on, at which at most `tau` points are left to gain."""
    checks.positive(tau, "tau")
    checks.number(top, "top")
    trusted = _from(_settled(trace, nu, slow, look)) & (_tensor(trace.asymptote) <= top)
    return _first(trace, _from(trusted) & (_tensor(trace.gap) <= tau))


def slowest_change(nu: float = 2e-5, slow: float = 1.0) -> float:
    r"""The bound $\nu^{1/\varsigma}/(1-\nu)$ of the working level, points per unit of x."""
    nu, slow = checks.fraction(nu, "nu", zero=False, one=False), checks.positive(slow, "slow")
    return nu ** (1 / slow) / (1 - nu)


# ---- levels


def _settled(trace: Trace, nu: float, slow: float, look: int) -> Tensor:
    """(m, n-2): do this asymptote and the `look` following ones move slowly?"""
    look = checks.count(look, "look", minimum=0)
    c, x = _tensor(trace.asymptote), _tensor(trace.x)[..., FIRST - 1 :]
    rising = _tensor(trace.coef)[..., 0] > 0  # a flat best fit is no power law: its c means nothing
    calm = c.diff(dim=-1).abs() <= slowest_change(nu, slow) * x.diff(dim=-1)
    calm &= rising[..., :-1] & rising[..., 1:]
    settled = torch.zeros_like(c, dtype=torch.bool)
    if calm.shape[-1] > look:
        windows = calm.unfold(-1, look + 1, 1).all(dim=-1)
        settled[..., : windows.shape[-1]] = windows
    return settled


def _from(reached: Tensor) -> Tensor:
    """True from the first True on."""
    return reached.cummax(dim=-1).values


def _first(trace: Trace, reached: Tensor) -> Any:
    """The level of the first True, 0 where there is none."""
    level = torch.where(reached.any(-1), reached.int().argmax(-1) + FIRST, NEVER)
    if level.ndim == 0:
        return int(level)
    return level if checks.is_tensor(trace.coef) else level.numpy()


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values)


# ---- fits: b, d, slope and squared error of every level


def _block(place: Tensor, y: Tensor, at: Sums, low: int) -> Tensor:
    """Fits (m, 8, 4) of the levels low to low + 7; levels beyond n repeat n."""
    m, n = y.shape
    levels = torch.arange(low, low + _BLOCK, device=y.device).clamp(max=n)
    width = int(levels[-1])
    seen = torch.arange(width, device=y.device) < levels[:, None]

    def rows(values: Tensor) -> Tensor:
        return values.expand(m, _BLOCK, width).reshape(-1, width)

    problem = rows(place[:, None, :width]), rows(y[:, None, :width]), rows(seen.to(y))
    best, low_b, high_b = bracket(at.sums[:, levels - 1], at.grid)
    found = refine(*problem, best.flatten(), low_b.flatten(), high_b.flatten())
    return torch.stack(found, dim=-1).reshape(m, _BLOCK, 4)


def _anchored(place: Tensor, y: Tensor, at: Sums, fits: Tensor, start: Tensor) -> Tensor:
    """Refit the levels after `start`, each with the asymptote before it as a point at infinity."""
    fits = fits.clone()
    far = moments(1 / at.grid, torch.zeros_like(at.grid), torch.ones_like(at.grid))
    for level in range(FIRST + 1, y.shape[1] + 1):
        rows = torch.nonzero((start > 0) & (start < level))[:, 0]
        if not len(rows):
            continue
        b, d, slope, _ = fits[rows, level - FIRST - 1].unbind(-1)
        value = (d + slope / b)[:, None]
        sums = at.sums[rows, level - 1] + far
        sums[:, 3:] += moments(1 / at.grid, value, torch.ones_like(value))[:, 3:]
        seen = place[rows, :level], y[rows, :level]
        problem = with_anchor(*seen, torch.ones_like(seen[1]), value)
        b, d, slope, sse = refine(*problem, *bracket(sums, at.grid))
        sse = sse - (d + slope / b - value[:, 0]).square()
        fits[rows, level - FIRST] = torch.stack([b, d, slope, sse], dim=-1)
    return fits


# ---- in and out


def _observations(x: Any, y: Any) -> tuple[Tensor, Tensor, Any]:
    """Sizes and accuracies (m, n) in float64, and how to hand results back."""
    x, y = checks.as_floats(x, "x", ndim=(1, 2)), checks.as_floats(y, "y", ndim=(1, 2))
    tensors, single = checks.is_tensor(y), y.ndim == 1
    if x.shape != y.shape and not (x.ndim == 1 and len(x) == y.shape[-1]):
        raise ValueError(
            f"x, y: expected as many sizes as accuracies, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if y.shape[-1] < FIRST:
        raise ValueError(f"x: expected at least {FIRST} sizes, got {y.shape[-1]}")
    y = y.double() if tensors else torch.tensor(y, dtype=torch.float64)
    x = (x if checks.is_tensor(x) else torch.tensor(x)).to(y)
    if not bool((x > 0).all()):
        raise ValueError("x: expected positive sizes")
    if not bool((x.diff(dim=-1) > 0).all()):
        raise ValueError("x: expected sizes that rise, each one once; sort them first")
    y = y[None] if single else y
    x = x.expand(y.shape)

    def kind(values: Tensor) -> Any:
        values = values[0] if single else values
        return values if tensors else values.numpy()

    return x, y, kind


def _places(x: Tensor) -> tuple[Tensor, Tensor]:
    """log(x / x_0) and log x_0, (m, n) and (m, 1)."""
    log_x = x.log()
    origin = log_x.mean(dim=1, keepdim=True)
    return log_x - origin, origin


def _coefficients(fits: Tensor, origin: Tensor) -> Tensor:
    """a, b, c in the user's sizes, of fits (..., 4)."""
    b, d, slope, _ = fits.unbind(-1)
    return torch.stack([slope / b * (b * origin).exp(), b, d + slope / b], dim=-1)
