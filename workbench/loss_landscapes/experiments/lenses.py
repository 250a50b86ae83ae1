"""The six papers' measures of one and the same network, trained in five ways."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import models, seeded, train
from workbench.loss_landscapes import (
    ignite,
    implicit_bias_lm,
    interaction_basis,
    intrinsic_dimension,
    layers,
    model_soups,
    three_regime_pruning,
)
from workbench.loss_landscapes.experiments.variants import split
from workbench.loss_landscapes.geometry import SAM
from workbench.loss_landscapes.members import Recipe

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "SAM": {"rho": 0.1},
    "weight decay": {"weight_decay": 5e-3},
    "large batch": {"batch_size": 400},
    "stopped early": {"epochs": 4},
}
LENSES = {
    "few": ("intrinsic_dimension", "turned digits learnt in 200 directions (%)"),
    "soup": ("model_soups", "soup of two fine-tunings, gain (points)"),
    "mc": ("three_regime_pruning", "connectivity after pruning to 3%"),
    "fisher": ("implicit_bias_lm", "Fisher trace"),
    "climb": ("ignite", "gradient norm of the mean answer"),
    "directions": ("interaction_basis", "interacting directions"),
}
"""Column, paper and axis of each measure."""
HIDDEN = 48


def look(
    seed: int, *, way: str, epochs: int = 20, few: int = 200, steps: int = 150, tuned: int = 5
) -> dict[str, float]:
    """Train one multilayer perceptron on digits and look at it six times.

    Args:
        seed: of split, initialisation, orders and projections.
        way: a key of `WAYS`.
        epochs: passes, unless the way says otherwise.
        few: directions in which turned digits are learnt.
        steps: updates in them.
        tuned: epochs of a fine-tuning; of a retraining after pruning, twice as many.

    Returns:
        ``test_error`` in per cent, and a number for each key of `LENSES`.
    """
    (x, y), (test_x, test_y) = split(seed)
    made: dict[str, Any] = {"epochs": epochs, "batch_size": 32, "weight_decay": 0.0, "rho": 0.0}
    made |= WAYS[way]
    with seeded(seed):
        model = models.MLP((64, HIDDEN, 10))
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": made["weight_decay"]}
    base = partial(SAM, rho=made["rho"], **options) if made["rho"] else partial(
        torch.optim.SGD, **options
    )  # fmt: skip
    train.fit(
        model, F.cross_entropy, (x, y), epochs=made["epochs"], batch_size=made["batch_size"],
        optimizer=base, schedule="cosine", seed=seed,
    )  # fmt: skip
    return {
        "test_error": _error(model, test_x, test_y),
        "few": _turned(model, (x, y), (test_x, test_y), few, steps, seed),
        "soup": _soup(model, (x, y), (test_x, test_y), tuned, seed),
        "mc": _connectivity(model, (x, y), 2 * tuned, seed),
        "fisher": implicit_bias_lm.hessian_trace_fisher(model, (x[:300],), draws=None).value,
        "climb": float(
            ignite.ignite_grad(
                model, F.cross_entropy, x, y, lam=0.0, mean=lambda out: out.max(1).values
            ).norm
        ),
        "directions": _directions(model, x[:400]),
    }


def _error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float(three_regime_pruning.error_rate(model(x), y))


def _turned(
    model: nn.Module, rows: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], few: int,
    steps: int, seed: int,
) -> float:  # fmt: skip
    """Accuracy on digits turned by 90 degrees, learnt from here in a few random directions."""
    turned = [(x.rot90(1, (-2, -1)), y) for x, y in (rows, test)]
    found = intrinsic_dimension.train_subspaces(model, [few], *turned, seed=seed, steps=steps)
    return 100 * found[few]


def _soup(
    model: nn.Module,
    rows: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    epochs: int,
    seed: int,
) -> float:
    """Test accuracy of the average of two fine-tunings above the mean of their accuracies."""
    recipe = Recipe(epochs=epochs, batch_size=32, lr=0.1)
    tuned = three_regime_pruning.retrain(model, {}, rows, (seed, seed + 1000), recipe)
    states = [net.state_dict() for net in tuned]
    mixed = model_soups.soup_model(model, model_soups.uniform_soup(states))
    apart = sum(_error(net, *test) for net in tuned) / len(tuned)
    return apart - _error(mixed, *test)


def _connectivity(model: nn.Module, rows: tuple[Tensor, Tensor], epochs: int, seed: int) -> float:
    """Signed connectivity, in training error, of two retrainings after pruning to 3%."""
    masks = three_regime_pruning.magnitude_masks(model, 0.03)
    recipe = Recipe(epochs=epochs, batch_size=32, lr=0.1)
    a, b = three_regime_pruning.retrain(model, masks, rows, (seed, seed + 1000), recipe)
    return three_regime_pruning.mode_connectivity(a, b, rows).connectivity


def _directions(model: nn.Module, x: Tensor) -> float:
    r"""Participation ratio $(\sum\Lambda)^2/\sum\Lambda^2$ of the hidden interaction basis."""
    bases = interaction_basis.interaction_basis(layers.cut(model, x))
    hidden = bases[1].values
    return float(hidden.sum() ** 2 / hidden.square().sum())
