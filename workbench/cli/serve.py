"""``workbench lab``: JupyterLab on the index notebook, quiet, on loopback, with its token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from workbench.cli.kernels import PATIENT
from workbench.lab import ledger, paths

# Defaults of this server only; what a user has chosen in the settings editor still wins.
OVERRIDES = {
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false", "checkForUpdates": False,
    },
    # Figures go blank when a cell is scrolled out and back under the mode "full".
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "defer"},
}  # fmt: skip


def settings_folder() -> Path:
    """Write the settings that this workbench's servers start with; the user's own stay."""
    folder = paths.cache() / "jupyterlab"
    text = json.dumps(OVERRIDES, indent=2) + "\n"
    file = folder / "overrides.json"
    if not file.exists() or file.read_text(encoding="utf8") != text:
        ledger.replace_text(file, text)
    return folder


def command(*, port: int, browser: bool, settings: Path) -> list[str]:
    """Command line of the server."""
    index = paths.root() / "notebooks" / "index.ipynb"
    start = "/lab/tree/notebooks/index.ipynb" if index.exists() else "/lab"
    return [
        sys.executable, "-m", "jupyterlab",
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=50",
        "--ServerApp.allow_remote_access=False",
        f"--ServerApp.root_dir={paths.root()}", f"--LabApp.default_url={start}",
        f"--LabApp.app_settings_dir={settings}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        f"--LabApp.workspaces_dir={settings / 'workspaces'}",
        f"--ServerApp.open_browser={browser}", "--ServerApp.answer_yes=True",
        f"--ServerApp.allow_root={getattr(os, 'geteuid', lambda: 1)() == 0}",
    ]  # fmt: skip


def committed_notebooks() -> list[Path]:
    """Notebooks that came with the project; without git, all in ``notebooks/``."""
    folder = paths.root() / "notebooks"
    try:
        listed = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--full-name", "*.ipynb"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.split("\n")  # fmt: skip
        names = {Path(line).name for line in listed if line}
    except (OSError, subprocess.SubprocessError):
        names = set()
    return [file for file in sorted(folder.glob("*.ipynb")) if not names or file.name in names]


def trust(files: Iterable[Path]) -> list[str]:
    """Sign notebooks, so that JupyterLab shows their HTML before they are run.

    Returns:
        Names of those that could not be signed.
    """
    import nbformat
    from nbformat.sign import NotebookNotary

    refused, notary = [], NotebookNotary()
    for file in files:
        try:
            notary.sign(nbformat.read(file, as_version=4))
        except Exception:  # a broken file or a read-only home: the server starts all the same
            refused.append(file.name)
    return refused


def lab(*, port: int, browser: bool, console: Console) -> int:
    """Serve until Ctrl-C; returns the exit code."""
    try:
        import jupyterlab  # noqa: F401
    except ModuleNotFoundError:
        console.print('JupyterLab is not installed here: pip install "paper-workbench[lab]"',
                      markup=False)  # fmt: skip
        return 1
    if refused := trust(committed_notebooks()):
        console.print(f"[yellow]not trusted[/] {escape(', '.join(refused))}")
    words = command(port=port, browser=browser, settings=settings_folder())
    console.print("JupyterLab opens on notebooks/index.ipynb; Ctrl-C here stops it.")
    with subprocess.Popen(words, cwd=paths.root(), env={**dict([PATIENT]), **os.environ}) as server:
        while True:
            try:
                return server.wait()
            except KeyboardInterrupt:
                continue  # the server got it too, and asks or stops by itself
