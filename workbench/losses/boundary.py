r"""A small classifier of points in the plane that is retrained in milliseconds, for any loss.

Scores are linear in Gaussian bumps on a grid and a constant,
$f(x)=w_0+\sum_jw_je^{-\|x-c_j\|^2/2s^2}$, and Adam with weight decay descends the loss of all
points at once. What a loss has to offer is its gradient with respect to the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from workbench.lab.checks import as_floats, count, positive, same_length

Array = np.ndarray[Any, np.dtype[Any]]
Pull = Callable[[Array, Array], Array]
Loss = Callable[[Tensor, Tensor], Tensor]

SIDE = 7  # bumps along each axis
REACH = 2.5  # the plane that is looked at, standardised units
STEEP = 73.0  # AnyLoss' amplifier
STEPS, RATE, DECAY = 150, 0.1, 1e-3


def bumps(x: Array) -> Array:
    """Features of points (n, 2): (n, 1 + 49), the constant first."""
    line = np.linspace(-REACH, REACH, SIDE)
    width = line[1] - line[0]
    near = np.exp(-((x[:, :, None] - line) ** 2) / (2 * width**2))  # (n, 2, side)
    grid = near[:, 0, :, None] * near[:, 1, None, :]
    return np.concatenate([np.ones((len(x), 1)), grid.reshape(len(x), -1)], 1)


def _anyloss(pull_on_soft: Callable[[Array, Array], Array]) -> Pull:
    """Chain rule from the amplified label a back to the score."""

    def pull(s: Array, y: Array) -> Array:
        p = expit(s)
        a = expit(STEEP * (p - 0.5))
        found: Array = pull_on_soft(a, y) * STEEP * a * (1 - a) * p * (1 - p)
        return found

    return pull


def _f1(a: Array, y: Array) -> Array:
    size, hits = y.sum() + a.sum(), (a * y).sum()
    found: Array = -2 * (y * size - hits) / size**2
    return found


def _balanced(a: Array, y: Array) -> Array:
    ones = y.sum()
    found: Array = -0.5 * (y / ones - (1 - y) / (len(y) - ones))
    return found


def _dice(s: Array, y: Array) -> Array:
    p = expit(s)
    top, bottom = 2 * (p * y).sum() + 1, (p * p).sum() + y.sum() + 1
    found: Array = -(2 * y * bottom - top * 2 * p) / bottom**2 * p * (1 - p)
    return found


def _of_margin(slope: Callable[[Array], Array]) -> Pull:
    def pull(s: Array, y: Array) -> Array:
        sign = 2 * y - 1
        found: Array = sign * slope(sign * s) / len(s)
        return found

    return pull


def _weighted(s: Array, y: Array) -> Array:
    ones = y.sum()
    share = y / ones + (1 - y) / (len(y) - ones)
    found: Array = (expit(s) - y) * share / 2
    return found


PULLS: dict[str, Pull] = {
    "logistic": _of_margin(lambda z: -expit(-z)),
    "logistic, classes weighted": _weighted,
    "hinge": _of_margin(lambda z: -1.0 * (z < 1)),
    "exponential": _of_margin(lambda z: -np.exp(-np.maximum(z, -5.0))),
    "least squares": _of_margin(lambda z: 2 * (z - 1)),
    "GCE, q = 0.7": _of_margin(lambda z: -(expit(z) ** 0.7) * expit(-z)),
    "MAE": _of_margin(lambda z: -expit(z) * expit(-z)),
    "AnyLoss, F1": _anyloss(_f1),
    "AnyLoss, balanced accuracy": _anyloss(_balanced),
    "dice": _dice,
}


def from_torch(loss: Loss) -> Pull:
    """The gradient of a loss of yours: ``loss(scores (n,), y (n,) in {0, 1}) -> scalar`` in torch.

    Raises:
        ValueError: the loss is not a scalar.
    """

    def pull(s: Array, y: Array) -> Array:
        at = torch.as_tensor(s).requires_grad_()
        value = loss(at, torch.as_tensor(y))
        if value.ndim:
            raise ValueError(f"loss: expected a scalar, got shape {tuple(value.shape)}")
        (slope,) = torch.autograd.grad(value, at)
        found: Array = slope.numpy()
        return found

    return pull


def fit(features: Array, y: Array, pull: Pull, steps: int = STEPS) -> Array:
    """Weights (d,) after that many steps of Adam from zero, all points at once.

    Args:
        features: (n, d), from `bumps`.
        y: (n,) of 0.0 and 1.0.
        pull: ``pull(scores (n,), y (n,)) -> (n,)``, gradient of the loss in the scores.
        steps: of Adam, rate 0.1, weight decay 1e-3 in the gradient.
    """
    w = np.zeros(features.shape[1])
    first, second = np.zeros_like(w), np.zeros_like(w)
    for step in range(1, count(steps, "steps") + 1):
        slope = features.T @ pull(features @ w, y) + DECAY * w
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope * slope
        scale = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        w = w - RATE / (1 - 0.9**step) * first / scale
    return w


@dataclass(frozen=True)
class Points:
    """Points of the plane in training and test parts, standardised; ``u`` decides who is flipped.

    Attributes:
        x, y: (n, 2) and (n,), training points, positives and negatives in the order in which they
            are kept when one class becomes rare.
        u: (n,), uniform in [0, 1); a label is wrong where u lies below the rate of noise.
        x_test, y_test: clean points to judge by.
    """

    x: Array
    y: Array
    u: Array
    x_test: Array
    y_test: Array

    def noisy(self, noise: float, ratio: float) -> tuple[Any, Array, Any]:
        """Features' rows kept, observed labels, and which of them are wrong."""
        ones, zeros = np.flatnonzero(self.y == 1), np.flatnonzero(self.y == 0)
        kept = np.concatenate([zeros, ones[: max(3, round(len(zeros) / ratio))]])
        wrong = self.u[kept] < noise
        return kept, np.abs(self.y[kept] - wrong), wrong


def points(x: Any, y: Any, *, seed: int = 0, most: int = 300) -> Points:
    """Points of yours, half of them for training; at most ``most`` each.

    Args:
        x: (n, 2) coordinates.
        y: (n,) of two different values; the larger is the positive class.
        seed: of split and noise.
        most: points in each part, evenly from both classes as far as they reach.

    Raises:
        ValueError: x has not two columns, there are not two classes, or too few points of one.
    """
    x = np.asarray(as_floats(x, "x", ndim=2), float)
    if x.shape[1] != 2:
        raise ValueError(f"x: expected two columns, got {x.shape[1]}")
    y = np.asarray(y)
    same_length(x=x, y=y)
    classes = np.unique(y)
    if len(classes) != 2:
        raise ValueError(f"y: expected two classes, got {len(classes)}")
    rng = np.random.default_rng(seed)
    share = int(positive(most, "most")) // 2
    parts: list[list[np.ndarray]] = [[], []]
    for label in classes:
        rows = rng.permutation(np.flatnonzero(y == label))
        if len(rows) < 10:
            raise ValueError(f"y: expected at least 10 points of each class, got {len(rows)}")
        half = len(rows) // 2
        parts[0].append(rows[:half][:share])
        parts[1].append(rows[half:][:share])
    train, test = (np.concatenate(p) for p in parts)
    # three decimals: what can be seen, and what an exported page carries
    scaled = np.round((x - x[train].mean(0)) / (x[train].std(0) + 1e-12), 3)
    target, u = (y == classes[1]).astype(float), np.round(rng.random(len(train)), 3)
    return Points(scaled[train], target[train], u, scaled[test], target[test])


def moons(seed: int = 0) -> Points:
    """Two interleaved half circles with noise, 150 points of each class in either part."""
    from sklearn.datasets import make_moons

    x, y = make_moons(600, noise=0.28, random_state=seed)
    return points(x, y, seed=seed)


def scores_of(predicted: Array, y: Array, prevalence: float) -> dict[str, float]:
    """Accuracy, balanced accuracy and F1 where positives are that frequent.

    Args:
        predicted: (n,) of 0/1 or bool.
        y: (n,) of 0.0 and 1.0, both present.
        prevalence: share of positives in what is judged; classes are weighted to it.
    """
    recall, spared = float(predicted[y == 1].mean()), float(1 - predicted[y == 0].mean())
    called = prevalence * recall + (1 - prevalence) * (1 - spared)
    return {
        "accuracy": prevalence * recall + (1 - prevalence) * spared,
        "balanced": (recall + spared) / 2,
        "f1": 2 * prevalence * recall / (prevalence + called),
    }
