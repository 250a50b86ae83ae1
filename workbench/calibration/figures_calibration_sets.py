"""Explorer of calibration sets: what a strategy's sets look like, and what they teach."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from workbench.calibration.calibration_sets import spearman
from workbench.lab import checks
from workbench.lab.claims import interval
from workbench.plots.explorer import Axis, Choice, Explorer, HLine, Panel, Points, Readout

NAMES = {
    "margin": "metric margin", "surprise": "surprise", "diversity": "lexical diversity",
    "metric": "mean metric", "length": "length (tokens)", "beam": "rank in the beam",
}  # fmt: skip


def explore_strategies(
    table: pd.DataFrame, statistic: str | None = None, *, gain: str = "gain"
) -> Explorer:
    """One point a strategy: a statistic of its calibration sets against the gain they bring.

    Args:
        table: one row a seed and strategy, with columns `strategy`, `seed`, ``gain`` and one or
            more statistics (any further numeric columns).
        statistic: which one is shown first; by default the first column.
        gain: the column of the gain.

    Returns:
        The explorer; `.show()` it. The correlation is Spearman's over strategies, for each seed,
        averaged, with its 95% interval.
    """
    needed = ("strategy", "seed", gain)
    if absent := [name for name in needed if name not in table]:
        raise ValueError(f"table: has no column {absent[0]!r}; it needs {', '.join(needed)}")
    numbers = table.select_dtypes("number").columns
    statistics = [name for name in numbers if name not in ("seed", gain)]
    if not statistics:
        raise ValueError("table: has no column with a statistic of the sets")
    chosen = statistics[0] if statistic is None else statistic
    checks.one_of(chosen, statistics, "statistic")
    groups = dict(iter(table.groupby("strategy", sort=False)))
    seeds = [rows for _, rows in table.groupby("seed")]
    gains = np.array([rows[gain].mean() for rows in groups.values()])
    bounds = np.array([_interval(rows[gain].to_numpy()) for rows in groups.values()])

    def compute(statistic: str) -> dict[str, Any]:
        rho = np.array(
            [spearman(rows[gain].to_numpy(), rows[statistic].to_numpy()) for rows in seeds]
        )
        low, high = _interval(rho)
        return {
            "x": np.array([rows[statistic].mean() for rows in groups.values()]), "y": gains,
            "low": bounds[:, 0], "high": bounds[:, 1],
            "text": np.array([s.replace("_", " ") for s in groups], dtype=object),
            "rho": float(rho.mean()), "rho_low": low, "rho_high": high,
            "name": NAMES.get(statistic, statistic.replace("_", " ")),
        }  # fmt: skip

    margin = 0.1 * max(1e-12, float(np.ptp(bounds)))
    return Explorer(
        name="calibration.strategies",
        title="What a good calibration set looks like",
        about="Choose a statistic of the sets; each point is a strategy, bars are 95% over seeds.",
        controls=[
            Choice(
                "statistic", "Statistic", statistics, value=chosen,
                labels=[NAMES.get(name, name.replace("_", " ")) for name in statistics],
            )
        ],
        compute=compute,
        panels=[
            Panel(
                "Gain and {name}: rank correlation {rho:.2f}",
                x=Axis("mean of the statistic over a strategy's sets"),
                y=Axis(
                    "gain in the metric over no tuning",
                    (float(bounds.min()) - margin, float(bounds.max()) + margin),
                ),
                draws=[
                    HLine(0.0, color="grey"),
                    Points("x", "y", text="text", hover="text", low="low", high="high", size=8.0),
                ],
            )
        ],
        readouts=[Readout("rho", "Spearman over strategies", ".2f", "rho_low", "rho_high")],
        grid={"statistic": statistics},
        height=460,
        call="calibration.figures_calibration_sets.explore_strategies(table, {state})",
    )  # fmt: skip


def _interval(values: Any) -> tuple[float, float]:
    """95% interval of the mean; the value itself for a single run."""
    return interval(values) if len(values) > 1 else (float(values[0]), float(values[0]))
