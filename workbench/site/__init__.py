"""The static site: every notebook as a page, a searchable list of papers, status, disagreements.

``build`` needs no kernel and no network, and neither do the pages: fonts, plotly.js, data and
scripts lie beside them, and everything works when a page is opened from the file system.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.site.builder import build
    from workbench.site.report import Report

__all__ = ["Report", "build"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from workbench.site.builder import build

        return build
    if name == "Report":
        from workbench.site.report import Report

        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
