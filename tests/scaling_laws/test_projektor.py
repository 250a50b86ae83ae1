"""Projektor against POT, closed forms, finite differences and explicit loops."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from sklearn.linear_model import LinearRegression

from tests.plots import js
from workbench.scaling_laws import figures_projektor as figures
from workbench.scaling_laws import label_transport, projektor
from workbench.scaling_laws.experiments import projektor as study
from workbench.scaling_laws.projektor import (
    FORMS,
    Projector,
    Transport,
    calibrated_gradient,
    fit_stage1,
    ground_cost,
    label_distances,
    ot_label_distance,
    project,
    select,
    simplex_grid,
)

ot = pytest.importorskip("ot")


def labelled(n, shift=0.0, seed=0, d=4, classes=3):
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), rng.integers(classes, size=n - classes)])
    return rng.standard_normal((n, d)) * (1 + y[:, None]) + y[:, None] + shift, y


# sizes without common factors: at generic shares the linear programme has one dual solution
SOURCES = [labelled(37, seed=1), labelled(41, 0.7, seed=2), labelled(53, -1.0, seed=3)]
TARGET = labelled(47, 0.3, seed=4)
SHARES = np.array([0.31, 0.47, 0.22])


@pytest.fixture(scope="module")
def both():
    """Transports and stage-1 fits of made-up accuracies at two sizes."""
    Q = simplex_grid(3, 4)
    transports = [Transport([(X[:n], y[:n]) for X, y in SOURCES], TARGET) for n in (25, 37)]
    fits = []
    for n, transport in zip((25, 37), transports, strict=True):
        distance = transport.many(Q)
        acc = 60 + 4 * math.log(n) - (1 + Q[:, 0]) * distance + 9 * Q[:, 1] - 20 * Q[:, 1] ** 2
        fits.append(fit_stage1(Q, distance, acc))
    return Projector(25, 37, fits, transports)


# --- ground cost and distance


def test_label_distance_is_the_textbook_formula():
    (Xa, ya), (Xb, yb) = labelled(40, seed=5), labelled(60, 1.0, seed=6)
    found = label_distances(Xa, ya, Xb, yb)
    for i in range(3):
        for j in range(3):
            A, B = Xa[ya == i], Xb[yb == j]
            S, T = np.cov(A.T, bias=True), np.cov(B.T, bias=True)
            root = sqrtm(S).real
            expected = np.sum((A.mean(0) - B.mean(0)) ** 2) + np.trace(
                S + T - 2 * sqrtm(root @ T @ root).real
            )
            assert found[i, j] == pytest.approx(expected, rel=1e-7)
            library = ot.gaussian.bures_wasserstein_distance(A.mean(0), B.mean(0), S, T)
            assert found[i, j] == pytest.approx(float(library) ** 2, rel=1e-6)


def test_a_class_of_one_point_is_a_point():
    found = label_distances([[1.0, 2.0]], [0], [[4.0, 6.0]], [7])
    assert found == pytest.approx(np.array([[25.0]]))


def test_cost_is_an_explicit_loop():
    (Xa, ya), (Xb, yb) = labelled(9, seed=7), labelled(8, seed=8)
    W = label_distances(Xa, ya, Xb, yb)
    found = ground_cost(Xa, ya, Xb, yb, label_weight=0.5)
    for i in range(9):
        for j in range(8):
            expected = np.sum((Xa[i] - Xb[j]) ** 2) + 0.5 * W[ya[i], yb[j]]
            assert found[i, j] == pytest.approx(expected)


def test_distance_is_pots():
    weights = np.random.default_rng(0).dirichlet(np.ones(37))
    cost = ground_cost(*SOURCES[0], *TARGET)
    value, _ = ot_label_distance(*SOURCES[0], *TARGET, weights=weights)
    assert value == pytest.approx(ot.emd2(weights, np.full(47, 1 / 47), cost), rel=1e-10)
    _, far = ot_label_distance(*SOURCES[0], *TARGET, label_weight=0.0)
    assert far.shape == (37,)


def test_on_a_line_the_distance_is_that_of_sorted_points():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal(30), rng.standard_normal(30) + 1
    value, _ = ot_label_distance(a[:, None], np.zeros(30), b[:, None], np.zeros(30), label_weight=0)
    assert value == pytest.approx(np.mean((np.sort(a) - np.sort(b)) ** 2))


@settings(max_examples=10, deadline=None)
@given(st.integers(5, 30), st.integers(0, 1000))
def test_identical_sets_are_at_distance_zero(n, seed):
    value, _ = ot_label_distance(*labelled(n, seed=seed), *labelled(n, seed=seed))
    assert value == pytest.approx(0.0, abs=1e-9)


def test_wrong_labels_cost_and_renamed_ones_do_not():
    X, y = TARGET
    wrong = np.where(np.arange(47) % 3 == 0, (y + 1) % 3, y)
    assert ot_label_distance(X, wrong, X, y, label_weight=0.0)[0] == pytest.approx(0, abs=1e-9)
    assert ot_label_distance(X, wrong, X, y)[0] > 0.1
    assert ot_label_distance(X, (y + 1) % 3, X, y)[0] == pytest.approx(0, abs=1e-9)


def test_a_little_entropy_changes_little():
    exact, _ = ot_label_distance(*SOURCES[0], *TARGET)
    smooth, _ = ot_label_distance(*SOURCES[0], *TARGET, reg=2.0)
    assert smooth == pytest.approx(exact, rel=0.3)


# --- shares


@pytest.mark.parametrize("reg, rel", [(0.0, 1e-6), (5.0, 1e-5)])
def test_calibrated_gradient_is_the_finite_difference_of_the_distance(reg, rel):
    transport = Transport(SOURCES, TARGET, reg=reg)
    _, potentials = transport(SHARES)
    found = calibrated_gradient(potentials, SHARES)
    for i in range(3):
        direction = (np.eye(3)[i] - SHARES) / (1 - SHARES[i])
        step = 1e-4 if reg else 1e-7
        up, down = (transport(SHARES + sign * step * direction)[0] for sign in (1, -1))
        assert found[i] == pytest.approx((up - down) / (2 * step), rel=rel)


def test_calibrated_gradient_is_the_papers_sum_over_points():
    counts = np.array([5, 7, 4])
    dual = np.random.default_rng(2).standard_normal(16)
    owner = np.repeat(np.arange(3), counts)
    means = np.array([dual[owner == i].mean() for i in range(3)])
    found = calibrated_gradient(means, counts / 16)
    for i, n in enumerate(counts):
        own, rest = dual[owner == i].sum(), dual[owner != i].sum()
        assert found[i] == pytest.approx((own - n / (16 - n) * rest) / n)
    np.testing.assert_allclose(calibrated_gradient(means + 3.0, counts / 16), found)
    assert calibrated_gradient([1.0, 2.0], [1.0, 0.0])[0] == 0


def test_a_source_without_share_has_the_derivative_of_its_first_bit():
    transport = Transport(SOURCES, TARGET)
    corner = np.array([1.0, 0.0, 0.0])
    value, potentials = transport(corner)
    for i in (1, 2):
        ahead = transport(corner + 1e-6 * (np.eye(3)[i] - corner))[0]
        assert (ahead - value) / 1e-6 >= potentials[i] - potentials[0] - 1e-4


def test_warm_starts_change_nothing_and_planes_bound_from_below():
    transport = Transport(SOURCES, TARGET)
    Q = simplex_grid(3, 3)
    values = transport.many(Q)
    fresh = [Transport(SOURCES, TARGET)(q)[0] for q in Q]
    np.testing.assert_allclose(values, fresh, rtol=1e-9)
    np.testing.assert_allclose(transport.bound(Q), values, rtol=1e-9)
    between = np.random.default_rng(3).dirichlet(np.ones(3), 8)
    bound = transport.bound(between)
    exact = transport.many(between)
    assert (bound <= exact + 1e-9).all() and np.max(exact - bound) < 0.1 * exact.max()


def test_the_grid_holds_every_mixture_once():
    grid = simplex_grid(3, 5)
    assert len(np.unique(grid, axis=0)) == len(grid) == math.comb(7, 2)
    np.testing.assert_allclose(grid.sum(1), 1)
    assert len(simplex_grid(4, 3)) == math.comb(6, 3)


# --- stage 1


@pytest.mark.parametrize("form", FORMS)
def test_stage_one_finds_what_has_its_form(form):
    rng = np.random.default_rng(4)
    Q, distance = rng.dirichlet(np.ones(3), 60), rng.uniform(1, 5, 60)
    squares = Q[:, :2] ** 2 @ [2.0, 1.0]
    acc = {
        "projektor": 70 + Q @ [1, 5, 2] - 6 * Q[:, 2] ** 2 - (2 + squares) * distance,
        "released": 70 + Q @ [1, 5, 2] - (2 + squares) * distance,
        "linear": 70 + Q @ [1, 5, 2],
        "pseudo-quadratic": 70 + Q @ [1, 5, 2] - 9 * Q[:, 2] ** 2,
        "quadratic": 70 + Q @ [1, 5, 2] - 9 * Q[:, 0] * Q[:, 2],
    }[form]
    fit = fit_stage1(Q[:40], distance[:40], acc[:40], form=form, ridges=[1e-12])
    np.testing.assert_allclose(fit.predict(Q[40:], distance[40:]), acc[40:], rtol=1e-5)


def test_the_released_form_is_the_notebooks_regression():
    rng = np.random.default_rng(5)
    Q, distance, acc = rng.dirichlet(np.ones(3), 30), rng.uniform(1, 5, 30), rng.random(30)
    q1, q2 = Q[:, 0], Q[:, 1]
    columns = np.column_stack(
        [distance, q1, q2, q1 * distance, q2 * distance, q2**2 * distance, q1**2 * distance]
    )
    expected = LinearRegression().fit(columns, acc).predict(columns)
    fit = fit_stage1(Q, distance, acc, form="released", ridges=[1e-13])
    np.testing.assert_allclose(fit.predict(Q, distance), expected, atol=1e-5)


def test_ridge_is_chosen_by_leaving_one_mixture_out():
    rng = np.random.default_rng(6)
    Q, distance = simplex_grid(3, 4), rng.uniform(1, 5, 15)
    acc = 80 - distance + rng.standard_normal(15)
    errors = {}
    for ridge in (1e-4, 1e-2, 1.0):
        fit = fit_stage1(Q, distance, acc, ridges=[ridge])
        errors[ridge] = fit.error
    chosen = fit_stage1(Q, distance, acc, ridges=list(errors))
    assert chosen.ridge == min(errors, key=errors.get)
    assert chosen.error == pytest.approx(min(errors.values()))


def test_the_gradient_is_the_finite_difference_of_the_projection(both):
    found = both.gradient(SHARES, 500)
    for direction in ([1, -1, 0], [0, 1, -1], [-0.5, 1, -0.5]):
        step = 1e-7 * np.array(direction, float)
        up, down = (both.predict([SHARES + sign * step], 500)[0] for sign in (1, -1))
        assert found @ direction == pytest.approx((up - down) / 2e-7, rel=1e-4)


def test_the_printed_gradient_is_that_of_one_term_only(both):
    printed = study.Printed(25, 37, both.fits, both.transports)
    fit, transport = both.fits[0], both.transports[0]
    distance, potentials = transport(SHARES)
    found = printed.gradient(SHARES, 25)
    slope = calibrated_gradient(potentials, SHARES)
    for i, q in enumerate(SHARES):
        c1, c2, b1, b2 = fit.plain[i], fit.plain[3 + i], fit.moving[1 + i], fit.moving[4 + i]
        own = (b2 * q * q + b1 * q + fit.moving[0]) * slope[i]
        assert found[i] == pytest.approx(own + (2 * b2 * q + b1) * distance + 2 * c2 * q + c1)


# --- stage 2 and selection


def test_projection_keeps_both_sizes_and_is_not_clipped():
    assert project(10_000, 1000, 1500, 0.75, 0.80) == pytest.approx(1.0339, abs=5e-5)
    np.testing.assert_allclose(project([120, 180], 120, 180, 0.3, 0.4), [0.3, 0.4])


@settings(max_examples=30, deadline=None)
@given(st.floats(-5, 5), st.floats(-50, 50), st.floats(1, 1e7))
def test_projection_is_exact_for_log_linear_curves(slope, level, n):
    v0, v1 = (level + slope * math.log(m) for m in (120, 180))
    expected = level + slope * math.log(n)
    assert float(project(n, 120, 180, v0, v1)) == pytest.approx(expected, abs=1e-7)


def test_selection_climbs_and_stays_on_the_simplex(both):
    path = select(both, 500, step=2e-3)
    np.testing.assert_allclose(path.sum(1), 1)
    assert path.min() >= 0
    value = both.predict(path[[0, -1]], 500)
    assert value[1] > value[0]
    best = both.predict(simplex_grid(3, 12), 500).max()
    long = select(both, 500, step=5e-3, decay=0.97, iterations=200)
    assert both.predict(long[[-1]], 500)[0] > best - 0.3


def test_selection_at_the_smallest_size_ignores_the_other(both):
    other = Projector(25, 37, [both.fits[0], both.fits[0]], both.transports)
    np.testing.assert_allclose(select(both, 25)[-1], select(other, 25)[-1])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ground_cost([[1.0]], [0, 1], [[1.0]], [0]), "X and y of a"),
        (lambda: ground_cost([[1.0]], [0], [[1.0]], [0], label_weight=-1), "label_weight"),
        (lambda: ot_label_distance(*SOURCES[0], *TARGET, weights=[1.0]), "weights"),
        (lambda: Transport([SOURCES[0]], TARGET), "sources"),
        (lambda: Transport(SOURCES, TARGET)([0.5, 0.6, 0.1]), "q: expected 3 shares"),
        (lambda: fit_stage1([[0.5, 0.6]], [1.0], [1.0]), "Q: expected shares"),
        (lambda: fit_stage1([[0.5, 0.5]], [1.0, 2.0], [1.0]), "same number of rows"),
        (lambda: fit_stage1([[0.5, 0.5]], [1.0], [1.0], form="cubic"), "form"),
        (lambda: project(0, 1, 2, 0.1, 0.2), "n: expected"),
        (lambda: project(5, 2, 2, 0.1, 0.2), "two different sizes"),
        (lambda: simplex_grid(1, 4), "k: expected"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_pot_the_extra_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(label_transport.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"paper-workbench\[scaling-laws\]"):
        ot_label_distance(*SOURCES[0], *TARGET)
    assert projektor.project(2, 1, 2, 0.0, 1.0) == 1.0


# --- explorer and experiment


def test_the_exported_formula_is_the_projection(both):
    explorer = figures.explore_market(both, 500)
    assert js.check_formula(explorer, rtol=1e-6) > 20
    explorer.result()
    assert explorer.seconds < 0.05
    assert len(json.dumps(explorer.export())) < 40_000


@pytest.mark.parametrize("form", FORMS)
def test_the_explorer_knows_every_form(both, form):
    Q = simplex_grid(3, 4)
    fits = [
        fit_stage1(Q, t.bound(Q), 50 + Q @ [3, 1, 2] + Q[:, 0] * Q[:, 1], form=form)
        for t in both.transports
    ]
    explorer = figures.explore_market(Projector(25, 37, fits, both.transports), 500)
    js.check_formula(explorer, states=[{"first": 0.3, "rest": 0.25, "n": 90.0}], rtol=1e-6)


def test_the_explorer_wants_three_sources_and_a_solved_mixture(both):
    two = [Transport(SOURCES[:2], TARGET)] * 2
    with pytest.raises(ValueError, match="three sources"):
        figures.explore_market(Projector(25, 37, both.fits, two), 500)
    unsolved = [Transport(SOURCES, TARGET)] * 2
    with pytest.raises(ValueError, match="solve some mixtures"):
        figures.explore_market(Projector(25, 37, both.fits, unsolved), 500)


def test_sellers_hold_what_they_promise():
    seller = study.market(0)
    rows = [{tuple(x) for x in X} for X, _ in seller.stocks]
    assert not rows[0] & rows[1] and not rows[1] & rows[2]
    assert not {tuple(x) for x in seller.x} & (rows[0] | rows[1] | rows[2])
    assert [len(y) for _, y in seller.stocks] == [1200] * 3
    for own, rich, (_, y) in zip(study.CLASSES[:2], study.RICH, seller.stocks, strict=False):
        assert np.mean(np.isin(y, list(own))) == pytest.approx(rich * len(own), abs=0.01)
    assert np.mean(seller.stocks[2][1] < 7) == pytest.approx(0.3 * 0.7 + 0.01 * 0.7, abs=0.04)
    assert np.bincount(seller.y).tolist() == [22] * 4 + [30] * 3 + [90] * 3


def test_the_rational_baseline_finds_a_rational_truth():
    Q = simplex_grid(3, 5)
    acc = 100 - 1 / (Q @ [0.02, 0.1, 0.05]) - 1 / (Q @ [0.3, 0.05, 0.2])
    value, left = study.fit_rational(Q, acc)
    fresh = np.random.default_rng(7).dirichlet(np.ones(3), 20)
    truth = 100 - 1 / (fresh @ [0.02, 0.1, 0.05]) - 1 / (fresh @ [0.3, 0.05, 0.2])
    np.testing.assert_allclose(value(fresh), truth, atol=0.05)
    assert left < 0.1


def test_the_study_predicts_before_it_measures(monkeypatch):
    """Trainings on more than the pilots come after every fit, and on mixtures unseen by it."""
    calls = []
    for name in ("accuracy", "fit_stage1"):
        inner = getattr(study, name)
        monkeypatch.setattr(study, name, lambda *a, f=inner, n=name, **o: [calls.append(
            (n, a[2] if n == "accuracy" else 0)), f(*a, **o)][1])  # fmt: skip
    row = study.predict_market(
        0, n0=60, n1=90, size=300, parts=3, unseen=4, repeats=1, repeats_large=1, iterations=2
    )
    fits = [i for i, (name, _) in enumerate(calls) if name == "fit_stage1"]
    large = [i for i, (_, n) in enumerate(calls) if n == 300]
    assert max(fits) < min(large) and len(large) == 4 + 7
    assert row["err_projektor"] == pytest.approx(
        np.abs(row["projected_projektor"] - row["truth"]).mean()
    )
    assert row["best_form"] in study.BASELINES and row["err_best"] == row[f"err_{row['best_form']}"]
    assert min(row[f"loo_{form}"] for form in study.BASELINES) == row[f"loo_{row['best_form']}"]
    assert min(v for k, v in row.items() if k.startswith("regret_")) >= 0


def test_losses_are_projected_from_the_two_smallest_budgets():
    table = study.project_losses()
    assert len(table) == 36 and set(table.seed) == {0, 1}
    assert np.isfinite(table[["bias_linear", "bias_power"]].to_numpy()).all()
