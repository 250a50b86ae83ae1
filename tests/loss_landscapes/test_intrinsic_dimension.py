"""Random subspaces against explicit matrices, closed forms of the toy and ordinary training."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, kstest
from torch import nn
from torch.nn import functional as F

from tests.plots import js
from workbench.lab import models, seeded
from workbench.loss_landscapes import figures_intrinsic_dimension as figures
from workbench.loss_landscapes.experiments import intrinsic_dimension as study
from workbench.loss_landscapes.intrinsic_dimension import (
    SubspaceModule,
    d_int,
    sweep,
    toy_quadratic,
    train_subspaces,
)
from workbench.loss_landscapes.random_projections import KINDS, projection

DRAWN = [kind for kind in KINDS if kind != "full"]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mlp(seed=0, sizes=(5, 8, 3)):
    with seeded(seed):
        return models.MLP(list(sizes))


def batch(n=40, features=5, classes=3, seed=1):
    x = normal(n, features, seed=seed, dtype=torch.float32)
    return x, (x[:, :classes] + 0.1 * x[:, -1:]).argmax(1)


# --- a network in a subspace


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_transpose_of_p_times_the_full_gradient(kind):
    model, (x, y) = mlp().double(), batch()
    x = x.double()
    D = sum(p.numel() for p in model.parameters())
    sub = SubspaceModule(model, D if kind == "full" else 9, kind=kind, seed=2)
    with torch.no_grad():
        sub.theta.copy_(normal(sub.P.d))
    loss = F.cross_entropy(sub(x), y)
    loss.backward()
    flat = (sub.theta_0 + sub.P.matrix().double() @ sub.theta).detach()
    torch.nn.utils.vector_to_parameters(flat, model.parameters())
    direct = F.cross_entropy(model(x), y)
    full = torch.cat([g.flatten() for g in torch.autograd.grad(direct, list(model.parameters()))])
    assert loss.item() == pytest.approx(direct.item(), abs=1e-12)
    torch.testing.assert_close(sub.theta.grad, sub.P.matrix().double().T @ full)


def test_with_all_directions_training_is_ordinary_training():
    model, (x, y) = mlp(), batch()
    D = sum(p.numel() for p in model.parameters())
    sub = SubspaceModule(model, D, kind="full")
    curves = []
    for network in (sub, model):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    np.testing.assert_allclose(*curves, rtol=1e-4)


def test_an_orthonormal_p_of_full_size_reaches_any_weights():
    model = mlp(sizes=(6, 8))  # D = 56, in 64 dimensions
    sub = SubspaceModule(model, 56, kind="dense")
    goal = normal(56, dtype=torch.float32)
    with torch.no_grad():
        sub.theta.copy_(torch.linalg.solve(sub.P.matrix(), goal - sub.theta_0))
    found = torch.cat([w.flatten() for w in sub.weights().values()])
    torch.testing.assert_close(found, goal, rtol=1e-2, atol=1e-2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, 2)
        self.last.bias.requires_grad_(False)

    def forward(self, x, *, scale=1.0):
        return scale * self.last(self.second(self.first(x)))


def test_tied_parameters_count_once_and_frozen_ones_stay():
    with seeded(0):
        model = Tied()
    sub = SubspaceModule(model, 7, seed=4)
    assert sub.P.D == 36 + 6 + 6 + 12
    assert [n for n, _ in sub.named_parameters()] == ["theta"]
    with torch.no_grad():
        sub.theta.normal_()
    weights, merged = sub.weights(), sub.merged()
    assert weights["first.weight"] is weights["second.weight"]
    assert merged.first.weight is merged.second.weight
    assert torch.equal(merged.last.bias, model.last.bias)
    x = normal(3, 6, dtype=torch.float32)
    torch.testing.assert_close(merged(x, scale=2.0), sub(x, scale=2.0))
    assert not torch.equal(merged(x), model(x))


def test_batch_norm_keeps_its_statistics_and_moves_its_scales():
    with seeded(0):
        model = models.CNN((4, 6), classes=3)
    sub, x = SubspaceModule(model, 20), normal(8, 1, 8, 8, dtype=torch.float32)
    sub.train()
    F.cross_entropy(sub(x), torch.arange(8) % 3).backward()
    assert bool(sub.theta.grad.isfinite().all())
    assert "body.1.weight" in sub.weights()
    moved = sub.module.body[1].running_mean
    assert not torch.equal(moved, model.body[1].running_mean)
    other = SubspaceModule(model, 20)
    other.load_state_dict(sub.state_dict())
    torch.testing.assert_close(other.eval()(x), sub.eval()(x))


@pytest.mark.parametrize("make", [
    lambda: models.RNN(7, 12), lambda: nn.LSTM(5, 4, batch_first=True),
    lambda: models.GPT(7, 16, 1, 2, 8), lambda: mlp().bfloat16(),
])  # fmt: skip
def test_other_networks_answer_as_before_at_theta_zero(make):
    with seeded(0):
        model = make().eval()
    integer = hasattr(model, "generate") or isinstance(model, models.RNN)
    x = torch.randint(7, (2, 6)) if integer else normal(2, 5, dtype=torch.float32)
    x = x[None] if isinstance(model, nn.LSTM) else x
    x = x if integer else x.to(next(model.parameters()).dtype)
    sub = SubspaceModule(model, 10).eval()
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    torch.testing.assert_close(first(sub(x)), first(model(x)))
    first(sub(x)).float().square().sum().backward()
    assert float(sub.theta.grad.abs().sum()) > 0
    with torch.no_grad():
        sub.theta.fill_(0.3)
    assert not torch.equal(first(sub(x)), first(model(x)))


def test_a_network_is_its_seed_and_theta():
    make = lambda: mlp_of_any_seed()  # noqa: E731
    sub = SubspaceModule.build(make, 6, seed=11)
    with torch.no_grad():
        sub.theta.normal_()
    state = sub.state_dict()
    assert set(state) == {"theta", "_extra_state"}
    assert sum(v.numel() * v.element_size() for v in state.values()) < 250
    again, x = SubspaceModule.restore(make, state), batch()[0]
    assert torch.equal(again(x), sub(x))
    other = SubspaceModule.build(make, 6, seed=12)
    with pytest.raises(ValueError, match="seed"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="origin"):
        SubspaceModule.restore(lambda: mlp(seed=5), state)


def mlp_of_any_seed():
    return models.MLP([5, 8, 3])


def test_the_given_module_is_left_alone():
    model = mlp()
    before = {n: p.clone() for n, p in model.named_parameters()}
    sub = SubspaceModule(model, 5)
    with torch.no_grad():
        sub.theta.fill_(1.0)
    sub(batch()[0]).sum().backward()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


# --- the toy problem


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 1000))
def test_the_toy_is_solved_from_its_number_of_equations_on(groups, each, seed):
    toy = toy_quadratic(groups * each, groups)
    assert toy.dimension == groups * each - groups
    theta_0 = normal(groups * each, seed=seed)
    assert float(toy.loss(theta_0)) == pytest.approx(
        sum((g + 1 - theta_0[g * each : (g + 1) * each].sum().item()) ** 2 for g in range(groups))
    )
    for d in range(1, groups + 1):
        P = normal(groups * each, d, seed=seed + d)
        lowest = toy.lowest(P, theta_0)
        assert (lowest < 1e-12) == (d >= groups)


@pytest.mark.parametrize("kind", DRAWN)
def test_ten_of_a_thousand_exactly(kind):
    toy, theta_0 = toy_quadratic(), normal(1000)
    lowest = {
        d: toy.lowest(projection(1000, d, kind, 0, dtype=torch.float64).matrix(), theta_0)
        for d in (1, 9, 10, 11)
    }
    assert lowest[9] > 1e-3 and max(lowest[10], lowest[11]) < 1e-18
    assert d_int({d: math.exp(-v) for d, v in lowest.items()}, 1.0, 1 - 1e-9) == 10


def test_the_share_of_the_toy_loss_that_remains_has_its_beta_distribution():
    toy, theta_0 = toy_quadratic(100, 10), normal(100)
    start = float(toy.loss(theta_0))
    shares = [toy.lowest(normal(100, 4, seed=s), theta_0) / start for s in range(300)]
    assert kstest(shares, beta(3, 2).cdf).pvalue > 1e-3
    assert np.mean(shares) == pytest.approx(1 - 4 / 10, abs=0.04)


# --- the measure and the sweep


def test_the_dimension_is_the_first_that_reaches_the_share():
    accs = {100: 0.6, 10: 0.2, 200: 0.86, 400: 0.85, 800: 0.9}
    assert d_int(accs, 0.95) == 200
    assert d_int(accs, 1.0) == 800
    assert d_int(accs, 1.01) == math.inf
    assert d_int(accs, 0.2) == 10


def test_between_the_grid_points_the_crossing_is_on_the_line_in_log_d():
    accs = {100: 0.8, 400: 1.0}
    assert d_int(accs, 1.0, between=True) == pytest.approx(200)
    assert d_int(accs, 1.0, 1.0, between=True) == pytest.approx(400)
    assert d_int({50: 0.95}, 1.0, between=True) == 50


def test_a_killed_sweep_resumes(tmp_path):
    file, called = tmp_path / "sweep.json", []

    def train(d):
        if d == 40 and len(called) < 3:
            called.append("killed")
            raise KeyboardInterrupt
        called.append(d)
        return d / 100

    with pytest.raises(KeyboardInterrupt):
        sweep(train, [40, 10, 20, 80], file, note="mlp")
    assert json.loads(file.read_text())["accs"] == {"10": 0.1, "20": 0.2}
    accs = sweep(train, [40, 10, 20, 80], file, note="mlp")
    assert accs == {10: 0.1, 20: 0.2, 40: 0.4, 80: 0.8}
    assert called == [10, 20, "killed", 40, 80]
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.json"]
    with pytest.raises(ValueError, match="another sweep"):
        sweep(train, [10], file, note="cnn")


def test_a_sweep_with_a_baseline_ends_at_the_answer(tmp_path):
    accs = sweep(lambda d: d / 100, [10, 50, 90, 100], tmp_path / "s.json", baseline=0.5)
    assert list(accs) == [10, 50] and d_int(accs, 0.5) == 50


# --- training side by side


def test_members_of_a_sweep_are_trained_as_they_would_be_alone():
    model, data = mlp(), batch(60)
    options = {"seed": 3, "steps": 25, "batch_size": 20, "lr": 0.1}
    together = train_subspaces(model, [4, 12, 30], data, data, **options)
    alone = {d: train_subspaces(model, [d], data, data, **options)[d] for d in (4, 12, 30)}
    assert together == alone
    sub = SubspaceModule(model, 12, seed=3)
    optimizer = torch.optim.Adam(sub.parameters(), lr=0.1, betas=(0.9, 0.99))
    generator, order = torch.Generator().manual_seed(3), torch.empty(0, dtype=torch.long)
    for step in range(25):
        if len(order) < 20:
            order = torch.randperm(60, generator=generator)
        rows, order = order[:20], order[20:]
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 25)
        optimizer.zero_grad()
        F.cross_entropy(sub(data[0][rows]), data[1][rows]).backward()
        optimizer.step()
    right = (sub(data[0]).argmax(1) == data[1]).float().mean().item()
    assert together[12] == pytest.approx(right, abs=1 / 60 + 1e-6)


def test_more_directions_fit_better_and_all_of_them_like_training():
    model, data = mlp(sizes=(5, 16, 3)), batch(80)
    accs = train_subspaces(model, [1, 20, 80], data, data, lr=0.1, steps=60)
    D = sum(p.numel() for p in model.parameters())
    full = train_subspaces(model, [D], data, data, kind="full", lr=0.02, steps=60)[D]
    assert accs[1] < accs[20] <= accs[80] + 0.05 and full > 0.9


# --- wrong input


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))


@pytest.mark.parametrize("call, message", [
    (lambda: SubspaceModule(nn.ReLU(), 1), "module: has no parameter"),
    (lambda: SubspaceModule(Complex(), 1), "module: phase is torch.complex64"),
    (lambda: SubspaceModule(mlp(), 1000), "d: expected at most D"),
    (lambda: toy_quadratic(11, 3), "D: expected a multiple"),
    (lambda: d_int({}, 0.9), "accs: is empty"),
    (lambda: d_int({5: float("nan")}, 0.9), r"accs\[5\]"),
    (lambda: d_int({5: 0.5}, 0.0), "baseline"),
    (lambda: train_subspaces(models.CNN((4,)), [2], batch(), batch()), "body.1 keeps running"),
    (lambda: train_subspaces(models.MLP([5, 4, 3], dropout=0.1), [2], (), ()), "drops"),
    (lambda: train_subspaces(mlp(), [2], batch(), batch(), steps=0), "steps"),
])  # fmt: skip
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- experiments and explorer


def test_patches_are_a_convolution():
    layer, x = study.Patches(2, 5, 3, 2), normal(4, 2, 9, 9, dtype=torch.float32)
    expected = F.conv2d(x, layer.linear.weight.view(5, 2, 3, 3), layer.linear.bias, stride=2)
    torch.testing.assert_close(layer(x), expected)


def test_the_change_of_width_is_counted_in_either_direction():
    frame = pd.DataFrame({
        "width": [50, 200] * 2, "seed": [0, 0, 1, 1],
        "D": [100, 400] * 2, "d_int": [50.0, 60.0, 60.0, 50.0],
    })  # fmt: skip
    found = study.changes(frame)
    np.testing.assert_allclose(found.change, 20)
    np.testing.assert_allclose(found.growth, 4)
    np.testing.assert_allclose(
        found.elasticity, [math.log(1.2) / math.log(4), -math.log(1.2) / math.log(4)]
    )


def test_shuffled_pixels_are_nothing_to_an_mlp_whose_first_layer_is_shuffled_alike():
    model, x = mlp(sizes=(5, 8, 3)), batch()[0]
    order = torch.tensor([3, 0, 4, 1, 2])
    P = projection(sum(p.numel() for p in model.parameters()), 6).matrix()
    theta = normal(6, dtype=torch.float32)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()]) + P @ theta
    places = torch.arange(40).view(8, 5)[:, order].flatten()
    alike = torch.cat([flat[:40][places], flat[40:]])
    torch.nn.utils.vector_to_parameters(flat, model.parameters())
    plain = model(x)
    torch.nn.utils.vector_to_parameters(alike, model.parameters())
    torch.testing.assert_close(model(x[:, order]), plain)


def test_experiments_are_deterministic_and_return_plain_values():
    small = {"dims": (20, 60), "steps": 15}
    first, again = study.kinds(1, **small), study.kinds(1, **small)
    assert {k: np.asarray(v).tolist() for k, v in first.items()} == {
        k: np.asarray(v).tolist() for k, v in again.items()
    }
    row = study.labels(0, rows=60, dims=(10, 40), shuffled_dims=(40, 160), steps=30)
    assert row["ratio"] == pytest.approx(row["d_int_shuffled"] / row["d_int_true"])
    shares = study.toy(0, most=11)
    assert all((v[:9] > 1e-9).all() and (v[9:] < 1e-20).all() for v in shares.values())


def curves(seeds=3):
    dims = np.array([50, 100, 200, 400])
    rows = [
        {"width": w, "seed": s, "D": D, "baseline": 0.94 - 0.01 * s, "dims": dims,
         "accs": np.array([0.6, 0.72, 0.84 + 0.01 * s, 0.9]) - 0.001 * w / 10}
        for w, D in ((50, 1000), (100, 2500), (200, 7000)) for s in range(seeds)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_exported_formula_is_the_explorers(seeds):
    explorer = figures.explore_dimension(curves(seeds))
    assert js.check_formula(explorer, rtol=1e-9) > 20
    result = explorer.result(network="width 50", frac=0.9)
    assert explorer.seconds < 0.05
    row = curves(seeds).iloc[:seeds]
    expected = [
        d_int(dict(zip(r.dims, r.accs, strict=True)), r.baseline, between=True)
        for r in row.itertuples()
    ]
    assert result["d"] == pytest.approx(np.mean(expected))
