"""Explorer of the Z-loss' two knobs; figures of step times and of top-k accuracy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.losses.experiments.z_loss import TOP
from workbench.losses.spherical import z_curve
from workbench.losses.z_loss import z_loss, z_scores
from workbench.plots import mpl, theme
from workbench.plots.explorer import Axis, Explorer, Line, Panel, Points, Readout, Slider, VLine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    "softmax": "log-softmax", "z": "Z-loss", "released": "Z-loss, a = 1, b = 0",
    "taylor": "Taylor softmax", "mse": "squared error",
}  # fmt: skip
COLORS = {
    "softmax": "vermillion", "z": "blue", "released": "sky", "taylor": "green", "mse": "orange",
    "adaptive": "green",
}  # fmt: skip
A, B = (0.05, 10.0), (0.5, 20.0)
SHOWN = 200  # rows at most, so that the exported face stays small

SCRIPT = """
function (controls, data) {
  const a = controls.a, b = controls.b;
  const loss = z => {
    const t = a * (b - z);
    return (Math.max(t, 0) + Math.log1p(Math.exp(-Math.abs(t)))) / a;
  };
  const pull = z => 1 / (1 + Math.exp(a * (z - b)));
  const losses = data.z.map(loss), pulls = data.z.map(pull);
  const total = values => values.reduce((s, v) => s + v, 0);
  const top = pulls.filter((v, i) => data.rank[i] <= 10);
  const rest = pulls.filter((v, i) => data.rank[i] > 10);
  const mean = values => values.length ? total(values) / values.length : 0;
  return {
    curve: data.grid.map(loss), grid: data.grid, z: data.z, rank: data.rank, losses: losses,
    pulls: pulls, bend: b, most: data.most, mean: mean(losses), top: mean(top), rest: mean(rest),
    share: total(rest) / total(pulls)
  };
}
"""


def example_outputs(seed: int = 0, rows: int = SHOWN, classes: int = 1000) -> tuple[Tensor, Tensor]:
    """Outputs of an imagined model, from rows it knows to rows it does not."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    known = 12 * torch.rand(rows, generator=generator, dtype=torch.float64) ** 2
    return logits.scatter_add(1, target[:, None], known[:, None]), target


def explore_z_loss(
    logits: Tensor | None = None, target: Tensor | None = None, **state: Any
) -> Explorer:
    """Move a and b: the loss against the standardised score, and which rows it still pulls at.

    Args:
        logits: (n, D) outputs of your model; without them, of an imagined one.
        target: (n,) classes.
        state: where the sliders start: ``a``, ``b``.

    Returns:
        The explorer; `.show()` it.

    Raises:
        ValueError: one of ``logits`` and ``target`` is missing, or they do not fit together.
    """
    if (logits is None) != (target is None):
        raise ValueError("logits and target: give both or neither")
    if logits is None or target is None:
        logits, target = example_outputs()
    z_loss(logits, target)  # refuses what does not fit
    logits, target = logits.detach().double(), target.detach()
    at = target[:, None]
    z = z_scores(logits).gather(1, at)[:, 0].cpu().numpy()
    rank = (logits >= logits.gather(1, at)).sum(1).cpu().numpy()
    every = -(-len(z) // SHOWN)
    z, rank = z[::every].round(4), rank[::every]
    most = math.sqrt(logits.shape[1] - 1)
    low, high = min(-2.0, z.min() - 0.5), max(B[1], z.max()) + 1
    grid = np.linspace(low, high, 111).round(4)
    tall = float(z_curve(torch.tensor(low), A[0], B[1]))

    def compute(a: float, b: float) -> dict[str, Any]:
        pulls = 1 / (1 + np.exp(a * (z - b)))
        losses, top, rest = _loss(z, a, b), pulls[rank <= 10], pulls[rank > 10]
        return {
            "grid": grid, "curve": _loss(grid, a, b), "z": z, "losses": losses, "rank": rank,
            "pulls": pulls, "bend": b, "most": most, "mean": float(losses.mean()),
            "top": float(top.mean()) if len(top) else 0.0,
            "rest": float(rest.mean()) if len(rest) else 0.0,
            "share": float(rest.sum() / pulls.sum()),
        }  # fmt: skip

    limit = [VLine("most", "√(D−1)", color="grey")] if most < high else []
    explorer = Explorer(
        name="losses.z_loss",
        title="Two knobs decide which places in the ranking the Z-loss works for",
        about="Lower b: rows near the top are left alone and the rest are worked on, which is what "
        "top-k wants. Raise a: the bend becomes a corner.",
        controls=[
            Slider("a", "Sharpness a", *A, value=1.0, log=True, format=".2f"),
            Slider("b", "Bend b", *B, step=0.5, value=2.0, format=".1f"),
        ],
        compute=compute,
        panels=[
            Panel(
                "The loss bends at b = {b:.1f}",
                x=Axis("standardised score of the target, z", (low, high)),
                y=Axis("loss", (0, 1.03 * tall)),
                draws=[
                    Line("grid", "curve", label="Z-loss", color="blue"),
                    Points("z", "losses", label="rows", color="orange", size=5),
                    VLine("bend", "b", color="grey"),
                    *limit,
                ],
            ),
            Panel(
                "Pull in the top 10: {top:.2f}, below: {rest:.2f}",
                x=Axis("rank of the target", (0.8, 1.3 * logits.shape[1]), log=True),
                y=Axis("pull on the row, |dL/dz|", (-0.03, 1.03)),
                draws=[Points("rank", "pulls", label="rows", color="orange", size=5)],
            ),
        ],
        readouts=[
            Readout("mean", "mean loss", ".3f"),
            Readout("top", "mean pull, rank 1 to 10", ".2f"),
            Readout("rest", "mean pull, rank above 10", ".2f"),
            Readout("share", "of all pull goes below the top 10", ".0%"),
        ],
        script=SCRIPT,
        data={"grid": grid, "z": z, "rank": rank, "most": most},
        call="losses.figures_z_loss.explore_z_loss(logits, target, {state})",
    )  # fmt: skip
    return explorer.set(**state)


def draw_times(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Processor milliseconds of a step over the number of classes, both axes logarithmic.

    Args:
        frame: rows of `experiments.z_loss.update_time` with a column ``classes``.
        ax: axes to draw on.
    """
    colors = theme.palette()
    names = {"softmax": NAMES["softmax"], "adaptive": "adaptive softmax", "z": "Z-loss, factored"}
    for way, name in names.items():
        times = frame.groupby("classes")[way]
        middle = times.median()
        color = colors[COLORS[way]]
        ax.fill_between(middle.index, times.min(), times.max(), color=color, alpha=0.2, lw=0)
        ax.plot(middle.index, middle, "o-", ms=4, color=color, label=name)
    ax.legend(frameon=False, fontsize=8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set(xlabel="classes D", ylabel="one training step (ms of processor)")
    return ax


def draw_top_k(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Top-k accuracy less that of log-softmax: mean over seeds with its 95% interval.

    Args:
        frame: rows of `experiments.z_loss.compare`.
        ax: axes to draw on.
    """
    colors = theme.palette()
    ax.axhline(0, color=colors[COLORS["softmax"]], lw=1.5)
    for i, loss in enumerate(("z", "released", "taylor", "mse")):
        gain = np.stack([frame[f"top{k}_{loss}"] - frame[f"top{k}_softmax"] for k in TOP], 1)
        middle, low, high = mpl.interval(gain)
        place = np.array(TOP) * 1.03 ** (i - 1.5)
        ax.errorbar(place, middle, [middle - low, high - middle], fmt="o-", ms=4, capsize=2,
                    color=colors[COLORS[loss]], label=NAMES[loss])  # fmt: skip
    ax.plot([], [], color=colors[COLORS["softmax"]], label=NAMES["softmax"])
    ax.set_xscale("log")
    ax.set_xticks(TOP, [str(k) for k in TOP])
    ax.minorticks_off()
    ax.set(xlabel="k", ylabel="top-k accuracy, gap (points)")
    ax.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    return ax


def _loss(z: np.ndarray, a: float, b: float) -> np.ndarray:
    return z_curve(torch.from_numpy(z), a, b).numpy()
