"""Prune a pool by theory's margin, by prototypes, by EL2N or at random; train on what is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.integrate import quad
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from workbench.lab import data, seeded, train
from workbench.scaling_laws.data_pruning_scaling import (
    el2n_scores,
    perceptron_theory,
    prototype_scores,
    prune,
    simulate,
)
from workbench.scaling_laws.fit import fit_law
from workbench.scaling_laws.tiny_lm import tiny_lm_grid

POOLS = (1, 1.5, 2.5, 3.5, 5, 7, 10, 14, 20, 28, 40)
KEEPS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1)
DEGREES = (0, 10, 20, 40)


# --- the perceptron ------------------------------------------------------------------------------


def theory_table(
    seed: int,
    *,
    pools: Sequence[float] = POOLS,
    more: Sequence[float] = (60, 90, 140, 220, 350, 550, 800),
    keeps: Sequence[float] = KEEPS,
    degrees: Sequence[float] = DEGREES,
) -> dict[str, Any]:
    """Errors of the theory on a grid of probe angles, pools and kept shares.

    Args:
        seed: without effect; the theory draws nothing.
        pools: pool sizes per dimension at which hard and easy pruning are solved.
        more: larger pools, for hard pruning only: a frontier needs them.
        keeps: kept shares, the last one 1.
        degrees: angles between probe and teacher.

    Returns:
        The grids, ``hard`` of shape (degrees, pools + more, keeps), ``easy`` (degrees, pools,
        keeps) and ``random`` (pools, keeps).
    """
    theta = np.radians(np.asarray(degrees, float))[:, None, None]
    pool, keep = np.asarray([*pools, *more], float)[:, None], np.asarray(keeps, float)
    return {
        "degrees": np.asarray(degrees, float),
        "pools": pool[:, 0],
        "keeps": keep,
        "hard": perceptron_theory(pool, keep, theta=theta).error,
        "easy": perceptron_theory(pool[: len(pools)], keep, theta=theta, which="easy").error,
        "random": perceptron_theory(pool[: len(pools)] * keep).error,
    }


def replica_sides(alpha_tot: float, keep: float) -> tuple[np.ndarray, np.ndarray]:
    r"""Both sides of the paper's equations for a perfect probe, at the solved R and kappa.

    $$R = \frac{2\alpha_{tot}}{\sqrt{2\pi}s}\int_{-\infty}^{\kappa}\!Dt\,e^{-R^2t^2/2s^2}
        [1 - e^{-\gamma(\gamma-2Rt)/2s^2}](\kappa - t), \qquad
      1-R^2 = 2\alpha_{tot}\int_{-\infty}^{\kappa}\!Dt\,
        [H(-Rt/s) - H((\gamma-Rt)/s)](\kappa-t)^2$$

    with $s^2 = 1-R^2$, $H$ the Gaussian tail and $\gamma$ the margin up to which examples are kept,
    integrated by scipy: an account of the theory that shares nothing with its solver.
    """
    student = perceptron_theory(alpha_tot, keep)
    R, kappa = float(student.R), float(student.kappa)
    s, gamma = np.sqrt(1 - R * R), -ndtri((1 - min(keep, 1 - 1e-15)) / 2)

    def first(t: float) -> float:
        cut = 1 - np.exp(-gamma * (gamma - 2 * R * t) / (2 * s * s))
        return float(np.exp(-t * t / (2 * s * s)) * cut * (kappa - t)) / np.sqrt(2 * np.pi)

    def second(t: float) -> float:
        inside = ndtr((gamma - R * t) / s) - ndtr(-R * t / s)
        return float(np.exp(-t * t / 2) * inside * (kappa - t) ** 2) / np.sqrt(2 * np.pi)

    one = quad(first, -12 * s, kappa, epsabs=1e-12)[0] * 2 * alpha_tot / (np.sqrt(2 * np.pi) * s)
    two = quad(second, -12.0, kappa, epsabs=1e-12, points=[0.0])[0] * 2 * alpha_tot
    return np.array([R, 1 - R * R]), np.array([one, two])


def perceptron(
    seed: int, *, alpha_tot: float, keep: float, degrees: float = 0.0, dimension: int = 200
) -> dict[str, Any]:
    """Simulated errors of one pool size and share: hard, easy and random, and the theory's.

    The three share teacher, probe and pool: their draws start from the same state.

    Args:
        seed: of the draw.
        alpha_tot: pool size per dimension.
        keep: share kept.
        degrees: angle between probe and teacher.
        dimension: of the inputs.
    """
    theta = float(np.radians(degrees))
    row: dict[str, Any] = {}
    for which in ("hard", "easy", "random"):
        student = simulate(
            alpha_tot, keep, n=dimension, theta=theta, which=which, random_state=seed
        )
        row[which] = float(student.error)
        given = (keep * alpha_tot, 1.0) if which == "random" else (alpha_tot, keep)
        solved = perceptron_theory(*given, theta=theta, which="easy" if which == "easy" else "hard")
        row[f"theory_{which}"] = float(solved.error)
    return row


def deviations(runs: pd.DataFrame) -> pd.DataFrame:
    """Simulated means beside the theory's errors, a row each setting and way to choose.

    Args:
        runs: rows of `perceptron` over settings and at least two seeds.

    Returns:
        ``seen``, ``theory``, ``gap`` and ``z``, the gap in standard errors of the mean.
    """
    groups = runs.groupby(["alpha_tot", "keep", "degrees"])
    parts = []
    for which in ("hard", "easy", "random"):
        part = pd.DataFrame(
            {"seen": groups[which].mean(), "theory": groups[f"theory_{which}"].mean()}
        )
        part["gap"] = part.seen - part.theory
        parts.append(part.assign(which=which, z=part.gap / groups[which].sem()))
    return pd.concat(parts).reset_index()


# --- digits --------------------------------------------------------------------------------------


class Committee(nn.Module):
    """Networks of one hidden layer side by side, seeing the same batches from different starts."""

    def __init__(self, models: int, d: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(models, d, hidden) * (2 / d) ** 0.5)
        self.shift = nn.Parameter(torch.zeros(models, 1, hidden))
        self.second = nn.Parameter(torch.randn(models, hidden, classes) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (models, n, classes)."""
        return torch.relu(x @ self.first + self.shift) @ self.second


def early_probs(
    x: np.ndarray, y: np.ndarray, seed: int, *, models: int = 10, hidden: int = 64, epochs: int = 5
) -> np.ndarray:
    """Probabilities (models, n, classes) of networks on their own training set, early in training.

    Args:
        x: features (n, d).
        y: classes (n,).
        seed: of starts and batches.
        models: how many networks EL2N averages over.
        hidden: units of each.
        epochs: "early": about where the paper's source of EL2N finds its ranking settled.
    """
    inputs, labels = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    with seeded(seed):
        committee = Committee(models, x.shape[1], hidden, int(y.max()) + 1)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        wanted = target.expand(models, -1).flatten()
        return models * nn.functional.cross_entropy(logits.flatten(0, 1), wanted)

    train.fit(
        committee, loss, (inputs, labels), epochs=epochs, batch_size=min(64, len(y)), lr=2e-3,
        optimizer="adam", seed=seed,
    )  # fmt: skip
    with torch.no_grad():
        probs: np.ndarray = committee(inputs).softmax(-1).double().numpy()
    return probs.clip(0, 1)


def digits_pruned(
    seed: int,
    *,
    pool: int = 4000,
    name: str = "mnist5000",
    keeps: Sequence[float] = (0.25, 0.5),
    components: int = 50,
    models: int = 10,
    C: float = 10.0,
) -> dict[str, Any]:
    """Test errors (%) of a kernel machine trained on pruned pools of digits.

    Principal components of the pool are the embedding (no label in it) and the features. The
    learner is scikit-learn's SVC with a radial kernel; its width and ``C`` are the same for all.

    Args:
        seed: of split, pool, random subset, k-means and networks.
        pool: size of the pool.
        name: "mnist5000" or "digits".
        keeps: shares kept.
        components: principal components.
        models: networks of EL2N.
        C: of the SVC.

    Returns:
        ``full`` and, for 50 % kept, ``random_50``, ``prototype_hard_50``, ``prototype_easy_50``,
        ``el2n_hard_50``, ``el2n_easy_50``; ``agreement``, the rank correlation of both scores.
    """
    from sklearn.decomposition import PCA
    from sklearn.svm import SVC

    images = getattr(data, name)().flat
    parts = images.split(seed, pool=0.8, test=0.2)
    chosen = parts.pool if pool == len(parts.pool) else parts.pool.sample(pool, seed)
    pca = PCA(components, random_state=seed).fit(chosen.x)
    z, z_test = pca.transform(chosen.x).astype(float), pca.transform(parts.test.x).astype(float)
    z, z_test = z / z.std(), z_test / z.std()

    def error(rows: np.ndarray) -> float:
        learner = SVC(C=C, gamma=1 / components).fit(z[rows], chosen.y[rows])
        return float(100 * (learner.predict(z_test) != parts.test.y).mean())

    scores = {
        "prototype": prototype_scores(z, 10, random_state=seed),
        "el2n": el2n_scores(early_probs(z, chosen.y, seed, models=models), chosen.y),
    }
    chance = np.random.default_rng(seed).random(len(z))
    row: dict[str, Any] = {"full": error(np.arange(len(z)))}
    for keep in keeps:
        share = f"{100 * keep:.0f}"
        row[f"random_{share}"] = error(prune(chance, keep, labels=chosen.y))
        for metric, values in scores.items():
            for which in ("hard", "easy"):
                rows = prune(values, keep, which=which, labels=chosen.y)
                row[f"{metric}_{which}_{share}"] = error(rows)
    ranks = [pd.Series(values).rank() for values in scores.values()]
    return row | {"agreement": float(np.corrcoef(ranks)[0, 1])}


# --- tiny language models ------------------------------------------------------------------------


def decay_shape(seed: int, *, size: int, batch: int = 1, cut: float = 0.8e6) -> dict[str, Any]:
    """Forecast a run's losses from its first third, by a power law and by an exponential.

    Both have three parameters, one objective and as many starts: the exponential $E + A e^{-aD}$ is
    the power law in $e^D$. Nothing is pruned; this is the decay that pruning would have to beat.

    Args:
        seed: which of the table's seeds, counted round.
        size: which model, smallest first.
        batch: which batch size, smallest first.
        cut: tokens up to which a run is seen.

    Returns:
        Mean relative errors (%) after the cut, of both laws and of the last loss seen.
    """
    table = tiny_lm_grid()
    table = table[table.phase == "constant"]
    where = {"N": size, "batch": batch, "seed": seed % table.seed.nunique()}
    for column, position in where.items():
        table = table[table[column] == np.sort(table[column].unique())[position]]
    million = table.tokens / 1e6
    seen, later = (table.tokens <= cut).to_numpy(), (table.tokens > cut).to_numpy()
    row: dict[str, Any] = {"N": int(table.N.iloc[0])}
    for law, x, rates in (
        ("power", million, (0.05, 0.2, 0.5, 1.0)),
        ("exponential", np.exp(million), (0.5, 2.0, 5.0, 10.0)),
    ):
        points = pd.DataFrame({"x": x, "loss": table.loss})
        fit = fit_law(
            points[seen], "power", objective="lsq_log", seed=seed, quiet=True,
            starts={"E": (0.5, 1.5), "A": (0.3, 1.0), "alpha": rates},
        )  # fmt: skip
        forecast = np.asarray(fit.predict(x=points.x[later].to_numpy()))
        row[law] = float(100 * np.abs(forecast / points.loss[later] - 1).mean())
    last = float(table.loss[seen].iloc[-1])
    return row | {"last": float(100 * np.abs(last / table.loss[later] - 1).mean())}
