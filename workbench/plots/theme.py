"""One look for every figure: colours that colour-blind readers can tell apart, white backgrounds.

The colours are those of Okabe and Ito (2008). Backgrounds are opaque white in both libraries, so
that figures stay readable in JupyterLab's dark theme.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

PALETTE = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "grey": "#6B7280",
    "ink": "#1F2933",
}
CYCLE = [PALETTE[name] for name in ("blue", "vermillion", "green", "purple", "orange", "sky")]
INK = PALETTE["ink"]
MUTED = "#5B6470"
GRID = "#E6E8EC"
FRAME = "#9AA3AF"
PAPER = "#FFFFFF"
# Colour maps as evenly spaced stops, the same in both libraries.
SEQUENTIAL = [
    "#440154",
    "#46327E",
    "#365C8D",
    "#277F8E",
    "#1FA187",
    "#4AC16D",
    "#A0DA39",
    "#FDE725",
]
DIVERGING = ["#00456B", "#0072B2", "#7FB8D8", "#F7F7F7", "#EBAE7F", "#D55E00", "#803900"]
SHADE = "#E69F00"
COLORS = {"sequential": SEQUENTIAL, "diverging": DIVERGING}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"


def palette() -> dict[str, str]:
    """The colours by name, in the order in which marks take them."""
    return dict(PALETTE)


def color(name: str | None, index: int = 0) -> str:
    """A palette colour by name, a `#rrggbb` as it stands, or the `index`-th of the cycle."""
    if name is None:
        return CYCLE[index % len(CYCLE)]
    if name in PALETTE:
        return PALETTE[name]
    if name.startswith("#") and len(name) == 7:
        return name
    raise ValueError(f"color {name!r}: expected #rrggbb or one of {', '.join(PALETTE)}")


def faded(hexcode: str, opacity: float) -> str:
    """`hexcode` as rgba() with `opacity`."""
    red, green, blue = (int(hexcode[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def stops(name: str) -> list[str]:
    """The stops of a colour map."""
    if name not in COLORS:
        raise ValueError(f"colors {name!r}: expected one of {', '.join(COLORS)}")
    return COLORS[name]


def colorscale(name: str) -> list[list[Any]]:
    """A colour map for plotly."""
    found = stops(name)
    return [[round(i / (len(found) - 1), 4), stop] for i, stop in enumerate(found)]


def colormap(name: str) -> Any:
    """A colour map for matplotlib."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(f"workbench-{name}", stops(name))


def rc() -> Any:
    """matplotlib's settings for this look."""
    from cycler import cycler

    return {
        "figure.facecolor": PAPER,
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "savefig.facecolor": PAPER,
        "savefig.transparent": False,
        "axes.facecolor": PAPER,
        "axes.edgecolor": FRAME,
        "axes.labelcolor": INK,
        "axes.labelsize": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": INK,
        "axes.titlepad": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=CYCLE),
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": FRAME,
        "ytick.color": FRAME,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "text.color": INK,
        "font.family": "sans-serif",
        "font.size": 10,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 2.0,
        "image.cmap": "viridis",
    }


class style:
    """Switch matplotlib to this look; as a context manager, only inside the block.

    `plots.style()` in a set-up cell holds for the notebook, `with plots.style():` for a block.
    """

    def __init__(self) -> None:
        import matplotlib

        new = rc()
        self._before: Any = {key: matplotlib.rcParams[key] for key in new}
        matplotlib.rcParams.update(new)

    def __enter__(self) -> style:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import matplotlib

        matplotlib.rcParams.update(self._before)


def axis() -> dict[str, Any]:
    """plotly's settings for one axis."""
    return {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": FRAME,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": FRAME,
        "tickfont": {"color": MUTED, "size": 12},
        "nticks": 7,
        "title": {"font": {"color": INK, "size": 13}, "standoff": 6},
    }


def template() -> dict[str, Any]:
    """A plotly template of this look: `figure.update_layout(template=plots.template())`."""
    scene = {
        "backgroundcolor": PAPER, "gridcolor": GRID, "color": MUTED, "showbackground": False,
        "nticks": 5, "tickfont": {"size": 11}, "title": {"font": {"size": 13, "color": INK}},
    }  # fmt: skip
    return {
        "layout": {
            "paper_bgcolor": PAPER,
            "plot_bgcolor": PAPER,
            "colorway": CYCLE,
            "font": {"family": FONT, "size": 13, "color": INK},
            "xaxis": axis(),
            "yaxis": axis(),
            "scene": {"xaxis": scene, "yaxis": scene, "zaxis": scene},
            "hoverlabel": {
                "bgcolor": PAPER,
                "bordercolor": FRAME,
                "font": {"family": FONT, "size": 12, "color": INK},
            },
            "hovermode": "closest",
        }
    }
