"""Drawing shared by all families: one style, matplotlib primitives, interactive explorers.

Importing this package loads no drawing library; each name loads what it needs on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "theme": ("style", "template", "palette"),
    "critical_difference": ("rank_diagram",),
    "mpl": ("reliability", "compare", "line_band", "heatmap", "surface", "strip"),
    "explorer": (
        "Axis", "Band", "Bars", "Choice", "Diagonal", "Explorer", "HLine", "Handle", "HeatMap",
        "Line", "Panel", "Passage", "Points", "Readout", "Slider", "Steps", "Surface", "Toggle",
        "VLine",
    ),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
