from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from workbench.lab import catalogue


def test_a_paper_of_a_family_that_has_a_notebook(command: Callable[..., Any], home: Any) -> None:
    before = home.read("optics")
    done = command("new-paper", "optics", "prism")
    assert done.code == 0
    assert catalogue.status("prism").missing == ("verdict",)
    after = home.read("optics")
    assert after.cells[: len(before.cells)] == before.cells
    added = after.cells[len(before.cells) :]
    assert added[0]["id"] == "prism" and added[0].source.startswith('<a id="prism"></a>')
    assert "## 2. On <Prisms>" in added[0].source
    assert added[1].source == 'lab.paper("prism")'
    assert "tests/optics/test_prism.py fails until" in done.said


def test_a_new_family_with_a_new_paper(command: Callable[..., Any], home: Any) -> None:
    words = ("--title", "On Heat", "--year", "1822", "--code", "owner/heat")
    done = command("new-paper", "thermics", "heat", *words)
    assert done.code == 0, done.said
    row = catalogue.find("heat")
    assert (row["title"], row["year"], row["code"], row["status"]) == (
        "On Heat", 1822, "owner/heat", "partial",
    )  # fmt: skip
    assert home.table("families.csv")[-1] == "thermics,3,Thermics,"
    notebook = home.read("thermics")
    nbformat.validate(notebook)
    ids = [cell["id"] for cell in notebook.cells]
    assert ids == ["title", "parameters", "setup", "heat", "heat-paper", "heat-outline",
                   "side-by-side"]  # fmt: skip
    for name in ("__init__", "heat", "experiments/__init__"):
        compile((home.root / f"workbench/thermics/{name}.py").read_text(), name, "exec")


def test_the_scaffolded_notebook_runs_and_its_test_asks_for_the_oracle(
    command: Callable[..., Any], home: Any
) -> None:
    command("new-paper", "thermics", "heat")
    done = command("run", "thermics", "--scale", "smoke")
    assert done.code == 0, done.said
    test = home.root / "tests" / "thermics" / "test_heat.py"
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)],
        capture_output=True, text=True, cwd=home.root, check=False,
    )  # fmt: skip
    assert outcome.returncode == 1
    assert "heat has no oracle yet" in outcome.stdout


def test_sections_go_before_the_closing_part(command: Callable[..., Any], home: Any) -> None:
    command("new-paper", "thermics", "heat")
    command("new-paper", "thermics", "cold")
    ids = [cell["id"] for cell in home.read("thermics").cells]
    assert ids.index("heat") < ids.index("cold") < ids.index("side-by-side")
    assert "## 2. Cold" in next(c.source for c in home.read("thermics").cells if c["id"] == "cold")


def test_doing_it_twice_changes_nothing(command: Callable[..., Any], home: Any) -> None:
    command("new-paper", "thermics", "heat")
    files = [p for p in home.root.rglob("*") if p.is_file() and "lock" not in p.suffix]
    before = {p: p.read_bytes() for p in files}
    done = command("new-paper", "thermics", "heat")
    assert done.code == 0 and "kept" in done.said
    assert {p: p.read_bytes() for p in files} == before


@pytest.mark.parametrize(
    ("family", "slug", "said"),
    [
        ("optics", "Lens", "slug: expected lower-case"),
        ("optics", "../lens", "slug: expected lower-case"),
        ("class", "lens", "family: expected lower-case"),
        ("lab", "lens", "'lab' is a name of the house"),
        ("optics", "figures", "'figures' is a name of the house"),
        ("acoustics", "lens", "'lens' is already a paper of optics"),
    ],
)
def test_names_that_cannot_be_used(
    command: Callable[..., Any], home: Any, family: str, slug: str, said: str
) -> None:
    before = sorted(p for p in home.root.rglob("*"))
    done = command("new-paper", family, slug)
    assert done.code == 2 and said in done.said
    assert sorted(p for p in home.root.rglob("*")) == before


def test_what_is_written_keeps_the_style_of_the_house(
    command: Callable[..., Any], home: Any
) -> None:
    title = 'A "quoted" title """ that \\ is ' + "very " * 40 + "long"
    done = command("new-paper", "thermics", "heat", "--title", title, "--summary", title)
    assert done.code == 0
    folders = [str(home.root / name / "thermics") for name in ("workbench", "tests")]
    shutil.copy(Path(__file__).parents[2] / "pyproject.toml", home.root)
    for words in (["check"], ["format", "--check"]):
        checked = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "--no-cache", *folders], cwd=home.root,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert checked.returncode == 0, checked.stdout
