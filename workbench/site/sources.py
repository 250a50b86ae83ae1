"""What the pages are made from: catalogue, ledger, timings, the last run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.lab import catalogue, ledger, paths
from workbench.lab.claim_card import number
from workbench.site import disagreements

if TYPE_CHECKING:
    import pandas as pd

VERDICTS = (*ledger.JUDGED, "not judged")


@dataclass
class Paper:
    """One paper as the pages show it."""

    slug: str
    family: str
    title: str
    year: int
    arxiv: str
    code: str
    summary: str
    status: str
    missing: tuple[str, ...]
    verdict: str  # "" while nothing is recorded
    sentence: str = ""  # the verdict's numbers in words
    numbers: str = ""  # and in short
    section: str = ""  # address of its section, "" while there is none

    @property
    def mark(self) -> str:
        """Verdict or, without one, status, as a CSS class."""
        return self.verdict or self.status


@dataclass
class Family:
    """One family with its papers."""

    slug: str
    order: int
    title: str
    description: str
    papers: list[Paper] = field(default_factory=list)
    page: str = ""  # address of its page, "" while there is none


@dataclass
class Sources:
    """Everything the pages need besides the notebooks."""

    families: list[Family]
    ledger: pd.DataFrame
    timings: list[dict[str, Any]]
    last_run: dict[str, Any]
    disagreements: list[dict[str, str]]
    warnings: list[str] = field(default_factory=list)

    @property
    def papers(self) -> list[Paper]:
        """All papers, in reading order."""
        return [paper for family in self.families for paper in family.papers]

    def counts(self) -> dict[str, int]:
        """How many papers have each verdict; those without a judgement count as not judged."""
        verdicts = [paper.verdict for paper in self.papers]
        counts = {name: verdicts.count(name) for name in ledger.JUDGED}
        return counts | {"not judged": len(verdicts) - sum(counts.values())}


def load(run: Path | None = None) -> Sources:
    """Read the repository's tables.

    Args:
        run: folder of a run (as ``workbench run`` leaves it) whose outcome the status page shows;
            default: the newest below ``runs/``.
    """
    warnings: list[str] = []
    try:
        survey = catalogue.survey().to_dict("index")
    except (ValueError, KeyError) as error:  # a notebook that is no notebook
        survey = {}
        warnings.append(f"status of the papers is the one last written: {error}")
    verdicts = catalogue.verdicts()
    families = {
        row["slug"]: Family(row["slug"], int(row["order"]), row["title"], row["description"])
        for row in catalogue.families().to_dict("records")
    }
    for row in catalogue.papers().to_dict("records"):
        slug = row["slug"]
        has = survey.get(slug, {})
        judged = verdicts.loc[slug] if slug in verdicts.index else None
        paper = Paper(
            slug, row["family"], row["title"], int(row["year"]), row["arxiv"], row["code"],
            row["summary"], has.get("status", row["status"]),
            tuple(part for part in catalogue.PARTS if not has.get(part, True)),
            "" if judged is None else judged["verdict"],
            "" if judged is None else catalogue.verdict_sentence(judged),
            "" if judged is None else _short(judged),
        )  # fmt: skip
        if paper.family not in families:
            families[paper.family] = Family(
                paper.family, len(families) + 1, paper.family.replace("_", " ").capitalize(), ""
            )
        families[paper.family].papers.append(paper)
    try:
        disagreed = disagreements.read()
    except ValueError as error:
        disagreed = []
        warnings.append(str(error))
    return Sources(
        sorted(families.values(), key=lambda f: f.order),
        ledger.read(),
        _timings(paths.root() / "data" / "timings.csv"),
        _summary(run or paths.root() / "runs"),
        disagreed,
        warnings,
    )


def _short(row: pd.Series) -> str:
    """A verdict's numbers in a few characters."""
    if row["kind"] == "identity":
        return f"largest difference {number(row['ours'])}"
    unit = f" {row['unit']}" if row["unit"] else ""
    text = f"{number(row['effect'])}{unit} [{number(row['low'])},\u00a0{number(row['high'])}]"
    return text.replace("-", "\u2212")


def _timings(file: Path) -> list[dict[str, Any]]:
    import pandas as pd

    if not file.exists():
        return []
    return [dict(row) for _, row in pd.read_csv(file, keep_default_na=False).iterrows()]


def _summary(folder: Path) -> dict[str, Any]:
    """The newest ``summary.json`` in or one level below a folder; empty where there is none."""
    found = [*folder.glob("summary.json"), *folder.glob("*/summary.json")]
    summaries = []
    for file in found:
        try:
            summaries.append(json.loads(file.read_text(encoding="utf8")))
        except (OSError, ValueError):
            continue
    return max(summaries, key=lambda s: str(s.get("date", "")), default={})
