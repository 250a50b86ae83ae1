"""All tables and all laws of the family: fit the smaller sizes, predict the largest."""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.lab import data
from workbench.scaling_laws.experiments.overtraining_laws import released as overtrained
from workbench.scaling_laws.experiments.scaling_law_estimation import chinchilla_points
from workbench.scaling_laws.experiments.scaling_law_estimation import released as families
from workbench.scaling_laws.fit import fit_law
from workbench.scaling_laws.tiny_lm import tiny_lm_grid

OWN = "tiny_lm_grid"
POINTS = "Chinchilla's points"
LAWS = {
    "size and tokens": ("chinchilla", {"N": "N", "D": "D"}),
    "one exponent": ("over_training", {"N": "N", "M": "M"}),
    "product": ("nmt", {"Ne": "N", "Nd": "D"}),
    "compute alone": ("power", {"x": "C"}),
    "size alone": ("power", {"x": "N"}),
}
"""Which law of the house reads which columns."""


def own_runs(made: str | None = None) -> pd.DataFrame:
    """Finished runs of the test bed at the middle batch size: N, D, loss; both seeds."""
    grid = tiny_lm_grid(made)
    done = grid[grid.phase == "decayed"]
    middle = np.sort(done.batch.unique())[done.batch.nunique() // 2]
    rows = done[done.batch == middle]
    return pd.DataFrame({"N": rows.N, "D": rows.tokens, "loss": rows.loss}).reset_index(drop=True)


def story() -> tuple[pd.DataFrame, str]:
    """The runs of the opening picture, N, D and loss, and where they come from."""
    if data.authors("chinchilla_points") is None:
        return own_runs(), "finished runs of the test bed (the published points are not here)"
    return chinchilla_points(), "240 runs of Hoffmann et al. (2022), read off their figure"


def tables() -> dict[str, pd.DataFrame]:
    """Every table at hand by name, with columns N, D, loss."""
    found = {OWN: own_runs()}
    if data.authors("chinchilla_points") is not None:
        found[POINTS] = chinchilla_points()
    runs = overtrained()
    if runs is not None:
        for name, rows in runs.groupby("train"):
            part = rows.rename(columns={"c4_val": "loss"})[["N", "D", "loss"]]
            found[f"over-training, {name}"] = part.reset_index(drop=True)
    if data.authors("hitchhikers") is not None:
        for name, rows in families().groupby("family"):
            if rows.N.nunique() >= 4:
                found[str(name)] = rows[["N", "D", "loss"]].reset_index(drop=True)
    return found


def split(table: pd.DataFrame) -> np.ndarray:
    """Which rows are held out: those of the largest fifth of the sizes, one size at least."""
    sizes = np.sort(table.N.unique())
    first = sizes[-max(1, len(sizes) // 5)]
    return table.N.ge(first).to_numpy()


def forecast(seed: int, *, name: str, law: str) -> dict[str, float | int | str]:
    """Fit one law to the smaller sizes of one table and predict the largest.

    Returns:
        ``error``, the mean absolute relative error on held-out runs in per cent; ``seen``, that on
        the fitted runs; ``n_fit``, ``n_held``; ``trouble``, the first warning of the fit.
    """
    table = tables()[name].astype(float).assign(M=lambda t: t.D / t.N, C=lambda t: 6 * t.N * t.D)
    held = split(table)
    which, columns = LAWS[law]
    chosen = {**columns, "loss": "loss"}
    fit = fit_law(table[~held], which, columns=chosen, seed=seed, quiet=True)
    inputs = {q: table.loc[held, column].to_numpy() for q, column in columns.items()}
    wrong = np.abs(fit.predict(**inputs) / table.loss[held] - 1)
    return {
        "error": 100 * float(wrong.mean()),
        "seen": 100 * float(np.abs(np.expm1(fit.residuals)).mean()),
        "n_fit": int((~held).sum()),
        "n_held": int(held.sum()),
        "trouble": fit.warnings[0] if fit.warnings else "",
    }


def trust(table: pd.DataFrame, fits: int = 8, least: int = 4, seed: int = 0) -> pd.DataFrame:
    """How a forecast of the largest sizes improves as the fit reaches further up.

    Args:
        table: N, D, loss.
        fits: at most so many, evenly over the sizes.
        least: smallest number of distinct sizes in a fit.
        seed: of the bootstrap.

    Returns:
        A row a fit: ``reach`` (largest size in the fit over the smallest held-out size of the
        largest fifth), ``error`` on that fifth in per cent, ``low`` and ``high`` (95% bootstrap of
        the mean signed error, in per cent), and ``signed``.
    """
    held = split(table)
    target, rest = table[held], table[~held]
    sizes = np.sort(rest.N.unique())
    stops = np.unique(np.linspace(least, len(sizes), min(fits, len(sizes) - least + 1)).astype(int))
    rows = []
    for stop in stops:
        part = rest[rest.N.le(sizes[stop - 1])]
        if len(part[["N", "D"]].drop_duplicates()) < 8:
            continue
        fit = fit_law(part, seed=seed, bootstrap=400, quiet=True)
        told = fit.predict(target, interval=0.95)
        truth = target.loss.to_numpy()
        gap = {q: 100 * (told[q].to_numpy() / truth - 1) for q in ("prediction", "low", "high")}
        rows.append(
            {
                "reach": sizes[stop - 1] / target.N.min(),
                "error": float(np.abs(gap["prediction"]).mean()),
                "signed": float(gap["prediction"].mean()),
                "low": float(gap["low"].mean()),
                "high": float(gap["high"].mean()),
            }
        )
    return pd.DataFrame(rows)
