"""A Chromium and a JupyterLab for the browser tests of every family.

Fixtures: `page` (with `page.problems`, what the browser complained about or asked of the network),
`lab_server`, `open_notebook(path)`, `run_all()`, `drag(label, fraction)`. Tests are skipped, with
the reason, where no Chromium, playwright or JupyterLab is found.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]  # fmt: skip
LOCAL = ("file:", "data:", "blob:", "about:", "http://127.0.0.1", "ws://127.0.0.1")
# Chromium's own remarks on drawing without a graphics card.
REMARKS = ("GPU stall", "willReadFrequently", "WebGL")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


# ---- Chromium


def chromium() -> str | None:
    """The browser: `CHROMIUM`, or the first one on the path."""
    named = os.environ.get("CHROMIUM")
    candidates = [named] if named else ["chromium", "chromium-browser", "google-chrome"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium, which cannot reach the network."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed")
    executable = chromium()
    if executable is None:
        pytest.skip("no Chromium found: put one on the path or set CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=executable, headless=True, args=ARGUMENTS
        )
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page of 1200 x 900 pixels; `page.problems` lists errors and requests to the network."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    opened = context.new_page()
    opened.problems = problems = []

    def said(message: Any) -> None:
        if message.type == "error" and not any(remark in message.text for remark in REMARKS):
            problems.append(f"console: {message.text}")

    def asked(request: Any) -> None:
        if not request.url.startswith(LOCAL):
            problems.append(f"network: {request.url}")

    opened.on("console", said)
    opened.on("pageerror", lambda error: problems.append(f"error: {error}"))
    opened.on("request", asked)
    yield opened
    context.close()


# ---- JupyterLab


@dataclass(frozen=True)
class Server:
    """A running JupyterLab: where it listens, its token, and the folder it serves."""

    url: str
    token: str
    root: Path

    def address(self, notebook: str) -> str:
        """The page that shows `notebook` alone, without the side bars."""
        return f"{self.url}/doc/tree/{notebook}?token={self.token}&reset"


def _settings(folder: Path) -> None:
    """No news, no checks for updates, no saving behind the test's back."""
    for name, values in {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "docmanager-extension/plugin": {"autosave": False},
        "notebook-extension/tracker": {"windowingMode": "defer"},
    }.items():
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def lab_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """JupyterLab on loopback, with a token and an empty root of its own."""
    if importlib.util.find_spec("jupyterlab") is None:
        pytest.skip("JupyterLab is not installed")
    home = tmp_path_factory.mktemp("jupyter")
    root = home / "root"
    root.mkdir()
    _settings(home / "settings")
    token, port = secrets.token_hex(16), _free_port()
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
        "MPLCONFIGDIR": str(home / "matplotlib"),
        "WORKBENCH_HEADLESS": "0",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "plots")]),
    }
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}",
        "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.expose_app_in_browser=True",
    ]  # fmt: skip
    with open(home / "server.log", "wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=root)
        try:
            _await(f"http://127.0.0.1:{port}/api?token={token}", server, home / "server.log")
            yield Server(f"http://127.0.0.1:{port}", token, root)
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _await(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not answer:\n{log.read_text()[-3000:]}")


@pytest.fixture
def open_notebook(lab_server: Server, page: Any) -> Iterator[Callable[..., Any]]:
    """`open_notebook(path)` copies a notebook into JupyterLab, opens it and returns the page."""

    def open_(path: Path | str, theme: str = "JupyterLab Light") -> Any:
        source = Path(path)
        name = f"{secrets.token_hex(4)}-{source.name}"
        shutil.copyfile(source, lab_server.root / name)
        page.goto(lab_server.address(name))
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
        page.evaluate("async () => { await window.jupyterapp.restored; }")
        page.wait_for_function(
            "() => { const n = window.jupyterapp.shell.currentWidget;"
            " const k = n && n.sessionContext && n.sessionContext.session;"
            " return k && k.kernel && k.kernel.connectionStatus === 'connected'; }",
            timeout=90_000,
        )
        if theme != "JupyterLab Light":
            page.evaluate(
                "t => window.jupyterapp.commands.execute('apputils:change-theme', {theme: t})",
                theme,
            )
            page.wait_for_selector(f"body[data-jp-theme-name='{theme}']", state="attached")
        return page

    yield open_
    if page.url.startswith(lab_server.url):
        page.evaluate(
            "() => { const n = window.jupyterapp.shell.currentWidget;"
            " return n && n.sessionContext && n.sessionContext.shutdown(); }"
        )


@pytest.fixture
def run_all(page: Any) -> Callable[..., None]:
    """`run_all()` runs every cell of the open notebook and waits; an error in a cell fails."""
    stderr, error = "application/vnd.jupyter.stderr", "application/vnd.jupyter.error"

    def run(seconds: float = 120) -> None:
        page.set_default_timeout(seconds * 1000)
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_function(
            "() => ![...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
            ".some(p => p.textContent.includes('*'))"
        )
        broken = page.query_selector(f'[data-mime-type="{stderr}"] pre, [data-mime-type="{error}"]')
        if broken:
            pytest.fail(f"a cell failed:\n{broken.inner_text()[-2000:]}")
        page.set_default_timeout(30_000)

    return run


# ---- moving controls

BOX = """label => {
  const rows = [...document.querySelectorAll('.widget-slider, .wb-control')];
  const named = r => (r.querySelector('.widget-label, .wb-label') || {}).textContent === label;
  const row = rows.find(named);
  if (!row) { return null; }
  row.scrollIntoView({block: 'center'});
  const track = row.querySelector('.noUi-base, input[type=range]').getBoundingClientRect();
  const handle = row.querySelector('.noUi-handle');
  const range = row.querySelector('input[type=range]');
  let from = track.x;
  if (handle) { const h = handle.getBoundingClientRect(); from = h.x + h.width / 2; }
  else { from = track.x + 8 + (track.width - 16) * range.value / range.max; }
  return {x: track.x, y: track.y + track.height / 2, width: track.width, from: from,
          inset: handle ? 0 : 8};
}"""


@pytest.fixture
def drag(page: Any) -> Callable[..., None]:
    """`drag(label, fraction)` drags the slider called `label` to a fraction of its track.

    Works on a slider in JupyterLab and on one of an exported page.
    """

    def move(label: str, fraction: float, steps: int = 12) -> None:
        page.wait_for_function(f"label => ({BOX})(label) !== null", arg=label)
        box = page.evaluate(BOX, label)
        to = box["x"] + box["inset"] + fraction * (box["width"] - 2 * box["inset"])
        page.mouse.move(box["from"], box["y"])
        page.mouse.down()
        page.mouse.move(to, box["y"], steps=steps)
        page.mouse.up()

    return move


FIGURE = {"lab": ".jp-OutputArea .js-plotly-plot", "site": "[data-explorer] .js-plotly-plot"}
READOUTS = {"lab": ".workbench-readouts", "site": ".wb-readouts"}
DRAWN = "f => JSON.stringify(document.querySelector(f).data.map(d => Array.from(d.y || d.z || [])))"


@pytest.fixture
def redraws(page: Any, drag: Callable[..., None]) -> Callable[..., None]:
    """`redraws(where, label, fraction)` drags a slider and waits for the first figure to follow.

    Its readouts must change as well. `where` is "lab" or "site".
    """

    def follow(where: str, label: str, fraction: float) -> None:
        figure, numbers = FIGURE[where], READOUTS[where]
        page.locator(figure.split()[0]).first.scroll_into_view_if_needed()  # drawn when in view
        page.wait_for_selector(f"{figure} .main-svg")
        drawn, said = page.evaluate(DRAWN, figure), page.inner_text(f"{numbers} >> nth=0")
        drag(label, fraction)
        page.wait_for_function(f"([f, old]) => ({DRAWN})(f) !== old", arg=[figure, drawn])
        page.wait_for_function(
            "([f, old]) => document.querySelector(f).innerText !== old", arg=[numbers, said]
        )

    return follow


# ---- notebooks and pages of this repository


@pytest.fixture
def smoke_copy(tmp_path: Path) -> Callable[[str], Path]:
    """`smoke_copy(family)`: its notebook with smoke parameters and without stored outputs."""
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    def make(family: str) -> Path:
        stored = load_notebook_node(str(REPOSITORY / "notebooks" / f"{family}.ipynb"))
        notebook = parameterize_notebook(stored, {"scale": "smoke"})
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, tmp_path / f"{family}.ipynb")
        return tmp_path / f"{family}.ipynb"

    return make


@pytest.fixture(scope="session")
def built_site(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The report of one build of the static site, from a copy of what it reads."""
    from workbench.site import build

    home = tmp_path_factory.mktemp("site") / "home"
    for name in ("data", "notebooks", "workbench", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "benchmarks", "*.lock")
        shutil.copytree(REPOSITORY / name, home / name, ignore=ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(home))
        return build(home / "site")
