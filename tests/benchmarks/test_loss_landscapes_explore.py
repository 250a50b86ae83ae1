"""The loss-landscape explorer: how long until the first picture, and until a move is answered."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from torch import nn

from workbench.loss_landscapes import explore

pytestmark = pytest.mark.bench


@pytest.fixture
def network():
    """A network of 100,058 parameters and 1,000 samples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 64, generator=generator)
    y = torch.randint(10, (1000,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, 288), nn.ReLU(), nn.Linear(288, 272), nn.ReLU(), nn.Linear(272, 10)
        )
    assert sum(p.numel() for p in model.parameters()) == 100_058
    return model, nn.functional.cross_entropy, (x, y)


@pytest.fixture
def open_explorer(network):
    """`open_explorer()`: refined in the background, closed at the end."""
    made = []

    def show():
        made.append(explore(*network, background=True))
        made[-1].result()
        return made[-1]

    yield show
    for explorer in made:
        explorer.close()


def test_the_first_picture_is_there_within_a_second(bench, open_explorer):
    def first():
        explorer = open_explorer()
        assert explorer.landscape.grids["filter 1"].evaluated >= 9
        explorer.close()

    bench.side_by_side(
        "loss landscape: first picture, 100k parameters, 1,000 samples", "1 s", first, 1.0, bar=1,
    )  # fmt: skip


def test_a_move_is_answered_in_50_ms_while_the_background_works(bench, open_explorer):
    explorer = open_explorer()
    face = explorer.face()
    places = itertools.cycle(np.linspace(-0.9, 0.9, 37).round(2).tolist())
    drag = explorer.handles[0]

    def move():
        explorer.drag(drag, next(places), next(places))
        assert explorer.landscape.busy

    move()
    bench.side_by_side(
        "loss landscape: a dragged centre, computed and drawn, while refining", "0.05 s", move,
        0.05, bar=1, repeat=15,
    )  # fmt: skip
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        move()
        seconds.append(time.perf_counter() - start)
        time.sleep(0.02)
    print(f"median of 15 moves: {1e3 * np.median(seconds):.1f} ms, most {1e3 * max(seconds):.1f}")
    assert not face.message.value
