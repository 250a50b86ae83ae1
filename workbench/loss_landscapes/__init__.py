"""Loss landscapes: where a network sits, how curved it is there, and what it is connected to.

Shared instruments, on any `nn.Module`: `geometry` (slices, curvature, sharpness, paths, matching).
Explorer: `explore(model, loss_fn, data)`. One module per paper: `intrinsic_dimension`,
`model_soups`, `three_regime_pruning`, `implicit_bias_lm`, `ignite`, `interaction_basis`. All load
on first use.
"""

from __future__ import annotations

from workbench.lab import lazy
from workbench.loss_landscapes.geometry import NAMES

_NAMES = {"explore": "figures", **{name: f"geometry.{where}" for name, where in NAMES.items()}}

__getattr__, __dir__ = lazy.names(__name__, __file__, _NAMES)
