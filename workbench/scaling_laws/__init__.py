"""Scaling laws: fit a law to a few cheap runs, extrapolate it, say how far to trust it.

Shared mathematics: `laws` (the formulas), `solve` (all starts and refits in one batch), `fit`
(`fit_law` on a table of runs), `tiny_lm` (a test bed of our own). Explorer: `explore(frame)`. One
module per paper: `learning_curve_traces`, `scaling_trajectory`, `scaling_law_estimation`,
`overtraining_laws`, `nmt_scaling`, `infinite_compute`, `data_pruning_scaling`, `regmix`,
`projektor`. All load on first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

_NAMES = {
    "LAWS": "laws",
    "Law": "laws",
    "FitWarning": "table",
    "LawFit": "fit",
    "explore": "figures",
    "fit_each": "fit",
    "fit_law": "fit",
    "fit_power": "fit",
    "tiny_lm_grid": "tiny_lm",
}
_HERE = Path(__file__).parent


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    if not name.startswith("_") and (
        (_HERE / f"{name}.py").exists() or (_HERE / name / "__init__.py").exists()
    ):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"workbench.scaling_laws has no {name!r}")


def __dir__() -> list[str]:
    modules = (p.stem for p in _HERE.iterdir() if not p.name.startswith("_"))
    return sorted({*_NAMES, *modules})
