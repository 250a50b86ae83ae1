"""Which property of a figure follows which value of the result.

A binding is data, not code: the live face evaluates it here, the exported face in
`assets/explorer.js`, which implements the same operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from workbench.plots import escape, fields


@dataclass(frozen=True)
class Binding:
    """`prop` of trace number `trace` (of the layout when None) is `op` of `args`."""

    trace: int | None
    prop: str
    op: str
    args: tuple[Any, ...]

    def json(self) -> dict[str, Any]:
        """The binding as the exported face reads it."""
        return {"trace": self.trace, "prop": self.prop, "op": self.op, "args": list(self.args)}


def wrap(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` characters, broken at spaces."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += " " + word
        else:
            lines.append(word)
    return lines


def title(text: str, width: int) -> str:
    """`text` bold, wrapped and escaped for plotly."""
    return "<b>" + "<br>".join(escape.plotly(line) for line in wrap(text, width)) + "</b>"


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return escape.plotly(value)
    if isinstance(value, np.ndarray) and value.dtype == object:
        flat = [escape.plotly(v) for v in value.flat]
        return np.array(flat, dtype=object).reshape(value.shape)
    return value


def _drawn(x: Any, y: Any) -> np.ndarray:
    """Indices of the points that have both coordinates."""
    return np.flatnonzero(_present(x) & _present(y))


def _present(values: Any) -> np.ndarray:
    array = np.atleast_1d(values)
    return np.ones(array.shape, bool) if array.dtype == object else np.isfinite(array)


def _log10(value: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log10(np.asarray(value, float))
    found = np.where(np.isfinite(found), found, np.nan)
    return found if found.ndim else float(found)


def rim(at: float, radius: float, middle: float) -> float:
    """Where the knob of a radius lies: on the side of `middle`."""
    return at - radius if at > middle else at + radius


def evaluate(binding: Binding, result: Mapping[str, Any]) -> Any:
    """The value that `binding` gives its property."""
    args, op = binding.args, binding.op
    if op == "value":
        return _escaped(result[args[0]])
    if op == "minus":
        return np.asarray(result[args[0]], float) - np.asarray(result[args[1]], float)
    if op == "log10":
        return _log10(result[args[0]])
    if op == "finite":
        value = result[args[0]]
        return value is not None and (isinstance(value, str) or bool(np.isfinite(value)))
    if op == "drawn":
        return bool(len(_drawn(result[args[0]], result[args[1]])))
    if op in ("last", "lastlog"):
        there = _drawn(result[args[1]], result[args[2]])
        if not len(there):
            return 0
        value = np.atleast_1d(result[args[0]])[there[-1]]
        return _log10(value) if op == "lastlog" else _escaped(value)
    if op == "rim":
        return rim(result[args[0]], result[args[1]], args[2])
    if op == "text":
        return escape.plotly(fields.fill(args[0], result))
    if op == "title":
        return title(fields.fill(args[0], result), args[1]) + args[2]
    raise ValueError(f"unknown operation {op!r}")


def put(figure: Any, prop: str, value: Any) -> None:
    """Set `figure["shapes[0].x0"]`-like properties in nested dicts and lists."""
    keys: list[Any] = []
    for part in prop.split("."):
        name, *indices = part.split("[")
        keys += [name, *(int(i.rstrip("]")) for i in indices)]
    for key, following in pairwise(keys):
        if isinstance(figure, dict) and key not in figure:
            figure[key] = [] if isinstance(following, int) else {}
        figure = figure[key]
    figure[keys[-1]] = value
