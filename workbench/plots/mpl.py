"""matplotlib figures that families share. Each takes `ax=None` and returns the axes it drew on.

Titles state the finding and are plain text, as are labels: what comes from a user's file is shown
as it stands, never read as TeX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from workbench.plots import bindings, escape, marks, theme
from workbench.plots.panels import HeatMap, Surface

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T", bound=Callable[..., Any])


class Bins(Protocol):
    """What a reliability diagram draws: edges (b+1), and per bin size, accuracy, confidence."""

    edges: Any
    size: Any
    accuracy: Any
    confidence: Any


def _styled(draw: T) -> T:
    """Draw in the workbench's style whatever the notebook has set, on new axes when none given."""

    @wraps(draw)
    def wrapped(*args: Any, ax: Any = None, **options: Any) -> Any:
        with theme.style():
            if ax is None:
                import matplotlib.pyplot as plt

                ax = plt.subplots(figsize=(5.6, 3.8))[1]
            return draw(*args, ax=ax, **options)

    return wrapped  # type: ignore[return-value]


def _finish(ax: Any, title: str, xlabel: str, ylabel: str) -> Any:
    figure = ax.get_figure(root=True)
    inches = figure.get_figwidth() * ax.get_position().width
    lines = bindings.wrap(title, max(24, int(inches / 0.088)))
    ax.set_title(escape.matplotlib("\n".join(lines)), loc="left", fontweight="bold", fontsize=11)
    if xlabel:
        ax.set_xlabel(escape.matplotlib(xlabel))
    if ylabel:
        ax.set_ylabel(escape.matplotlib(ylabel))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def interval(runs: Any, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the first axis (seeds) and both ends of its Student t interval.

    Args:
        runs: (seeds, ...) numbers; a NaN is a missing seed. With one seed the ends are NaN.
        level: coverage of the interval.
    """
    from scipy.stats import t

    values = np.asarray(runs, float)
    n = np.isfinite(values).sum(0)
    total = np.where(np.isfinite(values), values, 0.0).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / n
        squares = np.where(np.isfinite(values), (values - mean) ** 2, 0.0).sum(0)
        error = np.sqrt(squares / (n - 1) / n)
        half = np.where(n > 1, t.ppf((1 + level) / 2, np.maximum(n - 1, 1)) * error, np.nan)
    return mean, mean - half, mean + half


def wilson(right: Any, n: Any, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of a share: `right` out of `n`; NaN where n is 0."""
    from scipy.stats import norm

    right, n = np.asarray(right, float), np.asarray(n, float)
    z = norm.ppf((1 + level) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = right / n
        centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return centre - half, centre + half


@_styled
def reliability(
    bins: Bins,
    *,
    ax: Axes | None = None,
    title: str = "",
    label: str = "accuracy",
    color: str = "blue",
    counts: bool = True,
    level: float = 0.95,
) -> Axes:
    """Reliability diagram: accuracy of each bin at its mean confidence, with Wilson intervals.

    The gap bars reach from confidence (the diagonal) to accuracy. `counts` adds a strip with the
    number of rows per bin below the diagram.

    Args:
        bins: statistics per bin: `edges`, `size`, `accuracy`, `confidence`; NaN where empty.
        ax: axes to draw on.
        title: the finding.
        label: what the points show.
        color: of the points.
        counts: whether to draw the strip of bin counts.
        level: coverage of the intervals.
    """
    assert ax is not None  # given by _styled
    edges, size = np.asarray(bins.edges, float), np.asarray(bins.size, float)
    accuracy, confidence = np.asarray(bins.accuracy, float), np.asarray(bins.confidence, float)
    there = size > 0
    middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    low, high = wilson(accuracy * size, size, level)
    ink = theme.color(color)
    ax.plot([0, 1], [0, 1], color=theme.MUTED, lw=1.1, ls=(0, (5, 3)), zorder=1)
    ax.bar(
        middle[there], (accuracy - confidence)[there], width[there], confidence[there],
        color=theme.color("vermillion"), alpha=0.3, edgecolor="white", lw=0.6, label="gap",
    )  # fmt: skip
    spread = np.maximum([(accuracy - low)[there], (high - accuracy)[there]], 0)
    ax.errorbar(
        confidence[there], accuracy[there], spread, fmt="o", ms=5, color=ink, elinewidth=1.3,
        capsize=2, label=escape.matplotlib(f"{label}, {level:.0%} interval"), zorder=3,
    )  # fmt: skip
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.legend(loc="upper left", frameon=False, fontsize=9)
    if counts:
        _counts(ax, middle, width, size)
    return _finish(ax, title, "" if counts else "confidence", "accuracy")


def _counts(ax: Any, middle: np.ndarray, width: np.ndarray, size: np.ndarray) -> None:
    """A strip with the number of rows per bin, below `ax`."""
    strip = ax.inset_axes((0, -0.3, 1, 0.24), sharex=ax)
    strip.bar(middle, size, width, color=theme.FRAME, edgecolor="white", lw=0.6)
    strip.set(xlabel="confidence", ylabel="rows", ylim=(0, None))
    strip.locator_params(axis="y", nbins=2)
    strip.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelbottom=False)


@_styled
def compare(
    frame: Any,
    columns: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str = "",
    labels: Sequence[str] | None = None,
    ylabel: str = "",
    level: float = 0.95,
) -> Axes:
    """Methods over the same seeds: a dot per seed, pairs joined, mean with its t interval beside.

    Args:
        frame: one row per seed, one column per method.
        columns: the columns to compare; all numeric ones but `seed` when None.
        ax: axes to draw on.
        title: the finding.
        labels: what the columns are called.
        ylabel: the quantity, with its unit.
        level: coverage of the intervals.
    """
    assert ax is not None
    if columns is None:
        columns = [c for c in frame.select_dtypes("number").columns if c != "seed"]
    values = np.column_stack([np.asarray(frame[c], float) for c in columns])
    mean, low, high = interval(values, level)
    at = np.arange(len(columns))
    ax.plot(at, values.T, color=theme.FRAME, lw=0.8, alpha=0.6, zorder=1)
    for i in at:
        ink = theme.color(None, int(i))
        ax.scatter(np.full(len(values), i), values[:, i], s=26, color=ink, alpha=0.65,
                   edgecolors="white", lw=0.5, zorder=2)  # fmt: skip
        ax.errorbar(i + 0.16, mean[i], [[mean[i] - low[i]], [high[i] - mean[i]]], fmt="D", ms=5,
                    color=ink, elinewidth=2, capsize=3, zorder=3)  # fmt: skip
        ax.annotate(f"{mean[i]:.3g}", (i + 0.16, mean[i]), xytext=(8, 0), va="center",
                    textcoords="offset points", color=ink, fontsize=9)  # fmt: skip
    ax.set_xticks(at, [escape.matplotlib(t) for t in labels or columns])
    ax.set_xlim(-0.4, len(columns) - 0.3)
    ax.grid(False, axis="x")
    _finish(ax, title, f"diamonds: mean and {level:.0%} interval of {len(values)} seeds", ylabel)
    ax.xaxis.label.set(color=theme.MUTED, fontsize=8.5)
    return ax


@_styled
def line_band(
    x: Any,
    y: Any,
    low: Any = None,
    high: Any = None,
    *,
    ax: Axes | None = None,
    title: str = "",
    label: str = "",
    color: str | None = None,
    xlabel: str = "",
    ylabel: str = "",
    level: float = 0.95,
) -> Axes:
    """A line with its band; call it again on the same axes for the next line.

    Args:
        x: (n,) positions.
        y: (n,) values with their `low` and `high`, or (seeds, n) runs, of which mean and t interval
            are drawn.
        low: lower edge of the band.
        high: upper edge of the band.
        ax: axes to draw on.
        title: the finding.
        label: written at the line's end, in its colour.
        color: name in the palette or `#rrggbb`; the next free one when None.
        xlabel: what is on x, with its unit.
        ylabel: what is on y, with its unit.
        level: coverage of the interval over runs.
    """
    assert ax is not None
    x, y = np.asarray(x, float), np.asarray(y, float)
    if y.ndim == 2:
        y, low, high = interval(y, level)
    ink = theme.color(color, len(ax.lines))
    if low is not None and high is not None:
        ax.fill_between(x, low, high, color=ink, alpha=0.2, lw=0)
    ax.plot(x, y, color=ink, lw=2)
    there = np.flatnonzero(np.isfinite(y))
    if label and len(there):
        ax.annotate(escape.matplotlib(label), (x[there[-1]], y[there[-1]]), xytext=(5, 0),
                    textcoords="offset points", color=ink, fontsize=9, va="center")  # fmt: skip
    return _finish(ax, title or ax.get_title(loc="left"), xlabel, ylabel)


@_styled
def heatmap(
    z: Any,
    x: Any = None,
    y: Any = None,
    *,
    ax: Axes | None = None,
    title: str = "",
    label: str = "",
    scale: tuple[float, float] | None = None,
    colors: str = "sequential",
    cells: str | None = None,
    log: bool = False,
    xlabel: str = "",
    ylabel: str = "",
) -> Axes:
    """A matrix in colours; a data frame brings its own row and column names.

    Args:
        z: (rows, columns) numbers, or a data frame.
        x: positions or names of the columns.
        y: positions or names of the rows, which are listed from the top when they are names.
        ax: axes to draw on.
        title: the finding.
        label: what the colours mean, with its unit.
        scale: the ends of the colour map.
        colors: `sequential`, or `diverging` around the middle of `scale`.
        cells: format in which each number is written into its cell.
        log: colour by the logarithm; needs `scale`.
        xlabel: what the columns are.
        ylabel: what the rows are.
    """
    assert ax is not None
    if hasattr(z, "columns"):
        x = [str(name) for name in z.columns] if x is None else x
        y = [str(name) for name in z.index] if y is None else y
    values = np.asarray(z, float)
    x = np.arange(values.shape[1]) if x is None else x
    y = np.arange(values.shape[0]) if y is None else y
    mark = HeatMap("z", "x", "y", label, scale, colors, log=log, cells=cells)
    named = not np.issubdtype(np.asarray(y).dtype, np.number)
    marks.heat(mark, ax, {"z": values, "x": _names(x), "y": _names(y)}, "")
    if named:
        ax.invert_yaxis()
    return _finish(ax, title, xlabel, ylabel)


def _names(values: Any) -> np.ndarray:
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.number):
        return array
    return np.array([str(v) for v in values], dtype=object)


@_styled
def surface(
    z: Any,
    x: Any,
    y: Any,
    *,
    ax: Axes | None = None,
    title: str = "",
    label: str = "",
    scale: tuple[float, float] | None = None,
    colors: str = "sequential",
    xlabel: str = "",
    ylabel: str = "",
) -> Axes:
    """The contours of a surface: the twin of a three-dimensional plot, and easier to read.

    Args:
        z: (rows, columns) heights.
        x: (columns,) positions.
        y: (rows,) positions.
        ax: axes to draw on.
        title: the finding.
        label: what the height is, with its unit.
        scale: the ends of the colour map.
        colors: `sequential` or `diverging`.
        xlabel: what is on x, with its unit.
        ylabel: what is on y, with its unit.
    """
    assert ax is not None
    numbers = {"z": np.asarray(z, float), "x": np.asarray(x, float), "y": np.asarray(y, float)}
    marks.surface(Surface("z", "x", "y", label, scale, colors), ax, numbers, "")
    return _finish(ax, title, xlabel, ylabel)


@_styled
def strip(
    values: Mapping[str, Any],
    *,
    ax: Axes | None = None,
    title: str = "",
    xlabel: str = "",
) -> Axes:
    """Distributions as rows of points, with median and quartiles.

    Args:
        values: numbers by name, one row each, listed from the top.
        ax: axes to draw on.
        title: the finding.
        xlabel: the quantity, with its unit.
    """
    assert ax is not None
    rng = np.random.default_rng(0)  # only moves points apart, vertically
    for row, (_, given) in enumerate(values.items()):
        numbers = np.asarray(given, float)
        numbers = numbers[np.isfinite(numbers)]
        ink = theme.color(None, row)
        shift = rng.uniform(-0.16, 0.16, len(numbers))
        faint = max(0.15, min(0.7, 40 / (len(numbers) + 1)))
        ax.scatter(numbers, row + shift, s=16, color=ink, alpha=faint, edgecolors="none")
        if len(numbers):
            first, median, third = np.quantile(numbers, [0.25, 0.5, 0.75])
            ax.plot([first, third], [row + 0.3, row + 0.3], color=ink, lw=3, solid_capstyle="butt")
            ax.plot([median], [row + 0.3], "D", color=ink, ms=6, mec="white")
    ax.set_yticks(range(len(values)), [escape.matplotlib(name) for name in values])
    ax.set_ylim(len(values) - 0.4, -0.5)
    ax.grid(False, axis="y")
    note = "bars: quartiles; diamonds: median"
    return _finish(ax, title, f"{xlabel} ({note})" if xlabel else note, "")
