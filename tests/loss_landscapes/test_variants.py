"""The networks of the opening picture and of the closing comparison."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from workbench.lab import models
from workbench.loss_landscapes import figures_variants
from workbench.loss_landscapes.experiments import lenses, variants
from workbench.loss_landscapes.geometry import Objective, spectral_density

TINY = {"blocks": (1, 1), "width": 4, "epochs": 1}


def test_without_shortcuts_the_layers_are_a_chain() -> None:
    model = variants.network((2, 1), 4, shortcuts=False).eval()
    x = torch.randn(3, 1, 8, 8)
    through = x
    for layer in model.body:
        is_block = isinstance(layer, models.ResidualBlock)
        through = F.relu(layer.path(through)) if is_block else layer(through)
    torch.testing.assert_close(model.head(through), model(x))


def test_shortcuts_are_what_is_missing() -> None:
    x = torch.randn(3, 4, 8, 8)
    with_them, without = (
        next(m for m in variants.network((1,), 4, shortcuts=s).eval().modules()
             if isinstance(m, models.ResidualBlock))
        for s in (True, False)
    )  # fmt: skip
    torch.testing.assert_close(without(x), F.relu(without.path(x)))
    torch.testing.assert_close(with_them(x), F.relu(x + with_them.path(x)))


def test_without_batch_norm_the_signal_keeps_its_scale() -> None:
    x = torch.as_tensor(variants.split(0)[0][0][:100])
    model = variants.network((3, 3, 3), 8, norm="none").eval()
    assert 0.05 < model(x).std().item() < 20
    assert not any("running_mean" in name for name in model.state_dict())


def test_a_picture_has_the_training_point_in_its_middle() -> None:
    found = variants.picture(0, variant="no shortcuts", points=5, rows=40, **TINY)
    model = variants.trained("no shortcuts", 0, **TINY)
    (x, y), _ = variants.split(0)
    assert found["side"][2] == 0
    assert found["loss"][2, 2] == pytest.approx(
        Objective(model, F.cross_entropy, (x[:40], y[:40]))(), rel=1e-5
    )


def test_numbers_of_a_variant() -> None:
    epochs = []
    model = variants.trained("SAM", 1, kept=lambda m: epochs.append(m), **(TINY | {"epochs": 2}))
    assert len(epochs) == 2 and epochs[0] is model
    found = variants.numbers(1, variant="SAM", rows=30, **(TINY | {"epochs": 2}))
    _, (x, y) = variants.split(1)
    with torch.no_grad():
        wrong = (model(x).argmax(1) != y).double().mean()
    assert found["test_error"] == pytest.approx(100 * float(wrong), abs=1e-3)
    assert found["top"] > 0 and found["worst"] > 0


def test_every_lens_looks_and_looks_the_same_twice() -> None:
    small = {"epochs": 1, "few": 8, "steps": 3, "tuned": 1}
    first, again = (lenses.look(0, way="plain", **small) for _ in range(2))
    assert set(first) == {"test_error", *lenses.LENSES}
    assert first == again
    assert all(np.isfinite(v) for v in first.values())
    assert 1 <= first["directions"] <= lenses.HIDDEN


def test_figures_draw_every_panel() -> None:
    side = np.linspace(-1, 1, 5)
    bowl = 0.1 + side[:, None] ** 2 + side**2
    pictures = pd.DataFrame({"variant": ["a", "b"], "side": [side] * 2, "loss": [bowl, 2 * bowl]})
    _, axes = plt.subplots(1, 2)
    figures_variants.draw_slices(pictures, axes)
    assert [ax.get_title() for ax in axes] == ["a", "b"]
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.random((6, 1 + len(lenses.LENSES))) + 1,
                         columns=["test_error", *lenses.LENSES])  # fmt: skip
    frame["way"] = ["plain", "SAM"] * 3
    _, axes = plt.subplots(2, 3)
    figures_variants.draw_lenses(frame, lenses.LENSES, axes.ravel())
    assert all(ax.get_xlabel() for ax in axes.ravel())
    _, ax = plt.subplots()
    spectrum = spectral_density(lambda v: v * torch.arange(1.0, 21), size=20, generator=0)
    figures_variants.draw_densities({"ramp": spectrum}, ax)
    low, high = ax.get_xlim()
    assert -1 < low < 1 and 20 < high < 23, "the axis ends where the density does"
    text = figures_variants.table(frame.rename(columns={"way": "variant"}), {"test_error": "e"})
    assert list(text.index) == ["plain", "SAM"] and "[" in text.iloc[0, 0]
    plt.close("all")
