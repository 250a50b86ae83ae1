"""Soups against torch's averages, explicit loops, closed forms and the released results."""

import json
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from tests.plots import js
from workbench.lab import models, seeded
from workbench.loss_landscapes import figures_model_soups as figures
from workbench.loss_landscapes.experiments import model_soups as study
from workbench.loss_landscapes.geometry import Objective
from workbench.loss_landscapes.model_soups import (
    accuracy_on,
    angles,
    average,
    greedy_soup,
    learned_soup,
    logit_ensemble,
    soup_gap,
    soup_model,
    triangle,
    uniform_soup,
)
from workbench.plots.export import dumps

X = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, :3].sum(1) > 0).long() + (X[:, 3] > 0.5).long()


def make(seed, dtype=torch.float32, act="gelu", sizes=(6, 9, 8, 3)):
    with seeded(seed):
        return models.MLP(sizes, act=act).to(dtype).eval()


def states(count, **options):
    return [make(seed, **options).state_dict() for seed in range(count)]


def near(start, size, seed):
    source = torch.Generator().manual_seed(seed)
    return {
        k: v + size * torch.randn(v.shape, generator=source, dtype=v.dtype)
        for k, v in start.items()
    }


# --- averages


def test_uniform_soup_is_torchs_averaged_model():
    members = [make(seed) for seed in range(4)]
    mean = AveragedModel(members[0])
    for member in members:
        mean.update_parameters(member)
    soup = uniform_soup(m.state_dict() for m in members)
    for name, tensor in mean.module.state_dict().items():
        torch.testing.assert_close(soup[name], tensor)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_average_is_the_explicit_sum(weights):
    several = states(len(weights), dtype=torch.float64, sizes=(3, 2))
    soup = average(several, weights)
    for name in soup:
        expected = sum(w * s[name].numpy() for w, s in zip(weights, several, strict=True))
        np.testing.assert_allclose(soup[name].numpy(), expected, atol=1e-12)


def test_one_state_and_equal_states_are_left_alone():
    (one,) = states(1)
    for soup in (uniform_soup([one]), average([one] * 4), greedy_soup([one], lambda s: 1.0).state):
        for name, tensor in soup.items():
            torch.testing.assert_close(tensor, one[name], rtol=1e-6, atol=0)
            assert tensor.data_ptr() != one[name].data_ptr()


def test_half_precision_is_summed_in_float32():
    size = 1e-3
    several = [{"w": torch.tensor([1.0 + size * (i % 2)], dtype=torch.bfloat16)} for i in range(64)]
    exact = torch.stack([s["w"].double() for s in several]).mean().bfloat16()
    soup = uniform_soup(several)["w"]
    assert soup.dtype == torch.bfloat16 and soup == exact
    pot = greedy_soup(several, lambda s: 0.0, ties=True)
    assert len(pot.kept) == 64 and pot.state["w"] == exact


def test_counters_are_not_averaged_and_statistics_are_re_estimated():
    with seeded(0):
        nets = [models.CNN((4, 6)) for _ in range(3)]
        x = torch.rand(64, 1, 8, 8)
    for k, net in enumerate(nets):
        net.train()
        for _ in range(k + 2):
            net(x * (k + 1))
    soup = uniform_soup([net.state_dict() for net in nets])
    assert soup["body.1.num_batches_tracked"].dtype == torch.int64
    assert int(soup["body.1.num_batches_tracked"]) == 2
    served = soup_model(nets[0], soup, x)
    with torch.no_grad():
        seen = served.body[0](x)
    layer = served.body[1]
    torch.testing.assert_close(layer.running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, seen.transpose(0, 1).flatten(1).var(1))
    averaged = soup_model(nets[0], soup)
    assert not torch.allclose(averaged.body[1].running_mean, layer.running_mean)
    loader = [(part, None) for part in x.split(32)]
    torch.testing.assert_close(soup_model(nets[0], soup, loader)(x), served(x), atol=5e-2, rtol=0.2)
    assert nets[0].training and int(nets[0].body[1].num_batches_tracked) == 2
    y = served(x).argmax(1)
    assert accuracy_on(nets[0], x, y, data=x)(soup) == 1.0


# --- greedy


@given(st.integers(0, 10_000), st.integers(1, 7), st.booleans())
@settings(max_examples=40, deadline=None)
def test_greedy_is_the_recipe(seed, count, ties):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(count, 2)).round(1)
    several = [{"w": torch.tensor(p)} for p in points]

    def score(state):
        return -np.floor(10 * float(state["w"].square().sum()) + np.pi)  # coarse: there are ties

    found = greedy_soup(several, score, ties=ties)
    order = sorted(range(count), key=lambda i: -score(several[i]))
    pot = [order[0]]
    best = score(several[order[0]])
    for i in order[1:]:
        value = score({"w": torch.tensor(points[[*pot, i]].mean(0))})
        if value > best or (ties and value >= best):
            pot, best = [*pot, i], value
    assert list(found.kept) == pot and list(found.order) == order
    np.testing.assert_allclose(found.state["w"].numpy(), points[pot].mean(0), atol=1e-12)
    assert found.scores[-1] == max(found.scores) >= max(map(score, several))
    assert list(found.scores) == sorted(found.scores)
    assert len(found.tried) == count


def test_greedy_reads_a_lazy_sequence_and_keeps_to_a_given_order():
    class Shelf:
        def __len__(self):
            return 5

        def __getitem__(self, i):
            if i >= 5:
                raise IndexError(i)
            return {"w": torch.tensor([float(i)])}

    def closeness(state):
        return -abs(float(state["w"]) - 2.5)

    found = greedy_soup(Shelf(), closeness, order=[0, 4, 3, 1])
    assert found.kept == (0, 4, 3) and found.order == (0, 4, 3, 1)
    assert float(uniform_soup(Shelf())["w"]) == 2


# --- linear models and learned soups


def test_soup_of_linear_models_is_the_ensemble():
    with seeded(0):
        lines = [nn.Linear(6, 3) for _ in range(4)]
    several = [line.state_dict() for line in lines]
    for weights in (None, [0.1, 0.2, 0.3, 0.4]):
        soup = soup_model(lines[0], average(several, weights))
        torch.testing.assert_close(logit_ensemble(lines[0], several, X, weights), soup(X))
    gap = soup_gap(lines[0], several[0], several[1], X, Y, alpha=0.3)
    assert abs(gap.true) < 1e-6 and abs(gap.approx) < 1e-6
    assert gap.curvature == pytest.approx(gap.variance, rel=1e-4)


def test_ensemble_is_the_mean_over_members():
    members = [make(seed) for seed in range(3)]
    expected = torch.stack([m(X) for m in members]).mean(0)
    several = [m.state_dict() for m in members]
    torch.testing.assert_close(logit_ensemble(members[0], several, X), expected)
    torch.testing.assert_close(
        study.all_logits(members[0], several, X), torch.stack([m(X) for m in members])
    )


def test_learned_soup_of_linear_models_minimises_a_convex_loss():
    from scipy.optimize import minimize

    with seeded(0):
        lines = [nn.Linear(6, 3).double() for _ in range(3)]
    several, x, line = [one.state_dict() for one in lines], X.double(), lines[0]
    found = learned_soup(line, several, x, Y, epochs=250, batch_size=200, lr=0.05)
    outputs = torch.stack([F.linear(x, s["weight"], s["bias"]) for s in several])

    def loss(v):
        a = torch.softmax(torch.tensor(v[:3]), 0)
        return float(F.cross_entropy(v[3] * torch.tensordot(a, outputs, 1), Y))

    best = minimize(loss, np.array([0, 0, 0, 1.0]), method="BFGS")
    final = F.cross_entropy(found.beta * soup_model(line, found.state)(x), Y).detach()
    assert float(final) == pytest.approx(best.fun, abs=2e-3)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(1))
    assert found.losses[0] == pytest.approx(loss(np.array([0, 0, 0, 1.0])), abs=1e-6)


def test_learned_soup_by_layer_holds_its_own_mixture():
    net, several = make(0), states(3)
    found = learned_soup(net, several, X, Y, by_layer=True, lr=0.3)
    assert found.weights.shape == (len(found.names), 3)
    for name, alpha in zip(found.names, found.weights, strict=True):
        torch.testing.assert_close(found.state[name], average(several, alpha.tolist())[name])
    again = learned_soup(net, several, X, Y, by_layer=True, lr=0.3)
    assert again.losses == found.losses and not torch.equal(found.weights[0], found.weights[2])
    assert all(p.requires_grad for p in net.parameters())


def test_learned_soup_keeps_tied_tensors_tied_and_counters_whole():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.register_buffer("seen", torch.tensor(3))

        def forward(self, x):
            return self.second(self.first(x).tanh())

    with seeded(0):
        nets = [Tied() for _ in range(3)]
    found = learned_soup(nets[0], [n.state_dict() for n in nets], X, Y, by_layer=True)
    assert torch.equal(found.state["first.weight"], found.state["second.weight"])
    assert int(found.state["seen"]) == 3 and found.state["seen"].dtype == torch.int64
    soup_model(nets[0], found.state)


# --- soup against ensemble


@pytest.mark.parametrize(("alpha", "order"), [(0.5, 4), (0.25, 3), (0.8, 3)])
@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_error_of_the_gap_shrinks_with_the_distance_at_its_order(alpha, order, beta):
    net = make(0, torch.float64, act="tanh")
    start = net.state_dict()
    errors, gaps = [], []
    for size in (0.01, 0.005, 0.0025):
        ends = [near(start, s, 1) for s in (size, -size)]
        gap = soup_gap(net, *ends, X.double(), Y, alpha=alpha, beta=beta)
        assert gap.true == pytest.approx(gap.soup - gap.ensemble, abs=1e-15)
        errors.append(abs(gap.true - gap.approx))
        gaps.append(abs(gap.true))
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert slopes[-1] == pytest.approx(order, abs=0.1)
    assert np.log2(gaps[1] / gaps[2]) == pytest.approx(2, abs=0.1)
    assert errors[-1] < 0.05 * gaps[-1]


def test_terms_of_the_gap_are_what_they_say():
    net = make(0, torch.float64)
    s0, s1 = net.state_dict(), near(net.state_dict(), 0.2, 3)
    gap = soup_gap(net, s0, s1, X.double(), Y, alpha=0.4, beta=1.5)

    @torch.no_grad()
    def loss(a):
        return float(
            F.cross_entropy(1.5 * soup_model(net, average([s0, s1], [1 - a, a]))(X.double()), Y)
        )

    h = 1e-4
    assert gap.curvature == pytest.approx(
        (loss(0.4 + h) - 2 * loss(0.4) + loss(0.4 - h)) / h**2, rel=1e-4
    )
    by_step = soup_gap(net, s0, s1, X.double(), Y, alpha=0.4, beta=1.5, step=h)
    assert by_step.approx == pytest.approx(gap.approx, rel=1e-4)
    p = (
        (1.5 * soup_model(net, average([s0, s1], [0.6, 0.4]))(X.double()))
        .softmax(1)
        .detach()
        .numpy()
    )
    change = (soup_model(net, s1)(X.double()) - soup_model(net, s0)(X.double())).detach().numpy()
    each = [np.cov(c, aweights=q, ddof=0) for c, q in zip(change, p, strict=True)]
    assert gap.variance == pytest.approx(np.mean(each))
    assert gap.approx == pytest.approx(0.12 * (-gap.curvature + 2.25 * gap.variance))


def test_kinks_need_a_step():
    net = make(0, torch.float64, act="relu", sizes=(6, 40, 40, 3))
    x = torch.randn(4000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    ends = [near(net.state_dict(), s, 1) for s in (0.05, -0.05)]
    exact = soup_gap(net, *ends, x, y)
    stepped = soup_gap(net, *ends, x, y, step=0.25)
    assert abs(stepped.approx - stepped.true) < 0.5 * abs(exact.approx - exact.true)


def test_gap_goes_through_attention():
    with seeded(0):
        net = models.ViT(image=8, patch=4, d=8, layers=1, heads=2, classes=3).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 1, 8, 8, dtype=torch.float64, generator=generator)
    ends = [near(net.state_dict(), s, 1) for s in (0.001, -0.001)]
    gap = soup_gap(net, *ends, x, torch.tensor([0, 1, 2, 0, 1, 2]))
    assert gap.approx == pytest.approx(gap.true, rel=0.1)


# --- geometry


def test_angles_are_those_of_scipy():
    from scipy.spatial.distance import cosine

    start, several = make(9).state_dict(), states(4)
    found = angles(several, start)
    ways = [
        np.concatenate([(s[k] - start[k]).double().numpy().ravel() for k in s]) for s in several
    ]
    for i, j in combinations(range(4), 2):
        expected = np.degrees(np.arccos(1 - cosine(ways[i], ways[j])))
        assert float(found[i, j]) == pytest.approx(expected, abs=1e-6)
    assert float(found.diagonal().abs().max()) == 0
    scaled = [{k: start[k] + 3 * (s[k] - start[k]) for k in s} for s in several]
    torch.testing.assert_close(angles(scaled, start), found, atol=1e-3, rtol=0)
    few = angles(several, start, names=["head.bias"])
    assert not torch.allclose(few, found)


def test_triangle_keeps_distances_and_its_centre_is_the_soup():
    objective = Objective(make(0), F.cross_entropy, (X, Y))
    several = states(3)
    plane = triangle(objective, several)
    soup = objective.flatten(uniform_soup(several))
    torch.testing.assert_close(plane.origin, soup)
    vectors = [objective.flatten(s) for s in several]
    for i, j in combinations(range(3), 2):
        flat = np.linalg.norm(plane.coordinates[i] - plane.coordinates[j])
        assert flat == pytest.approx(float((vectors[i] - vectors[j]).norm()), rel=1e-5)
    assert plane.coordinates[0, 1] == pytest.approx(0, abs=1e-9)
    back = plane.origin + plane.d1 * plane.coordinates[1, 0] + plane.d2 * plane.coordinates[1, 1]
    torch.testing.assert_close(back, vectors[1], atol=1e-5, rtol=1e-4)


# --- bad input


ONE = {"w": torch.ones(2)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: average([]), "weights"),
        (lambda: average([ONE], [0.5, 0.5]), "weights"),
        (lambda: average([ONE, ONE], [1.0]), "weights"),
        (lambda: average([ONE], [float("nan")]), "weights"),
        (lambda: average([ONE, {"v": torch.ones(2)}]), r"states\[1\].*'v'"),
        (lambda: average([ONE, {"w": torch.ones(3)}]), r"states\[1\].*shape \(3,\)"),
        (lambda: greedy_soup([], len), "states"),
        (lambda: greedy_soup([ONE], lambda s: float("nan")), "score"),
        (lambda: greedy_soup([ONE, ONE], lambda s: 0.0, order=[1, 1]), "order"),
        (lambda: greedy_soup([ONE, ONE], lambda s: 0.0, order=[2]), "order"),
        (lambda: angles([ONE], ONE), r"states\[0\]"),
        (lambda: logit_ensemble(make(0), [], X), "weights"),
        (lambda: soup_gap(make(0), *states(2), X, Y, alpha=1.5), "alpha"),
        (lambda: soup_gap(make(0), *states(2), X, Y[:5]), "x and y"),
        (lambda: learned_soup(make(0), states(2), X, Y, epochs=0), "epochs"),
        (lambda: triangle(Objective(make(0), F.cross_entropy, (X, Y)), states(2)), "three"),
        (lambda: triangle(Objective(make(0), F.cross_entropy, (X, Y)), states(1) * 3), "line|tri"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- experiment, explorer, released results


@pytest.fixture(scope="module")
def kitchen():
    return study.open_kitchen(5, members=4, starts=2, epochs=(1, 2), pretrain=4, width=24)


def test_members_trained_together_are_members_trained_alone(kitchen):
    from torch.optim import AdamW

    x, y = kitchen.tune[0][:100], kitchen.tune[1][:100]
    table = study.plain_settings([3e-3, 1e-2], 3, 0.0).assign(weight_decay=[0.1, 0.0])
    begun = {k: torch.stack([v, v]) for k, v in kitchen.start.items()}
    found = study.train_together(
        kitchen.model, begun, x, y, table, batch=50, generator=torch.Generator().manual_seed(0),
        clip=0.5,
    )  # fmt: skip
    source = torch.Generator().manual_seed(0)
    net = soup_model(kitchen.model, kitchen.start)
    optimizer = AdamW(net.parameters(), weight_decay=0.1)
    for step in range(6):
        if step % 2 == 0:
            orders = torch.rand(2, 100, generator=source).argsort(1)
        rows = orders[:, step % 2 * 50 :][:, :50]
        images = study.vary(x[rows].flatten(0, 1), torch.zeros(100), source)[:50]
        torch.rand(2, generator=source)
        optimizer.zero_grad()
        F.cross_entropy(net(images), y[rows[0]]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        done = (step + 1) / 6
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 + np.cos(np.pi * done)) / 2
        optimizer.step()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(found[name][0], tensor, atol=2e-5, rtol=1e-3)


def test_distortions_do_what_they_are_called():
    source = torch.Generator().manual_seed(0)
    x = torch.rand(3, 1, 8, 8)
    zero, one = torch.zeros(3), torch.ones(3)
    still = {"turn": zero, "move": torch.zeros(3, 2), "scale": one, "noise": zero}
    same = study.distort(x, **still, generator=source)
    torch.testing.assert_close(same, x, atol=1e-5, rtol=0)
    quarter = study.distort(x, **still | {"turn": one * torch.pi / 2}, generator=source)
    torch.testing.assert_close(quarter, x.rot90(1, (2, 3)), atol=1e-4, rtol=0)
    right = study.distort(x, **still | {"move": torch.tensor([[0.25, 0]] * 3)}, generator=source)
    torch.testing.assert_close(right[..., :-1], x[..., 1:], atol=1e-5, rtol=0)
    for kind in study.SHIFTS:
        out = study.shifted(x, kind, source)
        assert out.shape == x.shape and not torch.equal(out, x)


def test_cook_reports_every_soup(kitchen):
    row = study.cook(
        5, members=4, control=2, epochs=(1, 2), pretrain=4, width=24, rates=(1e-3, 1e-2),
        twins=2, tune_epochs=1,
    )  # fmt: skip
    assert row["held_out_greedy"] >= row["held_out_best"]
    score = accuracy_on(kitchen.model, *kitchen.tests["test"])
    singles = [100 * score(s) for s in kitchen.states]
    assert row["mean_test"] == pytest.approx(np.mean(singles), abs=1e-3)
    held = [accuracy_on(kitchen.model, *kitchen.held_out)(s) for s in kitchen.states]
    assert row["best_test"] == pytest.approx(singles[int(np.argmax(held))], abs=1e-3)
    assert row["best_shift"] == pytest.approx(np.mean([row[f"best_{k}"] for k in study.SHIFTS]))
    assert len(row["angle"]) == 6 and len(row["gap_true"]) == 2
    middle = average(kitchen.states[:2])
    gain = 100 * score(middle) - np.mean(singles[:2])
    assert row["gain"][0] == pytest.approx(gain, abs=1e-3)


def test_explorer_is_exported_exactly(kitchen):
    explorer = figures.explore_soups(
        kitchen.model, kitchen.states, kitchen.tests | {"held out": kitchen.held_out},
        held_out=kitchen.held_out, points=9,
    )  # fmt: skip
    assert js.check_formula(explorer, rtol=1e-6) > 20
    found = explorer.result(on="rotated", pair="A to C", alpha=0.0)
    assert explorer.seconds < 0.05
    assert found["loss"] == pytest.approx(found["loss_ensemble"], abs=2e-5)
    x, y = kitchen.tests["rotated"]
    first = greedy_soup(kitchen.states, accuracy_on(kitchen.model, *kitchen.held_out)).order[0]
    with torch.no_grad():
        corner = F.cross_entropy(soup_model(kitchen.model, kitchen.states[first])(x[:500]), y[:500])
    assert found["loss"] == pytest.approx(float(corner), abs=2e-5)
    assert len(dumps(explorer.export())) < 40_000


def test_released_files_are_optional(monkeypatch):
    monkeypatch.setattr(study.data, "authors", lambda name: None)
    assert study.released() is None


def test_released_table_is_read_and_sorted(monkeypatch, tmp_path):
    sets = ("ImageNet2p", *study.RELEASED)

    def lines(names, base):
        return [
            json.dumps({"model_name": n} | dict.fromkeys(sets, base + i / 10))
            for i, n in enumerate(names)
        ]

    (tmp_path / "individual_model_results.jsonl").write_text(
        "\n".join(lines(["model_0", "model_1"], 0.5))
    )
    (tmp_path / "uniform_soup_results.jsonl").write_text(lines(["uniform_soup"], 0.7)[0])
    (tmp_path / "greedy_soup_results.jsonl").write_text(lines(["greedy_soup"], 0.8)[0])
    info = {
        "model_0": {"info": "LP initialization"},
        "model_1": {
            "aug": "rand-m1-n1",
            "wd": 0.1,
            "lr": 1e-5,
            "mix": 0,
            "smoothing": 0,
            "epochs": 4,
        },
    }
    (tmp_path / "hparam_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(study.data, "authors", lambda name: tmp_path)
    table = study.released()
    assert list(table.model) == ["model_1", "model_0", "uniform_soup", "greedy_soup"]
    assert table["shift"].round(6).tolist() == [60, 50, 70, 80]
    assert table.lr[0] == 1e-5 and np.isnan(table.lr[1])
    assert isinstance(table, pd.DataFrame)
