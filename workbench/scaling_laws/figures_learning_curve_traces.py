"""Explorer of learning traces, and the fan of a trace as a static figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from workbench import plots
from workbench.lab import checks
from workbench.plots import theme
from workbench.plots.explorer import (
    Axis,
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
from workbench.scaling_laws.learning_curve_traces import FIRST, Trace, learning_trace

FAN = 5
SHADES = theme.SEQUENTIAL[1 : FAN + 1]
LOOK = 5
EXPORTED = 4_000  # numbers; more than this stay in the kernel

SCRIPT = """
function (controls, data) {
  const k = data.names.indexOf(controls.curve), n = data.share.length, y = data.y[k];
  const bound = controls.tolerance, look = data.look, seen = controls.seen;
  const fits = data.fits[k], levels = n - 2;
  const plain = fits.slice(0, levels).map(f => f.map(v => v / 1e3));
  function reach(f, count) {
    const calm = [];
    for (let i = 0; i + 1 < count; i++)
      calm.push(f[i][2] > 0 && f[i + 1][2] > 0 && Math.abs(f[i + 1][0] - f[i][0]) <= bound);
    let work = null, predict = null, stop = null;
    for (let i = 0; i < count; i++) {
      if (work === null && i + look < calm.length && calm.slice(i, i + look + 1).every(v => v))
        work = i + 3;
      if (predict === null && work !== null && f[i][0] <= 100) predict = i + 3;
      if (stop === null && predict !== null && f[i][2] <= controls.tau) stop = i + 3;
    }
    return [work, predict, stop];
  }
  let [work, predict, stop] = reach(plain, seen - 2), f = plain;
  if (controls.anchor && predict !== null) {
    let from = levels;
    for (let s = 3; s < predict; s++) from += n - s;
    const later = fits.slice(from, from + n - predict).map(v => v.map(w => w / 1e3));
    f = plain.slice(0, predict - 2).concat(later);
    stop = reach(f, seen - 2)[2];
  }
  const at = (i, u) => f[i][0] - f[i][2] * Math.pow(u / data.share[i + 2], -f[i][1]);
  const shown = Array.from({length: seen - 2}, (_, i) => i);
  const last = seen - 3, final = y[n - 1];
  const result = {
    share: data.share.map(v => 100 * v), y: y,
    seen_share: data.share.slice(0, seen).map(v => 100 * v), seen_y: y.slice(0, seen),
    grid: data.grid.map(v => 100 * v), level: shown.map(i => i + 3),
    asymptote: shown.map(i => f[i][0]), forecast: shown.map(i => at(i, 1)),
    gap: shown.map(i => f[i][2]), final: final, tau: controls.tau,
    work: work, predict: predict, stop: stop,
    now: at(last, 1), missed: Math.abs(at(last, 1) - final), left: f[last][2]
  };
  for (let j = 0; j < data.fan; j++) {
    const i = Math.floor((seen - 3) * j / (data.fan - 1) + 0.5);
    result['fan' + j] = data.grid.map(u => at(i, u));
  }
  return result;
}
"""


def explore_traces(
    x: Any = None, curves: Mapping[str, Any] | None = None, **state: Any
) -> Explorer:
    """See learning traces of your curves settle, level by level, and where you would stop.

    Args:
        x: (n,) sizes in equal steps, 10 to 40 of them (20 or fewer keep an exported page small);
            the unit of the tolerance is one step. Without them, two made-up curves that end at 90:
            one smooth, one irregular.
        curves: accuracies in percent, `(n,)` each, by name.
        state: where the controls start: `curve`, `seen`, `tolerance`, `tau`, `anchor`.

    Returns:
        The explorer; `.show()` it.
    """
    given = [] if x is None else ["x", "curves"]
    if x is None or curves is None:
        x, curves = _made_up()
    names = list(curves)
    x = np.asarray(checks.as_floats(x, "x", ndim=1), float)
    y = np.stack([np.asarray(checks.as_floats(curves[k], f"curves[{k!r}]", ndim=1)) for k in names])
    n = len(x)
    if not 10 <= n <= 40:
        raise ValueError(f"x: expected 10 to 40 sizes, got {n}")
    share = x / x[-1]
    fits = np.stack([_fits(share, row) for row in y])
    grid = np.linspace(share[0], 1, 33)

    def compute(curve: str, seen: int, tolerance: float, tau: float, anchor: bool) -> dict:
        k = names.index(curve)
        work, predict, stop = _reach(plain := fits[k, : n - 2] / 1e3, seen - 2, tolerance, tau)
        f = plain
        if anchor and predict is not None:
            first = n - 2 + sum(n - s for s in range(FIRST, predict))
            f = np.concatenate([plain[: predict - 2], fits[k, first : first + n - predict] / 1e3])
            stop = _reach(f, seen - 2, tolerance, tau)[2]
        c, b, gap = f[: seen - 2].T
        forecast = c - gap * (1 / share[2:seen]) ** -b
        fan = [int((seen - 3) * j / (FAN - 1) + 0.5) for j in range(FAN)]
        return {
            "share": 100 * share, "y": y[k], "seen_share": 100 * share[:seen],
            "seen_y": y[k, :seen], "grid": 100 * grid, "level": np.arange(FIRST, seen + 1),
            "asymptote": c, "forecast": forecast, "gap": gap, "final": float(y[k, -1]), "tau": tau,
            "work": work, "predict": predict, "stop": stop, "now": float(forecast[-1]),
            "missed": float(abs(forecast[-1] - y[k, -1])), "left": float(gap[-1]),
        } | {
            f"fan{j}": c[i] - gap[i] * (grid / share[i + 2]) ** -b[i] for j, i in enumerate(fan)
        }  # fmt: skip

    low = float(np.floor(y.min() / 5) * 5)
    accuracy = Axis("accuracy", (low, 104.0), unit="%")
    small = fits.size <= EXPORTED
    data = {"names": names, "share": share, "y": y, "fits": fits, "grid": grid, "look": LOOK}
    explorer = Explorer(
        name="scaling_laws.learning_traces",
        title="A learning trace: one power law for every level",
        about="Raise the levels seen: the fan closes; then tighten the tolerance.",
        controls=[
            Choice("curve", "Curve", names),
            Slider("seen", "Levels seen", 4, n, step=1, value=min(n, 12)),
            Slider("tolerance", "Asymptote may move, a step", 0.02, 2.0, log=True, step=0.1,
                   value=0.2, unit="points"),
            Slider("tau", "Stop when left to gain (τ)", 0.1, 10.0, log=True, step=0.1, value=1.0,
                   unit="points"),
            Toggle("anchor", "Anchors"),
        ],
        compute=compute,
        panels=[
            Panel(
                "Misses by {missed:.1f} points",
                x=Axis("training data", (0.0, 103.0), unit="% of all"), y=accuracy,
                draws=[
                    *(Line("grid", f"fan{j}", color=shade, width=1.6)
                      for j, shade in enumerate(SHADES)),
                    Points("share", "y", label="still to come", color="grey", symbol="ring"),
                    Points("seen_share", "seen_y", label="seen", color="ink"),
                ],
            ),
            Panel(
                "Asymptote and forecast",
                x=Axis("level", (2.0, n + 1.0)), y=accuracy,
                draws=[
                    Line("level", "asymptote", label="asymptote c", color="blue", markers=True),
                    Line("level", "forecast", label="forecast, all data", color="vermillion",
                         markers=True),
                    HLine("final", "true", color="grey"),
                    VLine("predict", "prediction level", color="green"),
                ],
            ),
            Panel(
                "Left to gain, χ",
                x=Axis("level", (2.0, n + 1.0)), y=Axis("left to gain", (0.001, 300.0), log=True,
                                                        unit="points"),
                draws=[
                    Line("level", "gap", label="χ", color="purple", markers=True),
                    HLine("tau", "τ", color="grey"),
                    VLine("stop", "stop", color="green"),
                ],
            ),
        ],
        readouts=[
            Readout("work", "working level", "d"), Readout("predict", "prediction level", "d"),
            Readout("stop", "stop level", "d"),
            Readout("now", "forecast", ".1f", unit="%"),
            Readout("left", "left to gain", ".2f", unit="points"),
        ],
        script=SCRIPT if small else None,
        data=data | {"fan": FAN} if small else None,
        call=(
            "scaling_laws.figures_learning_curve_traces.explore_traces("
            f"{', '.join([*given, '{state}'])})"
        ),
    )  # fmt: skip
    return explorer.set(**state)


def fan(trace: Trace, upto: int, ax: Axes, *, full: float, title: str = "", every: int = 1) -> Axes:
    """The observations of one curve and its trends of levels 3 to `upto`, coloured by level.

    Args:
        trace: of one curve.
        upto: the last level drawn.
        full: the size up to which the trends are drawn.
        every: draw only each such level, counted back from `upto`.
    """
    sizes = np.linspace(trace.x[0], full, 120)
    colors = theme.colormap("sequential")
    levels = trace.levels[upto - FIRST :: -every][::-1]
    lines = trace.predict(sizes)
    for level in levels:
        shade = colors((level - FIRST) / max(upto - FIRST, 1) * 0.85)
        ax.plot(sizes / full * 100, lines[level - FIRST], color=shade, lw=1.1)
    palette = plots.palette()
    ax.scatter(
        trace.x / full * 100, trace.y, s=14, facecolors="none", edgecolors=palette["grey"], zorder=3
    )
    ax.scatter(trace.x[:upto] / full * 100, trace.y[:upto], s=14, color=palette["ink"], zorder=4)
    note = f"lines: levels {levels[0]} to {levels[-1]}, dark to light\nrings: not yet seen"
    ax.text(
        0.98, 0.03, note, transform=ax.transAxes, ha="right", va="bottom", fontsize=8.5,
        color=theme.MUTED,
    )  # fmt: skip
    low = float(np.min(trace.y))
    ax.set(
        xlabel="training data (% of all)",
        ylabel="accuracy (%)",
        ylim=(low - 0.1 * (104 - low), 104),
    )
    ax.set_title(title, loc="left")
    return ax


def _fits(share: np.ndarray, y: np.ndarray) -> np.ndarray:
    """c, b and gap in units of 1e-3, as whole numbers: the plain trace, then after each start.

    Rows n-2 and on: for starts 3 to n-1, the anchored levels after the start.
    """
    n = len(share)
    starts = np.arange(FIRST, n)
    plain = learning_trace(share, y)
    anchored = learning_trace(share, np.tile(y, (len(starts), 1)), anchor=True, start=starts)
    rows = [_packed(plain)]
    later = _packed(anchored)
    rows += [later[j, start - FIRST + 1 :] for j, start in enumerate(starts)]
    return np.rint(np.concatenate(rows) * 1e3).astype(np.int64)


def _packed(trace: Trace) -> np.ndarray:
    return np.stack([trace.asymptote, trace.coef[..., 1], trace.gap], axis=-1)


def _reach(
    f: np.ndarray, count: int, bound: float, tau: float
) -> tuple[int | None, int | None, int | None]:
    """Working, prediction and stop level of the first `count` levels (c, b, gap)."""
    c, gap = f[:count, 0], f[:count, 2]
    rising = gap > 0
    calm = (np.abs(np.diff(c)) <= bound) & rising[:-1] & rising[1:]
    settled = [bool(calm[i : i + LOOK + 1].all()) for i in range(len(calm) - LOOK)]
    if not any(settled):
        return None, None, None
    work = settled.index(True)
    trusted = np.flatnonzero((np.arange(count) >= work) & (c <= 100))
    if not len(trusted):
        return work + FIRST, None, None
    near = np.flatnonzero((np.arange(count) >= trusted[0]) & (gap <= tau))
    return work + FIRST, int(trusted[0]) + FIRST, int(near[0]) + FIRST if len(near) else None


def _made_up() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A smooth and an irregular curve that would end at 95 and have reached 90."""
    x = np.arange(1, 21) / 20
    smooth = 95 - 5 * x**-0.6
    noise = np.random.default_rng(0).normal(0, 0.5, len(x))
    return x, {"smooth": smooth, "irregular": smooth + noise}
