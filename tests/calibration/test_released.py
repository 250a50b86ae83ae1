"""Released probabilities: what the loader accepts, refuses and says when they are not there."""

import numpy as np
import pytest

from workbench.calibration import released
from workbench.calibration.experiments import calib_benchmark as experiment
from workbench.lab import data


def folder_with(tmp_path, name="imdb", probs=None, labels=None):
    rng = np.random.default_rng(0)
    k = released.CLASSES[name]
    labels = rng.integers(0, k, 40).astype(np.uint16) if labels is None else labels
    if probs is None:
        probs = rng.dirichlet(np.ones(k), 40) + 1e-5
    for part, file, values in (
        ("cross_validated_predicted_probabilities", f"{name}_test_set_pyx.npy", probs),
        ("original_test_labels", f"{name}_test_set_original_labels.npy", labels),
    ):
        (tmp_path / part).mkdir(exist_ok=True)
        np.save(tmp_path / part / file, values, allow_pickle=True)
    return tmp_path


def test_rows_are_normalised_and_labels_become_class_indices(tmp_path):
    found = released.load("imdb", folder_with(tmp_path))
    assert np.allclose(found.probs.sum(1), 1, atol=1e-15)
    assert found.labels.dtype == np.int64


def test_nothing_is_unpickled(tmp_path):
    folder = folder_with(tmp_path, probs=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="imdb_test_set_pyx.npy: not a plain NumPy array"):
        released.load("imdb", folder)


def test_files_that_do_not_hold_what_they_should_are_named(tmp_path):
    with pytest.raises(ValueError, match="name: expected one of"):
        released.load("cifar100", tmp_path)
    with pytest.raises(ValueError, match="imdb: expected 2 classes, found 3"):
        released.load("imdb", folder_with(tmp_path, probs=np.full((40, 3), 1 / 3)))
    with pytest.raises(ValueError, match="imdb labels: row 0 is 5"):
        released.load("imdb", folder_with(tmp_path, labels=np.full(40, 5)))
    with pytest.raises(ValueError, match="same number of rows"):
        released.load("imdb", folder_with(tmp_path, labels=np.zeros(3, int)))


def test_without_the_files_the_error_says_how_to_fetch_them(monkeypatch, tmp_path):
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    monkeypatch.setattr(data.sources, "_folders", lambda: [tmp_path])
    assert not released.available()
    with pytest.raises(FileNotFoundError, match="workbench data get"):
        released.load("mnist")


def test_recalibrators_are_fitted_on_one_half_and_measured_on_the_other(monkeypatch):
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(0.3 * np.ones(3), 600)
    truth = probs**0.5 / (probs**0.5).sum(1, keepdims=True)
    labels = (truth.cumsum(1) < rng.random((600, 1))).sum(1).clip(0, 2)
    monkeypatch.setattr(experiment, "load", lambda name: released.Released(probs, labels))
    found = experiment.recalibrated_halves(0, dataset="any", recalibrators=("temperature",))
    assert found["ece_temperature"] < 0.5 * found["ece_none"]
    assert found == experiment.recalibrated_halves(0, dataset="any", recalibrators=("temperature",))
    assert found != experiment.recalibrated_halves(1, dataset="any", recalibrators=("temperature",))


@pytest.mark.skipif(not released.available(), reason="the released files are not on this machine")
@pytest.mark.parametrize(
    ("name", "rows", "accuracy"),
    [("cifar10", 10_000, 0.929), ("mnist", 10_000, 0.991), ("20news", 7532, 0.923),
     ("imdb", 25_000, 0.896)],
)  # fmt: skip
def test_the_released_sets_are_what_they_were(name, rows, accuracy):
    probs, labels = released.load(name)
    assert probs.shape == (rows, released.CLASSES[name])
    assert (probs.argmax(1) == labels).mean() == pytest.approx(accuracy, abs=1e-3)
