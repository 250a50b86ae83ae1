"""The loss-landscape explorer as a reader meets it: in JupyterLab, and as a page of the site."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from workbench.plots import export

LABEL = "Centre a"
HOST = '[data-explorer^="loss-landscapes-explore"]'
# The explorer's figure, known by its slider: a notebook and a page hold several explorers.
FIND = f"""() => {{
  const rows = [...document.querySelectorAll('.widget-slider, .wb-control')];
  const row = rows.find(r =>
    (r.querySelector('.widget-label, .wb-label') || {{}}).textContent === '{LABEL}');
  return row && row.closest('.widget-vbox, [data-explorer]');
}}"""
SEEN = f"""() => {{
  const host = ({FIND})(), plot = host && host.querySelector('.js-plotly-plot');
  if (!plot || !plot.layout || !plot.querySelector('.main-svg')) {{ return null; }}
  const sum = v => v.reduce((s, row) => s + (row.length ? sum([...row]) : row), 0);
  const box = plot.querySelector('.main-svg').getBoundingClientRect();
  const handle = plot.layout.meta.handles[0], shape = plot.layout.shapes[handle.shape];
  const [x, y] = handle.axes.map(name => plot._fullLayout[name]);
  const solid = plot.data.find(d => d.type === 'surface');
  return {{
    at: [shape.xanchor, shape.yanchor], plane: sum([...plot.data[0].z]), near: sum([...solid.z]),
    x: box.left + x._offset + x.d2p(shape.xanchor), y: box.top + y._offset + y.d2p(shape.yanchor),
    title: plot.layout.annotations.map(a => a.text).join(' ').replaceAll('<br>', ' '),
    said: host.querySelector('.workbench-readouts, .wb-readouts').innerText,
  }};
}}"""


@pytest.fixture
def seen(page: Any) -> Callable[..., Any]:
    """`seen(condition)`: what the explorer shows, once `condition(now)` holds in JavaScript."""

    def look(condition: str = "now => true", arg: Any = None) -> Any:
        page.wait_for_function(f"() => ({SEEN})() !== null")
        page.evaluate(f"() => ({FIND})().querySelector('.js-plotly-plot').scrollIntoView("
                      "{block: 'center'})")  # fmt: skip
        page.wait_for_function(f"arg => ({condition})(({SEEN})(), arg)", arg=arg)
        return page.evaluate(SEEN)

    return look


@pytest.fixture
def pull(page: Any, seen: Callable[..., Any]) -> Callable[..., Any]:
    """`pull(right, down)` drags the centre's handle; returns what is shown before and after."""

    def move(right: float, down: float) -> Any:
        before = seen()
        page.mouse.move(before["x"], before["y"])
        page.mouse.down()
        page.mouse.move(before["x"] + right, before["y"] + down, steps=12)
        page.mouse.up()
        page.wait_for_timeout(300)
        return before, seen("(now, old) => now.near !== old.near && now.said !== old.said", before)

    return move


NETWORK = """
import torch
from torch import nn
from workbench import loss_landscapes
_ = torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 60), nn.ReLU(), nn.Linear(60, 3))
x = torch.randn(500, 10)
y = x[:, :3].argmax(1)
optimizer, path = torch.optim.SGD(model.parameters(), 0.1), []
for step in range(60):
    if step % 6 == 0:
        path.append({k: v.clone() for k, v in model.state_dict().items()})
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
explorer = loss_landscapes.explore(model, nn.functional.cross_entropy, (x, y), trajectory=path)
explorer.show()
"""


@pytest.fixture
def own_notebook(tmp_path: Path) -> Path:
    """A notebook that explores a network of the reader's own."""
    cells = [nbformat.v4.new_code_cell(NETWORK.strip()), nbformat.v4.new_code_cell("1 + 1")]
    made = nbformat.v4.new_notebook(cells=cells)
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(made, tmp_path / "network.ipynb")
    return tmp_path / "network.ipynb"


def test_in_jupyterlab_the_picture_sharpens_while_its_handles_are_dragged(
    own_notebook: Path,
    open_notebook: Callable[..., Any],
    run_all: Callable[..., None],
    seen: Callable[..., Any],
    pull: Callable[..., Any],
    drag: Callable[..., None],
) -> None:
    page = open_notebook(own_notebook)
    run_all()
    before, after = pull(50, -30)
    assert after["at"][0] > before["at"][0] and after["at"][1] > before["at"][1]
    complete = seen("now => /\\n2,401(\\n|$)/.test(now.said)")  # evaluated in the background
    drag("Draw", 1.0)
    other = seen("(now, old) => now.plane !== old.plane && now.said !== old.said", complete)
    assert other["at"] == after["at"]
    page.get_by_label("Directions").select_option("sharpest")
    seen("now => /λ =/.test(now.title) && /\\n2,401(\\n|$)/.test(now.said)")
    page.get_by_label("Directions").select_option("training path")
    seen("now => /training path/.test(now.title) && /\\n2,401(\\n|$)/.test(now.said)")
    assert page.problems == []


def test_on_a_page_the_centre_is_dragged_without_a_kernel(
    page: Any, tmp_path: Path, pull: Callable[..., Any], drag: Callable[..., None]
) -> None:
    import numpy as np

    from workbench.loss_landscapes.figures import explore_planes
    from workbench.loss_landscapes.figures_field import Slice

    planes = {
        f"filter {i}": lambda i=i: Slice(f"draw {i}", lambda a, b: a**2 + np.exp(i * b))
        for i in (1, 2)
    }
    explorer = explore_planes(planes, background=False, points=25)
    written = export.write(explorer.export(), tmp_path)
    names = [path.name for path in export.assets(tmp_path) if path.suffix == ".js"]
    head = "".join(f'<script defer src="{name}"></script>' for name in (*names, written.path.name))
    (tmp_path / "index.html").write_text(
        f'<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="explorer.css">{head}'
        + export.element(written.id)
    )
    page.goto((tmp_path / "index.html").as_uri())
    before, after = pull(50, -30)
    assert after["at"][0] > before["at"][0] and after["at"][1] > before["at"][1]
    drag(LABEL, 0.0)
    page.wait_for_function(f"() => ({SEEN})().at[0] === -1")
    expected = explorer.frozen().result(a=-1.0, b=after["at"][1])
    assert page.inner_text(".wb-readout dd >> nth=0") == f"{expected['at_center']:.4g}"
    assert page.problems == []


def test_in_jupyterlab_the_whole_notebook_runs_and_its_centre_is_dragged(
    smoke_copy: Callable[[str], Path],
    open_notebook: Callable[..., Any],
    run_all: Callable[..., None],
    seen: Callable[..., Any],
    drag: Callable[..., None],
) -> None:
    page = open_notebook(smoke_copy("loss_landscapes"))
    run_all(seconds=240)
    before = seen()
    drag(LABEL, 0.9)
    seen("(now, old) => now.at[0] > 0.5 && now.said !== old.said", before)
    assert page.problems == []


def test_on_the_site_the_centre_is_dragged_without_a_kernel(
    page: Any, built_site: Any, pull: Callable[..., Any]
) -> None:
    assert built_site.ok, built_site
    page.goto((built_site.folder / "loss_landscapes.html").as_uri())
    page.locator(HOST).first.scroll_into_view_if_needed()
    before, after = pull(40, -20)
    assert after["at"][0] > before["at"][0] and after["at"][1] > before["at"][1]
    assert page.problems == []
