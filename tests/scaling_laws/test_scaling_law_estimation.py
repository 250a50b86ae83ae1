"""Forecasts of a target by protocol: known laws, counting of unknowns, early stops, explorer."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import curve_fit

from tests.plots import js
from workbench import lab
from workbench.scaling_laws import figures_scaling_law_estimation as figures
from workbench.scaling_laws.early_stops import HOFFMANN, lbfgsb
from workbench.scaling_laws.experiments import scaling_law_estimation as study
from workbench.scaling_laws.fit import fit_law
from workbench.scaling_laws.scaling_law_estimation import (
    NAMES,
    Protocol,
    are,
    are_grid,
    borrow,
    component_law,
    compute_plan,
    estimate,
    predict,
)

TRUE = {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.34, "beta": 0.37}


def family(sizes=(1e8, 4e8, 16e8, 64e8, 256e8), law=TRUE, noise=0.0, points=12, seed=0):
    rng = np.random.default_rng(seed)
    rows = [(f"{n:.0e}", n, d) for n in sizes for d in np.geomspace(0.03, 1, points) * 60 * n**0.8]
    frame = pd.DataFrame(rows, columns=["model", "N", "D"])
    shake = np.exp(noise * rng.standard_normal(len(frame)))
    return frame.assign(loss=predict(law, frame.N, frame.D) * shake)


# --- the score


def test_are_is_zero_for_the_truth_and_relative():
    runs = family()
    assert are(predict(TRUE, runs.N, runs.D), runs.loss) == 0
    assert are([1.1, 1.8], [1.0, 2.0]) == pytest.approx(0.1)
    assert are([11, 18], [10, 20]) == pytest.approx(are([1.1, 1.8], [1.0, 2.0]))


# --- the fit


@pytest.mark.parametrize("objective", ["lsq", "lsq_log", "huber_log"])
def test_a_noise_free_law_is_recovered_and_forecast(objective):
    found = estimate(family(), objective=objective)
    assert found.identified and found.are < 1e-5
    assert found.params["alpha"] == pytest.approx(0.34, rel=1e-2)
    assert found.params["E"] == pytest.approx(1.8, rel=1e-2)
    np.testing.assert_allclose(
        found.predict(found.forecast.N, found.forecast.D), found.forecast.predicted
    )


def test_least_squares_is_that_of_scipy():
    runs = family(noise=0.01)
    found = estimate(runs)
    t = found.train

    def law(x, a, b, e, alpha, beta):
        return np.exp(e) + np.exp(a) * x[0] ** -alpha + np.exp(b) * x[1] ** -beta

    start = [*np.log([found.params[q] for q in "ABE"]), 0.3, 0.3]
    theirs, _ = curve_fit(law, t[["N", "D"]].to_numpy().T, t.loss, p0=start, maxfev=20000)
    ours = ((predict(found.params, t.N, t.D) - t.loss) ** 2).sum()
    best = ((law(t[["N", "D"]].to_numpy().T, *theirs) - t.loss) ** 2).sum()
    assert ours <= best * (1 + 1e-4)


def test_order_of_rows_names_of_columns_and_unit_of_loss_change_nothing():
    runs = family(noise=0.01)
    first = are_grid(runs, fractions=(1.0,))
    shuffled = runs.sample(frac=1, random_state=1)
    named = shuffled.rename(columns={"N": "params", "D": "tokens", "loss": "val", "model": "run"})
    columns = {"N": "params", "D": "tokens", "loss": "val", "model": "run"}
    again = are_grid(named, columns=columns, fractions=(1.0,))
    np.testing.assert_allclose(first["are"], again["are"], rtol=1e-3)
    bits = are_grid(runs.assign(loss=runs.loss / np.log(2)), fractions=(1.0,))
    sure = first.identified
    np.testing.assert_allclose(first["are"][sure], bits["are"][sure], rtol=2e-2)


def test_a_grid_is_the_single_estimates():
    runs = family(noise=0.005)
    grid = are_grid(runs, models=[3, 4], fractions=(0.6, 1.0), final_only=False)
    for row in grid.itertuples():
        one = estimate(runs, n_models=row.models, fraction=row.fraction)
        assert one.are == pytest.approx(row.are, rel=1e-3)
        assert len(one.train) == row.rows


# --- which rows a fit sees


def test_protocols_choose_the_rows_they_name():
    runs = family()
    whole = runs.groupby("model").D.transform("max")
    t = estimate(runs, fraction=0.5, cut=0.1, n_models=3).train
    part = t.D / t.groupby("model").D.transform("max")
    share = runs.D / whole
    wanted = runs[(share > 0.1) & (share <= 0.5) & runs.N.isin(sorted(runs.N.unique())[:3])]
    assert sorted(t.D) == sorted(wanted.D) and part.max() == 1
    last = estimate(runs, fraction=0.5, final_only=True).train
    expected = runs[share <= 0.5].groupby("model").D.max().drop("3e+10")
    assert sorted(last.D) == sorted(expected)
    near = estimate(runs, n_models=2, which="largest").train
    assert set(near.N) == {16e8, 64e8}
    ahead = estimate(runs).forecast
    assert ahead.N.unique() == [256e8] and (ahead["D"] >= 0.7 * ahead["D"].max()).all()


def test_the_target_never_enters_its_fit():
    runs = family(noise=0.01)
    other = runs.assign(loss=runs.loss.where(runs.N < 256e8, 9.0))
    first, again = (are_grid(r, fractions=[0.5], models=[3, 4]) for r in (runs, other))
    np.testing.assert_array_equal(first[list(NAMES)], again[list(NAMES)])


@pytest.mark.parametrize(
    ("models", "options", "identified"),
    [
        (2, {}, False),  # two levels, three unknowns
        (3, {}, True),
        (2, {"fixed": {"alpha": 0.34}}, True),
        (1, {"fixed": {"A": 400.0, "alpha": 0.34}}, True),
        (4, {"final_only": True}, False),  # four points, five unknowns
        (4, {"final_only": True, "fixed": {"alpha": 0.34, "beta": 0.37}}, True),
    ],
)
def test_what_can_be_identified_is_counted(models, options, identified):
    grid = are_grid(family(), models=[models], fractions=[1.0], **options)
    assert bool(grid.identified[0]) is identified
    if identified:
        assert grid["are"][0] < 1e-4


def test_unidentified_fits_agree_on_their_rows_but_not_ahead():
    runs = family()
    a = estimate(runs, n_models=2, fixed={"alpha": 0.2})
    b = estimate(runs, n_models=2, fixed={"alpha": 0.6})
    inside = [are(e.predict(e.train.N, e.train.D), e.train.loss) for e in (a, b)]
    assert max(inside) < 1e-4 < 0.01 < max(a.are, b.are)


# --- parameters from elsewhere


def test_borrowing_holds_the_size_term():
    held = borrow(TRUE)
    assert held == {"A": 400.0, "alpha": 0.34}
    assert borrow(TRUE, ("A", "E", "beta"), unit=2) == {"A": 800.0, "E": 3.6, "beta": 0.37}
    found = estimate(family(), n_models=1, fixed=held)
    assert found.are < 1e-5 and found.params["A"] == pytest.approx(400)


def test_a_law_in_the_span_of_others_is_found_along_their_components():
    rng = np.random.default_rng(0)
    low, high = np.array([5.0, 6, 0.2, 0.3, 0.3]), np.array([7.0, 8, 0.7, 0.4, 0.4])
    basis = rng.uniform(low, high, (3, 5))
    weights = rng.dirichlet(np.ones(3), 8)
    theta = weights @ basis
    natural = np.column_stack([np.exp(theta[:, :3]), theta[:, 3:]])
    params = pd.DataFrame(natural, columns=list(NAMES))
    law = component_law(params.iloc[1:], 2)
    runs = family(law=dict(params.iloc[0]))
    small = runs[runs.N < 20e8]
    fit = fit_law(small, law, objective="lsq", fixed={"mean": 1.0}, starts="grid", quiet=True)
    assert are(fit.predict(N=runs.N, D=runs.D), runs.loss) < 1e-6


def test_the_plan_is_the_lowest_loss_of_its_budget():
    n, d = compute_plan(TRUE, 1e21)
    assert 6 * n * d == pytest.approx(1e21)
    sizes = n * np.geomspace(0.5, 2, 101)
    assert np.argmin(predict(TRUE, sizes, 1e21 / 6 / sizes)) == 50


def test_printed_and_best_parameters_give_different_plans():
    n, d = compute_plan(study.PRINTED, study.BUDGET)
    assert n == pytest.approx(72.2e9, rel=1e-3) and d / n == pytest.approx(18.4, abs=0.05)
    n, d = compute_plan(study.REPLICATED, study.BUDGET)
    assert n == pytest.approx(73.2e9, rel=1e-3) and d / n == pytest.approx(17.9, abs=0.05)


# --- early stops


def noisy_points(n=240):
    rng = np.random.default_rng(0)
    size, tokens = np.exp(rng.uniform([18, 19.5], [23.5, 26.5], (n, 2))).T
    loss = predict(TRUE, size, tokens) * np.exp(0.01 * rng.standard_normal(n))
    return pd.DataFrame({"N": size, "D": tokens, "loss": loss})


def test_a_mean_stops_early_and_a_scaled_sum_does_not():
    points = noisy_points()
    stops = study.early_stops(points=points).set_index("how")
    best = fit_law(points, starts=6, quiet=True).objective
    mean, total, tight = stops.objective
    assert stops.success.iloc[:2].all()
    assert mean > total > 1.001 * best
    assert tight == pytest.approx(best, rel=1e-6)
    assert stops.iterations.iloc[0] < stops.iterations.iloc[2]
    for row in stops.itertuples():
        assert row.values[-1] == pytest.approx(row.objective)
        assert len(row.values) == len(row.path_alpha) == row.iterations + 1


def test_the_gradient_given_to_scipy_is_exact():
    points = noisy_points(60)
    args = (points.N, points.D, points.loss)
    best = lbfgsb(*args, TRUE, scale=1e3, ftol=1e-15, gtol=1e-9)
    for name in NAMES:
        for step in (0.98, 1.02):
            moved = lbfgsb(*args, best.params | {name: best.params[name] * step}, maxiter=1)
            assert moved.values[0] >= best.objective


# --- experiments


def test_units_of_the_tiny_grid_are_forecast():
    unit = study.tiny_units()[0]
    found = study.forecast(0, unit=unit, variants=("all", "final_held"), fractions=(1.0,))
    assert found["grid_all"].shape == (4, 1) and found["sizes"] == 5
    assert 0 < found["are_all"] < 100 and 0 <= found["wins"] <= 1
    assert study.protocol("final_held")["fixed"] == {"alpha": 0.3478, "beta": 0.3658}


@pytest.mark.skipif(
    lab.data.authors("chinchilla_points") is None, reason="the released points are not here"
)
def test_the_replicated_fit_to_its_digits():
    found = study.replicate(0, starts=6, bootstrap=2)
    assert found["objective"] == pytest.approx(0.00101827403, rel=1e-7)
    for name, value in study.REPLICATED.items():
        assert found[name] == pytest.approx(value, rel=5e-4)


@pytest.mark.skipif(lab.data.authors("hitchhikers") is None, reason="the released runs are absent")
def test_released_families_are_read():
    table = study.released()
    assert table.family.nunique() == 10 and (table[["N", "D", "loss"]] > 0).all().all()
    assert {u.split("/")[0] for u in study.UNITS} <= set(table.family)
    runs, target = study.family("opt/13b")
    assert target == "13b" and runs.N.max() == 13e9 and runs.model.nunique() == 4


# --- explorer and figure


def test_the_exported_explorer_is_the_one_at_the_kernel():
    runs = family((1e8, 4e8, 16e8, 64e8), noise=0.005, points=8)
    explorer = figures.explore_protocols({"made up": runs, "small": runs[runs.N < 5e9]})
    assert js.check_formula(explorer, rtol=1e-6) > 20
    assert len(json.dumps(explorer.export())) < 40_000
    state = {"family": "small", "models": 3, "fraction": 0.4, "protocol": "only the last"}
    shown = explorer.result(**state)
    one = estimate(runs[runs.N < 5e9], n_models=2, fraction=0.4, final_only=True)
    assert shown["used"] == 2
    assert shown["are"] == pytest.approx(100 * one.are, rel=1e-3)
    assert explorer.seconds < 0.05
    assert all(np.isfinite(v).all() for v in shown.values() if isinstance(v, np.ndarray))


def test_the_figure_shows_every_way_to_fit():
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2)
    figures.draw_early_stops(study.early_stops(points=noisy_points(60)), axes)
    assert len(axes[0].get_legend().get_texts()) == 3
    plt.close(fig)


# --- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: are([1.0], [0.0]), "observed"),
        (lambda: estimate(family(), "none"), "target"),
        (lambda: estimate(family(), "1e+08"), "smaller"),
        (lambda: estimate(family(), n_models=9), "models"),
        (lambda: estimate(family(), fraction=0.0), "fraction"),
        (lambda: estimate(family(), fraction=0.05), "no checkpoint"),
        (lambda: estimate(family(), columns={"model": "run"}), "no column 'run'"),
        (lambda: estimate(family().drop(columns="loss")), "loss"),
        (lambda: Protocol(cut=1.0), "cut"),
        (lambda: Protocol(which="middle"), "which"),
        (lambda: Protocol(fixed={"gamma": 1.0}), "fixed"),
        (lambda: Protocol(fixed=TRUE), "nothing is left"),
        (lambda: borrow(TRUE, NAMES), "nothing is left"),
        (lambda: component_law(pd.DataFrame([TRUE, HOFFMANN]), 2), "k: expected fewer"),
        (lambda: compute_plan(TRUE, -1.0), "budget"),
        (lambda: figures.explore_protocols({}), "at least one"),
        (lambda: study.family("opt/9b" if lab.data.authors("hitchhikers") else "batch512_seed0/9"),
         "no model"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
