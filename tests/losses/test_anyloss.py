"""Soft counts and their metrics against scikit-learn, finite differences and written-out loops."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch.nn import functional as F

from tests.plots import js
from workbench.losses import anyloss as module
from workbench.losses import figures_anyloss as figures
from workbench.losses import streaming
from workbench.losses.anyloss import (
    METRICS,
    AnyLoss,
    amplify,
    anyloss,
    bayesian_sign_test,
    gradient_window,
    one_vs_rest,
    scaled_counts,
    score_oriented,
    soft_confusion,
)
from workbench.losses.experiments import anyloss as study
from workbench.plots import export

P = torch.tensor([0.9, 0.4, 0.6, 0.2, 0.1], dtype=torch.float64)
Y = torch.tensor([1, 1, 0, 0, 0])
NAMES = ("f1", *METRICS)
PEERS = {
    "accuracy": metrics.accuracy_score,
    "balanced_accuracy": metrics.balanced_accuracy_score,
    "jaccard": metrics.jaccard_score,
    "mcc": metrics.matthews_corrcoef,
    "f1": metrics.f1_score,
}


def draw(n, seed=0, sets=(), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(*sets, n, generator=g, dtype=dtype)
    y = (torch.rand(*sets, n, generator=g) < 0.4).long()
    y[..., 0], y[..., 1] = 1, 0
    return p, y


# --- the card's numbers


def test_the_amplifier_at_three_probabilities():
    found = amplify(torch.tensor([0.5, 0.55, 0.6], dtype=torch.float64))
    expected = torch.tensor([0.5, 0.974667, 0.999325], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "metric, expected",
    [
        ("f1", 0.499662),
        ("accuracy", 0.399730),
        ("balanced_accuracy", 0.416385),
        ("gmean", 0.422357),
    ],
)
def test_losses_of_five_examples(metric, expected):
    assert float(anyloss(P, Y, metric=metric)) == pytest.approx(expected, abs=5e-7)


# --- against scikit-learn and by hand


@pytest.mark.parametrize("metric", [*PEERS, "fbeta"])
def test_in_the_steep_limit_it_is_scikit_learns_metric(metric):
    for seed in range(5):
        p, y = draw(40, seed)
        hard = (p > 0.5).long()
        peer = PEERS.get(metric, lambda a, b: metrics.fbeta_score(a, b, beta=2))
        found = float(anyloss(p, y, metric=metric, beta=2.0 if metric == "fbeta" else 1.0, L=1e7))
        assert 1 - found == pytest.approx(peer(y.numpy(), hard.numpy()), abs=1e-9)


def test_g_mean_is_the_root_of_both_recalls():
    p, y = draw(50, 3)
    hard = (p > 0.5).numpy()
    recalls = metrics.recall_score(y, hard, average=None)
    assert 1 - float(anyloss(p, y, metric="gmean", L=1e7)) == pytest.approx(np.sqrt(recalls.prod()))


def test_counts_are_sums_over_examples():
    p, y = draw(30, 1)
    hat = 1 / (1 + np.exp(-73 * (p.numpy() - 0.5)))
    expected = [0.0] * 4
    for h, label in zip(hat, y.tolist(), strict=True):
        expected[0] += label * h
        expected[1] += (1 - label) * h
        expected[2] += label * (1 - h)
        expected[3] += (1 - label) * (1 - h)
    np.testing.assert_allclose([float(c) for c in soft_confusion(p, y)], expected, atol=1e-12)


@pytest.mark.parametrize("metric", NAMES)
def test_gradients_pass_gradcheck_twice(metric):
    p, y = draw(8, 2, sets=(2,))
    p = (0.4 + 0.2 * p).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: anyloss(v, y, metric=metric), (p,))
    assert torch.autograd.gradgradcheck(lambda v: anyloss(v, y, metric=metric, L=10.0), (p,))


def test_hand_gradients_through_the_score():
    z = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 5
    z.requires_grad_()
    _, y = draw(20, 4)
    p = torch.sigmoid(z)
    hat, window = amplify(p).detach(), gradient_window(p).detach()
    tp, s, predicted, n = (hat * y).sum(), y.sum(), hat.sum(), len(y)
    tn = n - s - predicted + tp
    d_tp, d_tn = window * y, -window * (1 - y)
    by_hand = {
        "accuracy": -(d_tp + d_tn) / n,
        "f1": -2 * (d_tp * (s + predicted) - tp * window) / (s + predicted) ** 2,
        "balanced_accuracy": -(d_tp / s + d_tn / (n - s)) / 2,
        "gmean": -(d_tp * tn + tp * d_tn) / (2 * (tp * tn * s * (n - s)).sqrt()),
    }
    for metric, expected in by_hand.items():
        (found,) = torch.autograd.grad(anyloss(torch.sigmoid(z), y, metric=metric), z)
        torch.testing.assert_close(found, expected, msg=metric)


def test_the_window_is_narrow():
    window = gradient_window(torch.tensor([0.5, 0.6, 0.9], dtype=torch.float64))
    np.testing.assert_allclose(window, [73 / 16, 0.01181, 1.368e-12], rtol=2e-3)


# --- limits and invariances


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(0, 10**6), st.sampled_from(NAMES), st.floats(1, 500))
def test_order_does_not_matter_and_sets_are_independent(n, seed, metric, L):
    p, y = draw(n, seed, sets=(3,))
    found = anyloss(p, y, metric=metric, L=L)
    assert found.shape == (3,)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(found, anyloss(p[:, order], y[:, order], metric=metric, L=L))
    torch.testing.assert_close(found[1], anyloss(p[1], y[1], metric=metric, L=L))
    assert (found >= -1e-12).all() and (found <= (2 if metric == "mcc" else 1) + 1e-12).all()


def test_better_predictions_cost_less():
    p, y = draw(50, 5)
    better = p + 0.3 * (y - p)
    for metric in NAMES:
        assert anyloss(better, y, metric=metric, L=10.0) < anyloss(p, y, metric=metric, L=10.0)


def test_a_weight_of_two_is_the_example_twice_and_ignored_ones_are_absent():
    p, y = draw(12, 6)
    weight = torch.ones(12, dtype=torch.float64)
    weight[3] = 2
    twice = anyloss(torch.cat([p, p[3:4]]), torch.cat([y, y[3:4]]))
    torch.testing.assert_close(anyloss(p, y, weight=weight), twice)
    labels = y.clone()
    labels[5:] = -100
    torch.testing.assert_close(anyloss(p, labels), anyloss(p[:5], y[:5]))


def test_soft_labels_mix_the_counts():
    p, y = draw(10, 7)
    other = 1 - y
    soft = 0.3 * y + 0.7 * other
    mixed = [
        0.3 * a + 0.7 * b
        for a, b in zip(soft_confusion(p, y), soft_confusion(p, other), strict=True)
    ]
    torch.testing.assert_close(list(soft_confusion(p, soft.double())), mixed)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("metric", NAMES)
def test_a_batch_of_one_class_gives_a_number_and_finite_gradients(metric, label):
    p = torch.linspace(0, 1, 9, dtype=torch.float64, requires_grad=True)
    loss = anyloss(p, torch.full((9,), label), metric=metric)
    (slope,) = torch.autograd.grad(loss, p)
    assert loss.isfinite() and slope.isfinite().all()


def test_any_function_of_the_counts_is_a_metric():
    def precision(tp, fp, fn, tn):
        return tp / (tp + fp)

    p, y = draw(60, 8)
    found = 1 - float(anyloss(p, y, metric=precision, L=1e7))
    assert found == pytest.approx(metrics.precision_score(y, p > 0.5))


def test_released_network_code_sees_hardly_any_false_positives():
    p, y = draw(20, 9)
    counts = soft_confusion(p, y)
    tp, s, predicted, n = counts.tp, y.sum(), counts.tp + counts.fp, 400
    as_released = (n * (tp + s) - s * (predicted + s)) / (2 * s * (n - s))
    found = METRICS["balanced_accuracy"](*scaled_counts(counts, n))
    torch.testing.assert_close(found, as_released)
    assert float(found) > 1 - float(anyloss(p, y, metric="balanced_accuracy")) + 0.2


# --- torch's conventions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_counted_in_single(dtype):
    p, y = draw(50, 10, dtype=torch.float32)
    half = p.to(dtype)
    found = anyloss(half, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, anyloss(half.float(), y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(anyloss(p, y), anyloss(p, y), rtol=0, atol=0)
        assert one_vs_rest(torch.randn(6, 3).to(dtype), torch.tensor([0, 1, 2, 0, 1, 2])).isfinite()


def test_extreme_scores_stay_finite():
    z = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    for metric in NAMES:
        loss = anyloss(torch.sigmoid(z), torch.tensor([1, 0, 0, 1]), metric=metric)
        (slope,) = torch.autograd.grad(loss, z)
        assert loss.isfinite() and slope.isfinite().all()
    h = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    one_vs_rest(h, torch.tensor([2, 1])).backward()
    assert h.grad.isfinite().all()


def test_the_module_compiles_whole_and_keeps_its_settings():
    loss = AnyLoss(metric="gmean", L=30.0)
    p, y = draw(20, 11)
    torch.testing.assert_close(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(p, y),
        anyloss(p, y, metric="gmean", L=30.0),
    )
    assert "gmean" in repr(loss) and loss.load_state_dict(loss.state_dict())
    labels = torch.randint(3, (20,), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(one_vs_rest, fullgraph=True, backend="eager")
    h = torch.randn(20, 3)
    torch.testing.assert_close(compiled(h, labels), one_vs_rest(h, labels))


# --- many classes


def test_one_vs_rest_is_the_mean_of_binary_losses():
    g = torch.Generator().manual_seed(0)
    h, y = (
        torch.randn(2, 40, 4, generator=g, dtype=torch.float64) * 3,
        torch.randint(4, (2, 40), generator=g),
    )
    y[:, :5] = -100
    for metric in NAMES:
        found = one_vs_rest(h, y, metric=metric)
        parts = [
            anyloss(h.softmax(-1)[:, 5:, k], (y[:, 5:] == k).long(), metric=metric)
            for k in range(4)
        ]
        torch.testing.assert_close(found, torch.stack(parts).mean(0))
    weight = torch.tensor([1.0, 2, 0, 1])
    expected = sum(
        w * anyloss(h.softmax(-1)[:, 5:, k], (y[:, 5:] == k).long()) / 4
        for k, w in enumerate(weight)
    )
    torch.testing.assert_close(one_vs_rest(h, y, weight=weight), expected)


def test_in_the_steep_limit_it_is_the_macro_average():
    g = torch.Generator().manual_seed(1)
    h, y = (
        torch.randn(60, 3, generator=g, dtype=torch.float64) * 9,
        torch.randint(3, (60,), generator=g),
    )
    sure = h[h.softmax(-1).max(-1).values > 0.5]
    labels = y[h.softmax(-1).max(-1).values > 0.5]
    peer = metrics.f1_score(labels, sure.argmax(-1), average="macro")
    assert 1 - float(one_vs_rest(sure, labels, L=1e7)) == pytest.approx(peer)


def test_counting_in_blocks_changes_nothing(monkeypatch):
    g = torch.Generator().manual_seed(2)
    h = (torch.randn(50, 6, generator=g, dtype=torch.float64) * 3).requires_grad_()
    y = torch.randint(6, (50,), generator=g)
    plain = one_vs_rest(h, y, metric="gmean")
    (slope,) = torch.autograd.grad(plain, h)
    monkeypatch.setattr(streaming, "LARGE", 1)
    monkeypatch.setattr(streaming, "BLOCK", 42)
    blocks = one_vs_rest(h, y, metric="gmean")
    torch.testing.assert_close(blocks, plain)
    torch.testing.assert_close(torch.autograd.grad(blocks, h)[0], slope)


# --- baselines and the test


def test_uniform_score_oriented_loss_counts_probabilities():
    p, y = draw(25, 12)
    tp = (p * y).sum()
    expected = 1 - 2 * tp / (p.sum() + y.sum())
    torch.testing.assert_close(score_oriented(p, y), expected)


def test_the_raised_cosine_is_the_integral_of_its_density():
    t = torch.linspace(0.4, 0.6, 2001, dtype=torch.float64)
    density = (1 + torch.cos(torch.pi * (t - 0.5) / 0.1)) / 0.2
    below = torch.cumulative_trapezoid(density, t)[[499, 999, 1499]]
    for p, share in zip(t[[500, 1000, 1500]], below, strict=True):
        found = score_oriented(p[None], torch.tensor([1]), metric="accuracy", delta=0.1)
        assert 1 - float(found) == pytest.approx(float(share), abs=1e-6)


def test_the_sign_test_is_that_of_a_beta_posterior():
    d = np.array([0.1] * 6 + [-0.1] * 3)
    first, neither, second = bayesian_sign_test(d, rope=0.0, random_state=1)
    share = np.random.default_rng(0).dirichlet([3, 1, 6], 200_000).argmax(1)
    np.testing.assert_allclose(
        [first, neither, second], np.bincount(share, minlength=3) / 200_000, atol=8e-3
    )
    assert bayesian_sign_test(np.full(30, 0.005)) == (0, 1, 0)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: anyloss(P, Y, metric="f3"), ValueError, "metric"),
        (lambda: anyloss(P * 2, Y), ValueError, "p: expected"),
        (lambda: anyloss(P, Y + 1), ValueError, "y: expected"),
        (lambda: anyloss(P, Y[:3]), ValueError, "y: expected the shape"),
        (lambda: anyloss(Y, Y), TypeError, "p: expected"),
        (lambda: anyloss(P, Y, L=0), ValueError, "L: expected"),
        (lambda: anyloss(P, Y, beta=-1), ValueError, "beta"),
        (lambda: anyloss(P * float("nan"), Y), ValueError, "p: expected"),
        (lambda: AnyLoss(metric="none"), ValueError, "metric"),
        (lambda: one_vs_rest(torch.ones(3, 2), torch.tensor([0, 1, 2])), ValueError, "y: expected"),
        (lambda: one_vs_rest(torch.ones(3, 2), torch.tensor([0, 1])), ValueError, "shape"),
        (lambda: one_vs_rest(torch.ones(2, 2), torch.tensor([0, 1]), weight=torch.ones(3)),
         ValueError, "weight"),
        (lambda: score_oriented(P, Y, delta=2.0), ValueError, "delta"),
        (lambda: bayesian_sign_test([0.1], rope=-1), ValueError, "rope"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_macro_loss_learns_what_cross_entropy_learns():
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(90, 2, generator=g), torch.arange(90) % 3
    x = x / 4 + F.one_hot(y, 3).float() @ torch.tensor([[2.0, 0], [0, 2], [-2, -2]])
    w = torch.zeros(2, 3, requires_grad=True)
    for _ in range(60):
        (slope,) = torch.autograd.grad(module.one_vs_rest(x @ w, y, L=10.0), w)
        w = (w - slope).detach().requires_grad_()
    assert ((x @ w).argmax(-1) == y).float().mean() > 0.95


# --- experiments and explorer


def test_perceptrons_descend_as_autograd_of_one_would():
    x, y = study.binary("wine")
    share = torch.ones(len(y))

    def loss(z):
        return anyloss(torch.sigmoid(z), y.expand_as(z), weight=share)

    both = study.perceptrons(x, loss, (2,), torch.tensor([0.01, 0.1]), steps=5)
    model = torch.nn.Linear(x.shape[1], 1)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    descent = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        descent.zero_grad()
        anyloss(torch.sigmoid(model(x)[:, 0]), y).backward()
        descent.step()
    found = study.score(both, x)[1]
    torch.testing.assert_close(found, model(x)[:, 0].detach(), rtol=1e-3, atol=1e-4)


def test_a_table_is_judged_on_rows_that_no_loss_has_seen(monkeypatch):
    seen = []
    plain = study._all_losses

    def spied(y, train, thinned, L):
        seen.append((train, thinned))
        return plain(y, train, thinned, L)

    monkeypatch.setattr(study, "_all_losses", spied)
    row = study.on_table(0, "wine", folds=5, steps=60)
    ((train, thinned),) = seen
    assert (train.sum(1) / train.shape[1]).mean() == pytest.approx(0.6)
    _, y = study.binary("wine")
    assert ((thinned * y).sum(1) == (thinned * (1 - y)).sum(1)).all()
    assert (thinned <= train).all() and row["rows"] == 178
    assert row["positives"] == pytest.approx(48 / 178)
    assert row["f1:f1"] > 0.9 and row["balanced_accuracy:smote"] > 0.9


def test_a_confident_start_keeps_the_metric_at_zero():
    row = study.on_synthetic(0, steps=80)
    assert row["f1:f1_late"] == 0 < row["f1:f1"]


def test_false_positives_freeze_when_the_window_closes():
    looks = study.window_along("land_vs_satan", steps=(1, 100, 200))
    assert looks.inside.iloc[0] > 0.9 and looks.inside.iloc[-1] < 0.05
    assert looks["false positives"].iloc[-1] > 100


def test_the_network_learns_and_the_released_count_misleads_it():
    row = study.on_network(0, "wine", epochs=25, rates=(0.03,))
    assert row["balanced_accuracy:balanced_accuracy"] > 0.85
    assert row["accuracy:released"] < row["accuracy:balanced_accuracy"]


def test_released_results_are_read_from_their_layout():
    head = ",Dataset,Delta,BCE,AccAim,F1Aim,F.5Aim,F2Aim,GAim,BAim"
    body = "Acc,D,.5,.6,.7,0,0,0,0,0\nF1,S,.1,.2,0,.4,0,0,0,0"
    table = study.tidy(pd.read_csv(io.StringIO(f"{head}\n{body}\n{head}\n{body}")))
    assert table.groupby("metric").ours.mean().to_dict() == {"accuracy": 0.7, "f1": 0.4}
    assert len(table) == 4 and table.mse.max() == 0.5 and table.bce.min() == 0.2


def test_the_explorer_exports_its_formula_and_takes_points_of_yours():
    explorer = figures.explore_anyloss(steps=150)
    assert js.check_formula(explorer, rtol=1e-6) >= 16
    assert explorer.seconds < 0.05
    assert len(json.dumps(export.payload(explorer, explorer.state))) < 40_000
    x, y = figures.example(80, 20, seed=1)
    own = figures.explore_anyloss(x, y, steps=30, metric="gmean", L=20)
    assert own.state == {"metric": "gmean", "L": 20}
    with pytest.raises(ValueError, match="two columns"):
        figures.explore_anyloss(np.ones((4, 3)), [0, 1, 0, 1])


def test_counts_of_the_drawn_line_are_scikit_learns():
    x, y = figures.example(120, 30)
    result = figures.explore_anyloss(x, y, steps=100).result(metric="f1", L=40)
    a, b = (np.array([result[f"own_{c}"][i] for c in "xy"]) for i in (0, 1))
    side = (b - a)[0] * (x - a)[:, 1] - (b - a)[1] * (x - a)[:, 0]
    hard = (side < 0) if (side[y == 1] < 0).mean() > 0.5 else (side > 0)
    assert result["f1"] == pytest.approx(metrics.f1_score(y, hard))
    assert result["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(y, hard))
