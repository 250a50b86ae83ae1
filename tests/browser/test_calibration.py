"""The calibration notebook as a reader meets it: in JupyterLab, and as a page of the site."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

LABEL = "Temperature (by hand)"


def test_in_jupyterlab_the_whole_notebook_runs_and_its_temperature_moves(
    smoke_copy: Callable[[str], Path],
    open_notebook: Callable[..., Any],
    run_all: Callable[..., None],
    redraws: Callable[..., None],
) -> None:
    page = open_notebook(smoke_copy("calibration"))
    run_all(seconds=240)
    page.evaluate("() => document.querySelector('.jp-WindowedPanel-outer').scrollTo(0, 0)")
    redraws("lab", LABEL, 0.9)
    assert page.problems == []


def test_on_the_site_the_temperature_moves_without_a_kernel(
    page: Any, built_site: Any, redraws: Callable[..., None]
) -> None:
    assert built_site.ok and built_site.explorers >= 7, built_site
    page.goto((built_site.folder / "calibration.html").as_uri())
    redraws("site", LABEL, 0.9)
    assert page.problems == []
