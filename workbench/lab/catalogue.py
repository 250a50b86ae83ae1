"""The catalogue: which papers there are, and how far each one is.

``data/papers.csv`` and ``data/families.csv`` are the catalogue. A paper's status is never typed: it
follows from what exists in the repository, and ``update`` writes it where readers look.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.lab import ledger, paths
from workbench.lab.claim_card import COLOURS, number

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    "family", "order", "slug", "title", "year", "arxiv", "code", "summary", "seeds", "status",
]  # fmt: skip
PARTS = ("module", "test", "section", "verdict")
WORDS = ("planned", "partial", "done")
MARKS = ("<!-- status:begin -->", "<!-- status:end -->")
_ANCHOR = re.compile(r"""<a\s+(?:id|name)=["']([A-Za-z0-9_]+)["']""")


@dataclass(frozen=True)
class Status:
    """How far a paper is: ``planned``, ``partial`` or ``done``, and what is missing."""

    word: str
    missing: tuple[str, ...]

    def __str__(self) -> str:
        lacks = f" (missing: {', '.join(self.missing)})" if self.word == "partial" else ""
        return self.word + lacks


def path() -> Path:
    """File of the catalogue of papers."""
    return paths.root() / "data" / "papers.csv"


def papers() -> pd.DataFrame:
    """All papers, in reading order, with the columns ``COLUMNS``; ``status`` as last written."""
    import pandas as pd

    frame = pd.read_csv(path(), dtype=str, keep_default_na=False).reindex(columns=COLUMNS)
    return frame.fillna("").astype({"order": int, "year": int})


def families() -> pd.DataFrame:
    """All families, in reading order: ``slug``, ``order``, ``title``, ``description``."""
    import pandas as pd

    file = paths.root() / "data" / "families.csv"
    return pd.read_csv(file, dtype=str, keep_default_na=False).astype({"order": int})


def find(slug: str) -> pd.Series:
    """A paper's row.

    Raises:
        KeyError: there is no such paper; the message names near ones.
    """
    frame = papers()
    row = frame[frame["slug"] == slug]
    if row.empty:
        near = difflib.get_close_matches(slug, frame["slug"], n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise KeyError(f"slug: no paper is called {slug!r}{hint}")
    return row.iloc[0]


def notebook_file(family: str) -> Path:
    """File of a family's notebook, whether it exists or not."""
    return paths.root() / "notebooks" / f"{family}.ipynb"


def module_file(family: str, slug: str) -> Path:
    """File of a paper's module, whether it exists or not."""
    return paths.root() / "workbench" / family / f"{slug}.py"


def oracle_file(family: str, slug: str) -> Path:
    """File of a paper's test, whether it exists or not."""
    return paths.root() / "tests" / family / f"test_{slug}.py"


def anchors(family: str) -> list[str]:
    """Anchors in the markdown cells of a family's notebook, in order; empty without a notebook."""
    file = notebook_file(family)
    if not file.exists():
        return []
    cells = json.loads(file.read_text(encoding="utf8"))["cells"]
    text = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return _ANCHOR.findall("\n".join(text))


def survey() -> pd.DataFrame:
    """What exists of each paper: one row a slug; family, a yes or no for each of ``PARTS``,
    ``status``, and what is ``missing`` in words.
    """
    import pandas as pd

    frame, recorded = papers(), ledger.read()
    sections = {family: set(anchors(family)) for family in frame["family"].unique()}
    out = []
    for family, slug in zip(frame["family"], frame["slug"], strict=True):
        has = {
            "module": module_file(family, slug).exists(),
            "test": oracle_file(family, slug).exists(),
            "section": slug in sections[family],
            "verdict": ledger.current(recorded, slug) is not None,
        }
        derived = _status(has)
        lacks = ", ".join(derived.missing)
        out.append(
            {"slug": slug, "family": family, **has, "status": derived.word, "missing": lacks}
        )
    columns = ["slug", "family", *PARTS, "status", "missing"]
    return pd.DataFrame(out, columns=columns).set_index("slug")


def _status(has: dict[str, bool]) -> Status:
    missing = tuple(part for part in PARTS if not has[part])
    return Status(WORDS[0 if len(missing) == len(PARTS) else 1 if missing else 2], missing)


def status(slug: str) -> Status:
    """How far a paper is, derived from what exists.

    Raises:
        KeyError: there is no such paper.
    """
    find(slug)
    row = survey().loc[slug]
    return _status({part: bool(row[part]) for part in PARTS})


def verdicts() -> pd.DataFrame:
    """The ledger row that stands for each judged paper, indexed by slug, in reading order."""
    import pandas as pd

    recorded = ledger.read()
    rows = [ledger.current(recorded, slug) for slug in papers()["slug"]]
    frame = pd.DataFrame([row for row in rows if row is not None], columns=ledger.COLUMNS)
    return frame.set_index("paper")


def overview() -> pd.DataFrame:
    """All papers with what is derived now: ``status``, what is ``missing``, ``verdict`` ("" without
    one), and the family's title as ``family_title``.
    """
    frame, found = papers(), survey()
    judged = verdicts()["verdict"].to_dict()
    titles = families().set_index("slug")["title"].to_dict()
    frame["status"] = found["status"].reindex(frame["slug"]).to_numpy()
    frame["family_title"] = [titles.get(family, family) for family in frame["family"]]
    frame["missing"] = found["missing"].reindex(frame["slug"]).to_numpy()
    frame["verdict"] = [judged.get(slug, "") for slug in frame["slug"]]
    return frame


def select(
    frame: pd.DataFrame, text: str = "", family: str = "", status: str = "", verdict: str = ""
) -> pd.DataFrame:
    """Papers that match every word of ``text`` and each choice that is not empty.

    Args:
        frame: as ``overview`` gives it.
        text: words to look for in title, summary, slug, arXiv id, repository and family.
        family: slug.
        status: ``planned``, ``partial`` or ``done``.
        verdict: a verdict, or ``none`` for papers that have none.
    """
    keep = frame["slug"] != ""
    if family:
        keep &= frame["family"] == family
    if status:
        keep &= frame["status"] == status
    if verdict:
        keep &= frame["verdict"] == ("" if verdict == "none" else verdict)
    spelt = frame["slug"].str.cat(
        frame[["title", "summary", "arxiv", "code", "family_title"]], sep=" "
    ).str.lower()  # fmt: skip
    for word in text.lower().split():
        keep &= spelt.str.contains(word, regex=False).astype(bool)
    return frame[keep]


def update(*, write: bool = True) -> list[str]:
    """Bring the derived words up to date: ``status`` in ``data/papers.csv``, README's table.

    Args:
        write: False only says what would change.

    Returns:
        Names of the files that were, or would be, changed.
    """
    if write:
        with ledger.locked(path()):
            return _update(write=True)
    return _update(write=False)


def _update(*, write: bool) -> list[str]:
    changed = []
    now = overview()
    fresh = now[COLUMNS]
    if not fresh.equals(papers()):
        changed.append("data/papers.csv")
        if write:
            ledger.write_csv(fresh, path())
    readme = paths.root() / "README.md"
    text = readme.read_text(encoding="utf8") if readme.exists() else ""
    begin, end = (text.find(mark) for mark in MARKS)
    if 0 <= begin < end:
        table = f"{text[: begin + len(MARKS[0])]}\n{status_table(now)}\n{text[end:]}"
        if table != text:
            changed.append("README.md")
            if write:
                ledger.replace_text(readme, table)
    return changed


def status_table(frame: pd.DataFrame) -> str:
    """README's table, from ``overview``: a line for each family begun, and one for the whole."""
    heads = ["Family", "Papers", "Done", "Partial", *(v.capitalize() for v in ledger.JUDGED)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for _, family in families().iterrows():
        mine = frame[frame["family"] == family["slug"]]
        if (mine["status"] == "planned").all():
            continue
        name = family["title"]
        if notebook_file(family["slug"]).exists():
            name = f"[{name}](notebooks/{family['slug']}.ipynb)"
        lines.append(_table_line(name, mine))
    lines.append(_table_line(f"All {len(families())} families", frame))
    return "\n".join(lines)


def _table_line(name: str, mine: pd.DataFrame) -> str:
    counts = [len(mine), *((mine["status"] == word).sum() for word in ("done", "partial"))]
    counts += [(mine["verdict"] == word).sum() for word in ledger.JUDGED]
    return f"| {name} | {' | '.join(str(count) for count in counts)} |"


def verdict_sentence(row: pd.Series) -> str:
    """A ledger row in one sentence of plain text."""
    unit = f" {row['unit']}" if row["unit"] else ""
    where = f"scale {row['scale']}, {row['device']}, {row['date']}"
    if row["kind"] == "identity":
        return f"largest difference {number(row['ours'])} over {row['n']} values; {where}"
    return (
        f"effect {number(row['effect'])}{unit}, 95% interval {number(row['low'])} to "
        f"{number(row['high'])}, {row['n']} pairs; {where}"
    )


def paper_text(slug: str) -> str:
    """A paper's citation and present verdict as plain text."""
    row, current = find(slug), ledger.current(ledger.read(), slug)
    about = f" · arXiv:{row['arxiv']}" if row["arxiv"] else ""
    about += f" · code: {row['code']}" if row["code"] else ""
    said = f"[{current['verdict']}] {verdict_sentence(current)}" if current is not None else (
        "no verdict recorded yet"
    )  # fmt: skip
    return f"{row['title']} ({row['year']}){about}\n  {said}"


def paper_html(slug: str) -> str:
    """A paper's citation with its links and present verdict, for light and dark themes.

    Links to this project's files are relative to ``notebooks/``.
    """
    row, current = find(slug), ledger.current(ledger.read(), slug)
    family = row["family"]
    links = []
    if row["arxiv"]:
        links.append(link(f"https://arxiv.org/abs/{row['arxiv']}", f"arXiv {row['arxiv']}"))
    if row["code"]:
        links.append(link(f"https://github.com/{row['code']}", "authors' code"))
    ours = {"our module": module_file(family, slug), "its test": oracle_file(family, slug)}
    for name, file in ours.items():
        if file.exists():
            links.append(link(f"../{file.relative_to(paths.root()).as_posix()}", name))
    if current is None:
        said = f"{badge('not judged')} no verdict recorded yet"
    else:
        said = f"{badge(current['verdict'])} {escape(verdict_sentence(current))}"
    return (
        f'<div class="workbench-paper" data-paper="{escape(slug)}" style="border:1px solid '
        "var(--jp-border-color2,#c8ccd2);border-left:6px solid var(--jp-border-color1,#8a919c);"
        "border-radius:4px;padding:10px 16px;margin:8px 0;max-width:820px;"
        "background:var(--jp-layout-color1,#fff);"
        'color:var(--jp-content-font-color1,#1c1e21)">'
        f"<div><strong>{escape(row['title'])}</strong> ({row['year']})</div>"
        f'<div style="margin-top:4px">{escape(row["summary"].rstrip("."))}.</div>'
        f'<div style="margin-top:4px">{" · ".join(links)}</div>'
        f'<div style="margin-top:7px">{said}</div></div>'
    )


def link(target: str, text: str) -> str:
    """An HTML link, both parts escaped."""
    return f'<a href="{escape(target)}">{escape(text)}</a>'


def badge(verdict: str) -> str:
    """A verdict as a coloured label."""
    return (
        f'<strong style="background:{COLOURS[verdict]};color:#fff;border-radius:3px;'
        f'padding:2px 9px;margin-right:6px;white-space:nowrap">{escape(verdict)}</strong>'
    )
