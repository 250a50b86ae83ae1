"""The explorers of TempNet and of correctness: their formula in JavaScript against Python."""

import math
import time

import js
import numpy as np
import pytest

from workbench.calibration.figures_correctness import explore_pulls, explore_simplex
from workbench.calibration.figures_tempnet import explore_temperature


def predictions(n=30, k=7, seed=0):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, k))
    labels = np.where(rng.random(n) < 0.7, logits.argmax(1), rng.integers(0, k, n))
    return logits, labels


LOGITS, LABELS = predictions()
NAMES = ["a", "b", " ", "\n", "a", "<b>", "$x$"]
CASES = [
    (explore_temperature(), [{"row": r, "share": s} for r in (0, 2) for s in (0.05, 0.6, 0.98)]),
    (
        explore_temperature(LOGITS, NAMES, [f"t{i}" for i in range(30)]),
        [{"row": r, "share": s} for r in (0, 29) for s in (0.2, 0.75)],
    ),
    (
        explore_simplex(),
        [
            {"z0": 0.0, "z1": -0.2, "z2": -1.6, "label": y, "temperature": t}
            for y in (0, 1, 2)
            for t in (0.1, 1.0, 10.0)
        ],
    ),
    (explore_pulls(LOGITS, LABELS), [{"temperature": t} for t in (0.2, 1.0, 5.0)]),
]


@pytest.mark.parametrize("explorer, states", CASES, ids=lambda v: getattr(v, "name", ""))
def test_the_exported_formula_computes_what_python_computes(explorer, states):
    for state, found in zip(states, js.formula(explorer, states), strict=True):
        expected = explorer.result(**state)
        keys = explorer.keys()
        for key in keys:
            if key in state and key not in found:
                continue
            ours, theirs = np.asarray(expected[key]), np.asarray(found[key])
            assert ours.shape == theirs.shape, key
            if ours.dtype.kind in "OU":
                assert ours.tolist() == theirs.tolist(), key
            else:
                assert np.allclose(ours.astype(float), theirs, rtol=1e-7, atol=1e-9), key


@pytest.mark.parametrize("explorer, states", CASES, ids=lambda v: getattr(v, "name", ""))
def test_a_moved_slider_is_answered_within_fifty_milliseconds(explorer, states):
    explorer.result(**states[0])
    seconds = []
    for state in states:
        start = time.perf_counter()
        explorer.result(**state)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


def test_every_explorer_has_all_three_faces_headless():
    for explorer, states in CASES:
        assert explorer.figure(**states[0]).axes
        exported = explorer.export(**states[-1])
        assert exported["formula"] and set(exported["state"]) == set(explorer.state)


def test_the_budget_fixes_the_entropy():
    result = explore_temperature(LOGITS).result(row=3, share=0.6)
    assert result["entropy"] == pytest.approx(0.4 * math.log(7), abs=1e-8)
    assert result["names"][0] == f"class {LOGITS[3].argmax()}"


def test_names_stay_apart_and_visible():
    explorer = explore_temperature(LOGITS, NAMES)
    names = set(explorer.result(row=0, share=0.5)["names"])
    assert names == {"a", "a (2)", "b", "␣", "↵", "<b>", "$x$"}


def test_restored_state_and_user_data():
    explorer = explore_temperature(LOGITS, NAMES, row=4, share=0.5)
    assert explorer.state == {"row": 4, "share": 0.5}
    line = explorer.restoring(explorer.state)
    assert line.endswith("explore_temperature(logits, names, tokens, row=4, share=0.5)")
    made_up = explore_temperature()
    assert made_up.restoring({"row": 1}).endswith("explore_temperature(row=1)")
    single = explore_temperature(LOGITS[:1])
    assert single.result(row=1, share=0.5)["tau"] > 0


def test_large_inputs_stay_in_the_kernel():
    logits, labels = predictions(n=5000, k=10)
    pulls = explore_pulls(logits, labels)
    assert pulls.script is None
    result = pulls.result(temperature=1.0)
    assert result["mistakes"] == int((logits.argmax(1) != labels).sum())
    assert pulls.seconds < 0.05


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: explore_temperature(LOGITS, names=["a"]), "names"),
        (lambda: explore_temperature(LOGITS, tokens=["a"]), "tokens"),
        (lambda: explore_temperature(np.full((2, 3), np.nan)), "logits"),
        (lambda: explore_pulls(LOGITS, LABELS[:3]), "labels"),
        (lambda: explore_pulls(LOGITS, LABELS + 7), "labels"),
        (lambda: explore_simplex(label=4), "label"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
