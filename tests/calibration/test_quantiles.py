"""Quantile scores, order and conformal correction."""

import numpy as np
import pytest
import scoringrules
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import mean_pinball_loss

from workbench.calibration.quantiles import (
    cqr,
    crossing_penalty,
    cv_plus,
    isotonize,
    pinball,
    wis,
)

LEVELS = np.arange(1, 20) / 20
numbers = st.floats(-50, 50, allow_nan=False).map(lambda v: round(v, 3))


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 19)), rng.normal(size=60)


# scores


def test_pinball_equals_scikit_learn(data):
    q, y = data
    ours = pinball(q, y, LEVELS).mean(0)
    theirs = [mean_pinball_loss(y, q[:, j], alpha=u) for j, u in enumerate(LEVELS)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("m", [2, 3, 19, 99])
def test_wis_equals_scoringrules_and_twice_the_pinball_loss(m):
    rng = np.random.default_rng(m)
    levels = np.arange(1, m + 1) / (m + 1)
    q, y = np.sort(rng.normal(size=(40, m)), 1), rng.normal(size=40)
    np.testing.assert_allclose(wis(q, y, levels), 2 * pinball(q, y, levels).mean(1), rtol=1e-10)
    if m % 2:
        k = m // 2
        # scoringrules 0.10 scores the median itself, not its distance, with its numpy backend:
        # given that distance as the "median" it is the formula it documents
        theirs = scoringrules.weighted_interval_score(
            y, abs(y - q[:, k]), q[:, :k], q[:, :k:-1], 2 * levels[:k], backend="numpy"
        )
        np.testing.assert_allclose(wis(q, y, levels), theirs, rtol=1e-10)
        crps = scoringrules.crps_quantile(y, q, levels, backend="numpy")
        np.testing.assert_allclose(wis(q, y, levels), crps, rtol=1e-10)
        one = scoringrules.interval_score(y, q[:, 0], q[:, -1], 2 * levels[0], backend="numpy")
        ours = 2 * pinball(q, y, levels)[:, [0, -1]].sum(1) / (2 * levels[0])
        np.testing.assert_allclose(one, ours, rtol=1e-10)


def test_true_quantiles_have_the_least_expected_pinball_loss():
    y = np.random.default_rng(0).exponential(size=40_000)
    true = -np.log1p(-LEVELS)
    best = pinball(np.tile(true, (len(y), 1)), y, LEVELS).mean()
    for factor in (0.8, 1.25):
        assert pinball(np.tile(factor * true, (len(y), 1)), y, LEVELS).mean() > best


# order


def crossing_by_loop(q, delta):
    m, total, count = q.shape[1], 0.0, 0
    for row in q:
        for u in range(m):
            for v in range(u + 1, m):
                total += max(row[u] - row[v] + delta[u][v], 0)
                count += 1
    return total / count


def test_crossing_penalty_equals_the_double_loop(data):
    q = data[0][:5]
    assert crossing_penalty(q, 0.3) == pytest.approx(crossing_by_loop(q, np.full((19, 19), 0.3)))
    d = np.sort(np.random.default_rng(1).normal(size=19))
    assert crossing_penalty(q, d) == pytest.approx(crossing_by_loop(q, d - d[:, None]))
    assert crossing_penalty(np.sort(q, 1), 0.0) == 0


@given(arrays(float, st.tuples(st.integers(1, 6), st.integers(1, 12)), elements=numbers))
@settings(deadline=None, max_examples=40)
def test_pava_equals_scikit_learn(q):
    theirs = [IsotonicRegression().fit_transform(np.arange(q.shape[1]), row) for row in q]
    np.testing.assert_allclose(isotonize(q), theirs, atol=1e-10)


@given(
    arrays(float, st.tuples(st.integers(1, 4), st.just(9)), elements=numbers),
    numbers,
    st.sampled_from(["pava", "sort"]),
)
@settings(deadline=None, max_examples=40)
def test_sorting_and_projecting_never_raise_the_score(q, target, how):
    """The paper's theorem, for every prediction and every target."""
    y = np.full(len(q), target)
    levels = np.arange(1, 10) / 10
    assert (wis(isotonize(q, how), y, levels) <= wis(q, y, levels) + 1e-10).all()


def test_minmax_can_raise_the_score():
    q, y = np.array([[1.0, 0.0, 2.0]]), np.array([0.9])
    levels = [0.25, 0.5, 0.75]
    assert isotonize(q, "minmax").tolist() == [[0.0, 0.0, 2.0]]
    assert wis(isotonize(q, "minmax"), y, levels) > wis(q, y, levels)


@given(
    arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=numbers),
    st.sampled_from(["pava", "sort", "minmax", "soft"]),
)
@settings(deadline=None, max_examples=40)
def test_rows_rise_and_ordered_rows_stay(q, how):
    fixed = isotonize(q, how)
    assert (np.diff(fixed, axis=1) >= -1e-8).all()
    if how != "soft":
        np.testing.assert_array_equal(isotonize(np.sort(q, 1), how), np.sort(q, 1))
        np.testing.assert_allclose(isotonize(fixed, how), fixed, atol=1e-12)
    if how != "minmax":
        np.testing.assert_allclose(fixed.sum(1), q.sum(1), atol=1e-8)  # the mean is kept


def test_soft_sort_is_the_projection_on_the_permutahedron():
    q, strength = np.array([0.3, -1.0, 0.8]), 2.0
    z = np.arange(1, 4) / strength
    high = np.cumsum(np.sort(q)[::-1])  # any j entries sum to at most the j largest
    constraints = [{"type": "eq", "fun": lambda v: v.sum() - q.sum()}]
    for subset in ([0], [1], [2], [0, 1], [0, 2], [1, 2]):
        constraints.append(
            {"type": "ineq", "fun": lambda v, s=subset: high[len(s) - 1] - v[s].sum()}
        )
    found = optimize.minimize(
        lambda v: ((v - z) ** 2).sum(), np.full(3, q.mean()), constraints=constraints, tol=1e-12
    )
    np.testing.assert_allclose(isotonize(q[None], "soft", strength=2.0)[0], found.x, atol=1e-6)
    soft = isotonize(q[None], "soft", strength=1e-6)
    np.testing.assert_allclose(soft[0], np.sort(q), atol=1e-6)
    np.testing.assert_allclose(isotonize(q[None], "soft", strength=1e6)[0], q.mean(), atol=1e-5)


@pytest.mark.parametrize("how", ["pava", "sort", "minmax", "soft"])
def test_gradients_of_the_orders(how):
    q = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda v: isotonize(v, how), (q.requires_grad_(),))


def test_gradient_of_the_penalty_and_the_scores():
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    y = torch.randn(3, dtype=torch.float64, generator=generator)
    levels = np.arange(1, 6) / 6
    assert torch.autograd.gradcheck(lambda v: crossing_penalty(v, 0.1), (q,))
    assert torch.autograd.gradcheck(lambda v: pinball(v, y, levels), (q,))
    assert torch.autograd.gradcheck(lambda v: wis(v, y, levels), (q,))


def test_tensors_keep_their_kind_and_blocks_do_not_matter(monkeypatch):
    q = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    assert isotonize(q).dtype == torch.float32
    assert isinstance(isotonize(q.numpy()), np.ndarray)
    whole = isotonize(q)
    monkeypatch.setattr("workbench.calibration.quantiles._CELLS", 200)
    assert torch.equal(isotonize(q), whole)


# conformal


def hand_cqr(qc, yc, q, levels):
    out, n = q.copy(), len(yc)
    for i in range(q.shape[1] // 2):
        ends = zip(qc[:, i], qc[:, -1 - i], yc, strict=True)
        scores = sorted(max(low - t, t - high) for low, high, t in ends)
        shift = scores[int(np.ceil(round((1 - 2 * levels[i]) * (n + 1), 9))) - 1]
        out[:, i] -= shift
        out[:, -1 - i] += shift
    return out


def test_cqr_equals_the_definition(data):
    q, y = data
    expected = hand_cqr(q[:40], y[:40], q[40:], LEVELS)
    np.testing.assert_allclose(cqr(q[:40], y[:40], q[40:], LEVELS), expected)


def test_cqr_covers_whatever_the_predictions_are():
    rng = np.random.default_rng(0)
    levels, inside = np.array([0.1, 0.5, 0.9]), []
    for _ in range(400):
        y = rng.normal(size=80)
        q = np.tile([-0.1, 0.0, 0.1], (80, 1))  # far too narrow
        low, _, high = cqr(q[:39], y[:39], q[39:], levels).T
        inside.append(((low <= y[39:]) & (y[39:] <= high)).mean())
    # ceil(0.8 * 40) = 32 of 39 scores: expected coverage is exactly 32 / 40
    assert np.mean(inside) == pytest.approx(0.8, abs=4 * np.std(inside) / 20)


def test_cv_plus_equals_the_definition():
    rng = np.random.default_rng(3)
    n, folds, new = 23, 3, 4
    levels = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
    q = np.sort(rng.normal(size=(n, 5)), 1)
    y, fold = rng.normal(size=n), rng.integers(0, folds, n)
    q_folds = np.sort(rng.normal(size=(folds, new, 5)), 2)
    found = cv_plus(q, y, fold, q_folds, levels)
    for i, u in enumerate(levels[:2]):
        score = np.maximum(q[:, i] - y, y - q[:, -1 - i])
        rank = int(np.ceil(round((1 - 2 * u) * (n + 1), 9)))
        for x in range(new):
            lows = np.sort([q_folds[fold[j], x, i] - score[j] for j in range(n)])
            highs = np.sort([q_folds[fold[j], x, -1 - i] + score[j] for j in range(n)])
            assert found[x, i] == pytest.approx(lows[n - rank])  # floor(alpha (n + 1))-th
            assert found[x, -1 - i] == pytest.approx(highs[rank - 1])
    np.testing.assert_allclose(found[:, 2], q_folds[:, :, 2].mean(0))


def test_cv_plus_with_one_fold_is_cqr(data):
    q, y = data
    same = cv_plus(q[:40], y[:40], np.zeros(40, int), q[None, 40:], LEVELS)
    np.testing.assert_allclose(same, cqr(q[:40], y[:40], q[40:], LEVELS))


# bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, y: pinball(q, y[:5], LEVELS), "q and y: expected the same number"),
        (lambda q, y: pinball(q, y, LEVELS[::-1]), "levels: expected rising"),
        (lambda q, y: pinball(q, y, LEVELS[1:]), "levels: expected 19"),
        (lambda q, y: wis(q, y, LEVELS**2), "levels: expected symmetric"),
        (lambda q, y: wis(q * np.nan, y, LEVELS), "q: row 0"),
        (lambda q, y: isotonize(q, "up"), "how: expected one of"),
        (lambda q, y: isotonize(q, "soft", strength=0), "strength"),
        (lambda q, y: isotonize(q[0]), "q: expected 2"),
        (lambda q, y: crossing_penalty(q, [1.0, 2.0]), "margin: expected a number or 19"),
        (lambda q, y: crossing_penalty(q[:, :1]), "q: has one column"),
        (lambda q, y: cqr(q[:5], y[:5], q, LEVELS), "q_calibration: 5 rows are too few"),
        (lambda q, y: cqr(q, y, q[:, 1:], LEVELS), "q: expected 19 columns"),
        (lambda q, y: cv_plus(q, y, np.zeros(60), q[None, :, 1:], LEVELS), "q_folds: expected 19"),
        (lambda q, y: cv_plus(q, y, np.ones(60), q[None], LEVELS), "fold: row 0"),
    ],
)
def test_bad_input_is_named(data, call, message):
    with pytest.raises(ValueError, match=message):
        call(*data)
