"""The experiment of all losses: its data, its noise, its bookkeeping, its figures."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from workbench.losses import figures_side_by_side as figures
from workbench.losses import zoo
from workbench.losses.experiments import side_by_side

SMALL: dict[str, Any] = {
    "losses": ("cross_entropy", "gce", "z_loss", "bag_means"), "repeats": 2, "steps": 6,
    "hidden": 4, "rows": 300, "lrs": (1e-2, 3e-2),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"table": name, **side_by_side.trial(seed=0, table=name, **SMALL)}
            for name in ("iris", "phishing", "land_vs_satan")
        ]
    )


def test_one_trial(runs: pd.DataFrame) -> None:
    iris, phishing, _ = runs.to_dict("records")
    assert list(iris["losses"]) == ["cross_entropy", "gce", "z_loss", "bag_means", "naive_bayes"]
    assert "z_loss" not in phishing["losses"] and phishing["rows"] == 300
    assert list(iris["conditions"]) == list(side_by_side.CONDITIONS[:6])  # too few rows for 1:100
    assert iris["accuracy"].shape == (6, 2, 5)
    assert iris["accuracy"][0, :, -1].min() > 0.8  # naive Bayes on clean iris
    again = side_by_side.trial(seed=0, table="iris", **SMALL)
    assert np.array_equal(again["accuracy"], iris["accuracy"])


def test_classes_are_numbered_by_size_and_samples_keep_their_shares() -> None:
    for name in ("shuttle", "anes96", "abalone19"):
        X, y = side_by_side.load(name, 500, seed=1)
        sizes = np.bincount(y)
        assert len(X) == len(y) <= 501 and (np.diff(sizes) <= 1).all()
    full = side_by_side.load("abalone19", 10**6, seed=1)[1]
    assert np.bincount(full).tolist() == [4142, 32]


def test_noise_has_its_rate_and_its_direction() -> None:
    y = torch.arange(20_000) % 2
    source = torch.Generator().manual_seed(0)
    one_sided = side_by_side.corrupted(y, "class_dependent", 0.4, 2, source)
    assert torch.equal(one_sided[y == 1], y[y == 1])
    assert float((one_sided != y)[y == 0].double().mean()) == pytest.approx(0.4, abs=0.02)
    y = torch.arange(20_000) % 4
    cyclic = side_by_side.corrupted(y, "class_dependent", 0.2, 4, source)
    moved = cyclic != y
    assert torch.equal(cyclic[moved], (y[moved] + 1) % 4)
    either = side_by_side.corrupted(y, "symmetric", 0.2, 4, source)
    assert float((either != y).double().mean()) == pytest.approx(0.2, abs=0.02)


def test_the_test_part_is_left_alone_and_rare_classes_become_rarer() -> None:
    X, y = side_by_side.load("pima", 1500, 0)
    split = side_by_side._split("pima", X, y, 0.25, 0.2, 5, [0, 0])
    for condition in side_by_side.CONDITIONS:
        problem = side_by_side._problem(split, condition, 2)
        assert np.array_equal(problem["y_test"], split["y_test"])
        assert len(problem["x_train"]) == len(problem["y_train"])
        if condition in side_by_side.RARE:
            sizes = np.bincount(problem["y_train"])
            assert sizes[1] == round(sizes[0] / side_by_side.RARE[condition])
    rows = [len(split[f"y_{part}"]) for part in ("train", "validate", "test")]
    assert sum(rows) == 768 and rows == pytest.approx([460.8, 115.2, 192], abs=3)
    assert side_by_side.supports(y, 10) and not side_by_side.supports(y[:200], 100)


def test_images_are_compressed_by_the_training_part_alone() -> None:
    X, _ = side_by_side.load("mnist5000", 1500, 0)
    assert X.shape == (5000, 784)
    train, test = np.arange(200), np.arange(200, 260)
    a = side_by_side.inputs("mnist5000", X, train, test, parts=6, seed=0)
    changed = X.copy()
    changed.iloc[test] = 0.5
    b = side_by_side.inputs("mnist5000", changed, train, test, parts=6, seed=0)
    assert torch.equal(a[0], b[0]) and a[1].shape == (60, 6)
    assert float(a[0].square().mean()) == pytest.approx(1, abs=0.02)


def test_tidy_blocks_and_differences_by_hand(runs: pd.DataFrame) -> None:
    frame = side_by_side.tidy(runs)
    assert len(frame) == 2 * (6 * 5 + 6 * 4 + 5 * 4)  # 6, 6 and 5 conditions
    cell = frame.query("table == 'iris' and condition == 'imbalance 1:10' and repeat == 1")
    iris = runs.iloc[0]
    assert cell["score"].tolist() == pytest.approx(iris["balanced_accuracy"][5, 1].tolist())
    clean = side_by_side.blocks(frame, ["clean"])
    assert clean.loc["iris", "GCE"] == pytest.approx(iris["accuracy"][0, :, 1].mean())
    assert clean["Z-loss"].isna().tolist() == [False, True, True]
    both = side_by_side.blocks(frame, list(side_by_side.RARE))
    assert "iris" not in both.index  # it has only one of the two

    table = side_by_side.against(frame).set_index(["condition", "label"])
    d = 100 * (clean["GCE"] - clean["cross-entropy"])
    row = table.loc[("clean", "GCE")]
    assert row["difference"] == pytest.approx(d.mean()) and row["tables"] == 3
    assert table.loc[("clean", "Z-loss"), "tables"] == 1
    assert np.isnan(table.loc[("clean", "Z-loss"), "rank"])
    ranked = side_by_side.rankings(frame)["clean labels"]
    assert set(ranked.ranks) == {"cross-entropy", "GCE", "bag means of 4", "naive Bayes"}
    assert sum(ranked.ranks.values()) == pytest.approx(10)


def test_figures_hold_every_loss_and_condition(runs: pd.DataFrame) -> None:
    frame = side_by_side.tidy(runs)
    table, ranked = side_by_side.against(frame), side_by_side.rankings(frame)
    ax = plt.subplots(figsize=(8, 4))[1]
    figures.draw_table(table, ax)
    rows = [tick.get_text() for tick in ax.get_yticklabels()]
    assert sorted(rows) == ["GCE", "Z-loss (1 sets)", "bag means of 4", "naive Bayes"]
    assert len(ax.texts) == 4 * len({*frame["condition"]})
    _, axes = plt.subplots(1, len(ranked), sharey=True)
    figures.draw_ranks(ranked, axes)
    assert [ax.get_title(loc="left").split("\n")[0] for ax in axes] == list(ranked)
    diagram = figures.draw_diagram(ranked["clean labels"], "clean labels")
    assert "Clean labels" in diagram.get_title(loc="left")
    counts = figures.summary(table, ranked)
    assert counts["cells"] == len(table[table["label"] != "cross-entropy"])
    assert set(counts["best"]) == set(ranked)
    plt.close("all")


def test_the_default_is_the_whole_zoo_on_at_least_ten_tables() -> None:
    assert len(side_by_side.DATA) >= 11 and len(zoo.ZOO) > 20
    with pytest.raises(ValueError, match="table"):
        side_by_side.trial(seed=0, table="titanic")
