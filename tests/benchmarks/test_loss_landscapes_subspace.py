"""One training step in a random subspace: fastfood against the dense matrix."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench.lab import seeded
from workbench.loss_landscapes.intrinsic_dimension import SubspaceModule
from workbench.loss_landscapes.random_projections import fwht

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("every_core")]
DIMENSIONS = 10_000
SHARE = 40  # the dense step is run with 1/40 of the columns: all of them are 40 GB


def network() -> nn.Module:
    """996,010 parameters."""
    with seeded(0):
        return nn.Sequential(nn.Linear(784, 660), nn.ReLU(), nn.Linear(660, 714), nn.ReLU(),
                             nn.Linear(714, 10))  # fmt: skip


def stepper(kind: str, d: int) -> tuple[Callable[[], None], int]:
    """A training step of Adam on 32 images, and how many parameters it moves."""
    sub = SubspaceModule(network(), d, kind=kind)
    optimizer = torch.optim.Adam(sub.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 784, generator=generator)
    y = torch.randint(10, (32,), generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(sub(x), y).backward()
        optimizer.step()

    return step, sub.P.D


def test_fastfood_step_against_the_dense_matrix(bench):
    """Both steps hold the network's own work; only the dense matrix's part grows with d.

    What is timed as the peer is a dense step with d = 250 (1 GB of matrix, read once forward and
    once backward) and the same step with d = 1; their difference, memory traffic in proportion to
    d, is multiplied by 40 and added to the latter.
    """
    ours, D = stepper("fastfood", DIMENSIONS)
    assert abs(D / 1e6 - 1) < 0.05
    part, _ = stepper("dense", DIMENSIONS // SHARE)
    rest, _ = stepper("dense", 1)
    bare, measured = _best(rest), _best(part)
    dense = bare + SHARE * (measured - bare)
    row = bench.side_by_side(
        f"subspace training step, D = {D:,}, d = {DIMENSIONS:,}",
        "dense matrix, 1/40 of its columns x 40", ours, dense, bar=10, repeat=5, input_mb=D * 4e-6,
    )  # fmt: skip
    # a few vectors of L = 2^20 numbers, where the dense matrix would take 40,000 MB
    assert not row["memory_mb"] > 200


def test_transform_against_butterflies(bench):
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    found = {}

    def ours() -> None:
        found["ours"] = fwht(x)

    def theirs() -> None:
        found["peer"] = _butterflies(x)

    bench.side_by_side("Walsh-Hadamard, 2^20 numbers", "log2 butterflies in torch", ours, theirs,
                       repeat=5)  # fmt: skip
    torch.testing.assert_close(found["ours"], found["peer"], rtol=1e-4, atol=1e-2)


def _butterflies(x: torch.Tensor) -> torch.Tensor:
    y, half = x.clone(), 1
    while half < len(y):
        pairs = y.view(-1, 2, half)
        y = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).view(-1)
        half *= 2
    return y


def _best(run: Callable[[], None], repeat: int = 5) -> float:
    run()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
