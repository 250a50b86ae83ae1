"""Real predicted probabilities that authors released: the label-errors study.

Northcutt, Athalye, Mueller 2021, "Pervasive label errors in test sets destabilize machine learning
benchmarks", arXiv 2103.14749, released out-of-sample (cross-validated) probabilities and the given
labels of four test sets. They are not part of this package: `workbench data get label_errors`
fetches them, and `WORKBENCH_DATA` may name a folder that holds them.

What the files hold, so that nobody wonders: 74% of the 20news probabilities are exactly 0, among
them 61 of the labels' own (a logarithm needs a floor); IMDB rows sum to 1.00002, because 0.00001
was added to each entry; both are normalised here.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from workbench.lab import checks, data

SETS = ("cifar10", "mnist", "20news", "imdb")
CLASSES = {"cifar10": 10, "mnist": 10, "20news": 20, "imdb": 2}


class Released(NamedTuple):
    """Predicted probabilities and the labels given in the data set."""

    probs: Float[np.ndarray, "n k"]
    labels: Int[np.ndarray, " n"]


def available() -> bool:
    """True if the released files are on this machine."""
    return data.authors("label_errors") is not None


def load(name: str, folder: Path | None = None) -> Released:
    """Probabilities (rows normalised to sum to one) and given labels of one test set.

    Args:
        name: one of `SETS`.
        folder: where the files lie; by default found by `lab.data`.

    Raises:
        FileNotFoundError: the files are not here; the message says how to fetch them.
        ValueError: unknown name, or a file that does not hold what it should.
    """
    checks.one_of(name, SETS, "name")
    folder = data.require("label_errors") if folder is None else Path(folder)
    probs = _array(folder / "cross_validated_predicted_probabilities" / f"{name}_test_set_pyx.npy")
    labels = _array(folder / "original_test_labels" / f"{name}_test_set_original_labels.npy")
    probs = checks.as_probs(probs, f"{name} probabilities")
    if probs.shape[1] != CLASSES[name]:
        raise ValueError(f"{name}: expected {CLASSES[name]} classes, found {probs.shape[1]}")
    labels = checks.as_labels(labels, probs.shape[1], f"{name} labels")
    checks.same_length(probabilities=probs, labels=labels)
    return Released(probs / probs.sum(1, keepdims=True), labels)


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path.name}: not a plain NumPy array ({error})") from None
