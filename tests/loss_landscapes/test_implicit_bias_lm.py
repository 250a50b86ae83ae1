"""Language, trace and drift against enumeration, dense Hessians and closed forms."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from tests.plots import js
from workbench.lab import seeded
from workbench.loss_landscapes import figures_implicit_bias_lm as figures
from workbench.loss_landscapes.experiments import implicit_bias_lm as study
from workbench.loss_landscapes.geometry import Objective, trace
from workbench.loss_landscapes.implicit_bias_lm import (
    HMMLanguage,
    MaskedLM,
    enlarge,
    flatten_sgd,
    hessian_trace_fisher,
    pretrain,
    probe,
    rescale_features,
    toy_flow,
    toy_logits,
)

LANGUAGE = HMMLanguage.random(3, 4, concentration=0.7, random_state=1)


def joint(language, length):
    """p(z, x) of every path and sentence, by multiplication along each."""
    k, v = language.emission.shape
    pi, a, e = (t.numpy() for t in (language.initial, language.transition, language.emission))
    table = np.zeros((k,) * length + (v,) * length)
    for z in itertools.product(range(k), repeat=length):
        path = pi[z[0]] * math.prod(a[z[i], z[i + 1]] for i in range(length - 1))
        for x in itertools.product(range(v), repeat=length):
            table[z + x] = path * math.prod(e[z[i], x[i]] for i in range(length))
    return table


def lm(d=8, layers=1, seed=0, length=4):
    with seeded(seed):
        model = MaskedLM(LANGUAGE.vocab, length, d, layers).double()
        for p in model.parameters():  # away from the special values of a fresh network
            p.data.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def contexts():
    return LANGUAGE.contexts(4)


# --- the language


def test_conditionals_are_those_of_the_enumerated_joint():
    table = joint(LANGUAGE, 4)
    words = table.sum((0, 1, 2, 3))
    sentence = torch.tensor([[2, 0, 4, 1]])  # the third word is hidden
    found = LANGUAGE.conditional(sentence)[0].numpy()
    np.testing.assert_allclose(found[2], words[2, 0, :, 1] / words[2, 0, :, 1].sum(), rtol=1e-12)
    without = words.sum(2)  # a visible word is left out of its own prediction
    np.testing.assert_allclose(found[0], without[:, 0, 1] / without[:, 0, 1].sum(), rtol=1e-12)
    state = table.sum((0, 1, 3))[:, 2, 0, :, 1].sum(1)
    np.testing.assert_allclose(
        LANGUAGE.posterior(sentence)[0, 2].numpy(), state / state.sum(), rtol=1e-12
    )
    likelihood = LANGUAGE.messages(sentence)[2].exp()
    assert float(likelihood) == pytest.approx(words[2, 0, :, 1].sum())


def test_next_words_are_those_of_the_enumerated_joint():
    words = joint(LANGUAGE, 4).sum((0, 1, 2, 3))
    found = LANGUAGE.next_token(torch.tensor([[3, 1, 0]]))[0].numpy()
    for t, seen in enumerate([(3,), (3, 1), (3, 1, 0)]):
        left = words[seen].reshape(4, -1).sum(1)
        np.testing.assert_allclose(found[t], left / left.sum(), rtol=1e-12)


def test_listed_contexts_carry_the_whole_distribution(contexts):
    words = joint(LANGUAGE, 4).sum((0, 1, 2, 3))
    assert len(contexts.tokens) == 4 * 4**3 and float(contexts.weights.sum()) == pytest.approx(1)
    entropies = []
    for place in range(4):
        moved = np.moveaxis(words, place, -1).reshape(-1, 4)
        total = moved.sum(1)
        entropies.append(-(moved * np.log(moved / total[:, None])).sum())
    assert contexts.minimal_loss == pytest.approx(np.mean(entropies), rel=1e-12)
    drawn = LANGUAGE.contexts(4, count=20_000, generator=0)
    assert drawn.minimal_loss == pytest.approx(contexts.minimal_loss, abs=0.01)


def test_the_loss_is_the_minimum_plus_the_excess(contexts):
    logits = torch.randn(len(contexts.tokens), 4, dtype=torch.float64)
    cross = contexts.weights @ -(contexts.targets * logits.log_softmax(1)).sum(1)
    assert contexts.minimal_loss + contexts.excess(logits) == pytest.approx(float(cross))
    assert contexts.excess(contexts.targets.log()) == pytest.approx(0, abs=1e-12)


def test_sentences_have_the_languages_frequencies():
    words, states = LANGUAGE.sample(40_000, 3, generator=0)
    table = joint(LANGUAGE, 3)
    pairs = np.bincount(words[:, 1] * 4 + words[:, 2], minlength=16) / 40_000
    expected = table.sum((0, 1, 2, 3)).reshape(-1)
    np.testing.assert_allclose(pairs, expected, atol=5 * np.sqrt(0.25 / 40_000))
    both = np.bincount(states[:, 2] * 4 + words[:, 2], minlength=12) / 40_000
    np.testing.assert_allclose(both, table.sum((0, 1, 3, 4)).reshape(-1), atol=0.0125)


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 10**6))
def test_conditionals_are_distributions_and_the_last_is_the_next_word(k, v, seed):
    language = HMMLanguage.random(k, v, random_state=seed)
    words = language.sample(7, 5, generator=seed)[0]
    found = language.conditional(words)
    torch.testing.assert_close(found.sum(-1), torch.ones(7, 5, dtype=torch.float64))
    torch.testing.assert_close(found[:, -1], language.next_token(words[:, :-1])[:, -1])


# --- flatness


def tiny(seed=0):
    """About 300 parameters and what it predicts at 40 inputs, which is then the truth."""
    with seeded(seed):
        model = nn.Sequential(nn.Linear(6, 18), nn.Tanh(), nn.Linear(18, 9)).double()
        for p in model.parameters():
            p.data.mul_(2)
        x = torch.randn(40, 6, dtype=torch.float64)
    return model, x, model(x).softmax(1).detach()


def dense_trace(model, x, targets):
    names = list(dict(model.named_parameters()))
    shapes = [p.shape for p in model.parameters()]

    def loss(theta):
        parts = theta.split([s.numel() for s in shapes])
        held = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, held, (x,)), targets)

    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    return float(torch.func.hessian(loss)(theta).trace())


def test_at_the_optimum_fisher_hutchinson_and_dense_hessian_agree():
    model, x, truth = tiny()
    assert 290 < sum(p.numel() for p in model.parameters()) < 310
    dense = dense_trace(model, x, truth)
    exact = hessian_trace_fisher(model, (x,), draws=None)
    assert exact.value == pytest.approx(dense, rel=1e-5) and exact.error == 0
    assert sum(exact.parts.values()) == pytest.approx(exact.value)
    drawn = hessian_trace_fisher(model, (x,), draws=200, generator=0)
    assert abs(drawn.value - dense) < 4 * drawn.error + 0.02 * dense
    estimate = trace(Objective(model, F.cross_entropy, (x, truth)), draws=200, generator=0)
    assert abs(estimate.value - dense) < 5 * estimate.error
    assert dense_trace(model, x, truth.roll(1, 0)) != pytest.approx(exact.value, rel=0.05)


def test_weights_count_rows_as_often_as_they_say():
    model, x, _ = tiny()
    twice = hessian_trace_fisher(model, (x[[0, 1, 1]],), draws=None)
    heavy = hessian_trace_fisher(model, (x[:2],), draws=None, weights=torch.tensor([1.0, 2.0]))
    assert heavy.value == pytest.approx(twice.value, rel=1e-6)


def test_the_standard_error_is_the_spread_over_draws():
    model, x, _ = tiny()
    exact = hessian_trace_fisher(model, (x,), draws=None)
    found = [hessian_trace_fisher(model, (x,), generator=i) for i in range(60)]
    miss = np.array([f.value for f in found]) - exact.value
    assert abs(miss.mean()) < 4 * miss.std() / 60**0.5
    assert miss.std() < 1.2 * np.mean([f.error for f in found])


@pytest.mark.parametrize("times, layers", [(2, 1), (3, 2)])
def test_a_small_model_is_a_large_one_and_its_trace_follows(contexts, times, layers):
    model = lm(layers=layers)
    large = enlarge(model, times).double()
    large.load_state_dict(enlarge(model, times).state_dict())
    rows = slice(None, None, 17)
    inputs = contexts.tokens[rows], contexts.positions[rows]
    torch.testing.assert_close(large(*inputs), model(*inputs), rtol=1e-6, atol=1e-6)
    small = hessian_trace_fisher(model, inputs, draws=None)
    expected = hessian_trace_fisher(large, inputs, draws=None).value
    assert small.enlarged(times) == pytest.approx(expected, rel=1e-5)
    assert small.enlarged(1) == pytest.approx(small.value)


def test_a_twin_predicts_the_same_and_its_trace_follows(contexts):
    model = lm()
    inputs = contexts.tokens[::9], contexts.positions[::9]
    here = hessian_trace_fisher(model, inputs, draws=None)
    for scale in (0.3, 4.0):
        twin = rescale_features(model, scale)
        torch.testing.assert_close(twin(*inputs), model(*inputs))
        found = hessian_trace_fisher(twin, inputs, draws=None).value
        assert here.rescaled(scale) == pytest.approx(found, rel=1e-6)
    each = rescale_features(model, torch.linspace(0.5, 2, 8))
    torch.testing.assert_close(each(*inputs), model(*inputs))


# --- models, training, probe


def test_the_answer_at_the_hidden_word_is_that_of_whole_blocks(contexts):
    model = lm(layers=2)
    tokens, positions = contexts.tokens[::5], contexts.positions[::5]
    x = model.embed(tokens) + model.positions.weight
    for block in model.blocks:
        x = block(x)
    expected = model.norm(x)[torch.arange(len(x)), positions]
    torch.testing.assert_close(model.features(tokens, positions), expected)


def test_training_approaches_the_minimum_on_sentences_seen_once(contexts):
    drawn = []

    class Watched(HMMLanguage):
        def sample(self, count, length, *, generator=None):
            drawn.append(count)
            return super().sample(count, length, generator=generator)

    language = Watched(LANGUAGE.initial, LANGUAGE.transition, LANGUAGE.emission)
    with seeded(0):
        model = MaskedLM(4, 4, 16)
    options = {"length": 4, "steps": 250, "batch": 200, "generator": 0}
    kept = pretrain(model, language, checkpoints=[20, 250], **options)
    assert sum(drawn) >= 250 * 200 and list(kept) == [20, 250]
    excess = []
    for state in kept.values():
        model.load_state_dict(state)
        excess.append(contexts.excess(model(contexts.tokens, contexts.positions).detach()))
    assert excess[1] < 0.03 < excess[0]


def test_the_learning_rate_falls_in_steps():
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])

    pretrain(
        lm().float(), LANGUAGE, length=4, steps=10, checkpoints=[10], batch=2, lr=1.0,
        optimizer=Watched, generator=0,
    )  # fmt: skip
    assert rates == pytest.approx([1.0] * 3 + [0.3] * 7)


def test_the_probe_is_a_logistic_regression_on_few_drawn_rows():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((300, 3)), rng.integers(0, 3, 300)
    x[np.arange(300), y] += 2
    weights = rng.random(300)
    weights /= weights.sum()
    found = probe(x, y, weights=weights, count=20, repeats=1, random_state=5)
    rows = np.random.default_rng(5).choice(300, 20, p=weights)
    scaled = (x - x[rows].mean(0)) / x[rows].std(0)
    line = LogisticRegression(C=1.0, max_iter=500).fit(scaled[rows], y[rows])
    assert found == pytest.approx(weights[line.predict(scaled) == y].sum())
    moved = probe(3 - 7 * x, y, weights=weights, count=20, repeats=1, random_state=5)
    assert moved == pytest.approx(found)
    assert probe(np.eye(3)[y] * 50, y, count=60, repeats=3, random_state=0) == pytest.approx(1)
    majority = probe(x * 0, np.r_[np.zeros(250, int), np.ones(50, int)], random_state=0)
    assert majority == pytest.approx(250 / 300)


def test_one_class_among_the_drawn_rows_is_predicted_everywhere():
    y = np.array([0] * 99 + [1])
    weights = np.r_[np.ones(99), 1e-9]
    assert probe(np.arange(100.0)[:, None], y, weights=weights, random_state=0) > 0.99


# --- the drift


def test_every_step_shrinks_the_imbalance_by_the_squared_noise():
    start = torch.tensor([[2.0, 0.5], [0.3, 3.0]], dtype=torch.float64)
    truth = torch.tensor([[0.3, 0.7]])
    path = flatten_sgd(toy_logits, start, truth, lr=0.1, steps=50, batch=3, generator=0)
    assert path.shape == (51, 2, 2) and torch.equal(path[0], start)
    u, v = path.unbind(2)
    noise = (u[:-1] - u[1:]) / (0.1 * v[:-1])
    words = (torch.sigmoid(u * v)[:-1] - noise) * 3  # words 1 among the three
    torch.testing.assert_close(words, words.round(), atol=1e-9, rtol=0)
    gap = u**2 - v**2
    torch.testing.assert_close(gap[1:], gap[:-1] * (1 - 0.01 * noise**2))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_mean_imbalance_decays_at_the_rate_of_the_theory(batch):
    c, steps = 1.0, 200 * batch
    p = 1 / (1 + math.exp(-c))
    start = torch.tensor([[2.0, 0.5]], dtype=torch.float64).expand(300, 2)
    truth = torch.tensor([[1 - p, p]])
    path = flatten_sgd(
        toy_logits, start, truth, lr=0.1, steps=steps, batch=batch, every=steps, generator=0
    )
    u, v = path[-1].unbind(1)
    measured = -math.log(float((u**2 - v**2).mean()) / 3.75) / (0.01 * steps / batch)
    assert measured == pytest.approx(p * (1 - p), rel=0.05)
    assert float((u * v).mean()) == pytest.approx(c, abs=0.1)
    flow = torch.stack(toy_flow(2.0, 0.5, 0.1, steps, batch=batch))
    torch.testing.assert_close(torch.stack([u, v]).mean(1), flow, atol=0.05, rtol=0.05)


def test_the_drift_ends_at_equal_weights_the_flattest_solution():
    start = torch.tensor([[3.0, 0.4]], dtype=torch.float64).expand(100, 2)
    truth = torch.sigmoid(torch.tensor([[-1.2, 1.2]]))
    path = flatten_sgd(toy_logits, start, truth, lr=0.3, steps=400, every=400, generator=0)
    u, v = path[-1].unbind(1)
    assert float((u.abs() - v.abs()).abs().max()) < 0.1
    last = torch.stack(toy_flow(3.0, 0.4, 0.3, 1e9))
    torch.testing.assert_close(last, torch.full((2,), 1.2**0.5, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(st.floats(0.2, 3), st.floats(0.2, 3), st.sampled_from([-1, 1]))
def test_the_flow_descends_a_quarter_of_the_trace_along_the_manifold(u, v, sign):
    at = torch.tensor([u, sign * v], dtype=torch.float64)

    def quarter(theta):
        score = theta.prod()
        return (theta**2).sum() * torch.sigmoid(score) * torch.sigmoid(-score) / 4

    inputs = torch.zeros(1, 1)
    model = nn.Module()
    model.theta = nn.Parameter(at)
    model.forward = lambda x: toy_logits(model.theta)
    found = hessian_trace_fisher(model, (inputs,), draws=None)
    assert found.value == pytest.approx(4 * float(quarter(at)), rel=1e-5)
    along = torch.stack([at[0], -at[1]]) / at.norm()
    slope = -(torch.func.grad(quarter)(at) @ along) * along
    moved = torch.stack(toy_flow(*at.tolist(), 1e-3, [0.0, 1.0]), -1)
    torch.testing.assert_close((moved[1] - moved[0]) / 1e-6, slope, rtol=1e-4, atol=1e-6)


def test_the_drift_runs_on_models_with_inputs():
    weights = torch.tensor([0.5, 0.5, 0.0])
    x = torch.eye(3, dtype=torch.float64)
    truth = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    path = flatten_sgd(
        lambda theta, rows: rows @ theta.view(3, 2), torch.zeros(20, 6, dtype=torch.float64),
        truth, (x,), lr=0.1, steps=600, weights=weights, batch=4, every=300, generator=0,
    )  # fmt: skip
    found = path[-1].view(20, 3, 2).mean(0).softmax(1)
    torch.testing.assert_close(found[:2], truth[:2].double(), atol=0.06, rtol=0)
    assert torch.equal(path[-1].view(20, 3, 2)[:, 2], torch.zeros(20, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: HMMLanguage(torch.ones(2), torch.eye(2), torch.eye(2)), "initial"),
        (lambda: HMMLanguage(torch.ones(2) / 2, torch.eye(3), torch.eye(2)), "transition"),
        (lambda: HMMLanguage.random(1, 4), "n_states"),
        (lambda: HMMLanguage.random(3, 4, concentration=0), "concentration"),
        (lambda: LANGUAGE.conditional(torch.tensor([[0, 5]])), "tokens: expected words 0..3"),
        (lambda: LANGUAGE.conditional(torch.tensor([0, 1])), "tokens: expected integers"),
        (lambda: LANGUAGE.contexts(12), "give a count"),
        (lambda: LANGUAGE.sample(0, 3), "count"),
        (lambda: MaskedLM(4, 4, 12), "multiple of 8"),
        (lambda: pretrain(lm(), LANGUAGE, length=4, steps=5, checkpoints=[6]), "checkpoints"),
        (lambda: hessian_trace_fisher(nn.Flatten(0), (torch.ones(3, 1),)), "logits"),
        (lambda: hessian_trace_fisher(nn.Linear(2, 2), (torch.ones(3, 2),), draws=0), "draws"),
        (lambda: rescale_features(lm(), -1.0), "scale"),
        (lambda: enlarge(lm(), 0), "times"),
        (lambda: probe(torch.ones(3, 2), [0, 1]), "expected the same number of rows"),
        (lambda: flatten_sgd(toy_logits, torch.ones(1, 2), torch.ones(1, 2), lr=0, steps=1), "lr"),
        (lambda: flatten_sgd(toy_logits, torch.ones(2), torch.ones(1, 2), lr=1, steps=1), "theta"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- experiment and explorer


def checkpoints(seeds=3, sizes=(16, 32), steps=(40, 60, 80, 100)):
    rng = np.random.default_rng(0)
    rows = [(s, d, t) for s in range(seeds) for d in sizes for t in steps]
    frame = pd.DataFrame(rows, columns=["seed", "d", "step"])
    n = len(frame)
    return frame.assign(
        excess=rng.uniform(0.003, 0.02, n), trace_wide=rng.uniform(5, 50, n),
        accuracy=rng.choice([0.7, 0.75, 0.8, 0.9], n),
    )  # fmt: skip


def test_the_exported_formula_is_the_explorers():
    explorer = figures.explore_checkpoints(checkpoints())
    assert js.check_formula(explorer) == 12
    explorer.result()
    assert explorer.seconds < 0.05
    assert explorer.result(within=explorer.control("within").low)["kept"] >= 1


def test_the_explorer_correlates_within_seeds():
    rows = checkpoints()
    found = figures.explore_checkpoints(rows, size="16").result(within=0.022)
    expected = [
        spearmanr(g.trace_wide, g.accuracy)[0] for _, g in rows[rows.d == 16].groupby("seed")
    ]
    assert found["rho_trace"] == pytest.approx(np.mean(expected)) and found["kept"] == 12
    with pytest.raises(ValueError, match="no column 'excess'"):
        figures.explore_checkpoints(rows.drop(columns="excess"))


def test_the_experiment_compares_checkpoints_of_equal_loss():
    options = {"steps": 20, "batch": 50, "checkpoints": (0.5, 0.75, 1.0), "repeats": 2}
    frame = pd.DataFrame(
        [{"seed": 0, "d": d, **study.solutions(0, d=d, **options)} for d in (8, 16)]
    )
    rows = study.by_checkpoint(frame)
    assert len(rows) == 6 and set(rows.step) == {10, 15, 20}
    wide = rows[rows.d == 16].trace_wide / rows[rows.d == 16].trace
    assert (wide > 1 / 6).all() and (wide < 6).all()
    assert frame.minimal_loss[0] + 0.08 < frame.blind_loss[0] and frame.majority[0] <= 0.5
    assert len(study.correlations(frame, within=1e-9)) == 0
    row = study.correlations(frame, within=10.0).iloc[0]
    assert row.rho_loss == pytest.approx(spearmanr(rows.excess, rows.accuracy)[0])
    assert row.by_trace == -row.rho_trace and row.checkpoints == 6
    assert row["last"] == rows.accuracy.iloc[-1]


def test_the_drift_is_compared_with_the_flow_that_starts_where_it_does():
    row = study.drift(0, steps=200, runs=50, every=50)
    assert row["u_flow"][0] == pytest.approx(2.5) and row["u_mean"][0] == pytest.approx(2.5)
    assert row["ratio"] == pytest.approx(1, abs=0.3) and len(row["step"]) == 5
