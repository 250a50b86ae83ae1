"""The family side by side: a heat table of all losses, and their ranks for each kind of label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.lab.ranks import Ranking
from workbench.losses.experiments.side_by_side import CONDITIONS
from workbench.plots import mpl, theme
from workbench.plots.critical_difference import rank_diagram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REACH = 12.0  # percentage points at which the colours end
BASE = "cross-entropy"


def order(table: pd.DataFrame) -> list[str]:
    """Losses by mean rank over conditions, the best first; last those not tried everywhere."""
    found = table.groupby("label")["rank"].agg(lambda ranks: ranks.mean(skipna=False))
    found = found.sort_values(kind="stable", na_position="last")
    return [str(label) for label in found.index]


def draw_table(table: pd.DataFrame, ax: Axes, baseline: str = BASE) -> Axes:
    """Differences to a baseline: a row a loss, a column a condition, and the mean rank at the end.

    A star marks what Wilcoxon's test, adjusted for all losses of the column, finds different at 5%;
    a ring marks a 95% interval over data sets that excludes 0 without that.

    Args:
        table: from `side_by_side.against`.
        ax: where to draw.
        baseline: label of the loss compared with.
    """
    rows = [label for label in order(table) if label != baseline]
    columns = [c for c in CONDITIONS if c in set(table["condition"])]
    cells = {(cell["label"], cell["condition"]): cell for cell in table.to_dict("records")}
    values = np.array([[cells[r, c]["difference"] for c in columns] for r in rows])
    sets = [cells[baseline, c]["tables"] for c in columns]
    names = [
        "\n".join([*c.rsplit(" ", 1), f"{n} sets"]) for c, n in zip(columns, sets, strict=True)
    ]
    mpl.heatmap(
        np.clip(values, -REACH, REACH), names, [_named(cells, r, columns) for r in rows], ax=ax,
        colors="diverging", scale=(-REACH, REACH),
        label=f"percentage points better than {baseline}", title=_finding(table, baseline),
    )  # fmt: skip
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            cell = cells[row, column]
            mark = "*" if cell["p"] <= 0.05 else "°" if cell["low"] * cell["high"] > 0 else ""
            ax.text(
                j, i, f"{values[i, j]:+.1f}{mark}", ha="center", va="center", fontsize=8,
                color=theme.PAPER if abs(values[i, j]) > 0.48 * REACH else theme.INK,
                fontweight="bold" if mark == "*" else "normal",
            )  # fmt: skip
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelsize=8.5, labelcolor=theme.INK)
    return ax


def _finding(table: pd.DataFrame, baseline: str) -> str:
    told = table[(table["label"] != baseline) & (table["p"] <= 0.05)]["difference"]
    cells = int((table["label"] != baseline).sum())
    return (
        f"Against {baseline}: {int((told > 0).sum())} of {cells} cells are better and "
        f"{int((told < 0).sum())} worse, beyond chance"
    )


def _named(cells: Mapping[tuple[str, str], Any], row: str, columns: Sequence[str]) -> str:
    """The loss, and on how many data sets where it was not tried on all of them."""
    cell = cells[row, columns[0]]
    return row if np.isfinite(cell["rank"]) else f"{row} ({cell['tables']} sets)"


def draw_ranks(rankings: Mapping[str, Ranking], axes: Sequence[Axes]) -> None:
    """Mean ranks in each group of conditions with half a critical difference to either side.

    Two losses whose bars overlap cannot be told apart. All panels list the losses in the order of
    the mean over groups.

    Args:
        rankings: from `side_by_side.rankings`.
        axes: one a group.
    """
    names = list(next(iter(rankings.values())).ranks)
    mean = {n: float(np.mean([found.ranks[n] for found in rankings.values()])) for n in names}
    names.sort(key=lambda name: mean[name])
    for ax, (group, found) in zip(axes, rankings.items(), strict=True):
        best = min(found.ranks.values())
        ax.axvspan(best - found.cd / 2, best + found.cd / 2, color=theme.GRID, lw=0)
        for i, name in enumerate(names):
            rank = found.ranks[name]
            alike = rank - best <= found.cd
            ink = theme.color("vermillion" if name == BASE else "blue" if alike else "grey")
            ax.plot([rank - found.cd / 2, rank + found.cd / 2], [i, i], color=ink, lw=1.2)
            ax.plot(rank, i, "o", ms=4.5, color=ink)
        ax.set_title(f"{group}\n{found.blocks} data sets", fontsize=9.5, loc="left")
        ax.set(yticks=range(len(names)), ylim=(len(names) - 0.4, -0.6), xlabel="mean rank")
        ax.grid(axis="y", visible=False)
    axes[0].set_yticklabels(names, fontsize=8.5, color=theme.INK)


def draw_diagram(found: Ranking, group: str, ax: Axes | None = None) -> Axes:
    """Critical-difference diagram of one group of conditions."""
    best = next(iter(found.ranks))
    alike = sum(found.ranks[name] - found.ranks[best] <= found.cd for name in found.ranks) - 1
    return rank_diagram(
        found.ranks,
        found.groups,
        cd=found.cd,
        ax=ax,
        title=f"{group.capitalize()}: {alike} of {len(found.ranks) - 1} rivals cannot be told "
        f"from {best}",
        highlight={BASE: "vermillion"} if BASE in found.ranks else None,
        note=f"{found.blocks} data sets; bars join what Nemenyi's test does not separate at "
        f"{found.alpha:.0%}",
    )


def summary(table: pd.DataFrame, rankings: Mapping[str, Ranking]) -> dict[str, Any]:
    """Counts for the text: cells, and how many of them each test finds different.

    Returns:
        ``cells``; ``better`` and ``worse`` (adjusted Wilcoxon at 5%); ``hints_better`` and
        ``hints_worse`` (interval alone); ``best`` (label by group); ``alike`` (by group, how many
        losses Nemenyi's test does not separate from the best).
    """
    others = table[table["label"] != BASE]
    told = others["p"] <= 0.05
    up, down = others["low"] > 0, others["high"] < 0
    best = {group: next(iter(found.ranks)) for group, found in rankings.items()}
    return {
        "cells": len(others),
        "better": int((told & (others["difference"] > 0)).sum()),
        "worse": int((told & (others["difference"] < 0)).sum()),
        "hints_better": int(up.sum()),
        "hints_worse": int(down.sum()),
        "best": best,
        "alike": {
            group: sum(rank - found.ranks[best[group]] <= found.cd for rank in found.ranks.values())
            for group, found in rankings.items()
        },
    }
