"""Calibration: does a model's number mean what it says?

Shared mathematics: `measures` (errors of calibration), `intervals` (bootstrap intervals for them),
`recalibrate` (maps that mend probabilities). Explorer: `explore(logits_or_probs, labels)`. One
module per paper: `calib_benchmark`, `correctness_aware`, `tempnet`, `attentiveness`,
`calibration_sets`, `pac_code_sets`, `quantile_aggregation`. All load on first use.
"""

from __future__ import annotations

from workbench.lab import lazy

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

__getattr__, __dir__ = lazy.names(__name__, __file__, _NAMES)
