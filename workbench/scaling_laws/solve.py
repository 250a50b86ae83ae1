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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.lab import checks
from workbench.scaling_laws.laws import Bound, Inputs, Law

Objective: TypeAlias = Literal["huber_log", "lsq", "lsq_log"]
OBJECTIVES: tuple[Objective, ...] = ("huber_log", "lsq", "lsq_log")
STRIDE = 5.0  # no parameter moves further in one step: a term that vanished may come back
CHUNK = 1_500_000  # numbers in one array of a batch; larger batches are solved in turn


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
    log_loss: Tensor  # (n,) or (P, n)
    weights: Tensor | None  # (P, n)
    objective: Objective
    delta: float
    free: Tensor  # (p,) bool
    lower: Tensor  # (p,)
    upper: Tensor  # (p,)

    def _observed(self, rows: Tensor) -> Tensor:
        return self.log_loss if self.log_loss.ndim == 1 else self.log_loss[rows]

    def _residual(self, ell: Tensor, rows: Tensor) -> Tensor:
        observed = self._observed(rows)
        return ell.exp() - observed.exp() if self.objective == "lsq" else ell - observed

    def _sum(self, values: Tensor, rows: Tensor) -> Tensor:
        return (values if self.weights is None else values * self.weights[rows]).sum(1)

    def value(self, theta: Tensor, rows: Tensor) -> Tensor:
        r = self._residual(self.bound.log_loss(theta, rows), rows)
        if self.objective == "huber_log":
            size = r.abs()
            small = size.clamp(max=self.delta)
            cost = small * (size - 0.5 * small)
        else:
            cost = 0.5 * r * r
        return self._sum(cost, rows).nan_to_num(nan=torch.inf)

    def model(self, theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient (P, p), Hessian (P, p, p), and the reweighted Gauss-Newton matrix."""
        ell, gradient, second, gram = self.bound.expand(theta, rows)
        r = self._residual(ell, rows)
        if self.objective == "huber_log":
            size = r.abs()
            slope = r.clamp(-self.delta, self.delta)
            bend = (size <= self.delta).to(r.dtype)
            above = self.delta / size.clamp(min=self.delta)
        elif self.objective == "lsq_log":
            slope, bend, above = r, torch.ones_like(r), torch.ones_like(r)
        else:  # r = exp(ell) - L: dr = L_hat, d2r = L_hat
            predicted = ell.exp()
            slope, above = r * predicted, predicted * predicted
            bend = above + slope
        if self.weights is not None:
            w = self.weights[rows]
            slope, bend, above = slope * w, bend * w, above * w
        g = (gradient @ slope[..., None])[..., 0]
        hessian = (gradient * (bend - gram * slope)[:, None]) @ gradient.mT + second(slope)
        upper = (gradient * above[:, None]) @ gradient.mT
        return g, hessian, upper


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
            its objective (or 1e-16 a row), twice.

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
    per_chunk = max(1, CHUNK // (n * law.p))
    parts = []
    for rows in torch.arange(many, device=theta.device).split(per_chunk):
        picked = {name: x if x.ndim == 1 else x[rows] for name, x in columns.items()}
        problem = _Problem(
            law.bind(picked),
            log_loss if log_loss.ndim == 1 else log_loss[rows],
            None if weights is None else weights[rows],
            objective,
            float(delta),
            theta.new_ones(law.p, dtype=torch.bool) if free is None else free.to(theta.device),
            theta.new_full((law.p,), -torch.inf) if lower is None else lower.to(theta),
            theta.new_full((law.p,), torch.inf) if upper is None else upper.to(theta),
        )
        parts.append(_newton(problem, theta[rows], n, max_iterations, tolerance))
    return Solution(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _newton(
    problem: _Problem, start: Tensor, n: int, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    theta = start.clamp(problem.lower, problem.upper)
    every = torch.arange(len(theta), device=theta.device)
    value = problem.value(theta, every)
    damping = torch.full_like(value, 1e-2)
    growth = torch.full_like(value, 4.0)
    calm = torch.zeros_like(every)
    iterations = torch.zeros_like(every)
    converged = torch.zeros_like(every, dtype=torch.bool)
    active = every[value.isfinite()]
    floor = 1e-16 * n
    for _ in range(max_iterations):
        if not len(active):
            break
        now, v, lam = theta[active], value[active], damping[active]
        g, hessian, upper = problem.model(now, active)
        step = _within(problem, now, _step(problem, now, g, hessian, upper, lam))
        promised = -(g * step).sum(1) - 0.5 * torch.einsum("pi,pij,pj->p", step, hessian, step)
        trial = (now + step).clamp(problem.lower, problem.upper)
        reached = problem.value(trial, active)
        better = reached < v
        theta[active[better]] = trial[better]
        value[active[better]] = reached[better]
        iterations[active] += 1
        gain = (v - reached) / promised.abs().clamp(min=1e-300)
        shrink = torch.where(gain > 0.75, 0.2, torch.where(gain > 0.25, 0.7, 1.5))
        g_up = growth[active]
        damping[active] = torch.where(better, (lam * shrink).clamp(min=1e-9), lam * g_up)
        growth[active] = torch.where(better, torch.full_like(g_up, 4.0), g_up * 2)
        small = (v - reached.minimum(v)) <= tolerance * v + floor
        small &= (promised.abs() <= 10 * tolerance * v + floor) | (lam > 1e12)
        calm[active] = torch.where(small, calm[active] + 1, 0)
        done = (calm[active] >= 2) | (lam > 1e14)
        converged[active[done]] = True
        active = active[~done]
    return theta, value, converged, iterations


def _step(
    problem: _Problem, theta: Tensor, g: Tensor, hessian: Tensor, upper: Tensor, lam: Tensor
) -> Tensor:
    """The damped step per problem; what is held or pressed against a bound does not move."""
    free = problem.free & ~((theta <= problem.lower) & (g > 0))
    free &= ~((theta >= problem.upper) & (g < 0))
    mask = free.to(theta.dtype)
    both = mask[:, :, None] * mask[:, None, :]
    pinned = torch.diag_embed(1 - mask)
    scale = upper.diagonal(dim1=1, dim2=2)
    ridge = torch.diag_embed(1e-4 * scale + 1e-30)
    metric = upper + ridge
    damped = (hessian + lam[:, None, None] * metric) * both + pinned
    factor, info = torch.linalg.cholesky_ex(damped)
    bad = info > 0
    if bad.any():  # the true curvature is not positive here: step in the quadratic above
        safe = ((1 + lam[:, None, None]) * metric * both + pinned)[bad]
        safe = safe + torch.diag_embed(1e-12 * safe.diagonal(dim1=1, dim2=2))
        factor[bad] = torch.linalg.cholesky_ex(safe)[0]
    rhs = -(g * mask)[..., None]
    step = torch.cholesky_solve(rhs, factor)[..., 0]
    step = step.nan_to_num(0.0, 0.0, 0.0)
    return step * (STRIDE / step.abs().amax(1, keepdim=True)).clamp(max=1)


def _within(problem: _Problem, theta: Tensor, step: Tensor) -> Tensor:
    """The step, shortened to where it first meets a bound."""
    room = torch.where(step > 0, problem.upper - theta, problem.lower - theta)
    share = torch.where(step == 0, torch.inf, room / step).amin(1, keepdim=True)
    return step * share.clamp(0, 1)


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
