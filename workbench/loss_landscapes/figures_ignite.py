"""Explorer of searches on surrogates of a task with two inputs; curves of promise and truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.loss_landscapes.experiments.ignite import playground
from workbench.plots import escape, theme
from workbench.plots.explorer import (
    Axis,
    Explorer,
    HeatMap,
    Line,
    Panel,
    Points,
    Readout,
    Steps,
    VLine,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCRIPT = """
function (controls, data) {
  const i = data.lam.indexOf(controls.lam), j = data.rho.indexOf(controls.rho);
  const t = data.step.indexOf(controls.steps), path = data.path[i][j];
  const out = {
    x: data.x, y: data.y, truth: data.truth,
    surrogate: data.percent[i][j].map(row => row.map(v => v / 100)),
    seen_x: data.seen.map(p => p[0]), seen_y: data.seen.map(p => p[1]), step: data.step,
    promised: data.promised[i][j], true: data.true[i][j], norm: data.norm[i][j],
    promise: data.promised[i][j][t], real: data.true[i][j][t], start: data.true[i][j][0],
    end_x: path[t].map(p => p[0]), end_y: path[t].map(p => p[1])
  };
  out.gap = out.promise - out.real;
  for (let k = 0; k < 3; k++) {
    out["x" + k] = path.slice(0, t + 1).map(row => row[k][0]);
    out["y" + k] = path.slice(0, t + 1).map(row => row[k][1]);
  }
  return out;
}
"""


def explore_ignite(
    searches: Mapping[str, Any] | None = None,
    *,
    names: Sequence[str] = ("x1", "x2"),
    **state: Any,
) -> Explorer:
    """Move multiplier, radius and steps: where searches go, and what the truth says of it.

    Args:
        searches: from `experiments.ignite.playground`, of a task of your own for instance; by
            default a short one is trained here.
        names: of the two inputs.
        state: where the controls start: ``lam``, ``rho``, ``steps``.

    Returns:
        The explorer; `.show()` it.
    """
    found = playground(0, steps=150) if searches is None else searches
    digits = {"surrogate": 2, "truth": 2, "path": 3, "promised": 3, "true": 3, "seen": 3, "norm": 2}
    data = {
        key: np.round(np.asarray(found[key], float), digits.get(key, 6))
        for key in ("lam", "rho", "x", "y", "step", *digits)
    }
    data["step"] = data["step"].astype(int)
    data["percent"] = np.round(100 * data.pop("surrogate")).astype(int)
    data["seen"] = data["seen"][:: -(-len(data["seen"]) // 60)]
    lams, rhos, steps = (data[key].tolist() for key in ("lam", "rho", "step"))

    def compute(lam: float, rho: float, steps: int) -> dict[str, Any]:
        i, j, t = lams.index(lam), rhos.index(rho), data["step"].tolist().index(steps)
        promised, true, path = data["promised"][i, j], data["true"][i, j], data["path"][i, j]
        return {
            **{key: data[key] for key in ("x", "y", "truth", "step")},
            "surrogate": data["percent"][i, j] / 100,
            "seen_x": data["seen"][:, 0], "seen_y": data["seen"][:, 1],
            "promised": promised, "true": true, "norm": data["norm"][i, j],
            "promise": promised[t], "real": true[t], "gap": promised[t] - true[t],
            "start": true[0],
            "end_x": path[t, :, 0], "end_y": path[t, :, 1],
            **{f"x{k}": path[: t + 1, k, 0] for k in range(3)},
            **{f"y{k}": path[: t + 1, k, 1] for k in range(3)},
        }  # fmt: skip

    (left, right), (low, high) = ((data[key][0], data[key][-1]) for key in ("x", "y"))
    x, y = Axis(names[0], (left, right)), Axis(names[1], (low, high))
    colours = (
        float(min(data["truth"].min(), np.quantile(data["percent"], 0.02) / 100)),
        float(max(data["truth"].max(), np.quantile(data["percent"], 0.98) / 100)),
    )
    curves = np.concatenate([data["promised"].ravel(), data["true"].ravel()])
    margin = 0.05 * float(np.ptp(curves))
    searching = [
        *[Line(f"x{k}", f"y{k}", color="ink", width=2) for k in range(3)],
        Points("end_x", "end_y", color="vermillion", symbol="diamond", size=10),
    ]
    explorer = Explorer(
        name="loss_landscapes.ignite",
        title="A search climbs the surrogate; the truth decides",
        about="Three of the searches that start at the best rows of the lower half (white dots). "
        "Raise the multiplier: what becomes of the slope, the promise and the truth?",
        controls=[
            Steps("lam", "multiplier λ", lams, value=state.pop("lam", lams[0])),
            Steps("rho", "radius ρ", rhos, value=state.pop("rho", rhos[len(rhos) // 2])),
            Steps("steps", "steps of the search", steps, value=state.pop("steps", steps[-1])),
        ],
        compute=compute,
        panels=[
            Panel(
                "Surrogate: it promises {promise:.2f}", x=x, y=y,
                draws=[
                    HeatMap("surrogate", "x", "y", scale=colours, contours=True),
                    Points("seen_x", "seen_y", color="#ffffff", size=4),
                    *searching,
                ],
                legend=False,
            ),
            Panel(
                "Truth at the same designs: {real:.2f}", x=x, y=y,
                draws=[HeatMap("truth", "x", "y", label="score", scale=colours, contours=True),
                       *searching],
                legend=False,
            ),
            Panel(
                "Gap after {steps:d} steps: {gap:.2f}",
                x=Axis("step of the search", (0, float(steps[-1]))),
                y=Axis("mean score", (float(curves.min()) - margin, float(curves.max()) + margin)),
                draws=[
                    Line("step", "promised", label="promised", color="orange"),
                    Line("step", "true", label="true", color="blue"),
                    VLine("steps", color="grey"),
                ],
            ),
        ],
        readouts=[
            Readout("gap", "promise − truth", ".2f"), Readout("real", "true score", ".2f"),
            Readout("start", "true score at the start", ".2f"), Readout("norm", "‖∇h‖", ".2f"),
        ],
        script=SCRIPT,
        data=data,
        columns=3,
        call="loss_landscapes.figures_ignite.explore_ignite("
        + ("" if searches is None else "searches, ") + "{state})",
    )  # fmt: skip
    return explorer.set(**state)


def draw_gaps(frame: pd.DataFrame, names: Mapping[str, str], ax: Axes) -> Axes:
    """What surrogates promise along the search (dotted) and what is true (solid), with its range.

    Args:
        frame: rows of `experiments.ignite.compare`.
        names: label for the name of each member drawn.
        ax: axes to draw on.
    """
    colors = theme.palette()
    for (name, label), color in zip(names.items(), ("grey", "blue", "orange"), strict=False):
        true, promised = (np.stack(frame[f"{key}_{name}"].tolist()) for key in ("true", "promised"))
        share = np.linspace(0, 100, true.shape[1])
        ax.plot(share, promised.mean(0), ":", color=colors[color])
        ax.plot(share, true.mean(0), color=colors[color], label=escape.matplotlib(label))
        ax.fill_between(share, true.min(0), true.max(0), color=colors[color], alpha=0.15, lw=0)
    ax.plot([], [], ":", color="0.4", label="promised")
    ax.set(xlabel="part of the search (%)", ylabel="mean score of the designs")
    ax.legend(frameon=False, fontsize=8)
    return ax
