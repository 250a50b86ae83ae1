"""The calibration notebook as a reader meets it: in JupyterLab, and as a page of the site."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "calibration.ipynb"
LABEL = "Temperature (by hand)"
LIVE = ".jp-OutputArea .js-plotly-plot"
EXPORTED = "[data-explorer] .js-plotly-plot"
BARS = "f => Array.from(document.querySelector(f).data[0].y)"


@pytest.fixture
def smoke_copy(tmp_path: Path) -> Path:
    """The notebook with smoke parameters and without stored outputs."""
    notebook = parameterize_notebook(load_notebook_node(str(NOTEBOOK)), {"scale": "smoke"})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, tmp_path / "calibration.ipynb")
    return tmp_path / "calibration.ipynb"


def test_in_jupyterlab_the_whole_notebook_runs_and_its_temperature_moves(
    smoke_copy: Path,
    open_notebook: Callable[..., Any],
    run_all: Callable[..., None],
    drag: Callable[..., None],
) -> None:
    page = open_notebook(smoke_copy)
    run_all(seconds=240)
    page.evaluate("() => document.querySelector('.jp-WindowedPanel-outer').scrollTo(0, 0)")
    page.wait_for_selector(f"{LIVE} .main-svg")
    bars = page.evaluate(BARS, LIVE)
    numbers = page.inner_text(".workbench-readouts >> nth=0")
    drag(LABEL, 0.9)
    page.wait_for_function(f"([f, old]) => ({BARS})(f).join() !== old.join()", arg=[LIVE, bars])
    page.wait_for_function(
        "old => document.querySelector('.workbench-readouts').innerText !== old", arg=numbers
    )
    assert page.problems == []


def test_on_the_site_the_temperature_moves_without_a_kernel(
    page: Any, drag: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.site import build

    home = tmp_path / "home"
    for name in ("data", "notebooks", "workbench", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "benchmarks", "*.lock")
        shutil.copytree(ROOT / name, home / name, ignore=ignored)
    monkeypatch.setenv("WORKBENCH_HOME", str(home))
    report = build(home / "site")
    assert report.ok and report.explorers >= 7, report
    page.goto((report.folder / "calibration.html").as_uri())
    page.locator("[data-explorer]").first.scroll_into_view_if_needed()
    page.wait_for_selector(f"{EXPORTED} .main-svg")
    bars, numbers = page.evaluate(BARS, EXPORTED), page.inner_text(".wb-readouts >> nth=0")
    drag(LABEL, 0.9)
    page.wait_for_function(f"([f, old]) => ({BARS})(f).join() !== old.join()", arg=[EXPORTED, bars])
    page.wait_for_function(
        "old => document.querySelector('.wb-readouts').innerText !== old", arg=numbers
    )
    assert page.problems == []
