"""PNGs of line art: 256 colours say as much as 16 million and weigh a third."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def smaller(png: bytes) -> bytes:
    """The same picture with a palette of at most 256 colours, undithered, on white."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as full:
        paper = Image.new("RGBA", full.size, "white")
        flat = Image.alpha_composite(paper, full.convert("RGBA")).convert("RGB")
        few = flat.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        stream = io.BytesIO()
        few.save(stream, format="png", optimize=True)
    found = stream.getvalue()
    return found if len(found) < len(png) else png


def png(figure: Figure, dpi: int = 100) -> bytes:
    """A matplotlib figure as a small PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return smaller(stream.getvalue())


def _inline(figure: Figure) -> bytes | None:
    """What IPython would store of a figure, smaller; nothing for a figure without axes."""
    from IPython.core.pylabtools import print_figure

    drawn: Any = print_figure(figure, "png")
    return smaller(drawn) if drawn else None


def in_notebook() -> None:
    """Have a running notebook store its figures that way."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None and hasattr(shell, "kernel"):
        from matplotlib.figure import Figure

        shell.display_formatter.formatters["image/png"].for_type(Figure, _inline)
