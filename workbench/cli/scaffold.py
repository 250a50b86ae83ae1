"""``workbench new-paper``: the empty rooms of one paper; only its content is left to write."""

from __future__ import annotations

import datetime
import keyword
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from workbench.lab import catalogue, ledger, paths

RESERVED = ("lab", "plots", "cli", "site", "index", "data", "experiments", "figures")
CLOSING = "side-by-side"  # id of the cell that begins a notebook's closing part
MODULE = '''"""{title}.

{summary}.

Not included: what of the paper is left out here, and why.

Reference: {year}{arxiv}.
"""

from __future__ import annotations
'''
ORACLE = '''"""{title}: what its module must reproduce."""

import pytest


def test_oracle() -> None:
    pytest.fail(
        "{slug} has no oracle yet: "
        "compare the module with an independent computation, a peer library, a closed form or a "
        "published number"
    )
'''
FAMILY = '"""{}"""\n'
EXPERIMENTS = (
    '"""What the notebook runs over seeds: one module a paper, functions of plain arguments."""\n'
)
PARAMETERS = """scale: str = "laptop"  # smoke, laptop or gpu
device: str = "auto"  # auto, cpu, cuda or mps
seed: int = 0"""
SETUP = """import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown

import workbench as wb
from workbench import lab, plots

plots.style()
run = lab.start(scale, device, seed)"""
OPENING = """# {title}

{description}

**What you will understand at the end**, in two or three sentences; then one figure that shows the
whole story. At scale `laptop` this notebook takes minutes, at `smoke` seconds."""
TOGETHER = """## Side by side

One table and one figure of all methods of this family on the same task; what to read next; three
exercises."""
SECTION = """<a id="{slug}"></a>

## {number}. {title}

{summary}."""
OUTLINE = """*This section is a scaffold.* In its place, in this order: the problem in plain words;
the key equation, derived; a few lines that check it numerically (tag `nbval-check-output`); the
method called in at most 15 lines; the experiment (`run.seeds`); the claim (`run.claim`); a figure;
one thing to try; one question for the group with a folded answer; the weakest point."""


def new_paper(family: str, slug: str, given: Mapping[str, Any]) -> list[str]:
    """Make what does not exist yet of one paper; what exists is kept.

    Args:
        family: package, notebook and test folder; made if there is none of this name.
        slug: module, test, section and rows.
        given: values for the catalogue row (``title``, ``year``, ``arxiv``, ``code``, ``summary``).

    Returns:
        What was done, and the next steps, as lines for the user.

    Raises:
        ValueError: a name cannot be used; nothing has been written.
    """
    for argument, name in (("family", family), ("slug", slug)):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
            raise ValueError(f"{argument}: expected lower-case letters, digits and _, got {name!r}")
    if family in RESERVED or slug in RESERVED:
        raise ValueError(f"{family if family in RESERVED else slug!r} is a name of the house")
    listed = catalogue.papers().set_index("slug")["family"]
    if slug in listed and listed[slug] != family:
        raise ValueError(f"slug: {slug!r} is already a paper of {listed[slug]}")
    with ledger.locked(catalogue.path()):
        lines = [_family_row(family), _paper_row(family, slug, given)]
    paper, home = catalogue.find(slug), catalogue.families().set_index("slug").loc[family]
    summary = paper["summary"] or "What the paper does, in one or two sentences"
    words = {
        "slug": slug, "title": str(paper["title"]), "summary": str(summary).rstrip("."),
        "year": str(paper["year"]), "arxiv": f", arXiv:{paper['arxiv']}" if paper["arxiv"] else "",
    }  # fmt: skip
    quoted = {name: _in_docstring(word) for name, word in words.items()}
    package = catalogue.module_file(family, slug).parent
    description = str(home["description"]) or "what unites its papers."
    about = {"title": str(home["title"]), "description": description}
    lines += [
        _write(
            package / "__init__.py",
            FAMILY.format(_in_docstring(f"{about['title']}: {description}")),
        ),
        _write(package / "experiments" / "__init__.py", EXPERIMENTS),
        _write(catalogue.module_file(family, slug), MODULE.format(**quoted)),
        _write(catalogue.oracle_file(family, slug), ORACLE.format(**quoted)),
        _section(catalogue.notebook_file(family), words, about),
    ]
    lines += [f"updated  {name}" for name in catalogue.update()]
    return [line for line in lines if line] + _next_steps(family, slug)


def _in_docstring(text: str) -> str:
    """Text that fits the width of a docstring and cannot end it."""
    return textwrap.fill(text.replace("\\", "/").replace('"', "'"), 88)


def _write(file: Path, text: str) -> str:
    shown = file.relative_to(paths.root()).as_posix()
    if file.exists():
        return f"kept     {shown}"
    ledger.replace_text(file, text)
    return f"written  {shown}"


def _family_row(family: str) -> str:
    frame = catalogue.families()
    if family in set(frame["slug"]):
        return ""
    title = family.replace("_", " ").capitalize()
    order = int(frame["order"].max()) + 1 if len(frame) else 1
    row = {"slug": family, "order": order, "title": title, "description": ""}
    file = paths.root() / "data" / "families.csv"
    ledger.write_csv(pd.concat([frame, pd.DataFrame([row])]).reindex(columns=frame.columns), file)
    return "added    a row to data/families.csv: give it a title and a description"


def _paper_row(family: str, slug: str, given: Mapping[str, Any]) -> str:
    frame = catalogue.papers()
    known = frame["slug"] == slug
    if known.any():
        for name, value in given.items():
            frame.loc[known, name] = value
        if given:
            ledger.write_csv(frame, catalogue.path())
        return f"kept     the row of {slug} in data/papers.csv"
    mine = frame[frame["family"] == family]
    row = {
        "family": family, "order": int(mine["order"].max()) + 1 if len(mine) else 1, "slug": slug,
        "title": slug.replace("_", " ").capitalize(), "year": datetime.date.today().year,
        **dict.fromkeys(("arxiv", "code", "summary", "seeds"), ""), "status": "planned", **given,
    }  # fmt: skip
    at = int(mine.index.max()) + 1 if len(mine) else len(frame)
    parts = [frame.iloc[:at], pd.DataFrame([row]), frame.iloc[at:]]
    ledger.write_csv(pd.concat([p for p in parts if len(p)])[catalogue.COLUMNS], catalogue.path())
    return "added    a row to data/papers.csv: complete title, year, arXiv id, repository, summary"


def new_notebook(title: str, description: str) -> nbformat.NotebookNode:
    """A family's notebook with everything but its papers."""
    cells = [
        markdown("title", OPENING.format(title=title, description=description)),
        code("parameters", PARAMETERS, tags=["parameters"]),
        code("setup", SETUP),
        markdown(CLOSING, TOGETHER),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3", "language": "python", "name": "python3",
    }  # fmt: skip
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def markdown(name: str, text: str) -> nbformat.NotebookNode:
    """A markdown cell with a readable id."""
    return nbformat.v4.new_markdown_cell(text, id=name)


def code(name: str, text: str, tags: list[str] | None = None) -> nbformat.NotebookNode:
    """A code cell with a readable id."""
    metadata = {"tags": tags} if tags else {}
    return nbformat.v4.new_code_cell(text, id=name, metadata=metadata)


def _section(file: Path, words: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """Add the paper's section before the notebook's closing part, or at its end."""
    shown, slug = file.relative_to(paths.root()).as_posix(), str(words["slug"])
    made = not file.exists()
    notebook = new_notebook(**about) if made else nbformat.read(file, as_version=4)
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    if f'<a id="{slug}"></a>' in text:
        return f"kept     the section of {slug} in {shown}"
    number = len(re.findall(r"^## \d+\. ", text, re.MULTILINE)) + 1
    ids = [cell["id"] for cell in notebook.cells]
    at = ids.index(CLOSING) if CLOSING in ids else len(ids)
    notebook.cells[at:at] = [
        markdown(slug, SECTION.format(number=number, **words)),
        code(f"{slug}-paper", f'lab.paper("{slug}")'),
        markdown(f"{slug}-outline", OUTLINE),
    ]
    ledger.replace_text(file, nbformat.writes(notebook) + "\n")
    return f"{'written ' if made else 'extended'} {shown}"


def _next_steps(family: str, slug: str) -> list[str]:
    return [
        "Next:",
        f"  1. tests/{family}/test_{slug}.py fails until it holds the oracle: write that first;",
        f"  2. workbench/{family}/{slug}.py: the method, its equation in the docstring;",
        f"  3. workbench/{family}/experiments/{slug}.py: a function of seed for run.seeds;",
        f"  4. notebooks/{family}.ipynb: the section, with its claim stated before the run;",
        f"  5. workbench run {family} --scale smoke, then --scale laptop --record.",
    ]
