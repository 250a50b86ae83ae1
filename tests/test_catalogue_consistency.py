"""The committed tables agree with one another, and with what exists in this repository."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from workbench.cli import runner
from workbench.lab import catalogue, ledger, paths

NOTEBOOKS = sorted((paths.root() / "notebooks").glob("*.ipynb"))
SCALES = ("smoke", "laptop", "gpu")


@pytest.fixture(scope="module")
def papers() -> pd.DataFrame:
    return catalogue.papers()


def cells(file: Path, kind: str) -> Iterator[dict[str, Any]]:
    for cell in json.loads(file.read_text(encoding="utf8"))["cells"]:
        if cell["cell_type"] == kind:
            yield cell | {"source": "".join(cell["source"])}


def test_all_papers_are_listed_once(papers: pd.DataFrame) -> None:
    assert len(papers) >= 185 and papers["family"].nunique() >= 27
    assert papers["slug"].is_unique
    assert papers["slug"].str.fullmatch(r"[a-z][a-z0-9_]*").all()
    assert not set(papers["slug"]) & set(papers["family"])


def test_rows_are_complete(papers: pd.DataFrame) -> None:
    assert list(pd.read_csv(catalogue.path(), nrows=0).columns) == catalogue.COLUMNS
    assert (papers["title"].str.strip() != "").all() and papers["year"].between(1950, 2100).all()
    assert papers["arxiv"].str.fullmatch(r"(\d{4}\.\d{4,5})?").all()
    assert papers["code"].str.fullmatch(r"([\w.-]+/[\w.-]+)?").all()
    assert papers["seeds"].str.fullmatch(r"(\d{3}( \d{3})*)?").all()
    assert papers["status"].isin(catalogue.WORDS).all()


def test_families_are_numbered_in_the_order_of_their_papers(papers: pd.DataFrame) -> None:
    families = catalogue.families()
    assert list(families["order"]) == list(range(1, len(families) + 1))
    assert list(families["slug"]) == list(dict.fromkeys(papers["family"]))
    assert (families["title"].str.strip() != "").all()
    for _, mine in papers.groupby("family"):
        assert list(mine["order"]) == list(range(1, len(mine) + 1))


def test_status_is_derived_and_up_to_date() -> None:
    stale = catalogue.update(write=False)
    assert stale == [], f"run `workbench papers --update`: {stale}"


def test_every_notebook_is_a_family_or_the_index(papers: pd.DataFrame) -> None:
    assert {file.stem for file in NOTEBOOKS} - {"index"} <= set(papers["family"])


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_speaks_of_its_own_papers_only(file: Path, papers: pd.DataFrame) -> None:
    mine = set(papers.loc[papers["family"] == file.stem, "slug"])
    anchors = [a for a in catalogue.anchors(file.stem) if a in set(papers["slug"])]
    assert set(anchors) <= mine
    assert len(anchors) == len(set(anchors)), "a paper has two sections"
    cited, judged = set(), set()
    for cell in cells(file, "code"):
        for node in ast.walk(ast.parse(re.sub(r"^[%!].*$", "", cell["source"], flags=re.M))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                first = node.args[0]
                slug = first.value if isinstance(first, ast.Constant) else None
                called = ast.unparse(node.func)
                if called == "lab.paper":
                    cited.add(slug)
                if called in ("run.claim", "run.identity"):
                    judged.add(slug)
    assert cited <= mine and judged <= mine
    assert cited == set(anchors), "each section shows its paper's citation"


def test_every_ledger_row_belongs_to_a_paper(papers: pd.DataFrame) -> None:
    recorded = ledger.read()
    assert set(recorded["paper"]) <= set(papers["slug"])
    assert not recorded.duplicated(ledger.KEY).any()
    assert recorded["verdict"].isin([*ledger.JUDGED, "not judged"]).all()
    assert recorded["scale"].isin(SCALES).all()
    assert recorded[["effect", "ours", "baseline"]].notna().all(axis=None)
    several = recorded[recorded["n"] > 1]  # one published value has no interval
    assert several[["low", "high"]].notna().all(axis=None)
    claims = recorded[(recorded["kind"] == "claim") & (recorded["scale"] != "smoke")]
    assert (claims.loc[claims["verdict"].isin(ledger.JUDGED), "n"] >= 5).all()
    for name in ("statement", "hardware", "versions", "date"):
        assert (recorded[name] != "").all(), name


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_claims_stored_in_a_notebook_are_those_of_the_ledger(file: Path) -> None:
    stored = ledger.rows(runner.claims_in(json.loads(file.read_text(encoding="utf8"))))
    changes = ledger.compare(stored, ledger.read(), papers=[])
    differ = changes[~changes["change"].isin(["same"])]
    assert differ[["paper", "claim", "data", "change"]].to_dict("records") == []


def test_the_ledger_is_stored_as_it_would_be_written() -> None:
    text = ledger.path().read_text(encoding="utf8")
    assert text == ledger.read().to_csv(index=False, lineterminator="\n")


def test_every_recorded_verdict_follows_from_its_interval() -> None:
    recorded = ledger.read()
    for _, row in recorded[recorded["kind"] == "claim"].iterrows():
        if row["verdict"] == "not judged":
            continue
        low, high, margin = row["low"], row["high"], row["margin"]
        said = "holds" if low > margin else "refuted" if high <= margin else "inconclusive"
        assert row["verdict"] == said, f"{row['paper']}: {row['claim']}"


def test_timings_are_of_notebooks_that_exist() -> None:
    file = paths.root() / "data" / "timings.csv"
    if not file.exists():
        pytest.skip("no timing has been recorded yet")
    timings = pd.read_csv(file)
    assert set(timings["family"]) <= {file.stem for file in NOTEBOOKS}
    assert not timings.duplicated(["family", "scale", "device"]).any()
    assert (timings[["seconds", "peak_mb", "disk_mb", "cores"]] >= 0).all().all()
