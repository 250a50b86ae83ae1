"""Explorer of accuracy against the number of directions; figures of the toy and of the tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import beta, t

from workbench.loss_landscapes.intrinsic_dimension import d_int
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
    Toggle,
    VLine,
)
from workbench.plots.mpl import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCRIPT = """
function (controls, data) {
  const nets = data.names.length, seeds = data.baseline[0].length, dims = data.dims;
  const net = data.names.indexOf(controls.network), end = dims[dims.length - 1];
  const mean = a => a.reduce((s, v) => s + v, 0) / a.length;
  const base = k => controls.shared ? mean(data.baseline.flat()) : mean(data.baseline[k]);
  function goal(k, s) {
    return controls.frac * (controls.shared ? base(k) : data.baseline[k][s]);
  }
  function crossing(accs, target) {
    const i = accs.findIndex(a => a >= target);
    if (i < 0) return end;
    if (i === 0) return dims[0];
    const share = (target - accs[i - 1]) / (accs[i] - accs[i - 1]);
    return dims[i - 1] * Math.pow(dims[i] / dims[i - 1], share);
  }
  function around(a) {
    const m = mean(a);
    if (a.length < 2) return [m, m, m];
    const sd = Math.sqrt(a.reduce((s, v) => s + (v - m) * (v - m), 0) / (a.length - 1));
    const half = data.t * sd / Math.sqrt(a.length);
    return [m, Math.max(m - half, 1), m + half];
  }
  const found = data.accs.map((rows, k) => rows.map((accs, s) => crossing(accs, goal(k, s))));
  const bars = found.map(around), own = bars[net];
  const reached = data.accs[net].filter((a, s) => Math.max(...a) >= goal(net, s)).length;
  const order = data.D.map((v, k) => k), thousands = data.D.map(v => v / 1000), last = nets - 1;
  const first = bars[0][0], wide = bars[last][0];
  return {
    dims: dims, mean: data.mean[net], low: data.low[net], high: data.high[net],
    baseline: base(net), target: controls.frac * base(net), d: own[0],
    each_D: order.flatMap(k => found[k].map(() => data.D[k] / 1000)), each: found.flat(),
    net_D: thousands, net: bars.map(b => b[0]), net_low: bars.map(b => b[1]),
    net_high: bars.map(b => b[2]), here_D: [thousands[net]], here: [own[0]],
    line_D: thousands, line: data.D.map(v => first * v / data.D[0]),
    d_low: own[1], d_high: own[2], ratio: data.D[net] / own[0],
    change: 100 * (wide / first - 1), growth: data.D[last] / data.D[0],
    reached: reached + " of " + seeds
  };
}
"""


def explore_dimension(frame: pd.DataFrame, *, by: str = "width", **state: Any) -> Explorer:
    """Move the share of the baseline that counts as solved: which d reaches it, on which network?

    Args:
        frame: a row per network and seed, with columns ``D``, ``baseline``, ``dims`` and ``accs``
            (arrays, the same dims in every row), as of `experiments.intrinsic_dimension.widths`.
        by: column that names the network.
        state: where the controls start: ``network``, ``frac``, ``shared``.

    Returns:
        The explorer; `.show()` it.
    """
    table = frame.sort_values(["D", "seed"])
    names = [f"{by} {name}" for name in table[by].unique()]
    groups = [rows for _, rows in table.groupby("D")]
    dims = np.asarray(groups[0].dims.iloc[0], float)
    accs = np.stack([np.stack(list(rows.accs)) for rows in groups]).round(4)
    baseline = np.stack([rows.baseline.to_numpy(float) for rows in groups]).round(4)
    sizes = np.array([rows.D.iloc[0] for rows in groups], float)
    thousands, seeds = sizes / 1000, accs.shape[1]
    student = float(t.ppf(0.975, seeds - 1)) if seeds > 1 else 0.0
    half = student * accs.std(1, ddof=min(1, seeds - 1)) / np.sqrt(seeds)
    mean = accs.mean(1)
    low, high = mean - half, np.minimum(mean + half, 1)

    def around(values: np.ndarray) -> tuple[float, float, float]:
        middle = float(values.mean())
        if len(values) < 2:
            return middle, middle, middle
        width = student * float(values.std(ddof=1)) / np.sqrt(len(values))
        return middle, max(middle - width, 1.0), middle + width

    def compute(network: str, frac: float, shared: bool) -> dict[str, Any]:
        net = names.index(network)
        goals = np.full_like(baseline, baseline.mean()) if shared else baseline
        found = np.array([
            [min(d_int(dict(zip(dims, a, strict=True)), g, frac, between=True), dims[-1])
             for a, g in zip(rows, goal, strict=True)]
            for rows, goal in zip(accs, goals, strict=True)
        ])  # fmt: skip
        bars = np.array([around(values) for values in found])
        reached = int((accs[net].max(1) >= frac * goals[net]).sum())
        return {
            "dims": dims, "mean": mean[net], "low": low[net], "high": high[net],
            "baseline": float(goals[net].mean()), "target": frac * float(goals[net].mean()),
            "d": bars[net, 0],
            "each_D": np.repeat(thousands, seeds), "each": found.ravel(),
            "net_D": thousands, "net": bars[:, 0], "net_low": bars[:, 1], "net_high": bars[:, 2],
            "here_D": thousands[[net]], "here": bars[[net], 0],
            "line_D": thousands, "line": bars[0, 0] * sizes / sizes[0],
            "d_low": bars[net, 1], "d_high": bars[net, 2], "ratio": sizes[net] / bars[net, 0],
            "change": 100 * (bars[-1, 0] / bars[0, 0] - 1), "growth": sizes[-1] / sizes[0],
            "reached": f"{reached} of {seeds}",
        }  # fmt: skip

    wide = dims[-1] > 20 * dims[0]
    ends = (0.85 * dims[0], 1.15 * dims[-1]) if wide else (0.0, 1.03 * dims[-1])
    across = Axis("directions d", ends, log=wide)
    explorer = Explorer(
        name="loss_landscapes.intrinsic_dimension",
        title="How many random directions does this network need?",
        about="Lower the share that counts as solved: the dimension falls for all widths together. "
        "The dotted line is what it would be if every parameter counted.",
        controls=[
            Choice("network", "Network", names, value=names[-1]),
            Slider("frac", "Share of baseline", 0.7, 0.95, step=0.01, value=0.9, format=".0%"),
            Toggle("shared", "One baseline for all networks", value=False),
        ],
        compute=compute,
        panels=[
            Panel(
                "{network}: {frac:.0%} of the baseline ({target:.3f}) takes {d:.0f} directions",
                x=across,
                y=Axis("accuracy", (min(0.6, float(accs.min()) - 0.02), 1.0)),
                draws=[
                    Band("dims", "low", "high", label="95% interval", color="blue"),
                    Line("dims", "mean", label="in d directions", color="blue", markers=True),
                    HLine("baseline", "all parameters: {baseline:.3f}", color="grey"),
                    HLine("target", color="vermillion"),
                    VLine("d", color="vermillion"),
                ],
            ),
            Panel(
                "{growth:.1f} times the parameters change the dimension by {change:.0f}%",
                x=Axis("parameters D", (0, 1.06e-3 * sizes[-1]), unit="thousands"),
                y=Axis("directions needed", (0, 1.2 * dims[-1])),
                draws=[
                    Line("line_D", "line", label="in proportion to D", color="grey", dash="dot"),
                    Points("each_D", "each", label="one seed", color="sky", size=6, opacity=0.7),
                    Points("net_D", "net", label="mean, 95% interval", color="blue",
                           low="net_low", high="net_high", symbol="diamond", size=8),
                    Points("here_D", "here", label="shown left", color="vermillion",
                           symbol="ring", size=15),
                ],
            ),
        ],
        readouts=[
            Readout("d", "directions", ".0f", low="d_low", high="d_high"),
            Readout("ratio", "parameters per direction", ".0f"),
            Readout("reached", "seeds that reach the goal"),
        ],
        script=SCRIPT,
        data={
            "names": names, "dims": dims, "accs": accs, "baseline": baseline, "D": sizes,
            "mean": mean, "low": low, "high": high, "t": student,
        },
        call=f"loss_landscapes.figures_intrinsic_dimension.explore_dimension(frame, by={by!r}, "
        "{state})",
    )  # fmt: skip
    return explorer.set(**state)


def draw_toy(frame: pd.DataFrame, ax: Axes, groups: int = 10) -> Axes:
    """Share of the toy's loss that is left at best, by d, with its exact distribution.

    Args:
        frame: rows of `experiments.intrinsic_dimension.toy`.
        ax: axes to draw on.
        groups: equations of the toy.
    """
    d = np.arange(1, len(frame.dense.iloc[0]) + 1)
    inside = d[d < groups]
    # share ~ Beta((groups - d) / 2, d / 2); 0 from d = groups on
    low, high = (
        np.where(d < groups, beta.ppf(q, np.maximum(groups - d, 1) / 2, d / 2), 0.0)
        for q in (0.025, 0.975)
    )
    ax.fill_between(d, low, high, color="0.88", lw=0, label="exact: 95% of draws")
    ax.plot(
        np.append(inside, [groups, d[-1]]), np.append(1 - inside / groups, [0, 0]),
        color="0.4", lw=1.5, label="exact: mean",
    )  # fmt: skip
    for i, (kind, color) in enumerate(
        (("dense", "blue"), ("sparse", "orange"), ("fastfood", "green"))
    ):
        values = np.stack(list(frame[kind]))
        ax.plot(np.tile(d + 0.2 * (i - 1), (len(values), 1)).ravel(), values.ravel(), "o", ms=3,
                alpha=0.6, mew=0, color=theme.color(color), label=kind)  # fmt: skip
    ax.axvline(groups, color=theme.color("vermillion"), ls="--", lw=1)
    ax.set(xlabel="directions d", ylabel="lowest loss / loss at the start", ylim=(-0.03, 1.03))
    ax.legend(frameon=False, fontsize=8)
    return ax


def draw_tasks(frames: dict[str, pd.Series], ax: Axes) -> Axes:
    """d_int90 of several tasks: a dot a seed, the geometric mean with its 95% interval.

    Args:
        frames: dimensions by label, one row each, listed from the top.
        ax: axes to draw on, with room for the labels.
    """
    every = np.concatenate([np.asarray(values, float) for values in frames.values()])
    low_end, high_end = 0.8 * every.min(), 1.25 * every.max()
    for row, (_, values) in enumerate(frames.items()):
        numbers = np.asarray(values, float)
        ink = theme.color("vermillion" if row % 2 else "blue")
        mean, low, high = interval(np.log(numbers)[:, None])
        ax.plot(numbers, np.full(len(numbers), row), "o", ms=4, color=ink, alpha=0.45, mew=0)
        if len(numbers) > 1:
            ax.plot(np.exp([low[0], high[0]]), [row + 0.28] * 2, color=ink, lw=2)
        ax.plot(np.exp(mean), [row + 0.28], "D", ms=5, color=ink)
        ax.annotate(f"{np.exp(mean[0]):.0f}", (np.exp(mean[0]), row + 0.28), xytext=(0, -11),
                    textcoords="offset points", ha="center", fontsize=8, color=ink)  # fmt: skip
    ax.set_xscale("log")
    ticks = [v for v in (25, 50, 100, 200, 400, 800, 1600, 3200, 6400) if low_end <= v <= high_end]
    ax.set_xticks(ticks, [f"{v:,}" for v in ticks])
    ax.minorticks_off()
    ax.set_yticks(range(len(frames)), list(frames))
    ax.set_ylim(len(frames) - 0.3, -0.5)
    ax.set_xlabel("directions for 90% of the baseline (diamonds: means)")
    ax.grid(False, axis="y")
    return ax
