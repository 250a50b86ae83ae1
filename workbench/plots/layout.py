"""Panels as one plotly figure: axes side by side, titles, legends, and everything's place."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.plots import bindings, escape, fields, theme, traces
from workbench.plots.bindings import Binding
from workbench.plots.panels import (
    Axis,
    Band,
    Bars,
    Handle,
    HeatMap,
    Line,
    Panel,
    Points,
    Surface,
    labelled,
)

WIDE, NARROW = 760, 380
TITLE, LEGEND, BOTTOM, LEFT, GAP, COLORBAR = 19, 18, 50, 64, 72, 74


@dataclass
class Spec:
    """A plotly figure without its numbers: traces, layout, and what fills them."""

    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    bindings: list[Binding]

    def filled(self, result: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Traces and layout with the numbers of `result`."""
        data, layout = copy.deepcopy(self.traces), copy.deepcopy(self.layout)
        for binding in self.bindings:
            target = layout if binding.trace is None else data[binding.trace]
            bindings.put(target, binding.prop, bindings.evaluate(binding, result))
        return data, layout


def default_columns(count: int) -> int:
    """Panels per row when nothing else is asked for."""
    return {1: 1, 2: 2, 3: 3, 4: 2}.get(count, 3)


def spec(
    panels: Sequence[Panel],
    result: Mapping[str, Any],
    *,
    columns: int | None = None,
    height: int = 380,
    width: int = WIDE,
) -> Spec:
    """The figure of `panels`, designed for `width` pixels; `result` tells how long titles get."""
    columns = min(columns or default_columns(len(panels)), len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    total = height * len(rows)
    layout: dict[str, Any] = {
        "template": theme.template(),
        "height": total,
        "autosize": True,
        "margin": {"l": LEFT, "r": 10, "t": 0, "b": 0},
        "barmode": "overlay",
        "bargap": 0.15,
        "showlegend": False,
        "hovermode": "closest",
        "uirevision": "kept",
        "shapes": [],
        "annotations": [],
    }
    if any(isinstance(draw, Handle) for panel in panels for draw in panel.draws):
        layout["meta"] = {"handles": []}
    made = Spec([], layout, [])
    number = 0
    for r, row in enumerate(rows):
        inner = width - LEFT - 10
        weights = [panel.weight for panel in row] + [1.0] * (columns - len(row))
        usable = inner - GAP * (columns - 1)
        widths = [usable * weight / sum(weights) for weight in weights]
        heads = [_head(panel, span, result) for panel, span in zip(row, widths, strict=False)]
        head = max(top for top, _, _ in heads)
        left = 0.0
        for panel, span, (_, letters, legend) in zip(row, widths, heads, strict=False):
            number += 1
            box = (
                left / inner,
                (left + span - _right(panel)) / inner,
                1 - (r * height + height - BOTTOM) / total,
                1 - (r * height + head) / total,
            )
            _place(made, panel, number, box, letters, legend, inner, result)
            left += span + GAP
    return made


def _right(panel: Panel) -> float:
    """Pixels kept free on a panel's right, for a colour bar or labels at the ends of lines."""
    bar = any(
        isinstance(d, (HeatMap, Surface)) or (isinstance(d, Points) and d.value)
        for d in panel.draws
    )
    fixed = panel.x.range is not None  # otherwise plotly widens the axis for the label
    ends = [len(d.label) for d in panel.draws if isinstance(d, Line) and d.direct and fixed]
    return max(COLORBAR if bar else 6, min(130, 8 + 6.6 * max(ends)) if ends else 0)


def _head(panel: Panel, span: float, result: Mapping[str, Any]) -> tuple[float, int, str]:
    """Height of title and legend in pixels, characters per line of the title, legend as text."""
    letters = max(16, int((span - _right(panel)) / 8.2))
    longest = fields.fill(panel.title, result)
    lines = len(bindings.wrap(longest, letters)) if longest else 0
    rows = _legend(panel, span - _right(panel))
    legend = "".join(
        f'<br><span style="font-size:12px">{"&nbsp;&nbsp;&nbsp;".join(row)}</span>' for row in rows
    )
    return lines * TITLE + len(rows) * LEGEND + 12, letters, legend


def _legend(panel: Panel, span: float) -> list[list[str]]:
    """The legend's rows: a coloured glyph and the label, for each label once (a line's glyph)."""
    rows: list[list[str]] = []
    room = 0.0
    entries: dict[str, tuple[Any, str]] = {}
    for draw, color in zip(panel.draws, traces.colors(panel), strict=True):
        if panel.legend and labelled(draw):
            label = draw.label  # type: ignore[attr-defined]
            if label not in entries or isinstance(draw, Line):
                entries[label] = (draw, color)
    for label, (draw, color) in entries.items():
        need = 36 + 6.6 * len(label)
        if not rows or need > room:
            rows.append([])
            room = span
        room -= need
        glyph = f'<span style="color:{_tint(draw, color)}">{_glyph(draw)}</span>'
        rows[-1].append(f"{glyph}&nbsp;{escape.plotly(label)}")
    return rows


def _tint(draw: Any, color: str) -> str:
    if not isinstance(draw, (Band, Bars, Points)):
        return color
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    mix = [round(255 + (c - 255) * max(draw.opacity, 0.35)) for c in (red, green, blue)]
    return "#" + "".join(f"{c:02X}" for c in mix)


def _glyph(draw: Any) -> str:
    if isinstance(draw, Line):
        return {"solid": "━", "dash": "╍", "dot": "┅"}[draw.dash]
    if isinstance(draw, Handle):
        return "◆" if draw.radius else "⬤"
    if isinstance(draw, Points):
        return {"circle": "●", "diamond": "◆", "square": "■", "cross": "✕", "ring": "○"}[
            draw.symbol
        ]
    return "■"


def _place(
    made: Spec,
    panel: Panel,
    number: int,
    box: tuple[float, float, float, float],
    letters: int,
    legend: str,
    inner: float,
    result: Mapping[str, Any],
) -> None:
    left, right, bottom, top = (round(v, 5) for v in box)
    layout = made.layout
    place = traces.Place(
        panel, number, made.traces, made.bindings, layout["shapes"], layout["annotations"],
        layout.get("meta", {}).get("handles", []),
    )  # fmt: skip
    label = next((getattr(d, "label", "") for d in panel.draws if _barred(d)), "")
    place.colorbar = {
        "x": right + 8 / inner, "xanchor": "left", "y": (bottom + top) / 2, "len": top - bottom,
        "thickness": 12, "outlinewidth": 0, "tickfont": {"size": 11, "color": theme.MUTED},
        "title": {"text": escape.plotly(label), "side": "right", "font": {"size": 12}},
    }  # fmt: skip
    suffix = place.suffix
    if panel.solid:
        layout[f"scene{suffix}"] = {
            "domain": {"x": [left, right], "y": [max(0.0, bottom - 0.05), top]},
            "xaxis": {"title": {"text": escape.plotly(panel.x.text)}, **_range(panel.x)},
            "yaxis": {"title": {"text": escape.plotly(panel.y.text)}, **_range(panel.y)},
            "zaxis": {"title": {"text": ""}, **_surface_range(panel)},
            "aspectmode": "manual",
            "aspectratio": {"x": 1, "y": 1, "z": 0.75},
            "camera": {"eye": {"x": 1.55, "y": -1.7, "z": 1.0}, "center": {"z": -0.12}},
        }
        reference = {"xref": "paper", "yref": "paper", "x": left, "y": top}
    else:
        layout[f"xaxis{suffix}"] = _axis(panel.x, [left, right], f"y{suffix}")
        layout[f"yaxis{suffix}"] = _axis(panel.y, [bottom, top], f"x{suffix}")
        for side, axis in (("x", panel.x), ("y", panel.y)):
            if fields.names(axis.text):
                place.bind_layout(f"{side}axis{suffix}.title.text", "text", axis.text)
        if panel.square:
            layout[f"xaxis{suffix}"] |= {"constrain": "domain", "constraintoward": "left"}
            layout[f"yaxis{suffix}"] |= {
                "constrain": "domain", "constraintoward": "top", "scaleanchor": f"x{suffix}",
            }  # fmt: skip
        reference = {"xref": f"x{suffix} domain", "yref": f"y{suffix} domain", "x": 0, "y": 1}
    at = len(layout["annotations"])
    layout["annotations"].append(
        {
            **reference, "xanchor": "left", "yanchor": "bottom", "yshift": 3, "align": "left",
            "showarrow": False, "font": {"size": 14, "color": theme.INK},
            "text": bindings.title(panel.title, letters) + legend,
        }
    )  # fmt: skip
    if fields.names(panel.title):
        place.bind_layout(f"annotations[{at}].text", "title", panel.title, letters, legend)
    for draw, color in zip(panel.draws, traces.colors(panel), strict=True):
        traces.DRAWERS[type(draw)](draw, place, color)


def _barred(draw: Any) -> bool:
    return isinstance(draw, (HeatMap, Surface)) or bool(isinstance(draw, Points) and draw.value)


def _range(axis: Axis) -> dict[str, Any]:
    if axis.range is None:
        return {"autorange": "reversed"} if axis.reverse else {}
    low, high = (math.log10(v) for v in axis.range) if axis.log else axis.range
    return {"range": [high, low] if axis.reverse else [low, high]}


def _surface_range(panel: Panel) -> dict[str, Any]:
    draw = panel.draws[0]
    scale = draw.scale if isinstance(draw, Surface) else None
    return {"range": list(scale)} if scale else {}


def _axis(axis: Axis, domain: list[float], anchor: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "domain": domain,
        "anchor": anchor,
        "title": {"text": escape.plotly(axis.text)},
        **_range(axis),
    }
    if axis.log:
        found |= {"type": "log", "tickformat": "~g"}
        if axis.range and math.log10(axis.range[1] / axis.range[0]) > 1.5:
            found["dtick"] = 1
    if axis.categories:
        found |= {"type": "category", "automargin": True, "nticks": 0}
    return found
