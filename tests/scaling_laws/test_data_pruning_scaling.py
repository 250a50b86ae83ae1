"""The pruned perceptron against its replica equations, simulations and known limits; scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import ndtr, ndtri

from tests.plots import js
from workbench.scaling_laws import figures_data_pruning_scaling as figures
from workbench.scaling_laws.data_pruning_scaling import (
    el2n_scores,
    frontier,
    max_margin,
    perceptron_theory,
    prototype_scores,
    prune,
    simulate,
)
from workbench.scaling_laws.experiments import data_pruning_scaling as study

SMALL = {"pools": (2.5, 5, 20), "more": (80,), "keeps": (0.2, 0.5, 1), "degrees": (0, 20)}


# --- theory


@pytest.mark.parametrize(("pool", "keep"), [(0.7, 1), (5, 1), (10, 0.5), (20, 0.2), (5, 0.2)])
def test_the_solution_satisfies_the_papers_equations(pool, keep):
    left, right = study.replica_sides(pool, keep)
    assert right == pytest.approx(left, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("pool", "keep", "theta", "which"),
    [
        (10, 0.3, 0.35, "hard"),
        (4, 0.5, 0.7, "hard"),
        (20, 0.5, 0.2, "hard"),
        (3, 0.5, 0.35, "easy"),
    ],
)
def test_an_imperfect_probe_satisfies_the_papers_three_equations(pool, keep, theta, which):
    """Equations (1)-(3) of appendix A over fields t along the student and z along the probe."""
    student = perceptron_theory(pool, keep, theta=theta, which=which)
    R, rho, kappa = float(student.R), float(student.rho), float(student.kappa)
    alpha, cos, sin2, rest = keep * pool, np.cos(theta), np.sin(theta) ** 2, 1 - rho**2
    u, du = np.polynomial.legendre.leggauss(200)
    u, du = (u + 1) / 2, du / 2
    low, high = (0, -ndtri((1 - keep) / 2)) if which == "hard" else (-ndtri(keep / 2), 8)
    z = low + (high - low) * u
    weight = np.tile((high - low) * du * np.exp(-z * z / 2) / np.sqrt(2 * np.pi) / keep, 2)
    z = np.concatenate([z, -z])[:, None]
    start = np.minimum(rho * z - 9 * np.sqrt(rest), kappa)
    t = start + (kappa - start) * u
    weight = weight[:, None] * (kappa - start) * du * (kappa - t)
    scale = np.sqrt(sin2 - R * R - rho * rho + 2 * rho * R * cos)
    gamma = z * (rho * R - cos) - t * (R - rho * cos)
    delta = z * z * (rho**2 + cos**2 - 2 * rho * R * cos) + t * t * sin2
    edge = np.exp(-(delta + 2 * t * z * (R * cos - rho)) / (2 * scale**2))
    inside = np.exp(-((t - rho * z) ** 2) / (2 * rest)) / np.sqrt(2 * np.pi * rest)
    inside *= ndtr(-gamma / np.sqrt(rest) / scale)
    border = edge * (rho * R - cos) / (2 * np.pi * scale * rest)
    assert (R - rho * cos) / sin2 == pytest.approx(
        alpha / (np.pi * scale) * (weight * edge).sum(), rel=1e-5
    )
    assert scale**2 / sin2 == pytest.approx(
        2 * alpha * (weight * inside * (kappa - t)).sum(), rel=1e-5
    )
    assert (rho - R * cos) / sin2 == pytest.approx(
        2 * alpha * (weight * (inside * (z - rho * t) / rest + border)).sum(), rel=1e-5
    )


def test_without_pruning_the_error_falls_as_half_over_alpha():
    """Opper and Kinzel: the perceptron of maximal stability errs 0.50 / alpha for large alpha."""
    far = perceptron_theory(np.array([200.0, 400.0]))
    assert far.error * [200, 400] == pytest.approx([0.5, 0.5], abs=0.01)


def test_few_examples_teach_next_to_nothing():
    assert perceptron_theory(1e-3).error == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("theta", [0.3, np.pi / 2])
@pytest.mark.parametrize("which", ["hard", "easy"])
def test_keeping_everything_ignores_probe_and_order(theta, which):
    plain = perceptron_theory([1.5, 6.0])
    same = perceptron_theory([1.5, 6.0], 1.0, theta=theta, which=which)
    assert same.error == pytest.approx(plain.error, rel=2e-4)
    assert same.kappa == pytest.approx(plain.kappa, rel=2e-4)


def test_a_probe_at_chance_prunes_at_random():
    """At a right angle the probe knows nothing of the label, yet it thins one direction out."""
    chance = perceptron_theory(30.0, 0.5, theta=np.pi / 2).error
    fewer = perceptron_theory(15.0).error
    assert chance == pytest.approx(fewer, rel=0.05)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.5, 30), st.floats(0.15, 1), st.floats(0, 0.6), st.sampled_from(["hard", "easy"]))
def test_order_parameters_stay_in_their_ranges(pool, keep, theta, which):
    one = perceptron_theory(pool, keep, theta=theta, which=which)
    more = perceptron_theory(1.3 * pool, keep, theta=theta, which=which)
    assert 0 < one.error < 0.5 and one.kappa > 0 and 0 < one.R < 1
    assert one.error == pytest.approx(np.arccos(one.R) / np.pi, rel=1e-6)
    assert more.kappa < one.kappa and more.error < one.error + 1e-6


@pytest.mark.parametrize(
    ("pool", "keep", "degrees", "which"),
    [(2.5, 0.5, 0, "hard"), (2.5, 0.5, 20, "easy"), (10, 0.4, 20, "hard"), (8, 0.5, 0, "easy")],
)
def test_simulations_scatter_around_the_theory(pool, keep, degrees, which):
    theta = np.radians(degrees)
    draws = [
        simulate(pool, keep, n=150, theta=theta, which=which, random_state=s) for s in range(12)
    ]
    solved = perceptron_theory(pool, keep, theta=theta, which=which)
    for name, slack in (("error", 0.006), ("rho", 0.02), ("kappa", 0.03), ("support", 0.05)):
        seen = np.array([getattr(draw, name) for draw in draws])
        spread = seen.std(ddof=1) / np.sqrt(len(seen))
        assert seen.mean() == pytest.approx(float(getattr(solved, name)), abs=4 * spread + slack)


def test_hard_helps_when_data_are_plentiful_and_hurts_when_scarce():
    assert perceptron_theory(20, 0.5).error < perceptron_theory(10).error
    scarce = perceptron_theory(2, 0.5)
    assert scarce.error > perceptron_theory(1).error
    assert perceptron_theory(2, 0.5, which="easy").error < scarce.error


def test_the_frontier_is_the_least_error_over_shares():
    keeps = np.array([0.1, 0.3, 1.0])
    best, error = frontier(np.array([1.0, 6.0]), theta=0.2, keeps=keeps)
    for a, share, e in zip([1.0, 6.0], best, error, strict=True):
        each = [float(perceptron_theory(a / f, f, theta=0.2).error) for f in keeps]
        assert e == pytest.approx(min(each)) and share == keeps[int(np.argmin(each))]


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="alpha_tot"):
        perceptron_theory(0.0)
    with pytest.raises(ValueError, match="keep"):
        perceptron_theory(1.0, [0.5, 1.2])
    with pytest.raises(ValueError, match="theta"):
        perceptron_theory(1.0, 0.5, theta=2.0)
    with pytest.raises(ValueError, match="which"):
        perceptron_theory(1.0, 0.5, which="odd")


# --- simulation


def test_the_margin_is_that_of_a_quadratic_programme():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((30, 6))
    y = np.sign(X @ rng.standard_normal(6))
    found = max_margin(X, y)
    rows = y[:, None] * X
    peer = minimize(
        lambda w: w @ w / 2, found / (rows @ found).min() * 1.5, jac=lambda w: w, method="SLSQP",
        constraints={"type": "ineq", "fun": lambda w: rows @ w - 1, "jac": lambda w: rows},
        options={"ftol": 1e-14, "maxiter": 500},
    ).x  # fmt: skip
    assert found == pytest.approx(peer / np.linalg.norm(peer), abs=1e-5)
    assert np.linalg.norm(found) == pytest.approx(1)


def test_labels_that_no_plane_separates_are_refused():
    with pytest.raises(ValueError, match="no hyperplane"):
        max_margin([[1.0, 0.0], [2.0, 0.0]], [1, -1])
    with pytest.raises(ValueError, match="y: expected labels"):
        max_margin([[1.0, 0.0]], [0])
    with pytest.raises(ValueError, match="alpha_tot"):
        simulate(-1.0)


# --- scores


def test_el2n_is_an_explicit_mean_of_norms():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), (3, 7))
    labels = rng.integers(4, size=7)
    by_hand = [
        np.mean([np.linalg.norm(probs[m, i] - np.eye(4)[labels[i]]) for m in range(3)])
        for i in range(7)
    ]
    assert el2n_scores(probs, labels) == pytest.approx(by_hand)
    certain = np.eye(4)[labels][None]
    assert el2n_scores(certain, labels).tolist() == [0] * 7
    with pytest.raises(ValueError, match="labels: expected 7"):
        el2n_scores(probs, labels[:5])


def test_prototypes_see_directions_only():
    rng = np.random.default_rng(1)
    centre = np.eye(5)[rng.integers(3, size=120)]
    Z = centre + 0.1 * rng.standard_normal((120, 5))
    scores = prototype_scores(Z, 3)
    turned = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    scaled = Z * rng.uniform(0.5, 4, (120, 1))
    assert prototype_scores(scaled @ turned, 3) == pytest.approx(scores, abs=1e-6)
    cosine = (Z * centre).sum(1) / np.linalg.norm(Z, axis=1)
    assert np.corrcoef(scores, 1 - cosine)[0, 1] > 0.9
    assert (scores >= -1e-12).all() and (scores <= 2).all()
    with pytest.raises(ValueError, match="k: expected at most 120"):
        prototype_scores(Z, 121)
    with pytest.raises(ValueError, match="Z: a row is zero"):
        prototype_scores(np.zeros((4, 2)), 2)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-5, 5), min_size=3, max_size=40), st.floats(0.05, 1), st.integers(0, 1000)
)
def test_pruning_keeps_the_share_asked_for(scores, keep, seed):
    values = np.array(scores)
    labels = np.random.default_rng(seed).integers(3, size=len(values))
    hard, easy = prune(values, keep), prune(values, keep, which="easy")
    count = max(1, round(keep * len(values)))
    assert len(hard) == len(easy) == len(set(hard)) == count
    assert np.sort(values[hard]).tolist() == np.sort(values)[len(values) - count :].tolist()
    assert np.sort(values[easy]).tolist() == np.sort(values)[:count].tolist()
    balanced = prune(values, keep, labels=labels)
    assert len(balanced) == count
    for c in set(labels.tolist()):
        assert (labels[balanced] == c).sum() >= int(0.5 * keep * (labels == c).sum())


def test_the_balance_moves_places_between_classes():
    labels = np.repeat([0, 1], 50)
    scores = np.concatenate([np.arange(50.0), 100 + np.arange(50.0)])
    assert (labels[prune(scores, 0.4)] == 0).sum() == 0
    assert (labels[prune(scores, 0.4, labels=labels)] == 0).sum() == 10
    assert (labels[prune(scores, 0.4, labels=labels, floor=1.0)] == 0).sum() == 20
    with pytest.raises(ValueError, match="keep"):
        prune(scores, 0.0)
    with pytest.raises(ValueError, match="which"):
        prune(scores, 0.5, which="odd")


# --- experiments and explorer


def test_a_perceptron_row_is_paired_and_repeatable():
    row = study.perceptron(3, alpha_tot=2.5, keep=0.5, degrees=20, dimension=40)
    again = study.perceptron(3, alpha_tot=2.5, keep=0.5, degrees=20, dimension=40)
    assert row == again and set(row) >= {"hard", "easy", "random", "theory_hard"}
    assert row["theory_random"] == pytest.approx(float(perceptron_theory(1.25).error))


def test_digits_are_pruned_at_equal_numbers():
    row = study.digits_pruned(0, pool=120, name="digits", keeps=(0.5,), components=10, models=2)
    assert set(row) == {
        "full", "random_50", "prototype_hard_50", "prototype_easy_50", "el2n_hard_50",
        "el2n_easy_50", "agreement",
    }  # fmt: skip
    assert all(0 <= row[name] <= 100 for name in row if name != "agreement")
    assert -1 <= row["agreement"] <= 1


def test_both_laws_of_decay_see_the_same_rows():
    row = study.decay_shape(0, size=0)
    assert 0 < row["power"] < 50 and 0 < row["exponential"] < 50 and row["last"] > 0


@pytest.fixture(scope="module")
def table():
    return study.theory_table(0, **SMALL)


def test_the_table_holds_the_theory(table):
    assert table["hard"].shape == (2, 4, 3) and table["easy"].shape == (2, 3, 3)
    there = perceptron_theory(20, 0.5, theta=np.radians(20)).error
    assert table["hard"][1, 2, 1] == pytest.approx(float(there))
    assert table["random"][2, 1] == pytest.approx(float(perceptron_theory(10.0).error))


def test_the_interpolated_frontier_is_near_the_solved_one():
    wide = study.theory_table(0, degrees=(20,))
    error, _ = figures.frontiers(wide, np.array([2.0, 6.0]))
    _, solved = frontier(np.array([2.0, 6.0]), theta=np.radians(20), keeps=wide["keeps"])
    assert error[0] == pytest.approx(solved, rel=0.02)


def test_the_exported_formula_is_the_explorer(table):
    import pandas as pd

    runs = pd.DataFrame(
        {"seed": s, "alpha_tot": 20, "keep": 0.5, "degrees": 20}
        | study.perceptron(s, alpha_tot=20, keep=0.5, degrees=20, dimension=30)
        for s in range(3)
    )
    explorer = figures.explore_pruning(table, runs)
    assert js.check_formula(explorer) > 5
    at = explorer.result(alpha_tot=20, keep=0.5, theta=20)
    assert explorer.seconds < 0.05
    assert at["error"] == pytest.approx(table["hard"][1, 2, 1])
    assert len(at["sim_x"]) == 1 and at["hard_low"][0] <= at["sim_hard"][0] <= at["hard_high"][0]
    assert len(json.dumps(explorer.export(), separators=(",", ":"))) < 40_000
