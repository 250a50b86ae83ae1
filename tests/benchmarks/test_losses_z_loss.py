"""One training step of an output layer with a million classes: factored against full softmax."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from workbench.lab import seeded
from workbench.losses.experiments.z_loss import FullSoftmax
from workbench.losses.spherical import FactoredOutput

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("every_core")]
CLASSES, FEATURES, BATCH = 1_000_000, 128, 64


def stepper(step: Callable[[Tensor, Tensor], object]) -> Callable[[], None]:
    """Each call takes a step on fresh rows and labels."""
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        h = torch.randn(BATCH, FEATURES, generator=generator)
        step(h, torch.randint(CLASSES, (BATCH,), generator=generator))

    return run


def test_z_loss_update_against_full_softmax(bench):
    """Forward, gradient for h, and update in place, 512 MB of weights each.

    The softmax reads and writes its weights and their gradient, 64 million outputs between; the
    factored step touches 64 of the million rows and a few matrices of 128 x 128.
    """
    with seeded(0):
        factored, full = FactoredOutput(CLASSES, FEATURES), FullSoftmax(CLASSES, FEATURES)

    def ours(h: Tensor, y: Tensor) -> None:
        factored.step(h, y, lr=0.1)

    def theirs(h: Tensor, y: Tensor) -> None:
        full(h.requires_grad_(), y).backward()
        full.update(lr=0.1)

    row = bench.side_by_side(
        f"Z-loss step, {CLASSES:,} classes, d = {FEATURES}, batch {BATCH}", "full softmax",
        stepper(ours), stepper(theirs), bar=20, input_mb=CLASSES * FEATURES * 4e-6,
    )  # fmt: skip
    assert factored.folds == 0  # no pass over V is hidden in the best time
    assert not row["memory_mb"] > 64  # nothing of the size of the classes was made


def test_z_loss_update_does_not_know_the_number_of_classes(bench):
    """The same step with a thousand classes; the peer is the one with a million."""
    with seeded(0):
        few, many = FactoredOutput(1000, FEATURES), FactoredOutput(CLASSES, FEATURES)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(BATCH, FEATURES, generator=generator)
    y = torch.randint(1000, (BATCH,), generator=generator)
    row = bench.side_by_side(
        f"Z-loss step, 1,000 classes, d = {FEATURES}, batch {BATCH}", "the same, 1,000,000 classes",
        lambda: few.step(h, y, lr=0.1), lambda: many.step(h, 1000 * y, lr=0.1), repeat=20,
    )  # fmt: skip
    assert row["ratio"] < 3
