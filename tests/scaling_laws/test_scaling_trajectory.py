"""The law of loss, size, steps and batch against published values, scipy and closed forms."""

import math
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, least_squares
from scipy.stats import linregress

from tests.plots import js
from workbench.scaling_laws import figures_scaling_trajectory as figures
from workbench.scaling_laws.experiments import scaling_trajectory as study
from workbench.scaling_laws.implicit import kaplan_gradient, kaplan_loss
from workbench.scaling_laws.scaling_trajectory import (
    KAPLAN,
    Constants,
    critical_batch,
    crossing_steps,
    fit_hyperbola,
    fit_line,
    fit_trajectory,
    fit_without_batch,
    loss_at,
    minimum_loss,
    steps_to,
    three_steps,
)

NAMES = tuple(asdict(KAPLAN))
TINY = Constants(N_c=2e6, a_N=0.1, S_c=400.0, a_S=0.6, B_star=2e4, a_B=0.4)


def random_laws(n, seed=0):
    """Constants and sizes over many decades, exponents from 0.03 to 3."""
    low = torch.tensor([-5, 0.01, -5, 0.05, -10, 0.03, 5, 0, 5], dtype=torch.float64)
    high = torch.tensor([40, 2, 15, 3, 30, 2, 25, 15, 16], dtype=torch.float64)
    u = torch.rand(n, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = low + (high - low) * u
    x[:, [0, 2, 4, 6, 7, 8]] = x[:, [0, 2, 4, 6, 7, 8]].exp()
    return dict(zip(NAMES, x[:, :6].T, strict=True)), tuple(x[:, 6:].T)


def table(law=TINY, sizes=(3e3, 7e3, 25e3, 57e3), seeds=(0,)):
    rows = [
        (n, s, b, seed)
        for n in sizes
        for b in (512, 1536, 4608)
        for seed in seeds
        for s in np.geomspace(20, 5000, 28)
    ]
    frame = pd.DataFrame(rows, columns=["N", "S", "B", "seed"])
    return frame.assign(loss=loss_at(frame.N, frame.S, frame.B, law).numpy())


# --- the implicit law


@pytest.mark.parametrize(
    "sizes, expected",
    [((1e6, 1e4, 5e5), 4.383456), ((1e9, 2.5e5, 5e5), 2.460597), ((1e9, math.inf, 1), 2.347439)],
)
def test_published_constants_give_these_losses(sizes, expected):
    assert float(loss_at(*sizes, KAPLAN)) == pytest.approx(expected, abs=5e-7)


def test_published_critical_batch():
    assert float(critical_batch(3.0, KAPLAN)) == pytest.approx(1_122_570, abs=1)


def test_the_root_is_scipys_root():
    laws, sizes = random_laws(60)
    found = kaplan_loss(*sizes, **laws).log()
    for i in range(60):
        q = {name: float(values[i]) for name, values in laws.items()}
        n, s, b = (float(values[i]) for values in sizes)
        floor = (q["N_c"] / n) ** q["a_N"]

        def gap(u, q=q, s=s, b=b, floor=floor):
            noise = 1 + q["B_star"] / b * math.exp(-u / q["a_B"])
            return u - math.log(floor + (q["S_c"] / s * noise) ** q["a_S"])

        low = math.log(floor + (q["S_c"] / s) ** q["a_S"])
        high = low + 1e-9
        while gap(high) < 0:
            high += 1.0
        assert float(found[i]) == pytest.approx(brentq(gap, low - 1e-9, high, xtol=1e-13), abs=1e-9)


def test_the_equation_holds_to_rounding_at_two_thousand_laws():
    laws, (n, s, b) = random_laws(2000, seed=1)
    loss = kaplan_loss(n, s, b, **laws)
    noise = 1 + laws["B_star"] / b * loss ** (-1 / laws["a_B"])
    right = (laws["N_c"] / n) ** laws["a_N"] + (laws["S_c"] / s * noise) ** laws["a_S"]
    torch.testing.assert_close(right, loss, rtol=1e-11, atol=0)


def test_autograd_passes_gradcheck_in_constants_and_sizes():
    values = [*asdict(TINY).values(), 7e3, 300.0, 1536.0]
    logs = torch.tensor(values, dtype=torch.float64).log().requires_grad_()

    def log_loss(logs):
        *constants, n, s, b = logs.exp().unbind()
        return kaplan_loss(n, s, b, **dict(zip(NAMES, constants, strict=True))).log()

    assert torch.autograd.gradcheck(log_loss, (logs,))


def test_the_gradient_is_that_of_central_differences():
    laws, sizes = random_laws(200, seed=2)
    found = kaplan_gradient(*sizes, **laws)
    assert found.shape == (200, 6)
    for j, name in enumerate(NAMES):
        step = 1e-6
        moved = []
        for sign in (1, -1):
            change = math.exp(sign * step) if j % 2 == 0 else 1.0
            shift = 0.0 if j % 2 == 0 else sign * step * 1e-2
            other = laws | {name: laws[name] * change + shift}
            moved.append(kaplan_loss(*sizes, **other).log())
        width = step if j % 2 == 0 else step * 1e-2
        expected = (moved[0] - moved[1]) / (2 * width)
        torch.testing.assert_close(found[:, j], expected, rtol=2e-4, atol=2e-4)


def test_laws_and_points_broadcast():
    many = {name: torch.tensor([[v], [v * 1.1]]) for name, v in asdict(TINY).items()}
    steps = torch.tensor([100.0, 200.0, 400.0])
    assert kaplan_loss(7e3, steps, 512.0, **many).shape == (2, 3)
    assert kaplan_gradient(7e3, steps, 512.0, **many).shape == (2, 3, 6)
    one = kaplan_gradient(7e3, 200.0, 512.0, **{q: v[1, 0] for q, v in many.items()})
    torch.testing.assert_close(kaplan_gradient(7e3, steps, 512.0, **many)[1, 1], one)


@pytest.mark.parametrize("name", ["a_S", "a_B"])
def test_without_a_single_root_there_is_no_number(name):
    law = asdict(TINY) | {name: -0.1}
    assert kaplan_loss(7e3, 100.0, 512.0, **law).isnan()


# --- reading the law in other directions

sizes = st.tuples(st.floats(1e3, 1e9), st.floats(10, 1e6), st.floats(10, 1e7))


@settings(max_examples=30, deadline=None)
@given(sizes, st.floats(1.01, 100))
def test_more_of_anything_lowers_the_loss(point, factor):
    loss = float(loss_at(*point, TINY))
    for i in range(3):
        more = [v * factor if i == j else v for j, v in enumerate(point)]
        assert float(loss_at(*more, TINY)) < loss


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_steps_to_a_loss_undo_the_loss_at_a_step(point):
    n, s, b = point
    loss = loss_at(n, s, b, TINY)
    assert float(steps_to(loss, n, b, TINY)) == pytest.approx(s, rel=1e-6)
    least = float(steps_to(loss, n, math.inf, TINY))
    tokens = least * float(critical_batch(loss, TINY))
    assert (s / least - 1) * (s * b / tokens - 1) == pytest.approx(1, rel=1e-4)


def test_at_the_critical_batch_both_costs_are_twice_their_least():
    batch = critical_batch(2.6, TINY)
    least = steps_to(2.6, 1e5, math.inf, TINY)
    assert float(steps_to(2.6, 1e5, batch, TINY)) == pytest.approx(2 * float(least))


def test_losses_below_the_minimum_are_never_reached():
    floor = float(minimum_loss(1e5, TINY))
    assert math.isinf(float(steps_to(0.9 * floor, 1e5, 512.0, TINY)))
    assert float(loss_at(1e5, math.inf, 512.0, TINY)) == pytest.approx(floor)


# --- the three steps


def test_the_hyperbola_through_exact_pairs_is_found():
    batch = np.array([200.0, 1000.0, 5000.0])
    least, tokens = np.array([[50.0], [400.0]]), np.array([[9e4], [2e5]])
    steps = least + tokens / batch
    found = fit_hyperbola(steps, steps * batch)
    np.testing.assert_allclose(found[0], least[:, 0])
    np.testing.assert_allclose(found[1], tokens[:, 0])


def test_the_hyperbola_through_noisy_pairs_is_scipys_minimum():
    rng = np.random.default_rng(0)
    batch = np.geomspace(100, 1e5, 7)
    steps = (80 + 5e4 / batch) * np.exp(0.1 * rng.standard_normal(7))
    found = fit_hyperbola(steps, steps * batch)
    best = least_squares(
        lambda q: math.exp(q[0]) / steps + math.exp(q[1]) / (steps * batch) - 1, [4.0, 10.0],
        xtol=1e-14, ftol=1e-14, gtol=1e-14,
    )  # fmt: skip
    np.testing.assert_allclose(np.log(found), best.x, rtol=1e-6)


def test_levels_without_a_hyperbola_are_marked():
    steps = np.array([[100.0, np.nan], [100.0, 200.0], [100.0, 50.0]])
    least, tokens = fit_hyperbola(steps, steps * np.array([10.0, 100.0]))
    assert np.isnan(least[:2]).all() and np.isnan(tokens[:2]).all()  # one batch; slower when larger
    assert np.isfinite(least[2])


def test_crossings_agree_with_a_search_along_the_curve():
    steps = np.geomspace(10, 1000, 30)
    loss = 4 * steps**-0.2
    levels = np.array([2.4, 1.8, 1.3, 0.5, 3.0])
    found = crossing_steps(steps, loss + 0.0, levels)
    np.testing.assert_allclose(found[:3], (levels[:3] / 4) ** -5, rtol=1e-9)
    assert np.isnan(found[3:]).all()
    bump = loss.copy()
    bump[[15, 16]] *= (1.6, 1.5)  # a spike in the loss moves no crossing of a level around it
    around = np.array([loss[10], loss[14], loss[18], loss[25]])
    np.testing.assert_allclose(crossing_steps(steps, bump, around), steps[[10, 14, 18, 25]])


def test_lines_are_those_of_scipy():
    rng = np.random.default_rng(1)
    x = np.geomspace(1, 1e4, 12)
    y = (50 / x) ** 0.3 * np.exp(0.05 * rng.standard_normal(12))
    line = linregress(np.log(x), np.log(y))
    c, a = fit_line(x, y, "y")
    assert a == pytest.approx(-line.slope) and math.log(c) == pytest.approx(line.intercept / a)


def test_three_steps_return_the_law_that_made_converged_runs():
    frame = table(seeds=(0, 1))
    minima = {n: float(minimum_loss(n, TINY)) for n in frame.N.unique()}
    found = three_steps(frame, minima=minima)
    for name, value in asdict(TINY).items():
        assert getattr(found.law, name) == pytest.approx(value, rel=5e-3), name
    assert len(found.hyperbolas) == 48 and set(found.hyperbolas.N) == set(frame.N)


def test_three_steps_overrate_the_minimum_of_runs_that_have_not_converged():
    found = three_steps(table())
    assert float(minimum_loss(57e3, found.law)) > float(minimum_loss(57e3, TINY))


# --- all at once


def test_the_joint_fit_returns_the_law_that_made_the_runs():
    fit = fit_trajectory(table(), starts=20, quiet=True)
    for name, value in asdict(TINY).items():
        assert fit.params[name] == pytest.approx(value, rel=1e-3), name


def test_without_batch_the_law_predicts_the_same_for_every_batch():
    frame = table().rename(columns={"S": "updates"})
    fit = fit_without_batch(frame, columns={"S": "updates"}, starts=8, quiet=True)
    law = Constants(**fit.params)
    n_term, s_term = (law.N_c / 1e4) ** law.a_N, (law.S_c / 300) ** law.a_S
    for batch in (1.0, 1e6):
        assert float(loss_at(1e4, 300, batch, law)) == pytest.approx(n_term + s_term)
    assert fit.objective > 1e-3 > fit_trajectory(frame, columns={"S": "updates"}).objective


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Constants(1, 1, 1, -1, 1, 1), "a_S"),
        (lambda: loss_at(0, 10, 10, TINY), "N: expected"),
        (lambda: loss_at(10, [1, -1], 10, TINY), "S: expected"),
        (lambda: critical_batch(-1, TINY), "loss: expected"),
        (lambda: fit_hyperbola([1.0], [1.0, 2.0]), "S and E"),
        (lambda: fit_hyperbola([0.0, 1.0], [1.0, 2.0]), "S and E"),
        (lambda: crossing_steps(np.array([2.0, 1.0]), np.ones(2), np.ones(1)), "S: expected"),
        (lambda: fit_line([1, 1], [2, 3], "minima"), "minima"),
        (lambda: fit_line([1, 2], [2, 3], "minima"), "does not fall"),
        (lambda: three_steps(table().drop(columns="B")), "no column for B"),
        (lambda: three_steps(table().assign(loss=-1.0)), "column 'loss'"),
        (lambda: three_steps(table(seeds=(0, 1)).assign(loss=lambda t: t.loss + t.seed)
                             .drop(columns="seed")), "run"),
        (lambda: fit_trajectory(table(sizes=(3e3,))), "column 'N': every run"),
        (lambda: fit_trajectory(table().query("B == 512")), "column 'B': every run"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- explorer and experiments


@pytest.mark.parametrize("measured", [True, False])
def test_the_exported_formula_is_the_law(measured):
    explorer = (
        figures.explore_trajectory(TINY, table()) if measured else figures.explore_trajectory(S=1e4)
    )
    assert js.check_formula(explorer, rtol=1e-6) > 20
    explorer.result()
    assert explorer.seconds < 0.05


def test_the_experiment_predicts_a_curve_its_fits_did_not_see(monkeypatch):
    seen = []
    for name in ("fit_trajectory", "fit_without_batch", "three_steps"):
        fit = getattr(study, name)
        monkeypatch.setattr(study, name, lambda f, fit=fit, **o: [seen.append(f), fit(f, **o)][1])
    row = study.predict_larger(0, held_out=1, starts=4, every=7)
    table = study.curves(0)
    assert len(seen) == 4
    for train in seen:
        assert set(train.batch) == {512, 4608} and train.N.max() == sorted(set(table.N))[3]
    assert row["N"] == table.N.max() and row["batch"] == 1536
    assert row["err_blind"] in (row["err_steps"], row["err_tokens"])
    assert len(row["curve_law"]) == len(row["loss"]) == len(row["step"])
    expected = np.abs(row["curve_law"] / row["loss"] - 1).mean() * 100
    assert row["err_law"] == pytest.approx(expected)


def test_opt_curves_are_optional(monkeypatch):
    monkeypatch.setattr(study.data, "authors", lambda name: None)
    assert study.opt_curves() is None
    with pytest.raises(ValueError, match="released curves"):
        study.predict_opt(0)


def test_opt_curves_have_their_papers_batch_sizes():
    table = study.opt_curves()
    if table is None:
        pytest.skip("the released curves are not on this machine")
    batch = table.groupby("model").batch.mean() / 1e6
    assert batch.round(3).to_dict() == {
        "125m": 0.5, "1.3b": 1, "6.7b": 2, "13b": 4, "30b": 4, "175b": 2
    }  # fmt: skip
    assert table.N.min() == 84_934_656
