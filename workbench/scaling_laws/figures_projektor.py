"""Explorer of mixtures of three sources, and figures of projected and measured accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.lab import checks
from workbench.plots import escape, theme
from workbench.plots.explorer import (
    Axis,
    Bars,
    Explorer,
    Line,
    Panel,
    Points,
    Readout,
    Slider,
    VLine,
)
from workbench.scaling_laws.projektor import (
    FORMS,
    Projector,
    Stage1,
    Transport,
    project,
    simplex_grid,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]])  # height is the share of the third
NAMES_AT = np.array([[0.0, -0.16], [1.0, -0.16], [0.5, 1.05]])
BARS = np.arange(1, 4)
WIDTH = 0.36
DRAWN = simplex_grid(3, 9)
FINE = simplex_grid(3, 40)
PLANES = 30  # kept, so that the exported face stays small
EDGE = np.array([0, 1, 2, 0])

SCRIPT = """
function (controls, data) {
  const dot = (a, b) => a.reduce((s, v, i) => s + v * b[i], 0);
  const distance = (j, q) => Math.max(...(j ? data.high : data.low).map(p => dot(q, p) + p[3]));
  function accuracy(j, q) {
    const f = data.fits[j], squares = q.map(v => v * v);
    const pairs = [q[0] * q[1], q[0] * q[2], q[1] * q[2]];
    const factor = f.b0 + dot(f.b1, q) + dot(f.b2, squares);
    return f.c0 + dot(f.c1, q) + dot(f.c2, squares) + dot(f.pairs, pairs) + factor * distance(j, q);
  }
  const both = q => [accuracy(0, q), accuracy(1, q)];
  function at(values, n) {
    const step = Math.log(n / data.n0) / Math.log(data.n1 / data.n0);
    return step * values[1] + (1 - step) * values[0];
  }
  const put = q => [0, 1].map(j => q.reduce((s, v, i) => s + v * data.corners[i][j], 0));
  const n = controls.n, second = (1 - controls.first) * controls.rest;
  const q = [controls.first, second, 1 - controls.first - second];
  const grid = data.grid.map(both), shade = grid.map(v => at(v, n));
  const top = shade.reduce((b, v, i) => v > shade[b] ? i : b, 0);
  const here = both(q), spot = put(q), best = put(data.grid[top]);
  return {
    x: data.grid.map(g => put(g)[0]), y: data.grid.map(g => put(g)[1]),
    shade: shade, distance: data.grid.map(g => distance(1, g)),
    edge_x: [0, 1, 2, 0].map(i => data.corners[i][0]),
    edge_y: [0, 1, 2, 0].map(i => data.corners[i][1]),
    name_x: data.names_at.map(c => c[0]), name_y: data.names_at.map(c => c[1]), name: data.names,
    left: data.bars[0], right: data.bars[1], width: data.bars[2],
    shares: q, best_shares: data.grid[top],
    here_x: [spot[0]], here_y: [spot[1]], best_x: [best[0]], best_y: [best[1]],
    sizes: data.sizes, here: data.sizes.map(m => at(here, m)),
    best: data.sizes.map(m => at(grid[top], m)),
    equal: data.sizes.map(m => at(both([1 / 3, 1 / 3, 1 / 3]), m)),
    predicted: at(here, n), ot: distance(1, q), gain: shade[top] - at(here, n)
  };
}
"""


def explore_market(
    projector: Projector,
    largest: float,
    *,
    names: Sequence[str] = ("seller 1", "seller 2", "seller 3"),
    unit: str = "%",
    **state: Any,
) -> Explorer:
    """Mix three sources: distance to the validation set, projected accuracy, and the best mixture.

    Distances come from supporting planes of the mixtures solved so far (as in `Transport.bound`):
    exact at those kept, a lower bound between them.

    Args:
        projector: both stages for three sources, at least one mixture solved at each size.
        largest: right end of the size slider.
        names: of the sources.
        unit: of the accuracies.
        state: where the sliders start: `first`, `rest`, `n`.

    Returns:
        The explorer; `.show()` it.

    Raises:
        ValueError: there are not three sources, or no mixture has been solved yet.
    """
    if any(len(t.sizes) != 3 for t in projector.transports) or len(names) != 3:
        raise ValueError("projector: the triangle shows mixtures of exactly three sources")
    if not all(t.slopes for t in projector.transports):
        raise ValueError("projector: solve some mixtures first, for instance transport.many(Q)")
    n0, n1 = projector.n0, projector.n1
    largest = checks.positive(largest, "largest")
    sizes = np.array([n0, largest], float)  # projections are straight in log n
    bars = BARS - WIDTH / 2, BARS + WIDTH / 2, np.full(3, WIDTH)
    planes = [_planes(t) for t in projector.transports]

    def ends(Q: np.ndarray) -> list[np.ndarray]:
        return [f.predict(Q, _lowest(p, Q)) for f, p in zip(projector.fits, planes, strict=True)]

    grid, equal = ends(DRAWN), ends(np.full((1, 3), 1 / 3))
    distance = _lowest(planes[1], DRAWN)
    xy = DRAWN @ CORNERS

    def compute(first: float, rest: float, n: float) -> dict[str, Any]:
        second = (1 - first) * rest
        q = np.array([first, second, 1 - first - second])
        here, shade = ends(q[None]), project(n, n0, n1, *grid)
        top = int(shade.argmax())
        best, spot = DRAWN[top], q @ CORNERS
        predicted = float(project(n, n0, n1, *here)[0])
        return {
            "x": xy[:, 0], "y": xy[:, 1], "shade": shade, "distance": distance,
            "edge_x": CORNERS[EDGE, 0], "edge_y": CORNERS[EDGE, 1],
            "name_x": NAMES_AT[:, 0], "name_y": NAMES_AT[:, 1], "name": np.array(names),
            "left": bars[0], "right": bars[1], "width": bars[2],
            "shares": q, "best_shares": best,
            "here_x": spot[:1], "here_y": spot[1:],
            "best_x": xy[top, :1], "best_y": xy[top, 1:],
            "sizes": sizes, "here": project(sizes, n0, n1, *here),
            "best": project(sizes, n0, n1, *(v[top] for v in grid)),
            "equal": project(sizes, n0, n1, *equal),
            "predicted": predicted, "ot": float(_lowest(planes[1], q[None])[0]),
            "gain": float(shade[top] - predicted),
        }  # fmt: skip

    at_ends = [project(n, n0, n1, *grid) for n in (n0, largest)]
    low, high = float(np.min(at_ends)), float(np.max(at_ends))
    room = 0.05 * (high - low)
    across = Axis(f"{names[0]} to {names[1]}", (-0.25, 1.25))
    upwards = Axis(f"share of {names[2]}", (-0.2, 1.22))
    ends_of_axis = (n0 / 1.3, largest * 1.3)
    marks = [
        Line("edge_x", "edge_y", color="grey", width=1.0),
        Points("best_x", "best_y", label="best", color="ink", symbol="diamond", size=11),
        Points("here_x", "here_y", label="here", color="vermillion", symbol="ring", size=15),
    ]
    return Explorer(
        name="scaling_laws.market",
        title="Which mixture of three sources, and what it will be worth",
        about="Move the ring, then raise the size: does the best mixture stay where it is?",
        controls=[
            Slider("first", f"Share of {names[0]}", 0.0, 1.0, step=0.05, value=0.5),
            Slider("rest", f"Share of {names[1]} in the rest", 0.0, 1.0, step=0.05, value=0.5),
            Slider("n", "Size n of the purchase", float(n0), largest, log=True, value=largest,
                   format=".0f"),
        ],
        compute=compute,
        panels=[
            Panel(
                "Projected accuracy at n = {n:.0f}",
                x=across, y=upwards,
                draws=[
                    Points("x", "y", value="shade", scale=(low, high), label=f"accuracy ({unit})",
                           size=14),
                    *marks,
                    Points("name_x", "name_y", text="name", color="grey", size=1),
                ],
                square=True, legend=False,
            ),
            Panel(
                "Distance to the validation set",
                x=across, y=upwards,
                draws=[
                    Points("x", "y", value="distance", label="OT distance", size=14,
                           scale=(float(distance.min()), float(distance.max()))),
                    *marks,
                ],
                square=True, legend=False,
            ),
            Panel(
                "The best mixture gains {gain:.1f} points",
                x=Axis("size n", ends_of_axis, log=True),
                y=Axis("projected accuracy", (low - room, high + room), unit=unit),
                draws=[
                    Line("sizes", "equal", label="equal shares", color="grey", dash="dot"),
                    Line("sizes", "best", label="best at n", color="ink"),
                    Line("sizes", "here", label="here", color="vermillion"),
                    VLine(float(n1), "pilots end", color="grey"), VLine("n", "n"),
                ],
            ),
            Panel(
                "Shares: here and in the best",
                x=Axis("seller", (0.4, 3.6)), y=Axis("share", (0, 1)),
                draws=[
                    Bars("left", "shares", width="width", label="here", color="vermillion"),
                    Bars("right", "best_shares", width="width", label="best at n", color="ink"),
                ],
            ),
        ],
        readouts=[
            Readout("ot", "OT distance here", ".2f"),
            Readout("predicted", "projected accuracy here", ".1f", unit=unit),
            Readout("gain", "the best mixture gains", ".1f", unit="points"),
        ],
        script=SCRIPT,
        data={
            "n0": n0, "n1": n1, "corners": CORNERS, "grid": DRAWN, "sizes": sizes,
            "low": planes[0], "high": planes[1], "names": list(names), "names_at": NAMES_AT,
            "bars": bars, "fits": [_full(f) for f in projector.fits],
        },
        call="scaling_laws.figures_projektor.explore_market(projector, largest, {state})",
        columns=2,
        height=360,
    ).set(**state)  # fmt: skip


def _planes(transport: Transport) -> np.ndarray:
    """The supporting planes that are the highest one at most mixtures: slopes, offset, (p, 4)."""
    planes = np.column_stack([transport.slopes, transport.offsets])
    highest, often = np.unique(
        (FINE @ planes[:, :3].T + planes[:, 3]).argmax(1), return_counts=True
    )
    return planes[highest[np.argsort(-often, kind="stable")[:PLANES]]]


def _lowest(planes: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """The lower bound of the distance by these planes, shape (m,)."""
    bound: np.ndarray = (Q @ planes[:, :3].T + planes[:, 3]).max(1)
    return bound


def _full(fit: Stage1) -> dict[str, Any]:
    """All coefficients that a form for three sources may have, absent ones as zeros."""
    length = {"1": 1, "q": 3, "q2": 3, "q2 but last": 2, "pairs": 3}
    found: dict[str, Any] = {name: [0.0] * 3 for name in ("c1", "c2", "pairs", "b1", "b2")}
    found |= {"c0": fit.intercept, "b0": 0.0}
    for letter, names, values in zip("cb", FORMS[fit.form], (fit.plain, fit.moving), strict=True):
        for name in names:
            part, values = values[: length[name]], values[length[name] :]
            key = {"1": "0", "q": "1", "q2": "2", "q2 but last": "2"}.get(name)
            found[f"{letter}{key}" if key else name] = (
                float(part[0]) if name == "1" else np.pad(part, (0, 3 - len(part))).tolist()
            )
    return found


def draw_projected(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Measured against projected accuracy of the unseen mixtures, with and without transport.

    Args:
        frame: rows of `experiments.projektor.predict_market`.
        ax: axes to draw on.
    """
    colors = theme.palette()
    truth = np.concatenate(frame.truth.to_list())
    both = {
        "projektor": ("with transport", "blue", "o"), "best": ("best without", "orange", "D")
    }  # fmt: skip
    for name, (label, color, marker) in both.items():
        values = np.concatenate(frame[f"projected_{name}"].to_list())
        ax.scatter(
            values, truth, s=12, marker=marker, color=colors[color], lw=0,
            label=escape.matplotlib(label),
        )  # fmt: skip
    ax.axline((80, 80), slope=1, color="0.4", lw=1)
    ax.set(xlabel="projected accuracy (%)", ylabel="measured accuracy (%)")
    ax.legend(frameon=False, fontsize=8)
    return ax
