"""Pictures keep what they show and lose bytes."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from workbench import plots
from workbench.plots import picture


@pytest.fixture
def figure():
    with plots.style():
        made = Figure(figsize=(6, 4))
        ax = made.add_subplot()
        z = np.linspace(0, 6, 200)
        for k in range(5):
            ax.plot(z, np.sin(z + k), label=str(k))
        ax.legend()
    return made


def full(figure):
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


def pixels(png):
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"), float)


def test_a_picture_weighs_half_and_looks_the_same(figure):
    before, after = full(figure), picture.smaller(full(figure))
    assert len(after) < 0.5 * len(before)
    assert pixels(after).shape == pixels(before).shape
    off = np.abs(pixels(after) - pixels(before))
    assert off.mean() < 1 and np.quantile(off, 0.999) < 60


def test_paper_is_white_where_a_picture_was_transparent():
    stream = io.BytesIO()
    hidden = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    hidden[..., 3] = 0
    Image.fromarray(hidden, "RGBA").save(stream, format="png")
    assert (pixels(picture.smaller(stream.getvalue())) == 255).all()


def test_fills_and_lines_keep_their_exact_colours():
    made = Figure(figsize=(4, 4))
    ax = made.add_subplot()
    ax.imshow(np.arange(16.0).reshape(4, 4), cmap="viridis")
    before, after = full(made), picture.smaller(full(made))
    colours, counts = np.unique(pixels(before).reshape(-1, 3), axis=0, return_counts=True)
    kept = {tuple(c) for c in np.unique(pixels(after).reshape(-1, 3), axis=0)}
    frequent = colours[np.argsort(-counts)[:17]]
    assert all(tuple(c) in kept for c in frequent)  # 16 cells and the paper


def test_a_smooth_map_keeps_its_hues():
    made = Figure(figsize=(5, 4))
    z = np.linspace(0, 1, 41)
    made.add_subplot().imshow(np.sin(3 * z[:, None]) + z**2, cmap="RdBu")
    off = np.abs(pixels(picture.smaller(full(made))) - pixels(full(made)))
    assert off.max() < 100 and np.quantile(off, 0.99) <= 14


def test_a_photograph_comes_back_unchanged():
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, format="png")
    assert picture.smaller(stream.getvalue()) == stream.getvalue()


def test_nothing_grows():
    stream = io.BytesIO()
    Image.new("1", (2, 2)).save(stream, format="png", optimize=True)
    tiny = stream.getvalue()
    assert len(picture.smaller(tiny)) <= len(tiny)
