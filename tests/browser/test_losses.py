"""The losses notebook as a reader meets it: in JupyterLab, and as a page of the site."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

LABEL = "Share of wrong labels"


def test_in_jupyterlab_the_whole_notebook_runs_and_the_noise_retrains_the_boundary(
    smoke_copy: Callable[[str], Path],
    open_notebook: Callable[..., Any],
    run_all: Callable[..., None],
    redraws: Callable[..., None],
) -> None:
    page = open_notebook(smoke_copy("losses"))
    run_all(seconds=240)
    page.evaluate("() => document.querySelector('.jp-WindowedPanel-outer').scrollTo(0, 0)")
    redraws("lab", LABEL, 0.8)
    assert page.problems == []


def test_on_the_site_the_readers_browser_retrains_the_boundary(
    page: Any, built_site: Any, redraws: Callable[..., None]
) -> None:
    assert built_site.ok, built_site
    page.goto((built_site.folder / "losses.html").as_uri())
    redraws("site", LABEL, 0.8)
    assert page.problems == []
