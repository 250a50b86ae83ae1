"""Predict the curve of a larger model at a batch size that no run of the fit had."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from workbench.lab import data
from workbench.scaling_laws.fit import LawFit
from workbench.scaling_laws.scaling_trajectory import (
    Constants,
    fit_trajectory,
    fit_without_batch,
    loss_at,
    three_steps,
)
from workbench.scaling_laws.tiny_lm import tiny_lm_grid

STEPS = {"S": "step", "B": "batch"}
TOKENS = {"S": "tokens", "B": "batch"}

OPT = {
    "125m": (12, 768), "1.3b": (24, 2048), "6.7b": (32, 4096), "13b": (40, 5120),
    "30b": (48, 7168), "175b": (96, 12288),
}  # fmt: skip
"""Layers and width (Zhang et al., 2022, arXiv 2205.01068): 12 layers width^2 parameters."""


def curves(seed: int | None = None, made: str = "laptop") -> pd.DataFrame:
    """Rows of the tiny grid along training at a constant learning rate.

    Args:
        seed: which of the table's seeds, counted round; None for all.
        made: scale at which the rows were trained.
    """
    table = tiny_lm_grid(made)
    table = table[table.phase == "constant"]
    if seed is not None:
        seeds = sorted(table.seed.unique())
        table = table[table.seed == seeds[seed % len(seeds)]]
    return table.reset_index(drop=True)


def predict_larger(
    seed: int,
    *,
    held_out: int = 2,
    sizes: int = 4,
    starts: int = 60,
    every: int = 1,
    made: str = "laptop",
) -> dict[str, Any]:
    """Fit on the smallest models at two batch sizes, predict the largest model at the third.

    All fits see the same rows. ``err_*`` is the mean of |predicted - measured| / measured along the
    predicted curve, in per cent: of the joint fit (``law``), of the three regressions (``three``),
    of the same law without batch, in ``steps`` and in ``tokens``, and of whichever of these two has
    the lower objective on the rows of the fit (``blind``). ``err_inside`` is that of the joint fit
    on the rows it was fitted to, ``err_middle`` its error on the second largest model.

    Args:
        seed: of the runs in the table and of the starts.
        held_out: index of the batch size left out of the fit, smallest first.
        sizes: how many sizes the fit sees, smallest first.
        starts: of each joint fit.
        every: thin out the checkpoints.
        made: scale at which the rows were trained.
    """
    table = curves(seed, made)
    batch = np.sort(table.batch.unique())[held_out]
    *known, second, largest = np.sort(table.N.unique())
    train = table[table.N.isin(known[:sizes]) & (table.batch != batch)].iloc[::every]
    target = table[(table["N"] == largest) & (table.batch == batch)]
    middle = table[(table["N"] == second) & (table.batch == batch)]
    options: dict[str, Any] = {"starts": starts, "seed": seed, "quiet": True}
    joint = fit_trajectory(train, columns=STEPS, **options)
    steps = fit_without_batch(train, columns=STEPS, **options)
    tokens = fit_without_batch(train, columns=TOKENS, **options)
    law = Constants(**joint.params)
    three = three_steps(train, columns=STEPS).law
    predicted = {
        "law": _predict(target, law),
        "three": _predict(target, three),
        "steps": _predict(target, Constants(**steps.params)),
        "tokens": _predict(target, Constants(**tokens.params), time="tokens"),
    }
    predicted["blind"] = predicted["steps" if steps.objective < tokens.objective else "tokens"]
    return {
        "batch": int(batch),
        "N": int(target.N.iloc[0]),
        **{f"err_{name}": _error(target, values) for name, values in predicted.items()},
        "err_middle": _error(middle, _predict(middle, law)),
        "err_inside": _inside(joint),
        "err_inside_blind": min(_inside(steps), _inside(tokens)),
        "bias_law": float(100 * np.mean(predicted["law"] / target.loss - 1)),
        "bias_blind": float(100 * np.mean(predicted["blind"] / target.loss - 1)),
        "at_best": joint.at_best,
        **joint.params,
        **{f"three_{name}": getattr(three, name) for name in joint.params},
        "step": target.step.to_numpy(),
        "loss": target.loss.to_numpy(),
        **{f"curve_{name}": values for name, values in predicted.items()},
    }


def opt_curves() -> pd.DataFrame | None:
    """OPT's losses along training (Zhang et al., 2022), or None without the released table.

    Each size has one batch size of its own, and the learning rate falls linearly: both are outside
    the law's conditions.
    """
    folder = data.authors("hitchhikers")
    if folder is None:
        return None
    table = pd.read_csv(folder / "aggregated_eval" / "opt_trajectories.csv")
    layers, width = np.array([OPT[size] for size in table.model_size], float).T
    tokens = 10.0**table.num_token
    return pd.DataFrame(
        {
            "model": table.model_size,
            "N": 12 * layers * width**2,
            "step": table.steps,
            "batch": tokens / table.steps,
            "tokens": tokens,
            "loss": np.log(table.ppl),
        }
    )


def predict_opt(
    seed: int, *, sizes: int = 4, starts: int = 60, first: int = 6000
) -> dict[str, Any]:
    """Fit on OPT's smaller models, predict the larger ones, with and without batch.

    Args:
        seed: of the starts.
        sizes: how many models the fit sees, smallest first.
        starts: of each fit.
        first: checkpoints before this step are left out (2,000 warm-up steps at most).
    """
    table = opt_curves()
    if table is None:
        raise ValueError("the released curves are not on this machine; bring them first")
    table = table[table.step >= first]
    small = np.sort(table.N.unique())[:sizes]
    train, rest = table[table.N.isin(small)], table[~table.N.isin(small)]
    options: dict[str, Any] = {"starts": starts, "seed": seed, "quiet": True}
    law = Constants(**fit_trajectory(train, columns=STEPS, **options).params)
    tokens = Constants(**fit_without_batch(train, columns=TOKENS, **options).params)
    return {
        f"err_{name}_{model}": _error(rows, _predict(rows, constants, time=time))
        for model, rows in rest.groupby("model")
        for name, constants, time in (("law", law, "step"), ("tokens", tokens, "tokens"))
    }


def _predict(rows: pd.DataFrame, law: Constants, time: str = "step") -> np.ndarray:
    return loss_at(rows.N, rows[time], rows.batch, law).numpy()


def _error(rows: pd.DataFrame, predicted: np.ndarray) -> float:
    return float(100 * np.mean(np.abs(predicted / rows.loss.to_numpy() - 1)))


def _inside(fit: LawFit) -> float:
    return float(100 * fit.frame.residual.abs().mean())
