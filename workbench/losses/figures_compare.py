"""`compare`: losses on your table, with the diagram of their ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

from workbench.losses import comparison
from workbench.plots.critical_difference import rank_diagram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

P = ParamSpec("P")


class Comparison(comparison.Comparison):
    """What `compare` found, with a figure."""

    def figure(self, *, ax: Axes | None = None, title: str = "") -> Axes:
        """Mean ranks over folds; bars join losses that corrected paired tests cannot tell apart.

        Args:
            ax: axes to draw on.
            title: the finding; by default it counts the losses told apart from the baseline.
        """
        against = self.differences()
        apart = int((against["adjusted"] <= 0.05).sum())
        return rank_diagram(
            self.mean_ranks,
            self.alike,
            ax=ax,
            title=title
            or f"{apart} of {len(against)} losses differ from {self.baseline} in {self.metric}",
            highlight={self.baseline: "vermillion"},
            note=f"mean ranks over {self.repeats} x {self.folds} folds; bars: no difference at 5% "
            "(corrected t, Holm)",
        )


def _with_figure(run: Callable[P, comparison.Comparison]) -> Callable[P, Comparison]:
    @wraps(run)
    def compare(*args: P.args, **options: P.kwargs) -> Comparison:
        return Comparison(**vars(run(*args, **options)))

    return compare


compare = _with_figure(comparison.compare)
