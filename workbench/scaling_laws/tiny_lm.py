"""The family's own test bed: small byte-level language models, with their losses along training.

`tiny_lm_grid` reads ``data/tiny_lm_grid.csv``; `experiments.tiny_lm_grid` makes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.lab import paths

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "made", "layers", "d", "N", "N_total", "batch", "seed", "phase", "budget", "step", "tokens",
    "loss",
)  # fmt: skip


def tiny_lm_grid(made: str | None = None) -> pd.DataFrame:
    """Losses of byte-level GPTs on Python's own source: sizes x batch sizes x seeds x budgets.

    Each model is trained once at a constant learning rate (``phase`` "constant": checkpoints along
    the way), and from that run one cool-down branches off for each budget: over its last fifth the
    learning rate falls linearly to zero (``phase`` "decayed": one row, the end of that run). So
    "decayed" rows are finished runs, as a Chinchilla-like law wants them, and "constant" rows are
    the curves that a law of loss, steps and batch is about.

    Args:
        made: "laptop" or "gpu" for the rows made at that scale; by default all there are.

    Returns:
        Columns ``made``, ``layers``, ``d``, ``N`` (parameters without embeddings and output layer),
        ``N_total``, ``batch`` (tokens a step), ``seed``, ``phase``, ``budget`` (tokens of the
        finished run; missing along constant runs), ``step``, ``tokens`` seen, and ``loss`` (nats a
        byte on held-out text).

    Raises:
        FileNotFoundError: the table is not in this checkout.
        ValueError: no rows were made at that scale.
    """
    import pandas as pd

    file = paths.root() / "data" / "tiny_lm_grid.csv"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing; python -m workbench.scaling_laws.experiments.tiny_lm_grid makes it"
        )
    frame = pd.read_csv(file, comment="#")
    if made is not None:
        frame = frame[frame.made == made].reset_index(drop=True)
        if frame.empty:
            raise ValueError(f"made: the table holds no rows made at {made!r}")
    return frame
