"""Learning traces against closed forms, scipy's loop, brute force and hand-made levels."""

import json
import math
import time
from pathlib import Path

import js
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from workbench.lab.data import Function
from workbench.scaling_laws.experiments import learning_curve_taggers as taggers
from workbench.scaling_laws.experiments import learning_curve_traces as study
from workbench.scaling_laws.figures_learning_curve_traces import explore_traces, fan
from workbench.scaling_laws.learning_curve_traces import (
    Trace,
    fit_power,
    learning_trace,
    prediction_level,
    slowest_change,
    stop_level,
    working_level,
)
from workbench.scaling_laws.power_profile import EXPONENTS
from workbench.scaling_laws.tiny_lm import tiny_lm_grid

X = 5000.0 * np.arange(1, 21)


def noisy(m=3, n=20, sd=0.3, seed=0):
    rng = np.random.default_rng(seed)
    x = X[:n]
    drop, b, c = (rng.uniform(*r, (m, 1)) for r in ((5, 20), (0.2, 0.9), (80, 98)))
    return x, c - drop * (x / x[0]) ** -b + rng.normal(0, sd, (m, n))


def made(asymptotes, gaps=None, x=None):
    """A trace with given asymptotes, sizes 1, 2, 3, ... and remaining gains of 1."""
    c = np.asarray(asymptotes, float)
    x = np.arange(1.0, len(c) + 3) if x is None else np.asarray(x, float)
    gaps = np.ones_like(c) if gaps is None else np.asarray(gaps, float)
    coef = np.stack([gaps * x[2:], np.ones_like(c), c], axis=-1)
    return Trace(x, np.zeros_like(x), coef, np.zeros_like(c), 0)


# ---- fits


def test_a_noise_free_power_law_is_found_at_every_level():
    trace = learning_trace(X, 90 - 200 * X**-0.5)
    assert trace.coef.shape == (18, 3)
    np.testing.assert_allclose(trace.coef, np.tile([200, 0.5, 90], (18, 1)), rtol=1e-6)
    np.testing.assert_allclose(trace.gap, 200 * X[2:] ** -0.5, rtol=1e-6)
    assert trace.levels.tolist() == list(range(3, 21))


@settings(max_examples=15, deadline=None)
@given(st.floats(1, 1e3), st.floats(0.05, 5), st.floats(20, 100), st.floats(0.5, 2))
def test_exact_recovery_of_any_power_law(drop, b, c, stretch):
    x = stretch * np.geomspace(1, 30, 12)
    a, found, ceiling = fit_power(x, c - drop * (x / stretch) ** -b)
    assert found == pytest.approx(b, rel=1e-5)
    assert ceiling == pytest.approx(c, rel=1e-5, abs=1e-4)
    assert a == pytest.approx(drop * stretch**b, rel=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(0.1, 10), st.floats(-50, 50), st.integers(0, 50))
def test_scaling_sizes_and_accuracies_scales_the_fit(stretch, scale, shift, seed):
    x, y = noisy(1, seed=seed)
    a, b, c = fit_power(x, y[0])
    a2, b2, c2 = fit_power(stretch * x, scale * y[0] + shift)
    assert b2 == pytest.approx(b, rel=1e-4)
    assert c2 == pytest.approx(scale * c + shift, rel=1e-4, abs=1e-3)
    assert a2 == pytest.approx(scale * a * stretch**b, rel=1e-3)


@pytest.mark.parametrize("sd", [0.05, 0.5, 3.0])
def test_no_level_fits_worse_than_scipys_loop(sd):
    x, y = noisy(2, sd=sd)
    trace = learning_trace(x, y)
    for row, found in zip(y, trace.sse, strict=True):
        coef, theirs = study.loop_trace(x, row)
        # Three points are met exactly, up to rounding of squares of order 1e4.
        assert np.all(found <= theirs * (1 + 1e-8) + 1e-12)
        again = [((row[:k] - (c - a * x[:k] ** -b)) ** 2).sum()
                 for k, (a, b, c) in zip(range(3, 21), coef, strict=True)]  # fmt: skip
        np.testing.assert_allclose(again, theirs, rtol=1e-6, atol=1e-10)


def test_the_reported_error_is_that_of_the_coefficients():
    x, y = noisy(4)
    trace = learning_trace(x, y, anchor=True, start=[0, 3, 8, 19])
    for row in range(4):
        for i, level in enumerate(trace.levels):
            a, b, c = trace.coef[row, i]
            error = ((y[row, :level] - (c - a * x[:level] ** -b)) ** 2).sum()
            assert trace.sse[row, i] == pytest.approx(error, rel=1e-6, abs=1e-9)


def test_the_exponent_minimises_the_profile_over_a_fine_grid():
    x, y = noisy(3, sd=1.0, seed=3)
    for row in y:
        best = math.inf
        for b in np.geomspace(*EXPONENTS, 2001):
            design = np.stack([np.ones_like(x), -((x / x[0]) ** -b)], axis=1)
            coef, *_ = np.linalg.lstsq(design, row, rcond=None)
            if coef[1] < 0:
                coef = np.array([row.mean(), 0.0])
            best = min(best, ((row - design @ coef) ** 2).sum())
        a, b, c = fit_power(x, row)
        assert ((row - (c - a * x**-b)) ** 2).sum() <= best * (1 + 1e-9)


def test_one_call_for_many_curves_equals_many_calls():
    x, y = noisy(5)
    together = learning_trace(x, y)
    anchored = learning_trace(x, y, anchor=True, start=6)
    for row in range(5):
        alone = learning_trace(x, y[row])
        np.testing.assert_allclose(alone.coef, together.coef[row], rtol=1e-9)
        np.testing.assert_allclose(alone.coef[-1], fit_power(x, y[row]), rtol=1e-9)
        alone = learning_trace(x, y[row], anchor=True, start=6)
        np.testing.assert_allclose(alone.coef, anchored.coef[row], rtol=1e-9)
    own_sizes = learning_trace(np.tile(x, (5, 1)) * [[1], [2], [3], [4], [5]], y)
    np.testing.assert_allclose(own_sizes.asymptote, together.asymptote, rtol=1e-6)


def test_a_curve_that_does_not_rise_has_a_flat_fit():
    falling = np.linspace(80, 70, 20)
    trace = learning_trace(X, falling)
    assert (trace.coef[:, 0] == 0).all()
    np.testing.assert_allclose(trace.asymptote, [falling[:k].mean() for k in range(3, 21)])
    assert working_level(trace, nu=0.9) == 0  # no power law, however slowly its mean moves


def test_logarithmic_growth_ends_at_the_smallest_exponent():
    _, b, c = fit_power(X, 50 + 3 * np.log(X / X[0]))
    assert b == pytest.approx(EXPONENTS[0]) and c > 100


# ---- anchors


def test_an_anchor_at_the_true_ceiling_changes_nothing():
    found = fit_power(X, 90 - 200 * X**-0.5, anchor=90.0)
    np.testing.assert_allclose(found, [200, 0.5, 90], rtol=1e-8)


def test_an_anchored_fit_is_the_fit_with_a_point_very_far_away():
    x, y = noisy(1)
    origin = np.exp(np.log(x).mean())

    def model(u, a, b, c):
        return c - a * u**-b

    far = np.append(x / origin, 1e200)
    theirs, _ = curve_fit(
        model, far, np.append(y[0], 97.0), p0=(5, 0.5, 90), bounds=(0, [1e3, 10, 1e3]),
        method="trf", xtol=1e-14, ftol=1e-14, gtol=1e-14,
    )  # fmt: skip
    a, b, c = fit_power(x, y[0], anchor=97.0)
    np.testing.assert_allclose([a * origin**-b, b, c], theirs, rtol=1e-4)
    free = fit_power(x, y[0])[2]
    assert min(free, 97.0) < c < max(free, 97.0)


def test_each_anchored_level_holds_on_to_the_one_before():
    x, y = noisy(2)
    trace = learning_trace(x, y, anchor=True, start=[7, 0])
    plain = learning_trace(x, y)
    assert trace.start.tolist() == [7, 0]
    np.testing.assert_array_equal(trace.coef[0, :5], plain.coef[0, :5])
    np.testing.assert_array_equal(trace.coef[1], plain.coef[1])
    for level in range(8, 21):
        again = fit_power(x[:level], y[0, :level], anchor=trace.asymptote[0, level - 4])
        np.testing.assert_allclose(trace.coef[0, level - 3], again, rtol=1e-6)
    moves = [np.abs(np.diff(t.asymptote[0, 4:])).sum() for t in (trace, plain)]
    assert moves[0] < moves[1]


def test_by_default_anchors_follow_the_prediction_level():
    x, y = noisy(3, sd=0.1)
    plain = learning_trace(x, y)
    trace = learning_trace(x, y, anchor=True, nu=1e-4)
    assert trace.start.tolist() == prediction_level(plain, nu=1e-4).tolist()
    assert max(trace.start) > 0


# ---- levels


def test_the_working_level_is_the_first_of_a_quiet_window():
    trace = made([50, 60, 60.1, 60.2, 70, 70.1, 70.2, 70.3, 70.4])
    assert working_level(trace, nu=0.2, look=1) == 4  # 60 -> 60.1 -> 60.2
    assert working_level(trace, nu=0.2, look=2) == 7  # 70 -> 70.1 -> 70.2 -> 70.3
    assert working_level(trace, nu=0.2, look=3) == 7
    assert working_level(trace, nu=0.2, look=4) == 0
    assert working_level(trace, nu=0.05, look=0) == 0


def test_the_bound_is_per_unit_of_size_and_slowdown_loosens_it():
    assert slowest_change(2e-5) == pytest.approx(2e-5 / (1 - 2e-5))
    assert slowest_change(0.01, slow=2) == pytest.approx(0.1 / 0.99)
    c = [60, 61, 62, 63, 64, 65]
    wide = made(c, x=[1000 * k for k in range(1, 9)])  # one point per 1,000 examples
    assert working_level(wide, nu=2e-3, look=1) == 3
    assert working_level(wide, nu=5e-4, look=1) == 0
    assert working_level(wide, nu=2e-6, slow=2, look=1) == 3


def test_prediction_and_stop_levels_wait_for_each_other():
    c, gap = [130, 120, 110, 99.9, 101, 99.8], [9, 8, 0.5, 7, 0.4, 0.3]
    trace = made(c, gap)
    assert working_level(trace, nu=0.95, look=1) == 3
    assert prediction_level(trace, nu=0.95, look=1) == 6
    assert prediction_level(trace, nu=0.95, look=1, top=115.0) == 5
    assert stop_level(trace, 1.0, nu=0.95, look=1) == 7  # not 5: no prediction level yet
    assert stop_level(trace, 0.3, nu=0.95, look=1) == 8
    assert stop_level(trace, 0.1, nu=0.95, look=1) == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 200), st.floats(1e-6, 1e-3), st.integers(0, 6))
def test_levels_keep_their_order_and_looser_rules_come_earlier(seed, nu, look):
    trace = learning_trace(*noisy(4, sd=0.2, seed=seed))
    never = 10**6
    work, predict, stop = (
        np.where(v > 0, v, never)
        for v in (
            working_level(trace, nu, look=look),
            prediction_level(trace, nu, look=look),
            stop_level(trace, 3.0, nu, look=look),
        )
    )
    assert (work <= predict).all() and (predict <= stop).all()
    looser = working_level(trace, min(2 * nu, 0.5), look=look)
    assert (np.where(looser > 0, looser, never) <= work).all()
    shorter = working_level(trace, nu, look=max(look - 1, 0))
    assert (np.where(shorter > 0, shorter, never) <= work).all()


# ---- kinds of input


def test_tensors_stay_tensors_and_arrays_arrays():
    x, y = noisy(2)
    arrays = learning_trace(x, y, anchor=True, nu=1e-4)
    tensors = learning_trace(torch.tensor(x), torch.tensor(y), anchor=True, nu=1e-4)
    assert isinstance(arrays.coef, np.ndarray) and isinstance(tensors.coef, torch.Tensor)
    np.testing.assert_allclose(tensors.coef.numpy(), arrays.coef)
    assert isinstance(working_level(tensors), torch.Tensor)
    sizes = torch.tensor([1e5, 2e5])
    np.testing.assert_allclose(tensors.predict(sizes).numpy(), arrays.predict(sizes.numpy()))
    np.testing.assert_allclose(arrays.predict(1e5), arrays.predict(np.array([1e5]))[..., 0])


def test_float32_pandas_and_lists_are_taken():
    x, y = noisy(1)
    expected = learning_trace(x, y[0]).asymptote
    np.testing.assert_allclose(learning_trace(list(x), pd.Series(y[0])).asymptote, expected)
    single = learning_trace(torch.tensor(x).float(), torch.tensor(y[0]).float()).asymptote
    assert single.dtype == torch.float64
    np.testing.assert_allclose(single.numpy()[10:], expected[10:], rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu():
    x, y = noisy(4)
    found = learning_trace(x, torch.tensor(y).cuda(), anchor=True, start=8)
    assert found.coef.device.type == "cuda"
    expected = learning_trace(x, y, anchor=True, start=8).coef
    np.testing.assert_allclose(found.coef.cpu().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fit_power([1, 2], [3, 4]), "x: expected at least 3"),
        (lambda: fit_power([1, 2, 3], [3, 4]), "x, y"),
        (lambda: fit_power([0, 1, 2], [3, 4, 5]), "x: expected positive"),
        (lambda: fit_power([1, 3, 2], [3, 4, 5]), "x: expected sizes that rise"),
        (lambda: fit_power([1, 2, 2], [3, 4, 5]), "x: expected sizes that rise"),
        (lambda: fit_power([1, 2, 3], [3, 4, math.nan]), "y: row 2"),
        (lambda: fit_power([1, 2, 3], ["a", "b", "c"]), "y"),
        (lambda: fit_power([1, 2, 3], [3, 4, 5], anchor=math.inf), "anchor"),
        (lambda: learning_trace([1, 2, 3, 4], [3, 4, 5, 6], anchor=True, nu=1.0), "nu"),
        (lambda: learning_trace([1, 2, 3], np.zeros((2, 2, 3))), "y"),
        (lambda: learning_trace([1, 2, 3], [3, 4, 5], anchor=True, start=2), "start"),
        (lambda: working_level(made([1, 2, 3]), nu=0.0), "nu"),
        (lambda: working_level(made([1, 2, 3]), slow=0.0), "slow"),
        (lambda: working_level(made([1, 2, 3]), look=-1), "look"),
        (lambda: stop_level(made([1, 2, 3]), 0.0), "tau"),
        (lambda: prediction_level(made([1, 2, 3]), top=math.nan), "top"),
        (lambda: explore_traces([1, 2, 3], {"a": [1, 2, 3]}), "x: expected 10 to 40"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


# ---- explorer and figures


def test_the_exported_formula_equals_python():
    explorer = explore_traces()
    assert js.check_formula(explorer, js.corners(explorer, 1)) > 100
    assert len(json.dumps(explorer.export())) < 40_000
    start = time.perf_counter()
    for seen in range(4, 21):
        explorer.result(seen=seen, anchor=True)
    assert (time.perf_counter() - start) / 17 < 0.05


def test_the_explorer_uses_the_module_s_levels_and_anchors():
    x, y = noisy(1, sd=0.1)
    explorer = explore_traces(x, {"mine": y[0]}, seen=20, tolerance=0.5, tau=5.0)
    steps = np.arange(1, 21.0)
    rule = {"nu": 0.5 / 1.5}
    for anchor in (False, True):
        trace = learning_trace(steps, y[0], anchor=anchor, **rule)
        found = explorer.result(anchor=anchor)
        np.testing.assert_allclose(found["asymptote"], trace.asymptote, atol=2e-3)
        np.testing.assert_allclose(found["gap"], trace.gap, atol=2e-3)
        assert found["predict"] == prediction_level(trace, **rule) > 0
        assert found["stop"] == stop_level(trace, 5.0, **rule)


def test_static_figures_draw(tmp_path):
    import matplotlib.pyplot as plt

    x, y = noisy(1)
    figure, axes = plt.subplots(1, 2)
    trace = learning_trace(x, y[0])
    for ax, every, levels in ((axes[0], 1, range(3, 11)), (axes[1], 3, (4, 7, 10))):
        fan(trace, 10, ax, full=2 * x[-1], title="trends", every=every)
        ends = [line.get_ydata()[-1] for line in ax.lines]
        np.testing.assert_allclose(ends, [trace.predict(2 * x[-1])[i - 3] for i in levels])
    figure.savefig(Path(tmp_path) / "figure.png")
    plt.close(figure)


# ---- experiments


def test_parts_of_speech_of_python():
    source = "def f(a, b=1):\n    x = g(a.y, key=b).run()\n    self.z = x[0]\n    return 'x'\n"
    names = [(w, t) for w, t, _ in taggers.tagged(source) if t in taggers.PARTS]
    assert names == [
        ("f", "definition"), ("a", "parameter"), ("b", "parameter"), ("x", "variable set"),
        ("g", "call"), ("a", "variable"), ("y", "attribute"), ("key", "keyword argument"),
        ("b", "variable"), ("run", "method"), ("self", "variable"), ("z", "attribute set"),
        ("x", "variable"),
    ]  # fmt: skip
    assert [w for w, _, first in taggers.tagged(source) if first] == ["def", "x", "self", "return"]


def test_a_corpus_is_cut_from_functions_in_a_seeded_order(monkeypatch):
    source = "def f{0}(a):\n    return a.b{0}(1, 'x')\n"
    functions = [Function("m", f"f{i}", source.format(i), "") for i in range(30)]
    monkeypatch.setattr(study.lab.data, "stdlib_functions", lambda: functions)
    text = taggers.corpus(0, train=120, test=40)
    assert len(text.word) == len(text.tag) == len(text.line) == 160 and text.train == 120
    assert text.features.shape == (160, 5) and text.rows == text.features.max() + 1
    names = list(taggers.TAGS)
    parts = [
        "def", "definition", "(", "parameter", ")", ":", "return", "variable", ".", "method", "(",
        "number", ",", "string", ")",
    ]  # fmt: skip
    assert [names[t] for t in text.tag[: len(parts)]] == parts
    assert len(set(text.line[:15])) == 2  # two logical lines a function
    assert (text.features[1:, 1] - text.features[:-1, 1] != 0).any()
    other = taggers.corpus(1, train=120, test=40)
    assert other.word.tolist() == text.word.tolist()  # numbered by first appearance
    assert other.tag.tolist() == text.tag.tolist()


def small_corpus(n=400, seed=0):
    """Tokens drawn from a chain of three name parts with words that give them away."""
    rng = np.random.default_rng(seed)
    tag = rng.integers(0, 3, n)
    word = 2 * tag + rng.integers(0, 2, n)
    features = np.stack([word, np.full(n, 6)], axis=1)
    return taggers.Corpus(word, tag, np.arange(n) // 5, features, n - 100, 7)


@pytest.mark.parametrize("name", taggers.TAGGERS)
def test_taggers_learn_words_that_give_their_part_away(name):
    found = taggers.TAGGERS[name](small_corpus(), np.array([100, 300]))
    assert found.shape == (2,) and found[-1] >= 95


def test_viterbi_decodes_what_brute_force_decodes():
    rng = np.random.default_rng(1)
    n, k = 300, len(taggers.TAGS)
    tag, word = rng.integers(0, 3, n), rng.integers(0, 4, n)
    text = taggers.Corpus(word, tag, np.arange(n) // 4, np.zeros((n, 1), int), 280, 1)
    found = taggers.hidden_markov(text, np.array([280]))[0]
    emit, move, start = np.zeros((4, k)), np.zeros((k, k)), np.zeros(k)
    for i in range(280):
        emit[word[i], tag[i]] += 1
        if i % 4:
            move[tag[i - 1], tag[i]] += 1
        else:
            start[tag[i]] += 1
    once = np.full(k, 0.1)
    logs = np.log(emit + 1e-3) - np.log(emit.sum(0) + once)
    step = np.log((move + 0.1) / (move + 0.1).sum(1, keepdims=True))
    right = 0
    for first in range(280, 300, 4):
        paths = np.array(np.meshgrid(*[range(3)] * 4, indexing="ij")).reshape(4, -1)
        score = np.log(start + 0.1)[paths[0]] + logs[word[first], paths[0]]
        for j in range(1, 4):
            score += step[paths[j - 1], paths[j]] + logs[word[first + j], paths[j]]
        right += (paths[:, score.argmax()] == tag[first : first + 4]).sum()
    assert found == pytest.approx(5 * right)


def test_the_study_runs_at_a_tiny_size():
    found = study.trace_study(0, sources=("digits",), levels=10, share=0.1, tolerance=2.0, look=1)
    assert found["curves"].shape == (8, 10) and found["coef"].shape == (8, 8, 3)
    assert found["n_curves"] == 8 == len(study.learner_names(("digits",)))
    assert all(math.isfinite(v) for v in found.values() if not isinstance(v, np.ndarray))


def test_what_stopped_curves_gained_is_listed():
    curves = np.array([[50.0, 60, 70, 71], [10, 20, 30, 40]])
    frame = pd.DataFrame({"curves": [curves, curves + 1], "stop": [np.array([3, 0]), [0, 2]]})
    assert study.stopped_curves(frame).to_numpy().tolist() == [[3, 1], [2, 20]]


def test_the_end_of_a_power_law_loss_is_forecast():
    tokens = np.geomspace(1e4, 1e6, 20)
    loss = 5 * (1 - (60 - 500 * tokens**-0.4) / 100)
    grid = pd.DataFrame({"N": 100, "batch": 32, "seed": 0, "tokens": tokens, "loss": loss})
    row = study.loss_forecasts(grid, uniform=5.0).iloc[0]
    assert row.error < 1e-6 < row.error_same and row.b == pytest.approx(0.4, rel=1e-4)
    assert row.ceiling == pytest.approx(60, rel=1e-6)
    seen = tokens <= tokens[-1] / 3
    slope, level = np.polyfit(np.log(tokens[seen]), loss[seen], 1)
    assert row.log == pytest.approx(level + slope * np.log(tokens[-1]))


def test_the_grids_curves_are_traced_and_forecast():
    grid = tiny_lm_grid()
    curves = grid[(grid.phase == "constant") & (grid.made == "laptop")]
    found = study.loss_forecasts(curves)
    assert len(found) == len(curves.drop_duplicates(["N", "batch", "seed"]))
    assert found.error.mean() < found.error_same.mean() / 2
    for _, run in list(curves.groupby(["N", "batch", "seed"]))[::18]:
        tokens, saved = run.tokens.to_numpy(float), 100 * (1 - run.loss.to_numpy() / math.log(256))
        theirs = study.loop_trace(tokens, saved)[1]
        assert np.all(learning_trace(tokens, saved).sse <= theirs * (1 + 1e-8) + 1e-12)


def test_released_checkpoints_are_read(tmp_path):
    (tmp_path / "aggregated_eval").mkdir()
    lines = [
        "model_name,model_size,steps,num_token,flops,ppl",
        "OPT,1b,1,9,1,20",
        "OPT,1b,1,9,1,20",
    ]
    (tmp_path / "aggregated_eval" / "opt_trajectories.csv").write_text("\n".join(lines))
    found = study.released_opt(tmp_path)
    assert found.shape == (1, 3) and found.tokens[0] == 1e9
    assert found.loss[0] == pytest.approx(math.log(20))
