"""Marks drawn with matplotlib, from the same numbers as their plotly twins in `traces`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.plots import bindings, escape, fields, theme, traces
from workbench.plots.panels import (
    Band,
    Bars,
    Diagonal,
    Draw,
    Handle,
    HeatMap,
    HLine,
    Line,
    Points,
    Surface,
    VLine,
    labelled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]
DASHES: dict[str, Any] = {"solid": "-", "dash": (0, (5, 3)), "dot": (0, (1.5, 2))}
MARKERS = {"circle": "o", "diamond": "D", "square": "s", "cross": "x", "ring": "o"}


def _get(result: Result, key: str | None) -> Any:
    value = result[key] if key is not None else None
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [escape.matplotlib(v) for v in value]
    return value


def _name(label: str) -> str:
    return escape.matplotlib(label) if label else "_nolegend_"


def _errors(draw: Points | Bars, result: Result) -> np.ndarray | None:
    if draw.low is None and draw.high is None:
        return None
    value = np.asarray(result[draw.y], float)
    low = value if draw.low is None else np.asarray(result[draw.low], float)
    high = value if draw.high is None else np.asarray(result[draw.high], float)
    return np.maximum([value - low, high - value], 0)


def line(draw: Line, ax: Axes, result: Result, color: str) -> None:
    """A line, perhaps with its label at its end."""
    x, y = np.atleast_1d(_get(result, draw.x)), np.atleast_1d(_get(result, draw.y))
    ax.plot(
        x, y, color=color, lw=draw.width * 0.9, ls=DASHES[draw.dash],
        marker="o" if draw.markers else None, ms=4, drawstyle="steps-post" if draw.steps else None,
        label=_name(draw.label if labelled(draw) else ""),
    )  # fmt: skip
    there = np.flatnonzero(np.isfinite(y.astype(float)))
    if draw.direct and len(there):
        ax.annotate(
            escape.matplotlib(draw.label), (x[there[-1]], y[there[-1]]), xytext=(4, 0),
            textcoords="offset points", color=color, fontsize=9, va="center",
        )  # fmt: skip


def band(draw: Band, ax: Axes, result: Result, color: str) -> None:
    """A filled interval."""
    x, low, high = (np.asarray(result[k], float) for k in (draw.x, draw.low, draw.high))
    ax.fill_between(x, low, high, color=color, alpha=draw.opacity, lw=0, label=_name(draw.label))


def points(draw: Points, ax: Axes, result: Result, color: str) -> None:
    """Markers, perhaps with intervals, texts and colours by number."""
    x, y = np.atleast_1d(_get(result, draw.x)), np.atleast_1d(_get(result, draw.y))
    size = np.asarray(result[draw.size] if isinstance(draw.size, str) else draw.size, float)
    errors = _errors(draw, result)
    if errors is not None:
        ax.errorbar(x, y, errors, fmt="none", ecolor=color, elinewidth=1.3, capsize=2)
    filled = draw.symbol not in ("cross", "ring")
    options: dict[str, Any] = {
        "s": (size * 0.75) ** 2, "marker": MARKERS[draw.symbol], "alpha": draw.opacity,
        "label": _name(draw.label if labelled(draw) else ""), "zorder": 3,
    }  # fmt: skip
    if draw.value:
        low, high = draw.scale or (None, None)
        shown = ax.scatter(
            x, y, c=np.asarray(result[draw.value], float), cmap=theme.colormap(draw.colors),
            vmin=low, vmax=high, edgecolors=theme.PAPER, linewidths=0.6, **options,
        )  # fmt: skip
        _colorbar(ax, shown, draw.label)
    elif filled:
        ax.scatter(x, y, color=color, edgecolors=theme.PAPER, linewidths=0.6, **options)
    else:
        ring = {"facecolors": "none", "edgecolors": color}
        options |= ring if draw.symbol == "ring" else {"color": color}
        ax.scatter(x, y, linewidths=1.4, **options)
    for i, text in enumerate(_get(result, draw.text) or []):
        ax.annotate(
            text, (x[i], y[i]), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8.5
        )


def bars(draw: Bars, ax: Axes, result: Result, color: str) -> None:
    """Bars from a base to a value, perhaps with intervals."""
    x, top = _get(result, draw.x), np.asarray(result[draw.y], float)
    base = np.zeros_like(top) if draw.base is None else np.asarray(result[draw.base], float)
    width: Any = 0.8 if draw.width is None else result[draw.width]
    if draw.width is None and not isinstance(x, list) and len(x) > 1:
        width = 0.85 * float(np.min(np.diff(np.sort(np.asarray(x, float)))))
    options: dict[str, Any] = {
        "color": color, "alpha": draw.opacity, "edgecolor": theme.PAPER, "linewidth": 0.5,
        "label": _name(draw.label),
    }  # fmt: skip
    if draw.horizontal:
        drawn = ax.barh(x, top - base, height=width, left=base, **options)
    else:
        drawn = ax.bar(x, top - base, width=width, bottom=base, **options)
    errors = _errors(draw, result)
    if errors is not None:
        centres = np.arange(len(top)) if isinstance(x, list) else x
        whiskers: dict[str, Any] = {
            "fmt": "none", "ecolor": theme.INK, "elinewidth": 1.2, "capsize": 2,
        }  # fmt: skip
        if draw.horizontal:
            ax.errorbar(top, centres, xerr=errors, **whiskers)
        else:
            ax.errorbar(centres, top, yerr=errors, **whiskers)
    if draw.text:
        ax.bar_label(
            drawn, labels=[str(t) for t in _get(result, draw.text)], padding=2, fontsize=8.5
        )


def heat(draw: HeatMap, ax: Axes, result: Result, color: str) -> None:
    """Colours of a matrix, or its contours."""
    from matplotlib.colors import LogNorm, Normalize

    z = np.asarray(result[draw.z], float)
    low, high = draw.scale or (np.nanmin(z), np.nanmax(z))
    norm: Any = (LogNorm if draw.log else Normalize)(low, high)
    _matrix(draw, ax, result, z, norm, contours=draw.contours)
    if draw.cells:
        x, y = (_positions(_get(result, k)) for k in (draw.x, draw.y))
        for row, yy in enumerate(y):
            for column, xx in enumerate(x):
                value = z[row, column]
                if np.isfinite(value):
                    red, green, blue, _ = theme.colormap(draw.colors)(norm(value))
                    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
                    ax.text(xx, yy, format(value, draw.cells), ha="center", va="center",
                            fontsize=8, color=theme.PAPER if dark else theme.INK)  # fmt: skip


def surface(draw: Surface, ax: Axes, result: Result, color: str) -> None:
    """The contours of a surface."""
    from matplotlib.colors import Normalize

    z = np.asarray(result[draw.z], float)
    low, high = draw.scale or (np.nanmin(z), np.nanmax(z))
    _matrix(draw, ax, result, z, Normalize(low, high), contours=True)


def _positions(values: Any) -> np.ndarray:
    return np.arange(len(values)) if isinstance(values, list) else np.asarray(values, float)


def _matrix(
    draw: HeatMap | Surface, ax: Axes, result: Result, z: np.ndarray, norm: Any, contours: bool
) -> None:
    from matplotlib.ticker import MaxNLocator

    x, y = _get(result, draw.x), _get(result, draw.y)
    cmap = theme.colormap(draw.colors)
    ax.grid(False)
    if contours:
        log = getattr(draw, "log", False)
        steps = np.geomspace if log else np.linspace
        levels = steps(norm.vmin, norm.vmax, 17)
        shown: Any = ax.contourf(
            x, y, np.clip(z, norm.vmin, norm.vmax), levels, cmap=cmap, norm=norm
        )
        ax.contour(x, y, z, levels[1:-1], colors="white", linewidths=0.4, linestyles="-", alpha=0.6)
    else:
        shown = ax.pcolormesh(_positions(x), _positions(y), z, cmap=cmap, norm=norm,
                              shading="nearest", rasterized=True)  # fmt: skip
        if isinstance(x, list):
            ax.set_xticks(range(len(x)), x)
        if isinstance(y, list):
            ax.set_yticks(range(len(y)), y)
    bar = _colorbar(ax, shown, fields.fill(draw.label, result))
    if contours and not getattr(draw, "log", False):
        bar.locator = MaxNLocator(6)
        bar.update_ticks()
    if getattr(draw, "log", False):
        ticks = traces.decades(norm.vmin, norm.vmax)
        bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
        bar.minorticks_off()


def _colorbar(ax: Axes, shown: Any, label: str) -> Any:
    assert ax.figure is not None
    bar = ax.figure.colorbar(shown, ax=ax, pad=0.02, aspect=24)  # type: ignore[union-attr]
    bar.set_label(escape.matplotlib(label), fontsize=9)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_alpha(1)
    return bar


def vline(draw: VLine, ax: Axes, result: Result, color: str) -> None:
    """A vertical rule with its label at the top."""
    at = result[draw.x] if isinstance(draw.x, str) else draw.x
    if at is None or not np.isfinite(at):
        return
    ax.axvline(at, color=color, lw=1.3, ls=DASHES[draw.dash])
    ax.annotate(
        escape.matplotlib(fields.fill(draw.label, result)), (at, 1), xytext=(3, -3), va="top",
        xycoords=ax.get_xaxis_transform(), textcoords="offset points", color=color, fontsize=9,
    )  # fmt: skip


def hline(draw: HLine, ax: Axes, result: Result, color: str) -> None:
    """A horizontal rule with its label at the right."""
    at = result[draw.y] if isinstance(draw.y, str) else draw.y
    if at is None or not np.isfinite(at):
        return
    ax.axhline(at, color=color, lw=1.3, ls=DASHES[draw.dash])
    ax.annotate(
        escape.matplotlib(fields.fill(draw.label, result)), (1, at), xytext=(-3, 3), ha="right",
        xycoords=ax.get_yaxis_transform(), textcoords="offset points", color=color, fontsize=9,
    )  # fmt: skip


def handle(draw: Handle, ax: Axes, result: Result, color: str) -> None:
    """A knob, which nobody can drag here."""
    x, y = result[draw.x], result[draw.y]
    if draw.radius:
        x = bindings.rim(x, result[draw.radius], draw.middle)
    ax.plot(
        [x], [y], "D" if draw.radius else "o", ms=9, color=color, mec=theme.PAPER, mew=1.5,
        label=_name(draw.label), zorder=5,
    )  # fmt: skip


def diagonal(draw: Diagonal, ax: Axes, result: Result, color: str) -> None:
    """The line y = x."""
    ax.axline((0, 0), slope=1, color=color, lw=1.1, ls=DASHES[draw.dash])
    ax.annotate(
        escape.matplotlib(draw.label), (1, 1), xycoords="axes fraction", xytext=(-10, -6),
        textcoords="offset points", rotation=45, rotation_mode="anchor", ha="right", va="bottom",
        transform_rotates_text=False, color=color, fontsize=8.5,
    )  # fmt: skip


DRAWERS: dict[type[Draw], Callable[[Any, Any, Result, str], None]] = {
    Line: line, Band: band, Points: points, Bars: bars, HeatMap: heat, Surface: surface,
    VLine: vline, HLine: hline, Diagonal: diagonal, Handle: handle,
}  # fmt: skip
