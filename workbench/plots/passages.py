"""Texts shaded token by token: the colour of a token, as HTML and broken into lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from workbench.plots import escape, theme


def shade(value: Any, scale: tuple[float, float]) -> str:
    """The background of a token: white at the low end of `scale`, full colour at the high end."""
    if value is None or not math.isfinite(value):
        return theme.PAPER
    part = min(1.0, max(0.0, (value - scale[0]) / (scale[1] - scale[0])))
    full = [int(theme.SHADE[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{math.floor(255 + part * (c - 255) + 0.5):02X}" for c in full)


def html(tokens: Sequence[str], shades: Sequence[Any], scale: tuple[float, float]) -> str:
    """The tokens as escaped HTML, newlines kept by the `pre-wrap` of the element around them."""
    pieces = []
    for token, value in zip(tokens, shades, strict=True):
        known = value is not None and math.isfinite(value)
        note = f' title="{value:.3g}"' if known else ""
        pieces.append(
            f'<span style="background:{shade(value, scale)};border-radius:2px"{note}>'
            f"{escape.html(token)}</span>"
        )
    return "".join(pieces)


def lines(
    tokens: Sequence[str], shades: Sequence[Any], width: int
) -> list[list[tuple[int, str, Any]]]:
    """The tokens in lines of at most `width` letters, as (column, text, value) pieces."""
    found: list[list[tuple[int, str, Any]]] = [[]]
    column = 0
    for token, value in zip(tokens, shades, strict=True):
        for i, part in enumerate(token.expandtabs(4).split("\n")):
            if i:
                found.append([])
                column = 0
            while part:
                if column and column + len(part.rstrip()) > width:
                    found.append([])
                    column = 0
                found[-1].append((column, part[:width], value))
                column += len(part[:width])
                part = part[width:]
    return found
