"""Explorer of drawn losses: their slopes at a batch and what they integrate to; accuracy curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.lab import checks
from workbench.losses import margins
from workbench.losses.ensloss import implied, staircase
from workbench.losses.experiments.ensloss import FIXED
from workbench.plots import escape, mpl, theme
from workbench.plots.explorer import Axis, Explorer, Line, Panel, Points, Readout, Slider, Steps
from workbench.plots.panels import Band

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

GRID = np.linspace(-4, 4, 65)
DRAWS = 20
SIZES = (4, 8, 16, 32, 64)
STYLES = (("logistic", "blue", "dash"), ("hinge", "green", "dot"), ("exponential", "grey", "dot"))
KNOWN = {"logistic": margins.bce, "hinge": margins.hinge, "exponential": margins.exponential}

SCRIPT = """
function (controls, data) {
  const lam = controls.lam, grid = data.grid;
  const z = data.margins[String(controls.size)].map(v => v + controls.shift);
  function slopesOf(draw) {
    const steep = data.xi[draw].slice(0, z.length).map(xi => {
      const power = lam === 0 ? xi : Math.log1p(Math.max(lam * xi, -1)) / lam;
      return -Math.exp(Math.min(power, 0));
    }).sort((a, b) => a - b);
    return steep.map((g, i) => g / Math.max(z[i], 1) - 1e-6);
  }
  function below(t) {
    let k = 0;
    while (k < z.length && z[k] <= t) k++;
    return k;
  }
  function bend(g, k) {
    return k > 0 && k < z.length ? (g[k] - g[k - 1]) / (z[k] - z[k - 1]) : 0;
  }
  function slopeAt(g, t) {
    const k = below(t), left = Math.max(k - 1, 0);
    return g[left] + bend(g, k) * (t - z[left]);
  }
  function lossOf(g) {
    const area = [0];
    for (let i = 1; i < z.length; i++) {
      area.push(area[i - 1] + (g[i - 1] + g[i]) / 2 * (z[i] - z[i - 1]));
    }
    function integral(t) {
      const k = below(t), left = Math.max(k - 1, 0), step = t - z[left];
      return area[left] + step * g[left] + step * step * bend(g, k) / 2;
    }
    const start = integral(0);
    return grid.map(t => 1 + integral(t) - start);
  }
  const all = data.xi.map((_, k) => slopesOf(k)), losses = all.map(lossOf);
  const slopes = all[controls.draw - 1];
  const ends = pick => grid.map((_, j) => pick(...losses.map(row => row[j])));
  const share = test => slopes.filter(test).length / slopes.length;
  return {
    grid: grid, z: z, slopes: slopes, path: grid.map(t => slopeAt(slopes, t)),
    loss: losses[controls.draw - 1], low: ends(Math.min), high: ends(Math.max),
    slope_logistic: data.slope_logistic, loss_logistic: data.loss_logistic,
    slope_hinge: data.slope_hinge, loss_hinge: data.loss_hinge,
    slope_exponential: data.slope_exponential, loss_exponential: data.loss_exponential,
    mean: slopes.reduce((a, b) => a + b, 0) / slopes.length,
    steep: share(g => g <= -1), flat: share(g => g > -0.01)
  };
}
"""


def explore_drawn_losses(batch: Any = None, *, seed: int = 0, **state: Any) -> Explorer:
    """Draw again: slopes at the margins of a batch, and the convex loss that has them.

    Args:
        batch: your own margins y f(x), at least 64 different ones (their quantiles are shown); by
            default those of a normal distribution with standard deviation 1.5.
        seed: of the draws.
        state: where the controls start: ``draw``, ``lam``, ``size``, ``shift``.

    Returns:
        The explorer; `.show()` it.

    Raises:
        ValueError: there are fewer than 64 different margins.
    """
    xi = torch.randn(
        DRAWS, max(SIZES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    places = {size: (np.arange(size) + 0.5) / size for size in SIZES}
    if batch is None:
        chosen = {
            size: 1.5 * torch.special.ndtri(torch.tensor(q)).numpy() for size, q in places.items()
        }
    else:
        own = np.unique(checks.to_numpy(checks.as_floats(batch, "batch", ndim=1)).astype(float))
        if len(own) < max(SIZES):
            raise ValueError(f"batch: expected {max(SIZES)} different margins, got {len(own)}")
        chosen = {size: np.quantile(own, q) for size, q in places.items()}
    fixed = _fixed()
    grid = torch.tensor(GRID)

    def compute(draw: int, lam: float, size: int, shift: float) -> dict[str, Any]:
        z = torch.tensor(chosen[size] + shift)
        slopes = staircase(z.expand(DRAWS, size), xi[:, :size], lam)
        losses = np.stack([implied(z, row, grid).numpy() for row in slopes])
        mine = slopes[draw - 1].numpy()
        return {
            "grid": GRID, "z": z.numpy(), "slopes": mine, "path": np.interp(GRID, z.numpy(), mine),
            "loss": losses[draw - 1], "low": losses.min(0), "high": losses.max(0),
            **fixed, "mean": float(mine.mean()),
            "steep": float((mine <= -1).mean()), "flat": float((mine > -0.01).mean()),
        }  # fmt: skip

    known = {
        what: [
            Line("grid", f"{what}_{name}", label=name, color=color, dash=dash, width=1.6)
            for name, color, dash in STYLES
        ]
        for what in ("slope", "loss")
    }
    explorer = Explorer(
        name="losses.drawn",
        title="Every step descends another calibrated loss",
        about="Draw again. Then raise the batch size: sorted draws of a large batch hardly differ. "
        "Move the margins to the right, as training does: beyond 1 slopes shrink like 1/margin.",
        controls=[
            Slider("draw", "Draw", 1, DRAWS, step=1, value=1),
            Slider("lam", "Lambda", -1.0, 1.0, step=0.1, value=0.0, format=".1f"),
            Steps("size", "Batch size", list(SIZES), value=16),
            Slider("shift", "Margins moved by", -1.0, 3.0, step=0.25, value=0.0, format=".2f"),
        ],
        compute=compute,
        panels=[
            Panel(
                "Draw {draw}: mean slope {mean:.2f}",
                x=Axis("margin", (-4, 4)),
                y=Axis("slope of the loss", (-1.6, 0.1)),
                draws=[
                    *known["slope"],
                    Line("grid", "path", label="drawn", color="vermillion", width=2.6),
                    Points("z", "slopes", label="batch", color="ink", size=5),
                ],
            ),
            Panel(
                "Its loss, set to 1 at margin 0",
                x=Axis("margin", (-4, 4)),
                y=Axis("loss", (-2, 5)),
                draws=[
                    Band("grid", "low", "high", label=f"{DRAWS} draws", color="vermillion"),
                    *known["loss"],
                    Line("grid", "loss", label="drawn", color="vermillion", width=2.6),
                ],
            ),
        ],
        readouts=[
            Readout("mean", "mean slope", ".3f"),
            Readout("steep", "at the cap of -1", ".0%"),
            Readout("flat", "flatter than -0.01", ".0%"),
        ],
        script=SCRIPT,
        data={
            "grid": GRID,
            "xi": xi.numpy(),
            "margins": {str(size): values.tolist() for size, values in chosen.items()},
            **fixed,
        },
        call="losses.figures_ensloss.explore_drawn_losses("
        + ("" if batch is None else "batch, ")
        + "{state})",
    )  # fmt: skip
    return explorer.set(**state)


def _fixed() -> dict[str, np.ndarray]:
    """Slopes and values of the losses everybody knows, scaled to 1 at margin 0."""
    found = {}
    for name, loss in KNOWN.items():
        value, slope, _ = margins.derivatives(loss, GRID)
        unit = float(loss(torch.zeros(1))[0])
        found[f"slope_{name}"], found[f"loss_{name}"] = slope / unit, value / unit
    return found


NAMES = {
    "ensloss": ("EnsLoss", "vermillion"),
    "bce": ("BCE", "blue"),
    "hinge": ("hinge", "green"),
    "exponential": ("exponential", "grey"),
    "average": ("average slopes", "orange"),
}


def draw_curves(frame: pd.DataFrame, ax: Axes, title: str = "") -> Axes:
    """Test accuracy along training, mean over seeds with its 95% interval, a line a loss.

    Solid lines have the learning rate chosen for their loss, dotted ones the large one of both.

    Args:
        frame: rows of `experiments.ensloss.compare`.
        ax: axes to draw on.
        title: the finding.
    """
    colors = theme.palette()
    lines = [(name, label, color, "-") for name, (label, color) in NAMES.items()]
    lines += [
        (f"{name}_shared", f"{NAMES[name][0]}, large rate", NAMES[name][1], ":")
        for name in ("ensloss", "bce")
    ]
    for name, label, color, style in lines:
        mean, low, high = mpl.interval(np.stack(list(frame[f"curve_{name}"])))
        ax.plot(frame.epoch.iloc[0], mean, style, color=colors[color], label=label)
        if len(frame) > 1:
            ax.fill_between(frame.epoch.iloc[0], low, high, color=colors[color], alpha=0.15, lw=0)
    lowest = min(np.stack(list(frame[f"curve_{name}"]))[:, -1].mean() for name, *_ in lines)
    ax.set_ylim(lowest - 9, None)  # room for the legend; slow starts come in from below
    ax.set(xlabel="epoch", ylabel="test accuracy, mean over pairs (%)")
    ax.set_title(escape.matplotlib(title), loc="left", fontweight="bold", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, ncols=2)
    return ax


def draw_pairs(frame: pd.DataFrame, ax: Axes, names: list[str], title: str = "") -> Axes:
    """EnsLoss minus each fixed loss on every pair of digits: mean over seeds and 95% interval.

    Args:
        frame: rows of `experiments.ensloss.compare`.
        ax: axes to draw on.
        names: of the pairs.
        title: the finding.
    """
    colors = theme.palette()
    mine = np.stack(list(frame.pairs_ensloss))
    for i, name in enumerate(FIXED):
        mean, low, high = mpl.interval(mine - np.stack(list(frame[f"pairs_{name}"])))
        label, color = NAMES[name]
        ax.errorbar(
            np.arange(len(mean)) + 0.22 * (i - 1), mean, [mean - low, high - mean],
            fmt="o", ms=4, lw=1.2, color=colors[color], label=f"over {label}",
        )  # fmt: skip
    ax.axhline(0, color="0.4", lw=0.8)
    ax.set_xticks(range(len(names)), [escape.matplotlib(name) for name in names], fontsize=8)
    ax.set(xlabel="pair of digits", ylabel="EnsLoss gains (points)")
    ax.set_title(escape.matplotlib(title), loc="left", fontweight="bold", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    return ax
