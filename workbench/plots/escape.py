"""Text from users' files on its way into HTML, plotly and matplotlib. All escaping is done here."""

from __future__ import annotations

from html import escape
from typing import Any


def html(text: Any) -> str:
    """`text` for HTML content or a quoted attribute."""
    return escape(str(text), quote=True)


def plotly(text: Any) -> str:
    """`text` for plotly, which reads a subset of HTML and `%{...}` in hover templates."""
    return escape(str(text), quote=False).replace("%{", "% {")


def matplotlib(text: Any) -> str:
    """`text` for matplotlib, which reads TeX between dollar signs."""
    return str(text).replace("$", r"\$")
