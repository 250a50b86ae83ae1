"""Building: one page's failure, a half-built site, a wrong folder, what packages lack."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from nbformat import v4

from workbench.lab import ledger
from workbench.site import assets, build, disagreements, sources
from workbench.site.outputs import Outputs


def test_a_notebook_that_cannot_be_read_takes_nothing_else_down(home: Path) -> None:
    (home / "notebooks" / "losses.ipynb").write_text('{"cells": [', encoding="utf8")
    report = build(home / "site")
    assert list(report.failures) == ["losses"] and not report.ok
    assert "failed: losses" in str(report)
    assert 'id="temperature"' in (home / "site/calibration.html").read_text("utf8")
    assert "could not be converted" in (home / "site/losses.html").read_text("utf8")


def test_a_build_that_dies_leaves_the_old_site_and_no_litter(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(home / "site", notebooks=[])
    before = (home / "site/index.html").read_bytes()

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "write", die)
    with pytest.raises(KeyboardInterrupt):
        build(home / "site", notebooks=[])
    assert (home / "site/index.html").read_bytes() == before
    assert not [f for f in home.iterdir() if f.name.startswith(".site")]


def test_a_new_build_replaces_the_old_one_whole(home: Path) -> None:
    build(home / "site", notebooks=[])
    (home / "site/stale.html").write_text("old")
    report = build(home / "site", notebooks=[home / "notebooks/losses.ipynb"])
    assert not (home / "site/stale.html").exists()
    assert "losses.html" in report.pages and "calibration.html" not in report.pages


def test_a_folder_that_is_not_a_site_is_never_replaced(home: Path) -> None:
    with pytest.raises(ValueError, match="not a site"):
        build(home)
    with pytest.raises(ValueError, match="is a file"):
        build(home / "data" / "papers.csv")
    with pytest.raises(ValueError, match="calibration, index, losses"):
        build(home / "site", notebooks=["nowhere"])
    assert (home / "data" / "papers.csv").exists()


def test_one_notebook_is_built_in_little_time(home: Path) -> None:
    report = build(home / "site", notebooks=["calibration"])
    assert report.seconds < 5


def test_a_family_that_the_catalogue_lacks_has_its_page_too(home: Path) -> None:
    cells = [v4.new_markdown_cell("# Extra reading\n\n## Part")]
    (home / "notebooks/extra.ipynb").write_text(nbformat.writes(v4.new_notebook(cells=cells)))
    report = build(home / "site")
    assert "extra.html" in report.pages
    assert "Extra reading" in (home / "site/index.html").read_text("utf8")


def test_a_link_to_a_section_that_is_not_there_is_named(home: Path) -> None:
    cells = [v4.new_markdown_cell("# A\n\n[there](losses.ipynb#focal-loss) [not](losses.ipynb#no)")]
    (home / "notebooks/extra.ipynb").write_text(nbformat.writes(v4.new_notebook(cells=cells)))
    said = build(home / "site").warnings
    assert [w for w in said if "extra" in w] == [
        "extra: link to losses.html#no: that page has no such section"
    ]


def test_plotly_is_the_packages_own_file(built: Any) -> None:
    [packaged] = [
        f for f in metadata.files("plotly") or [] if f.as_posix().endswith("data/plotly.min.js")
    ]
    copied = (built.folder / "assets/plotly.min.js").read_bytes()
    assert hashlib.sha256(copied).digest() == hashlib.sha256(packaged.read_binary()).digest()
    assert len(assets.published()) == 43  # the record states a sha256, in base64


def test_another_plotly_than_the_published_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "published", lambda: "A" * 43)
    with pytest.raises(RuntimeError, match="reinstall plotly"):
        assets.plotly_js()
    monkeypatch.setattr(assets.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="not installed"):
        assets.plotly_js()


def test_missing_font_packages_cost_only_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "FONTS", (("no_such_package", "a.ttf", "a.woff", "A", ""),))
    warnings = assets.write(tmp_path, explorers=False)
    assert warnings == [
        "the font package no_such_package is not installed: pages fall back to the reader's own "
        "fonts"
    ]
    assert not (tmp_path / "assets/plotly.min.js").exists()


def test_the_verdicts_colours_of_cards_have_their_twins_in_the_dark_theme() -> None:
    from workbench.lab.claim_card import COLOURS

    style = (assets.HERE / "site.css").read_text(encoding="utf8")
    for colour in COLOURS.values():
        assert f'[stroke="{colour}"]' in style and f'[fill="{colour}"]' in style


def test_the_last_run_is_the_newest_summary_found(home: Path) -> None:
    for name, date in {"a": "2026-11-01T10:00:00", "b": "2026-11-03T10:00:00"}.items():
        (home / "runs" / name).mkdir(parents=True)
        change = (
            '{"paper": "temperature", "claim": "main", "scale": "laptop", "device": "cpu", '
            '"change": "flipped", "verdict": "refuted", "was": "holds"}'
        )
        state = '{"family": "calibration", "state": "ok", "seconds": 12.0, "error": ""}'
        (home / "runs" / name / "summary.json").write_text(
            f'{{"date": "{date}", "notebooks": [{state}], "changes": [{change}]}}'
        )
    (home / "runs" / "broken").mkdir()
    (home / "runs" / "broken" / "summary.json").write_text("{")
    assert sources.load().last_run["date"].startswith("2026-11-03")
    build(home / "site", notebooks=["calibration"])
    text = (home / "site/status.html").read_text("utf8")
    assert "The last run was on 2026-11-03" in text and "became" in text


def test_disagreements_are_checked_row_by_row(home: Path, small: ModuleType) -> None:
    assert [row["paper"] for row in disagreements.read()] == ["temperature"]
    file = home / "data" / "disagreements.csv"
    file.write_text("paper,what\na,b\n")
    with pytest.raises(ValueError, match="expected the columns"):
        disagreements.read()
    file.write_text(",".join(disagreements.COLUMNS) + "\n,something,,,,,\n")
    with pytest.raises(ValueError, match="row 2"):
        disagreements.read()
    report = build(home / "site", notebooks=[])  # named in the report; the site is built
    assert any("disagreements.csv" in w for w in report.warnings)
    file.unlink()
    assert disagreements.read() == []


def test_the_projects_own_file_of_disagreements_can_be_read() -> None:
    assert isinstance(disagreements.read(), list)
    assert disagreements.path().name == "disagreements.csv"


def test_claims_that_agree_with_the_ledger_leave_no_drift(home: Path, small: ModuleType) -> None:
    ledger.record([small.claim()])
    build(home / "site", notebooks=["calibration"])
    text = (home / "site/status.html").read_text("utf8")
    assert "every stored claim agrees with its recorded interval" in text


def outputs(warnings: list[str], place: Any = None) -> Outputs:
    return Outputs(
        "page", place or (lambda payload, still: still), str, str, lambda url: url, warnings.append
    )


def test_an_explorer_without_controls_or_of_another_kind_stays_a_picture(
    home: Path, small: ModuleType
) -> None:
    from workbench.lab.show import EXPLORER

    still = small.png()
    cells = [
        small.code("a", small.display({EXPLORER: {"kind": "other", "title": "T", "controls": [1]},
                                       "image/png": still, "text/plain": "x"})),
        small.code("b", small.display({EXPLORER: small.payload() | {"controls": []},
                                       "image/png": still, "text/plain": "x"})),
    ]  # fmt: skip
    file = home / "notebooks" / "losses.ipynb"
    file.write_text(nbformat.writes(v4.new_notebook(cells=cells)))
    report = build(home / "site", notebooks=["losses"])
    html = (home / "site/losses.html").read_text("utf8")
    assert report.explorers == 0 and "data-explorer" not in html and html.count("<figure>") == 2
    assert any("no exported controls" in w for w in report.warnings)
    assert any("is shown as a picture" in w for w in report.warnings)


def test_outputs_are_chosen_and_escaped() -> None:
    said: list[str] = []
    shown = outputs(said)
    data = {"text/plain": "<b>", "text/html": "<i>x</i>"}
    assert shown.bundle(data, {}) == '<div class="html"><i>x</i></div>'
    assert shown.bundle({"text/plain": "<b>"}, {}) == '<pre class="text">&lt;b&gt;</pre>'
    assert shown.render(
        {"output_type": "stream", "name": "stdout", "text": "\x1b[31mred\x1b[0m"}
    ) == ('<pre class="text">red</pre>')
    trace = {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["<E>"]}
    assert "&lt;E&gt;" in shown.render(trace) and "E: v" in said[0]
    assert shown.html('<a href="javascript:x()">t</a>').count("javascript") == 1  # resolver's part
    svg = shown.bundle({"image/svg+xml": "<?xml version='1.0'?><svg><g/></svg>"}, {})
    assert svg.startswith('<figure role="img"') and "<?xml" not in svg
