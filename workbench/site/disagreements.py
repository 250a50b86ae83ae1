"""Where code and papers disagree: ``data/disagreements.csv``.

One row for each departure of the authors' released code from their paper, of a library's default
from the paper's recipe, or of a peer library from the closed form. Columns:

* ``paper``: the paper's slug in the catalogue.
* ``what``: the quantity or step concerned, in a few words.
* ``paper_says``: what the paper states, with the equation or section where it does. Mathematics
  between dollars is typeset.
* ``code_does``: what the code does instead, in the same form.
* ``largest_difference``: the largest difference we measured between the two, as text: a number with
  its unit and what it is a difference of, or ``not measured``.
* ``source``: where to look: ``owner/repository:path`` of the code, or the library with its version.
  A full address is shown as a link.
* ``decided``: what this workbench does, and why.
"""

from __future__ import annotations

import csv
from pathlib import Path

from workbench.lab import paths

COLUMNS = (
    "paper", "what", "paper_says", "code_does", "largest_difference", "source", "decided",
)  # fmt: skip


def path() -> Path:
    """File of the disagreements."""
    return paths.root() / "data" / "disagreements.csv"


def read(file: Path | None = None) -> list[dict[str, str]]:
    """The rows, in the order of the file; none where there is no file.

    Raises:
        ValueError: the header is not ``COLUMNS``, or a row lacks its paper or its subject.
    """
    file = file or path()
    if not file.exists():
        return []
    with file.open(encoding="utf8", newline="") as source:
        reader = csv.DictReader(source)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{file.name}: expected the columns {', '.join(COLUMNS)}")
        rows = [{name: (row[name] or "").strip() for name in COLUMNS} for row in reader]
    for number, row in enumerate(rows, 2):
        if not row["paper"] or not row["what"]:
            raise ValueError(f"{file.name}, row {number}: 'paper' and 'what' are needed")
    return rows
