"""Explorer of checkpoints of equal loss; figure of the drift along a manifold of minima."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from workbench.plots import theme
from workbench.plots.explorer import (
    Axis,
    Band,
    Choice,
    Explorer,
    HLine,
    Line,
    Panel,
    Points,
    Readout,
    Slider,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("seed", "d", "step", "excess", "trace_wide", "accuracy")
UP = "accuracy above average"
LEAST = 4  # checkpoints of one seed without which no correlation is drawn from it

SCRIPT = """
function (controls, data) {
  const of = data.d.map((v, i) => i).filter(i => controls.size === "all"
    || String(data.d[i]) === controls.size);
  const kept = of.filter(i => data.excess[i] <= controls.within);
  function ranks(values) {
    return values.map(v => values.filter(w => w < v).length
      + (values.filter(w => w === v).length + 1) / 2);
  }
  function correlation(a, b) {
    const x = ranks(a), y = ranks(b), m = (a.length + 1) / 2;
    let xy = 0, xx = 0, yy = 0;
    for (let i = 0; i < x.length; i++) {
      xy += (x[i] - m) * (y[i] - m); xx += (x[i] - m) * (x[i] - m); yy += (y[i] - m) * (y[i] - m);
    }
    return xx * yy > 0 ? xy / Math.sqrt(xx * yy) : null;
  }
  function overSeeds(key) {
    let sum = 0, count = 0;
    for (const seed of data.seeds) {
      const rows = kept.filter(i => data.seed[i] === seed);
      if (rows.length < 4) continue;
      const rho = correlation(rows.map(i => data[key][i]), rows.map(i => data.accuracy[i]));
      if (rho !== null) { sum += rho; count += 1; }
    }
    return count ? sum / count : null;
  }
  const out = {kept: kept.length, rho_trace: overSeeds("across"), rho_loss: overSeeds("excess"),
    across: kept.map(i => data.across[i]), up: kept.map(i => data.up[i]),
    step: data.steps};
  for (const key of ["excess", "accuracy"]) {
    const scale = key === "accuracy" ? 100 : 1;
    const columns = data.steps.map(s => of.filter(i => data.step[i] === s)
      .map(i => scale * data[key][i]));
    out[key + "_mean"] = columns.map(c => c.reduce((a, b) => a + b, 0) / c.length);
    out[key + "_low"] = columns.map(c => Math.min(...c));
    out[key + "_high"] = columns.map(c => Math.max(...c));
  }
  return out;
}
"""


def explore_checkpoints(rows: pd.DataFrame, **state: Any) -> Explorer:
    """Choose what counts as equal loss: how well does flatness rank the models that are left?

    Args:
        rows: one a checkpoint, with ``seed``, ``d`` (width), ``step``, ``excess`` (nats above the
            minimum), ``trace_wide`` (of one width) and ``accuracy`` (a fraction), such as
            `experiments.implicit_bias_lm.by_checkpoint` gives; all widths share their steps.
        state: where the controls start: ``size``, ``within``.

    Returns:
        The explorer; `.show()` it.

    Raises:
        ValueError: a column is missing.
    """
    if absent := [name for name in COLUMNS if name not in rows]:
        raise ValueError(f"rows: no column {absent[0]!r}; it has {list(rows)}")
    table = rows[[*COLUMNS]].astype({"seed": int, "d": int, "step": int}).reset_index(drop=True)
    table = _centred(table)
    sizes = ["all", *map(str, sorted(table.d.unique()))]
    steps = np.sort(table.step.unique())

    def compute(size: str, within: float) -> dict[str, Any]:
        chosen = table if size == "all" else table[table.d == int(size)]
        kept = chosen[chosen.excess <= within]
        by_step = chosen.groupby("step")
        curves = {
            f"{key}_{name}": getattr(by_step[key], how)().loc[steps].to_numpy() * scale
            for key, scale in (("excess", 1), ("accuracy", 100))
            for name, how in (("mean", "mean"), ("low", "min"), ("high", "max"))
        }
        return {
            "kept": len(kept),
            "rho_trace": _over_seeds(kept, "across"),
            "rho_loss": _over_seeds(kept, "excess"),
            "across": kept.across.to_numpy(),
            "up": kept.up.to_numpy(),
            "step": steps,
            **curves,
        }

    low, high = float(table.excess.min()), float(table.excess.max())
    reach = 100 * np.array([table.accuracy.min(), table.accuracy.max()])
    accuracy = Axis("probe accuracy", (reach[0] - 2, reach[1] + 2), unit="%")
    ends = (float(f"{1.5 * low:.2g}"), float(f"{1.2 * max(high, 2 * low):.2g}"))
    time = Axis("steps of pre-training", (0.93 * steps[0], 1.04 * steps[-1]))
    explorer = Explorer(
        name="loss_landscapes.checkpoints",
        title="Among models of equal loss, does the trace rank transfer?",
        about="Tighten the tolerance: fewer checkpoints count as converged, and their losses "
        "differ less and less. Bands run from the smallest to the largest value drawn.",
        controls=[
            Choice("size", "Width", sizes),
            Slider("within", "Loss counts as equal within", *ends, value=_middle(ends),
                   unit="nats of the minimum", log=True),
        ],
        compute=compute,
        panels=[
            Panel(
                "Loss above the minimum: {kept:d} checkpoints count", x=time,
                y=Axis("loss above the minimum", (0, 1.05 * high), unit="nats"),
                draws=[
                    Band("step", "excess_low", "excess_high", color="blue"),
                    Line("step", "excess_mean", label="mean", color="blue", markers=True),
                    HLine("within", "counts as equal below", color="grey"),
                ],
            ),
            Panel(
                "What a probe gets out of them", x=time, y=accuracy,
                draws=[
                    Band("step", "accuracy_low", "accuracy_high", color="green"),
                    Line("step", "accuracy_mean", label="mean", color="green", markers=True),
                ],
            ),
            Panel(
                "Rank correlation with accuracy: trace {rho_trace:+.2f}, loss {rho_loss:+.2f}",
                x=Axis("trace / mean of its language", _around(table.across)),
                y=Axis(UP, _around(table.up), unit="points"),
                draws=[Points("across", "up", label="checkpoint", color="vermillion", size=6)],
            ),
        ],
        readouts=[
            Readout("kept", "checkpoints of equal loss", "d"),
            Readout("rho_trace", "Spearman, trace and accuracy, mean over seeds", "+.2f"),
            Readout("rho_loss", "Spearman, loss and accuracy, mean over seeds", "+.2f"),
        ],
        script=SCRIPT,
        data={"steps": steps, "seeds": np.sort(table.seed.unique()),
              **{q: table[q].to_numpy() for q in (*COLUMNS[:4], "accuracy", "across", "up")}},
        call="loss_landscapes.figures_implicit_bias_lm.explore_checkpoints(rows, {state})",
    )  # fmt: skip
    return explorer.set(**state)


def draw_drift(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Paths of the two parameters, mean over runs, with the flow of the theory.

    Args:
        frame: rows of `experiments.implicit_bias_lm.drift`; the first is drawn.
        ax: axes to draw on.
    """
    row, colors = frame.iloc[0], theme.palette()
    for q, name in (("u", "blue"), ("v", "orange")):
        mean, spread = row[f"{q}_mean"], row[f"{q}_sd"]
        ax.errorbar(row.step[::5], mean[::5], spread[::5], fmt="none", ecolor=colors[name], lw=1)
        ax.plot(row.step, mean, color=colors[name], lw=2, label=f"{q}, mean and s.d.")
        ax.plot(row.step, row[f"{q}_flow"], color="0.2", lw=0.8)
    ax.plot([], [], color="0.2", lw=0.8, label="flow of the theory")
    ax.set(xlabel="steps", ylabel="parameter", ylim=(0, None))
    ax.legend(frameon=False, fontsize=8)
    return ax


def draw_checkpoints(rows: pd.DataFrame, ax: Axes, *, within: float = 0.01) -> Axes:
    """Accuracy against the trace, each relative to its seed's mean, for checkpoints of equal loss.

    Args:
        rows: as for `explore_checkpoints`.
        ax: axes to draw on.
        within: nats above the minimum up to which a checkpoint is drawn.
    """
    kept = _centred(rows[rows.excess <= within])
    for i, d in enumerate(sorted(kept.d.unique())):
        at = kept.d == d
        ax.scatter(kept.across[at], kept.up[at], s=12, color=theme.color(None, i), lw=0, marker="s",
                   label=f"width {d:.0f}")  # fmt: skip
    ax.set(xlabel="trace / mean of its language", ylabel="accuracy, centred (points)")
    ax.legend(frameon=False, fontsize=8)
    return ax


def _over_seeds(rows: pd.DataFrame, key: str) -> float | None:
    """Spearman correlation with the accuracy within each seed, averaged; None without any."""
    found = [
        spearmanr(group[key], group.accuracy)[0]
        for _, group in rows.groupby("seed")
        if len(group) >= LEAST and group[key].nunique() > 1 and group.accuracy.nunique() > 1
    ]
    return float(np.mean(found)) if found else None


def _centred(rows: pd.DataFrame) -> pd.DataFrame:
    """With ``across``, the trace over its seed's mean, and ``up``, points above its seed's mean."""
    seeds = rows.groupby("seed")
    return rows.assign(
        across=rows.trace_wide / seeds.trace_wide.transform("mean"),
        up=100 * (rows.accuracy - seeds.accuracy.transform("mean")),
    )


def _around(values: pd.Series) -> tuple[float, float]:
    margin = 0.08 * (values.max() - values.min()) + 1e-3
    return float(values.min() - margin), float(values.max() + margin)


def _middle(ends: tuple[float, float]) -> float:
    """0.01 nats if the slider reaches it, otherwise its upper end."""
    return 0.01 if ends[0] <= 0.01 <= ends[1] else ends[1]
