"""Phase grids of a small network on noisily labelled digits, and how advice from them fares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from workbench import lab
from workbench.lab import checks, data
from workbench.lab.models import MLP, ResNet
from workbench.loss_landscapes.regimes import (
    MC_TOL,
    advice,
    border,
    choose_dense,
    score_advice,
)
from workbench.loss_landscapes.three_regime_pruning import PhaseGrid, Recipe, phase_grid

RULES = ("mc", "border", "constant", "temperature", "density")

WITH_BARRIERS: dict[str, Any] = {
    "network": "norm", "layers": 4, "width": 32, "noise": 0.0, "lr": 0.3, "batch_size": 25,
    "epochs": 20, "values": (2, 5, 10, 15, 20), "densities": (0.05, 0.1, 0.2, 0.5, 0.8),
}  # fmt: skip
"""Settings of `grid` under which Regime I exists; found by looking at connectivity alone."""


def digits(
    seed: int, *, train: int = 1000, pool: int = 4, noise: float = 0.2, device: str = "cpu"
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """MNIST-5000 averaged over squares: train (labels partly redrawn), valid and test (clean).

    Args:
        seed: of the split and of the redrawn labels.
        train: training rows; as many again are "valid", the rest is "test".
        pool: side of the squares; 4 makes 7 x 7 images.
        noise: share of training labels redrawn uniformly over all ten classes.
        device: where the tensors go.
    """
    images = data.mnist5000()
    share = train / len(images)
    split = images.split(seed, train=share, valid=share, test=1 - 2 * share)
    found = {}
    for part in ("train", "valid", "test"):
        x, y = split[part].tensors()
        found[part] = (F.avg_pool2d(x, pool), y.clone())
    x, y = found["train"]
    mean, spread = x.mean(), x.std()
    rng = np.random.default_rng(seed)
    redrawn = torch.from_numpy(rng.random(len(y)) < noise)
    y[redrawn] = torch.from_numpy(rng.integers(0, 10, int(redrawn.sum())))
    return {
        part: (((x - mean) / spread).to(device), y.to(device)) for part, (x, y) in found.items()
    }


def classifier(network: str, side: int, layers: int, width: int) -> nn.Module:
    """A network of ten classes for square images.

    Args:
        network: "plain", fully connected; "norm", the same with batch norm after each hidden layer;
            "residual", convolutional with batch norm and one block a stage.
        side: of the images.
        layers: hidden layers, or stages.
        width: of hidden layers, or of the first stage.
    """
    checks.one_of(network, ("plain", "norm", "residual"), "network")
    if network == "residual":
        return ResNet((1,) * layers, width)
    sizes = [side * side, *[width] * layers]
    if network == "plain":
        return MLP([*sizes, 10])
    hidden: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        hidden += [nn.Linear(d_in, d_out, bias=False), nn.BatchNorm1d(d_out), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def grid(
    seed: int,
    *,
    knob: str = "epochs",
    values: Sequence[float] = (2, 5, 10, 20, 30, 40),
    densities: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.5, 0.8),
    epochs: int = 40,
    batch_size: int = 50,
    lr: float = 0.1,
    network: str = "plain",
    layers: int = 2,
    width: int = 64,
    train: int = 1000,
    pool: int = 4,
    noise: float = 0.2,
    retrain_seeds: int = 2,
    chunk: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """One dense seed's phase grid: data, label noise, initialisation and orders all depend on it.

    Returns:
        The arrays of `PhaseGrid`; errors are shares, of the clean test rows (``error``, ``dense``)
        and of the clean validation rows (``valid``, ``dense_valid``).

    Args:
        seed: of everything.
        knob: "epochs", "batch_size" or "rho".
        values: of the knob.
        densities: shares of the weights that are kept.
        epochs, batch_size, lr: of training and of retraining.
        network: as for `classifier`.
        layers: as for `classifier`.
        width: as for `classifier`.
        train: training rows.
        pool: the images' side is 28 / pool.
        noise: share of training labels redrawn.
        retrain_seeds: how many.
        chunk: cells trained together.
        device: where to.
    """
    parts = digits(seed, train=train, pool=pool, noise=noise, device=device)
    with lab.seeded(seed):
        model = classifier(network, 28 // pool, layers, width)
    made: PhaseGrid = phase_grid(
        model.to(device),
        parts["train"],
        parts["test"],
        densities=densities,
        knob=knob,
        values=values,
        recipe=Recipe(epochs=epochs, batch_size=batch_size, lr=lr),
        seed=seed,
        retrain_seeds=range(retrain_seeds),
        more={"valid": parts["valid"]},
        chunk=chunk,
    )
    plain = {k: v for k, v in vars(made).items() if k not in ("more", "more_dense")}
    return plain | {"valid": made.more["valid"], "dense_valid": made.more_dense["valid"]}


def stacked(frame: pd.DataFrame, name: str) -> np.ndarray[Any, Any]:
    """A column of arrays as one array, seeds first."""
    return np.stack([np.asarray(value) for value in frame[name]])


def held_out(frame: pd.DataFrame, mc_tol: float = MC_TOL) -> pd.DataFrame:
    """Advice at each cell, judged on one dense seed at a time; what is learned comes from the rest.

    Rules, all of which say for a cell whether to raise or lower the temperature by one step:
    ``mc`` (the paper's: raise where the cell's own pair is separated), ``border`` (raise where the
    density lies below the border measured on the other seeds), ``constant`` (always raise or always
    lower, whichever was right more often on the other seeds), ``temperature`` (towards the one
    temperature with the lowest mean error on the other seeds) and ``density`` (per density the
    direction with the lower mean error on the other seeds: a table of answers, no measurement).

    Args:
        frame: rows of `grid`, at least two seeds.
        mc_tol: what counts as a barrier.

    Returns:
        A row a seed: ``right_<rule>``, percentage of inner cells where the advised neighbour has
        the lower test error of both; ``error_<rule>``, mean test error (%) after the step;
        ``error_stay``, without one; ``raise_<rule>``, how often it says raise (%).
    """
    error, mc = stacked(frame, "error"), stacked(frame, "mc")
    densities = np.asarray(frame["densities"].iloc[0])
    rows = []
    for s in range(len(frame)):
        others = np.delete(np.arange(len(frame)), s)
        learned = _learned(error[others], mc[others], densities, mc_tol)
        advised = {"mc": advice(mc[s], mc_tol=mc_tol), **learned}
        row: dict[str, Any] = {"seed": frame["seed"].iloc[s]}
        for rule in RULES:
            right, after = score_advice(error[s], advised[rule])
            row[f"right_{rule}"] = float(100 * right.mean())
            row[f"error_{rule}"] = float(100 * after.mean())
            row[f"raise_{rule}"] = float(100 * (advised[rule][1:-1] > 0).mean())
        rows.append(row | {"error_stay": float(100 * error[s, 1:-1].mean())})
    return pd.DataFrame(rows)


def _learned(error: Any, mc: Any, densities: Any, mc_tol: float) -> dict[str, np.ndarray[Any, Any]]:
    """Advice (T, D) of the rules that see the other seeds only."""
    shape = error.shape[1:]
    limit = np.exp(np.log(border(densities, mc, mc_tol=mc_tol)).mean(0))
    up, down = (
        np.mean([score_advice(e, np.full(shape, sign))[0] for e in error]) for sign in (1, -1)
    )
    best = error.mean((0, 2)).argmin()
    gain = (error[:, 2:] - error[:, :-2]).mean((0, 1))  # colder minus hotter neighbour
    return {
        "border": np.where(densities[None, :] < limit[:, None], 1, -1),
        "constant": np.full(shape, 1 if up > down else -1),
        "temperature": np.sign(np.arange(shape[0]) - best)[:, None] * np.ones(shape, int),
        "density": np.where(gain > 0, 1, -1)[None, :] * np.ones(shape, int),
    }


def best_values(frame: pd.DataFrame) -> pd.DataFrame:
    """Per seed and density the knob's best value, and the rank correlation of both.

    Returns:
        A row a seed: ``best`` (densities,), ``rho_rank``, Spearman's correlation of density and
        best value (0 where one value is best at all densities).
    """
    rows = []
    for _, row in frame.iterrows():
        best = np.asarray(row["values"])[np.asarray(row["error"]).argmin(0)]
        flat = len(set(best)) == 1
        rank = 0.0 if flat else float(spearmanr(row["densities"], best).statistic)
        rows.append({"seed": row["seed"], "best": best, "rank": rank})
    return pd.DataFrame(rows)


def choices(frame: pd.DataFrame, mc_tol: float = MC_TOL) -> pd.DataFrame:
    """Which dense network to prune: mean test error (%) over densities of each way to choose.

    ``mc`` is the paper's rule (`choose_dense`), ``dense`` takes the dense network with the lowest
    validation error, ``pruned`` the one whose pruned and retrained networks have the lowest
    validation error, ``constant`` the candidate that was best on average for the other seeds,
    ``oracle`` the lowest test error there is.

    Args:
        frame: rows of `grid`, at least two seeds.
        mc_tol: what counts as a barrier.
    """
    error = 100 * stacked(frame, "error")
    rows = []
    for s, (_, row) in enumerate(frame.iterrows()):
        here, columns = error[s], np.arange(error.shape[2])
        others = np.delete(error, s, 0)
        mc, cka = np.asarray(row["mc"]).T, np.asarray(row["cka"]).T
        chosen = {
            "mc": here[choose_dense(mc, cka, mc_tol=mc_tol), columns],
            "dense": here[np.argmin(row["dense_valid"])],
            "pruned": here[np.asarray(row["valid"]).argmin(0), columns],
            "constant": here[others.mean((0, 2)).argmin()],
            "oracle": here.min(0),
        }
        rows.append({"seed": row["seed"], **{k: float(v.mean()) for k, v in chosen.items()}})
    return pd.DataFrame(rows)
