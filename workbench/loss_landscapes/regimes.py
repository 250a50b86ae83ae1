r"""Regimes of pruned networks from measured connectivity and similarity, and what follows.

The numbers behind `three_regime_pruning`: names of regimes, the border where connectivity leaves 0,
and the three uses of the model as functions of measured arrays. Temperatures run along the first
axis, hottest first; densities along the last, ascending.

Reference: Zhou, Yang, Chang and Mahoney (2023), arXiv 2305.18383. Thresholds are ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from workbench.lab.claims import interval
from workbench.loss_landscapes.geometry.paths import signed_connectivity
from workbench.loss_landscapes.members import Array

__all__ = [
    "CKA_TOL", "MC_TOL", "advice", "border", "border_table", "choose_dense", "regime",
    "score_advice", "signed_connectivity",
]  # fmt: skip

MC_TOL = -0.02
"""Connectivity below which a pair counts as separated: two points of training error."""
CKA_TOL = 0.95
"""Similarity from which a connected pair counts as similar."""


def regime(mc: Any, cka: Any, *, mc_tol: float = MC_TOL, cka_tol: float = CKA_TOL) -> Array:
    """Names "I", "II-A" and "II-B" for measured pairs, in the shape of ``mc``.

    Args:
        mc: signed connectivities.
        cka: similarities, same shape.
        mc_tol: Regime I lies below it.
        cka_tol: Regime II-B begins here.
    """
    mc, cka = np.broadcast_arrays(np.asarray(mc, float), np.asarray(cka, float))
    return np.where(mc < mc_tol, "I", np.where(cka < cka_tol, "II-A", "II-B"))


def border(densities: Any, mc: Any, *, mc_tol: float = MC_TOL) -> Array:
    """Density at which mc leaves 0, going from dense to sparse.

    Between the densest cell below ``mc_tol`` and its denser neighbour mc is interpolated linearly
    in the logarithm of the density. Where no cell lies below, the border is at or under the
    sparsest density, which is returned; where the densest lies below, that one is.

    Args:
        densities: (D,) ascending.
        mc: (..., D).
        mc_tol: what counts as a barrier.

    Returns:
        (...) densities.
    """
    d, mc = np.asarray(densities, float), np.asarray(mc, float)
    if mc.shape[-1:] != d.shape or (np.diff(d) <= 0).any():
        raise ValueError(f"densities: expected {mc.shape[-1]} ascending values, got {d.tolist()}")
    below = mc < mc_tol
    last = np.where(below.any(-1), len(d) - 1 - below[..., ::-1].argmax(-1), -1)
    i = last.clip(0, len(d) - 2)[..., None]
    low, high = np.take_along_axis(mc, i, -1)[..., 0], np.take_along_axis(mc, i + 1, -1)[..., 0]
    i = i[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.clip((mc_tol - low) / (high - low), 0, 1)
    inside = np.exp(np.log(d[i]) + share * (np.log(d[i + 1]) - np.log(d[i])))
    return np.where(last < 0, d[0], np.where(last == len(d) - 1, d[-1], inside))


def border_table(values: Any, densities: Any, mc: Any, *, mc_tol: float = MC_TOL) -> pd.DataFrame:
    """The border at each temperature with a 95% interval over dense seeds.

    Args:
        values: (T,) of the knob.
        densities: (D,) ascending.
        mc: (S, T, D), of S >= 2 dense seeds.
        mc_tol: what counts as a barrier.

    Returns:
        Columns ``value``, ``border`` (geometric mean), ``low``, ``high`` (Student's t on
        logarithms), and ``censored``: seeds whose border lies at either end of the densities.
    """
    found = border(densities, mc, mc_tol=mc_tol)
    ends = (found <= np.min(densities)) | (found >= np.max(densities))
    limits = np.exp([interval(np.log(column)) for column in found.T])
    return pd.DataFrame(
        {
            "value": values,
            "border": np.exp(np.log(found).mean(0)),
            "low": limits[:, 0],
            "high": limits[:, 1],
            "censored": ends.sum(0),
        }
    )


def advice(mc: Any, *, mc_tol: float = MC_TOL) -> Array:
    """Use 1: +1 to raise the temperature (Regime I), -1 to lower it (Regime II)."""
    return np.where(np.asarray(mc, float) < mc_tol, 1, -1)


def choose_dense(mc: Any, cka: Any, *, mc_tol: float = MC_TOL) -> Array:
    """Uses 2 and 3: index of the dense network (or SAM radius) to prune to a given density.

    Among connected candidates the most similar pair, otherwise the least barrier.

    Args:
        mc: (..., candidates) of their pruned and retrained pairs.
        cka: (..., candidates).
        mc_tol: what counts as a barrier.
    """
    mc, cka = np.asarray(mc, float), np.asarray(cka, float)
    connected = mc >= mc_tol
    return np.where(connected.any(-1), np.where(connected, cka, -np.inf).argmax(-1), mc.argmax(-1))


def score_advice(error: Any, advised: Any) -> tuple[Array, Array]:
    """How advice fares at the cells that have a hotter and a colder neighbour.

    Args:
        error: (T, D) held-out errors, hottest first.
        advised: (T, D), +1 to raise the temperature, -1 to lower it, 0 to stay.

    Returns:
        ``right`` (T - 2, D): 1 where the advised neighbour has the lower error of the two, 0 where
        the other one has, 0.5 for a tie or for 0; and the error after the advised step.
    """
    error, advised = np.asarray(error, float), np.asarray(advised)
    if error.shape != advised.shape or error.ndim != 2 or len(error) < 3:
        raise ValueError(
            f"error and advised: expected equal shapes (T >= 3, D), got {error.shape} and "
            f"{advised.shape}"
        )
    hotter, here, colder, sign = error[:-2], error[1:-1], error[2:], advised[1:-1]
    right = 0.5 + 0.5 * sign * np.sign(colder - hotter)
    return right, np.where(sign > 0, hotter, np.where(sign < 0, colder, here))
