"""Directions in parameter space: random ones in the weights' scale, and a trajectory's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.lab import checks
from workbench.loss_landscapes.geometry.objective import Objective
from workbench.loss_landscapes.geometry.parameters import Parameters

NORMALIZE = ("filter", "layer", "adaptive", None)


@dataclass(frozen=True)
class Plane:
    """Two directions through an origin, with the path that they were made from.

    Attributes:
        origin: (D,), the point (0, 0).
        d1, d2: (D,), of unit length and orthogonal.
        coordinates: (t, 2), the checkpoints projected onto the plane.
        explained: (2,), share of the path's variance about the origin along each direction.
    """

    origin: Float[Tensor, " D"]
    d1: Float[Tensor, " D"]
    d2: Float[Tensor, " D"]
    coordinates: np.ndarray
    explained: np.ndarray


def random_direction(
    objective: Objective | Parameters,
    *,
    normalize: str | None = "filter",
    center: Any = None,
    generator: torch.Generator | int | None = None,
) -> Float[Tensor, " D"]:
    r"""A Gaussian direction in the scale of the weights.

    A ReLU network computes the same function when one unit's incoming weights are multiplied by c
    and its outgoing ones divided by it, so a step of fixed length means little. "filter" gives
    each filter the length of its weights, $d_j\leftarrow d_j\,\|\theta_j\|/\|d_j\|$, where j runs
    over the first axis of each weight of two or more axes (output units, kernels, rows of a table).

    Args:
        objective: whose parameters (a `Parameters` will do).
        normalize: "filter"; "layer", one length a tensor; "adaptive", every entry in the scale of
            its own weight, $d_i\leftarrow d_i|\theta_i|$; None, plain Gaussian. Biases and
            normalisation parameters (tensors of one axis or none) get 0, except with None.
        center: the point whose scale counts; default the present parameters.
        generator: of the draw; a seed will do.

    Reference: Li et al. (2018), arXiv:1712.09913, section 4; "adaptive" after Kwon et al. (2021),
        arXiv:2102.11600.
    """
    parameters = _parameters(objective)
    checks.one_of(normalize, NORMALIZE, "normalize")
    source = checks.as_generator(generator)
    draw = torch.randn(parameters.size, generator=source, dtype=parameters.dtype)
    draw = draw.to(parameters.device)
    if normalize is None:
        return draw
    theta = parameters.theta if center is None else parameters.vector(center, "center")
    pairs = zip(parameters.split(draw), parameters.split(theta), strict=True)
    return parameters.join([_scaled(d, weight, normalize) for d, weight in pairs])


def _scaled(d: Tensor, weight: Tensor, normalize: str) -> Tensor:
    if weight.ndim < 2:
        return torch.zeros_like(d)
    if normalize == "adaptive":
        return d * weight.abs()
    axes = tuple(range(1 if normalize == "filter" else 0, weight.ndim))
    lengths = [torch.linalg.vector_norm(t, dim=axes, keepdim=True) for t in (weight, d)]
    return d * (lengths[0] / lengths[1].clamp_min(torch.finfo(d.dtype).tiny))


def filter_normalized_direction(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """`random_direction` with filter normalisation, as tensors by parameter name."""
    parameters = Parameters(model)
    direction = random_direction(parameters, generator=seed)
    return dict(zip(parameters.names, parameters.split(direction), strict=True))


def random_plane(
    objective: Objective | Parameters,
    *,
    normalize: str | None = "filter",
    center: Any = None,
    generator: torch.Generator | int | None = None,
) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Two random directions, the second drawn after the first; in many dimensions they are nearly
    orthogonal, and they are left as drawn, so that each keeps its filters' lengths."""
    source = checks.as_generator(generator)
    first, second = (
        random_direction(objective, normalize=normalize, center=center, generator=source)
        for _ in range(2)
    )
    return first, second


def trajectory_directions(
    objective: Objective | Parameters,
    checkpoints: Float[Tensor, "t D"] | Sequence[Any],
    *,
    origin: Any = None,
) -> Plane:
    """The plane that holds most of a training trajectory: PCA of its checkpoints about the last.

    Args:
        objective: whose parameters (a `Parameters` will do).
        checkpoints: at least three: vectors (D,), ``state_dict``s or models, in order of time.
        origin: centre of the plane; default the last checkpoint, as in the paper.

    Raises:
        ValueError: fewer than three checkpoints, or they do not differ.

    Reference: Li et al. (2018), arXiv:1712.09913, section 7.
    """
    parameters = _parameters(objective)
    rows = torch.stack(list(_vectors(parameters, checkpoints)))
    if len(rows) < 3:
        raise ValueError(f"checkpoints: expected at least 3, got {len(rows)}")
    start = rows[-1] if origin is None else parameters.vector(origin, "origin")
    steps = (rows - start).double()
    # The Gram matrix is t x t, however many parameters there are.
    values, vectors = torch.linalg.eigh(steps @ steps.T)
    values, vectors = values.flip(0)[:2], vectors.flip(1)[:, :2]
    if not float(values[1]) > 1e-14 * float(values[0]):
        raise ValueError("checkpoints: lie on a line (or do not differ); expected a plane of them")
    axes = (steps.T @ vectors) / values.sqrt()
    axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)  # a sign that does not depend on LAPACK
    total = steps.square().sum()
    return Plane(
        origin=start,
        d1=axes[:, 0].to(parameters.dtype),
        d2=axes[:, 1].to(parameters.dtype),
        coordinates=(steps @ axes).cpu().numpy(),
        explained=(values / total).cpu().numpy(),
    )


def _vectors(parameters: Parameters, checkpoints: Iterable[Any]) -> Iterable[Tensor]:
    for i, checkpoint in enumerate(checkpoints):
        yield parameters.vector(checkpoint, f"checkpoints[{i}]")


def _parameters(objective: Objective | Parameters) -> Parameters:
    return objective if isinstance(objective, Parameters) else objective.parameters
