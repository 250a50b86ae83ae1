"""What a cell displays: one bundle of representations, chosen by whoever reads it."""

from __future__ import annotations

import base64
import sys
from typing import Any

CLAIM = "application/vnd.workbench.claim+json"
EXPLORER = "application/vnd.workbench.explorer+json"


def bundle(
    text: str,
    *,
    html: str | None = None,
    png: bytes | None = None,
    json: dict[str, dict[str, Any]] | None = None,
    alt: str | None = None,
) -> None:
    """Display one output with several representations; prints ``text`` outside IPython.

    Args:
        text: the plain representation, always there, so that no reader is left with nothing.
        html: rich text. Front ends prefer it to a picture: give one or the other.
        png: a picture, for pages without a kernel.
        json: our own types, as ``{MIME type: content}``.
        alt: description of the picture for those who cannot see it.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        print(text)
        return
    from IPython.display import display

    data: dict[str, Any] = {"text/plain": text, **(json or {})}
    if html:
        data["text/html"] = html
    if png:
        data["image/png"] = base64.b64encode(png).decode()
    display(data, raw=True, metadata={"image/png": {"alt": alt}} if alt and png else {})


def paper(slug: str) -> None:
    """Show a paper's citation with its links and its present verdict.

    Args:
        slug: the paper's name in ``data/papers.csv``.

    Raises:
        KeyError: there is no such paper; the message names near ones.
    """
    from workbench.lab import catalogue

    bundle(catalogue.paper_text(slug), html=catalogue.paper_html(slug))
