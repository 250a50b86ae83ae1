"""One residual network trained in five ways: the canonical picture, and numbers beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import data, models, seeded, train
from workbench.loss_landscapes.geometry import (
    SAM,
    Objective,
    random_plane,
    sharpness_worst,
    slice_2d,
    top_eigs,
    trace,
)

TRAIN = 1200  # of the 1,797 digits; the others are the test set
VARIANTS: dict[str, dict[str, Any]] = {
    "as it should be": {},
    "no shortcuts": {"shortcuts": False},
    "no batch norm": {"norm": "none"},
    "large batch": {"batch_size": 256},
    "SAM": {"rho": 0.1},
}
"""What each network has that the first has not."""


class Nothing(nn.Module):
    """Answers zero, whatever it is given; in the place of a shortcut it leaves none."""

    def forward(self, x: Tensor) -> Tensor:
        """A zero that broadcasts."""
        return x.new_zeros(())


def network(
    blocks: tuple[int, ...] = (3, 3, 3), width: int = 8, *, norm: str = "batch",
    shortcuts: bool = True, seed: int = 0,
) -> nn.Module:  # fmt: skip
    """A residual network of ``2 * sum(blocks) + 2`` layers, or the same layers in a chain.

    Without batch norm the scale of the signal rests on the initialisation: He's, with the branches
    of residual blocks the smaller the more there are.
    """
    with seeded(seed):
        model = models.ResNet(blocks, width, norm=norm)
        if norm == "none":
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    for block in model.modules():
        if isinstance(block, models.ResidualBlock):
            if norm == "none" and shortcuts:
                block.path[3].weight.data.mul_(sum(blocks) ** -0.5)
            if not shortcuts:
                block.shortcut = Nothing()
    return model


def split(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Digits, shuffled by the seed: training and test rows."""
    digits = data.digits()
    order = torch.randperm(len(digits.x), generator=torch.Generator().manual_seed(seed))
    x, y = torch.as_tensor(digits.x)[order], torch.as_tensor(digits.y)[order]
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])


def trained(
    variant: str,
    seed: int,
    *,
    blocks: tuple[int, ...] = (3, 3, 3),
    width: int = 8,
    epochs: int = 8,
    lr: float = 0.05,
    kept: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """The network of a variant after SGD with momentum, weight decay 5e-4 and a cosine schedule.

    The learning rate grows with the square root of the batch size, over a batch of 32.

    Args:
        variant: a key of `VARIANTS`.
        seed: of split, initialisation and order.
        blocks: see `network`.
        width: see `network`.
        epochs: passes over the training rows.
        lr: at a batch of 32 rows.
        kept: called with the model after every epoch.
    """
    made = dict(VARIANTS[variant])
    batch_size, rho = made.pop("batch_size", 32), made.pop("rho", 0.0)
    model = network(blocks, width, seed=seed, **made)
    rate = lr * (batch_size / 32) ** 0.5
    options = {"lr": rate, "momentum": 0.9, "weight_decay": 5e-4}
    optimizer = partial(SAM, rho=rho, **options) if rho else partial(torch.optim.SGD, **options)
    watch = None if kept is None else partial(_note, kept)
    train.fit(
        model, F.cross_entropy, split(seed)[0], epochs=epochs, batch_size=batch_size,
        optimizer=optimizer, schedule="cosine", seed=seed, validation=watch,
    )  # fmt: skip
    return model


def _note(kept: Callable[[nn.Module], None], model: nn.Module) -> float:
    kept(model)
    return 0.0


def numbers(seed: int, *, variant: str, rows: int = 300, **settings: Any) -> dict[str, float]:
    """Train one variant and measure where it has come to.

    Returns:
        ``train_loss``, ``test_error`` in per cent; on the first ``rows`` training rows
        ``top``, the largest Hessian eigenvalue; ``trace`` of the Hessian; ``worst``, the largest
        rise of the loss when each weight moves by up to 5% of its size in the adaptive ball.
    """
    model = trained(variant, seed, **settings)
    (x, y), (test_x, test_y) = split(seed)
    objective = Objective(model, F.cross_entropy, (x[:rows], y[:rows]))
    wrong = Objective(model, error, (test_x, test_y))
    return {
        "train_loss": Objective(model, F.cross_entropy, (x, y))(),
        "test_error": 100 * wrong(),
        "top": float(top_eigs(objective, k=1, tol=1e-2, generator=seed).values[0]),
        "trace": trace(objective, draws=10, generator=seed).value,
        "worst": sharpness_worst(objective, rho=0.5, steps=10, adaptive=True),
    }


def picture(
    seed: int, *, variant: str, points: int = 21, span: float = 1.0, rows: int = 300,
    **settings: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Train one variant and slice its loss along two filter-normalised directions.

    Returns:
        ``side`` (points,) and ``loss`` (points, points), as in `slice_2d`.
    """
    model = trained(variant, seed, **settings)
    (x, y), _ = split(seed)
    objective = Objective(model, F.cross_entropy, (x[:rows], y[:rows]))
    found = slice_2d(objective, *random_plane(objective, generator=seed), span=span, points=points)
    return {"side": found.x, "loss": found.values}


def error(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows whose largest logit is not the label's."""
    return (logits.argmax(1) != labels).float().mean()
