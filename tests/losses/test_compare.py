"""`losses.compare`: no leakage, paired, tuned, honest intervals, and errors that name the fault."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from torch import nn

matplotlib.use("Agg")

from workbench.lab import ranks
from workbench.lab.models import MLP
from workbench.losses import figures_compare, tables, trials, zoo

FAST: dict[str, Any] = {
    "repeats": 2,
    "folds": 3,
    "epochs": 4,
    "lrs": (1e-2, 3e-2),
    "model": lambda d, k: MLP((d, 8, k)),
}


def frame(n: int = 150, seed: int = 0) -> tuple[pd.DataFrame, pd.Series]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    y = np.where(x[:, 0] + 0.3 * rng.normal(size=n) > 0.4, "yes", "no")
    X = pd.DataFrame(x, columns=["a", "b", "c"])
    X["colour"] = pd.Categorical(rng.choice(["red", "green", "<b>"], n))
    X["word"] = rng.choice(["p", "q"], n)
    X.loc[rng.random(n) < 0.1, "b"] = np.nan
    X.loc[rng.random(n) < 0.1, "colour"] = np.nan
    X.loc[rng.random(n) < 0.1, "word"] = None
    X["flag"] = rng.random(n) < 0.5
    return X, pd.Series(y, index=np.arange(n) + 1000)


@pytest.fixture(scope="module")
def found() -> figures_compare.Comparison:
    X, y = frame()
    losses = ["cross_entropy", "gce", "ensloss", "bag_means"]
    return figures_compare.compare(X, y, losses=losses, **{**FAST, "epochs": 20})


def test_the_frame_is_paired_and_learnt(found: figures_compare.Comparison) -> None:
    assert len(found.frame) == 4 * 6 and found.scores.shape == (6, 4)
    assert found.classes == ("no", "yes") and found.better == "higher"
    assert float(found.scores["cross-entropy"].mean()) > 0.8
    assert set(found.frame["lr"]) <= {1e-2, 3e-2}


def test_differences_are_nadeau_bengios(found: figures_compare.Comparison) -> None:
    d = (found.scores["GCE"] - found.scores["cross-entropy"]).to_numpy()
    row = found.differences().loc["GCE"]
    error = d.std(ddof=1) * np.sqrt(1 / 6 + 1 / 2)
    assert row["difference"] == pytest.approx(d.mean())
    assert row["high"] - row["difference"] == pytest.approx(stats.t.ppf(0.975, 5) * error)
    assert row["p"] == pytest.approx(2 * stats.t.sf(abs(d.mean()) / error, 5)) or d.std() == 0
    assert (found.differences()["adjusted"] >= found.differences()["p"]).all()
    assert -found.differences("GCE").loc["cross-entropy", "difference"] == pytest.approx(d.mean())


def test_ranks_and_figure(found: figures_compare.Comparison) -> None:
    expected = stats.rankdata(-found.scores.to_numpy(), axis=1).mean(0)
    for name, rank in zip(found.scores, expected, strict=True):
        assert found.mean_ranks[name] == pytest.approx(rank)
    ax = found.figure()
    shown = " ".join(text.get_text() for text in ax.texts)
    assert all(name in shown for name in found.scores)
    assert "mean rank" in found.table() and "corrected" in str(found)
    matplotlib.pyplot.close(ax.figure)


def test_it_is_deterministic_and_its_baseline_can_be_named() -> None:
    X, y = frame(90)
    options: dict[str, Any] = {
        **FAST,
        "repeats": 1,
        "losses": {"CE": "cross_entropy", "soft": "focal"},
    }
    a = figures_compare.compare(X, y, baseline="soft", **options)
    b = figures_compare.compare(X, y.to_numpy(), baseline="soft", **options)
    pd.testing.assert_frame_equal(a.frame, b.frame)
    assert a.baseline == "soft" and list(a.differences().index) == ["CE"]


def test_nothing_is_fitted_on_the_test_rows() -> None:
    """An outlier among the test rows moves no training input; wrong labels stay out of the test."""
    X, _ = frame(40)
    train, test = np.arange(20), np.arange(20, 40)
    before = tables.encoded(X, train, test)
    X.loc[30, "a"], X.loc[31, "word"] = 1e6, "unseen"
    after = tables.encoded(X, train, test)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    assert before[0].shape[1] == 3 + 1 + 4 + 3  # numbers, flag, colours and words with missing

    seen = []

    def flip(y, classes, generator):  # type: ignore[no-untyped-def]
        seen.append(len(y))
        return 1 - y

    X, y = frame(90)
    upside = figures_compare.compare(X, y, losses=["cross_entropy", "mae"], noise=flip, **FAST)
    assert seen == [60] * 6
    assert upside.scores.to_numpy().mean() < 0.3  # judged by the correct labels


def test_the_validation_part_keeps_the_proportions() -> None:
    y = np.repeat([0, 1, 2], [70, 20, 10])
    for seed in range(5):
        fit, check = tables.held_out(y, 0.2, np.random.default_rng(seed))
        assert sorted(np.concatenate([fit, check])) == list(range(100))
        assert np.bincount(y[check], minlength=3) == pytest.approx([14, 4, 2], abs=1)


@pytest.mark.parametrize("classes", [2, 4])
def test_measures_are_scikit_learns(classes: int) -> None:
    rng = np.random.default_rng(classes)
    logits = torch.tensor(rng.normal(size=(3, 60, classes)))
    y = torch.tensor(rng.integers(0, classes, 60))
    known = {
        "accuracy": sk.accuracy_score,
        "balanced_accuracy": sk.balanced_accuracy_score,
        "f1_macro": lambda a, b: sk.f1_score(a, b, average="macro"),
        **({"f1": sk.f1_score} if classes == 2 else {}),
    }
    for name, peer in known.items():
        expected = [peer(y, row.argmax(-1)) for row in logits]
        assert trials.score(name, logits, y).tolist() == pytest.approx(expected), name
        assert trials.score(peer, logits, y).tolist() == pytest.approx(expected)
    probs = logits.softmax(-1).numpy()
    expected = [sk.log_loss(y, p, labels=range(classes)) for p in probs]
    assert trials.score("log_loss", logits, y).tolist() == pytest.approx(expected)


def test_log_loss_is_better_when_lower() -> None:
    X, y = frame(90)
    found = figures_compare.compare(
        X, y, losses=["cross_entropy", "crammer_singer"], metric="log_loss", **FAST
    )
    d = found.scores["cross-entropy"] - found.scores["Crammer-Singer"]
    assert found.better == "lower"
    assert found.differences().loc["Crammer-Singer", "difference"] == pytest.approx(d.mean())


def test_each_network_is_the_one_that_its_loss_alone_would_train() -> None:
    """Training all together changes nothing, bags included."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 40, 3, generator=rng), torch.randint(3, (2, 40), generator=rng)
    options: dict[str, Any] = {
        "classes": 3,
        "lrs": (1e-2, 1e-1),
        "seeds": [3, 4],
        "epochs": 2,
        "batch_size": 16,
    }
    names = ["cross_entropy", "bag_means", "z_loss"]
    factory = lambda: MLP((3, 5, 3))  # noqa: E731
    joint = trials.train(factory, x, y, zoo.entries(names), **options).outputs(x)
    assert joint.shape == (3, 2, 2, 40, 3)
    for i, name in enumerate(names):
        alone = trials.train(factory, x, y, zoo.entries([name]), **options).outputs(x)
        assert torch.allclose(joint[i], alone[0], atol=1e-5), name
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = factory()
    adam = torch.optim.Adam(net.parameters(), 1e-1)
    from workbench.lab.members import minibatches

    for epoch in range(2):
        for place in minibatches(40, [3], 16, epoch):
            adam.zero_grad()
            nn.functional.cross_entropy(net(x[0][place[0]]), y[0][place[0]]).backward()
            adam.step()
    assert torch.allclose(joint[0, 1, 0], net(x[0]), atol=1e-4)


X0, Y0 = frame(30)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"y": Y0[:20]}, ValueError, "X and y"),
        ({"y": Y0.where(Y0 != "yes")}, ValueError, "y: row"),
        ({"y": np.zeros(30)}, ValueError, r"y: holds 1 class"),
        ({"y": np.linspace(0, 1, 30)}, ValueError, "no classes"),
        ({"y": np.r_[np.zeros(28), 1, 1]}, ValueError, "3 folds need at least 3"),
        ({"X": X0.assign(when=pd.Timestamp("2020-01-01"))}, TypeError, "column 'when'"),
        ({"X": X0.assign(a=np.inf)}, ValueError, "infinity"),
        ({"X": np.zeros(30)}, ValueError, "X: expected 2"),
        ({"losses": ["nope"]}, KeyError, "no loss is named"),
        ({"losses": ["gce", "z_loss"]}, ValueError, "'z_loss' needs 3 classes"),
        ({"metric": "auc"}, ValueError, "metric"),
        ({"metric": 3}, TypeError, "metric"),
        ({"metric": "accuracy", "better": "lower"}, ValueError, "better"),
        ({"baseline": "focal"}, ValueError, "baseline"),
        ({"noise": ("symmetric", 2.0)}, ValueError, "noise"),
        ({"noise": "symmetric"}, TypeError, "noise"),
        ({"folds": 1}, ValueError, "folds"),
        ({"lrs": (0.0,)}, ValueError, "lrs"),
        ({"validation": 1.0}, ValueError, "validation"),
    ],
)
def test_bad_input_is_named(change, kind, message: str) -> None:  # type: ignore[no-untyped-def]
    given = {"X": X0, "y": Y0, "losses": ["cross_entropy", "gce"], **FAST, **change}
    with pytest.raises(kind, match=message):
        figures_compare.compare(given.pop("X"), given.pop("y"), **given)


def test_f1_asks_for_two_classes() -> None:
    with pytest.raises(ValueError, match="f1_macro"):
        figures_compare.compare(X0, np.arange(30) % 3, metric="f1", **FAST)


def test_groups_follow_the_corrected_tests(found: figures_compare.Comparison) -> None:
    for group in found.alike:
        for a in group:
            for b in group:
                d = found.scores[a] - found.scores[b]
                assert a == b or ranks.resampled(d, 0.5).p * 6 > 0.05
