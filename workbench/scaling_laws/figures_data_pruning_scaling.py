"""Explorer of the pruned perceptron; figure of frontiers and of pruned digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.plots import mpl, theme
from workbench.plots.explorer import Axis, Explorer, Line, Panel, Points, Readout, Steps, VLine
from workbench.scaling_laws.experiments import data_pruning_scaling as study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEPT = np.geomspace(1, 40, 25)  # examples kept per dimension along the frontier
LOW = 5e-4  # the error axes begin here

SCRIPT = """
function (controls, data) {
  const t = data.degrees.indexOf(controls.theta), p = data.pools.indexOf(controls.alpha_tot);
  const k = data.keeps.indexOf(controls.keep), last = data.keeps.length - 1;
  const hard = data.hard[t], kept = controls.alpha_tot * controls.keep;
  let best = 0;
  data.kept.forEach((a, i) => {
    if (Math.abs(Math.log(a / kept)) < Math.abs(Math.log(data.kept[best] / kept))) best = i;
  });
  const seen = data.sim_pool.map((v, i) => i).filter(i =>
    data.sim_pool[i] === controls.alpha_tot && data.sim_theta[i] === controls.theta);
  const column = name => seen.map(i => data[name][i]);
  return {
    pools: data.pools, all: hard.map(row => row[last]),
    share_kept: data.pools.map(v => v * controls.keep), share: hard.map(row => row[k]),
    kept: data.kept, front: data.front[t], dot_x: [kept], dot_y: [hard[p][k]],
    keeps: data.keeps, hard: hard[p], easy: data.easy[t][p], random: data.random[p],
    sim_x: column("sim_keep"),
    sim_hard: column("sim_hard"), hard_low: column("hard_low"), hard_high: column("hard_high"),
    sim_easy: column("sim_easy"), easy_low: column("easy_low"), easy_high: column("easy_high"),
    error: hard[p][k], error_easy: data.easy[t][p][k], error_random: data.random[p][k],
    per_dimension: kept, best: data.front_keep[t][best]
  };
}
"""


def frontiers(table: Mapping[str, Any], kept: np.ndarray = KEPT) -> tuple[np.ndarray, np.ndarray]:
    """Least error and its share over a table's pools, for each number of kept examples.

    Between the table's pools errors are interpolated linearly in logarithms.

    Args:
        table: what `experiments.data_pruning_scaling.theory_table` returns.
        kept: kept examples per dimension, shape (n,).

    Returns:
        Errors and shares of shape (degrees, n).
    """
    pools, keeps = np.log(table["pools"]), np.asarray(table["keeps"])
    hard = np.log(table["hard"])
    wanted = np.log(kept[:, None] / keeps)  # (n, keeps): the pool that each share needs
    errors = np.full((len(hard), len(kept), len(keeps)), np.inf)
    for t, grid in enumerate(hard):
        for k in range(len(keeps)):
            inside = (wanted[:, k] >= pools[0] - 1e-9) & (wanted[:, k] <= pools[-1] + 1e-9)
            errors[t, inside, k] = np.exp(np.interp(wanted[inside, k], pools, grid[:, k]))
    return errors.min(2), keeps[errors.argmin(2)]


def explore_pruning(
    table: Mapping[str, Any] | None = None, runs: pd.DataFrame | None = None, **state: Any
) -> Explorer:
    """Move pool, share and probe angle: what pruning gains or costs a max-margin perceptron.

    Args:
        table: a row of `experiments.data_pruning_scaling.theory_table`; solved when None (about a
            second).
        runs: simulated rows of `experiments.data_pruning_scaling.perceptron`, to be drawn with
            their 95% intervals where pool and angle are those of the controls.
        state: where the controls start: ``alpha_tot``, ``keep``, ``theta`` (degrees).

    Returns:
        The explorer; `.show()` it.
    """
    table = study.theory_table(0) if table is None else table
    hard, easy, chance = (np.asarray(table[name], float) for name in ("hard", "easy", "random"))
    pools, keeps, degrees = (np.asarray(table[q], float) for q in ("pools", "keeps", "degrees"))
    front, front_keep = frontiers(table)
    sims = _simulated(runs)
    data = {
        "degrees": degrees, "pools": pools, "keeps": keeps, "hard": hard, "easy": easy,
        "random": chance, "kept": KEPT, "front": front, "front_keep": front_keep,
        **{str(name): sims[name].to_numpy(float) for name in sims},
    }  # fmt: skip
    where = {
        name: {v: i for i, v in enumerate(values.tolist())}
        for name, values in (("theta", degrees), ("pool", pools), ("keep", keeps))
    }

    def compute(alpha_tot: float, keep: float, theta: float) -> dict[str, Any]:
        t, p, k = where["theta"][theta], where["pool"][alpha_tot], where["keep"][keep]
        kept = alpha_tot * keep
        rows = sims[(sims.sim_pool == alpha_tot) & (sims.sim_theta == theta)]
        best = int(np.abs(np.log(KEPT / kept)).argmin())
        return {
            "pools": pools, "all": hard[t, :, -1],
            "share_kept": keep * pools, "share": hard[t, :, k],
            "kept": KEPT, "front": front[t],
            "dot_x": np.array([kept]), "dot_y": hard[t, p, [k]],
            "keeps": keeps, "hard": hard[t, p], "easy": easy[t, p], "random": chance[p],
            "sim_x": rows.sim_keep.to_numpy(float),
            **{c: rows[c].to_numpy(float) for c in SIMULATED},
            "error": float(hard[t, p, k]), "error_easy": float(easy[t, p, k]),
            "error_random": float(chance[p, k]),
            "per_dimension": kept, "best": float(front_keep[t, best]),
        }  # fmt: skip

    shown = pools[: easy.shape[1]].tolist()
    middle = {
        "alpha_tot": min(shown, key=lambda v: abs(np.log(v / 20))),
        "keep": min(keeps.tolist(), key=lambda v: abs(np.log(v / 0.2))),
        "theta": degrees.tolist()[min(2, len(degrees) - 1)],
    }
    marks = [
        Points("sim_x", "sim_hard", label="hard, simulated", color="blue", low="hard_low",
               high="hard_high", size=7),
        Points("sim_x", "sim_easy", label="easy, simulated", color="orange", low="easy_low",
               high="easy_high", size=7, symbol="square"),
    ]  # fmt: skip
    explorer = Explorer(
        name="scaling_laws.pruning",
        title="A chosen subset can beat the power law, until the probe's error limits it",
        about="Raise the pool at a small share: hard examples turn from the worst choice into the "
        "best. Then turn the probe away from the teacher.",
        controls=[
            Steps("alpha_tot", "Pool (examples per dimension)", shown, middle["alpha_tot"],
                  labels=[f"{v:g}" for v in shown]),
            Steps("keep", "Share kept f", keeps.tolist(), middle["keep"],
                  labels=[f"{v:g}" for v in keeps]),
            Steps("theta", "Probe angle θ (degrees)", degrees.tolist(), middle["theta"],
                  labels=[f"{v:g}" for v in degrees]),
        ],
        compute=compute,
        panels=[
            Panel(
                "Keeping {per_dimension:.2g} per dimension: the best share is {best:.2f}",
                x=Axis("examples kept per dimension", (0.3, 45), log=True),
                y=Axis("test error", (LOW, 0.5), log=True),
                draws=[
                    Line("pools", "all", label="nothing pruned", color="grey", dash="dash"),
                    Line("share_kept", "share", label="this share, hardest", color="blue"),
                    Line("kept", "front", label="best share", color="vermillion", width=3),
                    Points("dot_x", "dot_y", label="here", color="ink", symbol="ring", size=12),
                ],
            ),
            Panel(
                "At this pool: hard {error:.3f}, easy {error_easy:.3f}, random {error_random:.3f}",
                x=Axis("share kept", (0.045, 1.1), log=True),
                y=Axis("test error", (0.005, 0.6), log=True),
                draws=[
                    Line("keeps", "random", label="random", color="grey", dash="dash"),
                    Line("keeps", "hard", label="hard", color="blue"),
                    Line("keeps", "easy", label="easy", color="orange"),
                    *(marks if len(sims) else []),
                    VLine("keep", color="ink", dash="dot"),
                ],
            ),
        ],
        readouts=[
            Readout("error", "error, hardest kept", ".4f"),
            Readout("error_easy", "easiest kept", ".4f"),
            Readout("error_random", "as many at random", ".4f"),
            Readout("best", "best share for as many kept", ".2f"),
        ],
        script=SCRIPT,
        data=data,
        call="scaling_laws.figures_data_pruning_scaling.explore_pruning("
        + ("{state})" if runs is None else "table, runs, {state})"),
    )  # fmt: skip
    return explorer.set(**state)


SIMULATED = ("sim_hard", "hard_low", "hard_high", "sim_easy", "easy_low", "easy_high")


def _simulated(runs: pd.DataFrame | None) -> pd.DataFrame:
    """Means and intervals of the simulated settings, one row each."""
    rows = []
    for _, group in [] if runs is None else runs.groupby(["alpha_tot", "keep", "degrees"]):
        first = group.iloc[0]
        row = {
            "sim_pool": float(first.alpha_tot),
            "sim_keep": float(first.keep),
            "sim_theta": float(first.degrees),
        }
        for which in ("hard", "easy"):
            mean, low, high = mpl.interval(group[[which]].to_numpy())
            row |= {
                f"sim_{which}": float(mean[0]),
                f"{which}_low": max(float(low[0]), LOW),
                f"{which}_high": float(high[0]),
            }
        rows.append(row)
    return pd.DataFrame(rows, columns=["sim_pool", "sim_keep", "sim_theta", *SIMULATED])


def draw_frontiers(table: Mapping[str, Any], ax: Axes) -> Axes:
    """Least error against examples kept, one line a probe angle, beside the unpruned power law.

    Args:
        table: as for `explore_pruning`.
        ax: axes to draw on.
    """
    colors = theme.palette()
    front, _ = frontiers(table)
    whole = np.exp(
        np.interp(np.log(KEPT), np.log(table["pools"]), np.log(np.asarray(table["hard"])[0, :, -1]))
    )
    ax.plot(KEPT, whole, color=colors["grey"], ls="--", label="nothing pruned")
    for angle, line, name in zip(
        table["degrees"], front, ("blue", "green", "orange", "vermillion"), strict=False
    ):
        ax.plot(KEPT, line, color=colors[name], label=f"best share, θ = {angle:g}°")
    ax.set(xscale="log", yscale="log", xlabel="examples kept per dimension", ylabel="test error")
    ax.legend(frameon=False, fontsize=8)
    return ax


def draw_digits(frame: pd.DataFrame, ax: Axes, share: int = 50) -> Axes:
    """Error against a random subset of the same size, by pool size, with 95% intervals.

    Args:
        frame: rows of `experiments.data_pruning_scaling.digits_pruned` over pools and seeds.
        ax: axes to draw on.
        share: per cent kept.
    """
    pools = np.sort(frame.pool.unique())
    for name, color, marker, shift in (
        ("el2n_hard", "blue", "o", 0.94),
        ("prototype_hard", "green", "s", 0.98),
        ("el2n_easy", "orange", "o", 1.02),
        ("prototype_easy", "purple", "s", 1.06),
    ):
        gaps = [
            (group[f"{name}_{share}"] - group[f"random_{share}"]).to_numpy()[:, None]
            for _, group in frame.groupby("pool")
        ]
        mean, low, high = np.array([np.ravel(mpl.interval(g)) for g in gaps]).T
        ax.errorbar(
            pools * shift, mean, [mean - low, high - mean], color=theme.palette()[color],
            marker=marker, ms=5, capsize=3, label=name.replace("_", ", ").replace("el2n", "EL2N"),
        )  # fmt: skip
    ax.axhline(0, color=theme.palette()["grey"], ls="--", lw=1)
    ax.set(xscale="log", xlabel="pool size (digits)", ylabel="error minus random's (points)")
    ax.set_xticks(pools, [f"{v:,}" for v in pools])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)
    return ax
