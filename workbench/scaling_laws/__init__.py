"""Scaling laws: fit a law to a few cheap runs, extrapolate it, say how far to trust it.

Shared mathematics: `laws` (the formulas), `solve` (all starts and refits in one batch), `fit`
(`fit_law` on a table of runs), `tiny_lm` (a test bed of our own). Explorer: `explore(frame)`. One
module per paper: `learning_curve_traces`, `scaling_trajectory`, `scaling_law_estimation`,
`overtraining_laws`, `nmt_scaling`, `infinite_compute`, `data_pruning_scaling`, `regmix`,
`projektor`. All load on first use.
"""

from __future__ import annotations

from workbench.lab import lazy

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

__getattr__, __dir__ = lazy.names(__name__, __file__, _NAMES)
