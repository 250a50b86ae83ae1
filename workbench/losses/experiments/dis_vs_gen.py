"""Samples that two classifiers need: Gaussians of many dimensions, and features of digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from workbench.lab import data, models, seeded, train
from workbench.losses.dis_vs_gen import (
    GaussianClasses,
    SharedVarianceNB,
    crossing,
    error_curves,
    first_passage,
    growth_exponent,
    learning_curves,
    paper_models,
)

CODE = 64  # features of either network trained here
WIDE = 0.1  # a variance floor worth noticing: features are scaled to [0, 1]


def growth(
    seed: int,
    *,
    K: int,
    dims: Sequence[int] = (100, 200, 400),
    excess: float = 0.01,
    correlation: float = 0.0,
    separation: float | None = None,
    largest: int = 0,
) -> dict[str, Any]:
    """Samples to within an excess of the Bayes error, over the number of features.

    Sample sizes double from 2 K on, where the paper begins; both classifiers see the same samples.
    A curve ends where both have arrived, or at 100 n as in the paper, or at ``largest``.

    Args:
        seed: of the samples.
        K: number of classes.
        dims: numbers of features, rising.
        excess: added to the Bayes error; the paper's value is 0.01.
        correlation: of any two features within a class; the paper's is 0.
        separation: of the nearest means, whatever n is; the paper's grows with n.
        largest: if given, every curve runs to this size, and nothing is said of exponents.
    """
    curves: list[pd.DataFrame] = []
    samples: dict[str, list[float]] = {"nb": [], "lr": []}
    for n in dims:
        classes = GaussianClasses(K, n, correlation, separation)
        target = classes.bayes_error + excess
        end = largest or 100 * n
        sizes = [2 * K << j for j in range(int(np.log2(end / (2 * K))) + 1)]
        curve = error_curves(
            paper_models(), classes, sizes, until=-1.0 if largest else target, seed=seed
        )
        curves.append(curve.assign(n=n))
        for name, found in samples.items():
            found.append(first_passage(curve.m, curve[name], target))
    table = pd.concat(curves)
    out: dict[str, Any] = {f"curve_{name}": table[name].to_numpy() for name in table}
    out |= {f"m_{name}": np.array(found) for name, found in samples.items()}
    if not largest:
        out |= {f"exponent_{q}": growth_exponent(dims, found) for q, found in samples.items()}
    return out | {"dims": np.array(dims)}


def feature_curves(
    seed: int,
    *,
    kind: str,
    features: Any = None,
    shots: Sequence[int] = (1, 2, 5, 10, 20, 50, 100, 300),
    tuned: int = 20,
    rows: int = 5000,
    epochs: tuple[int, int] = (3, 6),
    tolerance: float = 0.02,
) -> dict[str, Any]:
    """Errors over the number of images a class, on five digits that no network here was trained on.

    The seed draws the five digits; the other five train the networks. 40% of the images of the
    five are for testing.

    Args:
        seed: of the split into digits, of the networks and of the samples.
        kind: "pixels"; "cnn", trained on the labels of the other five digits; "autoencoder",
            trained to restore their images; or any other name, with ``features``.
        features: (rows, n) of each image of ``mnist5000().sample(rows, 0)``.
        shots: images a class in the training set, rising.
        tuned: up to this many, C and eps are also chosen by cross validation.
        rows: how many images of MNIST-5000.
        epochs: of the convolutional network and of the autoencoder.
        tolerance: how near its own last error a classifier must come, for ``arrived_*``.

    Returns:
        ``m``, and errors over it: ``nb``, ``lr``, ``nb_wide`` (naive Bayes with 0.1 added to its
        variances) and tuned ones (NaN above ``tuned``); ``few_*``, their means over at most 5
        images a class; ``middle_*``, over 5 up to ``tuned``; ``last_*``; ``arrived_*``, log2 of the
        samples that take each to within ``tolerance`` of its own last error; ``crossing``.
    """
    images = data.mnist5000().sample(rows, 0)
    digits = np.random.default_rng(seed).permutation(10)
    base, novel = np.isin(images.y, digits[:5]), np.isin(images.y, digits[5:])
    if features is None:
        seen = torch.from_numpy(images.x[base]), torch.from_numpy(images.y[base])
        encode = {"pixels": _pixels, "cnn": _supervised, "autoencoder": _restored}[kind]
        X = encode(torch.from_numpy(images.x[novel]), *seen, epochs, seed)
    else:
        X = np.asarray(features)[novel]
    y = images.y[novel]
    each = np.asarray(shots)
    m = 5 * each
    options: dict[str, Any] = {"repeats": 1, "balanced": True, "seed": seed}
    plain = learning_curves(
        X.astype(float), y, m.tolist(),
        models=paper_models() | {"nb_wide": SharedVarianceNB(WIDE)}, **options,
    )  # fmt: skip
    chosen = learning_curves(
        X.astype(float), y, m[each <= tuned].tolist(), models={}, tune=True, **options
    )
    curves = plain.merge(chosen[["m", "nb_tuned", "lr_tuned"]], on="m", how="left")
    few, middle = curves[each <= 5], curves[(each >= 5) & (each <= tuned)]
    out: dict[str, Any] = {"kind": kind, "n": X.shape[1], "shots": each, "m": m}
    for name in ("nb", "lr", "nb_wide", "nb_tuned", "lr_tuned"):
        out[name] = curves[name].to_numpy()
        out[f"few_{name}"] = float(few[name].mean())
        out[f"middle_{name}"] = float(middle[name].mean())
    for name in ("nb", "lr"):
        last = out[name][-1]
        out[f"last_{name}"] = float(last)
        out[f"arrived_{name}"] = float(np.log2(first_passage(m, out[name], last + tolerance)))
    return out | {"crossing": crossing(m, out["nb"], out["lr"])}


def _pixels(x: torch.Tensor, *_: Any) -> np.ndarray:
    return x.flatten(1).numpy()


def _supervised(
    x: torch.Tensor, base: torch.Tensor, y: torch.Tensor, epochs: tuple[int, int], seed: int
) -> np.ndarray:
    """Features of a small convolutional network that tells the other five digits apart."""
    _, codes = y.unique(return_inverse=True)
    with seeded(seed):
        model = models.CNN((8, 16, CODE), 5)
    train.fit(
        model, F.cross_entropy, (base, codes), epochs=epochs[0], batch_size=64, lr=3e-3,
        schedule="cosine", seed=seed,
    )  # fmt: skip
    return _through(model.features, x)


def _restored(
    x: torch.Tensor, base: torch.Tensor, y: torch.Tensor, epochs: tuple[int, int], seed: int
) -> np.ndarray:
    """Code of an autoencoder trained on images of the other five digits, without labels."""
    pixels = base[0].numel()
    with seeded(seed):
        encoder = nn.Sequential(models.MLP((pixels, 256, CODE)), nn.ReLU())
        model = nn.Sequential(encoder, models.MLP((CODE, 256, pixels)))
    flat = base.flatten(1)
    train.fit(model, F.mse_loss, (flat, flat), epochs=epochs[1], batch_size=64, lr=1e-3, seed=seed)
    return _through(encoder, x)


@torch.no_grad()
def _through(network: Any, x: torch.Tensor) -> np.ndarray:
    return torch.cat([network(part) for part in x.split(500)]).numpy()


# --- tables for figures --------------------------------------------------------------------------


def simulated(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of `growth` as one row a K, n, m and seed, with errors ``nb`` and ``lr``."""
    columns = {f"curve_{q}": q for q in ("n", "m", "nb", "lr")}
    return _long(frame[["K", "seed", *columns]].rename(columns=columns))


def measured(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of `feature_curves` as one row a kind, m and seed."""
    columns = ["kind", "n", "seed", "m", "shots", "nb", "lr", "nb_wide", "nb_tuned", "lr_tuned"]
    return _long(frame[columns]).assign(K=5)


def _long(frame: pd.DataFrame) -> pd.DataFrame:
    """One row an entry of the arrays."""
    arrays = [q for q in frame if isinstance(frame[q].iloc[0], np.ndarray)]
    long = frame.explode(arrays, ignore_index=True)
    return long.astype(dict.fromkeys(arrays, float)).astype({"n": int, "m": int})


def exponents(frame: pd.DataFrame) -> pd.DataFrame:
    """Exponents of `growth` averaged over K, one row a seed: the pairs of the claim."""
    columns = ["exponent_nb", "exponent_lr"]
    means = frame.groupby("seed", as_index=False)[columns].mean()
    means.attrs = dict(frame.attrs)
    return means
