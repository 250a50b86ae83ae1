"""Bootstrap intervals: against resampling the rows one by one, and by their coverage."""

import numpy as np
import pytest
from scipy.special import softmax

from workbench.calibration import intervals, measures
from workbench.calibration.bins import bin_statistics, equal_width_edges
from workbench.calibration.intervals import closed_form, ece_interval, interval


def predictions(n, k=4, seed=0, truth=0.5):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, k))
    chances = softmax(truth * logits, axis=1)
    labels = (chances.cumsum(1) < rng.random((n, 1))).sum(1).clip(0, k - 1)
    return softmax(logits, axis=1), labels


@pytest.mark.parametrize("name", list(measures.MEASURES))
@pytest.mark.parametrize("n", [300, 3000])
def test_the_estimate_is_the_measure_and_the_interval_has_a_sensible_width(name, n):
    probs, labels = predictions(n)
    found = interval(name, probs, labels, n=200)
    assert found.value == pytest.approx(measures.MEASURES[name](probs, labels), abs=1e-12)
    assert 0 <= found.low < found.high < found.value + 1


@pytest.mark.parametrize("name", ["ece", "aece", "oe", "ks", "mmce", "kde_ece", "smooth_ece"])
def test_replicates_from_cells_vary_as_those_from_rows(name):
    probs, labels = predictions(150)
    rng = np.random.default_rng(1)
    direct = np.array([
        measures.MEASURES[name](probs[i], labels[i])
        for i in rng.integers(len(labels), size=(150, len(labels)))
    ])  # fmt: skip
    seen = []
    original = intervals._from_cells

    def keep(stats, statistic, n, tails, rng, **kwargs):
        seen.append(statistic(*stats.resample(n, rng, spread=kwargs.get("spread", True))))
        return original(stats, statistic, n, tails, rng, **kwargs)

    intervals._from_cells = keep
    try:
        interval(name, probs, labels, n=1500)
    finally:
        intervals._from_cells = original
    tolerance = 4 * direct.std() / np.sqrt(len(direct))
    # Equal-mass bins are drawn anew from resampled rows, and kept when cells are resampled.
    assert seen[0].mean() == pytest.approx(direct.mean(), abs=tolerance + 0.1 * direct.std())
    assert seen[0].std() == pytest.approx(direct.std(), rel=0.25)


def test_resampled_counts_and_sums_have_the_moments_of_drawing_rows():
    rng = np.random.default_rng(0)
    c = rng.beta(3, 1, 500)
    a = rng.random(500) < c
    stats = bin_statistics(c, a, equal_width_edges(4))
    count, total = stats.resample(40_000, rng)
    assert np.allclose(count.sum((1, 2)), 500)
    assert np.allclose(total.mean(0), stats.total, rtol=0.01, atol=0.02)
    indicator = np.stack(
        [(np.ceil(c * 4) - 1 == b) & (a == right) for b in range(4) for right in (False, True)]
    )
    rows = indicator * c  # one row of drawn sums is n times the mean of these
    expected = 500 * np.cov(rows, bias=True)
    assert np.allclose(np.cov(total.reshape(-1, 8).T), expected, atol=0.03 * expected.max())


@pytest.mark.parametrize("gap", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("method", ["bootstrap", "closed"])
def test_ece_intervals_cover_the_true_binned_error(gap, method):
    rng, edges = np.random.default_rng(5), equal_width_edges(15)

    def draw(n):
        c = 0.1 + 0.9 * rng.beta(3, 1.5, n)
        return c, rng.random(n) < np.clip(c - gap, 0, 1)

    c, _ = draw(1_000_000)
    index = np.searchsorted(edges[1:-1], c)
    truth = np.abs(np.bincount(index, np.clip(c - gap, 0, 1) - c)).sum() / len(c)
    hits, runs = 0, 150
    for _ in range(runs):
        stats = bin_statistics(*draw(1000), edges)
        if method == "closed":
            found = closed_form(stats)
        else:
            found = ece_interval(stats, n=300, random_state=rng)
        hits += found.low <= truth <= found.high
    assert hits / runs >= 0.9  # three standard errors below 95% is 0.90


@pytest.mark.parametrize("norm", ["l2", "max"])
def test_closed_intervals_of_other_norms_cover(norm):
    rng, edges = np.random.default_rng(6), equal_width_edges(5)
    truth, hits, runs = 0.08, 0, 150
    for _ in range(runs):
        c = 0.2 + 0.8 * rng.random(2000)
        found = closed_form(bin_statistics(c, rng.random(2000) < c - truth, edges), norm)
        hits += found.low <= truth <= found.high
    assert hits / runs >= 0.9


@pytest.mark.parametrize("name", ["nll", "brier"])
def test_intervals_of_mean_scores_are_the_normal_ones(name):
    probs, labels = predictions(4000)
    rows = {"nll": measures.row_nll, "brier": measures.row_brier}[name](probs, labels)
    reach = 1.96 * rows.std() / np.sqrt(len(rows))
    found = interval(name, probs, labels, n=2000)
    assert found.high - found.low == pytest.approx(2 * reach, rel=0.12)
    assert found.low < rows.mean() < found.high


def test_a_larger_table_has_a_narrower_interval_and_a_higher_level_a_wider_one():
    probs, labels = predictions(8000)
    wide, narrow = (interval("ece", probs[:n], labels[:n]) for n in (500, 8000))
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)
    sure = interval("ece", probs, labels, level=0.99)
    assert sure.high - sure.low > narrow.high - narrow.low


def test_any_callable_is_resampled_by_rows():
    probs, labels = predictions(200)

    def accuracy(p, y):
        return (p.argmax(1) == y).mean()

    found = interval(accuracy, probs, labels, n=400)
    share = accuracy(probs, labels)
    reach = 1.96 * np.sqrt(share * (1 - share) / 200)
    assert found.high - found.low == pytest.approx(2 * reach, rel=0.2)


def test_intervals_of_ood_auroc_and_settings_and_seeds():
    probs, labels = predictions(600)
    foreign = predictions(400, seed=1, truth=0.1)[0] * 0.5 + 0.125
    found = interval(measures.ood_auroc, probs, foreign)
    assert found.low < found.value < found.high
    assert interval("ece", probs, labels, bins=10).value == measures.ece(probs, labels, bins=10)
    assert interval("mce", probs, labels, random_state=3) == interval(
        "mce", probs, labels, random_state=3
    )
    assert interval(measures.ece, probs, labels, norm="l2", scheme="equal-mass").value > 0
    with pytest.raises(ValueError, match="measure"):
        interval("eec", probs, labels)
    with pytest.raises(TypeError, match="width"):
        interval("ece", probs, labels, width=3)
    with pytest.raises(ValueError, match="level"):
        interval("ece", probs, labels, level=1)
    with pytest.raises(ValueError, match="labels: row 0"):
        interval("ece", probs, labels + 9)
