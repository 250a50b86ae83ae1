"""Calibration: does a model's number mean what it says?

Shared mathematics: `measures` (errors of calibration), `intervals` (bootstrap intervals for them),
`recalibrate` (maps that mend probabilities). Explorer: `explore(logits_or_probs, labels)`. One
module per paper: `calib_benchmark`, `correctness_aware`, `tempnet`, `attentiveness`,
`calibration_sets`, `pac_code_sets`, `quantile_aggregation`. All load on first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

_NAMES = {
    "MEASURES": "measures",
    "RECALIBRATORS": "recalibrate",
    "BetaCalibration": "recalibrate",
    "HistogramBinning": "recalibrate",
    "Interval": "intervals",
    "IsotonicCalibration": "recalibrate",
    "MatrixScaling": "recalibrate",
    "PlattScaling": "recalibrate",
    "TemperatureScaling": "recalibrate",
    "VectorScaling": "recalibrate",
    "aece": "measures",
    "brier": "measures",
    "brier_decomposition": "measures",
    "classwise_ece": "measures",
    "ece": "measures",
    "explore": "figures",
    "explore_benchmark": "figures_benchmark",
    "fit_temperature": "temperature",
    "interval": "intervals",
    "kde_ece": "measures",
    "ks_error": "measures",
    "mce": "measures",
    "mmce": "measures",
    "nll": "measures",
    "oe": "measures",
    "ood_auroc": "measures",
    "reliability": "measures",
    "smooth_ece": "measures",
    "top_label_ece": "measures",
}
_HERE = Path(__file__).parent


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    if not name.startswith("_") and (
        (_HERE / f"{name}.py").exists() or (_HERE / name / "__init__.py").exists()
    ):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"workbench.calibration has no {name!r}")


def __dir__() -> list[str]:
    modules = (p.stem for p in _HERE.iterdir() if not p.name.startswith("_"))
    return sorted({*_NAMES, *modules})
