"""Explorer of forecast errors by protocol; figure of fits that stop early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.plots import escape, theme
from workbench.plots.explorer import (
    Axis,
    Choice,
    Explorer,
    HeatMap,
    Line,
    Panel,
    Points,
    Readout,
    Steps,
)
from workbench.scaling_laws.scaling_law_estimation import (
    FRACTIONS,
    NAMES,
    Protocol,
    are_grid,
    estimate,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROTOCOLS: dict[str, dict[str, Any]] = {
    "all but the first 10%": {},
    "every checkpoint": {"cut": 0.0},
    "only the last": {"final_only": True},
}
SCALE = (0.3, 60.0)  # per cent, of the colours
DRAWN = 10  # measured points of a run at most
CURVE = np.geomspace(0.05, 1.0, 16)  # parts of the target's run

SCRIPT = """
function (controls, data) {
  const family = data.families[controls.family], grid = family.grids[controls.protocol];
  const rows = family.models.length, columns = data.fractions.length;
  const i = Math.max(0, family.models.filter(k => k <= controls.models).length - 1);
  const j = data.fractions.indexOf(controls.fraction), cell = grid.cells[i * columns + j];
  const [a, b, e, alpha, beta] = cell.slice(1), unit = family.unit;
  const law = (n, d) =>
    (Math.exp(e) + Math.exp(a - alpha * Math.log(n)) + Math.exp(b - beta * Math.log(d))) / unit;
  const k = family.models[i], seen_x = [], seen_y = [], rest_x = [], rest_y = [];
  const chosen = family.runs.slice(0, k);
  family.runs.forEach((run, m) => {
    const part = run.D.map(d => d / run.D[run.D.length - 1]);
    let kept = part.map(p => m < k && p <= controls.fraction * (1 + 1e-9));
    const last = kept.lastIndexOf(true);
    if (grid.final_only) kept = kept.map((v, q) => q === last);
    else kept = kept.map((v, q) => v && part[q] > grid.cut);
    run.D.forEach((d, q) => {
      (kept[q] ? seen_x : rest_x).push(d); (kept[q] ? seen_y : rest_y).push(run.loss[q] / unit);
    });
  });
  const top = chosen[k - 1], end = top.D[top.D.length - 1];
  const target = family.target, horizon = target.D[target.D.length - 1];
  const z = [];
  for (let r = 0; r < rows; r++)
    z.push(grid.cells.slice(r * columns, (r + 1) * columns).map(c => c[0]));
  return {
    z: z, columns: data.columns, rows: family.models,
    at_x: [data.columns[j]], at_y: [k], are: cell[0], used: k,
    part: 100 * controls.fraction,
    seen_x: seen_x, seen_y: seen_y, rest_x: rest_x, rest_y: rest_y,
    target_x: target.D, target_y: target.loss.map(v => v / unit),
    forecast_x: data.curve.map(p => p * horizon),
    forecast_y: data.curve.map(p => law(target.N, p * horizon)),
    inside_x: data.curve.map(p => p * end), inside_y: data.curve.map(p => law(top.N, p * end)),
    alpha: alpha, beta: beta, floor: Math.exp(e) / unit,
    compute: 100 * family.compute[i * columns + j]
  };
}
"""


def explore_protocols(
    families: Mapping[str, pd.DataFrame],
    *,
    columns: Mapping[str, str] | None = None,
    protocols: Mapping[str, Mapping[str, Any]] = PROTOCOLS,
    fractions: Sequence[float] = FRACTIONS,
    **state: Any,
) -> Explorer:
    """Forecast errors over number of models and part of their runs; click a cell to see its fit.

    Args:
        families: name -> rows of `scaling_law_estimation.are_grid`; each family's largest model is
            forecast from the others.
        columns: your names of ``model``, ``N``, ``D``, ``loss``.
        protocols: name -> fields of `scaling_law_estimation.Protocol` ("smallest" models only).
        fractions: parts of the runs that can be used.
        state: where the controls start: ``family``, ``protocol``, ``models``, ``fraction``.

    Returns:
        The explorer; `.show()` it.

    Raises:
        ValueError: there is no family or protocol, or a table cannot be fitted.
    """
    if not families or not protocols:
        raise ValueError("families, protocols: expected at least one of each")
    parts = [float(f) for f in fractions]
    made = {q: _family(rows, columns, protocols, parts) for q, rows in families.items()}
    ticks = np.round(100 * np.array(parts), 6)
    data = {"families": made, "fractions": parts, "columns": ticks, "curve": CURVE}
    most = sorted({k for family in made.values() for k in family["models"]})

    def compute(family: str, protocol: str, models: int, fraction: float) -> dict[str, Any]:
        here = made[family]
        grid, unit = here["grids"][protocol], here["unit"]
        i = max(0, sum(k <= models for k in here["models"]) - 1)
        j = parts.index(fraction)
        k = here["models"][i]
        cell = grid["cells"][i * len(parts) + j]
        a, b, e, alpha, beta = cell[1:]

        def law(n: float, d: np.ndarray) -> np.ndarray:
            return (np.exp(e) + np.exp(a) * n**-alpha + np.exp(b) * d**-beta) / unit

        seen, rest = [], []
        for m, run in enumerate(here["runs"]):
            tokens, loss = np.array(run["D"]), np.array(run["loss"])
            part = tokens / tokens[-1]
            kept = (part <= fraction * (1 + 1e-9)) & (m < k)
            if grid["final_only"]:
                kept &= tokens == tokens[kept].max(initial=0.0)
            else:
                kept &= part > grid["cut"]
            points = np.column_stack([tokens, loss / unit])
            seen.append(points[kept])
            rest.append(points[~kept])
        inside, outside = np.concatenate(seen), np.concatenate(rest)
        top, target = here["runs"][k - 1], here["target"]
        ahead, own = CURVE * target["D"][-1], CURVE * top["D"][-1]
        return {
            "z": np.array([c[0] for c in grid["cells"]]).reshape(-1, len(parts)),
            "columns": ticks, "rows": np.array(here["models"]),
            "at_x": ticks[j : j + 1], "at_y": np.array([k]), "are": cell[0], "used": k,
            "part": 100 * fraction,
            "seen_x": inside[:, 0], "seen_y": inside[:, 1],
            "rest_x": outside[:, 0], "rest_y": outside[:, 1],
            "target_x": target["D"], "target_y": np.array(target["loss"]) / unit,
            "forecast_x": ahead, "forecast_y": law(target["N"], ahead),
            "inside_x": own, "inside_y": law(top["N"], own),
            "alpha": alpha, "beta": beta, "floor": float(np.exp(e) / unit),
            "compute": 100 * here["compute"][i * len(parts) + j],
        }  # fmt: skip

    every = np.concatenate([r["D"] for f in made.values() for r in [*f["runs"], f["target"]]])
    explorer = Explorer(
        name="scaling_laws.protocols",
        title="Which checkpoints, of how many models, forecast the largest one?",
        about="Click a cell: its fit appears beside it. Blue points are what that fit saw.",
        controls=[
            Choice("family", "Family", list(made), value=next(iter(made))),
            Choice("protocol", "Checkpoints", list(protocols), value=next(iter(protocols))),
            Steps("models", "Models", most, value=most[-1]),
            Steps("fraction", "Part of their runs", parts, value=parts[-1]),
        ],
        compute=compute,
        panels=[
            Panel(
                "{used} models, {part:.0f}% of their runs: ARE {are:.1f}%",
                x=Axis("part of each run", unit="%"), y=Axis("number of models in the fit"),
                draws=[
                    HeatMap("z", "columns", "rows", label="ARE (%)", scale=SCALE, log=True,
                            cells=".1f", click_x="fraction", click_y="models"),
                    Points("at_x", "at_y", color="vermillion", symbol="ring", size=30),
                ],
            ),
            Panel(
                "The forecast and what happened",
                x=Axis("tokens", (0.7 * every.min(), 1.4 * every.max()), log=True),
                y=Axis("loss / final loss of the target", (0.9, 2.0)),
                draws=[
                    Points("rest_x", "rest_y", label="not used", color="grey", size=4),
                    Points("seen_x", "seen_y", label="used", color="blue", size=5),
                    Points("target_x", "target_y", label="target", color="green", size=5),
                    Line("inside_x", "inside_y", label="fit, largest used", color="blue"),
                    Line("forecast_x", "forecast_y", label="forecast", color="vermillion"),
                ],
            ),
        ],
        readouts=[
            Readout("are", "ARE", ".2f", unit="%"),
            Readout("compute", "compute / target's", ".1f", unit="%"),
            Readout("alpha", "alpha", ".3f"), Readout("beta", "beta", ".3f"),
            Readout("floor", "E / final loss", ".3f"),
        ],
        script=SCRIPT,
        data=data,
        call="scaling_laws.figures_scaling_law_estimation.explore_protocols(families, {state})",
    )  # fmt: skip
    return explorer.set(**state)


def _family(
    rows: pd.DataFrame,
    columns: Mapping[str, str] | None,
    protocols: Mapping[str, Mapping[str, Any]],
    fractions: Sequence[float],
) -> dict[str, Any]:
    """Grids of one family with rounded parameters, and points to draw."""
    whole = estimate(rows, columns=columns, cut=0.0, test_from=0.0)
    runs = sorted((_run(run) for _, run in whole.train.groupby("model")), key=lambda r: r["N"])
    target = _run(whole.forecast)
    models = range(1, len(runs) + 1)
    grids: dict[str, Any] = {}
    for name, options in protocols.items():
        rules = Protocol(**options)
        if rules.which != "smallest":
            raise ValueError(f"protocols: {name!r} must take the smallest models")
        found = are_grid(rows, models=models, columns=columns, fractions=fractions, **options)
        theta = found[list(NAMES)].to_numpy(float)
        theta[:, :3] = np.log(np.maximum(theta[:, :3], 1e-300))
        cells = np.column_stack([100 * found["are"], theta])
        grids[name] = {
            "cells": [[float(f"{v:.5g}") for v in cell] for cell in cells],
            "cut": rules.cut,
            "final_only": rules.final_only,
        }
    return {
        "grids": grids,
        "models": list(models),
        "compute": [float(f"{v:.4g}") for v in found["compute"]],
        "runs": runs,
        "target": target,
        "unit": float(target["loss"][-1]),
    }


def _run(rows: pd.DataFrame) -> dict[str, Any]:
    """A run's size and at most `DRAWN` of its points, the last among them."""
    ordered = rows.sort_values("D")
    kept = ordered.iloc[np.unique(np.linspace(0, len(ordered) - 1, DRAWN).round().astype(int))]
    return {
        "N": float(kept.N.iloc[0]),
        "D": [float(f"{v:.4g}") for v in kept.D],
        "loss": [float(f"{v:.4g}") for v in kept.loss],
    }


def draw_early_stops(frame: pd.DataFrame, axes: Sequence[Axes]) -> Sequence[Axes]:
    """Objective along each fit, and its way through the plane of exponents.

    Args:
        frame: rows of `experiments.scaling_law_estimation.early_stops`.
        axes: two axes.
    """
    left, right = axes
    colors = theme.palette()
    best = frame.objective.min()
    ways = frame.iloc[::-1].to_dict("records")
    for way, name, width in zip(
        ways, ("green", "orange", "vermillion"), (1.5, 2.5, 4), strict=True
    ):
        label = escape.matplotlib(f"{way['how']}: {way['iterations']} steps")
        along, color = 1e3 * np.asarray(way["values"]), colors[name]
        left.plot(along, color=color, lw=width, label=label)
        left.plot(len(along) - 1, along[-1], "o", color=color, ms=7)
        alpha, beta = way["path_alpha"], way["path_beta"]
        right.plot(alpha, beta, color=color, lw=width, alpha=0.8)
        right.plot(alpha[-1], beta[-1], "o", color=color, ms=7, label=label)
    left.axhline(1e3 * best, color="0.6", lw=0.8, ls=":")
    left.set(xlabel="iterations", ylabel="objective (sum) x 1000")
    left.legend(frameon=False, fontsize=7.5)
    right.set(xlabel=r"exponent of size $\alpha$", ylabel=r"exponent of tokens $\beta$")
    return axes
