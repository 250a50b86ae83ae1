"""Many fits at once: damped Newton on a batch of problems, each with its own damping and stop.

A fit minimises ``sum_i w_i rho(r_i)`` over ``theta``, where the residual is
``r = ln L_hat - ln L`` or ``L_hat - L`` and ``rho`` is Huber's function or the square. The starts
of a grid, the resamples of a bootstrap and the cells of a study differ in ``theta``, in the weights
or in the data, but need the same arithmetic: all of them are rows of one batch in float64, on
whatever device the tensors are.

Each step solves ``(H + lambda M) s = -g`` per problem: ``H`` the exact second derivative, ``M`` the
Gauss-Newton matrix of the quadratic that lies above Huber's function (iteratively reweighted least
squares). Small ``lambda`` is Newton's step, large ``lambda`` a short reweighted one; ``M`` makes
the damping independent of how the parameters are scaled. Huber's threshold of 1e-3 lies far below
typical residuals, so the objective is nearly an absolute value: plain Gauss-Newton sees no
curvature there, and quasi-Newton methods stop early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.lab import checks
from workbench.scaling_laws.law import Bound, Inputs, Law

Objective: TypeAlias = Literal["huber_log", "lsq", "lsq_log"]
OBJECTIVES: tuple[Objective, ...] = ("huber_log", "lsq", "lsq_log")
STRIDE = 5.0  # no parameter moves further in one step: a term that vanished may come back
RIDGE = 1e-4  # of the diagonal, added with the damping
SHARES = (0.3, 0.08, 0.01)  # of a step that leads uphill
STALLED, PATIENCE = 1e-6, 10  # a problem that falls by less than this, so many times, is given up
WIDTH = 120_000  # rows x problems worked on together: what a core's cache holds


@dataclass(frozen=True)
class Solution:
    """Minima found for P problems."""

    theta: Float[Tensor, "P p"]
    objective: Float[Tensor, " P"]
    converged: Bool[Tensor, " P"]
    iterations: Int[Tensor, " P"]

    def at(self, rows: Tensor) -> Solution:
        """Some of the problems."""
        return Solution(
            self.theta[rows], self.objective[rows], self.converged[rows], self.iterations[rows]
        )


@dataclass(frozen=True)
class _Problem:
    bound: Bound
    loss: Tensor  # (n,) or (P, n)
    weights: Tensor | None  # (P, n)
    objective: Objective
    delta: float
    free: Tensor  # (p,) bool
    lower: Tensor  # (p,)
    upper: Tensor  # (p,)

    @property
    def bounded(self) -> bool:
        """Whether any parameter has a bound."""
        return bool(self.lower.isfinite().any() or self.upper.isfinite().any())

    def evaluate(self, theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Objective (P,), log residuals (P, n), and the law's memo."""
        r, memo = self.bound.evaluate(theta, rows)
        if self.objective == "huber_log":
            cost = F.huber_loss(r, torch.zeros_like(r), reduction="none", delta=self.delta)
        elif self.objective == "lsq_log":
            cost = 0.5 * r * r
        else:
            cost = 0.5 * (self._observed(rows) * r.expm1()) ** 2
        if self.weights is not None:
            cost *= self.weights[rows]
        return cost.sum(1).nan_to_num_(nan=torch.inf), r, memo

    def _observed(self, rows: Tensor) -> Tensor:
        return self.loss if self.loss.ndim == 1 else self.loss[rows]

    def derivatives(self, r: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the objective by each log residual: first, second, and a bound on the second."""
        if self.objective == "huber_log":
            slope = r.clamp(-self.delta, self.delta)
            above = slope / r  # 1 inside the threshold, delta / |r| outside
            above.nan_to_num_(nan=1.0)
            bend = (above == 1).to(r.dtype)
        elif self.objective == "lsq_log":
            slope, bend, above = r, torch.ones_like(r), torch.ones_like(r)
        else:  # (L e^r - L)^2 / 2
            observed = self._observed(rows)
            predicted = observed * r.exp()
            slope, above = (predicted - observed) * predicted, predicted * predicted
            bend = above + slope
        if self.weights is not None:
            w = self.weights[rows]
            slope, bend, above = slope * w, bend * w, above * w
        return slope, bend, above


def solve(
    law: Law,
    inputs: Inputs,
    loss: Float[Tensor, "*P n"],
    starts: Float[Tensor, "P p"],
    *,
    weights: Float[Tensor, "P n"] | None = None,
    objective: Objective = "huber_log",
    delta: float = 1e-3,
    free: Bool[Tensor, " p"] | None = None,
    lower: Float[Tensor, " p"] | None = None,
    upper: Float[Tensor, " p"] | None = None,
    max_iterations: int = 300,
    tolerance: float = 1e-11,
) -> Solution:
    """Minimise P problems from P starting points.

    Args:
        law: the formula.
        inputs: a tensor for each name in ``law.inputs``, (n,) if all problems share it, or (P, n).
        loss: observed, positive; (n,) or (P, n).
        starts: ``theta`` to begin at.
        weights: of rows, not negative; 0 leaves a row out, a count repeats it.
        objective: "huber_log" (Huber of the log residual), "lsq" (half its square), "lsq_log".
        delta: threshold of Huber's function.
        free: which parameters move; the rest stay at their start.
        lower: bounds on ``theta``.
        upper: bounds on ``theta``.
        max_iterations: of any problem.
        tolerance: a problem stops when the decrease its model promises is below ``tolerance`` times
            its objective (or 1e-16 a row), and so is the change.

    Raises:
        ValueError: shapes do not fit, or an option has no such value.
    """
    checks.one_of(objective, OBJECTIVES, "objective")
    checks.positive(delta, "delta")
    if starts.ndim != 2 or starts.shape[1] != law.p:
        raise ValueError(f"starts: expected shape (P, {law.p}), got {tuple(starts.shape)}")
    theta = starts.to(torch.float64)
    columns = {name: inputs[name].to(theta) for name in law.inputs}
    log_loss = loss.to(theta).log()
    n, many = log_loss.shape[-1], len(theta)
    for name, values in {**columns, "loss": log_loss, "weights": weights}.items():
        if values is not None and tuple(values.shape) not in ((n,), (many, n)):
            raise ValueError(f"{name}: expected ({n},) or ({many}, {n}), got {tuple(values.shape)}")
    if weights is not None:
        weights = weights.to(theta).expand(many, n)
    if any(x.ndim == 2 for x in columns.values()):
        columns = {name: x.expand(many, n) for name, x in columns.items()}
    every = torch.arange(many, device=theta.device)
    problem = _Problem(
        law.bind(columns, log_loss),
        log_loss.exp(),
        weights,
        objective,
        float(delta),
        theta.new_ones(law.p, dtype=torch.bool) if free is None else free.to(theta.device),
        theta.new_full((law.p,), -torch.inf) if lower is None else lower.to(theta),
        theta.new_full((law.p,), torch.inf) if upper is None else upper.to(theta),
    )
    width = max(1, WIDTH // n)
    return _newton(problem, theta, every, width, 1e-16 * n, max_iterations, tolerance)


class _Running:
    """The problems under way, compacted as some end and filled up with those that wait."""

    def __init__(self, problem: _Problem, start: Tensor, rows: Tensor) -> None:
        value, r, memo = problem.evaluate(start, rows)
        self.rows, self.theta, self.value, self.r, self.memo = rows, start, value, r, memo
        self.damping = torch.full_like(value, 1e-2)
        self.steps, self.idle = torch.zeros_like(rows), torch.zeros_like(rows)

    _first = ("rows", "theta", "value", "r", "damping", "steps", "idle")

    def keep(self, which: Tensor) -> None:
        for name in self._first:
            setattr(self, name, getattr(self, name)[which])
        self.memo = self.memo[:, which]

    def join(self, other: _Running) -> None:
        for name in self._first:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        self.memo = torch.cat([self.memo, other.memo], 1)


def _descend(problem: _Problem, now: _Running, step: Tensor) -> Tensor:
    """Move along the step, or a share of it where the whole leads uphill; returns the share.

    Problems for which no share leads down stay where they are (share 0).
    """
    trial = (now.theta + step).clamp(problem.lower, problem.upper)
    value, r, memo = problem.evaluate(trial, now.rows)
    better = value < now.value
    share = better.to(step.dtype)
    if bool(better.all()):
        now.theta, now.value, now.r, now.memo = trial, value, r, memo
        return share
    left = (~better).nonzero()[:, 0]
    for part in SHARES:
        shorter = (now.theta[left] + part * step[left]).clamp(problem.lower, problem.upper)
        v, r_part, memo_part = problem.evaluate(shorter, now.rows[left])
        down = v < now.value[left]
        rows = left[down]
        trial[rows], value[rows], r[rows] = shorter[down], v[down], r_part[down]
        memo[:, rows] = memo_part[:, down]
        share[rows] = part
        left = left[~down]
        if not len(left):
            break
    trial[left], value[left], r[left] = now.theta[left], now.value[left], now.r[left]
    memo[:, left] = now.memo[:, left]
    now.theta, now.value, now.r, now.memo = trial, value, r, memo
    return share


def _newton(
    problem: _Problem,
    start: Tensor,
    every: Tensor,
    width: int,
    floor: float,
    max_iterations: int,
    tolerance: float,
) -> Solution:
    """Each problem to its end, at most ``width`` at a time."""
    best = start.clamp(problem.lower, problem.upper)
    lowest = best.new_full((len(best),), torch.inf)
    steps, converged = torch.zeros_like(every), torch.zeros_like(every, dtype=torch.bool)
    now = _Running(problem, best[:width], every[:width])
    waiting = width
    while len(now.rows) or waiting < len(every):
        if len(now.rows) <= width // 2 and waiting < len(every):
            more = slice(waiting, waiting + width - len(now.rows))
            now.join(_Running(problem, best[more], every[more]))
            waiting = more.stop
        step, slope = _step(problem, now.theta, now.r, now.memo, now.rows, now.damping)
        before = now.value
        share = _descend(problem, now, step)
        fall = before - now.value
        gain = fall / (-0.5 * slope).clamp(min=1e-300)  # against the damped model's minimum
        factor = torch.where(gain > 0.75, 0.1, torch.where(gain > 0.25, 0.5, 2.0))
        factor = torch.where(share < 1, 2 / share.clamp(min=0.01), factor)
        now.damping = (now.damping * factor).clamp(min=1e-9)
        now.steps = now.steps + 1
        small = tolerance * now.value + floor
        done = (-0.5 * slope <= small) & (fall <= small)
        done |= (now.damping > 1e14) | ~now.value.isfinite()
        now.idle = torch.where(fall <= STALLED * before, now.idle + 1, 0)
        ended = done | (now.idle >= PATIENCE) | (now.steps >= max_iterations)
        if bool(ended.any()):
            rows = now.rows[ended]
            best[rows], lowest[rows] = now.theta[ended], now.value[ended]
            steps[rows], converged[rows] = now.steps[ended], done[ended]
            now.keep(~ended)
    return Solution(best, lowest, converged & lowest.isfinite(), steps)


def _step(
    problem: _Problem, theta: Tensor, r: Tensor, memo: Tensor, rows: Tensor, lam: Tensor
) -> tuple[Tensor, Tensor]:
    """The damped step per problem and its slope; what is held or at a bound does not move."""
    slope, bend, above = problem.derivatives(r, rows)
    weight = torch.addcmul(bend, lam[:, None], above)
    g, damped = problem.bound.normal(theta, memo, rows, slope, weight)
    free = problem.free & ~((theta <= problem.lower) & (g > 0))
    free &= ~((theta >= problem.upper) & (g < 0))
    mask = free.to(theta.dtype)
    both = mask[:, :, None] * mask[:, None, :]
    held = 1 - mask
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal += (
        RIDGE * lam[:, None].clamp(max=1) * diagonal.abs()
        + 1e-14 * diagonal.amax(1, keepdim=True)
        + 1e-30
    )
    damped = damped * both + torch.diag_embed(held)
    factor, info = torch.linalg.cholesky_ex(damped)
    bad = (info > 0).nonzero()[:, 0]
    if len(bad):  # the true curvature is not positive here: step in the quadratic above
        safe = problem.bound.gram(theta[bad], memo[:, bad], rows[bad], above[bad])
        safe *= 1 + lam[bad, None, None]
        diagonal = safe.diagonal(dim1=1, dim2=2)
        diagonal += RIDGE * diagonal + 1e-14 * diagonal.amax(1, keepdim=True) + 1e-30
        safe = safe * both[bad] + torch.diag_embed(held[bad])
        factor[bad] = torch.linalg.cholesky_ex(safe)[0]
    step = torch.cholesky_solve(-(g * mask)[..., None], factor)[..., 0].nan_to_num_(0.0, 0.0, 0.0)
    step *= (STRIDE / step.abs().amax(1, keepdim=True)).clamp(max=1)
    if problem.bounded:
        step = _within(problem, theta, step, g * mask, factor)
    return step, (g * step).sum(1)


def _within(problem: _Problem, theta: Tensor, step: Tensor, g: Tensor, factor: Tensor) -> Tensor:
    """What would cross a bound goes just to it; the rest takes the best step beside that."""
    low, high = problem.lower - theta, problem.upper - theta
    crossing = (step < low) | (step > high)
    if not bool(crossing.any()):
        return step
    to_bound = torch.where(crossing, step.clamp(low, high), 0.0)
    hessian = factor @ factor.mT
    mask = (~crossing).to(theta.dtype)
    inner = hessian * mask[:, :, None] * mask[:, None, :] + torch.diag_embed(1 - mask)
    pull = (g + (hessian @ to_bound[..., None])[..., 0]) * mask
    rest = torch.linalg.solve(inner, -pull)
    rest *= (STRIDE / rest.abs().amax(1, keepdim=True)).clamp(max=1)
    return (to_bound + rest).clamp(low, high)


def best_of(
    law: Law,
    inputs: Inputs,
    loss: Float[Tensor, " n"],
    starts: Float[Tensor, "m p"],
    *,
    weights: Float[Tensor, "Q n"] | None = None,
    **options: object,
) -> Solution:
    """For each of Q weightings of the same rows, the best minimum over m starts.

    Without ``weights`` there is one problem. ``options`` are those of `solve`.
    """
    q, m = 1 if weights is None else len(weights), len(starts)
    many = starts.repeat(q, 1)
    each = None if weights is None else weights.repeat_interleave(m, 0)
    found = solve(law, inputs, loss, many, weights=each, **options)  # type: ignore[arg-type]
    best = found.objective.view(q, m).argmin(1) + torch.arange(q, device=many.device) * m
    return found.at(best)
