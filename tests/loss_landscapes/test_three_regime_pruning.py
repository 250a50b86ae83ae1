"""Train, prune, retrain: masks against torch, training against torch.optim, rules against planted
worlds."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn.utils import prune

from tests.plots import js
from workbench import lab
from workbench.lab.members import member, stack
from workbench.lab.models import CNN, MLP
from workbench.loss_landscapes import figures_three_regime_pruning as figures
from workbench.loss_landscapes.experiments import three_regime_pruning as study
from workbench.loss_landscapes.geometry import SAM
from workbench.loss_landscapes.members import profiles, train_members
from workbench.loss_landscapes.three_regime_pruning import (
    Recipe,
    advice,
    border,
    border_table,
    choose_dense,
    hottest_first,
    magnitude_masks,
    mode_connectivity,
    output_cka,
    phase_grid,
    prunable,
    regime,
    retrain,
    score_advice,
    signed_connectivity,
    train_dense,
)
from workbench.plots import export

RECIPE = Recipe(epochs=2, batch_size=8, lr=0.1)


def blobs(n=36, shape=(6,), dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    x = torch.randn(n, *shape, generator=g, dtype=dtype) + y.view(-1, *[1] * len(shape))
    return x, y


def net(seed=0, kind="mlp"):
    with lab.seeded(seed):
        return MLP([6, 8, 7, 3]) if kind == "mlp" else CNN((4, 5), 3)


# --- masks


@settings(max_examples=25, deadline=None)
@given(density=st.floats(0.01, 1), seed=st.integers(0, 5))
def test_masks_are_those_of_torch(density, seed):
    model = net(seed, "cnn")
    names = prunable(model, head=True)
    own = {mode: magnitude_masks(model, density, mode=mode, names=names)
           for mode in ("uniform", "global")}  # fmt: skip
    modules = [(model.get_submodule(name.removesuffix(".weight")), "weight") for name in names]
    together = copy.deepcopy(model)
    for (module, _), name in zip(modules, names, strict=True):
        prune.l1_unstructured(module, "weight", amount=1 - density)
        assert torch.equal(module.weight_mask.bool(), own["uniform"][name])
        n = module.weight_mask.numel()
        assert own["uniform"][name].sum() == n - round((1 - density) * n)
    pairs = [(together.get_submodule(name.removesuffix(".weight")), "weight") for name in names]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=1 - density)
    for (module, _), name in zip(pairs, names, strict=True):
        assert torch.equal(module.weight_mask.bool(), own["global"][name])


def test_only_weights_before_the_last_layer_are_pruned():
    assert prunable(net()) == ["body.1.weight", "body.3.weight"]
    assert prunable(net(kind="cnn")) == ["body.0.weight", "body.4.weight"]


# --- training many at once


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("rho", [0.0, 0.2])
def test_members_are_trained_as_torch_would_train_each_alone(kind, rho):
    shape = (6,) if kind == "mlp" else (1, 4, 4)
    x, y = blobs(20, shape, torch.float64)
    models, seeds = [net(i, kind).double() for i in range(3)], [5, 6, 5]
    masks = [magnitude_masks(m, 0.4) for m in models]
    ended, _ = train_members(
        models[0], stack([m.state_dict() for m in models]), (x, y), seeds, RECIPE,
        masks={name: torch.stack([mask[name] for mask in masks]) for name in masks[0]},
        rho=torch.full((3,), rho) if rho else None,
    )  # fmt: skip
    for i, model in enumerate(models):
        alone(model, masks[i], x, y, seeds[i], rho)
        for name, value in model.state_dict().items():
            if rho and ("running" in name or "num_batches" in name):
                continue  # the reference optimizer updates them in both passes
            found = ended[name][i]
            assert torch.allclose(found, value.to(found), atol=1e-9), name
            if name in masks[i]:
                assert (found[~masks[i][name]] == 0).all()


def alone(model, mask, x, y, seed, rho):
    """One network by torch's own tools: prune, an optimizer, a scheduler."""
    for name in mask:
        module = model.get_submodule(name.removesuffix(".weight"))
        prune.custom_from_mask(module, "weight", mask[name].double())
    options = {"lr": RECIPE.lr, "momentum": 0.9, "weight_decay": 1e-4}
    if rho:
        optimizer = SAM(model.parameters(), rho=rho, **options)
    else:
        optimizer = torch.optim.SGD(model.parameters(), **options)
    total = 2 * math.ceil(len(x) / 8)
    g, done = torch.Generator().manual_seed(seed), 0
    model.train()
    for _ in range(2):
        for rows in torch.randperm(len(x), generator=g).split(8):

            def closure(rows=rows):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
                loss.backward()
                return loss

            rate = RECIPE.lr * 0.1 ** ((done >= total / 2) + (done >= 0.75 * total))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step(closure)
            done += 1
    for name in mask:
        prune.remove(model.get_submodule(name.removesuffix(".weight")), "weight")


def test_retraining_keeps_the_mask_and_the_models():
    model, data = net(kind="cnn"), blobs(30, (1, 4, 4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    masks = magnitude_masks(model, 0.3)
    a, b, c = retrain(model, masks, data, (0, 1, 0), RECIPE)
    for name, mask in masks.items():
        weights = a.get_parameter(name)
        assert (weights[~mask] == 0).all() and (weights[mask] != 0).all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, c.state_dict()[k]) for k, v in a.state_dict().items())
    assert not torch.equal(a.head.weight, b.head.weight)


def test_without_pruning_or_learning_a_pair_is_one_network():
    model, data = net(), blobs()
    frozen = Recipe(epochs=1, lr=0.0)
    a, b = retrain(model, magnitude_masks(model, 1.0), data, (0, 1), frozen)
    assert mode_connectivity(a, b, data).connectivity == 0
    assert output_cka(a, b, data[0]) == pytest.approx(1)
    assert regime(0.0, 1.0) == "II-B"


# --- what is measured


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_profiles_of_many_are_those_of_each_pair(kind):
    data = blobs(40, (6,) if kind == "mlp" else (1, 4, 4))
    models = [net(i, kind) for i in range(4)]
    a, b = (stack([m.state_dict() for m in part]) for part in (models[:2], models[2:]))
    found = profiles(models[0], a, b, data, points=5)
    for i in range(2):
        path = mode_connectivity(models[i], models[i + 2], data, points=5)
        np.testing.assert_allclose(found[i], path.values, atol=1e-12)
        assert signed_connectivity(found[i]) == pytest.approx(path.connectivity)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=4))
def test_connectivity_is_the_papers_formula(rows):
    for row, found in zip(rows, signed_connectivity(rows), strict=True):
        mean = (row[0] + row[-1]) / 2
        assert abs(found) == pytest.approx(max(abs(mean - e) for e in row))
        assert any(mean - e == found for e in row)
    with_equal_ends = [[r[0], *r[1:-1], r[0]] for r in rows]
    assert (signed_connectivity(with_equal_ends) == 0).all() == all(
        max(r) == min(r) for r in with_equal_ends
    )


def test_a_convex_loss_has_no_barrier():
    data = blobs(40, (6,), torch.float64)
    a, b = (nn.Linear(6, 3, dtype=torch.float64) for _ in range(2))
    path = mode_connectivity(a, b, data, metric=nn.functional.cross_entropy, points=21)
    assert path.barrier == pytest.approx(0, abs=1e-12)
    # mc counts the ends too, so that ends of unequal loss alone make it half their difference
    assert path.connectivity >= -abs(path.values[0] - path.values[-1]) / 2 - 1e-12


def test_cka_is_the_one_of_centred_gram_matrices():
    (x, _), a, b = blobs(), net(0), net(1)
    center = torch.eye(len(x)) - 1 / len(x)
    for softmax in (True, False):
        grams = []
        for model in (a, b):
            out = model(x).detach()
            out = out.softmax(1) if softmax else out
            grams.append(center @ out @ out.T @ center)
        expected = (grams[0] * grams[1]).sum() / grams[0].norm() / grams[1].norm()
        assert output_cka(a, b, x, softmax=softmax) == pytest.approx(float(expected), rel=1e-3)
    nn.init.zeros_(b.head.weight)
    assert output_cka(a, b, x) == 0


@pytest.mark.parametrize("knob, values", [("epochs", (2, 1)), ("batch_size", (12, 6)),
                                          ("rho", (0.0, 0.5))])  # fmt: skip
def test_a_phase_grid_holds_what_its_parts_measure(knob, values):
    model, data, more = net(), blobs(), blobs(seed=1)
    grid = phase_grid(model, data, more, densities=(0.5, 0.1), knob=knob, values=values,
                      recipe=RECIPE, seed=3, retrain_seeds=(0, 1), more={"again": more},
                      chunk=3)  # fmt: skip
    assert list(grid.values) == hottest_first(knob, values) and list(grid.densities) == [0.1, 0.5]
    assert list(grid.values) == ([0.5, 0.0] if knob == "rho" else sorted(values))
    dense = train_dense(model, data, knob=knob, values=values, recipe=RECIPE, seed=3)
    carrier = copy.deepcopy(model)
    carrier.load_state_dict(member(dense, 1))
    orders = [4 * 1_000_003 + s for s in (0, 1)]
    pair = retrain(carrier, magnitude_masks(carrier, 0.5), data, orders, RECIPE)
    path = mode_connectivity(*pair, data)
    np.testing.assert_allclose(grid.profiles[1, 1], path.values, atol=1e-12)
    assert grid.mc[1, 1] == pytest.approx(path.connectivity)
    assert grid.cka[1, 1] == pytest.approx(output_cka(*pair, data[0]), abs=1e-5)
    assert grid.cka_logits[1, 1] == pytest.approx(
        output_cka(*pair, data[0], softmax=False), abs=1e-5
    )
    wrong = [(m(more[0]).argmax(1) != more[1]).double().mean() for m in pair]
    assert grid.error[1, 1] == pytest.approx(float(sum(wrong) / 2)) == grid.more["again"][1, 1]
    wrong = (carrier.eval()(more[0]).argmax(1) != more[1]).double().mean()
    assert grid.dense[1] == pytest.approx(float(wrong)) == grid.more_dense["again"][1]


# --- regimes, borders, uses


def test_regimes_borders_and_choices():
    assert regime([-0.1, 0, 0, -0.02], [0.9, 0.9, 0.99, 0.95]).tolist() == [
        "I", "II-A", "II-B", "II-B"
    ]  # fmt: skip
    d = [0.01, 0.1, 1.0]
    mc = [[-0.06, 0.02, 0], [0, 0, 0], [-1, -1, -1], [0, -0.04, 0], [-0.02, 0, 0]]
    np.testing.assert_allclose(border(d, mc), [10**-1.5, 0.01, 1, 10**-0.5, 0.01])
    assert advice([-0.1, 0.0]).tolist() == [1, -1]
    assert choose_dense([-0.3, -0.1, -0.2], [1, 0, 0]) == 1
    assert choose_dense([[-0.3, 0.0, -0.01]], [[1, 0.4, 0.6]]).tolist() == [2]


@given(st.lists(st.floats(-1, 0.1), min_size=4, max_size=4), st.floats(0, 0.5))
def test_a_deeper_barrier_never_moves_the_border_down(mc, deeper):
    d = [0.01, 0.1, 0.5, 1.0]
    assert border(d, np.array(mc) - deeper) >= border(d, mc) - 1e-12


def test_border_table_is_a_t_interval_of_logarithms():
    rng = np.random.default_rng(0)
    mc = np.array([-0.5, -0.1, 0.0])[None, None] + 0.05 * rng.standard_normal((6, 2, 3))
    table = border_table([1, 2], [0.1, 0.3, 0.9], mc)
    logs = np.log(border([0.1, 0.3, 0.9], mc))
    for t in range(2):
        low, high = stats.t.interval(0.95, 5, logs[:, t].mean(), stats.sem(logs[:, t]))
        assert (table.low[t], table.high[t]) == pytest.approx((np.exp(low), np.exp(high)))


def test_advice_is_scored_against_the_two_neighbours():
    error = np.array([[3, 1, 5.0], [2, 2, 2], [1, 3, 5]])
    sign = np.array([[9, 9, 9], [1, 1, 0], [9, 9, 9]])
    right, after = score_advice(error, sign)
    assert right.tolist() == [[0, 1, 0.5]] and after.tolist() == [[3, 1, 2]]


def planted(seeds=4, temperatures=5, rng=None):
    """Below a density of 0.3 hotter is better and pairs are separated; above, the opposite."""
    rng = rng or np.random.default_rng(0)
    d = np.array([0.05, 0.1, 0.2, 0.5, 0.8])
    slope = np.where(d < 0.3, 0.02, -0.02)
    rows = []
    for seed in range(seeds):
        error = 0.3 + np.arange(temperatures)[:, None] * slope
        mc = np.tile(np.where(d < 0.3, -0.2, 0.0), (temperatures, 1))
        rows.append({
            "seed": seed, "knob": "epochs", "values": np.arange(temperatures), "densities": d,
            "mc": mc, "error": error + 1e-4 * rng.standard_normal(error.shape), "valid": error,
            "cka": np.full_like(mc, 0.5), "cka_logits": np.full_like(mc, 0.5),
            "profiles": rng.random((*mc.shape, 11)), "dense": error[:, -1],
            "dense_valid": error[:, -1], "train_error": error,
        })  # fmt: skip
    return pd.DataFrame(rows)


def test_in_the_papers_world_the_measured_rule_is_always_right():
    frame = planted()
    scores = study.held_out(frame)
    assert (scores[["right_mc", "right_border", "right_density"]] == 100).all(axis=None)
    assert (scores.right_constant == 60).all() and (scores.raise_constant == 100).all()
    assert (scores.error_mc < scores.error_stay).all()
    assert (study.best_values(frame)["rank"] > 0.8).all()
    chosen = study.choices(frame)
    assert (chosen.pruned <= chosen.dense + 1e-9).all() and (chosen.oracle <= chosen.mc).all()


def test_what_is_learned_does_not_see_the_held_out_seed():
    frame, changed = planted(), planted()
    changed.at[2, "error"] = 1 - changed.error[2]
    changed.at[2, "mc"] = -changed.mc[2] - 0.1
    keep = [f"raise_{rule}" for rule in study.RULES if rule != "mc"]
    before, after = study.held_out(frame).loc[2, keep], study.held_out(changed).loc[2, keep]
    assert before.equals(after)


def test_a_small_run_gives_frames_and_an_explorer_that_answers():
    run = lab.start("smoke", "cpu")
    small = {"epochs": 3, "train": 150, "width": 8, "batch_size": 50}
    frame = run.seeds(study.grid, n=2, values=(1, 2, 3), densities=(0.1, 0.5), **small)
    assert np.stack(frame.error).shape == (2, 3, 2) and np.stack(frame.valid).max() <= 1
    assert len(study.held_out(frame)) == 2
    explorer = figures.explore_regimes({"small": frame, "planted": planted()})
    assert js.check_formula(explorer) > 20
    assert explorer.seconds < 0.05
    assert len(export.dumps(explorer.export())) < 40_000
    explorer.close()


# --- bad input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: magnitude_masks(net(), 0.0), "density"),
        (lambda: magnitude_masks(net(), 0.5, mode="lamp"), "mode"),
        (lambda: magnitude_masks(net(), 0.5, names=["nothing"]), "names"),
        (lambda: prunable(nn.Linear(2, 2)), "no layer"),
        (lambda: train_dense(net(), blobs(), values=(1, 3), recipe=RECIPE), "stops"),
        (lambda: train_dense(net(), blobs(), values=(2, 2), recipe=RECIPE), "values"),
        (lambda: train_dense(net(), blobs(), knob="lr", values=(1,)), "knob"),
        (lambda: phase_grid(net(), blobs(), blobs(), densities=(0.5,), values=(1,),
                            retrain_seeds=(0,)), "retrain_seeds"),
        (lambda: Recipe(epochs=0), "epochs"),
        (lambda: Recipe(lr=-1.0), "lr"),
        (lambda: border([0.5, 0.1], [[0, 0]]), "ascending"),
        (lambda: score_advice(np.ones((2, 2)), np.ones((2, 2))), "T >= 3"),
        (lambda: train_members(net(), stack([net().state_dict()]), blobs(), (0, 1)),
         "seeds"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
