"""The family's losses, forward and backward, beside cross-entropy and monai's dice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from workbench import losses
from workbench.losses.anyloss import one_vs_rest
from workbench.losses.comp_sum import comp_sum_loss
from workbench.losses.dice_loss import batch_dice
from workbench.losses.ldr_loss import ldr_kl

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("every_core")]
ROWS, CLASSES = 65_536, 1_000
MB = ROWS * CLASSES * 4e-6


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    """Logits 65,536 x 1,000 and their labels, as of a classifier that has learnt something.

    Of an untrained one with a thousand classes every amplified label is 0 up to 1e-16, and AnyLoss
    would be timed on denormal numbers.
    """
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, generator=source)
    y = torch.randint(CLASSES, (ROWS,), generator=source)
    logits[torch.arange(ROWS), y] += 7
    return logits, y


def stepper(loss: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """Forward and backward, gradients made anew each time."""
    logits, y = batch

    def step() -> None:
        at = logits.detach().requires_grad_()
        loss(at, y).backward()
        assert at.grad is not None

    return step


@pytest.mark.parametrize(
    ("name", "loss", "bar"),
    [
        ("comp-sum, tau 1.5", lambda h, y: comp_sum_loss(h, y, tau=1.5), 1 / 1.3),
        ("LDR-KL, lambda 10", lambda h, y: ldr_kl(h, y, lam=10.0, normalize=False), 1 / 1.3),
        ("LDR-KL, scores normalised", lambda h, y: ldr_kl(h, y, lam=10.0), None),
        ("AnyLoss F1, one against rest", lambda h, y: one_vs_rest(h, y, metric="f1"), 1 / 1.3),
        ("dice over the batch", batch_dice, 1 / 1.3),
    ],
)
def test_against_cross_entropy(bench, batch, name, loss, bar):
    bench.side_by_side(
        f"{name}, {ROWS:,} x {CLASSES:,}", "torch cross_entropy", stepper(loss, batch),
        stepper(F.cross_entropy, batch), bar=bar, input_mb=MB, repeat=8,
    )  # fmt: skip


def test_dice_against_monai(bench, batch):
    from monai.losses import DiceLoss

    peer = DiceLoss(softmax=True, to_onehot_y=True, batch=True, smooth_nr=1e-4, smooth_dr=1e-4)

    def theirs(logits: Tensor, y: Tensor) -> Tensor:
        found: Tensor = peer(logits, y[:, None])
        return found

    bench.side_by_side(
        f"dice over the batch, {ROWS:,} x {CLASSES:,}", "monai DiceLoss",
        stepper(batch_dice, batch), stepper(theirs, batch), bar=2, input_mb=MB, repeat=8,
    )  # fmt: skip


def test_a_moved_control_of_the_playground(bench):
    board = losses.playground()

    def moved() -> None:
        for loss in ("AnyLoss, F1", "logistic"):
            board.set(loss=loss)
            board.result(**board.state)

    bench.side_by_side("playground: two moves, each retrains", "limit of 2 x 50 ms", moved, 0.1,
                       bar=1)  # fmt: skip


def test_a_moved_control_of_the_margin_explorer(bench):
    board = losses.explore()

    def moved() -> None:
        for margin in (-1.0, 0.5):
            board.set(margin=margin)
            board.result(**board.state)

    bench.side_by_side("losses against the margin: two moves", "limit of 2 x 50 ms", moved, 0.1,
                       bar=1)  # fmt: skip
