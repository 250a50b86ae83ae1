from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from workbench.cli import serve
from workbench.lab import paths

pytestmark = pytest.mark.xdist_group("cli-serve")  # one worker: shared fixtures


def fetch(address: str) -> tuple[int, str, str]:
    """Status, final address and text of a page; waits for a server that is about to listen."""
    for _ in range(100):
        try:
            with urllib.request.urlopen(address, timeout=20) as answer:
                return answer.status, answer.url, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.url or "", ""
        except urllib.error.URLError:
            time.sleep(0.1)
    raise TimeoutError(address)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """`workbench lab --no-browser` on a free port, with a home folder of its own."""
    home = tmp_path_factory.mktemp("user")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "HOME": str(home), "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"),
        "WORKBENCH_CACHE": str(home / "cache"),
    }  # fmt: skip
    environment.pop("WORKBENCH_HOME", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench", "lab", "--no-browser", "--port", str(port)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not (files := list((home / "runtime").glob("jpserver-*.json"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        while not (text := files[0].read_text()):
            time.sleep(0.05)
        yield {**json.loads(text), "home": home}
        os.killpg(process.pid, signal.SIGINT)
        process.wait(150)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_server_is_on_loopback_with_a_token(server: dict[str, Any]) -> None:
    assert server["hostname"] == "127.0.0.1" and len(server["token"]) > 20
    assert not server["password"]
    status, address, _ = fetch(f"{server['url']}lab/tree/notebooks/index.ipynb")
    assert status == 200 and "/login" in address
    assert fetch(f"{server['url']}api/contents/notebooks/index.ipynb")[0] == 403


def test_it_opens_on_the_index(server: dict[str, Any]) -> None:
    status, address, page = fetch(f"{server['url']}?token={server['token']}")
    assert status == 200 and "lab/tree/notebooks/index.ipynb" in address
    config = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert config["news"] == {"disabled": True}


def test_figures_stay_and_no_news_is_asked_for(server: dict[str, Any]) -> None:
    def setting(plugin: str) -> dict[str, Any]:
        address = f"{server['url']}lab/api/settings/{plugin}?token={server['token']}"
        return dict(json.loads(fetch(address)[2])["schema"]["properties"])

    tracker = setting("@jupyterlab/notebook-extension:tracker")
    assert tracker["windowingMode"]["default"] == "defer"
    assert setting("@jupyterlab/apputils-extension:notification")["fetchNews"]["default"] == "false"


def test_the_users_own_settings_are_untouched(server: dict[str, Any]) -> None:
    assert not (server["home"] / "config" / "lab").exists()
    assert (server["home"] / "cache" / "jupyterlab" / "overrides.json").exists()


def test_the_index_is_trusted(server: dict[str, Any]) -> None:
    address = f"{server['url']}api/contents/notebooks/index.ipynb?token={server['token']}"
    cells = json.loads(fetch(address)[2])["content"]["cells"]
    shown = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["metadata"]["trusted"] for cell in shown)


def test_only_committed_notebooks_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    for name in ("ours", "strangers"):
        nbformat.write(nbformat.v4.new_notebook(), tmp_path / "notebooks" / f"{name}.ipynb")
    assert [p.stem for p in serve.committed_notebooks()] == ["ours", "strangers"]
    for words in (("init", "-q"), ("add", "notebooks/ours.ipynb")):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    assert [p.stem for p in serve.committed_notebooks()] == ["ours"]


def test_a_notebook_that_cannot_be_signed_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.ipynb"
    broken.write_text("{")
    assert serve.trust([broken]) == ["broken.ipynb"]


def test_the_command_follows_the_options(tmp_path: Path) -> None:
    words = serve.command(port=9001, browser=False, settings=tmp_path)
    assert "--ServerApp.port=9001" in words and "--ServerApp.open_browser=False" in words
    assert f"--ServerApp.root_dir={paths.root()}" in words
