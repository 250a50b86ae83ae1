"""The Paper Workbench: machine-learning papers to read, run, take apart and check.

``import workbench as wb`` costs a few milliseconds; a family (``wb.calibration``), the experiment
floor (``wb.lab``) and the drawing floor (``wb.plots``) load when they are first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

__version__ = "0.1.0"

_HERE = Path(__file__).parent


def _rooms() -> list[str]:
    return sorted(p.name for p in _HERE.iterdir() if (p / "__init__.py").exists())


def __getattr__(name: str) -> ModuleType:
    if not name.startswith("_") and (_HERE / name / "__init__.py").exists():
        return importlib.import_module(f"workbench.{name}")
    raise AttributeError(f"workbench has no family or room named {name!r}; there are {_rooms()}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_rooms()])
