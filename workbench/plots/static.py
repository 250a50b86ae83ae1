"""The static face: an explorer's panels drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.plots import bindings, escape, fields, layout, marks, passages, theme, traces
from workbench.plots.panels import Axis, Panel, Passage, labelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from workbench.plots.explorer import Explorer

Result = Mapping[str, Any]
WIDTH = 9.0  # inches


def figure(explorer: Explorer, state: Mapping[str, Any]) -> Figure:
    """The explorer at `state` as one figure; drawn without pyplot, so nothing stays open."""
    import matplotlib
    from matplotlib.figure import Figure

    result = explorer.result(**state)
    panels = explorer.panels
    columns = min(explorer.columns or layout.default_columns(len(panels)), len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    texts = [_broken(p, result) for p in explorer.passages]
    heights = [explorer.height / 100] * len(rows) + [0.45 + 0.17 * len(t) for t in texts]
    with matplotlib.rc_context(theme.rc()):
        made = Figure(figsize=(WIDTH, sum(heights) + 0.8), layout="constrained")
        engine: Any = made.get_layout_engine()
        engine.set(w_pad=0.1, h_pad=0.08)
        grid = made.add_gridspec(len(heights), 1, height_ratios=heights)
        for r, row in enumerate(rows):
            weights = [panel.weight for panel in row] + [1.0] * (columns - len(row))
            inner = grid[r].subgridspec(1, columns, width_ratios=weights)
            for c, panel in enumerate(row):
                span = WIDTH * weights[c] / sum(weights)
                draw_panel(panel, made.add_subplot(inner[c]), result, span)
        for r, (passage, text) in enumerate(zip(explorer.passages, texts, strict=True)):
            _draw_passage(passage, text, made.add_subplot(grid[len(rows) + r]))
        made.suptitle(
            escape.matplotlib(explorer.title), x=0.012, ha="left", fontsize=13, fontweight="bold"
        )
        made.supxlabel(
            escape.matplotlib(caption(explorer, state, result)), x=0.012, ha="left",
            fontsize=9.5, color=theme.MUTED,
        )  # fmt: skip
    return made


def caption(explorer: Explorer, state: Mapping[str, Any], result: Result) -> str:
    """Readouts and controls in words, in lines that fit the figure."""
    numbers = [
        f"{label}: {text} {ends}".rstrip() for label, text, ends in readouts(explorer, result)
    ]
    moved = [f"{c.label}: {c.text(state[c.name])}" for c in explorer.controls]
    return "\n".join("   ·   ".join(line) for part in (numbers, moved) for line in _lines(part))


def _lines(parts: list[str], width: int = 110) -> list[list[str]]:
    """Parts in lines of at most `width` characters, separators included."""
    lines: list[list[str]] = []
    for part in parts:
        if lines and sum(len(p) + 7 for p in lines[-1]) + len(part) <= width:
            lines[-1].append(part)
        else:
            lines.append([part])
    return lines


def readouts(explorer: Explorer, result: Result) -> list[tuple[str, str, str]]:
    """Label, text and interval (perhaps empty) of each readout."""
    found = []
    for readout in explorer.readouts:
        text = fields.number(result[readout.key], readout.format)
        if readout.unit:
            text += f" {readout.unit}"
        interval = ""
        if readout.low and readout.high:
            low, high = (
                fields.number(result[k], readout.format) for k in (readout.low, readout.high)
            )
            interval = f"[{low}, {high}]"
        found.append((readout.label, text, interval))
    return found


def png(explorer: Explorer, state: Mapping[str, Any], dpi: int = 100) -> bytes:
    """The static face as a picture."""
    stream = io.BytesIO()
    figure(explorer, state).savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


# ---- one panel


def draw_panel(panel: Panel, ax: Axes, result: Result, inches: float = 6.0) -> Axes:
    """Draw `panel` with the numbers of `result` on `ax`."""
    for draw, color in zip(panel.draws, traces.colors(panel), strict=True):
        marks.DRAWERS[type(draw)](draw, ax, result, color)
    _axis(ax, panel.x, "x", inches - 1.0, result)
    _axis(ax, panel.y, "y", inches, result)
    if panel.square:
        ax.set_aspect("equal", adjustable="box", anchor="NW")
    lines = bindings.wrap(fields.fill(panel.title, result), max(18, int((inches - 1.0) / 0.088)))
    rows = _legend(panel, ax, inches)
    ax.set_title(escape.matplotlib("\n".join(lines)), loc="left", pad=8 + 15 * rows)
    return ax


def _legend(panel: Panel, ax: Axes, inches: float) -> int:
    """Write the legend between title and axes; returns its number of rows."""
    if not panel.legend:
        return 0
    found: dict[str, tuple[Any, ...]] = {
        escape.matplotlib(draw.label): ()  # type: ignore[attr-defined]
        for draw in panel.draws
        if labelled(draw)
    }
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
        found[label] += (handle,)
    if not found:
        return 0
    widest = max(len(label) for label in found)
    columns = max(1, min(len(found), int((inches - 1.0) / (0.45 + 0.066 * widest))))
    ax.legend(
        list(found.values()), list(found), loc="lower left", bbox_to_anchor=(-0.01, 1.0),
        ncols=columns, borderaxespad=0.1, handlelength=1.4, columnspacing=1.2, borderpad=0.1,
    )  # fmt: skip
    return -(-len(found) // columns)


def _axis(ax: Axes, axis: Axis, side: str, inches: float, result: Result) -> None:
    from matplotlib.ticker import FuncFormatter

    ticks = ax.xaxis if side == "x" else ax.yaxis
    setter = ax.set_xlabel if side == "x" else ax.set_ylabel
    setter(escape.matplotlib(fields.fill(axis.text, result)))
    if axis.log:
        (ax.set_xscale if side == "x" else ax.set_yscale)("log")
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if axis.range is not None:
        (ax.set_xlim if side == "x" else ax.set_ylim)(*axis.range)
    if axis.categories:
        ticks.grid(False)
        if (
            side == "x"
            and 0.085 * sum(len(t.get_text()) + 2 for t in ticks.get_ticklabels()) > inches
        ):
            ax.tick_params(axis="x", rotation=35)
            for tick in ticks.get_ticklabels():
                tick.set(ha="right", rotation_mode="anchor")
    if axis.reverse:
        (ax.invert_xaxis if side == "x" else ax.invert_yaxis)()


# ---- passages


def _broken(passage: Passage, result: Result) -> list[list[tuple[int, str, Any]]]:
    return passages.lines(list(result[passage.tokens]), list(result[passage.shade]), 108)


def _draw_passage(passage: Passage, text: list[list[tuple[int, str, Any]]], ax: Axes) -> None:
    from matplotlib.patches import Rectangle

    ax.set_axis_off()
    ax.set_xlim(0, 108)
    ax.set_ylim(len(text), 0)
    ax.set_title(escape.matplotlib(passage.title), loc="left")
    for row, pieces in enumerate(text):
        for column, token, value in pieces:
            ax.add_patch(
                Rectangle(
                    (column, row + 0.04), len(token), 0.92, lw=0,
                    facecolor=passages.shade(value, passage.scale),
                )
            )  # fmt: skip
            for offset, letter in enumerate(token):
                if letter.isspace():
                    continue
                ax.text(
                    column + offset + 0.5, row + 0.72, escape.matplotlib(letter),
                    family="monospace", fontsize=9.4, ha="center",
                )  # fmt: skip
