"""Aggregating quantile models: weights, training, out-of-fold predictions."""

import numpy as np
import pytest
import torch
from scipy import optimize
from sklearn.base import clone
from sklearn.ensemble import RandomForestRegressor
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import QuantileRegressor
from sklearn.metrics import mean_pinball_loss

from workbench.calibration.experiments import quantile_aggregation as study
from workbench.calibration.figures_quantiles import explore_quantiles
from workbench.calibration.quantile_aggregation import (
    DQA,
    Aggregator,
    aggregation_loss,
    fit_aggregator,
    out_of_fold,
    stack,
)
from workbench.calibration.quantiles import crossing_penalty, wis

LEVELS = np.array([0.1, 0.3, 0.5, 0.7, 0.9])


class Marginal:
    """Base model for the tests: quantiles of the targets seen, stretched and moved."""

    def __init__(self, stretch=1.0, move=0.0):
        self.stretch, self.move = stretch, move

    def fit(self, X, y):
        self.rows = {tuple(row) for row in X}
        q = np.quantile(y, LEVELS)
        self.q = self.move + q[2] + self.stretch * (q - q[2])

    def predict(self, X):
        return np.tile(self.q, (len(X), 1))


def inputs(n=6, p=3, d=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, p, len(LEVELS), generator=generator, dtype=dtype).sort(2).values
    return z, torch.randn(n, d, generator=generator, dtype=dtype)


@pytest.fixture
def world():
    """Targets with a spread that depends on x; model 0 is right where x < 0, model 1 where > 0."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (600, 1))
    y = np.where(x[:, 0] < 0, 0.3, 2.0) * rng.normal(size=600)
    normal = np.array([-1.2816, -0.5244, 0.0, 0.5244, 1.2816])
    z = np.stack([np.tile(0.3 * normal, (600, 1)), np.tile(2.0 * normal, (600, 1))], 1)
    return z, y, x


def randomised(kind, d_x, seed=0, **options):
    torch.manual_seed(seed)
    model = Aggregator(3, len(LEVELS), kind, d_x=d_x, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


# the combination


@pytest.mark.parametrize("d_x", [None, 2])
@pytest.mark.parametrize("kind", ["coarse", "medium", "fine"])
def test_the_aggregate_is_the_weighted_sum_of_the_paper(kind, d_x):
    model, (z, x) = randomised(kind, d_x), inputs()
    w = model.weights(x).expand(len(z), -1, -1)
    torch.testing.assert_close(w.sum(1), torch.ones(len(z), w.shape[2]).double())
    assert (w >= 0).all()
    m = len(LEVELS)
    for i in range(len(z)):
        for u in range(m):
            if kind == "coarse":
                expected = sum(w[i, j, 0] * z[i, j, u] for j in range(3))
            elif kind == "medium":
                expected = sum(w[i, j, u] * z[i, j, u] for j in range(3))
            else:
                expected = sum(w[i, j * m + v, u] * z[i, j, v] for j in range(3) for v in range(m))
            assert model(z, x)[i, u].item() == pytest.approx(expected.item())


def test_medium_with_equal_rows_is_coarse_and_fine_on_the_diagonal_is_medium():
    z, _ = inputs()
    coarse, medium, fine = (randomised(kind, None) for kind in ("coarse", "medium", "fine"))
    m = len(LEVELS)
    with torch.no_grad():
        medium.logits.copy_(coarse.logits.repeat_interleave(m))
    torch.testing.assert_close(medium(z), coarse(z))
    off = -50 * (1 - torch.eye(m)).repeat(3, 1)  # (p m, m): only a level's own level counts
    with torch.no_grad():
        medium.logits.normal_()
        own = torch.eye(m).repeat(3, 1) * medium.logits.view(3, m).repeat_interleave(m, 0)
        fine.logits.copy_((own + off).flatten())
    torch.testing.assert_close(fine(z), medium(z), atol=1e-12, rtol=1e-12)


def test_a_local_aggregator_without_influence_of_x_is_global():
    z, x = inputs()
    local, free = randomised("fine", 2), randomised("fine", None)
    with torch.no_grad():
        local.network[-1].weight.zero_()
        free.logits.copy_(local.network[-1].bias)
    torch.testing.assert_close(local(z, x), free(z))


def test_starts():
    z, _ = inputs()
    torch.testing.assert_close(Aggregator(3, 5, "coarse").double()(z), z.mean(1))
    everywhere = z.mean((1, 2))[:, None].expand(-1, 5)
    torch.testing.assert_close(Aggregator(3, 5, "fine").double()(z), everywhere)
    near = Aggregator(3, 5, "fine", diagonal=40.0).double()(z)
    torch.testing.assert_close(near, z.mean(1), atol=1e-10, rtol=0)


def test_the_aggregate_stays_between_the_base_predictions():
    z, x = inputs()
    for kind in ("coarse", "medium"):
        q = randomised(kind, 2)(z, x)
        assert (q >= z.min(1).values - 1e-12).all()
        assert (q <= z.max(1).values + 1e-12).all()


@pytest.mark.parametrize("inside", [None, "pava", "sort", "soft"])
def test_gradients(inside):
    z, x = inputs(n=3)
    model, levels = randomised("fine", 2, hidden=3), torch.tensor(LEVELS)
    y = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss(z, *parameters):
        named = dict(zip(dict(model.named_parameters()), parameters, strict=True))
        q = torch.func.functional_call(model, named, (z, x))
        return aggregation_loss(q, y, levels, penalty=0.7, margin=0.05, inside=inside)

    assert torch.autograd.gradcheck(loss, (z.requires_grad_(), *model.parameters()))


def test_loss_is_pinball_plus_penalty():
    z, x = inputs()
    q, y = randomised("fine", 2)(z, x).detach(), z[:, 0, 0]
    expected = np.mean([mean_pinball_loss(y, q[:, j], alpha=u) for j, u in enumerate(LEVELS)])
    expected += 2.0 * crossing_penalty(q.numpy(), 0.1)
    found = aggregation_loss(q, y, torch.tensor(LEVELS), penalty=2.0, margin=0.1)
    assert float(found) == pytest.approx(float(expected))


def test_state_dict_round_trip_and_dtypes():
    model = randomised("fine", 2, layers=3, dropout=0.1).eval()
    twin = Aggregator(3, 5, "fine", d_x=2, layers=3, dropout=0.1).double().eval()
    twin.load_state_dict(model.state_dict())
    z, x = inputs()
    assert torch.equal(model(z, x), twin(z, x))
    assert model.float()(z.float(), x.float()).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_same():
    model, (z, x) = randomised("fine", 2), inputs()
    expected = model(z, x)
    torch.testing.assert_close(model.cuda()(z.cuda(), x.cuda()).cpu(), expected)


# training


def test_global_medium_weights_reach_the_optimum_of_each_level(world):
    z, y, _ = world
    model = Aggregator(2, 5, "medium")
    fit_aggregator(model, z, y, LEVELS, validation=(z, y), penalty=0.0, lr=0.05,
                   batch_size=600, steps=300, every=50)  # fmt: skip
    for j, u in enumerate(LEVELS):

        def loss(w, j=j, u=u):
            return mean_pinball_loss(y, w * z[:, 0, j] + (1 - w) * z[:, 1, j], alpha=u)

        best = optimize.minimize_scalar(loss, bounds=(0, 1), method="bounded")
        assert loss(float(model.weights().detach()[0, 0, j])) == pytest.approx(best.fun, rel=2e-3)


def test_local_weights_find_which_model_is_right_where(world):
    z, y, x = world
    torch.manual_seed(0)
    model = Aggregator(2, 5, "coarse", d_x=1, hidden=16)
    history = fit_aggregator(model, z, y, LEVELS, x, lr=0.01, steps=600, every=50)
    w = model.weights(torch.tensor([[-0.6], [0.6]])).detach()[:, 0, 0]
    assert w[0] > 0.8
    assert w[1] < 0.2
    uniform, q = z.mean(1), model(torch.tensor(z).float(), torch.tensor(x).float()).detach()
    assert wis(q.double().numpy(), y, LEVELS).mean() < wis(uniform, y, LEVELS).mean()
    assert {"step", "loss", "validation"} <= set(history.frame)


def test_training_is_a_function_of_its_arguments(world):
    z, y, x = world
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        model = Aggregator(2, 5, "fine", d_x=1, dropout=0.1)
        fit_aggregator(model, z, y, LEVELS, x, steps=30, every=10, monotone="sort", inside=True)
        found.append(model.weights(torch.zeros(1, 1)).detach())
    assert torch.equal(*found)


def test_the_penalty_removes_crossing():
    y = np.random.default_rng(0).normal(size=600)
    normal = np.array([-1.2816, -0.5244, 0.0, 0.5244, 1.2816])
    swapped, wide = normal[[1, 0, 2, 4, 3]], 4 * normal
    z = np.tile([swapped, wide], (600, 1, 1))
    left = []
    for penalty in (0.0, 10.0):
        model = Aggregator(2, 5, "medium")
        fit_aggregator(model, z, y, LEVELS, penalty=penalty, margin=0.0, monotone=None, lr=0.05,
                       steps=200, every=50)  # fmt: skip
        left.append(crossing_penalty(model(torch.tensor(z).float()).detach(), 0.0).item())
    assert left[1] < 0.1 * left[0]


# out of fold


def test_out_of_fold_rows_were_not_seen():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(23, 2)), rng.normal(size=23)
    models = [Marginal(), Marginal(2.0)]
    z, fold, fitted = out_of_fold(models, X, y, folds=4, seed=1)
    assert z.shape == (23, 2, 5)
    assert sorted(np.bincount(fold)) == [5, 6, 6, 6]
    assert not hasattr(models[0], "rows")
    for i, f in enumerate(fold):
        assert tuple(X[i]) not in fitted[f][0].rows
        np.testing.assert_array_equal(z[i], stack(fitted[f], X[i : i + 1])[0])
    again = out_of_fold(models, X, y, folds=4, seed=1)
    np.testing.assert_array_equal(again[0], z)


def test_estimator_beats_its_misplaced_models():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(300, 2)), 5 + 3 * rng.normal(size=300)
    options = {"lr": 0.05, "steps": 300, "every": 50}
    model = DQA([Marginal(0.1, 4.0), Marginal(3.0), Marginal(1.0, -5)], LEVELS, options=options)
    q = model.fit(X, y).predict(X)
    assert (np.diff(q, axis=1) >= 0).all()
    bases = [wis(base, y, LEVELS).mean() for base in stack(model.models_, X).swapaxes(0, 1)]
    assert wis(q, y, LEVELS).mean() < min(bases)
    assert model.weights(X).shape == (300, 15, 5)
    np.testing.assert_allclose(model.weights(X).sum(1), 1, atol=1e-5)
    assert clone(model).get_params()["kind"] == "fine"


def test_units_of_the_target_do_not_matter():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(120, 2)), rng.normal(size=120)
    options = {"steps": 40, "every": 20}
    models = [Marginal(), Marginal(2.0)]
    a = DQA(models, LEVELS, options=options).fit(X, y).predict(X)
    b = DQA(models, LEVELS, options=options).fit(X, 1000 * y + 7).predict(X)
    np.testing.assert_allclose(1000 * a + 7, b, rtol=1e-3, atol=2)


# the base models of the experiment


@pytest.fixture(scope="module")
def skewed():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(300, 3))
    return X, X @ [1.0, -2.0, 0.5] + (1 + 0.5 * (X[:, 0] > 0)) * rng.exponential(size=300)


def test_linear_quantiles_reach_the_linear_program(skewed):
    X, y = skewed
    ours = study.LinearQuantiles(rounds=200).fit(X, y)
    for j in (0, 9, 18):
        u = study.LEVELS[j]
        exact = QuantileRegressor(quantile=u, alpha=0).fit(X, y)
        reached = mean_pinball_loss(y, (ours._design(X) @ ours.beta_.T)[:, j], alpha=u)
        assert reached == pytest.approx(mean_pinball_loss(y, exact.predict(X), alpha=u), rel=2e-3)


def test_forest_quantiles_equal_the_peer_with_the_same_trees(skewed):
    peer = pytest.importorskip("quantile_forest")
    X, y = skewed
    options = {"min_samples_leaf": 8, "max_features": 0.5, "random_state": 3, "bootstrap": False}
    theirs = peer.RandomForestQuantileRegressor(20, max_samples_leaf=None, **options)
    theirs.fit(X[:200], y[:200])
    ours = study.ForestQuantiles().fit(X[:200], y[:200])
    ours.forest_ = RandomForestRegressor(20, **options).fit(X[:200], y[:200])
    ours.leaves_ = ours.forest_.apply(X[:200])
    expected = theirs.predict(X[200:], quantiles=list(study.LEVELS), weighted_leaves=True)
    # same weights; the peer interpolates between order statistics, ours takes the upper one
    assert np.abs(expected - ours.predict(X[200:])).mean() < 0.03 * y.std()


def test_neighbour_quantiles_are_order_statistics(skewed):
    X, y = skewed
    model = study.NeighbourQuantiles(k=20).fit(X[:200], y[:200])
    scaled = model.scaler_.transform(X)
    for x, q in zip(scaled[200:205], model.predict(X[200:205]), strict=True):
        near = np.argsort(((scaled[:200] - x) ** 2).sum(1))[:20]
        expected = np.quantile(y[near], study.LEVELS, method="inverted_cdf")
        np.testing.assert_allclose(q, expected)


def test_every_base_model_beats_the_marginal_quantiles(skewed):
    X, y = skewed
    marginal = np.tile(np.quantile(y[:200], study.LEVELS), (100, 1))
    worst = wis(marginal, y[200:], study.LEVELS).mean()
    for model in study.base_models(effort=0.5):
        q = model.fit(X[:200], y[:200]).predict(X[200:])
        assert (np.diff(q, axis=1) >= 0).all()
        assert wis(q, y[200:], study.LEVELS).mean() < 0.8 * worst


def test_study_scores_are_relative_to_the_marginal(monkeypatch, skewed):
    import pandas as pd

    class Fake:
        X, y = pd.DataFrame(skewed[0]).assign(kind="a"), pd.Series(skewed[1])

    monkeypatch.setattr(study.lab.data, "table", lambda name: Fake)
    found = study.table_study(0, rows=120, steps=40, every=20, folds=3, effort=0.2)
    assert 0 < found["wis_uniform"] < 1
    assert found["wis_dqa"] <= found["wis_raw"] + 1e-6  # the theorem, on these rows
    assert found["wis_best"] == found[f"wis_{found['best']}"]


# the explorer


@pytest.fixture(scope="module")
def explorer():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, 3, 19)).cumsum(2) / 4
    weights = rng.dirichlet(np.ones(57), (60, 19)).swapaxes(1, 2)
    return explore_quantiles(
        z, weights, rng.normal(size=60), study.LEVELS, models=["a", "b", "<c>"]
    )


def test_explorer_answers_quickly_at_every_position_of_its_grid(explorer):
    for row in explorer.grid["row"]:
        scores = {}
        for order in explorer.grid["order"]:
            result = explorer.result(row=row, order=order)
            assert explorer.seconds < 0.05
            assert order == "none" or result["crossings"] == 0
            scores[order] = result["score"]
            np.testing.assert_allclose(result["share"].sum(0), 1)
        assert max(scores["sort"], scores["pava"]) <= scores["none"] + 1e-12
    assert explorer.export()["grid"]
    assert explorer.figure(order="pava") is not None


@pytest.mark.parametrize("kind", ["coarse", "medium", "fine"])
def test_explorer_draws_what_the_aggregator_predicts(kind):
    z, x = inputs(n=9)
    model = randomised(kind, 2)
    made = explore_quantiles(z, model.weights(x).detach(), z[:, 0, 0], LEVELS)
    found = np.array([made.result(row=r, order="none")["curve"] for r in range(9)])
    expected = model(z, x).detach().numpy()
    np.testing.assert_allclose(found, expected[np.argsort(expected[:, 2])])


def test_explorer_names_bad_input():
    z, x = inputs()
    w = randomised("fine", 2).weights(x).detach()
    with pytest.raises(ValueError, match="weights: expected"):
        explore_quantiles(z, w[:, 1:], z[:, 0, 0], LEVELS)
    with pytest.raises(ValueError, match="models: expected 3"):
        explore_quantiles(z, w, z[:, 0, 0], LEVELS, models=["a"])


# bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, y, x: Aggregator(0, 5), ValueError, "p: expected"),
        (lambda z, y, x: Aggregator(2, 5, "finest"), ValueError, "kind: expected one of"),
        (lambda z, y, x: Aggregator(2, 5, d_x=1)(torch.tensor(z)), ValueError, "x: expected"),
        (lambda z, y, x: Aggregator(2, 4)(torch.tensor(z)), ValueError, "z: expected"),
        (lambda z, y, x: fit(z[:, :, :4], y, x), ValueError, "z: expected"),
        (lambda z, y, x: fit(z, y[:9], x), ValueError, "z and y"),
        (lambda z, y, x: fit(z, y, None), ValueError, "x: expected"),
        (lambda z, y, x: fit(z, y, x.repeat(2, 1)), ValueError, "x: expected 1 columns"),
        (lambda z, y, x: fit(np.where(z > 1, np.nan, z), y, x), ValueError, "z: row"),
        (lambda z, y, x: fit(z, y, x, validation=0.0), ValueError, "validation"),
        (lambda z, y, x: fit(z[:3], y[:3], x[:3], validation=0.1), ValueError, "validation: lea"),
        (lambda z, y, x: DQA([], LEVELS).fit(x, y), ValueError, "models: expected at least"),
        (lambda z, y, x: DQA([Marginal()], LEVELS).predict(x), NotFittedError, "not fitted"),
    ],
)
def test_bad_input_is_named(world, call, error, message):
    with pytest.raises(error, match=message):
        call(*world)


def fit(z, y, x, **options):
    return fit_aggregator(Aggregator(2, 5, "fine", d_x=1), z, y, LEVELS, x, **options)
