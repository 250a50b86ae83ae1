"""Which parameters of a fit the data cannot tell apart."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.scaling_laws.law import Inputs, Law

SINGULAR = 1e-9  # smallest eigenvalue of the scaled information matrix
NAMED = 0.25  # entries of its eigenvector that count
APART = 0.5  # in theta, between optima of the same objective
FLAT = 1e-6  # a parameter whose unit change moves no log loss by more than this


def confounded(
    law: Law, inputs: Inputs, loss: Tensor, theta: Tensor, equals: Tensor, free: Tensor
) -> tuple[str, ...]:
    """Names of free parameters along which the predictions do not change; empty when identified.

    Starts that end equally low with other parameters say so directly. Beyond that, with J the
    gradient of ln L at each row, J^T J scaled to a unit diagonal is singular where a combination
    of parameters has no effect on any run; a term that vanished leaves columns of J that are zero.

    Args:
        law: the formula.
        inputs: its columns, (n,) each.
        loss: observed, (n,).
        theta: the best optimum, (p,).
        equals: what starts reached that ended as low, (m, p).
        free: which parameters moved, (p,).
    """
    apart = (equals.amax(0) - equals.amin(0) > APART).tolist()
    if any(apart):
        return tuple(q for q, differs in zip(law.parameters, apart, strict=True) if differs)
    rows = torch.zeros(1, dtype=torch.long, device=theta.device)
    bound = law.bind(inputs, loss.log())
    _, memo = bound.evaluate(theta[None], rows)
    moved = free.to(theta.device)
    gram = bound.gram(theta[None], memo, rows, torch.ones_like(loss)[None])[0]
    information = gram[moved][:, moved]
    names = [q for q, moves in zip(law.parameters, free.tolist(), strict=True) if moves]
    size = information.diagonal().sqrt()
    flat = size / loss.shape[-1] ** 0.5 < FLAT
    if bool(flat.any()):
        return tuple(q for q, dead in zip(names, flat.tolist(), strict=True) if dead)
    values, vectors = torch.linalg.eigh(information / size[:, None] / size)
    weak = vectors[:, values < SINGULAR].abs().amax(1) if bool((values < SINGULAR).any()) else None
    if weak is None:
        return ()
    return tuple(q for q, w in zip(names, weak.tolist(), strict=True) if w > NAMED)
