"""The reliability explorer and the benchmark's: Python against JavaScript, files, large tables."""

import json
import time

import js
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax

from workbench.calibration import measures
from workbench.calibration.calib_benchmark import Predictions, rank_correlations
from workbench.calibration.figures import BY_HAND, METHODS, explore, read_predictions
from workbench.calibration.figures_benchmark import explore_benchmark
from workbench.plots.export import plain


def agree(python, javascript, tol=1e-9):
    """Whether a value of either face is the same; null is NaN."""
    if isinstance(javascript, str):
        return python == javascript
    if javascript and isinstance(javascript, list) and isinstance(javascript[0], str):
        return list(python) == javascript
    a = np.array(plain(python, 17), dtype=float)
    b = np.array(javascript, dtype=float)
    return a.shape == b.shape and np.allclose(a, b, atol=tol, equal_nan=True)


def predictions(n=400, k=4, seed=0):
    rng = np.random.default_rng(seed)
    logits = 4 * rng.normal(size=(n, k))
    truth = softmax(0.6 * logits + 0.2 * np.arange(k), axis=1)
    labels = (truth.cumsum(1) < rng.random((n, 1))).sum(1).clip(0, k - 1)
    return logits, labels


LOGITS, LABELS = predictions()
STATE = {
    "temperature": 1.0, "recalibrator": BY_HAND, "bins": 15, "scheme": "equal-width", "norm": "l1",
}  # fmt: skip


# ---- the reliability explorer


def test_the_exported_formula_equals_python_at_every_control():
    explorer = explore(LOGITS, LABELS)
    states = [
        STATE | {"temperature": t, "recalibrator": method, "bins": b, "scheme": s, "norm": norm}
        for t, b in ((0.125, 5), (1.0, 15), (1.7, 100), (8.0, 25))
        for method in METHODS
        for s in ("equal-width", "equal-mass", "adaptive")
        for norm in ("l1", "l2", "max")
    ]
    for state, found in zip(states, js.formula(explorer, states), strict=True):
        expected = explorer.result(**state)
        assert set(explorer.keys()) <= set(found)
        for key, value in found.items():
            assert agree(expected[key], value), (state, key)


def test_the_readouts_are_the_measures():
    explorer = explore(LOGITS[:200], LABELS[:200], calibration=(LOGITS[200:], LABELS[200:]))
    found = explorer.result(temperature=2.0, bins=10, norm="l1")
    probs = softmax(LOGITS[:200] / 2, axis=1)
    assert found["error"] == pytest.approx(measures.ece(probs, LABELS[:200], bins=10))
    assert found["nll"] == pytest.approx(measures.nll(probs, LABELS[:200]))
    assert found["brier"] == pytest.approx(measures.brier(probs, LABELS[:200]))
    assert found["overconfidence"] == pytest.approx(measures.oe(probs, LABELS[:200], bins=10))
    mass = explorer.result(temperature=2.0, scheme="equal-mass", norm="max")
    assert mass["error"] == pytest.approx(
        measures.mce(probs, LABELS[:200], bins=15, scheme="equal-mass")
    )
    assert found["error_low"] <= found["error_high"]
    assert np.nansum(found["share"]) == pytest.approx(1)


def test_a_recalibrator_is_fitted_on_other_rows_than_it_is_measured_on():
    logits, labels = predictions(100, 3)
    shuffled = np.random.default_rng(9).permutation(labels)
    # Isotonic maps learn labels by heart: were they measured on the same rows, ECE would be tiny.
    error = explore(logits, shuffled).result(recalibrator="isotonic", bins=5)["error"]
    assert error > 0.03
    stated = explore(logits, labels).about
    assert "measured on 50 rows, fitted on the other 50" in stated


def test_temperature_as_a_recalibrator_reports_the_fitted_one():
    found = explore(LOGITS, LABELS).result(recalibrator="temperature")
    by_hand = explore(LOGITS, LABELS).result(temperature=found["in_force"])
    assert found["nll"] == pytest.approx(by_hand["nll"], rel=1e-6)
    assert np.isnan(explore(LOGITS, LABELS).result(recalibrator="isotonic")["in_force"])


def test_probabilities_tensors_and_frames_give_the_same_explorer():
    expected = explore(LOGITS, LABELS).result()
    for values in (
        softmax(LOGITS, axis=1),
        torch.tensor(LOGITS),
        pd.DataFrame(LOGITS),
        softmax(LOGITS, axis=1).tolist(),
    ):
        found = explore(values, LABELS).result()
        assert found["error"] == pytest.approx(expected["error"], abs=1e-9)
        assert found["nll"] == pytest.approx(expected["nll"], abs=1e-9)


def test_state_is_set_printed_and_restored(capsys):
    explorer = explore(LOGITS, LABELS, temperature=2.0, bins=25)
    assert (explorer.state["temperature"], explorer.state["bins"]) == (2.0, 25)
    line = explorer.restore()
    assert line in capsys.readouterr().out
    again = eval(line, {"calibration": __import__("workbench").calibration,
                        "predictions": LOGITS, "labels": LABELS})  # fmt: skip
    assert again.state == explorer.state
    with pytest.raises(ValueError, match="bins"):
        explore(LOGITS, LABELS, bins=16)


def test_static_and_exported_faces_are_made_and_small():
    import matplotlib.pyplot as plt

    explorer = explore(*predictions(6000, 10))
    figure = explorer.figure(temperature=2.0)
    assert len(figure.axes) == 2
    plt.close(figure)
    exported = json.dumps(explorer.export())
    assert len(exported) < 300_000
    assert "formula" in explorer.export()


# ---- a large table


def test_a_large_table_answers_from_collected_statistics():
    logits, labels = predictions(220_000, 5)
    explorer = explore(logits, labels)
    small = explore(logits[:2000], labels[:2000])  # warm up
    small.result()
    explorer.result()
    slowest = 0.0
    for t in explorer.control("temperature").values[::8]:
        for scheme in ("equal-width", "equal-mass", "adaptive"):
            start = time.process_time()
            explorer.result(temperature=t, scheme=scheme, recalibrator=BY_HAND)
            slowest = max(slowest, time.process_time() - start)
    assert slowest < 0.05
    found = explorer.result(temperature=2.0)
    assert found["in_force"] == 2.0
    order = np.random.default_rng(0).permutation(len(labels))[110_000:]
    probs = softmax(logits[order] / 2.0, axis=1)
    assert found["error"] == pytest.approx(measures.ece(probs, labels[order]), abs=2e-5)
    assert found["nll"] == pytest.approx(measures.nll(probs, labels[order]), rel=1e-5)
    assert explorer.result(temperature=1.98)["in_force"] == 2.0  # the nearest collected one
    recalibrated = explorer.result(recalibrator="vector")
    assert recalibrated["error"] < explorer.result()["error"]


# ---- a user's files


def frame_of(probs, labels, prefix="prob_"):
    columns = {f"{prefix}{j}": probs[:, j] for j in range(probs.shape[1])}
    return pd.DataFrame({**columns, "label": labels})


@pytest.mark.parametrize("kind", ["csv", "tsv", "npz", "parquet"])
def test_files_are_read(tmp_path, kind):
    probs = softmax(LOGITS, axis=1)
    path, frame = tmp_path / f"mine.{kind}", frame_of(probs, LABELS)
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "tsv":
        frame.to_csv(path, index=False, sep="\t")
    elif kind == "parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    else:
        np.savez(path, probs=probs, labels=LABELS)
    for given in (path, str(path)):
        scores, labels = read_predictions(given)
        assert np.allclose(softmax(scores, axis=1), probs)
        assert np.array_equal(labels, LABELS)
    assert explore(path).restore().startswith(f"calibration.explore({str(path)!r}, temperature=1")
    assert explore(path).result()["error"] == pytest.approx(
        explore(LOGITS, LABELS).result()["error"], abs=1e-9
    )


def test_columns_are_found_by_name_and_class_names_understood():
    frame = pd.DataFrame(LOGITS, columns=["cat", "dog", "fox", "owl"])
    frame["truth"] = np.array(["cat", "dog", "fox", "owl"])[LABELS]
    scores, labels = read_predictions(frame, "truth")
    assert np.array_equal(scores, LOGITS)
    assert np.array_equal(labels, LABELS)
    prefixed = frame_of(LOGITS, LABELS, "logit_").assign(id=7, prob_x=0.5)
    assert np.array_equal(read_predictions(prefixed)[0], LOGITS)
    with pytest.raises(ValueError, match="'wolf' names no score column"):
        read_predictions(frame.assign(truth="wolf"), "truth")
    with pytest.raises(ValueError, match="expected one column named"):
        read_predictions(frame)
    with pytest.raises(ValueError, match="no column 'y'"):
        read_predictions(frame, "y")


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="labels: missing"):
        explore(LOGITS)
    with pytest.raises(ValueError, match="row 3"):
        explore(np.where(np.arange(400)[:, None] == 3, np.nan, LOGITS), LABELS)
    with pytest.raises(ValueError, match="same number of rows"):
        explore(LOGITS, LABELS[:-1])
    with pytest.raises(ValueError, match="calibration: has 3 classes; expected 4"):
        explore(LOGITS, LABELS, calibration=(LOGITS[:, :3], LABELS % 3))
    with pytest.raises(ValueError, match="has one row"):
        explore(LOGITS[:1], LABELS[:1])
    with pytest.raises(FileNotFoundError, match="no such file"):
        explore("nowhere.csv")


# ---- the benchmark explorer


def networks(m=6):
    found = {}
    for i in range(m):
        logits, labels = predictions(240, 3, seed=i)
        scale = 0.5 + i / 4
        found[f"net <{i}>"] = Predictions(
            scale * logits[:120], labels[:120], scale * logits[120:], labels[120:]
        )
    return found


def test_the_benchmark_explorer_is_the_same_in_javascript():
    explorer = explore_benchmark(networks())
    states = [
        {"x_bins": a, "x_stage": s, "y_bins": b, "y_stage": t, "network": f"net <{i}>"}
        for i, (a, s, b, t) in enumerate(
            [(5, "before", 500, "before"), (15, "before", 15, "after"), (100, "after", 5, "after")]
        )
    ]
    for state, found in zip(states, js.formula(explorer, states), strict=True):
        expected = explorer.result(**state)
        assert set(explorer.keys()) <= set(found)
        for key, value in found.items():
            assert agree(expected[key], value, 1e-8), (state, key)


def test_the_benchmark_explorer_shows_the_studys_numbers():
    from workbench.calibration.calib_benchmark import metric_table

    models = networks()
    table = metric_table(models)
    found = explore_benchmark(models).result(x_bins=15, y_bins=15)
    assert np.allclose(found["x"], table["pre_ece_15"])
    assert np.allclose(found["y"], table["post_ece_15"])
    tau = rank_correlations(table[["pre_ece_15", "post_ece_15"]]).iloc[0, 1]
    assert found["tau"] == pytest.approx(tau)
    with pytest.raises(ValueError, match="at least two"):
        explore_benchmark({})
