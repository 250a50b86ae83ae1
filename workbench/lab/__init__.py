"""What every experiment needs: a run with its scale, seeds and claims; data, models, training.

``lab`` knows no paper. Sub-modules load on first use, and none of them needs Jupyter, plotly or
matplotlib to be imported.
"""

from __future__ import annotations

from workbench.lab import lazy

_LAZY = {
    "start": "run",
    "Run": "run",
    "seeded": "seeding",
    "Claim": "claims",
    "judge": "claims",
    "paper": "show",
}
__getattr__, __dir__ = lazy.names(__name__, __file__, _LAZY)
