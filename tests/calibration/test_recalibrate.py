"""Recalibrators: optima against peers, guarantees, scikit-learn conventions, bad input."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logit, softmax
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from workbench.calibration import measures
from workbench.calibration.recalibrate import (
    RECALIBRATORS,
    BetaCalibration,
    HistogramBinning,
    IsotonicCalibration,
    MatrixScaling,
    PlattScaling,
    TemperatureScaling,
    VectorScaling,
    fit_temperature,
    log_scores,
)
from workbench.calibration.temperature import derivatives


def predictions(n=600, k=4, seed=0, temperature=2.0, tilt=0.0):
    """Logits whose labels follow softmax(logits / temperature + tilt * class)."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(n, k))
    truth = softmax(logits / temperature + tilt * np.arange(k), axis=1)
    labels = (truth.cumsum(1) < rng.random((n, 1))).sum(1).clip(0, k - 1)
    return logits, labels


def nll_at(temperature, logits, labels):
    return -log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels].mean()


# ---- temperature


@given(st.integers(0, 10_000), st.floats(0.3, 8), st.integers(2, 8))
@settings(max_examples=25, deadline=None)
def test_the_temperature_is_the_minimum_of_the_likelihood(seed, temperature, k):
    logits, labels = predictions(300, k, seed, temperature)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fit_temperature(logits, labels)
    best = minimize_scalar(
        lambda log_t: nll_at(np.exp(log_t), logits, labels),
        bounds=np.log([1e-2, 1e2]), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    assert found == pytest.approx(np.exp(best.x), rel=1e-4)
    assert nll_at(found, logits, labels) <= best.fun + 1e-12


def test_the_temperature_equals_torch_lbfgs():
    logits, labels = (torch.tensor(a) for a in predictions(2000))
    inverse = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [inverse], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits * inverse, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert fit_temperature(logits, labels) == pytest.approx(1 / inverse.item(), rel=1e-6)


def test_derivatives_equal_autograd():
    logits, labels = (torch.tensor(a) for a in predictions(50))
    beta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    value = torch.nn.functional.cross_entropy(logits * beta, labels)
    expected = []
    for _ in range(3):
        (value,) = torch.autograd.grad(value, beta, create_graph=True)
        expected.append(value.item())
    top = logits.amax(1)
    own = logits.gather(1, labels[:, None])[:, 0] - top
    assert derivatives(logits, top, own, 0.7) == pytest.approx(tuple(expected), rel=1e-9)


@given(st.floats(0.05, 20), st.floats(-50, 50))
@settings(max_examples=20, deadline=None)
def test_scaling_the_logits_scales_the_temperature_and_a_shift_changes_nothing(factor, shift):
    logits, labels = predictions(400)
    found = fit_temperature(logits * factor + shift, labels)
    assert found == pytest.approx(factor * fit_temperature(logits, labels), rel=1e-7)


def test_the_warm_start_and_single_precision_change_nothing():
    logits, labels = predictions(20_000, 6)
    exact = fit_temperature(logits, labels)
    order = np.argsort(labels, kind="stable")
    assert fit_temperature(logits[order], labels[order]) == pytest.approx(exact, rel=1e-8)
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(exact, rel=1e-6)
    assert fit_temperature(torch.tensor(logits).bfloat16(), labels) == pytest.approx(
        exact, rel=0.02
    )


@pytest.mark.parametrize("start", [1e-3, 1.0, 1e3])
def test_any_scale_of_logits_converges(start):
    logits, labels = predictions(500)
    found = fit_temperature(logits * start, labels, bounds=(1e-6, 1e6))
    assert found == pytest.approx(start * fit_temperature(logits, labels), rel=1e-7)


def test_at_the_ends_of_the_bracket_the_bound_is_returned_with_a_warning():
    logits, _ = predictions(200)
    with pytest.warns(UserWarning, match="lower bound.*all rows predicted right"):
        assert fit_temperature(logits, logits.argmax(1), bounds=(0.05, 20)) == pytest.approx(0.05)
    with pytest.warns(UserWarning, match="upper bound"):
        assert fit_temperature(logits, logits.argmin(1), bounds=(0.05, 20)) == pytest.approx(20)
    with pytest.warns(UserWarning, match="no row has logits that differ"):
        assert fit_temperature(np.ones((5, 3)), [0, 1, 2, 0, 1]) == 1


def test_temperature_scaling_keeps_every_prediction_and_lowers_the_likelihood_loss():
    logits, labels = predictions()
    scaled = TemperatureScaling().fit(logits, labels).transform(logits)
    assert np.array_equal(scaled.argmax(1), logits.argmax(1))
    assert measures.nll(scaled, labels) < measures.nll(softmax(logits, axis=1), labels)


# ---- the other maps


def test_vector_scaling_with_one_weight_is_temperature_and_recovers_a_tilt():
    logits, labels = predictions(20_000, 3, temperature=2.0, tilt=0.5)
    fitted = VectorScaling().fit(logits, labels)
    assert fitted.weight_ == pytest.approx([0.5, 0.5, 0.5], abs=0.03)
    assert fitted.bias_ == pytest.approx([-0.5, 0.0, 0.5], abs=0.08)


def test_vector_scaling_is_the_optimum_of_its_likelihood():
    logits, labels = predictions(400, 3, tilt=0.3)
    fitted = VectorScaling().fit(logits, labels)

    def loss(theta):
        z = logits * theta[:3] + theta[3:]
        return -log_softmax(z, axis=1)[np.arange(400), labels].mean()

    ours = loss(np.concatenate([fitted.weight_, fitted.bias_]))
    assert ours <= minimize(loss, [1, 1, 1, 0, 0, 0], method="BFGS").fun + 1e-8


def test_matrix_scaling_without_penalty_is_multinomial_logistic_regression():
    logits, labels = predictions(500, 3, tilt=0.4)
    ours = MatrixScaling(off_diagonal=0.0).fit(logits, labels).transform(logits)
    peer = LogisticRegression(C=1e9, max_iter=5000, tol=1e-10).fit(logits, labels)
    assert np.allclose(ours, peer.predict_proba(logits), atol=1e-3)


def test_a_strong_penalty_makes_matrix_scaling_a_scaling_of_each_class():
    logits, labels = predictions(500, 3)
    fitted = MatrixScaling(off_diagonal=1e6).fit(logits, labels)
    off = fitted.weight_ * (1 - np.eye(3))
    assert abs(off).max() < 1e-4
    assert abs(fitted.bias_).max() < 1e-4


def test_platt_scaling_equals_logistic_regression_on_the_log_odds():
    logits, labels = predictions(800, 2)
    p = softmax(logits, axis=1)[:, 1]
    ours = PlattScaling(smooth=False).fit(logits, labels).transform(logits)[:, 1]
    peer = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000).fit(logit(p)[:, None], labels)
    assert np.allclose(ours, peer.predict_proba(logit(p)[:, None])[:, 1], atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_beta_calibration_equals_betacal(seed):
    betacal = pytest.importorskip("betacal")
    rng = np.random.default_rng(seed)
    p = rng.beta(1.5, 1, 1500)
    labels = (rng.random(1500) < p ** (0.5 + seed)).astype(int)
    peer = betacal.BetaCalibration("abm").fit(p, labels).predict(p)
    probs = np.stack([1 - p, p], axis=1)
    assert np.allclose(BetaCalibration().fit(probs, labels).transform(probs)[:, 1], peer, atol=2e-3)


def test_beta_calibration_increases_even_where_the_free_fit_would_not():
    p = np.linspace(0.01, 0.99, 200)
    labels = ((p < 0.3) | (p > 0.8)).astype(int)  # right at both ends
    probs = np.stack([1 - p, p], axis=1)
    fitted = BetaCalibration().fit(probs, labels)
    assert min(fitted.maps_[0][:2]) >= 0
    assert (np.diff(fitted.transform(probs)[:, 1]) >= -1e-12).all()


def test_isotonic_calibration_of_two_classes_is_scikit_learns():
    logits, labels = predictions(500, 2)
    p = softmax(logits, axis=1)[:, 1]
    peer = IsotonicRegression(out_of_bounds="clip", y_min=0, y_max=1).fit(p, labels).predict(p)
    ours = IsotonicCalibration().fit(logits, labels).transform(logits)
    assert np.allclose(ours[:, 1], peer)


def test_histogram_binning_gives_the_share_in_each_bin():
    p = np.array([0.1, 0.15, 0.4, 0.45, 0.8, 0.9])
    probs = np.stack([1 - p, p], axis=1)
    fitted = HistogramBinning(bins=2, scheme="equal-width").fit(probs, [0, 1, 0, 0, 1, 1])
    assert fitted.transform(probs)[:, 1] == pytest.approx([0.25] * 4 + [1.0] * 2)


def test_after_histogram_binning_the_fitted_rows_are_calibrated():
    logits, labels = predictions(900, 2)
    fitted = HistogramBinning(bins=10).fit(logits, labels).transform(logits)
    for value in np.unique(fitted[:, 1]):
        assert labels[fitted[:, 1] == value].mean() == pytest.approx(value)


# ---- the face


@pytest.fixture(params=list(RECALIBRATORS))
def recalibrator(request):
    return RECALIBRATORS[request.param]()


def test_held_out_likelihood_improves_for_a_miscalibrated_model(recalibrator):
    logits, labels = predictions(4000, 3, temperature=3.0)
    probs = recalibrator.fit(logits[:2000], labels[:2000]).transform(logits[2000:])
    before = measures.brier(softmax(logits[2000:], axis=1), labels[2000:])
    assert measures.brier(probs, labels[2000:]) < before
    assert measures.ece(probs, labels[2000:]) < 0.06


@pytest.mark.parametrize("k", [2, 5])
def test_every_output_is_a_distribution_of_the_inputs_kind(recalibrator, k):
    logits, labels = predictions(200, k)
    recalibrator.fit(logits, labels)
    assert recalibrator.n_features_in_ == k
    far = np.concatenate([logits, 100 * logits[:5]])
    out = recalibrator.transform(far)
    assert out.shape == far.shape
    assert np.allclose(out.sum(1), 1)
    assert (out >= 0).all()
    assert torch.allclose(recalibrator.transform(torch.tensor(far)), torch.tensor(out))
    single = recalibrator.transform(torch.tensor(far, dtype=torch.float32))
    assert single.dtype == torch.float32
    assert torch.allclose(single.sum(1), torch.ones(len(far)))
    assert np.allclose(recalibrator.transform(pd.DataFrame(far)), out)
    assert np.array_equal(recalibrator.predict(far), out.argmax(1))
    assert np.array_equal(recalibrator.predict_proba(far), out)


def test_scikit_learn_conventions(recalibrator):
    logits, labels = predictions(100)
    with pytest.raises(NotFittedError):
        recalibrator.transform(logits)
    twin = clone(recalibrator)
    assert twin.get_params() == recalibrator.get_params()
    assert twin.set_params(floor=1e-6).floor == 1e-6
    assert recalibrator.fit(logits, labels) is recalibrator
    again = pickle.loads(pickle.dumps(recalibrator))
    assert np.array_equal(again.transform(logits), recalibrator.transform(logits))
    piped = make_pipeline(clone(recalibrator)).fit(logits, labels)
    assert np.array_equal(piped.transform(logits), recalibrator.transform(logits))


def test_probabilities_are_recognised_and_floored():
    logits, labels = predictions()
    probs = softmax(logits, axis=1)
    expected = TemperatureScaling().fit(logits, labels).transform(logits)
    assert np.allclose(TemperatureScaling().fit(probs, labels).transform(probs), expected)
    assert log_scores(np.array([[1.0, 0.0]])).tolist() == [[0.0, np.log(1e-12)]]
    assert log_scores(np.array([[1.0, 0.0]]), "logits").tolist() == [[1.0, 0.0]]


def test_bad_input_is_named(recalibrator):
    logits, labels = predictions(20, 3)
    with pytest.raises(ValueError, match="row 3"):
        recalibrator.fit(np.where(np.arange(20)[:, None] == 3, np.nan, logits), labels)
    with pytest.raises(ValueError, match="y: row 0 is 7"):
        recalibrator.fit(logits, np.where(np.arange(20) == 0, 7, labels))
    with pytest.raises(ValueError, match="same number of rows"):
        recalibrator.fit(logits, labels[:-1])
    with pytest.raises(ValueError, match="1 class"):
        recalibrator.fit(logits, np.zeros(20, int))
    with pytest.raises(ValueError, match="empty"):
        recalibrator.fit(np.empty((0, 3)), [])
    with pytest.raises(ValueError, match="X: has 2 classes; expected 3"):
        recalibrator.fit(logits, labels).transform(logits[:, :2])
    with pytest.raises(ValueError, match="inputs"):
        clone(recalibrator).set_params(inputs="odds").fit(logits, labels)


def test_probabilities_are_required_where_they_are_announced():
    logits, labels = predictions(20, 3)
    with pytest.raises(ValueError, match="X: row"):
        TemperatureScaling(inputs="probs").fit(logits, labels)
    with pytest.raises(ValueError, match="bounds"):
        fit_temperature(logits, labels, bounds=(2.0, 1.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_temperature_is_found_on_the_gpu():
    logits, labels = predictions(5000)
    on_gpu = fit_temperature(torch.tensor(logits, device="cuda"), torch.tensor(labels))
    assert on_gpu == pytest.approx(fit_temperature(logits, labels), rel=1e-8)
