"""Statistics collected at many temperatures against the same measures taken directly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from workbench.calibration import measures, prebinned
from workbench.calibration.bins import bin_statistics, equal_width_edges, top_label


def predictions(n=3000, k=5, seed=0, sharpness=5.0):
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.normal(size=(n, k))
    truth = softmax(0.5 * logits, axis=1)
    labels = (truth.cumsum(1) < rng.random((n, 1))).sum(1).clip(0, k - 1)
    return logits, labels


@pytest.fixture(scope="module")
def collected():
    logits, labels = predictions()
    return logits, labels, prebinned.collect(logits, labels)


def test_the_grid_runs_from_an_eighth_to_eight(collected):
    table = collected[2]
    assert np.allclose(table.temperatures, prebinned.TEMPERATURES)
    assert (table.temperatures[0], table.temperatures[48], table.temperatures[-1]) == (0.125, 1, 8)
    assert table.nearest(1.02) == 48
    assert table.n == 3000


@pytest.mark.parametrize("index", [0, 13, 48, 60, 96])
@pytest.mark.parametrize("bins", [5, 15, 100])
def test_equal_width_bins_are_exact(collected, index, bins):
    logits, labels, table = collected
    probs = softmax(logits / table.temperatures[index], axis=1)
    top = top_label(probs, labels)
    direct = bin_statistics(top.confidence, top.correct, equal_width_edges(bins))
    stats = table.bins(index, bins)
    # Single precision may put a confidence that lies on an edge, to 7 digits, on its other side.
    on_edge = np.abs(top.confidence[:, None] - direct.edges[1:-1]).min(1) < 2e-7
    assert np.abs(stats.count - direct.count).sum() <= 2 * on_edge.sum()
    assert np.allclose(stats.total, direct.total, rtol=1e-5, atol=1.001 * on_edge.sum())
    assert np.allclose(stats.square, direct.square, rtol=1e-4, atol=1.001 * on_edge.sum())
    assert np.allclose(stats.edges, direct.edges)


@pytest.mark.parametrize("index", [0, 48, 96])
def test_scores_and_their_errors_are_exact(collected, index):
    logits, labels, table = collected
    probs = softmax(logits / table.temperatures[index], axis=1)
    for name, rows in (("nll", measures.row_nll), ("brier", measures.row_brier)):
        values = rows(probs, labels)
        mean, error = getattr(table, name)[index]
        assert mean == pytest.approx(values.mean(), rel=1e-5)
        assert error == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)), rel=1e-4)


@pytest.mark.parametrize("index", [20, 48, 70])
@pytest.mark.parametrize("bins", [5, 15, 50])
def test_equal_mass_bins_keep_the_stated_bound(collected, index, bins):
    logits, labels, table = collected
    probs = softmax(logits / table.temperatures[index], axis=1)
    stats = table.bins(index, bins, "equal-mass")
    found = float(measures.gap_error(stats.count, stats.total))
    bound = table.snapped(index, bins)
    assert abs(found - measures.aece(probs, labels, bins=bins)) <= bound
    assert abs(found - measures.aece(probs, labels, bins=bins)) < 2e-3
    assert stats.n == len(labels)


def test_the_adaptive_scheme_keeps_accuracy_rising(collected):
    logits, labels, table = collected
    stats = table.bins(48, 15, "adaptive")
    assert (np.diff(stats.accuracy) >= 0).all()
    direct = measures.ece(softmax(logits, axis=1), labels, scheme="adaptive")
    found = float(measures.gap_error(stats.count, stats.total))
    assert found == pytest.approx(direct, abs=2e-3)


@given(st.lists(st.floats(1e-12, 1), min_size=1, max_size=50))
@settings(max_examples=60, deadline=None)
def test_every_confidence_lies_in_its_cell(rest):
    rest = np.array(rest, np.float32)
    confidence = 1 / (1 + rest)
    index = prebinned.cell_index(confidence, rest * confidence)
    exact = rest.astype(float) / (1 + rest.astype(float))
    expected = (
        prebinned.CELLS - 1 - np.searchsorted(1 - prebinned.EDGES[1:-1][::-1], exact, "right")
    )
    assert (np.abs(index - expected) <= 1).all()  # float32 confidences may sit on an edge
    assert ((index >= 0) & (index < prebinned.CELLS)).all()


def test_one_temperature_alone_and_blocks_of_rows():
    logits, labels = predictions(40_000, 3)
    calls = []
    table = prebinned.collect(logits, labels, octaves=0, progress=lambda: calls.append(1))
    assert table.temperatures.tolist() == [1.0]
    assert len(calls) == prebinned.blocks(len(labels)) > 1
    stats = table.bins(0, 15)
    assert float(measures.gap_error(stats.count, stats.total)) == pytest.approx(
        measures.ece(softmax(logits, axis=1), labels), abs=1e-6
    )


def test_extreme_logits_stay_finite():
    logits = np.array([[1e6, 0.0], [0.0, 1e6], [3.0, 3.0]])
    table = prebinned.collect(logits, np.array([1, 1, 1]))
    assert np.isfinite(table.nll).all()
    assert table.count.sum(axis=(1, 2)).tolist() == [3] * 97


def test_bins_that_do_not_fit_the_cells_are_refused(collected):
    for bins in (7, 120):
        with pytest.raises(ValueError, match="bins: expected a divisor"):
            collected[2].bins(0, bins)
    with pytest.raises(ValueError, match="scheme"):
        collected[2].bins(0, 15, "width")
