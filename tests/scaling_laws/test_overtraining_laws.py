"""The over-training law and the error law against published fits, scipy and closed forms."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit, minimize_scalar

from tests.plots import js
from workbench.scaling_laws import figures_overtraining_laws as figures
from workbench.scaling_laws.experiments import overtraining_laws as study
from workbench.scaling_laws.fit import fit_law
from workbench.scaling_laws.laws import LAWS
from workbench.scaling_laws.overtraining_laws import (
    GAMMAS,
    REDPAJAMA,
    REDPAJAMA_RUNS,
    ErrorLaw,
    LossLaw,
    compute,
    fit_error,
    fit_error_each,
    fit_overtrain,
    fit_overtrain_each,
    leave_one_out,
    over_training_cost,
    parameters,
    predict_error,
    predict_loss,
)

LINK = ErrorLaw(k=2.2065, gamma=0.7146, eps=0.8570)


def table(law=REDPAJAMA, noise=0.0, seed=0):
    rows = [(n, m) for n in (1e7, 8e7, 4e8, 1.5e9) for m in (5.0, 20.0, 80.0, 320.0)]
    frame = pd.DataFrame(rows, columns=["N", "M"])
    rng = np.random.default_rng(seed)
    scatter = np.exp(noise * rng.standard_normal(len(frame)))
    loss = predict_loss(compute(frame.N, frame.M), frame.M, law) * scatter
    return frame.assign(loss=loss, error=predict_error(loss, LINK))


# --- published numbers


def test_five_published_runs_give_the_authors_constants():
    law = fit_overtrain(**REDPAJAMA_RUNS)
    assert law.a == pytest.approx(212.2, abs=0.1) and law.b == pytest.approx(366.7, abs=0.1)
    assert 2 * law.eta == pytest.approx(0.2729, abs=1e-4)
    assert pytest.approx(1.8366, abs=1e-4) == law.E


@pytest.mark.parametrize(
    "N, M, expected", [(1_439_795_200, 640, 2.5198), (6_889_410_560, 20, 2.4427)]
)
def test_they_foretell_the_losses_of_the_large_runs(N, M, expected):
    law = fit_overtrain(**REDPAJAMA_RUNS)
    assert float(predict_loss(compute(N, M), M, law)) == pytest.approx(expected, abs=1e-4)


def test_the_fit_is_scipys():
    N, M, loss = (np.array(REDPAJAMA_RUNS[q], float) for q in ("N", "M", "loss"))

    def law(_, A, B, alpha, E):
        return E + A * N**-alpha + B * (M * N) ** -alpha

    best = curve_fit(law, N, loss, p0=[170, 280, 0.27, 1.8], maxfev=10_000)[0]
    found = fit_overtrain(N, M, loss)
    theirs = LossLaw(
        best[0] * 6 ** (best[2] / 2), best[1] * 6 ** (best[2] / 2), best[2] / 2, best[3]
    )
    for name in ("a", "b", "eta", "E"):
        assert getattr(found, name) == pytest.approx(getattr(theirs, name), rel=1e-4), name


# --- the law


def test_it_is_chinchillas_law_with_one_exponent():
    N, M = np.array([1e7, 1e9, 5e10]), np.array([5.0, 20.0, 640.0])
    A, B = (c * 6**-REDPAJAMA.eta for c in (REDPAJAMA.a, REDPAJAMA.b))
    params = {"A": A, "B": B, "E": REDPAJAMA.E, "alpha": 2 * REDPAJAMA.eta}
    chinchilla = LAWS["chinchilla"]
    theta = chinchilla.internal({**params, "beta": params["alpha"]})
    expected = chinchilla.loss(theta, N=torch.tensor(N), D=torch.tensor(N * M)).numpy()
    np.testing.assert_allclose(predict_loss(compute(N, M), M, REDPAJAMA), expected, rtol=1e-12)


laws = st.builds(
    LossLaw,
    a=st.floats(1, 1e4), b=st.floats(1, 1e4), eta=st.floats(0.05, 0.5), E=st.floats(0.1, 3),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(laws, st.floats(1e15, 1e24), st.floats(1, 1e3), st.floats(1.1, 1e4))
def test_lines_of_constant_multiplier_are_parallel(law, C, M, factor):
    def line(c):
        return np.log(predict_loss(c, np.array([M, 20.0]), law) - law.E)

    slope = (line(C * factor) - line(C)) / np.log(factor)
    # Subtracting E cancels digits; what is left still has six.
    np.testing.assert_allclose(slope, -law.eta, rtol=1e-4, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(laws, st.floats(1e15, 1e24), st.floats(0.1, 1e3))
def test_over_training_costs_a_hyperbolic_cosine(law, C, M):
    best = law.best_multiplier
    cost = float(over_training_cost(M * best, law))
    assert cost >= 1
    assert cost == pytest.approx(float(over_training_cost(best / M, law)), rel=1e-9)
    optimal = float(predict_loss(C, best, law))
    assert float(predict_loss(C * cost, M * best, law)) == pytest.approx(optimal, rel=1e-9)


@pytest.mark.parametrize("C", [1e17, 1e21])
def test_the_best_multiplier_is_scipys_minimum_at_every_budget(C):
    found = minimize_scalar(
        lambda u: float(predict_loss(C, np.exp(u), REDPAJAMA)), (0, 5), tol=1e-9
    )
    assert np.exp(found.x) == pytest.approx(REDPAJAMA.best_multiplier, rel=1e-4)


def test_parameters_and_multiplier_give_back_the_compute():
    C, M = np.array([1e18, 1e22]), np.array([20.0, 640.0])
    np.testing.assert_allclose(compute(parameters(C, M), M), C)


# --- fits


def test_exact_runs_give_back_the_law():
    frame = table()
    found = fit_overtrain(frame.N, frame.M, frame.loss)
    for name in ("a", "b", "eta", "E"):
        assert getattr(found, name) == pytest.approx(getattr(REDPAJAMA, name), rel=1e-5), name


def test_a_subset_is_fitted_as_if_the_rest_were_not_there():
    frame = table(noise=0.02)
    kept = np.arange(len(frame)) % 3 > 0
    N, M, loss = (frame[q].to_numpy() for q in ("N", "M", "loss"))
    together = fit_overtrain_each(N, M, loss, np.stack([kept, ~kept | kept]))[0]
    alone = fit_overtrain(N[kept], M[kept], loss[kept])
    assert vars(together) == pytest.approx(vars(alone), rel=1e-4)


def test_leaving_one_out_spares_no_run_that_alone_tells_m():
    left = leave_one_out(**REDPAJAMA_RUNS)
    assert sorted(left) == [0, 1, 2, 3]  # the fifth is the only over-trained one
    rows = {q: v[1:] for q, v in REDPAJAMA_RUNS.items()}
    assert vars(left[0]) == pytest.approx(vars(fit_overtrain(**rows)), rel=1e-3)


def test_the_error_law_is_that_of_the_user_law_and_of_scipy():
    frame = table(noise=0.01)
    error = frame.error + 0.01 * np.sin(np.arange(len(frame)))
    found = fit_error(frame.loss, error)

    def law(L, *, k, gamma, eps):
        return eps - k * torch.exp(-gamma * L)

    ours = fit_law(
        pd.DataFrame({"L": frame.loss, "error": error}), law, objective="lsq", quiet=True,
        columns={"loss": "error"}, starts={"k": 2.0, "gamma": 0.7, "eps": 0.9},
    ).params  # fmt: skip
    theirs = curve_fit(
        lambda x, k, gamma, eps: eps - k * np.exp(-gamma * x), frame.loss, error, p0=[2, 0.7, 0.9]
    )[0]
    assert vars(found) == pytest.approx(ours, rel=1e-5)
    assert list(vars(found).values()) == pytest.approx(list(theirs), rel=1e-4)


def test_exact_errors_give_back_the_law_from_any_subset():
    frame = table()
    subsets = np.stack([np.arange(16) % q == 0 for q in (1, 2, 3, 5)]).astype(float)
    for found in fit_error_each(frame.loss.to_numpy(), frame.error.to_numpy(), subsets):
        assert vars(found) == pytest.approx(vars(LINK), rel=1e-5)


def test_errors_that_do_not_fall_with_the_loss_teach_nothing():
    found = fit_error([2.0, 3.0, 4.0, 5.0], [0.9, 0.8, 0.7, 0.6])
    assert found.k == 0 and found.eps == pytest.approx(0.75)
    assert GAMMAS[0] <= found.gamma <= GAMMAS[1]


def test_the_error_is_a_power_law_of_the_perplexity():
    perplexity = np.array([8.0, 20.0, 100.0])
    expected = LINK.eps - LINK.k * perplexity**-LINK.gamma
    np.testing.assert_allclose(predict_error(np.log(perplexity), LINK), expected)


FIVE = REDPAJAMA_RUNS


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: LossLaw(1, 1, -0.1, 1), "eta"),
        (lambda: ErrorLaw(-1, 1, 1), "k: expected"),
        (lambda: predict_loss(0, 20, REDPAJAMA), "C: expected"),
        (lambda: predict_loss(1e18, -20, REDPAJAMA), "M: expected"),
        (lambda: predict_error([2.0, 0.0], LINK), "loss: expected"),
        (lambda: compute(np.nan, 20), "N: expected"),
        (lambda: fit_overtrain(FIVE["N"], FIVE["M"], FIVE["loss"][:4]), "loss"),
        (lambda: fit_overtrain(FIVE["N"][:3], FIVE["M"][:3], FIVE["loss"][:3]), "four"),
        (lambda: fit_overtrain(FIVE["N"][:4], FIVE["M"][:4], FIVE["loss"][:4]), "one multiplier"),
        (lambda: fit_overtrain([1e7] * 4, [5, 10, 20, 40], [4, 3, 2, 1]), "one size"),
        (lambda: fit_overtrain(FIVE["N"], FIVE["M"], [-1.0] * 5), "loss: expected"),
        (lambda: leave_one_out(*(FIVE[q][1:] for q in ("N", "M", "loss"))), "five runs"),
        (lambda: fit_error([2.0, 2.0, 3.0], [0.5, 0.5, 0.6]), "three different"),
        (lambda: figures.explore_overtraining(table().query("N < 1e8")), "three sizes"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- explorer and experiments


@pytest.mark.parametrize("downstream", [True, False])
def test_the_exported_formula_is_the_law(downstream):
    frame = table(noise=0.02).assign(five=lambda t: t.M == 20, source="a")
    frame = pd.concat(
        [frame, table(noise=0.02, seed=1).assign(five=lambda t: t.M < 80, source="b")]
    )
    frame["five"] |= frame.N == 1e7
    more = {"error": "error", "by": "source", "marked": ("five", "five")} if downstream else {}
    explorer = figures.explore_overtraining(frame, **more)
    assert js.check_formula(explorer, rtol=1e-5) > 10
    explorer.result()
    assert explorer.seconds < 0.05


def test_tiny_runs_are_predicted_from_smaller_ones():
    row = study.predict_tiny(0, batch=1536, starts=8)
    runs = study.tiny_runs()
    held = runs[(runs.batch == 1536) & (runs.seed == 0)]
    held = held[(held.N.max() == held.N) | (held.budget == held.budget.max())]
    assert row["fitted"] == 15 and sorted(row["observed"]) == sorted(held.loss)
    assert row["err_law"] == pytest.approx(row["each_law"].mean())
    assert row["fitted_free"] <= row["fitted_law"] + 0.5


def test_released_runs_are_optional(monkeypatch):
    monkeypatch.setattr(study.data, "authors", lambda name: None)
    assert study.released() is None
    with pytest.raises(ValueError, match="released runs"):
        study.predict_released(0)


@pytest.fixture(scope="module")
def released():
    found = study.released()
    if found is None:
        pytest.skip("the released runs are not on this machine")
    return found


def test_released_runs_are_the_papers_104(released):
    assert released.train.value_counts().to_dict() == {"RedPajama": 35, "RefinedWeb": 35, "C4": 34}
    assert released.notna().all(axis=None)
    np.testing.assert_allclose(released.M, released.D / released.N, rtol=1e-6)
    five = released[released.five & (released.train == "RedPajama")].sort_values(["M", "N"])
    np.testing.assert_allclose(five.c4_val, REDPAJAMA_RUNS["loss"], atol=1e-5)
    assert released.groupby("train").six.sum().eq(6).all()


def test_published_relative_errors_come_out(released):
    row = study.predict_downstream(0, starts=40)
    over, large = (row["N"] < 2e9) & (row["M"] == 640) & (row["N"] > 1e9), row["N"] > 5e9
    assert row["each_law"][over] == pytest.approx([3.6], abs=0.05)
    assert row["each_law"][large] == pytest.approx([0.05], abs=0.005)
    assert row["k"] == pytest.approx(2.2065, abs=1e-3)
    assert row["gamma"] == pytest.approx(0.7146, abs=1e-3)
    assert row["eps"] == pytest.approx(0.8570, abs=1e-3)
