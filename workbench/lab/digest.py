"""What a result depends on, as a digest: source, arguments, library versions.

A cached result may be used again only if nothing it was computed from has changed. The source part
covers the function's own module and every ``workbench`` module reachable from it by imports, found
by reading the syntax trees, so an edited method never meets a stale number and an edited figure
invalidates nothing.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import platform
import sys
import textwrap
import types
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "pandas")


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers come from."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        found[name] = importlib.metadata.version(name)
    return found


def _file(module: str) -> Path | None:
    """File of a ``workbench`` module named with dots, or None."""
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return None
    base = PACKAGE.joinpath(*parts[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def _attribute_module(module: str, attribute: str) -> str | None:
    """Module that ``module.attribute`` really comes from, through lazily loading packages."""
    if _file(f"{module}.{attribute}"):
        return f"{module}.{attribute}"
    origin = getattr(getattr(importlib.import_module(module), attribute, None), "__module__", None)
    return origin if isinstance(origin, str) and _file(origin) else None


def _imports(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Names of the ``workbench`` modules that a syntax tree uses."""
    used: set[str] = set()
    bound: dict[str, str] = {}  # local name -> workbench package it stands for
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _file(alias.name):
                    used.add(alias.name)
                    bound[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            if not _file(base):
                continue
            for alias in node.names:
                found = _attribute_module(base, alias.name)
                used.add(found or base)
                name = f"{base}.{alias.name}"
                if _file(name) and _file(name).name == "__init__.py":  # type: ignore[union-attr]
                    bound[alias.asname or alias.name] = name
    return used | _through_packages(tree, bound)


def _through_packages(tree: ast.AST, bound: dict[str, str]) -> set[str]:
    """Modules reached by attribute access on packages: ``lab.train.fit`` needs ``lab.train``."""
    used: set[str] = set()
    for node in ast.walk(tree):
        chain: list[str] = []
        head: ast.AST = node
        while isinstance(head, ast.Attribute):
            chain.insert(0, head.attr)
            head = head.value
        if not (chain and isinstance(head, ast.Name) and head.id in bound):
            continue
        at = bound[head.id]
        for name in chain:
            found = _attribute_module(at, name)
            if found is None:
                break
            used.add(found)
            at = found
    return used


@lru_cache(maxsize=4096)
def _read(path: Path, _stamp: tuple[int, int], module: str) -> tuple[str, frozenset[str]]:
    text = path.read_bytes()
    uses = _imports(ast.parse(text), module, path.name == "__init__.py")
    return hashlib.sha256(text).hexdigest(), frozenset(uses - {module})


def _closure(modules: set[str]) -> dict[str, str]:
    """Digest of each ``workbench`` module reachable from the given ones."""
    seen: dict[str, str] = {}
    queue = list(modules)
    while queue:
        module = queue.pop()
        path = _file(module)
        if module in seen or path is None:
            continue
        stat = path.stat()
        seen[module], uses = _read(path, (stat.st_mtime_ns, stat.st_size), module)
        queue.extend(uses)
    return seen


def source(fn: Callable[..., Any]) -> str:
    """Digest of everything in this project that ``fn`` is computed by.

    Args:
        fn: a module-level function, or a function typed in a notebook. Of the latter the source,
            its closure and the functions it calls count; it may use modules and imported names,
            but no other global variable, because a worker would keep an old value of it.

    Raises:
        ValueError: a notebook function uses a global variable; the message names it.
    """
    fn = inspect.unwrap(fn)
    module = sys.modules.get(fn.__module__)
    if fn.__module__ == "__main__" or module is None or getattr(module, "__file__", None) is None:
        parts, modules = _typed(fn, set())
    else:
        parts, modules = [fn.__qualname__], {fn.__module__}
        if not _file(fn.__module__):
            text = Path(inspect.getfile(fn)).read_text(encoding="utf8")
            parts.append(text)
            modules = _imports(ast.parse(text), fn.__module__, is_package=False)
    return hashlib.sha256(
        json.dumps([parts, sorted(_closure(modules).items())]).encode()
    ).hexdigest()


def _typed(fn: Callable[..., Any], seen: set[str]) -> tuple[list[str], set[str]]:
    """Source text and modules of a function that stands in no file."""
    seen.add(fn.__qualname__)
    text = textwrap.dedent(inspect.getsource(fn))
    parts, modules = [text], set()
    used = inspect.getclosurevars(fn)
    for name, value in sorted(used.nonlocals.items()):
        parts.append(f"{name}={arguments({name: value})}")
    for name, value in sorted(used.globals.items()):
        home = getattr(value, "__module__", None)
        if isinstance(value, types.ModuleType):
            modules.add(value.__name__)
            modules |= _through_packages(ast.parse(text), {name: value.__name__})
        elif isinstance(value, types.FunctionType) and home == "__main__":
            if value.__qualname__ not in seen:
                more, others = _typed(value, seen)
                parts, modules = parts + more, modules | others
        elif callable(value) and isinstance(home, str) and home != "__main__":
            modules.add(home)
        else:
            raise ValueError(
                f"fn: {fn.__qualname__} uses the global variable {name!r}; "
                "pass it as an argument, so that every worker sees the same value"
            )
    return parts, {m for m in modules if _file(m)}


def arguments(values: dict[str, Any]) -> str:
    """Digest of keyword arguments.

    Raises:
        TypeError: a value has no stable digest; the message names the argument.
    """
    described = {}
    for name, value in values.items():
        try:
            described[name] = _describe(value)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _describe(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return [type(value).__name__, value]
    if isinstance(value, float):
        return ["float", value.hex()]
    if isinstance(value, list | tuple):
        return ["list", [_describe(v) for v in value]]
    if isinstance(value, dict):
        return ["dict", [[_describe(k), _describe(value[k])] for k in sorted(value, key=repr)]]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__qualname__, _describe(vars(value))]
    if isinstance(value, types.FunctionType | type):
        code = source(value) if isinstance(value, types.FunctionType) else ""
        return ["callable", value.__module__, value.__qualname__, code]
    return _describe_array(value)


def _describe_array(value: Any) -> Any:
    import numpy as np
    import pandas as pd
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, torch.device | torch.dtype | Path):
        return [type(value).__name__, str(value)]
    if isinstance(value, pd.DataFrame | pd.Series | pd.Index):
        value = pd.util.hash_pandas_object(value).to_numpy()
    if isinstance(value, np.generic | np.ndarray) and value.dtype != object:
        block = np.ascontiguousarray(value)
        return ["array", str(block.dtype), block.shape, hashlib.sha256(block.data).hexdigest()]
    raise TypeError(
        f"a {type(value).__name__} has no stable digest; pass numbers, strings, arrays, frames, "
        "or lists and dictionaries of them"
    )
