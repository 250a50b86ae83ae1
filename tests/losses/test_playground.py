"""The playground retrains what it shows, in Python and in the reader's browser alike."""

import js
import numpy as np
import pytest
import torch
from scipy.optimize import check_grad
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from torch.nn import functional as F

from workbench import losses
from workbench.losses import boundary

RNG = np.random.default_rng(0)
S, Y = RNG.normal(size=12), (np.arange(12) < 5).astype(float)
Z = (2 * Y - 1) * S


def sig(v):
    return 1 / (1 + np.exp(-v))


def soft(s):
    a = sig(73 * (sig(s) - 0.5))
    return a.sum(), (a * Y).sum(), ((1 - a) * (1 - Y)).sum()


VALUES = {
    "logistic": lambda s: np.log1p(np.exp(-(2 * Y - 1) * s)).mean(),
    "logistic, classes weighted": lambda s: (
        np.log1p(np.exp(-s))[Y == 1].mean() + np.log1p(np.exp(s))[Y == 0].mean()
    ) / 2,
    "hinge": lambda s: np.maximum(0, 1 - (2 * Y - 1) * s).mean(),
    "exponential": lambda s: np.exp(-(2 * Y - 1) * s).mean(),
    "least squares": lambda s: ((1 - (2 * Y - 1) * s) ** 2).mean(),
    "GCE, q = 0.7": lambda s: ((1 - sig((2 * Y - 1) * s) ** 0.7) / 0.7).mean(),
    "MAE": lambda s: (1 - sig((2 * Y - 1) * s)).mean(),
    "AnyLoss, F1": lambda s: 1 - 2 * soft(s)[1] / (Y.sum() + soft(s)[0]),
    "AnyLoss, balanced accuracy": lambda s: 1 - (soft(s)[1] / 5 + soft(s)[2] / 7) / 2,
    "dice": lambda s: 1 - (2 * (sig(s) * Y).sum() + 1) / ((sig(s) ** 2).sum() + Y.sum() + 1),
}  # fmt: skip


def test_every_pull_is_the_gradient_of_its_loss():
    assert set(VALUES) == set(boundary.PULLS)
    for name, value in VALUES.items():
        scale = np.abs(boundary.PULLS[name](S, Y)).max()
        error = check_grad(value, lambda s, n=name: boundary.PULLS[n](s, Y), S, epsilon=1e-6)
        assert error < 2e-4 * max(scale, 1), name


def test_a_loss_of_yours_in_torch_gives_the_same_training():
    points = boundary.moons()
    kept, labels, _ = points.noisy(0.1, 2)
    features = boundary.bumps(points.x)[kept]
    mine = boundary.from_torch(F.binary_cross_entropy_with_logits)
    np.testing.assert_allclose(
        boundary.fit(features, labels, mine),
        boundary.fit(features, labels, boundary.PULLS["logistic"]),
    )


def test_training_descends_as_torch_adam_does():
    points = boundary.moons()
    features = torch.as_tensor(boundary.bumps(points.x))
    y = torch.as_tensor(points.y)
    w = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.1, weight_decay=1e-3)
    for _ in range(20):
        adam.zero_grad()
        F.binary_cross_entropy_with_logits(features @ w, y).backward()
        adam.step()
    found = boundary.fit(features.numpy(), points.y, boundary.PULLS["logistic"], steps=20)
    np.testing.assert_allclose(found, w.detach().numpy(), atol=1e-9)


def test_scores_are_scikit_learns_at_the_prevalence_of_the_sample():
    predicted = RNG.random(200) < 0.4
    y = (RNG.random(200) < 0.3).astype(float)
    found = boundary.scores_of(predicted, y, float(y.mean()))
    assert found["accuracy"] == pytest.approx(accuracy_score(y, predicted))
    assert found["balanced"] == pytest.approx(balanced_accuracy_score(y, predicted))
    assert found["f1"] == pytest.approx(f1_score(y, predicted))


def test_noise_and_imbalance_are_nested_so_that_sliders_move_smoothly():
    points = boundary.moons()
    few, _, wrong = points.noisy(0.1, 10)
    more, _, more_wrong = points.noisy(0.3, 2)
    assert set(few) <= set(more)
    assert set(few[wrong]) <= set(more[more_wrong])
    assert points.noisy(0, 5)[2].sum() == 0
    assert (points.y[points.noisy(0, 10)[0]] == 1).sum() == 15


def test_robust_losses_resist_noise_that_moves_the_exponential():
    board = losses.playground(noise=0.4)
    found = {name: board.compute(name, 0.4, 1) for name in ("GCE, q = 0.7", "exponential")}
    assert found["GCE, q = 0.7"]["wrong_share"] < found["exponential"]["wrong_share"]


def test_weighting_the_classes_finds_rare_positives():
    board = losses.playground()
    for ratio in (5, 10, 20, 50):
        weighted = board.compute("logistic, classes weighted", 0.0, ratio)
        assert weighted["balanced"] > board.compute("logistic", 0.0, ratio)["balanced"]


def test_the_browser_trains_the_same_classifier():
    states = [
        {"loss": name, "noise": noise, "ratio": ratio}
        for name in boundary.PULLS
        for noise, ratio in ((0.0, 1), (0.25, 10))
    ]
    assert js.check_formula(losses.playground(), states, rtol=1e-5, atol=1e-6) == 20


def test_your_points_and_your_loss():
    x = RNG.normal(size=(200, 2)) * [3, 100] + [5, -40]
    y = np.where(x[:, 0] > 5, "yes", "no")
    board = losses.playground(
        x, y, losses={"mine": lambda s, t: F.softplus(-(2 * t - 1) * s).sum()}
    )
    assert board.state["loss"] == "mine"
    assert board.compute(**board.state | {"noise": 0.0})["accuracy"] > 0.9
    assert board.script is None and board.grid == {"loss": ["mine", *boundary.PULLS]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((30, 2)),), "y: give x and y"),
        ((None, np.zeros(30)), "x: give x and y"),
        ((np.zeros((30, 3)), np.arange(30) % 2), "x: expected two columns"),
        ((np.zeros((30, 2)), np.zeros(30)), "y: expected two classes"),
        ((np.zeros((30, 2)), np.arange(30) < 3), "at least 10"),
        ((np.zeros((30, 2)), np.arange(20) % 2), "same number of rows"),
    ],
)
def test_wrong_points_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        losses.playground(*arguments)


def test_a_loss_that_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match="loss: expected a scalar"):
        boundary.from_torch(lambda s, y: s * y)(S, Y)
