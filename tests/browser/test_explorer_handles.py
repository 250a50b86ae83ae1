"""Handles dragged with the mouse: in JupyterLab, and in an exported page without a kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "plots"))

import demo

from workbench.plots import export

LAB, SITE = ".jp-OutputArea .js-plotly-plot", ".wb-explorer .js-plotly-plot"
PLACE = """([f, number]) => {
  const plot = document.querySelector(f);
  const handle = plot.layout.meta.handles[number], shape = plot.layout.shapes[handle.shape];
  const box = plot.querySelector('.main-svg').getBoundingClientRect();
  const [x, y] = handle.axes.map(name => plot._fullLayout[name]);
  return {x: box.left + x._offset + x.d2p(shape.xanchor), y: box.top + y._offset
    + y.d2p(shape.yanchor), unit: x.d2p(1) - x.d2p(0), at: [shape.xanchor, shape.yanchor],
    range: x.range.slice(), rule: plot.layout.shapes[0].x0};
}"""
LINE = (
    "f => JSON.stringify(document.querySelector(f).data.map(d => [...(d.x || []), ...(d.y || [])]))"
)


@pytest.fixture
def pull(page):
    """`pull(figure, number, right)` drags a handle to the right; returns what it saw."""

    def move(figure, number, right, let_go=True):
        page.locator(figure).first.scroll_into_view_if_needed()
        before = page.evaluate(PLACE, [figure, number])
        drawn = page.evaluate(LINE, figure)
        page.mouse.move(before["x"] + 3, before["y"] - 2)
        page.mouse.down()
        page.mouse.move(before["x"] + right, before["y"], steps=15)
        page.wait_for_function(f"([f, old]) => ({LINE})(f) !== old", arg=[figure, drawn])
        if let_go:
            page.mouse.up()
        page.wait_for_function(
            f"([f, number, to]) => Math.abs(({PLACE})([f, number]).at[0] - to) < 0.03",
            arg=[figure, number, before["at"][0] + right / before["unit"]],
        )
        return before, page.evaluate(PLACE, [figure, number])

    return move


@pytest.fixture
def site(page, tmp_path):
    """`site(explorer)` opens an exported page from disk."""

    def show(explorer):
        names = [p.name for p in export.assets(tmp_path)]
        written = export.write(explorer.export(), tmp_path)
        scripts = [n for n in names if n.endswith(".js")] + [written.path.name]
        head = "".join(f'<script defer src="{n}"></script>' for n in scripts)
        (tmp_path / "index.html").write_text(
            '<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="explorer.css">'
            + head
            + export.element(written.id)
        )
        page.goto((tmp_path / "index.html").as_uri())
        page.wait_for_selector(f"{SITE} .main-svg")
        return page

    return show


def moved(before, after, right):
    assert after["at"][0] - before["at"][0] == pytest.approx(right / before["unit"], abs=0.03)
    assert after["at"][1] == before["at"][1]
    assert after["range"] == before["range"], "the figure did not zoom"
    assert after["rule"] == before["rule"], "other shapes stay"


def test_on_a_page_the_figure_follows_while_a_handle_is_dragged(site, pull):
    page = site(demo.bowl())
    number = page.inner_text(".wb-readout dd")
    before, after = pull(SITE, 0, 60, let_go=False)  # still held
    moved(before, after, 60)
    assert page.inner_text(".wb-readout dd") != number
    page.mouse.up()
    assert page.inner_text(".wb-value >> nth=0").replace("−", "-") == f"{after['at'][0]:.2f}"
    page.mouse.move(10, 10)
    page.wait_for_timeout(200)
    assert page.evaluate(PLACE, [SITE, 0])["at"] == after["at"], "let go is let go"
    assert page.problems == []


def test_on_a_page_the_rims_knob_changes_the_radius(site, pull):
    page = site(demo.bowl())
    before, after = pull(SITE, 2, 40)
    moved(before, after, 40)
    assert page.inner_text(".wb-value >> nth=0").replace("−", "-") == "-0.50"
    assert page.problems == []


def test_beside_a_handle_plotly_still_zooms(site):
    page = site(demo.bowl())
    at = page.evaluate(PLACE, [SITE, 0])
    page.mouse.move(at["x"] + 40, at["y"] - 60)
    page.mouse.down()
    page.mouse.move(at["x"] + 100, at["y"] - 110, steps=8)
    page.mouse.up()
    page.wait_for_function(
        f"old => document.querySelector('{SITE}')._fullLayout.xaxis.range[0] > old + 0.1",
        arg=at["range"][0],
    )
    assert page.evaluate(PLACE, [SITE, 0])["at"] == at["at"]


def test_fingers_drag_too(browser, site, page, tmp_path):
    site(demo.bowl())
    context = browser.new_context(has_touch=True, viewport={"width": 1000, "height": 900})
    opened = context.new_page()
    opened.goto((tmp_path / "index.html").as_uri())
    opened.wait_for_selector(f"{SITE} .main-svg")
    at = opened.evaluate(PLACE, [SITE, 1])
    session = context.new_cdp_session(opened)
    for kind, right in (("touchStart", 0), ("touchMove", 20), ("touchMove", 45), ("touchEnd", 0)):
        points = [] if kind == "touchEnd" else [{"x": at["x"] + right, "y": at["y"]}]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    opened.wait_for_timeout(300)
    moved(at, opened.evaluate(PLACE, [SITE, 1]), 45)
    context.close()


def test_in_jupyterlab_the_figure_follows_a_dragged_handle(tmp_path, open_notebook, run_all, pull):
    made = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("import demo\nexplorer = demo.bowl()\nexplorer.show()")]
    )
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(made, tmp_path / "handles.ipynb")
    page = open_notebook(tmp_path / "handles.ipynb")
    run_all()
    page.wait_for_selector(f"{LAB} .main-svg")
    page.wait_for_timeout(500)
    number = page.inner_text(".workbench-readouts")
    before, after = pull(LAB, 0, 60, let_go=False)
    moved(before, after, 60)
    page.mouse.up()
    assert page.inner_text(".workbench-readouts") != number
    said = page.inner_text(".widget-slider .widget-readout >> nth=0").replace("−", "-")
    assert float(said) == pytest.approx(after["at"][0], abs=1e-6)
    before, after = pull(LAB, 2, 30)
    moved(before, after, 30)
    assert page.problems == []
