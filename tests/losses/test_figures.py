"""The explorer of margin losses shows what the mathematics says."""

import js
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from workbench import losses
from workbench.losses import figures, margins


def test_bounds_of_known_losses():
    excess = np.array([0.0, 0.1, 0.3, 0.6])
    np.testing.assert_allclose(margins.error_bound(margins.hinge, excess), excess, atol=0.011)
    np.testing.assert_allclose(
        margins.error_bound(margins.squared, excess), np.sqrt(excess), atol=0.011
    )
    assert (margins.error_bound(margins.perceptron, excess) == 1).all()


def test_psi_is_the_convex_hull_of_the_calibration_function():
    def bumpy(z):  # calibrated, not convex: its calibration function is no hull
        return margins.bce(z) + 0.3 * torch.sigmoid(-6 * (z - 1))

    theta = np.linspace(0, 1, 41)
    raw, hull = margins.calibration(bumpy, theta), margins.psi(bumpy, theta)
    assert (hull <= raw + 1e-12).all() and (np.diff(hull, 2) > -1e-9).all()
    assert hull[0] == 0 and hull[-1] == pytest.approx(raw[-1])


def test_two_classes_of_a_multiclass_loss_are_its_margin():
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(margins.two_class(F.cross_entropy)(z), margins.bce(z))


def test_the_papers_losses_are_where_theory_puts_them():
    known = figures.default_losses()
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)
    half = known["comp-sum, tau 0.5"](z)
    torch.testing.assert_close(half, 2 * ((1 + torch.exp(-z)).sqrt() - 1))
    ldr = known["LDR-KL, lambda 1"](z)
    torch.testing.assert_close(ldr, torch.log((1 + torch.exp(0.1 - z)) / 2))


def test_the_explorer_reports_both_losses_at_the_margin():
    board = losses.explore(["hinge", "savage"], margin=-1.0)
    found = board.compute(**board.state)
    assert found["a_loss_here"] == pytest.approx(2)
    assert found["b_loss_here"] == pytest.approx(0.534, abs=1e-3)
    assert found["a_slope_here"] == pytest.approx(-1)
    assert (found["a_calibrated"], found["b_sign"]) == ("yes", "not convex")


def test_a_loss_of_yours():
    board = losses.explore({"mine": lambda z: (1 - z).clamp(min=0) ** 3, "hinge": margins.hinge})
    found = board.compute(**board.state)
    assert found["a"] == "mine" and found["a_calibrated"] == "yes"
    assert board.restore().startswith("losses.explore(losses, first='mine'")


def test_the_exported_page_computes_the_same():
    js.check_formula(losses.explore(["logistic", "hinge", "savage", "perceptron"]))


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="losses: 'nonsense' is none of"):
        losses.explore(["logistic", "nonsense"])
    with pytest.raises(ValueError, match="at least two"):
        losses.explore(["logistic"])
