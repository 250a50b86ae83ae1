"""``workbench doctor``: what is missing, in which environment, and what to type."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from workbench.lab import ledger, paths

MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[bold red]missing[/]"}
EXTENSIONS = ("anywidget", "jupyterlab-plotly", "@jupyter-widgets/jupyterlab-manager")
SERVER_PACKAGES = ("jupyterlab", "anywidget", "ipywidgets", "plotly")
KERNEL_PACKAGES = ("ipykernel", "anywidget", "ipywidgets", "plotly", "matplotlib", "torch")
INSTALL = 'pip install -c constraints.txt -e ".[lab]"'
# Run by another environment's Python: what is installed there, and where its extensions lie.
PROBE = """
import json, sys
from importlib import metadata
from pathlib import Path
found = {}
for name in sys.argv[1].split(","):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = ""
try:
    from jupyter_core.paths import jupyter_path
    folders = jupyter_path("labextensions")
except ImportError:
    folders = []
has = [n for n in sys.argv[2].split(",") if any((Path(f) / n).is_dir() for f in folders)]
print(json.dumps({"prefix": sys.prefix, "versions": found, "extensions": has}))
"""


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``missing`` stops something from working; ``note`` does not."""

    subject: str
    state: str
    said: str
    cure: str = ""


def run(console: Console) -> int:
    """Print all findings; returns 0 when nothing is missing."""
    worst = 0
    for finding in examine():
        cure = f"\n        [dim]{escape(finding.cure)}[/]" if finding.cure else ""
        console.print(
            f"{MARKS[finding.state]:<22} [bold]{finding.subject}[/]: {escape(finding.said)}{cure}"
        )
        worst = max(worst, int(finding.state == "missing"))
    console.print("Something is missing." if worst else "All that is needed is here.")
    return worst


def examine() -> Iterator[Finding]:
    """Look at everything, in the order in which a new user needs it."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    enough = sys.version_info >= (3, 11)
    yield Finding("Python", "ok" if enough else "missing", f"{version} in {sys.prefix}")
    yield _torch()
    yield from _jupyter()
    yield _versions(paths.root() / "constraints.txt")
    yield _chromium()
    yield from _data()
    yield _writable("result cache", paths.cache())
    yield _writable("user's data folder", paths.user_data())


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:  # a broken build fails in many ways
        return Finding("torch", "missing", f"cannot be imported here ({error})", INSTALL)
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return Finding("torch", "ok", f"{torch.__version__}, {gpu}, {torch.get_num_threads()} threads")


def _jupyter() -> Iterator[Finding]:
    """The server's environment draws widgets, the kernel's makes them: both need their half."""
    server, kernel = server_python(), kernel_python()
    if server is None:
        yield Finding("JupyterLab", "missing", "no server found here or on the path", INSTALL)
    else:
        yield _environment("JupyterLab server", server, SERVER_PACKAGES, EXTENSIONS)
    if kernel is None:
        yield Finding("notebook kernel", "missing", "no kernel named python3", INSTALL)
    else:
        yield _environment("notebook kernel", kernel, KERNEL_PACKAGES, ())
    if server and kernel and not _same(server, kernel):
        yield Finding(
            "environments", "note", f"the server runs in {server}, the kernel in {kernel}",
            "widgets need the same versions of anywidget and ipywidgets in both",
        )  # fmt: skip


def _same(one: str, other: str) -> bool:
    return os.path.abspath(one) == os.path.abspath(other)


def server_python() -> str | None:
    """Python that a JupyterLab started here would run in: this one, or that of ``jupyter-lab``."""
    try:
        metadata.version("jupyterlab")
        return sys.executable
    except metadata.PackageNotFoundError:
        pass
    script = shutil.which("jupyter-lab")
    if script is None:
        return None
    first = Path(script).read_bytes().split(b"\n", 1)[0]
    found = first[2:].strip().decode(errors="replace") if first.startswith(b"#!") else ""
    return found if Path(found).exists() else None


def kernel_python() -> str | None:
    """Python that the kernel ``python3`` runs in."""
    try:
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    except ModuleNotFoundError:
        return None
    try:
        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        return None
    return sys.executable if program in ("python", "python3") else shutil.which(program)


def _environment(
    subject: str, python: str, packages: tuple[str, ...], extensions: tuple[str, ...]
) -> Finding:
    try:
        found = probe(python, packages, extensions)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Finding(subject, "missing", f"{python} does not answer ({error})")
    lacks = [name for name in packages if not found["versions"][name]]
    lacks += [
        f"front-end extension {name}" for name in extensions if name not in found["extensions"]
    ]
    if lacks:
        cure = f"{python} -m pip install -c constraints.txt -e '.[lab]'"
        return Finding(subject, "missing", f"{found['prefix']} lacks {', '.join(lacks)}", cure)
    listed = ", ".join(f"{name} {found['versions'][name]}" for name in packages)
    return Finding(subject, "ok", f"{listed}; in {found['prefix']}")


def probe(python: str, packages: tuple[str, ...], extensions: tuple[str, ...]) -> dict[str, Any]:
    """Ask another Python what it has."""
    done = subprocess.run(
        [python, "-c", PROBE, ",".join(packages), ",".join(extensions)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def _versions(constraints: Path) -> Finding:
    if not constraints.exists():
        return Finding("versions", "note", "there is no constraints.txt to compare with")
    differ = [
        f"{name} {here} (tested with {wanted})" for name, wanted, here in pins(constraints)
        if here and here.partition("+")[0] != wanted.partition("+")[0]
    ]  # fmt: skip
    if not differ:
        return Finding("versions", "ok", "as tested (constraints.txt)")
    shown = ", ".join(differ[:8]) + (f" and {len(differ) - 8} more" if len(differ) > 8 else "")
    return Finding("versions", "note", shown, INSTALL)


def pins(constraints: Path) -> list[tuple[str, str, str]]:
    """Pinned packages: name, pinned version, version here ("" when not installed)."""
    found = []
    for line in constraints.read_text(encoding="utf8").splitlines():
        if match := re.match(r"\s*([A-Za-z0-9._-]+)==([^\s;#]+)", line):
            try:
                here = metadata.version(match[1])
            except metadata.PackageNotFoundError:
                here = ""
            found.append((match[1], match[2], here))
    return found


def _chromium() -> Finding:
    cure = "only the browser tests need it: python -m playwright install chromium"
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if path := shutil.which(name):
            return Finding("Chromium", "ok", path)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        return Finding("Chromium", "note", "not found, nor playwright", cure)
    with sync_playwright() as browsers:
        path = browsers.chromium.executable_path
    if Path(path).exists():
        return Finding("Chromium", "ok", path)
    return Finding("Chromium", "note", "not found", cure)


def _data() -> Iterator[Finding]:
    try:
        from workbench.lab import catalogue, data

        count = len(catalogue.papers())
        yield Finding("catalogue", "ok", f"{count} papers, {len(ledger.read())} ledger rows")
        present = data.listing()
    except Exception as error:  # whatever is wrong with a table is what there is to say
        yield Finding("data", "missing", str(error), "check data/ against a fresh clone")
        return
    here = int(present["present"].astype(bool).sum()) if "present" in present else len(present)
    cure = "" if here == len(present) else "workbench data list; workbench data get NAME"
    yield Finding("data sources", "ok", f"{here} of {len(present)} are on this machine", cure)


def _writable(subject: str, folder: Path) -> Finding:
    place = folder
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        said = f"{folder} cannot be written ({error.strerror})"
        return Finding(subject, "note", said, "results are then kept in memory only")
    free = shutil.disk_usage(place).free / 2**30
    return Finding(subject, "ok", f"{folder}, {free:.1f} GB free")
