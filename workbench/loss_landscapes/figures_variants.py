"""The canonical picture: one network in several variants, their slices side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from workbench.loss_landscapes.geometry.density import Density
from workbench.plots import theme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.contour import QuadContourSet


LEAST = 1e-5  # densities below are not drawn


def draw_slices(pictures: pd.DataFrame, axes: Sequence[Axes], levels: int = 13) -> QuadContourSet:
    """One panel a row of ``variant``, ``side``, ``loss``: contours on one logarithmic scale.

    Args:
        pictures: see `experiments.variants.picture`.
        axes: as many as rows.
        levels: contour levels, common to all panels.

    Returns:
        The filled contours of the last panel, for a colour bar.
    """
    losses = np.stack(list(pictures["loss"]))
    low, high = max(float(losses.min()), 1e-3), float(min(losses.max(), 30.0))
    edges = np.geomspace(low, high, levels)
    for ax, row in zip(axes, pictures.itertuples(), strict=True):
        shown = np.clip(row.loss, low, high)
        filled = ax.contourf(
            row.side, row.side, shown, levels=edges, norm="log", cmap=theme.colormap("sequential"),
            extend="both",
        )  # fmt: skip
        ax.contour(row.side, row.side, shown, levels=edges, colors="white", linewidths=0.4)
        ax.plot(0, 0, "+", color="white", ms=9, mew=1.6)
        ax.set(title=row.variant, aspect="equal", xlabel="first direction")
    axes[0].set_ylabel("second direction")
    return filled


def draw_densities(densities: Mapping[str, Density], ax: Axes) -> None:
    """Eigenvalue densities on a logarithmic scale, one line each."""
    ends = []
    for i, (name, density) in enumerate(densities.items()):
        ax.plot(density.grid, np.maximum(density.density, 1e-6), color=theme.CYCLE[i], label=name)
        ends += list(density.grid[density.density > LEAST][[0, -1]])
    margin = 0.05 * (max(ends) - min(ends))
    ax.set(
        yscale="log", ylim=(LEAST, None), xlim=(min(ends) - margin, max(ends) + margin),
        xlabel="eigenvalue of the Hessian", ylabel="density (log)",
    )  # fmt: skip
    ax.legend()


def draw_lenses(
    frame: pd.DataFrame, lenses: Mapping[str, tuple[str, str]], axes: Sequence[Axes]
) -> None:
    """Test error against each measure: a cross of 95% intervals over seeds for each way."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    from workbench.lab.claims import interval

    for ax, (key, (paper, label)) in zip(axes, lenses.items(), strict=True):
        for i, (way, part) in enumerate(frame.groupby("way", sort=False)):
            at, spread = {}, {}
            for column in (key, "test_error"):
                values = part[column].to_numpy()
                at[column] = values.mean()
                low, high = interval(values) if len(values) > 1 else (at[column], at[column])
                spread[column] = [[at[column] - low], [high - at[column]]]
            ax.errorbar(
                at[key], at["test_error"], xerr=spread[key], yerr=spread["test_error"], fmt="o",
                color=theme.CYCLE[i], label=way, capsize=2, ms=6,
            )  # fmt: skip
        rho = frame.groupby("way")[[key, "test_error"]].mean().corr("spearman").iloc[0, 1]
        ax.set_title(f"{paper}\nrank correlation {rho:+.1f}", loc="left", fontsize=10)
        ax.set(xlabel=label, yscale="log")
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())


def table(frame: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """Mean and 95% interval over seeds of each number, a row a variant, as text."""
    from workbench.lab.claims import interval

    rows = {}
    for variant, part in frame.groupby("variant", sort=False):
        cells = {}
        for key, label in names.items():
            values = part[key].to_numpy()
            low, high = interval(values) if len(values) > 1 else (values[0], values[0])
            mean, low, high = (round(float(v), 12) + 0.0 for v in (values.mean(), low, high))
            cells[label] = f"{mean:.3g} [{low:.3g}, {high:.3g}]"
        rows[variant] = cells
    return pd.DataFrame(rows).T
