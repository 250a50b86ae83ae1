"""What an explorer draws, declared: axes, marks, panels, readouts and passages of text.

Strings in a mark (`Line("x", "loss")`) are keys of the compute function's result. All text is plain
text, never HTML and never TeX: write Greek letters as such. A panel's title may hold fields in
Python's format notation, `"ECE {ece:.3f} at T = {temperature:.2f}"`, filled from the result and
the controls; only the formats `d`, `.Nf`, `.Ne`, `.Ng` and `.N%` are known to every face.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

Range = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """An axis: what is on it, in which unit, over which fixed range.

    The label may hold fields, as a panel's title. Give `range` wherever it is known: an axis that
    rescales while a slider moves hides the change.
    """

    label: str
    range: Range | None = None
    log: bool = False
    unit: str = ""
    categories: bool = False
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.range is not None:
            low, high = self.range
            if not low < high:
                raise ValueError(f"axis {self.label!r}: range must rise, got {self.range}")
            if self.log and low <= 0:
                raise ValueError(f"axis {self.label!r}: a log axis starts above 0, got {low}")

    @property
    def text(self) -> str:
        """Label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


class Draw:
    """A mark in a panel. Fields named in `keyed` hold keys of the result (or None)."""

    keyed: tuple[str, ...] = ()

    def keys(self) -> list[str]:
        """The keys of the result that this mark needs."""
        found = [getattr(self, name) for name in self.keyed]
        return [key for key in found if isinstance(key, str)]


@dataclass(frozen=True)
class Line(Draw):
    """A line through (x, y). `direct` writes the label at its end instead of in the legend."""

    x: str
    y: str
    label: str = ""
    color: str | None = None
    dash: str = "solid"  # solid, dash, dot
    width: float = 2.0
    markers: bool = False
    steps: bool = False
    direct: bool = False
    keyed = ("x", "y")


@dataclass(frozen=True)
class Band(Draw):
    """The area between `low` and `high` over x: an interval, a range over seeds."""

    x: str
    low: str
    high: str
    label: str = ""
    color: str | None = None
    opacity: float = 0.2
    keyed = ("x", "low", "high")


@dataclass(frozen=True)
class Points(Draw):
    """Points at (x, y), with intervals `low` to `high`, labels `text`, hover texts `hover`.

    `value` colours the points by number, over `scale` (fixed) on the colour map `colors`; `size`
    holds diameters in pixels. A click on a point moves the control named `click` to the position
    with the point's index.
    """

    x: str
    y: str
    label: str = ""
    color: str | None = None
    text: str | None = None
    hover: str | None = None
    low: str | None = None
    high: str | None = None
    value: str | None = None
    scale: Range | None = None
    colors: str = "sequential"
    size: str | float = 7.0
    opacity: float = 0.85
    symbol: str = "circle"  # circle, diamond, square, cross, ring
    click: str | None = None
    keyed = ("x", "y", "text", "hover", "low", "high", "value", "size")


@dataclass(frozen=True)
class Bars(Draw):
    """Bars from `base` (0 when None) up to `y`, `width` wide, with intervals `low` to `high`."""

    x: str
    y: str
    width: str | None = None
    base: str | None = None
    label: str = ""
    color: str | None = None
    low: str | None = None
    high: str | None = None
    text: str | None = None
    opacity: float = 0.85
    horizontal: bool = False
    keyed = ("x", "y", "width", "base", "low", "high", "text")


@dataclass(frozen=True)
class HeatMap(Draw):
    """z (rows along y, columns along x) in colours over the fixed `scale`; `contours` for lines.

    `label` stands at the colour bar and may hold fields. `log` colours by the logarithm (needs
    `scale`); `cells` is a format that writes each number;
    a click on a cell moves the controls named `click_x` and `click_y` to its column and row.
    """

    z: str
    x: str
    y: str
    label: str = ""
    scale: Range | None = None
    colors: str = "sequential"  # sequential, diverging
    contours: bool = False
    log: bool = False
    cells: str | None = None
    click_x: str | None = None
    click_y: str | None = None
    keyed = ("z", "x", "y")

    def __post_init__(self) -> None:
        if self.log and (self.scale is None or self.scale[0] <= 0):
            raise ValueError("HeatMap: log=True needs a scale that starts above 0")


@dataclass(frozen=True)
class Surface(Draw):
    """z over (x, y) in three dimensions; the static face shows its contours. At most two a page."""

    z: str
    x: str
    y: str
    label: str = ""
    scale: Range | None = None
    colors: str = "sequential"
    keyed = ("z", "x", "y")


@dataclass(frozen=True)
class VLine(Draw):
    """A vertical line at x: a key or a number. `label` stands beside it and may hold fields."""

    x: str | float
    label: str = ""
    color: str | None = None
    dash: str = "dash"
    keyed = ("x",)


@dataclass(frozen=True)
class HLine(Draw):
    """A horizontal line at y: a key or a number. `label` stands upon it and may hold fields."""

    y: str | float
    label: str = ""
    color: str | None = None
    dash: str = "dash"
    keyed = ("y",)


@dataclass(frozen=True)
class Handle(Draw):
    """A point to drag with the mouse, which moves the sliders named `x` and `y`.

    With `radius` it is a knob on the rim around (x, y), on the side of `middle`, and dragging it
    moves the slider named `radius` to its distance, the larger of the two along the axes. Where the
    exported face lacks a slider, and in the static one, it is a plain marker.
    """

    x: str
    y: str
    label: str = ""
    color: str | None = None
    radius: str | None = None
    middle: float = 0.0
    keyed = ("x", "y", "radius")

    def moves(self, x: float, y: float, state: Mapping[str, Any]) -> dict[str, float]:
        """Where the sliders go when the point is dragged to (x, y)."""
        if self.radius is None:
            return {self.x: x, self.y: y}
        return {self.radius: max(abs(x - state[self.x]), abs(y - state[self.y]))}


@dataclass(frozen=True)
class Diagonal(Draw):
    """The line y = x, across the panel's fixed ranges."""

    label: str = ""
    color: str | None = None
    dash: str = "dash"


@dataclass(frozen=True)
class Panel:
    """One plot: title (a finding, may hold fields), axes and marks, in drawing order."""

    title: str
    x: Axis
    y: Axis
    draws: Sequence[Draw]
    weight: float = 1.0
    square: bool = False
    legend: bool = True

    def __post_init__(self) -> None:
        if not len(self.draws):
            raise ValueError(f"panel {self.title!r} draws nothing")
        if any(isinstance(d, Surface) for d in self.draws) and len(self.draws) > 1:
            raise ValueError(f"panel {self.title!r}: a Surface stands alone in its panel")
        if any(isinstance(d, Diagonal) for d in self.draws) and not (self.x.range and self.y.range):
            raise ValueError(f"panel {self.title!r}: a Diagonal needs the range of both axes")

    @property
    def solid(self) -> bool:
        """True when the panel is three-dimensional."""
        return isinstance(self.draws[0], Surface)


@dataclass(frozen=True)
class Readout:
    """A number (or word) of the result, with its interval when `low` and `high` are given."""

    key: str
    label: str
    format: str = ".3g"
    low: str | None = None
    high: str | None = None
    unit: str = ""

    def keys(self) -> list[str]:
        """The keys of the result that this readout needs."""
        return [k for k in (self.key, self.low, self.high) if k]


@dataclass(frozen=True)
class Passage:
    """A text, token by token, each shaded by a number between the two ends of `scale`.

    `tokens` is the key of a list of strings (a newline in a token breaks the line), `shade` of an
    array of the same length; NaN leaves a token plain.
    """

    title: str
    tokens: str
    shade: str
    scale: Range = (0.0, 1.0)
    label: str = ""

    def keys(self) -> list[str]:
        """The keys of the result that this passage needs."""
        return [self.tokens, self.shade]


def labelled(draw: Draw) -> bool:
    """True when `draw` belongs in the legend."""
    names = {f.name for f in fields(draw)}  # type: ignore[arg-type]
    if "label" not in names or isinstance(draw, (HeatMap, Surface, VLine, HLine, Diagonal)):
        return False
    if getattr(draw, "direct", False) or getattr(draw, "value", None):
        return False  # the label stands at the line, or beside the colour bar
    return bool(draw.label)  # type: ignore[attr-defined]


__all__ = [
    "Axis", "Band", "Bars", "Diagonal", "Draw", "HLine", "Handle", "HeatMap", "Line", "Panel",
    "Passage", "Points", "Readout", "Surface", "VLine", "labelled",
]  # fmt: skip
