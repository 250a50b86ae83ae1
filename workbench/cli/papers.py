"""``workbench papers``: the catalogue in a terminal."""

from __future__ import annotations

import difflib

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workbench.cli.outputs import STYLES
from workbench.lab import catalogue


def show(
    console: Console,
    *,
    text: str | None = None,
    family: str | None = None,
    status: str | None = None,
    verdict: str | None = None,
) -> None:
    """Print the papers that match.

    Raises:
        ValueError: there is no such family.
    """
    frame = catalogue.overview()
    known = sorted(set(frame["family"]))
    if family is not None and family not in known:
        near = difflib.get_close_matches(family, known, n=3) or known
        raise ValueError(f"no family is called {family!r}; there is {', '.join(near)}")
    found = catalogue.select(frame, text or "", family or "", status or "", verdict or "")
    table = Table(box=None, pad_edge=False)
    for name in ("family", "paper", "year", "title", "status", "missing", "verdict"):
        table.add_column(name, overflow="ellipsis" if name == "title" else "fold")
    for _, row in found.iterrows():
        table.add_row(
            escape(row["family"]), escape(row["slug"]), str(row["year"]), escape(row["title"]),
            row["status"], row["missing"] if row["status"] == "partial" else "",
            f"[{STYLES.get(row['verdict'], 'dim')}]{row['verdict']}[/]",
        )  # fmt: skip
    console.print(table)
    console.print(f"{len(found)} of {len(frame)} papers")


def update(console: Console) -> int:
    """Write the derived status where readers look; returns the exit code."""
    changed = catalogue.update()
    console.print(f"Changed: {', '.join(changed)}" if changed else "All up to date.")
    return 0
