"""The surrogate's sharpness penalty against dense Hessians, closed forms and hand-written loops."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.plots import js
from workbench.lab import models, seeded
from workbench.loss_landscapes import figures_ignite as figures
from workbench.loss_landscapes.experiments import ignite as study
from workbench.loss_landscapes.experiments import ignite_tasks as tasks
from workbench.loss_landscapes.geometry import SAM
from workbench.loss_landscapes.ignite import (
    DUAL,
    FIXED,
    GaussianMLP,
    Ignite,
    ascend,
    dual_step,
    gaussian_nll,
    ignite_grad,
    ignite_grad_stacked,
    propose,
    score,
    train_surrogate,
)


def mse(output, y):
    return ((output[:, 0] - y) ** 2).mean()


def smooth(outputs=1, seed=0):
    with seeded(seed):
        return models.MLP([3, 6, outputs], act="tanh").double()


def batch(rows=12, d=3, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, d, generator=g, dtype=dtype), torch.randn(
        rows, generator=g, dtype=dtype
    )


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def extra(model, x, y, loss_fn=mse, **options):
    """What the penalty adds to the gradient of the loss."""
    with_it = flat(ignite_grad(model, loss_fn, x, y, **options).grads)
    return with_it - flat(ignite_grad(model, loss_fn, x, y, **{**options, "lam": 0.0}).grads)


class Squares(nn.Module):
    """g(x) = x . w^2: the gradient of h is linear in w, so any finite difference is exact."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def forward(self, x):
        return x @ self.w**2


# --- the gradient


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_extra_term_is_the_hessian_along_the_gradient_with_an_error_of_order_r(outputs):
    model, (x, y) = smooth(outputs), batch()
    loss_fn = mse if outputs == 1 else gaussian_nll
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def h(theta):
        parts = theta.split([s.numel() for s in shapes])
        state = {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(model, state, (x,))[:, 0].mean()

    theta = flat(model.parameters()).detach()
    gradient = torch.func.grad(h)(theta)
    exact = 0.7 * 0.3 * torch.autograd.functional.hessian(h, theta) @ gradient / gradient.norm()
    errors = [
        float((extra(model, x, y, loss_fn, lam=0.7, rho=0.3, r=r) - exact).norm())
        for r in (1e-2, 1e-3)
    ]
    assert errors[1] < 1e-3 * float(exact.norm())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    found = ignite_grad(model, loss_fn, x, y, lam=0.0)
    assert float(found.norm) == pytest.approx(float(gradient.norm()))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 5), st.floats(0.01, 2), st.floats(1e-3, 2))
def test_where_the_gradient_of_h_is_linear_any_step_is_exact(seed, lam, rho, r):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(4, generator=g, dtype=torch.float64) + 3.0
    x = torch.rand(9, 4, generator=g, dtype=torch.float64)
    y = torch.zeros(9, dtype=torch.float64)
    average = x.mean(0)
    expected = lam * rho * 2 * average * (2 * average * w) / (2 * average * w).norm()
    found = extra(Squares(w), x, y, lambda o, t: ((o - t) ** 2).mean(), lam=lam, rho=rho, r=r)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_surrogate_that_is_linear_in_its_weights_feels_nothing():
    model, (x, y) = nn.Linear(3, 1).double(), batch()
    assert (extra(model, x, y, lam=5.0, rho=0.2) == 0).all()


def test_without_multiplier_training_is_plain_training_bit_for_bit():
    x, y = batch(40, dtype=torch.float32)
    with seeded(0):
        ours = GaussianMLP(3, 16)
    theirs = copy.deepcopy(ours)
    train_surrogate(ours, x, y, ignite=None, epochs=3, batch_size=16, generator=5)
    optimizer, generator = (
        torch.optim.Adam(theirs.parameters(), lr=1e-3),
        torch.Generator().manual_seed(5),
    )
    for _ in range(3):
        for part in torch.randperm(40, generator=generator).split(16):
            optimizer.zero_grad()
            gaussian_nll(theirs(x[part]), y[part]).backward()
            optimizer.step()
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours_p, theirs_p)


def test_parameters_and_buffers_hold_what_one_forward_pass_leaves():
    x, y = batch()
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1)).double()
    other = copy.deepcopy(net)
    other(x)
    ignite_grad(net, mse, x, y, lam=1.0, rho=0.5)
    for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is None for p in net.parameters())


def test_dropout_draws_one_mask_for_both_evaluations():
    net, (x, y) = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1)).double(), batch()
    torch.manual_seed(0)
    with_it = flat(ignite_grad(net, mse, x, y, lam=3.0).grads)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(with_it, flat(ignite_grad(net, mse, x, y, lam=0.0).grads))
    assert torch.equal(state, torch.get_rng_state())


def test_frozen_parameters_stay_out_and_tied_ones_count_once():
    model, (x, y) = smooth(), batch()
    model.body[1].weight.requires_grad_(False)
    assert len(ignite_grad(model, mse, x, y, lam=1.0).grads) == 3

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False).double()
            self.b = nn.Linear(3, 3, bias=False).double()
            self.b.weight = self.a.weight

        def forward(self, z):
            return self.b(self.a(z)).sum(1, keepdim=True)

    tied = Tied()
    found = extra(tied, x, y, lam=2.0, rho=0.1, r=1e-6)
    w = tied.a.weight.detach()

    def h(weight):
        return (x @ weight.T @ weight.T).sum(1).mean()

    gradient = torch.func.grad(h)(w)
    (product,) = torch.func.vjp(torch.func.grad(h), w)[1](gradient / gradient.norm())
    assert found.shape == (9,)
    torch.testing.assert_close(found, 0.2 * product.reshape(-1), rtol=1e-4, atol=1e-6)


def test_heads_of_any_form_through_mean():
    x, y = batch()
    narrow, wide = smooth(1), smooth(2)
    with torch.no_grad():
        for a, b in zip(wide.parameters(), narrow.parameters(), strict=True):
            a[: len(b)] = b
    a = ignite_grad(narrow, lambda o, t: mse(o, t), x, y, lam=0.4)
    b = ignite_grad(wide, lambda o, t: mse(o, t), x, y, lam=0.4, mean=lambda o: o[:, 0])
    torch.testing.assert_close(a.norm, b.norm)
    torch.testing.assert_close(a.grads[0], b.grads[0])
    with pytest.raises(ValueError, match="mean: expected one value a design"):
        ignite_grad(wide, mse, x, y, lam=0.4, mean=lambda o: o)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_surrogates_at_once_are_each_of_them_alone(dtype):
    nets = []
    for i in range(3):
        with seeded(i):
            nets.append(GaussianMLP(3, 8).to(dtype))
    pairs = [batch(10, dtype=dtype, seed=i) for i in range(3)]
    x, y = (torch.stack(part) for part in zip(*pairs, strict=True))
    params, _ = torch.func.stack_module_state(nets)
    lam, rho, r = torch.tensor([[0.0, 0.1, 2.0], [0.05, 0.2, 1.0], [0.05, 0.1, 0.3]], dtype=dtype)
    found = ignite_grad_stacked(nets[0], params, gaussian_nll, x, y, lam=lam, rho=rho, r=r)
    for i, net in enumerate(nets):
        options = {"lam": float(lam[i]), "rho": float(rho[i]), "r": float(r[i])}
        alone = ignite_grad(net, gaussian_nll, x[i], y[i], **options)
        torch.testing.assert_close(found.norm[i], alone.norm)
        torch.testing.assert_close(found.loss[i], alone.loss)
        named = dict(zip(params, found.grads, strict=True))
        for (name, _), g in zip(net.named_parameters(), alone.grads, strict=True):
            torch.testing.assert_close(named[name][i], g)


def test_the_output_bias_alone_keeps_the_norm_at_one_or_more():
    for seed in range(5):
        with seeded(seed):
            net = GaussianMLP(3, 8)
        x, y = batch(dtype=torch.float32, seed=seed)
        assert float(ignite_grad(net, gaussian_nll, x, y, lam=0.0).norm) >= 1


# --- the multiplier and training


def test_the_multiplier_follows_the_sharpness():
    assert dual_step(0.2, 3.0, rho=0.1, eps=0.1, eta=0.5) == pytest.approx(0.3)
    assert dual_step(0.01, 0.2, rho=0.1, eps=0.1, eta=0.5) == 0
    assert dual_step(0.01, 0.2, rho=0.1, eps=0.1, eta=0.5, clip=False) == pytest.approx(-0.03)
    many = dual_step(torch.tensor([0.2, 0.01]), torch.tensor([3.0, 0.2]), rho=0.1, eps=0.1, eta=0.5)
    torch.testing.assert_close(many, torch.tensor([0.3, 0.0]))


@pytest.mark.parametrize("kind", ["dual", "fixed"])
def test_training_holds_the_sharpness_down(kind):
    x, y = batch(64, dtype=torch.float32)
    end, rho = {}, {"dual": DUAL, "fixed": FIXED}[kind]["rho"]
    for ignite, options in ((None, {"rho": rho}), (kind, {"lam": 1.0 / rho})):
        with seeded(3):
            net = GaussianMLP(3, 16)
        history = train_surrogate(
            net, x, y, ignite=ignite, epochs=25, batch_size=32, lr=3e-3, generator=0, **options
        )
        end[ignite] = history["sharpness"][-5:].mean() / rho
    assert end[kind] < 0.9 * end[None]
    assert len(history["loss"]) == 50 and (np.diff(history["lam"]) == 0).all() == (kind == "fixed")


def test_the_released_multiplier_turns_negative_where_the_constraint_is_slack():
    x, y = batch(32, dtype=torch.float32)
    last = {}
    for clip in (True, False):
        with seeded(0):
            net = GaussianMLP(3, 8)
        history = train_surrogate(net, x, y, eps=5.0, clip=clip, epochs=3, generator=0)
        last[clip] = history["lam"][-1]
    assert last[True] == 0 and last[False] < 0


# --- search and score


def test_ascent_of_a_parabola_contracts_at_the_known_rate():
    centre = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    start = torch.zeros(2, 4, 3, dtype=torch.float64)
    path = ascend(lambda x: -0.5 * ((x - centre) ** 2).sum(-1), start, steps=7, lr=0.1)
    rate = (1 - 0.1 * 3**0.5) ** torch.arange(8)
    assert path.shape == (8, 2, 4, 3)
    torch.testing.assert_close(path[:, 1, 2], centre - rate[:, None] * centre)


def test_ascent_stays_inside_its_bounds():
    low, high = torch.tensor([-0.1, -1.0]), torch.tensor([0.2, 1.0])
    path = ascend(lambda x: x.sum(-1), torch.zeros(5, 2), steps=300, lr=0.01, bounds=(low, high))
    assert (path >= low).all() and torch.equal(path[-1], high.expand(5, 2))


def test_scores_are_percentiles_between_the_extremes():
    values = np.array([1.0, 3.0, 2.0, 9.0, 4.0])
    assert score(values, -1, 9) == {100: 1.0, 50: pytest.approx(0.4)}
    assert score(values, 0, 6)[100] == 1.5
    assert tasks.offline_half([3.0, 1.0, 2.0, 5.0]).tolist() == [1, 2]


def test_propose_returns_designs_in_the_users_units():
    rng = np.random.default_rng(0)
    x = rng.uniform([10, -1], [20, 1], (200, 2))
    y = 1000 - (x[:, 0] - 15) ** 2 - 20 * x[:, 1]
    state = torch.get_rng_state()
    options = {"designs": 16, "steps": 40, "width": 16, "epochs": 40, "lr": 0.02}
    found = propose(x, y, bounds=([10, -1], [20, 1]), generator=0, **options)
    again = propose(x, y, bounds=([10, -1], [20, 1]), generator=0, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert (found.x == again.x).all() and found.x.shape == (16, 2)
    assert (found.x >= [9.999, -1.001]).all() and (found.x <= [20.001, 1.001]).all()
    truth = 1000 - (found.x[:, 0] - 15) ** 2 - 20 * found.x[:, 1]
    assert truth.mean() > np.sort(y)[-16:].mean() and found.predicted.mean() > y.mean()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ignite_grad(nn.ReLU(), mse, *batch(), lam=1.0), "no trainable"),
        (lambda: ignite_grad(smooth(), mse, *batch(), lam=1.0, rho=0.0), "rho: expected"),
        (lambda: ignite_grad(smooth(), mse, *batch(), lam=1.0, r=-1.0), "r: expected"),
        (lambda: ignite_grad(smooth(), lambda o, t: o[:, 0] - t, *batch(), lam=1.0), "loss_fn"),
        (lambda: GaussianMLP(3, 4, std=(0.2, 0.1)), "std: expected"),
        (lambda: train_surrogate(smooth(), *batch(), ignite="both"), "ignite: expected"),
        (lambda: train_surrogate(smooth(), batch()[0], batch()[1][:3]), "same number of rows"),
        (lambda: ascend(lambda x: x.sum(), torch.zeros(2, 2), steps=-1), "steps: expected"),
        (lambda: score([1.0], 2.0, 2.0), "low and high"),
        (lambda: tasks.offline_half([1.0, 2.0], 0.0), "share: expected"),
        (lambda: propose(np.ones((5, 2)), np.arange(5.0)), "column 0 does not vary"),
        (lambda: propose(np.arange(6.0).reshape(3, 2), np.ones(3)), "y: does not vary"),
        (lambda: tasks.offline_task("branin6", 0), "name: expected one of"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- tasks


def test_functions_have_their_published_maxima():
    assert tasks.branin(np.array([[np.pi, 2.275]])) == pytest.approx(0.397887, abs=1e-6)
    best = (np.array([np.pi, 2.275]) - [-5, 0]) / 15
    assert tasks.branin5(np.array([[*best, *best, 0.5]]))[0] == pytest.approx(-0.795775, abs=2e-6)
    peak = np.array([[0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573]])
    assert tasks.hartmann6(peak)[0] == pytest.approx(3.32237, abs=1e-5)
    low = (np.full((1, 5), -2.903534) + 5) / 10
    assert tasks.styblinski5(low)[0] == pytest.approx(195.8308, abs=1e-3)


@pytest.mark.parametrize("name", [*study.TEST, *study.DEVELOPMENT, "kmer8"])
def test_a_task_shows_its_lower_half_and_scores_what_it_measured(name):
    task = tasks.offline_task(name, 3, points=120)
    assert task.x.shape[0] == len(task.y) == 120 and len(task.seen) == 60
    hidden = np.setdiff1d(np.arange(120), task.seen)
    assert task.y[task.seen].max() <= task.y[hidden].min()
    assert task.low <= task.y.min() and task.high >= task.y.max()
    assert (task.x >= task.bounds[0] - 1e-9).all() and (task.x <= task.bounds[1] + 1e-9).all()
    error = np.abs(task.truth(task.x) - task.y).max() / (task.high - task.low)
    assert error < (0.25 if name == "airfoil" else 1e-9)  # rows with equal inputs are averaged


# --- the experiment


def test_a_padded_member_trains_as_it_would_alone():
    names = ("branin5", "rbf8")
    parts = study._Batch.of([tasks.offline_task(name, 0, 100) for name in names], "cpu")
    members = {"dual": {**DUAL, "lam": 0.5, "eta": 0.1}}
    rows = [{**study._PLAIN, **members["dual"]}] * 2
    own = {key: torch.tensor([row[key] for row in rows]) for key in study._PLAIN}
    start = study._initial(parts, 1, 8, 0)
    params, lam = study._train(parts, start, own, 1, 12, 16, 0)
    with seeded(0):
        alone = GaussianMLP(5, 8)
    optimizer = torch.optim.Adam(alone.parameters(), lr=study.LR)
    trainer = Ignite(alone, optimizer, **members["dual"])
    for order in parts.orders(0, 12 * 16)[0].split(16):
        trainer.step(parts.x[0, order, :5], parts.y[0, order])
    assert float(lam[0][0]) == pytest.approx(trainer.lam, rel=1e-5)
    first = start[0].parameters_of(params["flat"][0])["net.body.1.weight"]
    torch.testing.assert_close(first[:, :5], alone.net.body[1].weight, rtol=1e-4, atol=1e-5)
    assert (first[:, 5:] == 0).all()


def test_the_rivals_are_sam_and_decoupled_weight_decay():
    x, y = batch(20, dtype=torch.float32)
    with seeded(0):
        net = GaussianMLP(3, 8)
    params, _ = torch.func.stack_module_state([net])
    found = study.loss_grad_stacked(net, params, x[None], y[None], torch.tensor([0.05]))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.05, lr=1.0)

    def closure():
        optimizer.zero_grad()
        loss = gaussian_nll(net(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    named = dict(zip(params, found, strict=True))
    for (name, p), old in zip(net.named_parameters(), before, strict=True):
        torch.testing.assert_close(named[name][0], old - p, rtol=1e-4, atol=1e-6)

    parts = study._Batch.of([tasks.offline_task("branin5", 0, 64)], "cpu")
    start = study._initial(parts, 1, 8, 0)
    own = {key: torch.tensor([v]) for key, v in {**study._PLAIN, "decay": 0.5}.items()}
    params, _ = study._train(parts, start, own, 1, 5, 16, 0)
    alone = copy.deepcopy(start[0].nets[0])
    adamw = torch.optim.AdamW(alone.parameters(), lr=study.LR, weight_decay=0.5)
    for order in parts.orders(0, 80)[0].split(16):
        adamw.zero_grad()
        gaussian_nll(alone(parts.x[0, order]), parts.y[0, order]).backward()
        adamw.step()
    for name, p in alone.named_parameters():
        found = start[0].parameters_of(params["flat"][0])[name]
        torch.testing.assert_close(found, p.detach(), rtol=1e-4, atol=1e-5)


def test_settings_are_chosen_on_tasks_that_no_claim_uses():
    assert not set(study.DEVELOPMENT) & set(study.ALL)
    assert len({len(found) for found in study.SETTINGS.values()}) == 1
    options = {"points": 60, "width": 8, "steps": 6, "batch_size": 16, "designs": 8, "ascent": 6}
    row = study.compare(0, study.candidates(), tasks=study.DEVELOPMENT, marks=2, **options)
    frame = pd.DataFrame([row])
    frame["p100_sam.2"] = 9.0
    best = study.chosen_settings(frame)
    assert best["sam"] == {"sam": 0.2} and best["unclipped"] == {**best["dual"], "clip": 0.0}
    found = study.compare(0, {"plain": {}, **best}, tasks=["rbf8", "branin5"], marks=2, **options)
    for name in best:
        each = [found[f"gap_{name}@{t}"] for t in ("rbf8", "branin5")]
        assert found[f"gap_{name}"] == pytest.approx(np.mean(each))
        final = found[f"promised_{name}"][-1] - found[f"true_{name}"][-1]
        assert found[f"gap_{name}"] == pytest.approx(final, abs=1e-6)
        assert found[f"promised_{name}"].shape == (3,)
        assert found[f"miss_{name}"] == pytest.approx(np.mean(np.abs(each)))
    same_start = [found[f"true_{name}"][0] for name in best]
    assert np.ptp(same_start) < 1e-6


# --- the explorer


def test_the_exported_formula_shows_what_the_kernel_shows():
    explorer = figures.explore_ignite()
    assert js.check_formula(explorer, rtol=1e-6, atol=1e-9) > 10
    explorer.result()
    assert explorer.seconds < 0.05
