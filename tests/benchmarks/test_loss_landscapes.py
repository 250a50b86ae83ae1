"""Slices of the loss, against the bare forward passes they need and the package for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import data, seeded
from workbench.loss_landscapes.geometry import Objective, random_plane, slice_2d
from workbench.loss_landscapes.geometry.objective import ROWS

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("every_core")]
SAMPLES = 1000
POINTS = {"digits": 51, "mnist5000": 7}  # a side; the cost is the same for every point


def network(side: int) -> nn.Module:
    """About 100,000 parameters."""
    left = side // 4
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64 * left**2, {8: 300, 28: 25}[side]), nn.ReLU(),
            nn.Linear({8: 300, 28: 25}[side], 10),
        ).eval()  # fmt: skip


def images(name: str) -> tuple[Tensor, Tensor]:
    found = {"digits": data.digits, "mnist5000": data.mnist5000}[name]()
    return torch.as_tensor(found.x[:SAMPLES]), torch.as_tensor(found.y[:SAMPLES])


@pytest.mark.parametrize("name", list(POINTS))
def test_a_slice_costs_its_forward_passes(name: str, bench: Any) -> None:
    x, y = images(name)
    model, points = network(x.shape[-1]), POINTS[name]
    size = sum(p.numel() for p in model.parameters())
    assert 9e4 < size < 1.1e5
    objective = Objective(model, F.cross_entropy, (x, y))
    plane = random_plane(objective, generator=0)
    what = f"slice {points} x {points}, CNN of {size:,} parameters, {SAMPLES:,} {name}"

    @torch.no_grad()
    def bare() -> None:
        for _ in range(points**2):
            F.cross_entropy(model(x), y).item()

    same = network(x.shape[-1]).to(memory_format=torch.channels_last)
    chunks = list(zip(x.split(ROWS), y.split(ROWS), strict=True))

    @torch.no_grad()
    def best() -> None:
        """In the layout and chunks that the slice uses."""
        for _ in range(points**2):
            sum(F.cross_entropy(same(u), v).item() for u, v in chunks)

    def ours() -> np.ndarray:
        return slice_2d(objective, *plane, points=points).values

    once = {"repeat": 1 if points > 40 else 2}
    bench.side_by_side(what, "bare forward passes", ours, bare, bar=1 / 1.1, **once)
    bench.side_by_side(what, "bare forward passes in the same layout", ours, best, **once)


@pytest.mark.parametrize(("name", "bar"), [("digits", None), ("mnist5000", 2.0)])
def test_a_slice_against_the_package(name: str, bar: float | None, bench: Any) -> None:
    """On 8 x 8 images no bar: the passes do 0.8 GFLOP in 9 ms, which two cores can hardly better,
    and the package makes the same passes. On 28 x 28 it is memory that costs, and chunks save it.
    """
    peer = pytest.importorskip("loss_landscapes")
    metrics = pytest.importorskip("loss_landscapes.metrics")
    x, y = images(name)
    model, points = network(x.shape[-1]), POINTS[name]
    objective = Objective(model, F.cross_entropy, (x, y))
    plane = random_plane(objective, generator=0)
    metric = metrics.Loss(nn.CrossEntropyLoss(), x, y)

    def theirs() -> np.ndarray:
        return peer.random_plane(
            model, metric, distance=1, steps=points, normalization="filter", deepcopy_model=True
        )

    bench.side_by_side(
        f"slice {points} x {points}, CNN of {objective.size:,} parameters, {SAMPLES:,} {name}",
        "loss-landscapes", lambda: slice_2d(objective, *plane, points=points), theirs, bar=bar,
        repeat=1 if points > 40 else 2,
    )  # fmt: skip
