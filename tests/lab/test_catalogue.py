from __future__ import annotations

import json
from pathlib import Path

import pytest

from workbench.lab import catalogue, ledger

PAPERS = """family,order,slug,title,year,arxiv,code,summary,seeds,status
optics,1,lens,On <Lenses>,2020,2001.00001,owner/lens,Bends light.,000,planned
optics,2,prism,On Prisms,2021,,,Splits light,000 001,done
"""
FAMILIES = "slug,order,title,description\noptics,1,Optics,What light does.\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "papers.csv").write_text(PAPERS)
    (tmp_path / "data" / "families.csv").write_text(FAMILIES)
    return tmp_path


def give(root: Path, part: str) -> None:
    """Make one part of the paper ``lens``."""
    files = {"module": "workbench/optics/lens.py", "test": "tests/optics/test_lens.py"}
    if part in files:
        (root / files[part]).parent.mkdir(parents=True, exist_ok=True)
        (root / files[part]).write_text("")
    elif part == "section":
        anchor = {"cell_type": "markdown", "source": ['<a id="lens"></a>\n', "## 1. Lens"]}
        quoted = {"cell_type": "code", "source": '<a id="prism"></a>', "outputs": []}
        (root / "notebooks").mkdir(exist_ok=True)
        (root / "notebooks/optics.ipynb").write_text(json.dumps({"cells": [anchor, quoted]}))
    else:
        judge("lens")


def judge(paper: str, **changes: object) -> None:
    base = {
        "paper": paper, "claim": "main", "scale": "laptop", "device": "cpu", "data": "toy",
        "kind": "claim", "central": True, "verdict": "refuted", "effect": -0.25, "low": -0.5,
        "high": 0, "unit": "<points>", "n": 7, "ours": 1, "margin": 0, "date": "2026-01-02",
    }  # fmt: skip
    ledger.record([{**base, **changes}])


def test_status_follows_from_what_exists(root: Path) -> None:
    assert str(catalogue.status("lens")) == "planned"
    expected = list(catalogue.PARTS)
    for part in catalogue.PARTS:
        give(root, part)
        expected.remove(part)
        status = catalogue.status("lens")
        assert status.missing == tuple(expected)
        assert status.word == ("partial" if expected else "done")
    assert str(catalogue.status("prism")) == "planned"  # its anchor stands in code, not in text


def test_smoke_and_unjudged_rows_are_no_verdict(root: Path) -> None:
    judge("lens", scale="smoke", verdict="holds")
    judge("lens", data="other", verdict="not judged")
    assert "verdict" in catalogue.status("lens").missing


def test_an_unknown_paper_names_near_ones(root: Path) -> None:
    for ask in (catalogue.find, catalogue.status, catalogue.paper_html):
        with pytest.raises(KeyError, match="no paper is called 'lense'; near: lens"):
            ask("lense")


def test_update_writes_what_is_derived_and_nothing_else(root: Path) -> None:
    readme = "# Title\n\n<!-- status:begin -->\n<!-- status:end -->\nlast\n"
    (root / "README.md").write_text(readme)
    give(root, "verdict")
    assert catalogue.update(write=False) == ["data/papers.csv", "README.md"]
    assert (root / "data/papers.csv").read_text() == PAPERS
    assert catalogue.update() == ["data/papers.csv", "README.md"]
    assert catalogue.update() == []
    lines = (root / "data/papers.csv").read_text().splitlines()
    assert [line.rsplit(",", 1)[1] for line in lines] == ["status", "partial", "planned"]
    assert lines[2].split(",")[-2] == "000 001"
    text = (root / "README.md").read_text()
    assert "| All 1 families | 2 | 0 | 1 | 0 | 1 | 0 |" in text and text.endswith("-->\nlast\n")


def test_a_readme_without_marks_is_left_alone(root: Path) -> None:
    (root / "README.md").write_text("# Title\n<!-- status:end --> <!-- status:begin -->\n")
    assert catalogue.update() == ["data/papers.csv"]


def test_the_card_links_what_exists_and_escapes_what_it_is_given(root: Path) -> None:
    card = catalogue.paper_html("lens")
    assert "On &lt;Lenses&gt;" in card and "<Lenses>" not in card
    assert 'href="https://arxiv.org/abs/2001.00001"' in card
    assert 'href="https://github.com/owner/lens"' in card
    assert "../workbench" not in card and "no verdict recorded yet" in card
    assert "Bends light.<" in card
    for part in catalogue.PARTS:
        give(root, part)
    card = catalogue.paper_html("lens")
    assert 'href="../workbench/optics/lens.py"' in card
    assert 'href="../tests/optics/test_lens.py"' in card
    assert ">refuted</strong>" in card and "effect -0.25 &lt;points&gt;" in card
    assert "95% interval -0.5 to 0, 7 pairs" in card
    assert "arxiv.org" not in catalogue.paper_html("prism")


def test_an_equality_is_told_as_one(root: Path) -> None:
    judge("lens", kind="identity", verdict="holds", ours=3e-9)
    assert "largest difference 3.00e-09 over 7 values" in catalogue.paper_text("lens")


def test_overview_and_selection(root: Path) -> None:
    give(root, "verdict")
    papers = catalogue.overview()
    assert papers["verdict"].tolist() == ["refuted", ""]
    assert papers["missing"].tolist()[0] == "module, test, section"

    def slugs(**choice: str) -> list[str]:
        return list(catalogue.select(papers, **choice)["slug"])

    assert slugs() == ["lens", "prism"]
    assert slugs(text="LIGHT bends") == ["lens"]
    assert slugs(text="optics light") == ["lens", "prism"]
    assert slugs(text="(") == [] == slugs(text="nothing like it")
    assert slugs(verdict="none") == ["prism"] and slugs(verdict="refuted") == ["lens"]
    assert slugs(status="planned", family="optics") == ["prism"]
    assert slugs(family="acoustics") == []
