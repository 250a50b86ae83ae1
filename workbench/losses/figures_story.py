"""The opening's figure: losses and slopes against the margin, and who wins where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from workbench.lab.claims import interval
from workbench.losses import margins
from workbench.plots import theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = ("logistic", "hinge", "exponential", "sigmoid (MAE)")
REFERENCE = "logistic"


def draw_margins(ax: Axes, ax_slope: Axes, names: Sequence[str] = SHOWN) -> None:
    """Losses against the margin, and beside them their slopes, labelled at the line."""
    z = np.linspace(-3, 3, 241)
    for i, name in enumerate(names):
        value, slope, _ = margins.derivatives(margins.MARGIN_LOSSES[name], z)
        ax.plot(z, value, color=theme.CYCLE[i], label=name)
        ax_slope.plot(z, slope, color=theme.CYCLE[i], label=name)
    ax.step(z, z <= 0, color=theme.color("grey"), ls=":", where="post", label="error")
    ax.set(ylim=(0, 4), xlabel="margin z = y f(x)", ylabel="loss",
           title="Four stand-ins for the error")  # fmt: skip
    ax_slope.set(ylim=(-4, 0.2), xlabel="margin z = y f(x)", ylabel="slope",
                 title="How hard a mistake pulls")  # fmt: skip
    ax.legend(loc="upper right", fontsize=8)


def differences(frame: pd.DataFrame, situations: Mapping[str, object]) -> pd.DataFrame:
    """Each loss minus the logistic one on the same seeds: mean, low and high by situation.

    Args:
        frame: rows of (loss, seed) with a column a situation.
        situations: the columns.

    Returns:
        One row a (loss, situation) in the frame's order, columns ``loss``, ``situation``, ``mean``,
        ``low``, ``high``.
    """
    wide = frame.set_index(["loss", "seed"])
    rows = []
    for loss in frame.loss.unique():
        if loss == REFERENCE:
            continue
        for situation in situations:
            gap = (wide.loc[loss, situation] - wide.loc[REFERENCE, situation]).to_numpy(float)
            low, high = interval(gap) if len(gap) > 1 else (gap[0], gap[0])
            rows.append((loss, situation, gap.mean(), low, high))
    return pd.DataFrame(rows, columns=["loss", "situation", "mean", "low", "high"])


def draw_differences(found: pd.DataFrame, ax: Axes) -> None:
    """Losses by situations: gain over the logistic loss in points; bold where 0 is outside."""
    table = found.pivot(index="loss", columns="situation", values="mean")
    table = 100 * table.loc[found.loss.unique(), found.situation.unique()]
    gains = table.to_numpy(float)
    clear = found.assign(clear=(found.low > 0) | (found.high < 0)).pivot(
        index="loss", columns="situation", values="clear"
    )
    reach = float(np.abs(gains).max()) or 1.0
    ax.imshow(gains, cmap=theme.colormap("diverging"), vmin=-reach, vmax=reach, aspect="auto")
    for i, loss in enumerate(table.index):
        for j, situation in enumerate(table.columns):
            value = gains[i, j]
            ax.text(
                j, i, f"{value:+.1f}", ha="center", va="center", fontsize=8.5,
                weight="bold" if bool(clear.loc[loss, situation]) else "normal",
                color=theme.color("ink") if abs(value) < 0.55 * reach else theme.PAPER,
            )  # fmt: skip
    labels = [c.replace(", ", ",\n").replace("wrong", "wrong\n") for c in table.columns]
    ax.set_xticks(range(len(labels)), labels, fontsize=8.5)
    ax.set_yticks(range(len(table)), table.index, fontsize=8.5)
    ax.grid(False)
    ax.set_title("Points gained over the logistic loss (bold: 95% interval without 0)")
