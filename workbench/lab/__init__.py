"""What every experiment needs: a run with its scale, seeds and claims; data, models, training.

``lab`` knows no paper. Sub-modules load on first use, and none of them needs Jupyter, plotly or
matplotlib to be imported.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

_LAZY = {
    "start": "run",
    "Run": "run",
    "seeded": "seeding",
    "Claim": "claims",
    "judge": "claims",
    "paper": "show",
}
_MODULES = frozenset(p.stem for p in Path(__file__).parent.iterdir() if p.stem[0] != "_")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"workbench.lab.{_LAZY[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"workbench.lab.{name}")
    raise AttributeError(f"workbench.lab has no {name!r}")


def __dir__() -> list[str]:
    return sorted([*_LAZY, *_MODULES])
