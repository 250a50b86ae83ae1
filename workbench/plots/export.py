"""The exported face: an explorer as JSON that the site draws with no kernel.

The JSON holds plotly traces without numbers, the bindings that fill them, and either the formula
(JavaScript source) with its data or a precomputed grid of results. `assets/explorer.js` draws it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.plots import escape, layout
from workbench.plots.controls import Control, Slider, Steps, Toggle, nearest

if TYPE_CHECKING:
    from workbench.plots.explorer import Explorer

KIND = "workbench.explorer"
MIME = "application/vnd.workbench.explorer+json"
MAX_VALUES, MAX_CELLS, MAX_BYTES, MAX_SECONDS = 50, 200, 10_000_000, 60.0
DIGITS = 4
ASSETS = Path(__file__).parent / "assets"
State = Mapping[str, Any]


def payload(explorer: Explorer, state: State, digits: int = DIGITS) -> dict[str, Any]:
    """The explorer at `state` as a dict that JSON can hold.

    Raises:
        ValueError: the grid has more than 50 values a control, 200 combinations, 60 s or 10 MB.
    """
    moved = _positions(explorer)
    controls = [c for c in explorer.controls if c.name in moved]
    snapped = dict(state)
    for control in controls:
        snapped[control.name] = moved[control.name][_nearest(control, moved, state)]
    result, keys = explorer.result(**snapped), explorer.keys()
    faces = {}
    for name, width, columns in (
        ("wide", layout.WIDE, explorer.columns),
        ("narrow", layout.NARROW, 1),
    ):
        spec = layout.spec(
            explorer.panels, result, columns=columns, height=explorer.height, width=width
        )
        faces[name] = {
            "traces": spec.traces,
            "layout": spec.layout,
            "bindings": [binding.json() for binding in spec.bindings],
        }
    faces["narrow"] = _differences(faces["narrow"], faces["wide"])
    found: dict[str, Any] = {
        "kind": KIND,
        "version": 1,
        "name": explorer.name,
        "title": explorer.title,
        "about": explorer.about,
        "controls": [_control(c, moved[c.name], snapped[c.name]) for c in controls],
        "state": snapped,
        "faces": faces,
        "readouts": [vars(readout) for readout in explorer.readouts],
        "passages": [vars(passage) for passage in explorer.passages],
        "result": {key: plain(result[key], digits) for key in keys},
        "call": explorer.call or "explorer.set({state})",
    }
    if explorer.script is not None:
        found["formula"] = explorer.script.strip()
        found["data"] = {k: plain(v, digits) for k, v in (explorer.data or {}).items()}
    elif controls:
        found["grid"] = _grid(explorer, controls, moved, snapped, digits)
    size = len(dumps(found))
    if size > MAX_BYTES:
        raise ValueError(f"{explorer.name}: more than {MAX_BYTES / 1e6:g} MB exported")
    return found


def _differences(narrow: dict[str, Any], wide: dict[str, Any]) -> dict[str, Any]:
    """What a page of one column needs to know besides the wide face; most of it is the same."""
    out: dict[str, Any] = {}
    for key in ("traces", "bindings"):
        pairs = list(zip(narrow[key], wide[key], strict=True))
        if any(mine != other for mine, other in pairs):
            out[key] = [None if mine == other else mine for mine, other in pairs]
    mine, other = narrow["layout"], wide["layout"]
    names = [*mine, *(k for k in other if k not in mine)]
    return out | {"layout": {k: mine.get(k) for k in names if mine.get(k) != other.get(k)}}


def dumps(value: Any) -> str:
    """`value` as compact JSON, never NaN."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


# ---- controls and grid


def _positions(explorer: Explorer) -> dict[str, list[Any]]:
    """The positions of each control that works without a kernel."""
    if explorer.script is not None:
        return {c.name: list(c.values) for c in explorer.controls}
    if not explorer.grid:
        return {}
    if explorer.grid is True:
        return _capped(explorer, {c.name: list(c.values) for c in explorer.controls})
    assert isinstance(explorer.grid, Mapping)
    for name in explorer.grid:
        explorer.control(name)
    return _capped(
        explorer,
        {
            c.name: [c.check(_scalar(v)) for v in explorer.grid[c.name]]
            for c in explorer.controls
            if c.name in explorer.grid
        },
    )


def _capped(explorer: Explorer, positions: dict[str, list[Any]]) -> dict[str, list[Any]]:
    for name, values in positions.items():
        if not 1 <= len(values) <= MAX_VALUES:
            raise ValueError(
                f"{explorer.name}: {len(values)} values of {name!r} in the grid; 1 to {MAX_VALUES} "
                "can be exported"
            )
    cells = int(np.prod([len(v) for v in positions.values()]))
    if cells > MAX_CELLS:
        raise ValueError(
            f"{explorer.name}: the grid has {cells} combinations, more than {MAX_CELLS}"
        )
    return positions


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _nearest(control: Control, moved: Mapping[str, list[Any]], state: State) -> int:
    values = moved[control.name]
    value = state[control.name]
    if value in values:
        return values.index(value)
    if not isinstance(control, Slider):
        return 0
    if len(values) == len(control.values):
        return nearest(control, value)
    return int(np.argmin(np.abs(np.asarray(values, float) - value)))


def _control(control: Control, values: list[Any], value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"name": control.name, "label": control.label}
    if isinstance(control, Toggle) and len(values) == 2:
        return found | {"type": "toggle", "values": [False, True], "index": int(value)}
    found |= {"values": values, "index": values.index(value)}
    if isinstance(control, Slider):
        form = control.format or control.default_format
        return found | {"type": "slider", "format": form, "unit": control.unit}
    kind = "steps" if isinstance(control, Steps) else "choice"
    return found | {"type": kind, "labels": [control.text(v) for v in values]}


def _grid(
    explorer: Explorer,
    controls: list[Control],
    moved: Mapping[str, list[Any]],
    state: State,
    digits: int,
) -> dict[str, Any]:
    """Results at every combination; equal values are stored once."""
    names, needed = [c.name for c in controls], explorer.keys()
    keys = [key for key in needed if key not in names]
    pool: list[Any] = []
    known: dict[str, int] = {}
    cells: list[list[int]] = []
    size, start = 0, time.perf_counter()
    for values in itertools.product(*(moved[name] for name in names)):
        result = explorer.result(**{**state, **dict(zip(names, values, strict=True))})
        cell = []
        for key in keys:
            text = dumps(plain(result[key], digits))
            if text not in known:
                known[text] = len(pool)
                pool.append(json.loads(text))
                size += len(text)
            cell.append(known[text])
        cells.append(cell)
        if size > MAX_BYTES:
            raise ValueError(f"{explorer.name}: the grid has more than {MAX_BYTES / 1e6:g} MB")
        if time.perf_counter() - start > MAX_SECONDS:
            raise ValueError(
                f"{explorer.name}: the grid takes more than {MAX_SECONDS:.0f} s to compute"
            )
    return {"names": names, "keys": keys, "pool": pool, "cells": cells}


# ---- numbers


def plain(value: Any, digits: int = DIGITS) -> Any:
    """`value` as JSON: arrays to `digits` significant digits, missing numbers as null."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(f"{value:.{digits + 2}g}") if np.isfinite(value) else None
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype.kind == "b":
        array = array.astype(int)
    if array.dtype.kind != "f":
        return array.tolist()
    return _listed(_rounded(array.astype(float), digits))


def _rounded(array: np.ndarray, digits: int) -> np.ndarray:
    """Each number to `digits` significant digits, finer where the array's span asks for it."""
    there = np.isfinite(array) & (array != 0)
    if digits >= 17 or not there.any():
        return array
    span = np.ptp(array[np.isfinite(array)])
    wanted = digits - 1 - np.floor(np.log10(np.abs(array, where=there, out=np.ones_like(array))))
    if span > 0:
        wanted = np.maximum(wanted, digits - 1 - np.floor(np.log10(span)))
    found = array.copy()
    for decimals in np.unique(wanted[there]):
        chosen = there & (wanted == decimals)
        found[chosen] = np.round(array[chosen], int(min(decimals, 300)))
    return found


def _listed(array: np.ndarray) -> Any:
    if np.isfinite(array).all():
        return array.tolist()
    return np.where(np.isfinite(array), array.astype(object), None).tolist()  # type: ignore[call-overload]


# ---- files for the site


@dataclass(frozen=True)
class Written:
    """A script file with one exported explorer, to be loaded after `explorer.js`."""

    id: str
    path: Path
    bytes: int


def identity(exported: Mapping[str, Any]) -> str:
    """A name for an exported explorer, stable over builds as long as it does not change."""
    digest = hashlib.sha256(dumps(exported).encode()).hexdigest()[:10]
    slug = re.sub(r"[^a-z0-9]+", "-", str(exported["name"]).lower()).strip("-")
    return f"{slug}-{digest}"


def write(exported: Mapping[str, Any], folder: Path | str, id: str | None = None) -> Written:
    """Write the explorer as `<id>.js` into `folder`: no module, no fetch, no eval."""
    if exported.get("kind") != KIND or "faces" not in exported:
        raise ValueError("exported: not an explorer's exported face")
    id = id or identity(exported)
    body = {key: value for key, value in exported.items() if key != "formula"}
    source = f"workbench.register({dumps(id)}, {dumps(body)});\n"
    if "formula" in exported:
        source += f"workbench.formula({dumps(id)}, {exported['formula'].strip().rstrip(';')});\n"
    path = Path(folder) / f"{id}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return Written(id, path, path.stat().st_size)


def element(id: str, fallback: str = "") -> str:
    """The element in which `explorer.js` draws; `fallback` is HTML for readers without scripts."""
    return f'<div class="workbench-explorer" data-explorer="{escape.html(id)}">{fallback}</div>'


def assets(folder: Path | str) -> list[Path]:
    """Copy plotly.js (the Python package's own copy), `explorer.js` and `explorer.css`."""
    import plotly

    bundle = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    sources = (bundle, ASSETS / "explorer.js", ASSETS / "explorer.css")
    return [Path(shutil.copyfile(source, target / source.name)) for source in sources]
