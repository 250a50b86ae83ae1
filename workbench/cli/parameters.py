"""The parameters of a notebook: which there are, and values typed on a command line.

The cell tagged ``parameters`` is read as Python. papermill's own inspection leaves out names whose
annotation is a union (``int | None``), so a strict check cannot rest on it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PLAIN = {"int": int, "float": float, "str": str}
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Parameter:
    """One name that a notebook's parameters cell sets."""

    name: str
    annotation: str
    default: Any

    def __str__(self) -> str:
        kind = f": {self.annotation}" if self.annotation else ""
        return f"{self.name}{kind} = {self.default!r}"


def read(notebook: Mapping[str, Any]) -> dict[str, Parameter]:
    """Parameters of a notebook, in the order of its cell; empty without such a cell."""
    for cell in notebook["cells"]:
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            source = cell["source"]
            return _assigned("".join(source) if isinstance(source, list) else source)
    return {}


def _assigned(source: str) -> dict[str, Parameter]:
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            name, kind = node.target.id, ast.unparse(node.annotation).strip("'\"")
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, kind = node.targets[0].id, ""
        else:
            continue
        assert node.value is not None
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            default = None
        found[name] = Parameter(name, kind, default)
    return found


def settle(
    known: Mapping[str, Parameter], options: Mapping[str, Any], typed: Iterable[tuple[str, str]]
) -> dict[str, Any]:
    """Values to inject into one notebook.

    Args:
        known: the notebook's parameters.
        options: what the command's own options say (scale, device, seed); names that the notebook
            does not have are left out.
        typed: ``KEY VALUE`` pairs, which win over options.

    Raises:
        ValueError: a typed name is unknown (the message lists the known ones), or its text does
            not fit the annotation.
    """
    values = {name: value for name, value in options.items() if name in known}
    for name, text in typed:
        if name not in known:
            listed = ", ".join(str(p) for p in known.values()) or "none"
            raise ValueError(f"no parameter is called {name!r}; known: {listed}")
        values[name] = convert(known[name], text)
    return values


def convert(parameter: Parameter, text: str) -> Any:
    """A typed text as the type that the parameter is annotated with, or that its default has.

    Raises:
        ValueError: the text is no such value.
    """
    kind = parameter.annotation
    if not kind and parameter.default is not None:
        kind = type(parameter.default).__name__
    try:
        tree = ast.parse(kind or "object", mode="eval").body
    except SyntaxError:
        tree = ast.Name("object")
    try:
        return _as(tree, text)
    except (ValueError, SyntaxError):
        raise ValueError(f"{parameter.name}: expected {kind}, got {text!r}") from None


def _as(kind: ast.expr, text: str) -> Any:
    if isinstance(kind, ast.BinOp):
        return _first(_members(kind), text)
    if isinstance(kind, ast.Subscript) and ast.unparse(kind.value).endswith("Optional"):
        return _first([ast.Constant(None), kind.slice], text)
    if isinstance(kind, ast.Subscript) and ast.unparse(kind.value).endswith("Literal"):
        allowed = ast.literal_eval(ast.unparse(kind.slice))
        for value in allowed if isinstance(allowed, tuple) else (allowed,):
            if str(value) == text:
                return value
        raise ValueError(text)
    if isinstance(kind, ast.Constant) and kind.value is None:
        if text.lower() != "none":
            raise ValueError(text)
        return None
    name = ast.unparse(kind.value if isinstance(kind, ast.Subscript) else kind)
    if name == "bool":
        if text.lower() not in TRUTH:
            raise ValueError(text)
        return TRUTH[text.lower()]
    if name in PLAIN:
        return PLAIN[name](text)
    return _literal(name, text)


def _members(kind: ast.expr) -> list[ast.expr]:
    if isinstance(kind, ast.BinOp):
        return [*_members(kind.left), *_members(kind.right)]
    return [kind]


def _first(kinds: list[ast.expr], text: str) -> Any:
    """The first alternative that fits; plain text is tried last, since it fits everything."""
    for kind in sorted(kinds, key=lambda k: ast.unparse(k) == "str"):
        try:
            return _as(kind, text)
        except (ValueError, SyntaxError):
            continue
    raise ValueError(text)


def _literal(name: str, text: str) -> Any:
    """A list, tuple, dictionary; or, without a usable annotation, whatever the text spells."""
    kinds = {"list": list, "tuple": tuple, "dict": dict, "set": set}
    if name in kinds:
        value = ast.literal_eval(text)
        if not isinstance(value, kinds[name]):
            raise ValueError(text)
        return value
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
