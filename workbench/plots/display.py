"""What `explorer.show()` displays: widgets where somebody can move them, otherwise one bundle."""

from __future__ import annotations

import base64
import hashlib
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.plots import export, static

if TYPE_CHECKING:
    from workbench.plots.explorer import Explorer
    from workbench.plots.live import LiveFace

MAX_STORED = 300_000  # bytes of JSON in a notebook's output
_open: weakref.WeakSet[LiveFace] = weakref.WeakSet()


def attached() -> bool:
    """True when a front end can show widgets: a kernel runs and the run is not headless."""
    if os.environ.get("WORKBENCH_HEADLESS", "") not in ("", "0"):
        return False
    shell = _shell()
    return shell is not None and hasattr(shell, "kernel")


def show(explorer: Explorer) -> None:
    """Display `explorer`: live in a kernel with a front end, otherwise picture, text and JSON."""
    if not attached():
        _display(bundle(explorer))
        return
    from IPython.display import display

    face = explorer.face()
    _replace(face)
    display(face.widget)


def bundle(explorer: Explorer) -> dict[str, Any]:
    """What a notebook stores: a picture, the numbers in words, and the exported face.

    No text/html: JupyterLab and GitHub would show it instead of the picture.
    """
    state = explorer.state
    picture = base64.b64encode(static.png(explorer, state)).decode()
    words = f"{explorer.title}\n{static.caption(explorer, state, explorer.result())}"
    return {"image/png": picture, "text/plain": words, export.MIME: _stored(explorer)}


def _stored(explorer: Explorer) -> dict[str, Any]:
    """The exported face, or, when it is too large to store, where it lies or why it is left out."""
    short = {"kind": export.KIND, "version": 1, "name": explorer.name, "title": explorer.title}
    try:
        found = explorer.export()
    except ValueError as error:
        return short | {"omitted": str(error)}
    text = export.dumps(found)
    if len(text) <= MAX_STORED:
        return found
    folder = os.environ.get("WORKBENCH_EXPORTS")
    if not folder:
        return short | {
            "omitted": f"{explorer.name}: {len(text) / 1e3:.0f} kB, too much to store in a notebook"
        }
    digest = hashlib.sha256(text.encode()).hexdigest()
    path = Path(folder) / f"{digest}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return short | {"file": path.name, "sha256": digest}


# ---- the kernel


def _shell() -> Any:
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return get_ipython()


def _display(data: dict[str, Any]) -> None:
    if _shell() is None:
        print(data["text/plain"])
        return
    from IPython.display import display

    display(data, raw=True, metadata={"image/png": {"alt": data["text/plain"]}})


def _place() -> tuple[str, str] | None:
    """The cell that is running and this one execution of it; None outside JupyterLab."""
    try:
        message = _shell().get_parent()
        return message["metadata"]["cellId"], message["header"]["msg_id"]
    except (AttributeError, KeyError, TypeError):
        return None


def _replace(face: LiveFace) -> None:
    """Close what an earlier run of the same cell (without cells: of the same name) has shown."""
    place = _place()
    for other in list(_open):
        if other is face or other.closed:
            continue
        if place is None:
            old = other.explorer.name == face.explorer.name
        else:
            old = other.shown is not None and other.shown[0] == place[0] and other.shown != place
        if old:
            other.close()
    face.shown = place
    _open.add(face)
