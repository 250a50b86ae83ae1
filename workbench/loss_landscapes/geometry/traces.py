r"""Trace of the Hessian from products with random vectors."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from workbench.lab import checks
from workbench.lab.progress import Progress
from workbench.loss_landscapes.geometry.estimates import Estimate
from workbench.loss_landscapes.geometry.operators import operator

BLOCK = 8  # random vectors multiplied together


class Trace(Estimate):
    """Trace of a Hessian: ``value``, standard ``error``, ``draws`` and their ``samples``."""


def trace(
    obj: Any,
    draws: int = 100,
    *,
    tol: float = 1e-3,
    theta: Tensor | None = None,
    generator: torch.Generator | int | None = None,
    size: int | None = None,
) -> Trace:
    r"""Trace of the Hessian, Hutchinson's estimate: $\mathrm{tr}H=E\,v^THv$ for random signs v.

    The variance of a draw is $2(\|H\|_F^2-\sum_iH_{ii}^2)$. Draws end early, at 16 or later, once
    the standard error is below ``tol`` of the estimate. (Released code that compares two successive
    means stops by chance: they differ by 1/draws of a sample in any case.)

    Args:
        obj: an `Objective`, an object with ``hvp`` and ``size``, or a function (with ``size``).
        draws: most random vectors, a product each.
        tol: relative standard error at which to stop; 0 makes all draws.
        theta: where; default at the model's present parameters.
        generator: of the random vectors.
        size: D, for a function.

    Returns:
        `Trace` with its standard error (NaN for a single draw).

    Raises:
        TypeError, ValueError: an argument is out of range, or H v is not finite.

    Reference:
        M. Hutchinson, Commun. Stat. Simul. Comput. 18 (1989); Z. Yao et al., 2019,
        arXiv:1912.07145, Algorithm 2.
    """
    draws, tol = checks.count(draws, "draws"), checks.positive(tol, "tol", zero=True)
    rng = checks.as_generator(generator)
    samples: list[float] = []
    with operator(obj, theta, size) as H, Progress("trace", draws) as bar:
        with contextlib.suppress(KeyboardInterrupt):
            while len(samples) < draws:
                V = H.signs(rng, min(BLOCK, draws - len(samples)))
                samples += _forms(V, H(V))
                bar.step(len(V))
                if len(samples) >= 2 * BLOCK and Trace.of(samples).within(tol):
                    return Trace.of(samples)
        return Trace.of(samples, complete=len(samples) == draws)


def trace_hutchpp(
    obj: Any,
    products: int = 99,
    *,
    theta: Tensor | None = None,
    generator: torch.Generator | int | None = None,
    size: int | None = None,
) -> Trace:
    r"""Trace of the Hessian by Hutch++: the large eigenvalues exactly, the rest by draws.

    With Q an orthonormal basis of H S for a third of the products' random signs S,
    $$\mathrm{tr}H=\mathrm{tr}(Q^THQ)+E\,v^T(I-QQ^T)H(I-QQ^T)v,$$
    whose variance no longer holds the leading directions. Better than `trace` for a Hessian with a
    few large eigenvalues, the usual case; it holds ``products``/3 vectors of length D in memory.

    Args:
        obj: an `Objective`, an object with ``hvp`` and ``size``, or a function (with ``size``).
        products: Hessian-vector products; a third each for S, Q and v.
        theta: where; default at the model's present parameters.
        generator: of the random vectors.
        size: D, for a function.

    Returns:
        `Trace`; ``samples`` hold the known part plus each draw of the rest. Where Q spans the
        whole space, the trace is exact and its error 0.

    Raises:
        TypeError, ValueError: an argument is out of range, or H v is not finite.

    Reference:
        R. Meyer, C. Musco, C. Musco, D. Woodruff, 2020, arXiv:2010.09649, Algorithm 1.
    """
    third = checks.count(products, "products", minimum=6) // 3
    rng = checks.as_generator(generator)
    with operator(obj, theta, size) as H, Progress("trace", 3 * third) as bar:
        Y = H(H.signs(rng, min(third, H.size)))
        Q = torch.linalg.qr(Y.T).Q.T
        bar.step(third)
        known = sum(_forms(Q, H(Q)))
        bar.step(third)
        if len(Q) == H.size:
            return Trace.of([known, known])
        samples: list[float] = []
        with contextlib.suppress(KeyboardInterrupt):
            while len(samples) < third:
                V = H.signs(rng, min(BLOCK, third - len(samples)))
                V = V - (V @ Q.T) @ Q
                samples += [known + rest for rest in _forms(V, H(V))]
                bar.step(len(V))
        return Trace.of(samples, complete=len(samples) == third)


def _forms(V: Tensor, HV: Tensor) -> list[float]:
    """v^T H v for every row, summed in float64."""
    return [float(v.double() @ w.double()) for v, w in zip(V, HV, strict=True)]
