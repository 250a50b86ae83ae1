"""Margin losses and what theory says about each."""

import numpy as np
import pytest
import torch
from scipy.stats import bernoulli

from workbench.losses import margins

THETA = np.linspace(0.05, 1, 12)


def entropy(p):
    return bernoulli(p).entropy()


@pytest.mark.parametrize(
    ("name", "psi"),
    [  # closed forms of Bartlett, Jordan and McAuliffe 2006, table 1 and section 2
        ("hinge", lambda t: t),
        ("squared hinge", lambda t: t**2),
        ("least squares", lambda t: t**2),
        ("exponential", lambda t: 1 - np.sqrt(1 - t**2)),
        ("logistic", lambda t: np.log(2) - entropy((1 + t) / 2)),
        ("sigmoid (MAE)", lambda t: t / 2),
        ("savage", lambda t: t**2 / 4),
        ("ramp", lambda t: t / 2),
        ("perceptron", lambda t: 0 * t),
    ],
)
def test_calibration_function_is_the_closed_form(name, psi):
    found = margins.calibration(margins.MARGIN_LOSSES[name], THETA)
    np.testing.assert_allclose(found, psi(THETA), atol=2e-6)


def test_losses_at_a_few_margins():
    z = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    expected = {
        "logistic": [1.313262, 0.693147, 0.126928],
        "hinge": [2, 1, 0],
        "squared hinge": [4, 1, 0],
        "exponential": [2.718282, 1, 0.135335],
        "least squares": [4, 1, 1],
        "focal": [0.701868, 0.173287, 0.001804],
        "sigmoid (MAE)": [0.731059, 0.5, 0.119203],
        "savage": [0.534447, 0.25, 0.014209],
        "ramp": [1, 0.5, 0],
        "perceptron": [1, 0, 0],
    }
    assert set(expected) == set(margins.MARGIN_LOSSES)
    for name, values in expected.items():
        np.testing.assert_allclose(margins.MARGIN_LOSSES[name](z), values, atol=1e-6)


def test_derivatives_are_the_closed_forms():
    z = np.linspace(-2, 2, 9)
    value, slope, bend = margins.derivatives(margins.bce, z)
    p = 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(value, np.log1p(np.exp(-z)))
    np.testing.assert_allclose(slope, p - 1)
    np.testing.assert_allclose(bend, p * (1 - p))
    assert not margins.derivatives(margins.hinge, z)[2].any()  # no graph at all


def test_properties_of_each_loss():
    found = {name: margins.shape(loss) for name, loss in margins.MARGIN_LOSSES.items()}
    assert {n for n, s in found.items() if s.convex} == {
        "logistic", "hinge", "squared hinge", "exponential", "least squares", "perceptron",
    }  # fmt: skip
    assert {n for n, s in found.items() if not s.calibrated} == {"perceptron"}
    assert {n for n, s in found.items() if s.bounded} == {"sigmoid (MAE)", "savage", "ramp"}


def test_a_convex_loss_is_calibrated_exactly_when_it_falls_at_zero():
    for loss in margins.MARGIN_LOSSES.values():
        s = margins.shape(loss)
        if s.convex:
            left, right = s.slope_at_zero
            smooth = abs(left - right) < 1e-3
            assert s.calibrated == (smooth and left < 0)


def test_a_loss_of_your_own():
    s = margins.shape(lambda z: torch.where(z < 0, -3 * z, 0 * z) + 1)  # kink at 0
    assert s.convex and not s.calibrated


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="low"):
        margins.shape(margins.bce, 1, 1)
    with pytest.raises(ValueError, match="theta"):
        margins.calibration(margins.bce, 1.5)
    with pytest.raises(ValueError, match="loss: expected shape"):
        margins.derivatives(lambda z: z.sum(), np.zeros(3))
