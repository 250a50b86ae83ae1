"""Mixtures, regressions and proxies against numpy, scipy, LightGBM and the authors' notebook."""

import importlib

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import dirichlet, rankdata
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression
from torch import nn

from tests.plots import js
from workbench.plots import export
from workbench.scaling_laws import figures_regmix as figures
from workbench.scaling_laws import mixture_proxies as lm
from workbench.scaling_laws import regmix
from workbench.scaling_laws.experiments import regmix as study
from workbench.scaling_laws.regmix import (
    best_mixture,
    fit_mixture,
    sample_mixtures,
    score,
    simulate,
)
from workbench.scaling_laws.table import FitWarning

PRIOR = pd.Series({"web": 0.6, "code": 0.3, "maths": 0.1})
TRUTH = np.array([[2.0, 3.0], [4.0, 1.5], [5.0, 2.5]])  # loss of each pure domain, two targets


def table(n=120, noise=0.0, seed=0):
    mixtures = sample_mixtures(PRIOR, n, random_state=seed)
    values = mixtures.to_numpy() @ TRUTH
    values += noise * np.random.default_rng(seed).standard_normal(values.shape)
    return mixtures, pd.DataFrame(values, columns=["news", "unit tests"])


@pytest.fixture(scope="module")
def linear():
    return fit_mixture(*table(), "linear")


# --- mixtures


@pytest.mark.parametrize("strength", [0.2, 4.0])
def test_mixtures_have_the_moments_of_the_tempered_dirichlet(strength):
    found = sample_mixtures(
        PRIOR, 20_000, strength=(strength, strength), epochs=1e9, floor=0.0, oversample=1
    )
    q = np.sqrt(PRIOR) / np.sqrt(PRIOR).sum()
    law = dirichlet(strength * q)
    np.testing.assert_allclose(found.mean(), law.mean(), atol=0.012)
    np.testing.assert_allclose(found.var(), law.var(), rtol=0.05)


def test_tiny_shares_do_not_end_in_nan():
    prior = np.full(40, 1e-5)
    prior[0] = 1.0
    found = simulate(prior, 2000, strength=0.05)
    assert np.isfinite(found.to_numpy()).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6), st.sampled_from([0.0, 2e-4, 0.01]))
def test_limits_hold_for_every_mixture(k, seed, floor):
    # No domain so rare that three epochs of it leave hardly a mixture: that is refused, see below.
    prior = 0.5 / k + 0.5 * np.random.default_rng(seed).dirichlet(np.full(k, 2.0))
    found = sample_mixtures(prior, 30, epochs=3.0, floor=floor, random_state=seed).to_numpy()
    np.testing.assert_allclose(found.sum(1), 1)
    assert (found <= 3 * prior + (k + 1) * max(floor, 1e-12)).all()  # up to the rounding
    assert ((found == 0) | (found >= 0.4 * floor)).all()
    assert len(np.unique(found, axis=0)) == 30


def test_names_and_seeds_are_kept():
    a, b = sample_mixtures(PRIOR, 10, random_state=3), sample_mixtures(PRIOR, 10, random_state=3)
    pd.testing.assert_frame_equal(a, b)
    assert list(a) == list(PRIOR.index)
    assert not a.equals(sample_mixtures(PRIOR, 10, random_state=4))


def test_simulated_mixtures_have_the_moments_of_the_dirichlet():
    found = simulate(PRIOR, 40_000, random_state=1)
    np.testing.assert_allclose(found.mean(), PRIOR, atol=0.01)
    np.testing.assert_allclose(found.var(), dirichlet(PRIOR).var(), rtol=0.03)


# --- regression


def test_a_linear_truth_is_found_exactly(linear):
    np.testing.assert_allclose(linear.pure, TRUTH, atol=1e-9)
    rows = simulate(PRIOR, 50)
    np.testing.assert_allclose(linear.predict(rows), rows.to_numpy() @ TRUTH, atol=1e-9)
    assert linear.domains == ("web", "code", "maths") and linear.n == 120


def test_regressions_are_those_of_their_libraries():
    lightgbm = pytest.importorskip("lightgbm")
    mixtures, losses = table(noise=0.1)
    x, y = mixtures.to_numpy(), losses["news"].to_numpy()
    unseen = simulate(PRIOR, 40).to_numpy()
    theirs = {
        "linear": LinearRegression().fit(x, y),
        "trees": HistGradientBoostingRegressor(
            max_iter=30, learning_rate=0.01, early_stopping=False
        ).fit(x, y),
        "lightgbm": lightgbm.train(
            {"objective": "regression", "learning_rate": 0.01, "verbosity": -1, "seed": 42},
            lightgbm.Dataset(x, y), num_boost_round=30,
        ),
    }  # fmt: skip
    for name, other in theirs.items():
        fit = fit_mixture(mixtures, losses, name, rounds=30)
        np.testing.assert_allclose(fit.predict(unseen)["news"], other.predict(unseen))


def test_early_stopping_uses_the_given_mixtures():
    lightgbm = pytest.importorskip("lightgbm")
    mixtures, losses = table(noise=0.5)
    held = table(noise=0.5, seed=1)
    fit = fit_mixture(mixtures, losses, stop=held, learning_rate=0.3, rounds=200)
    other = lightgbm.train(
        {"objective": "regression", "learning_rate": 0.3, "verbosity": -1},
        lightgbm.Dataset(mixtures.to_numpy(), losses["news"].to_numpy()), num_boost_round=200,
        valid_sets=[lightgbm.Dataset(held[0].to_numpy(), held[1]["news"].to_numpy())],
        callbacks=[lightgbm.early_stopping(3, verbose=False)],
    )  # fmt: skip
    assert 0 < other.best_iteration < 190
    assert fit.regressors["news"].best_iteration == other.best_iteration
    unseen = simulate(PRIOR, 20)
    np.testing.assert_allclose(fit.predict(unseen)["news"], other.predict(unseen.to_numpy()))


def test_rows_and_columns_are_matched_by_name(linear):
    mixtures, losses = table()
    shuffled = losses.sample(frac=1, random_state=0)
    np.testing.assert_allclose(fit_mixture(mixtures, shuffled, "linear").pure, TRUTH, atol=1e-9)
    row = pd.Series({"maths": 0.2, "web": 0.5, "code": 0.3})
    expected = np.array([0.5, 0.3, 0.2]) @ TRUTH
    np.testing.assert_allclose(linear.predict(row).iloc[0], expected)


def test_scores_are_ranks_by_hand():
    rng = np.random.default_rng(0)
    guess, truth = rng.standard_normal((2, 30))
    truth[3] = truth[7]
    found = score(pd.DataFrame({"a": guess}), pd.DataFrame({"a": truth})).loc["a"]
    ranks = [rankdata(guess) - 15.5, rankdata(truth) - 15.5]
    rho = (ranks[0] @ ranks[1]) / np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1]))
    assert found.rho == pytest.approx(rho)
    assert found.regret == pytest.approx(truth[guess.argmin()] - truth.min())
    assert score(pd.DataFrame({"a": guess}), pd.DataFrame({"a": 2**guess})).rho["a"] == 1
    assert score(pd.DataFrame({"a": guess}), pd.DataFrame({"a": 0 * guess})).rho["a"] == 0


# --- choice


def test_the_choice_is_the_mean_of_the_lowest(linear):
    candidates = simulate(PRIOR, 300, random_state=2)
    losses = [float(row @ TRUTH[:, 0]) for row in candidates.to_numpy()]
    lowest = sorted(range(300), key=losses.__getitem__)[:7]
    found = best_mixture(linear, candidates, target="news", top=7)
    np.testing.assert_allclose(found.mixture, candidates.to_numpy()[lowest].mean(0))
    np.testing.assert_allclose(found.losses, [losses[i] for i in lowest])
    assert found.predicted == pytest.approx(np.mean(found.losses))  # a linear model's average


def test_under_a_linear_truth_the_best_mixture_is_nearly_one_domain(linear):
    found = best_mixture(linear, simulate(PRIOR, 20_000), target="unit tests", top=1)
    assert found.mixture["code"] > 0.999
    both = best_mixture(linear, simulate(PRIOR, 2000), target={"news": 0.9, "unit tests": 0.1})
    assert both.mixture.idxmax() == "web"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fit_mixture(100 * table()[0], table()[1], "linear"), "not per cent"),
        (lambda: fit_mixture(table()[0].assign(index=1.0), table()[1], "linear"), "an index"),
        (lambda: fit_mixture(table()[0] * [-1, 1, 1], table()[1], "linear"), "'web'.*negative"),
        (lambda: fit_mixture(table()[0], table()[1][:50], "linear"), "same number of rows"),
        (lambda: fit_mixture(table()[0], table()[1].assign(news=np.nan), "linear"), "'news'"),
        (lambda: fit_mixture(table()[0], table()[1].set_axis(range(5, 125)), "linear"), "labels"),
        (lambda: fit_mixture(table(3)[0], table(3)[1], "linear"), "3 rows for 3 domains"),
        (lambda: fit_mixture(table(30)[0], table(30)[1], "trees"), "leaves of 20"),
        (lambda: fit_mixture(*table(), "forest"), "model: expected one of"),
        (lambda: fit_mixture(*table(), "trees", stop=table()), "stop"),
        (lambda: sample_mixtures({"a": 1.0}), "two domains"),
        (lambda: sample_mixtures({"a": 1.0, "b": 0.0}), "positive"),
        (lambda: sample_mixtures(PRIOR, 2000, epochs=1.0), "satisfy the limits"),
        (lambda: best_mixture(fit_mixture(*table(), "linear"), simulate(PRIOR, 9)), "top"),
        (lambda: best_mixture(fit_mixture(*table(), "linear"), simulate(PRIOR, 9), target="x"),
         "target"),
        (lambda: fit_mixture(*table(), "linear").predict(table()[0][["web", "code"]]), "'maths'"),
        (lambda: lm.train_proxies(PRIOR.to_frame().T, {"web": "a"}, {}), "'code'"),
        (lambda: lm.train_proxies(PRIOR.to_frame().T, dict.fromkeys(PRIOR.index, "ab"), {}),
         "not longer than 3"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_domain_that_never_changes_is_named():
    mixtures, losses = table()
    with pytest.warns(FitWarning, match="'books'"):
        fit_mixture(mixtures.assign(books=0.0), losses, "linear")


def test_a_fit_whose_bins_leave_no_split_is_refused():
    pytest.importorskip("lightgbm")
    mixtures, losses = table(42)
    with pytest.raises(ValueError, match="every prediction would be the mean"):
        fit_mixture(mixtures, losses, leaf=21, rounds=20)


def test_without_lightgbm_the_extra_is_named(monkeypatch):
    real = importlib.import_module

    def absent(name, *rest):
        if name == "lightgbm":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(regmix.importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"paper-workbench\[scaling-laws\]"):
        fit_mixture(*table())


# --- proxies


TEXTS = {"web": "the cat sat on the mat. " * 40, "code": "for i in x:\n    y += i\n" * 40}


def test_symbols_are_new_line_and_printable_ascii():
    assert lm.encode("\n ~é\t").tolist() == [0, 1, 95, 32, 32]
    assert ord("?") - 31 == 32


def test_the_batch_of_models_is_a_loop_over_models():
    mixtures = pd.DataFrame({"web": [1.0, 0.25], "code": [0.0, 0.75]})
    sizes = {"context": 2, "embed": 3, "hidden": 4}
    found = lm.train_proxies(mixtures, TEXTS, TEXTS, steps=6, batch=20, windows=30, seed=1, **sizes)
    corpora = [lm.encode(t) for t in TEXTS.values()]
    for m in range(2):
        generator = torch.Generator().manual_seed(1)
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            net = lm.WindowLM(**sizes)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        stream = lm.batches(mixtures.iloc[[m]], corpora, 2, 6, 20, generator)
        for step, (seen, following) in enumerate(stream):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 6)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(seen[0]), following[0]).backward()
            optimizer.step()
        symbols = corpora[1]
        at = torch.linspace(0, len(symbols) - 3, 30).long()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(
                net(torch.stack([symbols[at], symbols[at + 1]], 1)), symbols[at + 2]
            )
        assert found["code"][m] == pytest.approx(float(loss), rel=1e-5)


def test_batches_follow_the_mixture():
    mixtures = pd.DataFrame({"a": [1.0, 0.3, 0.0], "b": [0.0, 0.7, 1.0]})
    corpora = [torch.zeros(50, dtype=torch.long), torch.ones(90, dtype=torch.long)]
    generator = torch.Generator().manual_seed(0)
    seen, following = next(lm.batches(mixtures, corpora, 3, 1, 5000, generator))
    share = following.double().mean(1)
    assert share[0] == 0 and share[2] == 1 and share[1] == pytest.approx(0.7, abs=0.03)
    assert (seen == following[..., None]).all()  # no window crosses from one text to the next


def test_training_on_a_text_helps_on_that_text():
    mixtures = pd.DataFrame({"web": [1.0, 0.0], "code": [0.0, 1.0]})
    found = lm.train_proxies(mixtures, TEXTS, TEXTS, steps=40, batch=64)
    assert found["web"][0] < 0.7 * found["web"][1] and found["code"][1] < 0.7 * found["code"][0]
    untrained = lm.train_proxies(mixtures, TEXTS, TEXTS, steps=1, batch=1, lr=1e-9)
    np.testing.assert_allclose(untrained, np.log(96), atol=0.4)


# --- experiments and explorer


def test_the_experiment_trains_large_models_on_unseen_mixtures(monkeypatch):
    calls = []
    train = study.train_proxies
    monkeypatch.setattr(
        study, "train_proxies", lambda w, *a, **k: [calls.append((w, k)), train(w, *a, **k)][1]
    )
    row = study.proxies(
        0, trained=50, tests=6, steps=(4, 8), large_steps=4, candidates=200, top=20, rounds=20,
        windows=99, model="trees",
    )  # fmt: skip
    small, longer, large = calls
    assert (small[1]["steps"], longer[1]["steps"], large[1]["steps"]) == (4, 8, 4)
    assert large[1]["hidden"] > small[1]["hidden"] and len(small[0]) == 56
    pd.testing.assert_frame_equal(large[0].iloc[:6], small[0].iloc[50:], check_index_type=False)
    assert row["plain"] == min(row["shares"], row["uniform"])
    assert row["best"] == row["measured"].min() and len(row["predicted"]) == 6
    np.testing.assert_allclose(row["mixtures"].sum(1), 1)


def test_the_target_is_not_among_the_training_texts():
    train, held = study.corpora()
    assert set(held) - set(train) == {"docstrings"}
    for name, text in train.items():
        assert held[name][:2000] not in text
        assert name == "brackets" or held["docstrings"][5000:5400] not in text
    assert study.token_shares().sum() == pytest.approx(1)


def test_recipes_are_compared_with_the_smallest_size():
    found = study.recipe_invariance()
    assert len(found) == 5 and (found.pairs == 12).all()
    assert found.rho.between(90, 100).all() and found.alike.between(0, 100).all()


def test_released_runs_are_optional(monkeypatch):
    monkeypatch.setattr(study.data, "authors", lambda name: None)
    assert study.released_tables() is None
    with pytest.raises(ValueError, match="released runs"):
        study.released_fit(0, target="pile_cc", model="linear")


@pytest.mark.skipif(study.released_tables() is None, reason="released runs not on this machine")
def test_released_runs_give_the_notebooks_correlations():
    pytest.importorskip("lightgbm")
    for target in ("arxiv", "github", "pile_cc"):
        row = study.released_fit(0, target=target, model="lightgbm", stop=True)
        assert row["rho_1m"] == pytest.approx(study.NOTEBOOK[target], abs=0.15)
    plain = study.released_fit(0, target="pile_cc", model="linear")
    expected = {"1m": 90.21, "60m": 89.33, "1B": 87.66}  # a least-squares refit outside this code
    for size, value in expected.items():
        assert plain[f"rho_{size}"] == pytest.approx(value, abs=0.006)
    assert sum(study.PILE.values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("domains", [3, 12])
def test_the_exported_formula_is_the_explorers(domains):
    prior = pd.Series(np.arange(1.0, domains + 1), [f"d{i}" for i in range(domains)])
    mixtures = sample_mixtures(prior, 80)
    rng = np.random.default_rng(0)
    values = mixtures.to_numpy() @ rng.uniform(2, 5, (domains, 2))
    losses = pd.DataFrame(values, columns=["a", "b"])
    fit = fit_mixture(mixtures, losses, "trees", rounds=20)
    plain = fit_mixture(mixtures, losses, "linear")
    explorer = figures.explore_mixture(fit, prior, plain=plain, candidates=300, top=8)
    assert js.check_formula(explorer, rtol=1e-6) > 50
    found = explorer.result(first=0.4, second=0.2)
    assert explorer.seconds < 0.05
    assert found["here"].sum() == pytest.approx(1) and found["best"].sum() == pytest.approx(1)
    first, second = found["rows"][:2]
    mix = prior.where(~prior.index.isin([first, second]), 0)
    mix *= 0.6 * 0.8 / mix.sum()
    mix[[first, second]] = 0.4, 0.6 * 0.2
    assert found["loss"] == pytest.approx(fit.predict(mix)["a"].iloc[0], abs=1e-4)
    assert found["line"][8] == pytest.approx(plain.predict(mix)["a"].iloc[0], abs=1e-4)
    assert len(export.dumps(explorer.export())) < 40_000
