"""Explorer of the dice losses of one example; figures of precision, recall and imbalance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from workbench.lab import checks
from workbench.losses.dice_loss import dice_loss, dsc_loss
from workbench.plots import escape, theme
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
    VLine,
)
from workbench.plots.mpl import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID = np.linspace(0.01, 0.99, 50)
SHOWN = 80  # of the reader's predictions at most, so that the exported face stays small
COLORS = {
    "ce": "grey", "focal": "purple", "weighted": "#B8A200", "dl": "blue", "dsc": "vermillion",
    "detached": "green", "batch": "orange", "released": "sky",
    "coded": "ink", "own": "#7A5195",
}  # fmt: skip
NAMES = {
    "ce": "cross-entropy", "focal": "focal", "weighted": "weighted CE", "dl": "dice",
    "dsc": "DSC as printed", "detached": "DSC, weight detached", "own": "DSC, label only",
    "batch": "batch dice",
    "released": "released settings", "coded": "released OHEM",
}  # fmt: skip

SCRIPT = """
function (controls, data) {
  const a = controls.alpha, g = controls.gamma, y = controls.y;
  const power = q => Math.pow(1 - q, a);
  const dice = q => 1 - (2 * q * y + g) / (q * q + y * y + g);
  const dsc = q => 1 - (2 * power(q) * q * y + g) / (power(q) * q + y + g);
  const diceSlope = q => {
    const d = q * q + y * y + g;
    return (-2 * y * d + (2 * q * y + g) * 2 * q) / (d * d);
  };
  const outer = q => {  // slope of the loss in s = w p
    const d = power(q) * q + y + g;
    return (-2 * y * d + 2 * power(q) * q * y + g) / (d * d);
  };
  const turn = 1 / (1 + a);
  const own = data.own_p.filter((q, i) => data.own_y[i] === y);
  const beyond = own.filter(q => q > turn).length;
  return {
    p: data.p,
    ce: data.p.map(q => -Math.log(y ? q : 1 - q)), dice: data.p.map(dice), dsc: data.p.map(dsc),
    dice_slope: data.p.map(diceSlope),
    printed: data.p.map(q => outer(q) * power(q) * (1 - a * q / (1 - q))),
    detached: data.p.map(q => outer(q) * power(q)),
    turn: turn, at_turn: dsc(turn), at_one: y ? 1 - g / (1 + g) : 0,
    own_p: own, own_loss: own.map(dsc), beyond: own.length ? beyond / own.length : 1 - turn
  };
}
"""


def explore_dice(p: Any = None, y: Any = None, **state: Any) -> Explorer:
    """Move the two constants of the self-adjusting dice and see which way it pushes p.

    Args:
        p: your model's probabilities of the positive class, (n,); at most 80 evenly spaced rows are
            drawn on the curve of their label.
        y: their labels, 0 or 1.
        state: where the controls start: ``alpha``, ``gamma``, ``y``.

    Raises:
        ValueError: one of p and y is missing, their lengths differ, or a value is out of range.
    """
    given = p is not None or y is not None
    own_p, own_y = np.empty(0), np.empty(0, int)
    if given:
        if p is None or y is None or len(p) != len(y):
            raise ValueError("p and y: expected both, of the same length")
        own_p = checks.to_numpy(checks.as_unit(p, "p")).astype(float)
        own_y = checks.to_numpy(checks.as_labels(y, 2, "y"))
        step = -(-len(own_p) // SHOWN)
        own_p, own_y = own_p[::step], own_y[::step]

    def compute(alpha: float, gamma: float, y: int) -> dict[str, Any]:
        grid, label = torch.tensor(GRID, requires_grad=True), torch.tensor(y)

        def dsc(q: torch.Tensor, detach: bool = False) -> torch.Tensor:
            return dsc_loss(q, label, alpha, gamma, detach, reduction="none")

        def slope(values: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(values.sum(), grid)[0]

        turn = 1 / (1 + alpha)
        ends = dsc(torch.tensor([turn, 1.0], dtype=torch.float64)).tolist()
        own = own_p[own_y == y]
        dice = dice_loss(grid, label, gamma=gamma, reduction="none")
        target = torch.full_like(grid, y)
        return {
            "p": GRID,
            "ce": F.binary_cross_entropy(grid, target, reduction="none"),
            "dice": dice, "dsc": dsc(grid),
            "dice_slope": slope(dice), "printed": slope(dsc(grid)),
            "detached": slope(dsc(grid, True)),
            "turn": turn, "at_turn": ends[0], "at_one": ends[1] if alpha else float(ends[1]),
            "own_p": own, "own_loss": dsc(torch.from_numpy(own)).numpy(),
            "beyond": float((own > turn).mean()) if len(own) else 1 - turn,
        }  # fmt: skip

    marks = Points("own_p", "own_loss", label="yours", color="purple", size=6)
    explorer = Explorer(
        name="losses.dice",
        title="Past p = 1 / (1 + α) the self-adjusting dice pushes the wrong way",
        about="Lower α to 0.01, as the released scripts do: the turn moves to the edge. Then look "
        "at a negative.",
        controls=[
            Slider("alpha", "Power α", 0.01, 2.0, step=0.01, value=1.0),
            Slider("gamma", "Smoothing γ", 0.05, 2.0, step=0.05, value=1.0),
            Choice("y", "Label", [1, 0], labels=["positive (y = 1)", "negative (y = 0)"]),
        ],
        compute=compute,
        panels=[
            Panel(
                "DSC turns at p = {turn:.2f}",
                x=Axis("p", (0, 1)), y=Axis("loss", (0, 1.2)),
                draws=[
                    Line("p", "ce", label="cross-entropy", color="grey", dash="dot"),
                    Line("p", "dice", label="dice", color="blue"),
                    Line("p", "dsc", label="DSC", color="vermillion"),
                    *([marks] if given else []),
                    VLine("turn", "", color="grey"),
                ],
            ),
            Panel(
                "There its slope changes sign",
                x=Axis("p", (0, 1)), y=Axis("d loss / d p", (-2.1, 2.1)),
                draws=[
                    HLine(0.0, "", color="grey", dash="solid"),
                    Line("p", "dice_slope", label="dice", color="blue"),
                    Line("p", "printed", label="DSC as printed", color="vermillion"),
                    Line("p", "detached", label="DSC, weight detached", color="green", dash="dash"),
                    VLine("turn", "", color="grey"),
                ],
            ),
        ],
        readouts=[
            Readout("turn", "turn", ".3f"), Readout("at_turn", "DSC at the turn", ".3f"),
            Readout("at_one", "DSC at p = 1", ".3f"),
            Readout("beyond", "of your p past it" if given else "of [0, 1] past it", ".0%"),
        ],
        script=SCRIPT,
        data={"p": GRID, "own_p": own_p, "own_y": own_y},
        call=f"losses.figures_dice_loss.explore_dice({'p, y, ' if given else ''}{{state}})",
    )  # fmt: skip
    return explorer.set(**state)


def draw_precision(
    frame: pd.DataFrame, recall: np.ndarray, ax: Axes, *, names: Sequence[str] = tuple(NAMES)
) -> Axes:
    """Precision against recall of "part of a name", mean and (at four places) 95% interval.

    Args:
        frame: rows of `experiments.dice_loss.tag`.
        recall: the levels of its ``precision_*``.
        ax: axes to draw on.
        names: losses drawn.
    """
    for name in names:
        mean, low, high = interval(np.stack(frame[f"precision_{name}"].to_list()))
        color = theme.color(COLORS[name])
        ax.plot(recall, mean, color=color, label=escape.matplotlib(NAMES[name]))
        at = slice(len(recall) // 8, None, len(recall) // 4)
        ends = [(mean - low.clip(0))[at], (high.clip(None, 1) - mean)[at]]
        ax.errorbar(recall[at], mean[at], ends, fmt="none", capsize=2, elinewidth=1.2, color=color)
    ax.set(xlabel="recall of tokens in names", ylabel="precision", xlim=(0, 1), ylim=(0, 1.05))
    ax.legend(frameon=False, fontsize=8, loc=(0.03, 0.07))
    return ax


def draw_gains(
    frame: pd.DataFrame,
    ax: Axes,
    *,
    names: Sequence[str],
    baseline: str = "ce",
) -> Axes:
    """Token F1 above the baseline's at each share of entity tokens, 95% interval over seeds.

    Args:
        frame: rows of `experiments.dice_loss.shares`.
        ax: axes to draw on.
        names: losses drawn.
        baseline: the loss they are compared with.
    """
    levels = sorted(frame.share.unique(), reverse=True)
    groups = [frame[frame.share == level] for level in levels]
    at = np.arange(len(groups))
    ax.axhline(0, color=theme.color(COLORS[baseline]), lw=1)
    for i, name in enumerate(names):
        gains = np.stack([(g[f"f1_{name}"] - g[f"f1_{baseline}"]).to_numpy() for g in groups], 1)
        mean, lower, upper = interval(gains)
        ax.errorbar(
            at + 0.08 * (i - (len(names) - 1) / 2), mean, [mean - lower, upper - mean], fmt="o-",
            ms=5, capsize=2, color=theme.color(COLORS[name]), label=escape.matplotlib(NAMES[name]),
        )  # fmt: skip
    ax.set_xticks(at, [f"{100 * share:g}%" for share in levels])
    ax.set(xlabel="tokens in names", ylabel=f"token F1 above {NAMES[baseline]} (points)")
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.25 * (high - low), high)  # room for the legend
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


def draw_scores(frame: pd.DataFrame, ax: Axes, *, names: Sequence[str] = tuple(NAMES)) -> Axes:
    """Span F1 of each loss: a dot a seed, mean with its 95% interval.

    Args:
        frame: rows of `experiments.dice_loss.tag`.
        ax: axes to draw on.
        names: losses drawn, from the top.
    """
    values = np.stack([frame[f"f1_{name}"].to_numpy(float) for name in names], 1)
    mean, low, high = interval(values)
    at = -np.arange(len(names))
    for i, name in enumerate(names):
        color = theme.color(COLORS[name])
        ax.plot(
            values[:, i], np.full(len(values), at[i] - 0.16), "o", ms=3.5, color=color, alpha=0.5
        )
        ax.errorbar(
            mean[i], at[i] + 0.1, xerr=[[mean[i] - low[i]], [high[i] - mean[i]]], fmt="D", ms=5,
            capsize=3, color=color,
        )  # fmt: skip
    ax.set_yticks(at, [escape.matplotlib(NAMES[name]) for name in names])
    ax.set_xlabel(f"span F1 (%): {len(values)} splits, mean and 95% interval")
    return ax
