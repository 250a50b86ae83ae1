"""Packages whose modules and names load on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def names(
    package: str, file: str, where: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package: its modules, and names out of them.

    Args:
        package: its ``__name__``.
        file: its ``__file__``.
        where: for each name offered, the module of the package that holds it.

    Returns:
        What a package assigns to ``__getattr__, __dir__``.
    """
    here = Path(file).parent

    def get(name: str) -> Any:
        if name in where:
            return getattr(importlib.import_module(f"{package}.{where[name]}"), name)
        if not name.startswith("_") and (
            (here / f"{name}.py").exists() or (here / name / "__init__.py").exists()
        ):
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"{package} has no {name!r}")

    def all_names() -> list[str]:
        modules = (p.stem for p in here.iterdir() if not p.name.startswith("_"))
        return sorted({*where, *modules})

    return get, all_names
