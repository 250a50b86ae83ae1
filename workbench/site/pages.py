"""The pages around the notebooks, from templates: entrance, papers, status, disagreements."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from workbench.lab import ledger
from workbench.lab.claim_card import number
from workbench.site.notebook import Content, highlight
from workbench.site.prose import Prose
from workbench.site.sources import VERDICTS, Family, Paper, Sources

TEMPLATES = Path(__file__).parent / "templates" / "pages"
_PARAGRAPH = re.compile(r"</?p>\s*")
_SAYS = {
    "holds": "the central claim held here",
    "refuted": "the central claim did not hold here",
    "inconclusive": "the interval contains the margin",
    "not judged": "no verdict recorded yet",
}


class Renderer:
    """Renders pages of one build."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        self.environment.filters["number"] = number
        self.environment.filters["css"] = lambda text: str(text).replace(" ", "-")
        self.environment.globals |= {"says": _SAYS, "verdicts": VERDICTS}

    def _page(self, template: str, *, root: str = "", **values: Any) -> str:
        return self.environment.get_template(template).render(root=root, **values)

    # -- notebooks ------------------------------------------------------------------------
    def notebook(
        self,
        family: Family,
        page: Content,
        scripts: list[str],
        before: Family | None,
        after: Family | None,
    ) -> str:
        """The page of a notebook."""
        marks = {paper.slug: paper for paper in family.papers}
        entries = [
            {"anchor": h.anchor, "html": Markup(h.html), "paper": marks.get(h.anchor)}
            for h in page.headings
            if h.level == 2
        ]
        return self._page(
            "notebook.html.j2", title=page.title, family=family, body=Markup(page.body),
            entries=entries, scripts=scripts, before=before, after=after,
            families=len(self.sources.families),
        )  # fmt: skip

    def failed(
        self, family: Family, reason: str, before: Family | None, after: Family | None
    ) -> str:
        """The page that stands for a notebook which could not be converted."""
        return self._page(
            "failed.html.j2", title=family.title, family=family, reason=reason,
            before=before, after=after,
        )  # fmt: skip

    def source(self, name: str, text: str, language: str) -> str:
        """The page of a source file that a notebook links to."""
        return self._page(
            "source.html.j2", root="../", title=name, code=Markup(highlight(text, language))
        )

    # -- the others -----------------------------------------------------------------------
    def index(self) -> str:
        """The entrance."""
        counts = self.sources.counts()
        judged = sum(counts[name] for name in ledger.JUDGED)
        return self._page(
            "index.html.j2", title="Paper Workbench", families=self.sources.families,
            counts=counts, judged=judged, total=len(self.sources.papers),
            disagreements=len(self.sources.disagreements),
        )  # fmt: skip

    def papers(self) -> str:
        """The searchable table of all papers."""
        papers = self.sources.papers
        titles = {family.slug: family for family in self.sources.families}
        search = [
            {
                "text": " ".join(
                    (p.title, p.slug, p.summary, p.arxiv, titles[p.family].title, str(p.year))
                ).lower(),
                "family": p.family,
                "status": p.status,
                "verdict": p.verdict or "not judged",
            }
            for p in papers
        ]
        return self._page(
            "papers.html.j2", title="Papers", papers=papers, families=self.sources.families,
            titles=titles, data=script_json(search), counts=self.sources.counts(),
        )  # fmt: skip

    def status(self, claims: dict[str, list[dict[str, Any]]], failures: dict[str, str]) -> str:
        """How fresh each notebook is, and what moved against the ledger."""
        rows = [self._status(f, claims.get(f.slug, []), failures) for f in self.sources.families
                if f.page]  # fmt: skip
        missing = sum(not family.page for family in self.sources.families)
        run = self.sources.last_run
        return self._page("status.html.j2", title="Status", rows=rows, missing=missing, run=run)

    def _status(
        self, family: Family, claims: list[dict[str, Any]], failures: dict[str, str]
    ) -> dict[str, Any]:
        table = self.sources.ledger
        slugs = {paper.slug for paper in family.papers} | {str(c.get("paper")) for c in claims}
        mine = table[table["paper"].isin(slugs)].sort_values("date", kind="stable")
        newest = mine.iloc[-1] if len(mine) else None
        changes, problem = self._drift(claims, slugs)
        run = next(
            (n for n in self.sources.last_run.get("notebooks", []) if n["family"] == family.slug),
            None,
        )
        moved = [c for c in self.sources.last_run.get("changes", []) if c["paper"] in slugs]
        verdicts = [paper.verdict or "not judged" for paper in family.papers]
        return {
            "family": family,
            "newest": newest,
            "versions": "" if newest is None else newest["versions"].replace("=", " "),
            "timings": [t for t in self.sources.timings if t["family"] == family.slug],
            "claims": len(claims),
            "verdicts": {name: verdicts.count(name) for name in VERDICTS if name in verdicts},
            "changes": changes,
            "problem": failures.get(family.slug) or problem,
            "run": run,
            "moved": moved,
        }

    def _drift(
        self, claims: list[dict[str, Any]], slugs: set[str]
    ) -> tuple[list[dict[str, Any]], str]:
        """What the stored outputs of a notebook say that the ledger does not."""
        if not claims:
            return [], ""
        try:
            found = ledger.compare(ledger.rows(claims), self.sources.ledger, slugs)
        except ValueError as error:
            return [], str(error)
        unjudged = (found["change"] == "new") & (found["verdict"] == "not judged")
        moved = found[(found["change"] != "same") & ~unjudged]
        return [dict(row) for _, row in moved.iterrows()], ""

    def disagreements(self, find: Callable[[str], Paper | None]) -> str:
        """Where code and papers disagree."""
        prose = Prose(".", lambda url: url, lambda text: None, trusted=False)

        def inline(text: str) -> Markup:
            """A cell's text with its mathematics and code typeset, anything else escaped."""
            return Markup(prose.render(text))

        rows = [
            {
                "paper": find(row["paper"]),
                "slug": row["paper"],
                "source": row["source"],
                "difference": inline(row["largest_difference"]),
                "what": Markup(_PARAGRAPH.sub(" ", inline(row["what"])).strip()),
                "paper_says": inline(row["paper_says"]),
                "code_does": inline(row["code_does"]),
                "decided": inline(row["decided"]),
            }
            for row in self.sources.disagreements
        ]
        return self._page(
            "disagreements.html.j2", title="Where code and papers disagree", rows=rows
        )


def script_json(data: Any) -> Markup:
    """Data as JSON that can stand inside a ``<script type="application/json">``."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028"}
    for character, code in escapes.items():
        text = text.replace(character, code)
    return Markup(text)
