"""A market of three sellers of digits: predict what larger purchases are worth, and choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.optimize import least_squares
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from workbench.lab import data
from workbench.scaling_laws.projektor import (
    FORMS,
    Projector,
    Stage1,
    Transport,
    calibrated_gradient,
    fit_stage1,
    project,
    select,
    simplex_grid,
)
from workbench.scaling_laws.tiny_lm import tiny_lm_grid

CLASSES = (range(4), range(4, 7), range(7, 10))
RICH = (0.2425, 0.32, 0.33)
"""Share of each class a seller is rich in, of the released script; the rest is spread evenly."""

WRONG = (0.0, 0.0, 0.3)
"""Share of a seller's labels drawn at random."""

WANTED = (22, 30, 90)
"""Validation images of each class of the three groups: the buyer needs 7, 8 and 9 most."""

BASELINES = ("linear", "pseudo-quadratic", "quadratic", "rational")
GRID = simplex_grid(3, 40)


@dataclass(frozen=True)
class Market:
    """Three sellers' stocks (features, labels as sold) and the buyer's validation set."""

    stocks: list[tuple[np.ndarray, np.ndarray]]
    x: np.ndarray
    y: np.ndarray

    def pilots(self, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The first n images of every stock, which are all that is shown of it."""
        return [(x[:n], y[:n]) for x, y in self.stocks]


def market(seed: int, stock: int = 1200, pilot: int = 180, features: int = 32) -> Market:
    """Sellers of MNIST's digits, each rich in other classes; the third has wrong labels.

    Args:
        seed: of the validation set, the stocks and the wrong labels.
        stock: images of a seller.
        pilot: images shown of each stock; with the validation images they define the features.
        features: principal components of the images, halved in resolution.
    """
    rng = np.random.default_rng(seed)
    images = data.mnist5000()
    pixels = images.x.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(images), -1)
    heaps = [rng.permutation(np.flatnonzero(images.y == c)) for c in range(10)]
    wanted = np.repeat(WANTED, [len(c) for c in CLASSES])
    valid = np.concatenate([h[:w] for h, w in zip(heaps, wanted, strict=True)])
    heaps = [h[w:] for h, w in zip(heaps, wanted, strict=True)]
    stocks = []
    for own, rich, wrong in zip(CLASSES, RICH, WRONG, strict=True):
        share = np.full(10, (1 - rich * len(own)) / (10 - len(own)))
        share[list(own)] = rich
        counts = np.floor(np.cumsum(share) * stock + 0.5).astype(int)
        counts = np.diff(counts, prepend=0)
        rows = np.concatenate([h[:c] for h, c in zip(heaps, counts, strict=True)])
        heaps = [h[c:] for h, c in zip(heaps, counts, strict=True)]
        rng.shuffle(rows)
        labels = np.where(rng.random(stock) < wrong, rng.integers(10, size=stock), images.y[rows])
        stocks.append((rows, labels))
    shown = np.concatenate([valid, *(rows[:pilot] for rows, _ in stocks)])
    embed = PCA(features, random_state=0).fit(pixels[shown])
    return Market(
        [(embed.transform(pixels[rows]), labels) for rows, labels in stocks],
        embed.transform(pixels[valid]),
        images.y[valid],
    )


def accuracy(
    seller: Market, q: np.ndarray, n: int, shown: int, rng: np.random.Generator, repeats: int
) -> float:
    """Validation accuracy in per cent of an RBF machine trained on n images with shares q.

    Args:
        seller: stocks and validation set.
        q: shares.
        n: images bought.
        shown: the first so many images of each stock can be drawn.
        rng: of the draws, without replacement.
        repeats: trainings to average.
    """
    counts = np.floor(np.cumsum(q) * n + 0.5).astype(int)
    found = []
    for _ in range(repeats):
        parts = [
            (x[rows], y[rows])
            for (x, y), c in zip(seller.stocks, np.diff(counts, prepend=0), strict=True)
            if len(rows := rng.choice(shown, c, replace=False))
        ]
        model = SVC(C=10.0).fit(*(np.concatenate(side) for side in zip(*parts, strict=True)))
        found.append(model.score(seller.x, seller.y))
    return float(100 * np.mean(found))


def train_pilots(seller: Market, Q: np.ndarray, n: int, *, repeats: int, seed: int) -> np.ndarray:
    """Accuracy of every mixture of Q at n images, trained on what the pilots show, shape (m,)."""
    rng = np.random.default_rng((seed, n))
    return np.array([accuracy(seller, q, n, n, rng, repeats) for q in Q])


# --- baselines


def fit_rational(
    Q: np.ndarray, acc: np.ndarray
) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    r"""The rational baseline: error = sum over terms of 1 / (lambda_j . q), lambda > 0.

    The number of terms, 1 to k, is chosen by leaving one mixture out.

    Returns:
        Predicted accuracy (per cent) as a function of shares, and the root mean square error of
        leaving one mixture out.

    Reference: Hashimoto, 2021, Model performance scaling with multiple data sources (ICML).
    """
    error, k = 100 - acc, Q.shape[1]

    def solve(terms: int, rows: np.ndarray, start: np.ndarray) -> np.ndarray:
        def parts(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            weights = np.exp(theta.reshape(terms, k))
            return weights, 1 / (Q[rows] @ weights.T)

        def residual(theta: np.ndarray) -> np.ndarray:
            return parts(theta)[1].sum(1) - error[rows]

        def slope(theta: np.ndarray) -> np.ndarray:
            weights, inverse = parts(theta)
            each = -(inverse**2)[:, :, None] * weights[None] * Q[rows][:, None]
            return each.reshape(len(Q[rows]), -1)

        found = least_squares(residual, start, slope, bounds=(-25, 25), max_nfev=60)
        best: np.ndarray = found.x
        return best

    def value(theta: np.ndarray, shares: np.ndarray) -> np.ndarray:
        weights = np.exp(theta.reshape(-1, k))
        total: np.ndarray = 100 - (1 / (shares @ weights.T)).sum(1)
        return total

    everyone = np.arange(len(Q))
    best: tuple[float, np.ndarray] = (np.inf, np.zeros(k))
    for terms in range(1, k + 1):
        level = -np.log(error.mean() / terms)
        tilt = 0.5 * np.eye(k)[:terms]
        theta = solve(terms, everyone, (level + tilt).ravel())
        left = [
            value(solve(terms, np.delete(everyone, i), theta), Q[[i]])[0] - acc[i] for i in everyone
        ]
        best = min(best, (float(np.sqrt(np.mean(np.square(left)))), theta), key=lambda b: b[0])
    return lambda shares: value(best[1], shares), best[0]


@dataclass
class Printed(Projector):
    """The selection gradient as printed beside the released code.

    It multiplies source i's calibrated gradient by that source's own b2 q^2 + b1 q + b0 alone,
    where the product rule asks for the sum over all sources.
    """

    def gradient(self, q: ArrayLike, n: float) -> np.ndarray:
        """The printed expression at both sizes, projected to n."""
        low, high = (
            _printed(f, np.asarray(q, float), *t(q))
            for f, t in zip(self.fits, self.transports, strict=True)
        )
        value: np.ndarray = project(n, self.n0, self.n1, low, high)
        return value


def _printed(fit: Stage1, q: np.ndarray, ot: float, potentials: np.ndarray) -> np.ndarray:
    k = len(q)
    c1, c2 = fit.plain[:k], fit.plain[k:]
    b0, b1, b2 = fit.moving[0], fit.moving[1 : k + 1], fit.moving[k + 1 :]
    own = b2 * q**2 + b1 * q + b0
    value: np.ndarray = own * calibrated_gradient(potentials, q)
    return value + (2 * b2 * q + b1) * ot + 2 * c2 * q + c1


# --- studies


def predict_market(
    seed: int,
    *,
    n0: int = 120,
    n1: int = 180,
    size: int = 1200,
    parts: int = 5,
    unseen: int = 15,
    repeats: int = 5,
    repeats_large: int = 3,
    iterations: int = 50,
) -> dict[str, Any]:
    """Train on pilots of two sizes, project accuracy to a size, buy it, and compare.

    Every form is fitted to the same trainings on the same mixtures, its ridge (number of terms for
    "rational") chosen by leaving one mixture out, at both sizes, and extrapolated by the same
    stage 2. ``err_{form}`` is the mean absolute error in points of accuracy over unseen mixtures at
    that size, ``inside_{form}`` at the pilots' size n1; ``_best`` is the baseline whose error of
    leaving one mixture out, over both sizes, is least. ``err_ols`` is the paper's form by ordinary
    least squares; ``err_power`` projects the logarithm of the error rate instead of the accuracy;
    ``err_measured`` projects, without stage 1, what the unseen mixtures themselves reach at n0 and
    n1; ``err_flat`` reads stage 1 at n1 as if it were the size. ``spread`` is the standard
    deviation of the accuracies to be predicted.

    ``regret_{choice}`` is the accuracy there that a choice of shares gives up against the best of
    all mixtures measured there: the paper's ascent (``projektor``), the gradient as printed, the
    gradient at n0 alone (which the released loop applies), the best baseline's optimum on a grid,
    that of the same projection as the ascent's (``optimum``), equal shares, and the best pilot
    mixture at n1.

    Args:
        seed: of the market and of all trainings.
        n0, n1: revealed sizes.
        size: of the purchase; all three stand in the ratios of the authors' example, 1,000 : 1,500
            : 10,000.
        parts: pilot mixtures are multiples of 1 / parts.
        unseen: random mixtures to predict.
        repeats, repeats_large: trainings averaged per mixture, small and large.
        iterations: of the selection.
    """
    rng = np.random.default_rng(seed + 1000)
    seller = market(seed, pilot=n1)
    Q = simplex_grid(3, parts)
    fresh = rng.dirichlet(np.ones(3), unseen)
    sizes, stock = (n0, n1), len(seller.stocks[0][1])
    acc = [train_pilots(seller, Q, m, repeats=repeats, seed=seed) for m in sizes]
    transports = [Transport(seller.pilots(m), (seller.x, seller.y)) for m in sizes]
    ot = [t.many(Q) for t in transports]
    ot_fresh = [t.many(fresh) for t in transports]

    fits = {
        form: [fit_stage1(Q, d, a, form=form) for d, a in zip(ot, acc, strict=True)]
        for form in FORMS
    }
    fits["ols"] = [fit_stage1(Q, d, a, ridges=[1e-10]) for d, a in zip(ot, acc, strict=True)]
    errors = {form: math.hypot(*(f.error for f in both)) for form, both in fits.items()}
    predicted = {
        form: [f.predict(fresh, d) for f, d in zip(both, ot_fresh, strict=True)]
        for form, both in fits.items()
    }
    rational = [fit_rational(Q, a) for a in acc]
    predicted["rational"] = [value(fresh) for value, _ in rational]
    errors["rational"] = math.hypot(*(left for _, left in rational))
    best = min(BASELINES, key=lambda form: errors[form])
    predicted["best"] = predicted[best]

    truth = np.array([accuracy(seller, q, size, stock, rng, repeats_large) for q in fresh])
    small, inside = (
        train_pilots(seller, fresh, m, repeats=repeats, seed=seed + 2000) for m in sizes
    )
    projected = {form: project(size, n0, n1, *both) for form, both in predicted.items()}
    projected |= {
        "measured": project(size, n0, n1, small, inside),
        "flat": predicted["projektor"][1],
    }
    for form, name in (("projektor", "power"), ("best", "best_power")):
        logs = [np.log(np.clip(100 - value, 1e-2, None)) for value in predicted[form]]
        projected[name] = 100 - np.exp(project(size, n0, n1, *logs))

    both_stages = (n0, n1, tuple(fits["projektor"]), tuple(transports))
    projector, printed = Projector(*both_stages), Printed(*both_stages)
    path = select(projector, size, iterations=iterations)
    bounds = [t.bound(GRID) for t in transports]
    over_grid = (
        [value(GRID) for value, _ in rational]
        if best == "rational"
        else [f.predict(GRID, np.zeros(len(GRID))) for f in fits[best]]
    )
    choices = {
        "projektor": path[-1],
        "printed": select(printed, size, iterations=iterations)[-1],
        "smallest": select(projector, n0, iterations=iterations)[-1],
        "best": GRID[np.argmax(project(size, n0, n1, *over_grid))],
        "uniform": np.full(3, 1 / 3),
        "pilot": Q[np.argmax(acc[1])],
        "optimum": GRID[np.argmax(projector.predict(GRID, size, ot=bounds))],
    }
    reached = {
        name: accuracy(seller, q, size, stock, rng, repeats_large) for name, q in choices.items()
    }
    top = max(truth.max(), *reached.values())
    return {
        **{f"err_{f}": float(np.abs(v - truth).mean()) for f, v in projected.items()},
        **{f"bias_{f}": float((v - truth).mean()) for f, v in projected.items()},
        **{f"inside_{f}": float(np.abs(v[1] - inside).mean()) for f, v in predicted.items()},
        **{f"loo_{f}": v for f, v in errors.items()},
        **{f"regret_{c}": float(top - v) for c, v in reached.items()},
        "spread": float(truth.std()),
        "best_form": best,
        "unseen": fresh,
        "truth": truth,
        **{f"projected_{f}": projected[f] for f in ("projektor", "best", "power")},
        "path": path,
        **{f"choice_{c}": q for c, q in choices.items()},
    }


def project_losses(made: str = "laptop") -> pd.DataFrame:
    """Stage 2 alone, on the losses of tiny language models: two budgets predict the largest.

    Returns:
        A row per size, batch and seed: what the log-linear projection of the loss (``bias_linear``)
        and of its logarithm (``bias_power``) predict too much, in per cent of the measured loss.
    """
    table = tiny_lm_grid(made)
    table = table[table.phase == "decayed"]
    rows = []
    for (size, batch, seed), run in table.groupby(["N", "batch", "seed"]):
        run = run.sort_values("budget")
        tokens, loss = run.tokens.to_numpy(float), run.loss.to_numpy()
        ends = {
            "linear": project(tokens[-1], tokens[0], tokens[1], loss[0], loss[1]),
            "power": np.exp(
                project(tokens[-1], tokens[0], tokens[1], np.log(loss[0]), np.log(loss[1]))
            ),
        }
        rows.append(
            {"N": size, "batch": batch, "seed": seed}
            | {f"bias_{name}": 100 * (value / loss[-1] - 1) for name, value in ends.items()}
        )
    return pd.DataFrame(rows)
