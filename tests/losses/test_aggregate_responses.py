"""Losses of bags by loops, the linear estimator by least squares, the limit by simulation."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.nn import functional as F

from tests.plots import js
from workbench.losses import figures_aggregate_responses as figures
from workbench.losses.aggregate_responses import (
    AggregateLoss,
    bag_loss,
    best_bag_size,
    instance_loss,
    interpolated_loss,
    interpolated_ols,
    limiting_risk,
    noise_variance,
    private_bags,
    random_bags,
    risk_curve,
)
from workbench.losses.experiments import aggregate_responses as study
from workbench.plots import export


def draw(m=7, k=4, seed=0, sets=()):
    g = torch.Generator().manual_seed(seed)
    pred = torch.randn(*sets, m, k, generator=g, dtype=torch.float64)
    return pred, torch.randn(*sets, m, generator=g, dtype=torch.float64)


def bce(p, y):
    return F.binary_cross_entropy(p, y, reduction="none")


# --- losses


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 10**6))
def test_squared_loss_is_bag_loss_plus_variance_within_bags(m, k, rho, seed):
    pred, ybar = draw(m, k, seed)
    variance = pred.var(1, correction=0).mean()
    found = interpolated_loss(pred, ybar, rho)
    torch.testing.assert_close(found, bag_loss(pred, ybar) + rho * variance, atol=1e-12, rtol=1e-12)


def test_losses_are_those_of_a_loop_for_any_pointwise_loss():
    pred, ybar = draw()
    pred, ybar = pred.sigmoid(), ybar.sigmoid()
    bag = instance = 0.0
    for a in range(7):
        q, mean = float(ybar[a]), float(pred[a].mean())
        bag -= (q * np.log(mean) + (1 - q) * np.log(1 - mean)) / 7
        for p in pred[a].tolist():
            instance -= (q * np.log(p) + (1 - q) * np.log(1 - p)) / 28
    assert float(bag_loss(pred, ybar, bce)) == pytest.approx(bag)
    assert float(instance_loss(pred, ybar, bce)) == pytest.approx(instance)
    both = 0.7 * bag + 0.3 * instance
    assert float(interpolated_loss(pred, ybar, 0.3, bce)) == pytest.approx(both)


def test_the_instance_loss_of_a_convex_loss_is_the_larger():
    pred, ybar = draw(20, 5)
    for loss in (lambda p, y: (p - y).abs(), lambda p, y: F.smooth_l1_loss(p, y, reduction="none")):
        assert instance_loss(pred, ybar, loss) >= bag_loss(pred, ybar, loss)


def test_bags_of_one_make_all_losses_equal():
    pred, ybar = draw(9, 1)
    expected = F.mse_loss(pred[:, 0], ybar)
    for rho in (0, 0.3, 1):
        torch.testing.assert_close(interpolated_loss(pred, ybar, rho), expected)


def test_leading_axes_are_separate_models():
    pred, ybar = draw(5, 3, sets=(4,))
    rho = torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64)
    found = interpolated_loss(pred, ybar, rho)
    for i in range(4):
        torch.testing.assert_close(found[i], interpolated_loss(pred[i], ybar[i], float(rho[i])))


def test_gradients_pass_gradcheck_twice_and_the_module_compiles():
    pred, ybar = draw()
    pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: interpolated_loss(p, ybar, 0.3), (pred,))
    assert torch.autograd.gradgradcheck(lambda p: interpolated_loss(p, ybar, 0.3), (pred,))
    loss = AggregateLoss(rho=0.3)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pred, ybar), interpolated_loss(pred, ybar, 0.3))
    assert "rho=0.3" in repr(loss) and not loss.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_single(dtype):
    pred, ybar = (v.to(dtype) for v in draw(100, 8))
    found = interpolated_loss(pred, ybar, 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, interpolated_loss(pred.float(), ybar.float(), 0.5))
    assert interpolated_loss(pred * 0 + 1e4, ybar, 0.5).isfinite()


# --- bags and privacy


def test_bags_are_disjoint_and_leave_out_what_does_not_fill_one():
    bags = random_bags(23, 5, 0)
    assert bags.shape == (4, 5) and len(bags.unique()) == 20 and bags.max() < 23
    assert (random_bags(23, 5, 1) != bags).any()


def test_private_noise_is_laplace_of_the_stated_scale():
    y = torch.linspace(-3, 3, 40_000, dtype=torch.float64)
    bags, means = private_bags(y, 4, 0.5, 2.0, 0)
    noise = (means - y.clamp(-2, 2)[bags].mean(1)).numpy()
    assert stats.kstest(noise, stats.laplace(scale=2 * 2 / (4 * 0.5)).cdf).pvalue > 1e-3
    assert 4 * noise.var() == pytest.approx(noise_variance(0.0, 4, 0.5, 2.0), rel=0.05)
    bags, means = private_bags(y, 4, float("inf"), 2.0, 0)
    torch.testing.assert_close(means, y.clamp(-2, 2)[bags].mean(1))


def test_one_response_moves_a_mean_by_at_most_the_sensitivity():
    y = torch.linspace(-5, 5, 30, dtype=torch.float64)
    bags, before = private_bags(y, 6, float("inf"), 1.5, 3)
    other = y.clone()
    other[bags[2, 0]] = -other[bags[2, 0]] * 1e3
    _, after = private_bags(other, 6, float("inf"), 1.5, 3)
    assert 0 < (after - before).abs().sum() <= 2 * 1.5 / 6 + 1e-12


# --- the linear estimator


def test_the_estimator_minimises_the_loss():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=g, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2, 0.5], dtype=torch.float64) + torch.randn(
        40, generator=g, dtype=torch.float64
    )
    bags = random_bags(40, 4, 2)
    ybar = y[bags].mean(1)
    rhos = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64)
    for theta, rho in zip(interpolated_ols(x, ybar, bags, rhos), rhos, strict=True):
        at = theta.clone().requires_grad_()
        (slope,) = torch.autograd.grad(interpolated_loss((x @ at)[bags], ybar, float(rho)), at)
        assert slope.abs().max() < 1e-12


def test_its_ends_are_least_squares_on_means_and_on_repeated_means():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((48, 5)), rng.standard_normal(48)
    bags = random_bags(48, 3, 0)
    ybar = y[bags].mean(1)
    means = np.linalg.lstsq(x[bags].mean(1), ybar, rcond=None)[0]
    repeated = np.linalg.lstsq(x[bags].reshape(48, 5), np.repeat(ybar, 3), rcond=None)[0]
    np.testing.assert_allclose(interpolated_ols(x, ybar, bags, 0.0), means)
    np.testing.assert_allclose(interpolated_ols(x, ybar, bags, 1.0), repeated)
    one = random_bags(48, 1, 0)
    plain = np.linalg.lstsq(x, y, rcond=None)[0]
    for rho in (0.0, 0.4, 1.0):
        np.testing.assert_allclose(interpolated_ols(x, y[one].mean(1), one, rho), plain)


def test_a_column_of_ones_is_not_shrunk():
    rng = np.random.default_rng(1)
    x = np.column_stack([rng.standard_normal((60, 2)), np.ones(60)])
    y = x @ [1.0, 2.0, 30.0]
    bags = random_bags(60, 5, 0)
    assert float(interpolated_ols(x, y[bags].mean(1), bags, 1.0)[2]) == pytest.approx(30, abs=1.5)


def test_the_instance_loss_shrinks_theta_by_the_bag_size():
    found = study.simulate(0, d=10, k=4, m=25, sigma=0.5, rhos=(1.0,), draws=300)
    assert found["kept"][0] == pytest.approx(1 / 4, abs=0.01)


# --- the limit


@pytest.mark.parametrize(
    "m, sigma, measured",
    [
        (14, 1.0, [3.27, 0.86, 0.68, 0.58, 0.67]),
        (50, 1.0, [0.257, 0.199, 0.204, 0.317, 0.586]),
        (50, 0.5, [0.064, 0.073, 0.111, 0.277, 0.577]),
    ],
)
def test_the_limit_is_near_the_cards_simulation_in_ten_dimensions(m, sigma, measured):
    found = risk_curve(10, 4, m, sigma, [0, 0.05, 0.1, 0.3, 1])
    np.testing.assert_allclose(found, measured, rtol=0.06)
    expected = sigma**2 * 10 / (m - 11)
    assert found[0] == pytest.approx(expected)


@pytest.mark.parametrize("k, alpha, sigma", [(2, 1.7, 1.0), (8, 3.0, 2.0), (5, 0.6, 0.5)])
def test_the_limit_is_the_risk_in_many_dimensions(k, alpha, sigma):
    rhos, d = np.array([0.03, 0.2, 1.0]), 120
    found = study.simulate(3, d=d, k=k, m=round(alpha * d), sigma=sigma, rhos=rhos, draws=12)
    limit = limiting_risk(alpha, k, rhos, noise=sigma**2)
    np.testing.assert_allclose(found["risk"], limit.risk, rtol=0.08)
    np.testing.assert_allclose(found["kept"], limit.kept, atol=0.03)


@settings(max_examples=60, deadline=None)
@given(st.floats(1.05, 50), st.integers(2, 40), st.floats(0.01, 9), st.floats(0, 4))
def test_ends_of_the_limit_are_closed_forms(alpha, k, noise, signal):
    bag, inst = limiting_risk(alpha, k, np.array([0.0, 1.0]), noise=noise, signal=signal).risk
    assert bag == pytest.approx(noise / (alpha - 1), rel=1e-6)
    expected = (1 - 1 / k) ** 2 * signal + ((1 - 1 / k) * signal + noise) / (k * (alpha * k - 1))
    assert inst == pytest.approx(expected, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.2, 30), st.integers(2, 20), st.floats(1e-6, 1), st.floats(0, 9))
def test_the_risk_is_bias_and_variance_and_its_root_solves_the_equation(alpha, k, rho, noise):
    found = limiting_risk(alpha, k, rho, noise=noise)
    if alpha * k <= 1:
        assert np.isinf(found.risk)
        return
    assert found.risk == pytest.approx(found.bias + found.variance)
    assert 0 <= found.kept <= 1 + 1e-9 and found.bias >= -1e-12 and found.variance >= 0
    t = float(found.kept / (alpha - found.kept))
    right = alpha / (1 + t) + alpha * (k - 1) * rho / (1 + rho * t)
    assert 1 / t == pytest.approx(right, rel=1e-5)


def test_few_bags_want_a_larger_rho_and_many_bags_the_bag_loss():
    rho = np.geomspace(1e-3, 1, 200)
    best = [rho[risk_curve(10, 4, m, s, rho).argmin()] for m, s in ((14, 1), (50, 1), (50, 0.5))]
    assert 1 > best[0] > best[1] > best[2] > 1e-3


def test_not_unique_is_infinite_and_bags_of_one_ignore_rho():
    assert np.isinf(limiting_risk(0.9, 3, 0.0).risk) and np.isinf(limiting_risk(0.2, 4, 0.5).risk)
    same = limiting_risk(3.0, 1, np.array([0.0, 0.5, 1.0])).risk
    np.testing.assert_allclose(same, 0.5)


def test_the_best_bag_size_is_a_scan_of_the_limit():
    found = best_bag_size(2000, 20, sigma=1.0, eps=1.0, C=4.0, sizes=(1, 2, 4), rhos=(0.1, 1.0))
    scan = {
        (k, rho): float(limiting_risk(2000 / k / 20, k, rho, noise=1 + 8 * 16 / k).risk)
        for k in (1, 2, 4)
        for rho in (0.1, 1.0)
    }
    best = min(scan, key=scan.get)
    assert found == (*best, scan[best])
    assert best_bag_size(2000, 20, sigma=1.0, eps=1e6, C=4.0)[0] == 1


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: bag_loss(torch.ones(3, 2), torch.ones(2)), ValueError, "ybar: expected"),
        (lambda: bag_loss(torch.ones(3), torch.ones(())), ValueError, "ybar: expected"),
        (lambda: instance_loss(torch.ones(3, 2).long(), torch.ones(3)), TypeError, "pred"),
        (lambda: interpolated_loss(torch.ones(3, 2), torch.ones(3), 1.5), ValueError, "rho"),
        (lambda: AggregateLoss(rho=-1), ValueError, "rho"),
        (lambda: random_bags(3, 4), ValueError, "k: expected"),
        (lambda: private_bags(torch.ones(8), 2, 0, 1.0), ValueError, "eps"),
        (lambda: private_bags(torch.ones(8), 2, 1.0, -1), ValueError, "C: expected"),
        (lambda: private_bags(torch.tensor([1, float("nan")]), 1, 1.0, 1.0), ValueError, "y: row"),
        (lambda: interpolated_ols(np.ones((4, 2)), np.ones(3), np.ones((2, 2), int), 0.1),
         ValueError, "bags"),
        (lambda: interpolated_ols(np.ones((4, 2)), np.ones(2), np.ones((2, 2), int), 2),
         ValueError, "rho"),
        (lambda: limiting_risk(-1, 2, 0.1), ValueError, "bags_per_dim"),
        (lambda: limiting_risk(2, 2, 1.1), ValueError, "rho"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- experiments and explorer


def test_validation_sees_bag_means_only(monkeypatch):
    seen = []
    plain = study.members.train

    def spied(model, states, x, y, loss, **options):
        seen.append((x.shape, y.shape))
        return plain(model, states, x, y, loss, **options)

    monkeypatch.setattr(study.members, "train", spied)
    row = study.on_table(0, "autompg", k=4, epochs=3, rhos=(0.0, 0.1, 1.0), rates=(0.01,))
    ((x, y),) = seen
    assert x == (row["bags"], 4, 7) and y == (row["bags"],)
    assert row["chosen"] in (0.0, 0.1, 1.0)
    assert row["rmse"].shape == (3, 1)
    assert row["bag"] == row["rmse"][0, 0] and row["instance"] == row["rmse"][2, 0]


def test_private_simulation_favours_the_predicted_size():
    row = study.private(0, n=600, d=10, eps=1.0, draws=20)
    assert row["k"] > 1 and row["best"] < row["single"]
    assert row["best"] == pytest.approx(row["predicted"], rel=0.25)


def test_the_explorer_exports_its_formula():
    explorer = figures.explore_aggregate()
    assert js.check_formula(explorer, rtol=1e-6) >= 16
    explorer.result()
    assert explorer.seconds < 0.05
    assert len(json.dumps(export.payload(explorer, explorer.state))) < 40_000


def test_the_explorer_marks_the_least_risk():
    result = figures.explore_aggregate().result(k=4, alpha=5.0, sigma=1.0, eps=100.0)
    scan = limiting_risk(
        5.0, 4, result["rho"], noise=noise_variance(1.0, 4, 100.0, figures.bound(1))
    )
    assert result["best_risk"][0] == pytest.approx(float(scan.risk.min()))
