"""The loss landscape around a network: slices, zoom, profile along a line, refined while you look.

`explore(model, loss_fn, data)` is what a reader calls; `LandscapeExplorer` is what it returns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from workbench.lab import checks
from workbench.loss_landscapes.figures_explorer import LandscapeExplorer
from workbench.loss_landscapes.figures_field import Landscape, Slice
from workbench.loss_landscapes.figures_planes import Planes
from workbench.loss_landscapes.geometry import Objective, trajectory_directions
from workbench.plots import display

KINDS = ("filter", "layer", "adaptive", None)


def explore(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Any,
    *,
    directions: tuple[Any, Any] | None = None,
    trajectory: Any = None,
    eigen: bool = True,
    normalize: Sequence[str | None] = ("filter", "layer"),
    draws: int = 3,
    radius: float = 1.0,
    points: int = 49,
    seed: int = 0,
    batch_norm: str = "frozen",
    inputs: int | list[str] = 1,
    surface: bool = True,
    background: bool | None = None,
    **state: Any,
) -> LandscapeExplorer:
    r"""Look at $L(\theta+a\,d_1+b\,d_2)$ around a network, refined in the background as you look.

    The first panel shows the whole plane. Drag the centre and the rim of the zoomed view, and both
    ends of a line; its profile is drawn below, with the parabola of slope and curvature at the
    point of the line nearest to the centre. A first coarse picture is there within a second for a
    network of 100,000 parameters on 1,000 samples; one thread then evaluates what is being looked
    at: the line, the zoomed view, the plane.

    Args:
        model: any ``nn.Module``; a copy of it is moved, it is never touched.
        loss_fn: ``loss_fn(model(x), y)``, the mean over the batch; see `Objective`.
        data: tensors ``(x, y, ...)`` or a loader that can be gone through again.
        directions: two directions of your own, drawn as they are: vectors (D,), mappings or lists
            of tensors.
        trajectory: checkpoints of training, ``state_dict``s, models or vectors, at least three:
            adds the plane that holds most of their path, moved and scaled so that the path fits.
        eigen: add the plane of the two leading eigenvectors of the Hessian, made as long as the
            weights; they are computed when first chosen.
        normalize: kinds of random directions, of "filter", "layer", "adaptive" and None.
        draws: pairs of random directions of each kind.
        radius: half the side of the plane, in lengths of the directions.
        points: nodes a side of each plane's grid when it is complete.
        seed: of the first draw; the next ones count up.
        batch_norm: "frozen", "batch" or "reestimate"; see `Objective`.
        inputs: how many leading entries of a batch the model takes, or their names.
        surface: draw the zoomed view in three dimensions, at most twice a page; otherwise contours.
        background: evaluate in a thread. Otherwise every plane is evaluated completely before this
            returns, and Ctrl-C keeps what there is. None: in the background where a front end is
            attached.
        state: where the controls start: ``plane`` ("filter", "layer", "adaptive", "none",
            "eigenvectors", "trajectory", "given"), ``draw``, ``a``, ``b``, ``zoom``, ``log``,
            ``a0``, ``b0``, ``a1``, ``b1``.

    Returns:
        The explorer: `.show()` it; `.to_frame()` or `.save("losses.csv")` what was evaluated;
        `.close()` ends its thread.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it.

    Reference:
        H. Li et al. (2018), arXiv:1712.09913 (filter normalisation, training paths); Z. Yao et al.
        (2020), arXiv:1912.07145 (eigenvectors as axes).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if data is None:
        raise ValueError(
            "data: expected tensors or a loader; a closure would run your model, not the copy of "
            "it that is moved"
        )
    kinds = [str(checks.one_of(kind, KINDS, "normalize")).lower() for kind in normalize]
    checks.count(draws, "draws")
    moved = copy.deepcopy(getattr(model, "_orig_mod", model))
    objective = Objective(moved, loss_fn, data, inputs=inputs, batch_norm=batch_norm)
    planes = Planes(objective, checks.positive(radius, "radius"), seed)
    makers: dict[str, Callable[[], Slice]] = {
        f"{kind} {draw}": lambda kind=kind, draw=draw: planes.random(kind, draw)  # type: ignore[misc]
        for kind in kinds
        for draw in range(1, draws + 1)
    }
    if directions is not None:
        first, second = (planes.vector(d, f"directions[{i}]") for i, d in enumerate(directions))
        makers["given"] = lambda: planes.span("the given directions", first, second)
    if trajectory is not None:
        path = trajectory_directions(objective, trajectory)
        makers["trajectory"] = lambda: planes.trajectory(path)
    if eigen:
        makers["eigenvectors"] = planes.eigenvectors
    if not makers:
        raise ValueError("normalize: no plane is left; expected a kind of random direction")
    return explore_planes(
        makers, radius=radius, points=points, surface=surface, background=background, **state
    )


def explore_planes(
    makers: Mapping[str, Callable[[], Slice]],
    *,
    radius: float = 1.0,
    points: int = 49,
    surface: bool = True,
    background: bool | None = None,
    **state: Any,
) -> LandscapeExplorer:
    """The same explorer over any functions of two numbers.

    Args:
        makers: a function for each plane that makes it; keys such as "filter 1" and "filter 2" are
            draws of one kind.
        radius, points, surface, background, state: as in `explore`.
    """
    if checks.count(points, "points") < 5:
        raise ValueError(f"points: expected at least 5 a side, got {points}")
    landscape = Landscape(
        makers,
        radius=checks.positive(radius, "radius"),
        points=points,
        background=display.attached() if background is None else background,
    )
    explorer = LandscapeExplorer.over(landscape, surface=surface)
    explorer.set(**state)
    plane = explorer.plane()
    landscape.begin(plane)
    if "log" not in state:
        explorer.set(log=_steep(landscape.square(plane).loss))
    if not landscape.background:
        landscape.finish()
    return explorer


def _steep(loss: np.ndarray) -> bool:
    """Whether a few high walls would leave no colours for the rest."""
    low, middle, high = np.quantile(loss, [0.0, 0.5, 1.0])
    return bool(low > 0 and (middle > 20 * low or high > 100 * low))
