"""Which parameters of a fit the data cannot tell apart."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.scaling_laws.laws import Inputs, Law

SINGULAR = 1e-9  # smallest eigenvalue of the scaled information matrix
NAMED = 0.25  # entries of its eigenvector that count
FLAT = 1e-6  # a parameter whose unit change moves no log loss by more than this


def confounded(
    law: Law, inputs: Inputs, loss: Tensor, theta: Tensor, free: Tensor
) -> tuple[str, ...]:
    """Names of free parameters along which the predictions do not change; empty when identified.

    With J the gradient of ln L at each row, J^T J scaled to a unit diagonal is singular where a
    combination of parameters has no effect on any run; a term that vanished leaves columns of J
    that are zero.
    """
    rows = torch.zeros(1, dtype=torch.long, device=theta.device)
    _, gradient, *_ = law.bind(inputs).expand(theta[None], rows)
    columns = gradient[0][free.to(theta.device)]
    names = [q for q, moves in zip(law.parameters, free.tolist(), strict=True) if moves]
    size = columns.norm(dim=1) / loss.shape[-1] ** 0.5
    flat = size < FLAT
    if bool(flat.any()):
        return tuple(q for q, dead in zip(names, flat.tolist(), strict=True) if dead)
    scaled = columns / columns.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(scaled @ scaled.T)
    weak = vectors[:, values < SINGULAR].abs().amax(1) if bool((values < SINGULAR).any()) else None
    if weak is None:
        return ()
    return tuple(q for q, w in zip(names, weak.tolist(), strict=True) if w > NAMED)
