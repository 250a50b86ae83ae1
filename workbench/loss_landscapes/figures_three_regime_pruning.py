"""Explorer of the pruning phase grid; figure of its measured border."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.loss_landscapes.regimes import (
    CKA_TOL,
    MC_TOL,
    border_table,
    regime,
)
from workbench.loss_landscapes.three_regime_pruning import PhaseGrid
from workbench.plots import mpl, theme
from workbench.plots.explorer import (
    Axis,
    Band,
    Choice,
    Explorer,
    HeatMap,
    Line,
    Panel,
    Points,
    Readout,
    Steps,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray[Any, np.dtype[Any]]
WORDS = {"epochs": "# epochs", "batch_size": "batches of #", "rho": "SAM radius #"}
MEASURED = ("error", "mc", "cka", "profiles")

SCRIPT = """
function (controls, data) {
  const g = data.grids[controls.grid], n = g.columns.length;
  const t = Math.min(controls.level, g.rows.length) - 1, d = Math.min(controls.load, n) - 1;
  const cell = t * n + d;
  let best = 0;
  g.error.forEach((row, i) => { if (row[d] < g.error[best][d]) best = i; });
  return {
    error: g.error, mc: g.mc, cka: g.cka, columns: g.columns, rows: g.rows,
    densities: g.densities, values: g.values.join(", "),
    names_x: g.names.map((_, i) => g.columns[i % n]),
    names_y: g.names.map((_, i) => g.rows[Math.floor(i / n)] + 0.18), names: g.names,
    at_x: [d + 1], at_y: [t + 1], t: g.t,
    mean: g.mean[cell], low: g.low[cell], high: g.high[cell],
    here: g.words.replace("#", g.values[t]), regime: g.names[cell],
    wrong: g.error[t][d], connectivity: g.mc[t][d], similarity: g.cka[t][d],
    advice: g.names[cell] === "I" ? "hotter" : "colder",
    best: g.words.replace("#", g.values[best])
  };
}
"""


def explore_regimes(
    grids: Mapping[str, pd.DataFrame | PhaseGrid],
    *,
    mc_tol: float = MC_TOL,
    cka_tol: float = CKA_TOL,
    **state: Any,
) -> Explorer:
    """Click a cell of a phase grid: its regime, its advice and the line between its two networks.

    Args:
        grids: a name for the reader -> a `PhaseGrid`, or rows of
            `experiments.three_regime_pruning.grid`, one a dense seed.
        mc_tol, cka_tol: thresholds of `regime`.
        state: where the controls start: ``grid``, ``level`` (1 is the hottest temperature),
            ``load`` (1 is the sparsest density); levels beyond a smaller grid mean its last.

    Returns:
        The explorer; `.show()` it.
    """
    if not grids:
        raise ValueError("grids: expected at least one")
    made = {name: _drawn(rows, mc_tol, cka_tol) for name, rows in grids.items()}
    levels, loads = (max(len(m[key]) for m in made.values()) for key in ("rows", "columns"))

    def compute(grid: str, level: int, load: int) -> dict[str, Any]:
        here = made[grid]
        t, d = min(level, len(here["rows"])) - 1, min(load, len(here["columns"])) - 1
        cell, columns = t * len(here["columns"]) + d, np.array(here["columns"])
        best = int(np.argmin(np.array(here["error"])[:, d]))
        words = here["words"]
        return {
            **{key: np.array(here[key]) for key in ("error", "mc", "cka", "columns", "rows")},
            "densities": here["densities"], "values": ", ".join(here["values"]),
            "names_x": np.tile(columns, len(here["rows"])),
            "names_y": np.repeat(np.array(here["rows"]) + 0.18, len(columns)),
            "names": np.array(here["names"], dtype=object),
            "at_x": np.array([d + 1]), "at_y": np.array([t + 1]), "t": np.array(here["t"]),
            **{key: np.array(here[key][cell]) for key in ("mean", "low", "high")},
            "here": words.replace("#", here["values"][t]), "regime": here["names"][cell],
            "wrong": here["error"][t][d], "connectivity": here["mc"][t][d],
            "similarity": here["cka"][t][d],
            "advice": "hotter" if here["names"][cell] == "I" else "colder",
            "best": words.replace("#", here["values"][best]),
        }  # fmt: skip

    every = {key: np.concatenate([np.ravel(m[key]) for m in made.values()])
             for key in ("error", "mc", "cka", "high")}  # fmt: skip
    ends = (float(np.floor(every["error"].min())), float(np.ceil(every["error"].max())))
    depth = float(np.clip(np.abs(every["mc"]).max(), 0.05, 0.5))
    least = float(np.floor(20 * every["cka"].min().clip(0, 0.95)) / 20)
    where: dict[str, Any] = {
        "x": Axis("density kept: {densities}", unit="%"),
        "y": Axis("temperature: {values}", reverse=True),
        "legend": False,
    }
    ring = Points("at_x", "at_y", color="vermillion", symbol="ring", size=34)
    explorer = Explorer(
        name="loss_landscapes.regimes",
        title="Which way should the temperature go before pruning?",
        about="Click a cell: the fourth panel shows the training error between its two retrained "
        "networks. In Regime I they are separated by a barrier.",
        controls=[
            Choice("grid", "Temperature", list(made)),
            Steps("level", "Temperature level (1 is hottest)", list(range(1, levels + 1))),
            Steps("load", "Density level (1 is sparsest)", list(range(1, loads + 1))),
        ],
        compute=compute,
        panels=[
            Panel(
                "Test error after pruning: {wrong:.1f}%", **where,
                draws=[
                    HeatMap("error", "columns", "rows", label="%", scale=ends,
                            cells=".1f",
                            click_x="load", click_y="level"),
                    ring,
                ],
            ),
            Panel(
                "Connectivity {connectivity:.3f}: Regime {regime}", **where,
                draws=[
                    HeatMap("mc", "columns", "rows", label="mc", scale=(-depth, depth),
                            colors="diverging", click_x="load", click_y="level"),
                    Points("names_x", "names_y", text="names", size=0.1, color="grey"),
                    ring,
                ],
            ),
            Panel(
                "Similarity of the two networks: {similarity:.3f}", **where,
                draws=[
                    HeatMap("cka", "columns", "rows", label="CKA",
                            scale=(least, 1.0), cells=".2f",
                            click_x="load", click_y="level"),
                    ring,
                ],
            ),
            Panel(
                "Training error on the line between them",
                x=Axis("position between the two networks", (0.0, 1.0)),
                y=Axis("training error", (0.0, 1.05 * float(every["high"].max())), unit="%"),
                draws=[
                    Band("t", "low", "high", label="range over seeds", color="blue"),
                    Line("t", "mean", label="mean", color="blue"),
                ],
            ),
        ],
        readouts=[
            Readout("here", "dense network"),
            Readout("advice", "advice"),
            Readout("best", "best at this density"),
        ],
        script=SCRIPT,
        data={"grids": made},
        columns=2,
        height=340,
        call="loss_landscapes.figures_three_regime_pruning.explore_regimes(grids, {state})",
    )  # fmt: skip
    return explorer.set(**state)


def _drawn(grid: pd.DataFrame | PhaseGrid, mc_tol: float, cka_tol: float) -> dict[str, Any]:
    """Means over dense seeds, profiles of each, and the names of rows and columns."""
    if isinstance(grid, PhaseGrid):
        wanted = (*MEASURED, "knob", "values", "densities")
        grid = pd.DataFrame([{name: getattr(grid, name) for name in wanted}])
    error, mc, cka, lines = (np.stack(list(grid[name])) for name in MEASURED)
    first, lines = grid.iloc[0], 100 * lines.reshape(len(lines), -1, lines.shape[-1])
    names = regime(mc.mean(0), cka.mean(0), mc_tol=mc_tol, cka_tol=cka_tol)
    return {
        "error": (100 * error.mean(0)).round(1).tolist(),
        "mc": mc.mean(0).round(3).tolist(),
        "cka": cka.mean(0).round(2).tolist(),
        "mean": lines.mean(0).round(1).tolist(),
        "low": lines.min(0).round(1).tolist(),
        "high": lines.max(0).round(1).tolist(),
        "t": np.linspace(0, 1, lines.shape[-1]).round(4).tolist(),
        "names": names.ravel().tolist(),
        "words": WORDS[first["knob"]],
        "values": [f"{v:g}" for v in first["values"]],
        "densities": ", ".join(f"{100 * d:g}" for d in first["densities"]),
        "rows": list(range(1, error.shape[1] + 1)),
        "columns": list(range(1, error.shape[2] + 1)),
    }


def draw_border(frame: pd.DataFrame, ax: Axes, *, mc_tol: float = MC_TOL) -> Axes:
    """What each temperature loses against the best one, and where connectivity leaves 0.

    Args:
        frame: rows of `experiments.three_regime_pruning.grid`, at least two seeds.
        ax: axes to draw on.
        mc_tol: what counts as a barrier.
    """
    error, mc = (np.stack(list(frame[k])) for k in ("error", "mc"))
    values, densities = (np.asarray(frame[k].iloc[0]) for k in ("values", "densities"))
    mean = 100 * error.mean(0)
    loss = mean - mean.min(0)
    names = ([f"{100 * d:g}%" for d in densities], [f"{v:g}" for v in values])
    mpl.heatmap(loss, *names, ax=ax, scale=(0, float(loss.max())), xlabel="density kept",
                label="test error above the column's best (points)",
                ylabel="epochs of the dense network")  # fmt: skip
    table = border_table(values, densities, mc, mc_tol=mc_tol)
    x, low, high = (_place(table[k], densities) for k in ("border", "low", "high"))
    color = theme.color("vermillion")
    ax.errorbar(x, np.arange(len(values)), xerr=[x - low, high - x], color=color, fmt="-o", ms=4,
                capsize=3, lw=1.5, label="border of Regime I, 95% interval")  # fmt: skip
    ax.plot(np.arange(len(densities)), loss.argmin(0), "*", ms=11, mew=0.8, mfc="white",
            mec="black", ls="none", label="best of the column")  # fmt: skip
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=1, frameon=False, fontsize=8)
    return ax


def _place(density: Any, densities: Array) -> Array:
    """Fractional column of a density, between columns linear in its logarithm."""
    return np.interp(np.log(density), np.log(densities), np.arange(len(densities)))
