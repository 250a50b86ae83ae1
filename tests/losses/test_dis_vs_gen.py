"""Naive Bayes and logistic regression against scikit-learn, closed forms and brute force."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy.stats import multivariate_normal, norm
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import check_estimator

from tests.plots import js
from workbench.lab import data
from workbench.losses import dis_vs_gen as method
from workbench.losses import figures_dis_vs_gen as figures
from workbench.losses.dis_vs_gen import (
    SMOOTHINGS,
    GaussianClasses,
    SharedVarianceNB,
    conditional_regrets,
    crossing,
    error_bound,
    error_curves,
    first_passage,
    growth_exponent,
    learning_curves,
    least_log_regret,
    paper_models,
    sample_complexity,
)
from workbench.losses.experiments import dis_vs_gen as study
from workbench.losses.experiments import pretrained_features


def blobs(m=90, n=5, K=3, seed=0):
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(K), rng.integers(K, size=m - K)])
    return rng.normal(size=(K, n))[y] + rng.normal(size=(m, n)) * (1 + np.arange(n)), y


def scores_by_loops(X, y, eps=1e-9):
    """Class by class and feature by feature, as the score is written."""
    labels = sorted(set(y))
    variance = eps + sum((y == k).mean() * X[y == k].var(0) for k in labels)
    rows = []
    for x in X:
        rows.append([])
        for k in labels:
            distance = 0.0
            for j in range(X.shape[1]):
                distance += (x[j] - X[y == k, j].mean()) ** 2 / variance[j]
            rows[-1].append(np.log((y == k).mean()) - distance / 2)
    return np.array(rows)


# --- the classifier


@pytest.mark.filterwarnings("ignore:Skipping check check_array_api_input")
def test_it_is_a_scikit_learn_classifier():
    check_estimator(SharedVarianceNB())


@pytest.mark.parametrize("K", [2, 3, 7])
def test_probabilities_are_those_of_the_written_score(K):
    X, y = blobs(K=K)
    scores = scores_by_loops(X, y)
    expected = np.exp(scores - scores.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    model = SharedVarianceNB().fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), expected, rtol=1e-9)
    np.testing.assert_allclose(model.predict_log_proba(X), np.log(expected), atol=1e-9)
    assert (model.predict(X) == scores.argmax(1)).all()


def test_scores_are_those_of_linear_discriminants_with_a_diagonal_covariance():
    X, y = blobs(K=4)
    lda = LinearDiscriminantAnalysis(solver="lsqr", store_covariance=True).fit(X, y)
    inverse = np.diag(1 / np.diag(lda.covariance_))
    expected = X @ inverse @ lda.means_.T + np.log(lda.priors_)
    expected -= 0.5 * np.einsum("kj,jl,kl->k", lda.means_, inverse, lda.means_)
    found = SharedVarianceNB(eps=1e-300).fit(X, y).decision_function(X)
    centred = [scores - scores.mean(1, keepdims=True) for scores in (found, expected)]
    np.testing.assert_allclose(*centred, atol=1e-9)


def test_variances_are_the_weighted_mean_of_scikit_learns():
    X, y = blobs(K=3)
    peer = GaussianNB(var_smoothing=0).fit(X, y)
    model = SharedVarianceNB().fit(X, y)
    np.testing.assert_allclose(model.var_, peer.class_prior_ @ peer.var_ + 1e-9)
    np.testing.assert_allclose(model.theta_, peer.theta_)
    np.testing.assert_allclose(model.class_prior_, peer.class_prior_)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.booleans())
def test_parts_of_any_size_and_order_add_up_to_one_fit(seed, parts, weighted):
    X, y = blobs(m=40, seed=3)
    rng = np.random.default_rng(seed)
    weight = rng.exponential(size=40) if weighted else None
    whole = SharedVarianceNB().fit(X, y, weight)
    model = SharedVarianceNB()
    for rows in np.array_split(rng.permutation(40), parts):
        part = None if weight is None else weight[rows]
        model.partial_fit(X[rows], y[rows], whole.classes_, part)
    for name in ("coef_", "intercept_", "var_", "class_count_"):
        np.testing.assert_allclose(getattr(model, name), getattr(whole, name), rtol=1e-9, atol=1e-9)


def test_whole_weights_are_repetitions():
    X, y = blobs(m=30)
    times = np.random.default_rng(1).integers(0, 4, 30)
    repeated = SharedVarianceNB().fit(np.repeat(X, times, 0), np.repeat(y, times))
    weighted = SharedVarianceNB().fit(X, y, times)
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-10)
    np.testing.assert_allclose(weighted.intercept_, repeated.intercept_, rtol=1e-10)


def test_a_new_fit_forgets_the_last():
    (X, y), (Z, t) = blobs(seed=0), blobs(n=4, K=2, seed=1)
    model = SharedVarianceNB().fit(X, y).fit(Z, t)
    np.testing.assert_array_equal(model.coef_, SharedVarianceNB().fit(Z, t).coef_)


def test_a_class_not_seen_yet_is_never_predicted():
    X, y = blobs(K=2)
    model = SharedVarianceNB().partial_fit(X, y, classes=[0, 1, 2])
    assert set(model.predict(X)) <= {0, 1} and (model.predict_proba(X)[:, 2] == 0).all()
    alone = SharedVarianceNB().fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X)[:, :2], alone.predict_proba(X), atol=1e-12)


def test_one_row_a_class_is_the_nearest_mean():
    X, y = blobs(m=3)
    Z = blobs(m=50, seed=1)[0]
    nearest = ((Z[:, None] - X[None]) ** 2).sum(2).argmin(1)
    np.testing.assert_array_equal(SharedVarianceNB().fit(X, y).predict(Z), y[nearest])


def test_scaling_the_features_changes_nothing():
    X, y = blobs()
    scale = np.array([1e-3, 1e3, 5.0, 1.0, 20.0])
    ours, theirs = (SharedVarianceNB(1e-300).fit(X * s, y).predict_proba(X * s) for s in (1, scale))
    np.testing.assert_allclose(ours, theirs, rtol=1e-8)


# --- the simulation


@pytest.mark.parametrize("n, expected", [(2, 0.110336), (4, 0.056923), (10, 0.009508)])
def test_bayes_error_of_two_classes(n, expected):
    classes = GaussianClasses(2, n)
    assert classes.bayes_error == pytest.approx(expected, abs=5e-7)
    distance = np.sqrt((4 / classes.std**2).sum())
    assert classes.bayes_error == pytest.approx(norm.cdf(-distance / 2), rel=1e-12)


@pytest.mark.parametrize(
    "K, n, correlation, separation",
    [(3, 6, 0.0, None), (5, 4, 0.0, None), (3, 6, 0.4, None), (2, 5, 0.7, 1.0), (4, 5, 0.0, 1.5)],
)
def test_bayes_error_is_that_of_the_true_densities(K, n, correlation, separation):
    classes = GaussianClasses(K, n, correlation, separation)
    X, y = classes.sample(10_000, 0)
    covariance = np.outer(classes.std, classes.std) * (correlation + (1 - correlation) * np.eye(n))
    densities = [multivariate_normal.logpdf(X, np.full(n, a), covariance) for a in classes.places]
    measured = (np.argmax(densities, 0) != y).mean()
    assert measured == pytest.approx(classes.bayes_error, abs=4 * np.sqrt(0.25 / 10_000))


@pytest.mark.parametrize("K, correlation", [(2, 0.0), (2, 0.5), (4, 0.0), (4, 0.5)])
@pytest.mark.parametrize("name", ["nb", "lr"])
def test_the_error_without_a_test_set_is_that_on_one(K, correlation, name):
    classes = GaussianClasses(K, 8, correlation)
    X, y = classes.sample(60, 1)
    model = paper_models()[name].fit(X, y)
    Z, t = classes.sample(10_000, 2)
    measured = (model.predict(Z) != t).mean()
    assert classes.error(model) == pytest.approx(measured, abs=0.02)


def test_no_classifier_beats_the_bayes_error_and_naive_bayes_comes_near():
    classes = GaussianClasses(3, 6)
    error = classes.error(SharedVarianceNB().fit(*classes.sample(20_000, 0)), draws=100_000)
    assert classes.bayes_error - 0.003 < error < classes.bayes_error + 0.005


@pytest.mark.parametrize("correlation", [0.0, 0.3])
def test_a_separation_given_is_that_of_the_nearest_means_for_any_n(correlation):
    for n in (3, 10, 40):
        classes = GaussianClasses(3, n, correlation, separation=2.0)
        covariance = np.outer(classes.std, classes.std) * (
            correlation + (1 - correlation) * np.eye(n)
        )
        step = np.full(n, classes.places[2] - classes.places[1])
        assert step @ np.linalg.solve(covariance, step) == pytest.approx(4.0)


def test_every_class_is_in_every_sample():
    X, y = GaussianClasses(7, 3).sample(7, 0)
    assert X.shape == (7, 3) and set(y) == set(range(7))


# --- samples that are needed


def test_first_passage_interpolates_in_the_logarithm_of_the_size():
    assert first_passage([10, 20, 40], [0.5, 0.3, 0.1], 0.2) == pytest.approx(20 * np.sqrt(2))
    assert first_passage([10, 20, 40], [0.5, 0.2, 0.3], 0.2) == 20
    assert first_passage([10, 20], [0.1, 0.2], 0.2) == 10
    assert first_passage([10, 20], [0.5, 0.4], 0.2) == np.inf


class Halving:
    """Samples on which any model has the error 1 / m."""

    def sample(self, m, random_state=None):
        X = np.repeat([[0.0], [1.0]], [1, m - 1], axis=0)
        return X, X[:, 0].astype(int)

    def error(self, model):
        return 1 / model.class_count_.sum()


def test_sample_complexity_finds_where_a_known_curve_passes():
    found = sample_complexity(
        SharedVarianceNB(), Halving(), 1 / 64, sizes=[16 << j for j in range(9)]
    )
    assert found == pytest.approx(64)
    curve = error_curves({"a": SharedVarianceNB()}, Halving(), [4, 8, 16, 32], until=1 / 9)
    assert curve.m.tolist() == [4, 8, 16] and curve.a.tolist() == [1 / 4, 1 / 8, 1 / 16]


def test_growth_exponent_of_a_power_is_its_power():
    n = np.array([100, 200, 400])
    assert growth_exponent(n, 3 * n**1.3) == pytest.approx(1.3)


def test_crossing_is_where_logistic_regression_stays_ahead():
    m = [10, 20, 40, 80]
    assert crossing(m, [0.3, 0.2, 0.2, 0.2], [0.5, 0.3, 0.1, 0.05]) == pytest.approx(20 * 2**0.5)
    assert crossing(m, [0.3] * 4, [0.2] * 4) == 10
    assert crossing(m, [0.1] * 4, [0.2] * 4) == np.inf
    assert crossing(m, [0.2] * 4, [0.1, 0.3, 0.1, 0.1]) == pytest.approx(20 * 2**0.5)


# --- features of one's own


def test_learning_curves_train_on_scaled_growing_balanced_samples(monkeypatch):
    seen = []

    class Spy(SharedVarianceNB):
        def fit(self, X, y, sample_weight=None):
            seen.append((X, y))
            return super().fit(X, y, sample_weight)

    monkeypatch.setattr(method, "SharedVarianceNB", Spy)
    X, y = load_iris(return_X_y=True)
    frame = learning_curves(X, y, [3, 12, 60], repeats=2, balanced=True, seed=5)
    assert list(frame.columns) == ["n", "K", "m", "seed", "nb", "lr"]
    assert frame.seed.tolist() == [5] * 3 + [6] * 3 and set(frame.n) == {4} and set(frame.K) == {3}
    for (rows, labels), m in zip(seen, frame.m, strict=True):
        assert np.bincount(labels).tolist() == [m // 3] * 3
        assert rows.min(0) == pytest.approx(0) and rows.max(0) == pytest.approx(1)


def test_many_rows_of_iris_give_the_error_of_an_independent_pipeline():
    X, y = load_iris(return_X_y=True)
    ours = learning_curves(X, y, [90], repeats=8).lr.mean()
    errors = []
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(150)
        pipe = make_pipeline(MinMaxScaler(), LogisticRegression(max_iter=1000))
        pipe.fit(X[order[:90]], y[order[:90]])
        errors.append(1 - pipe.score(X[order[90:]], y[order[90:]]))
    assert ours == pytest.approx(np.mean(errors), abs=0.03)


def test_tuned_errors_stand_beside_and_equal_the_untuned_where_nothing_can_be_chosen():
    X, y = load_iris(return_X_y=True)
    frame = learning_curves(X, y, [6, 45], repeats=1, balanced=True, tune=True)
    first = frame.iloc[0]
    assert first.nb_tuned == first.nb and first.lr_tuned == first.lr
    assert {"nb_tuned", "lr_tuned"} <= set(frame)


def test_the_tuned_choice_is_that_of_the_highest_score_in_cross_validation():
    X, y = load_iris(return_X_y=True)
    rows = MinMaxScaler().fit_transform(X)
    found = method._tuned(SharedVarianceNB(), rows, y)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    scores = [cross_val_score(SharedVarianceNB(e), rows, y, cv=folds).mean() for e in SMOOTHINGS]
    assert found.best_params_["eps"] == SMOOTHINGS[int(np.argmax(scores))]


def test_any_classifiers_can_be_compared():
    X, y = load_iris(return_X_y=True)
    frame = learning_curves(X, y, [30], repeats=2, models={"peer": GaussianNB()})
    assert list(frame.columns) == ["n", "K", "m", "seed", "peer"] and frame.peer.max() < 0.2


def test_rows_at_random_still_hold_every_class():
    X, y = load_iris(return_X_y=True)
    assert np.isfinite(learning_curves(X, y, [3, 4, 5], repeats=5).nb).all()


# --- from the log loss to the error


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1), st.floats(0.01, 30))
def test_no_scores_lose_more_error_than_their_log_loss_allows(K, seed, scale):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(K, rng.choice([0.1, 1.0, 10.0])), 50)
    error, log_loss = conditional_regrets(scale * rng.normal(size=(50, K)), probs)
    log_loss = np.maximum(log_loss, 0)
    assert (error <= error_bound(log_loss, tight=True) + 1e-9).all()
    assert (error_bound(log_loss, tight=True) <= error_bound(log_loss) + 1e-12).all()


def test_the_tight_bound_is_attained_by_two_equal_scores():
    beta = np.linspace(0.01, 0.99, 25)
    probs = np.stack([(1 - beta) / 2, (1 + beta) / 2], 1)
    error, log_loss = conditional_regrets(np.zeros((25, 2)), probs)
    np.testing.assert_allclose(error, beta)
    np.testing.assert_allclose(log_loss, least_log_regret(beta), rtol=1e-12)
    np.testing.assert_allclose(error_bound(log_loss, tight=True), beta, rtol=1e-9)


@pytest.mark.parametrize("beta, expected", [(0.5, 0.130812), (0.0, 0.0), (1.0, np.log(2))])
def test_least_log_regret_at_known_points(beta, expected):
    assert float(least_log_regret(beta)) == pytest.approx(expected, abs=5e-7)
    assert float(least_log_regret(beta)) >= beta**2 / 2


def test_a_regret_above_log_two_allows_any_error():
    assert error_bound([0.8, 5.0], tight=True) == pytest.approx(1)
    assert error_bound(5.0) == 1


# --- wrong input


X, Y = blobs(m=30)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: SharedVarianceNB(eps=-1).fit(X, Y), ValueError, "eps"),
        (lambda: SharedVarianceNB(eps=0).fit(X, Y), ValueError, "eps"),
        (lambda: SharedVarianceNB().fit(X, Y, -np.ones(30)), ValueError, "sample_weight"),
        (lambda: SharedVarianceNB().fit(X, Y, np.zeros(30)), ValueError, "ample weight"),
        (lambda: SharedVarianceNB().partial_fit(X, Y), ValueError, "classes"),
        (lambda: SharedVarianceNB().fit(X, Y).partial_fit(X, Y + 1), ValueError, "labels out of"),
        (lambda: SharedVarianceNB().fit(X, np.zeros(30)), ValueError, "1 class"),
        (lambda: GaussianClasses(1, 5), ValueError, "K"),
        (lambda: GaussianClasses(2, 0), ValueError, "n"),
        (lambda: GaussianClasses(2, 5, 1.0), ValueError, "correlation"),
        (lambda: GaussianClasses(2, 5, separation=0.0), ValueError, "separation"),
        (lambda: GaussianClasses(3, 5).sample(2, 0), ValueError, "m"),
        (lambda: first_passage([2, 1], [0.1, 0.2], 0.1), ValueError, "sizes"),
        (lambda: first_passage([1, 2], [0.1], 0.1), ValueError, "same number of rows"),
        (lambda: learning_curves(X, Y, [2]), ValueError, "one a class"),
        (lambda: learning_curves(X, Y, [25]), ValueError, "at most 18"),
        (lambda: learning_curves(X * np.nan, Y, [5]), ValueError, "features"),
        (lambda: error_bound(-0.1), ValueError, "regret"),
        (lambda: least_log_regret(1.5), ValueError, "beta"),
        (lambda: conditional_regrets(np.zeros((2, 3)), np.full((2, 2), 0.5)), ValueError, "probs"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_estimator_clones_with_its_parameter():
    assert clone(SharedVarianceNB(eps=0.1)).get_params() == {"eps": 0.1}


# --- experiments and explorer


def test_growth_reports_where_its_curves_pass():
    row = study.growth(0, K=2, dims=(20, 40))
    frame = study.simulated(pd.DataFrame([{"K": 2, "seed": 0, **row}]))
    for i, n in enumerate((20, 40)):
        curve = frame[frame.n == n]
        target = GaussianClasses(2, n).bayes_error + 0.01
        for name in ("nb", "lr"):
            assert row[f"m_{name}"][i] == first_passage(curve.m, curve[name], target)
    assert row["exponent_lr"] == growth_exponent((20, 40), row["m_lr"])


@pytest.mark.parametrize("kind", ["pixels", "cnn", "autoencoder", "given"])
def test_feature_curves_run_on_digits_no_network_was_trained_on(kind):
    features = np.random.default_rng(0).normal(size=(200, 7)) if kind == "given" else None
    options = {"shots": (1, 3, 5), "tuned": 3, "rows": 200, "epochs": (1, 1)}
    row = study.feature_curves(0, kind=kind, features=features, **options)
    assert row["m"].tolist() == [5, 15, 25]
    assert row["n"] == {"pixels": 784, "given": 7}.get(kind, study.CODE)
    assert np.isnan(row["lr_tuned"]).tolist() == [False, False, True]
    assert row["few_nb"] == pytest.approx(row["nb"].mean())
    if kind == "given":
        assert row["nb"][-1] > 0.5  # noise tells no digits apart
    else:
        assert row["nb"][-1] < 0.6
    assert len(study.measured(pd.DataFrame([{"seed": 0, **row}]))) == 3


def test_pretrained_features_are_those_of_the_network():
    if not pretrained_features.available():
        pytest.skip("the weights are not on this machine")
    found = pretrained_features.digit_features(rows=20, side=32, batch_size=7)
    other = pretrained_features.digit_features(rows=20, side=32, batch_size=20)
    assert found["features"].shape == (20, 1280) and found["features"].std() > 0.05
    np.testing.assert_allclose(found["features"], other["features"], atol=5e-3)
    np.testing.assert_array_equal(found["y"], data.mnist5000().sample(20, 0).y)


def curves():
    rng = np.random.default_rng(0)
    rows = [
        (K, n, m, seed, 1 / m + 0.02 + 0.003 * rng.random(), n / (20 * m) + 0.002 * rng.random())
        for K in (2, 3)
        for n in (50, 100, 200)
        for m in (8, 16, 32, 64, 128, 256, 512, 1024)[: 7 + K % 2]
        for seed in range(3)
    ]
    return pd.DataFrame(rows, columns=["K", "n", "m", "seed", "nb", "lr"])


def test_the_exported_formula_is_the_explorers():
    X, y = load_iris(return_X_y=True)
    own = learning_curves(X, y, [3, 10, 40], repeats=3)
    explorer = figures.explore_regimes({"simulated": curves(), "mine": own})
    assert js.check_formula(explorer, rtol=1e-6) > 20
    assert min([explorer.result() and explorer.seconds for _ in range(5)]) < 0.05


def test_the_explorer_marks_the_crossing_of_the_mean_curves():
    explorer = figures.explore_regimes(curves(), K=3, n=100)
    found = explorer.result()
    mean = curves().query("K == 3 and n == 100").groupby("m")[["nb", "lr"]].mean()
    assert found["cross_m"][0] == pytest.approx(crossing(mean.index, mean.nb, mean.lr))
    assert found["need_lr"][found["n_lr"].tolist().index(100)] == pytest.approx(
        first_passage(mean.index, mean.lr, found["target"])
    )


def test_the_figure_says_who_leads_and_from_where():
    nb, lr = [0.3, 0.3, 0.2], [0.4, 0.2, 0.1]
    table = pd.DataFrame({"shots": [1.0, 5, 20], "nb": nb, "lr": lr, "n": 784, "seed": 0})
    table = table.assign(kind="pixels", nb_tuned=table.nb, lr_tuned=table.lr)
    fig = Figure(figsize=(4, 3))
    figures.draw_features(table, fig)
    assert fig.get_suptitle().endswith("from 5 images a class on")
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["pixels (n = 784)"]
    figures.draw_features(table.assign(lr=nb), fig)
    assert fig.get_suptitle().startswith("Neither")


def test_the_explorer_says_what_a_table_lacks():
    with pytest.raises(ValueError, match="column 'lr'"):
        figures.explore_regimes(curves().drop(columns="lr"))
