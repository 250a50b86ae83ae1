r"""Curvature of a loss: leading eigenpairs, trace and spectrum of the Hessian.

All functions take an `Objective`, or anything with ``hvp(v)`` and ``size``, or a function v -> H v
with ``size=``; all that they ask of the Hessian are products with vectors. Ctrl-C ends a
computation early and returns what is known by then, marked by ``complete == False``.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.lab import checks
from workbench.lab.progress import Progress
from workbench.loss_landscapes.geometry.density import Density, Quadrature, Smoothing
from workbench.loss_landscapes.geometry.lanczos import Key, Lanczos
from workbench.loss_landscapes.geometry.operators import Operator, operator
from workbench.loss_landscapes.geometry.traces import Trace, trace, trace_hutchpp

__all__ = [
    "Density",
    "Eigs",
    "Spectrum",
    "Trace",
    "spectral_density",
    "spectrum",
    "top_eigs",
    "trace",
    "trace_hutchpp",
]

MEMORY = 2**30  # bytes of basis vectors beyond which Lanczos is restarted
_ORDERS: dict[str, Key] = {
    "largest": lambda values: values,
    "smallest": lambda values: -values,
    "magnitude": np.abs,
}


@dataclass(frozen=True)
class Eigs:
    """Eigenpairs of a Hessian, the wanted end of the spectrum first.

    Attributes:
        values: (k,), float64.
        vectors: (k, D), orthonormal rows.
        residuals: (k,): norms of H u - value u. Each value lies within its residual of an
            eigenvalue, much nearer (residual^2 / gap) if the next eigenvalue is well apart.
        products: Hessian-vector products spent.
        complete: whether every residual is within the tolerance.
    """

    values: Float[np.ndarray, " k"]
    vectors: Float[Tensor, "k D"]
    residuals: Float[np.ndarray, " k"]
    products: int
    complete: bool


@dataclass(frozen=True)
class Spectrum:
    """Both ends of one Lanczos run: leading eigenpairs and density."""

    eigs: Eigs
    density: Density


def top_eigs(
    obj: Any,
    k: int = 1,
    *,
    which: str = "largest",
    tol: float = 1e-3,
    steps: int = 1000,
    room: int | None = None,
    theta: Tensor | None = None,
    generator: torch.Generator | int | None = None,
    size: int | None = None,
) -> Eigs:
    r"""Leading eigenpairs of the Hessian by Lanczos with full re-orthogonalisation.

    $$\|Hu-\lambda u\|\le\mathrm{tol}\,|\lambda|$$ for all k pairs ends the run. Lanczos finds the
    optimum over the whole Krylov space where power iteration keeps its last vector, so tens of
    products replace hundreds, and all pairs come from one run. Where the basis outgrows memory it
    is restarted (thick restart). Of an eigenvalue that occurs several times exactly, a Krylov space
    holds one vector; the others come in by rounding, or after the space has closed: ask for
    ``tol=0`` where multiplicity matters.

    Args:
        obj: an `Objective`, an object with ``hvp`` and ``size``, or a function (with ``size``).
        k: how many pairs; at most D.
        which: "largest", "smallest" or largest in "magnitude" (what power iteration finds).
        tol: relative residual asked for, also 0 (to rounding).
        steps: most Hessian-vector products.
        room: basis vectors held in memory; by default 1 GiB of them, from 3 k + 10 to
            max(200, 10 k).
        theta: where; default at the model's present parameters.
        generator: of the start vector.
        size: D, for a function.

    Returns:
        `Eigs`. Its ``complete`` is False if products ran out or Ctrl-C was pressed; residuals say
        how far each pair has come. After Ctrl-C there may be fewer than k.

    Raises:
        TypeError, ValueError: an argument is out of range, or H v is not finite.

    Reference:
        C. Lanczos (1950); K. Wu, H. Simon, SIAM J. Matrix Anal. Appl. 22 (2000).
    """
    key = _ORDERS[checks.one_of(which, _ORDERS, "which")]
    tol, steps = checks.positive(tol, "tol", zero=True), checks.count(steps, "steps")
    rng = checks.as_generator(generator)
    with operator(obj, theta, size) as H:
        k = _pairs(k, H)
        run = Lanczos(H, H.normal(rng), _room(room, k, H))
        complete = False
        with Progress("eigenpairs", k) as bar, contextlib.suppress(KeyboardInterrupt):
            complete = _search(run, k, key, tol, steps, rng, bar)
        return _pick(run, k, key, complete)


def spectral_density(
    obj: Any,
    steps: int = 100,
    draws: int = 1,
    *,
    points: int = 10_000,
    sigma2: float = 1e-5,
    grid: Float[np.ndarray, " g"] | None = None,
    theta: Tensor | None = None,
    generator: torch.Generator | int | None = None,
    size: int | None = None,
) -> Density:
    r"""Density of the Hessian's eigenvalues by stochastic Lanczos quadrature.

    $$\phi(t)=\frac1D\sum_i\delta(t-\lambda_i)\approx\frac1{n_v}\sum_{v}\sum_{j=1}^{m}
    (U^{(v)}_{1j})^2\,\mathcal N(t;\Lambda^{(v)}_j,\sigma^2),\qquad T^{(v)}=U\Lambda U^T$$

    with T the tridiagonal matrix of m Lanczos steps from a random sign vector. The quadrature of a
    draw is exact for polynomials up to degree 2 m - 1. If the start meets only m' < m distinct
    eigenvalues the run ends there and is exact for all functions.

    Args:
        obj: an `Objective`, an object with ``hvp`` and ``size``, or a function (with ``size``).
        steps: m, at most D are made; m vectors of length D are held in memory.
        draws: n_v random vectors.
        points: of the grid, which extends six sigma beyond the outermost nodes.
        sigma2: variance of the Gaussian when the spectrum's range is scaled to 1. Then the picture
            is the same in all units of the loss. (Released code of both references takes the
            variance times max(1, range), which agrees at range 1.)
        grid: positions of your own in place of ``points``.
        theta: where; default at the model's present parameters.
        generator: of the random vectors.
        size: D, for a function.

    Returns:
        `Density`.

    Raises:
        TypeError, ValueError: an argument is out of range, or H v is not finite.

    Reference:
        B. Ghorbani, S. Krishnan, Y. Xiao, 2019, arXiv:1901.10159; Z. Yao et al.,
        PyHessian, 2019, arXiv:1912.07145, Algorithm 3.
    """
    steps, draws = checks.count(steps, "steps"), checks.count(draws, "draws")
    smooth = Smoothing.checked(points, sigma2, grid)
    rng = checks.as_generator(generator)
    with operator(obj, theta, size) as H, Progress("spectrum", steps * draws) as bar:
        found: list[Quadrature] = []
        finished = 0
        with contextlib.suppress(KeyboardInterrupt):
            for _ in range(draws):
                run = Lanczos(H, H.signs(rng), steps)
                _extend(run, steps, found, bar)
                finished += 1
        return smooth(found, draws, finished)


def spectrum(
    obj: Any,
    k: int = 5,
    steps: int = 100,
    draws: int = 1,
    *,
    which: str = "largest",
    tol: float = 1e-3,
    limit: int = 1000,
    points: int = 10_000,
    sigma2: float = 1e-5,
    theta: Tensor | None = None,
    generator: torch.Generator | int | None = None,
    size: int | None = None,
) -> Spectrum:
    """Leading eigenpairs and density from one Lanczos run: for the price of the dearer of the two.

    The first draw's basis serves the quadrature after ``steps`` products and the eigenpairs as soon
    as they have converged, for which it goes on if need be. Arguments as in `top_eigs` (whose
    ``steps`` is ``limit`` here) and `spectral_density`.

    Returns:
        `Spectrum` of `Eigs` and `Density`.

    Raises:
        TypeError, ValueError: an argument is out of range, or H v is not finite.
    """
    key = _ORDERS[checks.one_of(which, _ORDERS, "which")]
    tol, limit = checks.positive(tol, "tol", zero=True), checks.count(limit, "limit")
    steps, draws = checks.count(steps, "steps"), checks.count(draws, "draws")
    smooth = Smoothing.checked(points, sigma2, None)
    rng = checks.as_generator(generator)
    with operator(obj, theta, size) as H, Progress("spectrum", steps * draws) as bar:
        k = _pairs(k, H)
        found: list[Quadrature] = []
        run = Lanczos(H, H.signs(rng), max(steps, _room(None, k, H)))
        finished, complete = 0, False
        with contextlib.suppress(KeyboardInterrupt):
            _extend(run, steps, found, bar)
            finished += 1
            complete = _search(run, k, key, tol, limit, rng)
            for _ in range(draws - 1):
                _extend(Lanczos(H, H.signs(rng), steps), steps, found, bar)
                finished += 1
        return Spectrum(_pick(run, k, key, complete), smooth(found, draws, finished))


# ---- inside


def _pairs(k: int, H: Operator) -> int:
    k = checks.count(k, "k")
    if k > H.size:
        raise ValueError(f"k: expected at most {H.size}, the number of parameters, got {k}")
    return k


def _room(room: int | None, k: int, H: Operator) -> int:
    """Basis vectors to hold."""
    if room is not None:
        return checks.count(room, "room", minimum=2 * k + 3)
    affordable = MEMORY // (H.size * torch.finfo(H.dtype).bits // 8)
    return int(np.clip(affordable, 3 * k + 10, max(200, 10 * k)))


def _extend(run: Lanczos, steps: int, found: list[Quadrature], bar: Progress) -> None:
    """Lanczos up to ``steps`` products; its quadrature goes to ``found``, also when interrupted."""
    try:
        while run.used < steps and not run.closed:
            run.step()
            bar.step()
    finally:
        if run.used:
            found.append(run.quadrature())


def _search(
    run: Lanczos,
    k: int,
    key: Key,
    tol: float,
    steps: int,
    generator: torch.Generator,
    bar: Progress | None = None,
) -> bool:
    """Go on until the k leading pairs have converged; False if the products run out before."""
    while True:
        good = _converged(run, k, key, tol)
        if bar is not None:
            bar.step(max(0, good - bar.done))
        if good == k and _nothing_else(run, k, key, tol):
            return True
        if run.products >= steps:
            return False
        if run.full:
            run.restart((run.room - 1) // 2, key)
        if run.closed:
            run.open(generator)
        run.step()


def _converged(run: Lanczos, k: int, key: Key, tol: float) -> int:
    """How many of the k leading pairs are within the tolerance."""
    if run.used < k:
        return 0
    values, _, residuals = run.ritz()
    best = np.argsort(-key(values), kind="stable")[:k]
    allowed = np.maximum(tol * np.abs(values[best]), run.noise)
    return int(np.count_nonzero(residuals[best] <= allowed))


def _nothing_else(run: Lanczos, k: int, key: Key, tol: float) -> bool:
    """Whether no wanted pair can lie outside the spaces that have been seen.

    After a closed space, another copy of a wanted eigenvalue may; it does not, once the best of the
    next space has converged to something less. Before, Lanczos does not tell.
    """
    if run.closed and run.used == run.H.size:
        return True
    if not run.locked:
        return not run.closed
    inside, wrong = run.fresh()
    top = np.argmax(key(inside))
    known = np.sort(key(np.linalg.eigvalsh(run.T[: run.locked, : run.locked])))[::-1]
    return bool(
        wrong[top] <= max(tol * abs(inside[top]), run.noise)
        and len(known) >= k
        and key(inside)[top] <= known[k - 1] + run.noise
    )


def _pick(run: Lanczos, k: int, key: Key, complete: bool) -> Eigs:
    if not run.used:
        raise KeyboardInterrupt
    values, coefficients, residuals = run.ritz()
    best = np.argsort(-key(values), kind="stable")[:k]
    vectors = run.vectors(coefficients[:, best])
    return Eigs(values[best], vectors, residuals[best], run.products, complete)
