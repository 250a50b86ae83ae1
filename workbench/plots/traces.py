"""Marks as plotly traces: plain dicts without arrays, and the bindings that fill them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workbench.plots import escape, fields, theme
from workbench.plots.bindings import Binding
from workbench.plots.panels import (
    Axis,
    Band,
    Bars,
    Diagonal,
    Draw,
    Handle,
    HeatMap,
    HLine,
    Line,
    Panel,
    Points,
    Surface,
    VLine,
)

SYMBOLS = {"circle": "circle", "diamond": "diamond", "square": "square", "cross": "x-thin",
           "ring": "circle-open"}  # fmt: skip
CIRCLE = "M8,0C8,4.42 4.42,8 0,8C-4.42,8 -8,4.42 -8,0C-8,-4.42 -4.42,-8 0,-8C4.42,-8 8,-4.42 8,0Z"
DIAMOND = "M8,0L0,8L-8,0L0,-8Z"
DASHES = {"solid": "solid", "dash": "dash", "dot": "dot"}


@dataclass
class Place:
    """Where a panel's marks go: its axes' numbers in plotly, and the layout that they share."""

    panel: Panel
    number: int
    traces: list[dict[str, Any]]
    bindings: list[Binding]
    shapes: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    handles: list[dict[str, Any]] = field(default_factory=list)
    colorbar: dict[str, Any] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        """`""` for the first panel, `"2"`, `"3"` for the next ones."""
        return "" if self.number == 1 else str(self.number)

    def add(self, trace: dict[str, Any], **bound: Any) -> None:
        """Add a trace; `bound` maps properties (`__` for a dot) to keys or (op, *args)."""
        if "scene" not in trace:
            trace = {**trace, "xaxis": f"x{self.suffix}", "yaxis": f"y{self.suffix}"}
        index = len(self.traces)
        self.traces.append({"showlegend": False, **trace})
        for prop, source in bound.items():
            if source is None:
                continue
            op, *args = source if isinstance(source, tuple) else ("value", source)
            self.bindings.append(Binding(index, prop.replace("__", "."), op, tuple(args)))

    def bind_layout(self, prop: str, op: str, *args: Any) -> None:
        """Let a property of the layout follow the result."""
        self.bindings.append(Binding(None, prop, op, args))


def hover(panel: Panel, label: str, x: str = "x", y: str = "y", extra: str = "") -> str:
    """A hover template naming both axes."""
    xs = f"{_named(panel.x.label, 'x')}: %{{{x}{_spec(panel.x)}}}"
    ys = f"{_named(panel.y.label, 'y')}: %{{{y}{_spec(panel.y)}}}"
    return f"{extra}{xs}<br>{ys}<extra>{escape.plotly(label)}</extra>"


def _spec(axis: Axis) -> str:
    return "" if axis.categories else ":.4~g"


def _errors(draw: Points | Bars, along: str) -> dict[str, Any]:
    value = draw.y
    return {
        f"error_{along}__array": ("minus", draw.high, value) if draw.high else None,
        f"error_{along}__arrayminus": ("minus", value, draw.low) if draw.low else None,
    }


def _whiskers(draw: Points | Bars, along: str, color: str) -> dict[str, Any]:
    if draw.low is None and draw.high is None:
        return {}
    bar = {"type": "data", "symmetric": False, "color": color, "thickness": 1.5, "width": 3}
    return {f"error_{along}": bar}


def line(draw: Line, place: Place, color: str) -> None:
    """A line, perhaps with its label at its end."""
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if draw.markers else "lines",
        "name": escape.plotly(draw.label),
        "line": {
            "color": color,
            "width": draw.width,
            "dash": DASHES[draw.dash],
            "shape": "hv" if draw.steps else "linear",
        },
        "hovertemplate": hover(place.panel, draw.label),
    }
    if draw.markers:
        trace["marker"] = {"color": color, "size": 6}
    place.add(trace, x=draw.x, y=draw.y)
    if draw.direct:
        at = len(place.annotations)
        place.annotations.append(
            {
                "xref": f"x{place.suffix}", "yref": f"y{place.suffix}", "showarrow": False,
                "text": escape.plotly(draw.label), "font": {"color": color, "size": 12},
                "xanchor": "left", "xshift": 5,
            }
        )  # fmt: skip
        for side, axis in (("x", place.panel.x), ("y", place.panel.y)):
            op, key = ("lastlog" if axis.log else "last"), getattr(draw, side)
            place.bind_layout(f"annotations[{at}].{side}", op, key, draw.x, draw.y)
        place.bind_layout(f"annotations[{at}].visible", "drawn", draw.x, draw.y)


def band(draw: Band, place: Place, color: str) -> None:
    """Two invisible edges with the area between them filled."""
    edge = {"type": "scatter", "mode": "lines", "line": {"width": 0, "color": color},
            "hoverinfo": "skip", "name": escape.plotly(draw.label)}  # fmt: skip
    fill = {"fill": "tonexty", "fillcolor": theme.faded(color, draw.opacity)}
    place.add(edge, x=draw.x, y=draw.low)
    place.add({**edge, **fill}, x=draw.x, y=draw.high)


def points(draw: Points, place: Place, color: str) -> None:
    """Markers, perhaps with intervals, texts and colours by number."""
    marker: dict[str, Any] = {
        "color": color,
        "symbol": SYMBOLS[draw.symbol],
        "opacity": draw.opacity,
        "line": {"color": color if draw.symbol in ("cross", "ring") else theme.PAPER, "width": 1},
    }
    if draw.symbol in ("cross", "ring"):
        marker["line"]["width"] = 1.5
    if isinstance(draw.size, (int, float)):
        marker["size"] = draw.size
    if draw.value:
        marker |= {"colorscale": theme.colorscale(draw.colors), "colorbar": place.colorbar}
        if draw.scale:
            marker |= {"cmin": draw.scale[0], "cmax": draw.scale[1]}
    extra = "<b>%{hovertext}</b><br>" if draw.hover else ""
    trace = {
        "type": "scatter",
        "mode": "markers+text" if draw.text else "markers",
        "name": escape.plotly(draw.label),
        "marker": marker,
        "textposition": "top center",
        "cliponaxis": False,
        "textfont": {"size": 12, "color": theme.INK},
        "hovertemplate": hover(place.panel, draw.label, extra=extra),
        **_whiskers(draw, "y", color),
    }
    if draw.click:
        trace["meta"] = {"click": draw.click}
    place.add(
        trace,
        x=draw.x, y=draw.y, text=draw.text, hovertext=draw.hover,
        marker__color=draw.value, marker__size=draw.size if isinstance(draw.size, str) else None,
        **_errors(draw, "y"),
    )  # fmt: skip


def bars(draw: Bars, place: Place, color: str) -> None:
    """Bars from a base to a value, perhaps with intervals."""
    across, along = ("y", "x") if draw.horizontal else ("x", "y")
    trace = {
        "type": "bar",
        "orientation": "h" if draw.horizontal else "v",
        "name": escape.plotly(draw.label),
        "marker": {"color": color, "opacity": draw.opacity, "line": {"color": theme.PAPER,
                                                                     "width": 0.5}},
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": hover(place.panel, draw.label),
        **_whiskers(draw, along, theme.INK),
    }  # fmt: skip
    length: Any = draw.y if draw.base is None else ("minus", draw.y, draw.base)
    place.add(
        trace,
        **{across: draw.x, along: length},
        width=draw.width, base=draw.base, text=draw.text, **_errors(draw, along),
    )  # fmt: skip


def heat(draw: HeatMap, place: Place, color: str) -> None:
    """Colours of a matrix, or its contours."""
    trace: dict[str, Any] = {
        "type": "contour" if draw.contours else "heatmap",
        "name": escape.plotly(draw.label),
        "colorscale": theme.colorscale(draw.colors),
        "colorbar": dict(place.colorbar),
        "hovertemplate": hover(place.panel, "")
        + f"<br>{_named(draw.label)}: "
        + ("%{customdata:.4~g}" if draw.log else "%{z:.4~g}"),
    }
    trace["hovertemplate"] = (
        trace["hovertemplate"].replace("<extra></extra>", "") + "<extra></extra>"
    )
    if draw.contours:
        trace["line"] = {"width": 0.5, "color": "rgba(255,255,255,0.6)"}
        trace["ncontours"] = 24  # at most, where there is no scale
    if draw.scale:
        low, high = (_log10(v) for v in draw.scale) if draw.log else draw.scale
        trace |= {"zmin": low, "zmax": high}
        if draw.contours:
            trace["contours"] = {"start": low, "end": high, "size": (high - low) / 16}
        if draw.log:
            ticks = decades(*draw.scale)
            trace["colorbar"] |= {
                "tickvals": [_log10(t) for t in ticks], "ticktext": [f"{t:g}" for t in ticks],
            }  # fmt: skip
    if draw.cells:
        trace["texttemplate"] = f"%{{z:{draw.cells}}}"
        trace["textfont"] = {"size": 11}
    if draw.click_x or draw.click_y:
        trace["meta"] = {"click_x": draw.click_x, "click_y": draw.click_y}
    z: Any = ("log10", draw.z) if draw.log else draw.z
    place.add(
        trace,
        z=z, x=draw.x, y=draw.y, customdata=draw.z if draw.log else None,
        colorbar__title__text=_followed(draw.label),
    )  # fmt: skip


def _named(label: str, otherwise: str = "value") -> str:
    """What a hover text calls a quantity; a label that changes is not repeated there."""
    return otherwise if not label or fields.names(label) else escape.plotly(label)


def _followed(label: str) -> tuple[str, str] | None:
    """The binding of a label that holds fields."""
    return ("text", label) if fields.names(label) else None


def _log10(value: float) -> float:
    from math import log10

    return log10(value)


def decades(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` for a logarithmic colour bar."""
    from math import ceil, floor

    found = [10.0**e for e in range(ceil(_log10(low) - 1e-9), floor(_log10(high) + 1e-9) + 1)]
    return found if len(found) > 1 else [low, high]


def surface(draw: Surface, place: Place, color: str) -> None:
    """A surface in its own scene."""
    panel = place.panel
    trace: dict[str, Any] = {
        "type": "surface",
        "scene": f"scene{place.suffix}",
        "name": escape.plotly(draw.label),
        "colorscale": theme.colorscale(draw.colors),
        "colorbar": dict(place.colorbar),
        "hovertemplate": hover(panel, "").replace("<extra></extra>", "")
        + f"<br>{_named(draw.label)}: %{{z:.4~g}}<extra></extra>",
    }
    if draw.scale:
        trace |= {"cmin": draw.scale[0], "cmax": draw.scale[1]}
    place.add(trace, z=draw.z, x=draw.x, y=draw.y, colorbar__title__text=_followed(draw.label))


def _rule(draw: VLine | HLine, place: Place, color: str, side: str) -> None:
    at = len(place.shapes)
    other = "y" if side == "x" else "x"
    label: dict[str, Any] = {"font": {"color": color, "size": 12}, "textangle": 0, "padding": 3}
    if side == "x":
        label |= {"textposition": "end", "xanchor": "left", "yanchor": "top"}
    else:
        label |= {"textposition": "end", "xanchor": "right", "yanchor": "bottom"}
    shape: dict[str, Any] = {
        "type": "line",
        f"{side}ref": f"{side}{place.suffix}", f"{other}ref": f"{other}{place.suffix} domain",
        f"{other}0": 0, f"{other}1": 1,
        "line": {"color": color, "width": 1.5, "dash": DASHES[draw.dash]}, "label": label,
    }  # fmt: skip
    where = draw.x if isinstance(draw, VLine) else draw.y
    if isinstance(where, str):
        for end in (f"{side}0", f"{side}1"):
            place.bind_layout(f"shapes[{at}].{end}", "value", where)
        place.bind_layout(f"shapes[{at}].visible", "finite", where)
    else:
        shape |= {f"{side}0": where, f"{side}1": where}
    place.shapes.append(shape)
    if draw.label:
        place.bind_layout(f"shapes[{at}].label.text", "text", draw.label)


def vline(draw: VLine, place: Place, color: str) -> None:
    """A vertical rule over the whole height."""
    _rule(draw, place, color, "x")


def hline(draw: HLine, place: Place, color: str) -> None:
    """A horizontal rule over the whole width."""
    _rule(draw, place, color, "y")


def handle(draw: Handle, place: Place, color: str) -> None:
    """A knob of 16 pixels; the layout's `meta` tells the browser which controls follow it."""
    at = len(place.shapes)
    place.shapes.append(
        {
            "type": "path", "path": DIAMOND if draw.radius else CIRCLE, "layer": "above",
            "xref": f"x{place.suffix}", "yref": f"y{place.suffix}",
            "xsizemode": "pixel", "ysizemode": "pixel",
            "fillcolor": color, "line": {"color": theme.PAPER, "width": 2},
        }
    )  # fmt: skip
    if draw.radius:
        place.bind_layout(f"shapes[{at}].xanchor", "rim", draw.x, draw.radius, draw.middle)
    else:
        place.bind_layout(f"shapes[{at}].xanchor", "value", draw.x)
    place.bind_layout(f"shapes[{at}].yanchor", "value", draw.y)
    place.handles.append(
        {
            "shape": at, "axes": [f"xaxis{place.suffix}", f"yaxis{place.suffix}"],
            "x": draw.x, "y": draw.y, "radius": draw.radius,
        }
    )  # fmt: skip


def diagonal(draw: Diagonal, place: Place, color: str) -> None:
    """The line y = x between the ranges of both axes."""
    assert place.panel.x.range and place.panel.y.range  # checked by Panel
    low = max(place.panel.x.range[0], place.panel.y.range[0])
    high = min(place.panel.x.range[1], place.panel.y.range[1])
    place.shapes.append(
        {
            "type": "line", "layer": "above",
            "xref": f"x{place.suffix}", "yref": f"y{place.suffix}",
            "x0": low, "y0": low, "x1": high, "y1": high,
            "line": {"color": color, "width": 1.2, "dash": DASHES[draw.dash]},
            "label": {"text": escape.plotly(draw.label), "textposition": "middle", "padding": 4,
                      "yanchor": "bottom", "font": {"color": color, "size": 11}},
        }
    )  # fmt: skip


DRAWERS: dict[type[Draw], Callable[[Any, Place, str], None]] = {
    Line: line, Band: band, Points: points, Bars: bars, HeatMap: heat, Surface: surface,
    VLine: vline, HLine: hline, Diagonal: diagonal, Handle: handle,
}  # fmt: skip


def colors(panel: Panel) -> list[str]:
    """The colour of each mark: its own, or the next one of the cycle; rules and diagonals are grey,
    handles dark.

    Marks with the same label share a colour, so that a band takes that of its line.
    """
    found: list[str] = []
    taken: dict[str, str] = {}
    for draw in panel.draws:
        name = getattr(draw, "color", None)
        label = getattr(draw, "label", "")
        if name is not None:
            chosen = theme.color(name)
        elif isinstance(draw, (VLine, HLine, Diagonal)):
            chosen = theme.MUTED
        elif isinstance(draw, Handle):
            chosen = theme.INK
        elif label and label in taken:
            chosen = taken[label]
        else:
            chosen = theme.color(None, len(taken))
        if not isinstance(draw, (VLine, HLine, Diagonal, Handle, HeatMap, Surface)):
            taken[label or f"#{len(found)}"] = chosen
        found.append(chosen)
    return found
