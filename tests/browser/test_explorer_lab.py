"""The live face in JupyterLab: run all, drag, see the number and the curve change."""

from __future__ import annotations

import re

import nbformat
import pytest

FIGURE = ".jp-OutputArea .js-plotly-plot"
LINE = f"() => document.querySelector('{FIGURE}').layout.shapes[1].x0"
BARS = f"() => Array.from(document.querySelector('{FIGURE}').data[0].y)"
NUMBER = "() => document.querySelector('.workbench-readouts').innerText"


@pytest.fixture
def notebook(tmp_path):
    """`notebook(cell, ...)` writes a notebook with these code cells."""

    def write(*cells):
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
        path = tmp_path / "explorers.ipynb"
        nbformat.write(made, path)
        return path

    return write


def test_a_dragged_slider_changes_the_figure(
    notebook, open_notebook, run_all, drag, record_property
):
    page = open_notebook(notebook("import demo\nexplorer = demo.softmax()", "explorer.show()"))
    run_all()
    page.wait_for_selector(f"{FIGURE} .main-svg")
    number, bars = page.evaluate(NUMBER), page.evaluate(BARS)
    page.evaluate(
        f"""() => {{
          window.times = [];
          let moved = 0;
          addEventListener('pointermove', () => {{ moved = performance.now(); }}, true);
          document.querySelector('{FIGURE}').on('plotly_afterplot',
            () => window.times.push(performance.now() - moved));
        }}"""
    )
    drag("Temperature", 0.8)
    page.wait_for_function(f"() => Math.abs(({LINE})() - 3.98107) < 1e-3")
    page.wait_for_function(f"old => ({NUMBER})() !== old", arg=number)
    assert page.evaluate(BARS) != bars
    assert max(page.evaluate(BARS)) == pytest.approx(0.311, abs=1e-3)
    record_property("drag_to_figure_ms", page.evaluate("() => window.times.at(-1)"))

    slider = page.locator(".widget-slider .noUi-handle").first
    slider.focus()
    page.evaluate(
        """() => { window.times.length = 0;
          addEventListener('keydown', () => { window.pressed = performance.now(); }, true);
          window.answers = [];
          document.querySelector('.jp-OutputArea .js-plotly-plot').on('plotly_afterplot',
            () => window.answers.push(performance.now() - window.pressed)); }"""
    )
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
        page.wait_for_timeout(300)
    answers = sorted(page.evaluate("() => window.answers"))
    record_property("key_to_figure_ms", answers)
    print(f"key to figure, ms: {[round(a) for a in answers]}")
    assert len(answers) >= 4 and answers[len(answers) // 2] < 250
    assert page.problems == []


def test_the_figure_fills_its_cell_and_follows_its_width(notebook, open_notebook, run_all):
    page = open_notebook(notebook("import demo\ndemo.softmax()"))
    run_all()
    page.wait_for_selector(f"{FIGURE} .main-svg")
    widths = f"""() => {{ const g = document.querySelector('{FIGURE}');
      return [g.querySelector('.main-svg').getBoundingClientRect().width,
              g.closest('.jp-OutputArea-output').getBoundingClientRect().width]; }}"""
    page.wait_for_function(f"() => {{ const [a, b] = ({widths})(); return Math.abs(a - b) < 20; }}")
    page.set_viewport_size({"width": 900, "height": 900})
    page.wait_for_function(
        f"() => {{ const [a, b] = ({widths})(); return b < 800 && Math.abs(a - b) < 20; }}"
    )
    assert page.problems == []


def test_running_a_cell_again_replaces_its_explorer(notebook, open_notebook, run_all, drag):
    page = open_notebook(
        notebook(
            "import demo\nfrom workbench.plots import display",
            "demo.softmax().show()",
            "kept = globals().get('kept') or demo.softmax()\nkept.show()",
            "print(len([f for f in display._open if not f.closed]), 'open')",
        )
    )
    for fraction in (0.0, 0.4, 1.0):
        run_all()
        page.wait_for_selector(f"{FIGURE} .main-svg >> nth=5")
        drag("Temperature", fraction)
        temperature = round(10 ** (2 * fraction - 1), 3)
        page.wait_for_function(f"t => Math.abs(({LINE})() - t) < 0.01", arg=temperature)
    assert page.locator(FIGURE).count() == 2
    assert "2 open" in page.inner_text(".jp-Notebook")
    assert page.problems == []


def test_dark_theme_keeps_the_figure_on_white(notebook, open_notebook, run_all):
    page = open_notebook(notebook("import demo\ndemo.softmax()"), theme="JupyterLab Dark")
    run_all()
    page.wait_for_selector(f"{FIGURE} .main-svg")
    paper = page.evaluate(
        f"() => getComputedStyle(document.querySelector('{FIGURE} .main-svg')).backgroundColor"
    )
    assert paper == "rgb(255, 255, 255)"
    ink = page.evaluate(
        "() => getComputedStyle(document.querySelector('.workbench-readouts span')).color"
    )
    assert min(float(c) for c in re.findall(r"[0-9.]+", ink)[:3]) > 150
    assert page.problems == []
