"""Asymptotes, ensembles, tuning and stacked training against closed forms and other libraries."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit
from sklearn.linear_model import Ridge

from tests.plots import js
from workbench import lab
from workbench.lab import models
from workbench.scaling_laws import figures_infinite_compute as figures
from workbench.scaling_laws import infinite_compute as ic
from workbench.scaling_laws.experiments import infinite_compute as study
from workbench.scaling_laws.experiments import infinite_compute_members as members
from workbench.scaling_laws.fit import fit_power

SIZES = np.array([244.0, 872.0, 2534.0, 7224.0])
SMALL = members.Shape(8, ctx=8, vocab=11)


def random_logits(k=4, n=6, v=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(k, n, v, generator=generator, dtype=torch.float64)
    return scores, torch.randint(0, v, (n,), generator=generator)


# --- asymptotes


@given(
    E=st.floats(0.5, 4), A=st.floats(0.01, 3), alpha=st.floats(0.3, 3), unit=st.floats(1e-3, 1e9)
)
@settings(max_examples=25, deadline=None)
def test_exact_curves_give_their_law_back_in_any_unit(E, A, alpha, unit):
    x = np.array([1.0, 2.0, 3.0, 5.0])
    law = ic.power_asymptote(x * unit, E + A * x**-alpha)
    assert pytest.approx(E, rel=1e-5) == law.E
    assert law(x * unit) == pytest.approx(E + A * x**-alpha, abs=1e-7)


def test_noisy_fits_are_those_of_scipy_and_of_fit_law():
    rng = np.random.default_rng(0)
    y = 2.6 + 8 * SIZES**-0.6 + 0.01 * rng.standard_normal((8, 4))
    law = ic.power_asymptote(SIZES, y)
    for i, curve in enumerate(y):
        found, _ = curve_fit(
            lambda x, A, alpha, E: E + A * x**-alpha, SIZES, curve, p0=(8, 0.6, 2.6),
            bounds=([0, 0.2, 0], [np.inf, 4, np.inf]), xtol=1e-13, ftol=1e-13, max_nfev=20_000,
        )  # fmt: skip
        rms = np.sqrt(np.mean((curve - (found[2] + found[0] * SIZES ** -found[1])) ** 2))
        assert law.rms[i] <= rms + 1e-9
        assert law.E[i] == pytest.approx(found[2], abs=2e-4)
    family = fit_power(SIZES, y[0], objective="lsq", bounds={"alpha": ic.EXPONENTS}, quiet=True)
    assert law.E[0] == pytest.approx(family.params["E"], abs=1e-6)


def test_curves_are_independent_and_keep_their_shape():
    y = 2 + SIZES ** -np.array([[0.4], [0.8]])
    both = ic.power_asymptote(SIZES, y[:, None])
    assert both.E.shape == (2, 1)
    assert both.E[1, 0] == pytest.approx(float(ic.power_asymptote(SIZES, y[1]).E), abs=1e-9)


def test_a_curve_that_rises_is_given_its_mean():
    law = ic.power_asymptote([1, 2, 3, 4], [2.0, 2.1, 2.2, 2.3])
    assert pytest.approx(2.15, abs=1e-6) == law.E
    assert law.A < 1e-6


def test_the_double_limit_of_an_exact_table_is_its_floor():
    k = np.arange(1, 6)
    table = 2.5 + 3 * SIZES[:, None] ** -0.5 + (0.1 + SIZES[:, None] ** -0.3) / k
    joint = ic.joint_asymptote(SIZES, table)
    assert pytest.approx(2.5, abs=1e-5) == joint.E
    assert joint.members.alpha == pytest.approx(np.ones(4), abs=1e-5)
    assert pytest.approx(2.5 + 3 * SIZES**-0.5, abs=1e-6) == joint.members.E


def test_data_efficiency_of_the_recipe_itself_is_one():
    law = ic.power_asymptote([1, 2, 4, 8], 2 + 1.5 * np.array([1, 2, 4, 8.0]) ** -0.4)
    assert ic.data_efficiency(law(2e3), 2e3, law) == pytest.approx(1)
    assert ic.data_efficiency(law(6e3), 2e3, law) == pytest.approx(3)
    assert np.isinf(ic.data_efficiency(law.E - 1e-9, 2e3, law))


def test_published_asymptotes_are_in_the_order_of_the_abstract():
    p = ic.PUBLISHED
    assert p["joint"] < p["ensemble"] < p["regularised"]


# --- ensembles


def test_squared_loss_of_k_random_feature_ridges_is_bias_plus_variance_over_k():
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((40, 5)), rng.standard_normal((300, 5))
    target = lambda q: np.sin(2 * q[:, 0]) + q[:, 1]  # noqa: E731
    predictions = []
    for _ in range(8):
        w = rng.standard_normal((5, 60))
        ridge = Ridge(alpha=0.1).fit(np.tanh(x @ w), target(x))
        predictions.append(ridge.predict(np.tanh(z @ w)))
    f = np.array(predictions)
    risk = [
        np.mean([np.mean((f[list(c)].mean(0) - target(z)) ** 2)
                 for c in itertools.combinations(range(8), k)])
        for k in range(1, 9)
    ]  # fmt: skip
    law = ic.power_asymptote(range(1, 9), risk)
    assert law.alpha == pytest.approx(1, abs=1e-4)
    assert pytest.approx(f.var(0, ddof=1).mean(), rel=1e-4) == law.A


@pytest.mark.parametrize("how", ic.AVERAGES)
def test_ensemble_losses_are_means_over_all_choices(how):
    scores, labels = random_logits()
    found = ic.ensemble_losses(scores, labels, how)
    for k in range(1, 5):
        each = []
        for chosen in itertools.combinations(range(4), k):
            p = scores[list(chosen)].softmax(-1)
            q = p.mean(0) if how == "probs" else p.log().mean(0).exp()
            q = q / q.sum(-1, keepdim=True)
            each.append(float(-q[range(6), labels].log().mean()))
        assert float(found[k - 1]) == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.parametrize("how", ic.AVERAGES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_more_members_are_never_worse_on_average(how, seed):
    found = ic.ensemble_losses(*random_logits(seed=seed), how)
    assert (found.diff() <= 1e-12).all()


def test_averaging_logits_gains_what_members_disagree():
    scores, labels = random_logits(seed=3)
    one, *_, four = ic.ensemble_losses(scores, labels)
    assert float(one - four) == pytest.approx(float(ic.disagreement(scores).mean()), abs=1e-12)
    together = F.kl_div(scores.log_softmax(-1), ic.average(scores).expand_as(scores),
                        reduction="none", log_target=True).sum(-1).mean(0)  # fmt: skip
    torch.testing.assert_close(ic.disagreement(scores), together)


def test_equal_members_are_one_and_offsets_of_logits_do_not_matter():
    scores, labels = random_logits(k=1)
    same = scores.expand(3, -1, -1) + torch.tensor([0.0, 5.0, -7.0])[:, None, None]
    found = ic.ensemble_losses(same, labels)
    torch.testing.assert_close(found, F.cross_entropy(scores[0], labels).expand(3))
    assert float(ic.disagreement(same).abs().max()) < 1e-12


def test_the_average_passes_gradcheck():
    scores = random_logits(k=2, n=2, v=3)[0].requires_grad_()
    for how in ic.AVERAGES:
        assert torch.autograd.gradcheck(lambda s, how=how: ic.average(s, how), scores)


def test_written_sequences_follow_the_averaged_prediction():
    table = torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]])  # two members, whatever came before

    def member(row):
        return lambda tokens: row.expand(*tokens.shape, 3)

    start = torch.zeros(4000, 1, dtype=torch.long)
    text = ic.distill_sequences(
        [member(row) for row in table], start, 4, generator=torch.Generator().manual_seed(0)
    )
    assert text.shape == (4000, 4)
    expected = table.log_softmax(-1).mean(0).softmax(-1)
    seen = torch.bincount(text[:, 1:].flatten(), minlength=3) / text[:, 1:].numel()
    torch.testing.assert_close(seen, expected, atol=0.02, rtol=0)


# --- tuning


def test_tuning_ends_where_no_neighbour_is_better_and_asks_once():
    asked = []

    def loss(epochs, decay):
        asked.append((epochs, decay))
        return (np.log2(epochs) - 4 - 0.5 * np.log10(decay)) ** 2 + (np.log10(decay) - 0.5) ** 2

    grid = {"epochs": (4, 8, 16, 32, 64), "decay": (0.1, 1.0, 3.0, 10.0)}
    found = ic.tune_recipe(loss, grid)
    values = [loss(e, w) for e in grid["epochs"] for w in grid["decay"]]
    assert found.loss == min(values) and found.recipe == {"epochs": 16, "decay": 3.0}
    assert found.at_edge == () and len(found.tried) == len(set(asked[: len(found.tried)]))
    assert ic.tune_recipe(lambda epochs: -epochs, {"epochs": (1, 2, 3)}).at_edge == ("epochs",)


# --- stacked members


def test_stacked_members_answer_like_gpt():
    shape = members.Shape(8, layers=2, heads=2, ctx=6, vocab=11)
    state = members.stack(shape, (3, 4))
    tokens = torch.randint(0, 11, (2, 5, 6), generator=torch.Generator().manual_seed(0))
    found = members.logits(shape, state, tokens)
    for i, model in enumerate(members.unstack(shape, state)):
        torch.testing.assert_close(found[i], model(tokens[i]), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in model.blocks.parameters()) == shape.N


def by_hand(shape, data, seed, epochs, decay, lr, batch):
    """One GPT, torch's own AdamW, and the schedule written out."""
    with lab.seeded(seed):
        model = models.GPT(shape.vocab, shape.d, shape.layers, shape.heads, shape.ctx)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr, betas=members.BETAS)
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(data)) for _ in range(epochs)])
    steps = len(order) // batch
    fall = steps - round(0.2 * steps)
    for i in range(steps):
        up, down = min(1, (i + 1) / max(2, steps // 10)), (steps - i) / (steps - fall)
        for group in groups:
            group["lr"] = lr * (up if i < fall else down)
        for group in optimizer.param_groups:
            group["lr"] = groups[0]["lr"]
        rows = data[order[i * batch : (i + 1) * batch]]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_stacked_training_is_torchs_adamw_on_each_member():
    data = torch.randint(0, 11, (2, 12, 9), generator=torch.Generator().manual_seed(1))
    decay, lr = (0.1, 8.0), 0.01
    ends = members.train(SMALL, data, seeds=(5, 6), budgets=(4,), decay=decay, lr=lr, batch=4)
    for i, model in enumerate(members.unstack(SMALL, ends[0])):
        reference = by_hand(SMALL, data[i], 5 + i, 4, decay[i], lr, 4)
        for name, expected in reference.state_dict().items():
            torch.testing.assert_close(
                model.state_dict()[name], expected, atol=2e-4, rtol=2e-3, msg=name
            )


def test_a_longer_run_leaves_the_shorter_ones_as_they_are():
    data = torch.randint(0, 11, (1, 8, 9), generator=torch.Generator().manual_seed(1))
    options = {"seeds": (0,), "decay": (1.0,), "lr": 0.01, "batch": 4}
    short, long = members.train(SMALL, data, budgets=(4, 8), **options)
    again = members.train(SMALL, data, budgets=(4, 16), **options)[0]
    for name, values in short.items():
        torch.testing.assert_close(values, again[name])
    assert not torch.equal(short["embed.weight"], long["embed.weight"])


def test_strong_decay_shrinks_the_matrices_and_spares_the_norms():
    data = torch.randint(0, 11, (1, 8, 9), generator=torch.Generator().manual_seed(1))
    pair = members.train(
        SMALL, data.expand(2, -1, -1), seeds=(0, 0), budgets=(8,), decay=(0.0, 30.0), lr=0.02,
        batch=4,
    )[0]  # fmt: skip
    size = pair["blocks.0.mlp.0.weight"].pow(2).sum((1, 2))
    assert size[1] < 0.3 * size[0]
    gain = pair["norm.weight"].mean(1)
    assert gain[1] > 0.5 * gain[0]


# --- the experiment


def losses_table(slices=5, seed=0):
    """Recipes with a known best cell per size: epochs 16; decay 1 for one, 0.1 for ensembles."""
    rng = np.random.default_rng(seed)
    k = np.arange(1, 5)
    e, w = np.log2([8, 16, 32]), np.log10([0.1, 1.0, 10.0])
    bowl = (e[:, None] - 4) ** 2 / 10 + (w - 0.0) ** 2 / 10
    spread = 0.02 + 0.4 * 10.0 ** -(w + 1)
    base = 2.5 + 5 * SIZES[:, None, None] ** -0.5 + bowl
    full = base[..., None] + (spread[:, None] / k)[None, None]
    axes = {"epochs": np.array([8, 16, 32]), "decays": np.array([0.1, 1.0, 10.0])}
    rows = []
    for s in range(slices):
        shift = 0.2 * rng.standard_normal()
        rows.append({"seed": s, "losses": full + shift, "N": SIZES, "shift": shift, **axes})
    return pd.DataFrame(rows)


def test_recipes_are_chosen_on_the_other_slices_only():
    frame = losses_table()
    judged = study.judge(frame)
    assert all((e == 16).all() for e in judged.epochs_regularised)
    changed = frame.copy()
    wild = frame.losses[0].copy()
    wild[:, 2, 2] = 0.1
    changed.at[0, "losses"] = wild
    again = study.judge(changed)
    assert (again.epochs_regularised[0] == 16).all()
    assert (again.epochs_regularised[1] == 32).all()


def test_the_judged_asymptotes_are_the_floors_of_the_table():
    frame = losses_table()
    judged = study.judge(frame)
    floor = 2.5 + frame["shift"].to_numpy()
    assert judged.alpha_K.to_numpy() == pytest.approx(np.ones(5), abs=1e-4)
    assert judged.regularised.to_numpy() == pytest.approx(floor + 0.06, abs=1e-4)
    assert judged.joint.to_numpy() == pytest.approx(floor, abs=1e-3)
    assert (judged.joint < judged.regularised).all()
    assert study.most_common(judged, "regularised") == (16, 1.0)
    small = 2.5 + 5 * SIZES[1] ** -0.5 + 0.06 / 3 + frame["shift"].to_numpy()
    assert judged.three_small.to_numpy() == pytest.approx(small)


def test_larger_sizes_enter_the_regularised_recipe_alone():
    frame = losses_table()
    rest = frame.assign(
        losses=[t[3:] for t in frame.losses], N=[SIZES[3:]] * 5
    )  # as if the largest size had been run apart
    first = frame.assign(losses=[t[:3] for t in frame.losses], N=[SIZES[:3]] * 5)
    apart, whole = study.judge(first, rest), study.judge(frame)
    np.testing.assert_allclose(apart.regularised, whole.regularised)
    np.testing.assert_allclose(np.stack(apart.sizes), np.tile(SIZES, (5, 1)))
    assert len(apart.limit_N[0]) == 3


def test_the_experiment_runs_and_repeats():
    options = {"tokens": 512, "widths": (4, 8), "budgets": (2, 4), "decays": (0.1, 3.0)}
    options |= {"members": 2, "held_out": 16}
    one, two = study.fixed_data(0, **options), study.fixed_data(0, **options)
    assert one["losses"].shape == (2, 2, 2, 2)
    np.testing.assert_array_equal(one["losses"], two["losses"])
    assert (np.diff(one["losses"], axis=-1) <= 1e-6).all()


def test_slices_are_nested_and_printable():
    text, _ = study.split_text()
    short, long = study.windows(text, 5, 33, 7), study.windows(text, 9, 33, 7)
    torch.testing.assert_close(short, long[:5])
    assert int(long.max()) < 96
    raw = torch.tensor([10, 32, 126, 9, 200], dtype=torch.uint8)
    assert study.alphabet(raw).tolist() == [95, 0, 94, 0, 0]


# --- explorer and bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ic.power_asymptote([1, 2, 2], [3.0, 2, 2]), "three different"),
        (lambda: ic.power_asymptote([1, 2, 3], [3.0, 2]), "y: expected 3"),
        (lambda: ic.power_asymptote([1, 2, 3], [3.0, 2, -1]), "positive"),
        (lambda: ic.power_asymptote([1, 2, 3], [3.0, 2, 1], alpha=(0, 1)), "alpha"),
        (lambda: ic.joint_asymptote(SIZES, SIZES), "losses"),
        (lambda: ic.average(random_logits()[0], "votes"), "how"),
        (lambda: ic.ensemble_losses(random_logits()[0], torch.zeros(3, dtype=torch.long)), "6|3"),
        (lambda: ic.distill_sequences([], torch.zeros(2, 3, dtype=torch.long), 3), "length"),
        (lambda: ic.tune_recipe(lambda: 0.0, {}), "grid"),
        (lambda: ic.tune_recipe(lambda a: 0.0, {"a": (1, 2)}, {"a": 3}), "start"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_exported_explorer_is_the_live_one():
    explorer = figures.explore_recipes(losses_table())
    assert js.check_formula(explorer, rtol=1e-6) > 20
    explorer.result()
    assert explorer.seconds < 0.05
    assert len(json.dumps(explorer.export())) < 40_000
