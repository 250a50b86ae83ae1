"""Attentiveness: mass on the choices, its bound on surface-form competition, and the scorers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import js
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workbench.calibration import attentiveness as at
from workbench.calibration.experiments import attentiveness as study
from workbench.calibration.figures_attentiveness import explore_choices, explore_prompts

WORDS = ["<s>", "\n", *"?:.,ABCD", *["or", "question", "answer", "choices", "correct", "is", "the"]]
WORDS += ["red", "blue", "sky", "green"]


class Words:
    """A word-level tokenizer: the least that ``ScoringLM`` asks for."""

    def __init__(self, words: list[str] = WORDS) -> None:
        self.index = {word: i for i, word in enumerate(words)}

    def encode(self, text: str) -> list[int]:
        for mark in "\n:,.?":
            text = text.replace(mark, f" {mark} ")
        return [self.index[word] for word in text.split(" ") if word in self.index]


class Markov:
    """P(next | last token): a model whose string probabilities are products read off a table."""

    def __init__(self, v: int, seed: int = 0) -> None:
        self.table = np.random.default_rng(seed).dirichlet(np.ones(v) * 0.5, size=v)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.log(torch.tensor(self.table))[ids]

    def string(self, ids: list[int], start: int) -> float:
        return math.prod(self.table[a, b] for a, b in itertools.pairwise([start, *ids]))


class Tiny(nn.Module):
    """One causal attention layer with dropout, for what depends on the whole prefix."""

    def __init__(self, v: int, d: int = 8) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(v, d), nn.Embedding(64, d)
        self.block = nn.TransformerEncoderLayer(d, 2, 16, dropout=0.5, batch_first=True)
        self.out = nn.Linear(d, v)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        t = ids.shape[1]
        x = self.embed(ids) + self.place(torch.arange(t, device=ids.device))
        causal = torch.full((t, t), -torch.inf, device=ids.device).triu(1)
        return self.out(self.block(x, src_mask=causal))


def tiny(seed: int = 0) -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny(len(WORDS)).double()


OPTIONS = ["red", "blue sky", "green", "sky blue green"]


# ---- scoring


def test_log_probabilities_are_products_along_the_choice():
    markov, words = Markov(len(WORDS)), Words()
    lm = at.ScoringLM(markov, words)
    got = at.option_logprobs(lm, "the answer is", OPTIONS).exp()
    last = words.encode("is")[0]
    want = [markov.string(words.encode(option), last) for option in OPTIONS]
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_teacher_forcing_equals_decoding_step_by_step():
    model, words = tiny().eval(), Words()
    lm = at.ScoringLM(model, words)
    got = at.option_logprobs(lm, "question: the sky is", OPTIONS)
    for option, value in zip(OPTIONS, got, strict=True):
        ids, total = words.encode("question: the sky is"), 0.0
        for token in words.encode(option):
            total += model(torch.tensor([ids]))[0, -1].log_softmax(-1)[token].item()
            ids.append(token)
        assert total == pytest.approx(value.item(), abs=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_padding_batching_and_order_change_nothing(batch_size):
    lm = at.ScoringLM(tiny().eval(), Words(), batch_size=batch_size)
    prompts = ["is", "question: the sky is", "the answer is", "is"]
    options = [OPTIONS, OPTIONS[::-1], OPTIONS, ["A", "B", "C", "sky"]]
    got = at.score_items(lm, prompts, options)
    want = torch.stack(
        [at.option_logprobs(lm, *pair) for pair in zip(prompts, options, strict=True)]
    )
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    flipped = at.score_items(lm, prompts[::-1], options[::-1]).flip(0)
    torch.testing.assert_close(got, flipped, atol=1e-12, rtol=0)


def test_one_token_choices_share_one_forward_row():
    seen = []
    markov = Markov(len(WORDS))
    lm = at.ScoringLM(lambda ids: (seen.append(ids.shape[0]), markov(ids))[1], Words())
    at.option_logprobs(lm, "the answer is", ["red", "blue", "green", "sky"])
    assert sum(seen) == 1


def test_adapters_of_other_libraries_fit():
    markov, words = Markov(len(WORDS)), Words()
    theirs = at.ScoringLM(
        lambda ids: SimpleNamespace(logits=markov(ids)),
        SimpleNamespace(encode=lambda text: SimpleNamespace(ids=words.encode(text))),
    )
    ours = at.ScoringLM(markov, words)
    assert at.option_logprobs(theirs, "is", OPTIONS).equal(at.option_logprobs(ours, "is", OPTIONS))


def test_a_module_is_scored_without_dropout_and_left_as_it_was():
    model = tiny().train()
    lm = at.ScoringLM(model, Words())
    first, second = (at.option_logprobs(lm, "the sky is", OPTIONS) for _ in range(2))
    assert first.equal(second) and model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_models_are_scored_in_at_least_single_precision(dtype):
    exact = at.option_logprobs(at.ScoringLM(tiny().eval(), Words()), "the sky is", OPTIONS)
    got = at.option_logprobs(at.ScoringLM(tiny().to(dtype).eval(), Words()), "the sky is", OPTIONS)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact, atol=0.2 if dtype is torch.bfloat16 else 1e-4, rtol=0)


def test_the_leading_space_belongs_to_the_choice():
    class Pieces:
        """Greedy longest match over pieces in which " red" and "red" are different tokens."""

        pieces = (" red", "red", " is", "is", " ", "\n")

        def encode(self, text: str) -> list[int]:
            ids = []
            while text:
                i = next(i for i, piece in enumerate(self.pieces) if text.startswith(piece))
                ids.append(i)
                text = text[len(self.pieces[i]) :]
            return ids

    lm = at.ScoringLM(Markov(6), Pieces())
    assert lm.split("is", "red") == ([3], [0])
    assert lm.split("is\n", "red") == ([3, 5], [1])  # the prompt already ends in white space
    assert at.ScoringLM(Markov(6), Pieces(), space="").split("is", "red") == ([3], [1])


def test_a_token_across_the_border_leaves_the_prompt_as_it_is():
    merged = {"a": [0], "a b": [2], " b": [1]}
    lm = at.ScoringLM(Markov(3), SimpleNamespace(encode=merged.__getitem__))
    assert lm.split("a", "b") == ([0], [1])


def test_a_long_prompt_loses_its_beginning():
    markov = Markov(len(WORDS))
    full, cut = at.ScoringLM(markov, Words()), at.ScoringLM(markov, Words(), context=3)
    prompt = "question: the sky is"
    assert at.option_logprobs(full, prompt, OPTIONS).equal(at.option_logprobs(cut, prompt, OPTIONS))
    model = tiny().eval()
    cut = at.ScoringLM(model, Words(), context=4)
    short = at.ScoringLM(model, Words())
    torch.testing.assert_close(
        at.option_logprobs(cut, prompt, ["red"]), at.option_logprobs(short, ": the sky is", ["red"])
    )


# ---- mass, bound, immunity


def test_mass_is_one_for_a_model_that_knows_only_the_choices():
    table = np.full((4, 4), 1e-300)
    table[:, 1:] = [0.5, 0.3, 0.2]
    lm = at.ScoringLM(lambda ids: torch.log(torch.tensor(table))[ids], Words(["is", "a", "b", "c"]))
    logp = at.option_logprobs(lm, "is", ["a", "b", "c"])
    assert at.pmv(logp).item() == pytest.approx(1.0, abs=1e-12)
    assert at.sfc_immune(logp)


def test_a_choice_that_continues_another_is_counted_once():
    markov = Markov(len(WORDS), seed=3)
    lm = at.ScoringLM(markov, Words())
    options = ["sky", "sky blue", "red", "sky", "sky blue green"]
    counted = at.counted_once(lm, "is", options)
    assert counted.tolist() == [True, False, True, False, False]
    logp = at.option_logprobs(lm, "is", options)
    assert at.pmv(logp, counted) == at.pmv(logp[[0, 2]])
    # With an end token the five strings are four different events, and each counts.
    closed = at.ScoringLM(markov, Words(), end=".")
    assert at.counted_once(closed, "is", options).tolist() == [True, True, True, False, True]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 10_000), st.floats(0.05, 3))
def test_the_bound_against_every_attribution_of_the_unseen_mass(m, s, seed, concentration):
    """Brute force: all m**s ways to give s unseen wordings to the m choices."""
    mass = np.random.default_rng(seed).dirichlet(np.full(m + s, concentration)) + 1e-12
    mass /= mass.sum()
    seen, unseen = mass[:m], mass[m:]
    logp = torch.tensor(np.log(seen))
    winners = {
        int(np.argmax(seen + np.bincount(owner, weights=unseen, minlength=m)))
        for owner in map(list, itertools.product(range(m), repeat=s))
    }
    if at.sfc_immune(logp):
        assert winners == {int(seen.argmax())}
    else:  # all unseen mass to the runner-up at least draws level
        first, second = np.sort(seen)[::-1][:2]
        assert second + unseen.sum() >= first - 1e-9


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10_000))
def test_mass_lies_in_the_unit_interval_and_ignores_order(m, seed):
    rng = np.random.default_rng(seed)
    logp = np.log(rng.dirichlet(np.ones(m + 1), size=7)[:, :m])
    mass = at.pmv(logp)
    assert ((mass > 0) & (mass <= 1)).all()
    order = rng.permutation(m)
    torch.testing.assert_close(mass, at.pmv(logp[:, order]))
    assert at.sfc_immune(logp).equal(at.sfc_immune(logp[:, order]))
    torch.testing.assert_close(at.sfc_bound(logp), 1 - mass)


def test_known_cases_of_immunity():
    assert at.sfc_immune(np.log([0.6, 0.1, 0.1, 0.1]))  # 0.1 unseen, lead 0.5
    assert not at.sfc_immune(np.log([0.4, 0.1, 0.05, 0.05]))  # 0.4 unseen, lead 0.3
    assert not at.sfc_immune(np.log([0.5, 0.5]))  # a tie is never decided


# ---- PMI


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.floats(-20, -0.1), st.integers(0, 10_000))
def test_pmi_with_an_indifferent_premise_is_plain_scoring(m, level, seed):
    logp = np.log(np.random.default_rng(seed).dirichlet(np.ones(m)))
    scores = at.pmi_dc(logp, np.full(m, level))
    assert scores.argmax() == logp.argmax()
    torch.testing.assert_close(scores - scores[0], torch.tensor(logp - logp[0]))


def test_pmi_undoes_a_prior_over_wordings():
    likelihood, prior = np.array([0.2, 0.5, 0.3]), np.array([0.7, 0.1, 0.2])
    posterior = likelihood * prior
    scores = at.pmi_dc(np.log(posterior / posterior.sum()), np.log(prior))
    assert np.log(posterior).argmax() == 0 and scores.argmax() == 1


# ---- prompts and the whole evaluation

ITEM = at.Item("the sky is", ("red", "blue", "green"), 1)
DEMO = at.Item("the red is", ("green", "red", "sky"), 0)


def test_prompts_read_as_in_the_paper():
    none, text, letters = (at.FORMATS[name] for name in ("none", "string", "enumerated"))
    assert none.prompt(ITEM, [DEMO]) == "the red is green\nthe sky is"
    assert text.prompt(ITEM, [DEMO]) == (
        "question: the red is\nanswer choices: green, red, or sky\nThe correct answer is: green\n\n"
        "question: the sky is\nanswer choices: red, blue, or green\nThe correct answer is:"
    )
    assert letters.prompt(ITEM, [DEMO], label=True) == (
        "Question: the red is\nChoices:\n A: green\n B: red\n C: sky\nAnswer: A\n\n"
        "Question: the sky is\nChoices:\n A: red\n B: blue\n C: green\nAnswer:"
    )


@pytest.mark.parametrize(
    ("fmt", "scorer"), [("none", "sequence"), ("string", "pmi_dc"), ("enumerated", "label")]
)
@pytest.mark.parametrize("shots", [0, 1])
def test_evaluate_agrees_with_its_parts(fmt, scorer, shots):
    lm = at.ScoringLM(tiny().eval(), Words())
    items = [ITEM, at.Item("the green is", ("sky", "blue", "red"), 2)]
    frame = at.evaluate(lm, items, fmt, shots, scorer, demos=[DEMO], premise="answer:")
    for row, item in zip(frame.to_dict("records"), items, strict=True):
        prompt = at.FORMATS[fmt].prompt(item, [DEMO][:shots], label=scorer == "label")
        options = ["A", "B", "C"] if scorer == "label" else list(item.choices)
        logp = at.option_logprobs(lm, prompt, options)
        score = logp - at.option_logprobs(lm, "answer:", options) if scorer == "pmi_dc" else logp
        assert row["prediction"] == int(score.argmax())
        assert row["correct"] == (row["prediction"] == item.answer)
        assert row["pmv"] == pytest.approx(logp.exp().sum().item())
        assert row["first"] - row["second"] == pytest.approx(
            float(np.ptp(np.sort(logp.exp())[-2:])), abs=1e-12
        )


def test_correlation_over_prompts():
    assert at.pmv_accuracy_correlation([0.1, 0.5, 0.9], [0.2, 0.4, 0.6]) == pytest.approx(1)
    x, y = np.random.default_rng(0).random((2, 12))
    assert at.pmv_accuracy_correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert math.isnan(at.pmv_accuracy_correlation([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]))


# ---- bad input

LM = at.ScoringLM(Markov(len(WORDS)), Words())


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: at.option_logprobs(LM, "is", []), "options"),
        (lambda: at.option_logprobs(LM, "is", ["red", ""]), "options"),
        (lambda: at.option_logprobs(LM, "", ["red"]), "prompt"),
        (lambda: at.score_items(LM, [], []), "prompts"),
        (lambda: at.score_items(LM, ["is"], [["a"], ["b"]]), "prompts"),
        (lambda: at.score_items(LM, ["is", "is"], [["red"], ["red", "sky"]]), "options"),
        (lambda: at.pmv([]), "logp"),
        (lambda: at.pmv([0.5, -1.0]), "logp"),
        (lambda: at.pmv([float("nan"), -1.0]), "logp"),
        (lambda: at.sfc_immune([-1.0]), "logp"),
        (lambda: at.pmi_dc([-1.0, -2.0], [-1.0]), "logp0"),
        (lambda: at.pmi_dc([-1.0, -2.0], [-1.0, -math.inf]), "logp0"),
        (lambda: at.evaluate(LM, [], "none"), "items"),
        (lambda: at.evaluate(LM, [ITEM], "verse"), "fmt"),
        (lambda: at.evaluate(LM, [ITEM], "none", scorer="label"), "scorer"),
        (lambda: at.evaluate(LM, [ITEM], "none", 2, demos=[DEMO]), "demos"),
        (lambda: at.Item("x", ("a",), 0), "choices"),
        (lambda: at.Item("x", ("a", "b"), 2), "answer"),
        (lambda: at.pmv_accuracy_correlation([0.1, 0.2], [0.1, 0.2]), "pmv"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_a_model_that_returns_nan_is_refused():
    lm = at.ScoringLM(lambda ids: torch.full((*ids.shape, len(WORDS)), torch.nan), Words())
    with pytest.raises(ValueError, match="NaN"):
        at.option_logprobs(lm, "is", ["red"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_the_gpu():
    there = at.ScoringLM(tiny().eval().cuda(), Words())
    here = at.ScoringLM(tiny().eval(), Words())
    torch.testing.assert_close(
        at.option_logprobs(there, "is", ["red"]), at.option_logprobs(here, "is", ["red"])
    )


# ---- the experiment


def test_the_world_asks_only_what_it_says():
    world, words = study.World(3), study.WordTokenizer()
    assert not set(world.asked) & set(world.held_out)
    owner = {
        w: (r, i) for r, things in study.THINGS.items() for i, t in enumerate(things) for w in t
    }
    assert len(owner) == 72
    for fact in world.facts:
        item = world.item(fact)
        things = [owner[choice] for choice in item.choices]
        assert len(set(things)) == 4
        assert things[item.answer] == (fact[1], world.truth[fact])
    asked = {f"{name} {relation} ?" for name, relation in world.asked}
    for _ in range(300):
        plain, question = world.sentence(), world.question()
        assert " ?" not in plain[1:]
        assert question[: question.index("?") + 1] in asked
        assert words.decode(words.encode(question)) == question


def test_wordings_have_their_shares():
    world = study.World(0)
    found = Counter(world.wording("eats", 2) for _ in range(4000))
    shares = sorted(count / 4000 for count in found.values())
    np.testing.assert_allclose(shares, [0.1, 0.3, 0.6], atol=0.03)


def test_of_questions_only_the_answers_are_learnt():
    inputs, targets = study.World(1).rows("questions", 20, 40)
    learnt = targets >= 0
    answer = study.WordTokenizer.index["answer"]
    assert learnt[inputs == answer].all()
    shifted = torch.nn.functional.pad(inputs, (1, 0))[:, :-1]
    assert (learnt == ((inputs == answer) | (shifted == answer))).all()
    inputs, targets = study.World(1).rows("plain", 20, 40)
    assert (targets[:, :-1] == inputs[:, 1:]).all()


def test_slack_is_positive_exactly_when_both_parts_of_the_claim_hold():
    rng = np.random.default_rng(0)
    rows = [
        {"mixture": m, "seed": s, "format": f, "scorer": c, "shots": k,
         "accuracy": rng.random(), "pmv": rng.random(), "immune": 0.0}
        for m in study.MIXTURES for s in range(40) for f, c in study.SCORED for k in (0, 1)
    ]  # fmt: skip
    frame = study.claims(study.pd.DataFrame(rows))
    rise = frame["pmv_shown"] - frame["pmv_hidden"]
    gain = frame["accuracy_shown"] - frame["accuracy_hidden"]
    assert ((frame["slack"] > 0) == ((rise > study.RISE) & (gain < study.GAIN))).all()
    assert 0 < (frame["slack"] > 0).sum() < 40


def test_a_tiny_run_fills_the_table_and_the_explorer():
    rows = [
        {"mixture": m, "seed": 0, **study.measure(0, m, steps=2, items=4, d=8, shots=(0, 1))}
        for m in study.MIXTURES
    ]
    table = study.prompts(study.pd.DataFrame(rows), shots=(0, 1))
    assert len(table) == 3 * len(study.SCORED) * 2
    assert table[["accuracy", "pmv", "immune"]].stack().between(0, 1).all()
    assert len(study.claims(table)) == 1
    explorer = explore_prompts(table[table["scorer"] != "pmi_dc"])
    chosen = table[(table["mixture"] == "plain") & (table["shots"] == 1)]
    np.testing.assert_allclose(explorer.result(shots=1)["x0"], chosen["pmv"][:3])
    explorer.export()
    with pytest.raises(ValueError, match="accuracy"):
        explore_prompts(table.drop(columns="accuracy"))


# ---- the explorer


def test_the_explorer_starts_at_the_readers_own_question():
    explorer = explore_choices(np.log([0.1, 0.5, 0.2]))
    assert explorer.state == {"first": 0.5, "second": 0.2, "unseen": 0.2}
    assert explorer.result()["verdict"] == "cannot change"
    assert explorer.result(unseen=0.3)["verdict"] == "could change"
    with pytest.raises(ValueError, match="logp"):
        explore_choices([0.0, -0.1])


def test_the_exported_formula_computes_what_python_computes():
    explorer = explore_choices()
    states = [
        {"first": a, "second": b, "unseen": c}
        for a, b, c in itertools.product((0.0, 0.11, 0.5, 1.0), (0.0, 0.2, 1.0), (0.0, 0.3, 1.0))
        if a + b + c > 0
    ]
    for state, theirs in zip(states, js.formula(explorer, states), strict=True):
        ours = explorer.result(**state)
        keys = explorer.keys()
        for key in keys:
            if isinstance(ours[key], str):
                assert ours[key] == theirs[key]
            elif np.asarray(ours[key]).dtype != object:
                np.testing.assert_allclose(ours[key], theirs[key], atol=1e-12)
