"""Measures of calibration: card values, direct formulas, invariances, peers, bad input."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from workbench.calibration import measures as m
from workbench.calibration.bins import (
    bin_index,
    bin_statistics,
    equal_mass_edges,
    equal_width_edges,
    sweep_edges,
    top_label,
)

# Five binary predictions worked by hand.
CONFIDENCE = np.array([0.95, 0.85, 0.75, 0.65, 0.55])
CORRECT = np.array([1, 1, 0, 1, 0])
FIVE = np.stack([CONFIDENCE, 1 - CONFIDENCE], axis=1), 1 - CORRECT


def predictions(n=400, k=4, seed=0, sharpness=2.0):
    """Random predictions whose labels follow a softened version of them."""
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.normal(size=(n, k))
    truth = softmax(0.7 * logits, axis=1)
    labels = (truth.cumsum(1) < rng.random((n, 1))).sum(1).clip(0, k - 1)
    return softmax(logits, axis=1), labels


seeds = st.integers(0, 10_000)


@pytest.mark.parametrize(
    ("bins", "expected"), [(1, 0.15), (2, 0.15), (5, 0.23), (10, 0.37), (100, 0.37)]
)
def test_ece_of_five_predictions(bins, expected):
    assert m.ece(*FIVE, bins=bins) == pytest.approx(expected)


def test_mce_and_ks_of_five_predictions():
    assert m.mce(*FIVE, bins=10) == pytest.approx(0.75)
    assert m.ks_error(*FIVE) == pytest.approx(0.19)


@pytest.mark.parametrize(
    ("bins", "expected"), [(5, 0.023), (15, 0.038), (100, 0.098), (500, 0.206)]
)
def test_ece_of_a_calibrated_model_is_pure_bias_and_grows_with_the_bins(bins, expected):
    rng = np.random.default_rng(1)
    found = []
    for _ in range(100):
        confidence = rng.random(1000)
        stats = bin_statistics(confidence, rng.random(1000) < confidence, equal_width_edges(bins))
        found.append(float(m.gap_error(stats.count, stats.total)))
    assert np.mean(found) == pytest.approx(expected, abs=0.002)


def test_debiasing_halves_that_bias():
    rng = np.random.default_rng(2)
    plain, debiased = [], []
    for _ in range(100):
        confidence = rng.random(1000)
        correct = rng.random(1000) < np.clip(confidence - 0.05, 0, 1)
        stats = bin_statistics(confidence, correct, equal_width_edges(15))
        plain.append(float(m.gap_error(stats.count, stats.total)))
        debiased.append(m.debiased_error(stats))
    truth = 0.04875  # E min(c, 0.05)
    assert abs(np.mean(debiased) - truth) < 0.55 * abs(np.mean(plain) - truth)


def test_debiased_squared_error_is_unbiased():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(400):
        confidence = np.full(200, 0.7)
        stats = bin_statistics(confidence, rng.random(200) < 0.6, equal_width_edges(10))
        gap, n = stats.gap[~np.isnan(stats.gap)], stats.n
        accuracy = 0.7 + gap
        found.append(float((gap**2 - accuracy * (1 - accuracy) / (n - 1))[0]))
    assert np.mean(found) == pytest.approx(0.01, abs=0.0015)


@pytest.mark.parametrize(("norm", "ours"), [("l1", "l1"), ("l2", "l2"), ("max", "max")])
@pytest.mark.parametrize("bins", [5, 15, 40])
def test_ece_equals_torchmetrics(norm, ours, bins):
    from torchmetrics.functional.classification import multiclass_calibration_error as peer

    probs, labels = predictions(k=6)
    theirs = peer(torch.tensor(probs), torch.tensor(labels), num_classes=6, n_bins=bins, norm=norm)
    assert m.ece(probs, labels, bins=bins, norm=ours) == pytest.approx(float(theirs), abs=1e-6)


@given(seeds, st.integers(1, 40), st.integers(2, 6), st.sampled_from(["float32", "float64"]))
@settings(max_examples=30, deadline=None)
def test_ece_equals_a_loop_over_right_closed_bins(seed, bins, k, dtype):
    probs, labels = predictions(60, k, seed)
    probs = np.floor(probs * 100) / 100
    probs[:, 0] = np.maximum(1 - probs[:, 1:].sum(1), 0)
    probs = probs.astype(dtype)
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    edges = np.linspace(0, 1, bins + 1).astype(dtype)
    expected = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = correct[inside].mean() - confidence[inside].astype(float).mean()
            expected += inside.mean() * abs(gap)
    assert m.ece(probs, labels, bins=bins) == pytest.approx(expected, abs=1e-12)


def test_bins_are_closed_on_the_right_in_every_precision():
    for dtype in (np.float32, np.float64):
        values = np.array([0.0, 0.1, 0.3, 0.30001, 0.7, 1.0], dtype)
        assert bin_index(values, equal_width_edges(10)).tolist() == [0, 0, 2, 3, 6, 9]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bins", [1, 3, 10, 15, 77, 500])
def test_long_arrays_are_binned_as_short_ones(dtype, bins):
    edges = equal_width_edges(bins)
    rng = np.random.default_rng(0)
    on_edges = np.concatenate([np.nextafter(edges.astype(dtype), dtype(s)) for s in (0, 1)])
    values = np.concatenate([rng.random(9000), edges, on_edges]).astype(dtype)
    expected = np.concatenate([bin_index(part, edges) for part in np.array_split(values, 9)])
    assert np.array_equal(bin_index(values, edges), expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_equal_mass_bins_differ_by_no_more_than_the_ties(values, bins):
    values = np.array(values)
    edges = equal_mass_edges(values, bins)
    counts = np.bincount(bin_index(values, edges), minlength=len(edges) - 1)
    largest_tie = np.unique(values, return_counts=True)[1].max()
    assert (counts > 0).all()
    assert len(counts) <= bins
    if largest_tie == 1:
        assert counts.max() - counts.min() <= 1 or len(counts) < bins
    assert counts.max() <= -(-len(values) // bins) + largest_tie


def test_the_adaptive_scheme_stops_where_accuracy_would_fall():
    probs, labels = predictions(2000)
    top = top_label(probs, labels)
    edges = sweep_edges(top.confidence, top.correct)
    stats = bin_statistics(top.confidence, top.correct, edges)
    assert (np.diff(stats.accuracy) >= 0).all()
    finer = equal_mass_edges(top.confidence, len(edges))
    broken = bin_statistics(top.confidence, top.correct, finer)
    assert (np.diff(broken.accuracy) < 0).any()


def test_classwise_and_top_label_ece_equal_loops_over_classes():
    probs, labels = predictions(300, 3)

    def binned(p, hit):
        index = np.ceil(p * 15).astype(int)
        return sum(abs((hit - p)[index == b].sum()) for b in range(1, 16)) / len(labels)

    classwise = np.mean([binned(probs[:, c], labels == c) for c in range(3)])
    assert m.classwise_ece(probs, labels) == pytest.approx(classwise)
    top, predicted = probs.max(1), probs.argmax(1)
    within = sum(
        abs(((predicted == labels) - top)[(predicted == c) & (np.ceil(top * 15) == b)].sum())
        for c in range(3)
        for b in range(1, 16)
    )
    assert m.top_label_ece(probs, labels) == pytest.approx(within / len(labels))


def test_overconfidence_error_ignores_underconfidence():
    probs, _ = predictions(200, 3)
    assert m.oe(probs, probs.argmax(1)) == 0
    wrong = probs.argmin(1)
    c = probs.max(1)
    index = np.ceil(c * 15)
    expected = sum((index == b).mean() * c[index == b].mean() ** 2 for b in np.unique(index))
    assert m.oe(probs, wrong) == pytest.approx(expected)


@given(seeds, st.sampled_from([0.4, 0.05, 0.001]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_mmce_equals_the_double_sum(seed, width, tied):
    probs, labels = predictions(120, 3, seed)
    probs = (probs.round(1) + 0.01) / 1.03 if tied else probs
    probs = probs / probs.sum(1, keepdims=True)
    c = probs.max(1)
    r = (probs.argmax(1) == labels) - c
    kernel = np.exp(-np.abs(c[:, None] - c) / width)
    expected = np.sqrt(r @ kernel @ r) / len(c)
    assert m.mmce(probs, labels, width=width) == pytest.approx(expected, abs=1e-10)


def test_mmce_has_the_gradient_of_finite_differences():
    probs, labels = predictions(20, 3)
    logits = torch.tensor(np.log(probs), requires_grad=True)
    labels = torch.tensor(labels)
    assert torch.autograd.gradcheck(lambda z: m.mmce(z.softmax(1), labels), logits)
    assert torch.autograd.gradcheck(lambda z: m.nll(z.softmax(1), labels), logits)
    assert torch.autograd.gradcheck(lambda z: m.brier(z.softmax(1), labels), logits)
    assert m.mmce(logits.softmax(1), labels).item() == pytest.approx(
        m.mmce(probs, labels.numpy()), abs=1e-9
    )


def test_smooth_ece_is_the_fixed_point_of_the_reflected_gaussian():
    probs, labels = predictions(60, 3)
    c = probs.max(1)
    r = (probs.argmax(1) == labels) - c
    found = m.smooth_ece(probs, labels)

    def smoothed(t):
        images = np.concatenate([s * c + 2 * k for k in (-2, -1, 0, 1, 2) for s in (1, -1)])
        weights = np.exp(-0.5 * ((t - images) / found) ** 2) / (found * np.sqrt(2 * np.pi))
        return abs(weights @ np.tile(r, 10)) / len(c)

    integral = quad(smoothed, 0, 1, limit=400, epsabs=1e-7)[0]
    assert integral == pytest.approx(found, abs=1e-5)


def test_smooth_ece_lies_within_the_paper_bounds_of_binned_error():
    # ECE with B bins + 1/B bounds the distance to calibration from above, smECE is below twice it.
    for seed in range(5):
        probs, labels = predictions(2000, 3, seed)
        assert m.smooth_ece(probs, labels) <= 2 * (m.ece(probs, labels, bins=20) + 1 / 20)


def test_kde_ece_equals_direct_kernel_sums():
    probs, labels = predictions(150, 3)
    c, a = probs.max(1), (probs.argmax(1) == labels).astype(float)
    width = 3 * c[a > 0].std() * (2 * len(c)) ** -0.2
    x = (np.arange(4000) + 0.5) / 4000

    def density(weights):
        total = np.zeros_like(x)
        for image in (c, -c, 2 - c):
            u = (x[:, None] - image) / width
            total += np.maximum(1 - u**2, 0) ** 3 @ weights
        return total

    everything, right = density(np.ones_like(c)), density(a)
    share = np.minimum(right / np.maximum(everything, 1e-300), 1)
    expected = (np.abs(x - share) * everything).sum() / everything.sum()
    assert m.kde_ece(probs, labels) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("name", list(m.MEASURES))
def test_no_measure_depends_on_the_order_of_rows(name):
    probs, labels = predictions(200, 3)
    probs = probs.round(1) + 0.05
    probs = probs / probs.sum(1, keepdims=True)
    order = np.random.default_rng(0).permutation(len(labels))
    measure = m.MEASURES[name]
    assert measure(probs, labels) == pytest.approx(measure(probs[order], labels[order]), abs=1e-12)


@pytest.mark.parametrize("name", list(m.MEASURES))
def test_every_measure_takes_arrays_tensors_and_frames(name):
    probs, labels = predictions(80, 3)
    measure = m.MEASURES[name]
    expected = measure(probs, labels)
    assert isinstance(expected, float)
    assert measure(torch.tensor(probs), torch.tensor(labels)) == pytest.approx(expected)
    assert measure(pd.DataFrame(probs), pd.Series(labels)) == pytest.approx(expected)
    assert measure(probs.tolist(), labels.tolist()) == pytest.approx(expected)
    assert measure(probs.astype(np.float32), labels) == pytest.approx(expected, abs=1e-4)
    assert measure(torch.tensor(probs).half(), labels) == pytest.approx(expected, abs=2e-2)


@pytest.mark.parametrize("name", list(m.MEASURES))
def test_certain_and_right_predictions_have_no_error(name):
    probs = np.eye(3)[[0, 1, 2, 0]]
    expected = {"smooth_ece": 1e-6, "kde_ece": 1e-3}.get(name, 1e-12)  # these two smooth
    assert m.MEASURES[name](probs, [0, 1, 2, 0]) == pytest.approx(0, abs=expected)


def test_proper_scores_equal_scikit_learn():
    probs, labels = predictions(300, 5)
    assert m.nll(probs, labels) == pytest.approx(log_loss(labels, probs))
    assert m.brier(probs, labels) == pytest.approx(
        sum(brier_score_loss(labels == c, probs[:, c]) for c in range(5))
    )


@given(seeds, st.integers(1, 30), st.sampled_from(["equal-width", "equal-mass"]))
@settings(max_examples=25, deadline=None)
def test_the_parts_of_the_brier_score_add_up(seed, bins, scheme):
    probs, labels = predictions(100, 4, seed)
    parts = m.brier_decomposition(probs, labels, bins=bins, scheme=scheme)
    assert parts.brier == pytest.approx(m.brier(probs, labels), abs=1e-12)
    assert min(parts.reliability, parts.resolution, parts.within_variance) >= 0


def test_with_one_forecast_per_bin_murphys_three_parts_are_enough():
    probs = np.array([[0.25, 0.75], [0.25, 0.75], [0.65, 0.35], [0.65, 0.35]])
    parts = m.brier_decomposition(probs, [1, 0, 0, 0], bins=10)
    assert parts.within_variance == pytest.approx(0, abs=1e-15)
    assert parts.reliability == pytest.approx(2 * (0.5 * 0.25**2 + 0.5 * 0.35**2))
    assert parts.resolution == pytest.approx(2 * (0.5 * 0.25**2 + 0.5 * 0.25**2))
    assert parts.uncertainty == pytest.approx(2 * 0.25 * 0.75)


def test_ood_auroc_equals_scikit_learn_with_ties():
    inside, outside = predictions(90, 3)[0].round(1), predictions(60, 3, 1, 0.5)[0].round(1)
    inside[:, 0] = 1 - inside[:, 1:].sum(1)
    outside[:, 0] = 1 - outside[:, 1:].sum(1)
    truth = np.repeat([1, 0], [90, 60])
    expected = roc_auc_score(truth, np.concatenate([inside.max(1), outside.max(1)]))
    assert m.ood_auroc(inside, outside) == pytest.approx(expected)


def test_statistics_of_parts_add_up_to_those_of_the_whole():
    probs, labels = predictions(100, 3)
    top, edges = top_label(probs, labels), equal_width_edges(10)
    whole = bin_statistics(top.confidence, top.correct, edges)
    parts = [
        bin_statistics(top.confidence[i], top.correct[i], edges)
        for i in (slice(40), slice(40, None))
    ]
    for name in ("count", "total", "square"):
        assert np.allclose(getattr(parts[0] + parts[1], name), getattr(whole, name))
    coarse = whole.merge(np.arange(0, 10, 2))
    direct = bin_statistics(top.confidence, top.correct, equal_width_edges(5))
    assert np.allclose(coarse.count, direct.count)
    assert np.allclose(coarse.edges, direct.edges)


def test_the_input_is_neither_copied_nor_changed():
    probs, labels = predictions(5000, 10)
    before = probs.copy()
    for measure in m.MEASURES.values():
        measure(probs, labels)
    assert np.array_equal(probs, before)


PROBS, LABELS = predictions(6, 3)
BAD = {
    "row 2 sums": (np.where(np.arange(6)[:, None] == 2, PROBS * 1.1, PROBS), LABELS),
    "probs: row 4 holds": (np.where(np.arange(6)[:, None] == 4, np.nan, PROBS), LABELS),
    "probs: row 1 holds": (np.where(np.arange(6)[:, None] == 1, [[-0.5, 0.5, 1.0]], PROBS), LABELS),
    "labels: row 3 is 3": (PROBS, [0, 1, 2, 3, 0, 1]),
    "labels: row 0 is -1": (PROBS, [-1, 1, 2, 0, 0, 1]),
    "labels: row 5 is 0.5": (PROBS, [0, 1, 2, 0, 0, 0.5]),
    "same number of rows": (PROBS, LABELS[:5]),
    "probs: is empty": (np.empty((0, 3)), []),
    "probs: has one column": (np.ones((6, 1)), [0] * 6),
    "probs: expected 2 dimension": (PROBS[:, 0], LABELS),
}


@pytest.mark.parametrize("message", list(BAD))
@pytest.mark.parametrize("name", list(m.MEASURES))
def test_bad_input_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        m.MEASURES[name](*BAD[message])


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="bins"):
        m.ece(PROBS, LABELS, bins=0)
    with pytest.raises(ValueError, match="scheme"):
        m.ece(PROBS, LABELS, scheme="width")
    with pytest.raises(ValueError, match="norm"):
        m.ece(PROBS, LABELS, norm="linf")
    with pytest.raises(ValueError, match="norm"):
        m.ece(PROBS, LABELS, norm="max", debias=True)
    with pytest.raises(ValueError, match="width"):
        m.mmce(PROBS, LABELS, width=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_measures_take_tensors_on_the_gpu():
    probs, labels = predictions(100, 3)
    for measure in m.MEASURES.values():
        on_gpu = measure(torch.tensor(probs, device="cuda"), torch.tensor(labels, device="cuda"))
        assert on_gpu == pytest.approx(measure(probs, labels))
