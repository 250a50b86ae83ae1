"""Surrogate losses: what to minimise when you are judged by something else.

Each loss is a function and an `nn.Module` with torch's conventions. `explore` draws losses against
the margin, `playground` retrains a decision boundary as you move noise, imbalance and loss,
`compare` sets losses against each other on your table, by the names of `zoo`. One module per
paper: `comp_sum`, `ldr_loss`, `ensloss`, `z_loss`, `anyloss`, `dice_loss`, `aggregate_responses`,
`dis_vs_gen`. All load on first use.
"""

from __future__ import annotations

from workbench.lab import lazy

_NAMES = {
    "compare": "figures_compare",
    "explore": "figures",
    "playground": "figures_playground",
}

__getattr__, __dir__ = lazy.names(__name__, __file__, _NAMES)
