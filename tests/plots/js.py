"""Runs the exported face's JavaScript outside a browser, to compare it with Python.

`node` is the system's or the one that playwright brings; without either, tests are skipped.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.plots import export
from workbench.plots.explorer import Explorer

CORE = export.ASSETS / "explorer.js"


def node() -> str | None:
    """A JavaScript engine, or None."""
    if found := shutil.which("node"):
        return found
    spec = importlib.util.find_spec("playwright")
    if spec is None or spec.origin is None:
        return None
    bundled = Path(spec.origin).parent / "driver" / "node"
    return str(bundled) if bundled.exists() else None


def run(program: str) -> Any:
    """The JSON that `program` hands to `answer(value)`, after explorer.js was loaded."""
    engine = node()
    if engine is None:
        pytest.skip("no JavaScript engine: neither node nor playwright is installed")
    source = CORE.read_text(encoding="utf-8")
    answer = "function answer(value) { process.stdout.write(JSON.stringify(value)); }\n"
    done = subprocess.run(
        [engine, "-"], input=f"{source}\n{answer}{program}", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def corners(explorer: Explorer, inner: int = 2) -> Iterator[dict[str, Any]]:
    """States over the control grid: both ends of every control and `inner` positions between."""
    positions = []
    for control in explorer.controls:
        count = len(control.values)
        chosen = sorted({round(i) for i in np.linspace(0, count - 1, inner + 2)})
        positions.append([control.values[i] for i in chosen])
    for values in itertools.product(*positions):
        yield {c.name: v for c, v in zip(explorer.controls, values, strict=True)}


def formula(explorer: Explorer, states: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the exported formula returns for each state, with the data at full precision."""
    assert explorer.script is not None, f"{explorer.name} has no script"
    data = {key: export.plain(value, 17) for key, value in (explorer.data or {}).items()}
    states = [{k: export.plain(v, 17) for k, v in state.items()} for state in states]
    return run(
        f"const f = {explorer.script.strip().rstrip(';')};\nconst data = {json.dumps(data)};\n"
        f"answer({json.dumps(states)}.map(state => f(state, data)));"
    )


def check_formula(
    explorer: Explorer,
    states: Iterable[Mapping[str, Any]] | None = None,
    rtol: float = 1e-7,
    atol: float = 1e-9,
) -> int:
    """Assert that the formula returns what compute returns; gives the number of states."""
    chosen = list(corners(explorer) if states is None else states)
    for state, found in zip(chosen, formula(explorer, chosen), strict=True):
        expected = explorer.result(**state)
        for key in explorer.keys():  # noqa: SIM118
            if key in state and key not in found:
                continue
            assert key in found, f"{explorer.name}: the script returns no {key!r}"
            same(expected[key], found[key], f"{explorer.name} {state} {key}", rtol, atol)
    return len(chosen)


def same(ours: Any, theirs: Any, where: str, rtol: float = 1e-7, atol: float = 1e-9) -> None:
    """Assert that two values of a result are equal, words exactly and numbers nearly."""
    if isinstance(ours, str) or (isinstance(ours, np.ndarray) and ours.dtype == object):
        assert np.asarray(ours).tolist() == theirs, where
        return
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)  # null becomes NaN
    assert ours.shape == theirs.shape, f"{where}: {ours.shape} in Python, {theirs.shape} in script"
    np.testing.assert_allclose(theirs, ours, rtol=rtol, atol=atol, err_msg=where)
