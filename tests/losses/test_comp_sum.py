"""Comp-sum losses against torch, closed forms, brute force over scores and the library's attack."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

from tests.plots import js
from workbench.lab import members
from workbench.lab.models import MLP
from workbench.losses import attacks, baselines, figures_comp_sum
from workbench.losses.comp_sum import (
    CompSumLoss,
    T,
    best_risk,
    comp_sum_loss,
    conditional_regrets,
    gamma,
    smooth_adv_loss,
    trades_loss,
)
from workbench.losses.experiments import comp_sum as study

TAUS = (0.0, 0.5, 1.0, 1.5, 2.0)
H = torch.tensor([[1, 0, -1, 0.5]], dtype=torch.float64)
Y = torch.tensor([0])


def random(*shape, seed=0, scale=2.0):
    source = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, dtype=torch.float64, generator=source)


def linear(d=6, k=3, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(d, k).double()


def phi(u, tau):
    return math.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)


# --- the loss


@pytest.mark.parametrize(
    "tau, expected",
    [(0.0, 1.109745), (0.5, 0.904993), (1.0, 0.746567), (1.5, 0.623060), (2.0, 0.526009)],
)
def test_four_classes_by_hand(tau, expected):
    assert float(comp_sum_loss(H, Y, tau=tau)) == pytest.approx(expected, abs=5e-7)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.floats(0, 3.5), st.integers(0, 10**6))
def test_the_loss_is_phi_of_the_sum_over_wrong_classes(k, tau, seed):
    h, y = random(5, k, seed=seed), torch.arange(5) % k
    found = comp_sum_loss(h, y, tau=tau, reduction="none")
    for i in range(5):
        u = sum(math.exp(h[i, c] - h[i, y[i]]) for c in range(k) if c != y[i])
        assert float(found[i]) == pytest.approx(phi(u, tau), rel=1e-8, abs=1e-12)


def test_the_named_members_of_the_family():
    h, y = random(20, 5), torch.arange(20) % 5
    p = h.softmax(1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(comp_sum_loss(h, y), F.cross_entropy(h, y))
    torch.testing.assert_close(comp_sum_loss(h, y, tau=0, reduction="none"), 1 / p - 1)
    torch.testing.assert_close(comp_sum_loss(h, y, tau=2, reduction="none"), 1 - p)
    torch.testing.assert_close(comp_sum_loss(h, y, tau=1.7), ((1 - p**0.7) / 0.7).mean())
    torch.testing.assert_close(comp_sum_loss(h, y, tau=1.7), baselines.gce(h, y, q=0.7))
    # one slope in common at certainty, and neighbours of tau = 1 agree with it
    torch.testing.assert_close(comp_sum_loss(h, y, tau=1 + 1e-9), F.cross_entropy(h, y))


@pytest.mark.parametrize("tau", TAUS)
def test_soft_labels_mix_the_losses_of_the_classes(tau):
    h, q = random(6, 4), random(6, 4, seed=1).softmax(1)
    each = [comp_sum_loss(h, torch.full((6,), k), tau=tau, reduction="none") for k in range(4)]
    expected = (q * torch.stack(each, 1)).sum(1)
    torch.testing.assert_close(comp_sum_loss(h, q, tau=tau, reduction="none"), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_at_one_all_conventions_are_those_of_cross_entropy(reduction):
    h, y, w = random(8, 4, 3), torch.randint(4, (8, 3)), torch.rand(4).double() + 0.1
    y[0, 0] = -7
    options = {"weight": w, "ignore_index": -7, "reduction": reduction}
    torch.testing.assert_close(comp_sum_loss(h, y, **options), F.cross_entropy(h, y, **options))
    module = CompSumLoss(tau=1.0, **options)
    torch.testing.assert_close(module(h, y), F.cross_entropy(h, y, **options))


@pytest.mark.parametrize("tau", TAUS)
def test_gradients_of_first_and_second_order(tau):
    h, y = random(4, 3).requires_grad_(), torch.tensor([0, 1, 2, 1])
    q = random(4, 3, seed=3).softmax(1)
    for target in (y, q):
        assert torch.autograd.gradcheck(lambda h, t=target: comp_sum_loss(h, t, tau=tau), (h,))
        assert torch.autograd.gradgradcheck(lambda h, t=target: comp_sum_loss(h, t, tau=tau), (h,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_extreme_scores_stay_finite_in_every_precision(dtype, tau):
    h = torch.tensor([[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 0]], dtype=dtype, requires_grad=True)
    for target in (torch.zeros(3, dtype=torch.long), torch.eye(3)):
        loss = comp_sum_loss(h, target, tau=tau, reduction="none")
        assert loss.dtype == torch.float32 and loss.isfinite().all()
        (slope,) = torch.autograd.grad(loss[1:].sum(), h)
        if dtype != torch.float16 or tau >= 1:  # e^60 has no half-precision gradient
            assert slope.isfinite().all()


def test_the_continuation_is_convex_and_starts_where_the_exponential_ends():
    c = torch.linspace(59.9, 60.1, 201, dtype=torch.float32)
    h = torch.stack([torch.zeros_like(c), c], 1)
    loss = comp_sum_loss(h, torch.zeros(201, dtype=torch.long), tau=0, reduction="none")
    assert (loss.diff() > 0).all()
    assert float(loss[50]) == pytest.approx(math.exp(59.95), rel=1e-3)


def test_autocast_and_compile_change_nothing():
    h, y = random(16, 5).float(), torch.arange(16) % 5
    module = CompSumLoss(tau=1.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(h, y), comp_sum_loss(h, y, tau=1.5))
    for tau in (0.5, 1.5):
        compiled = torch.compile(CompSumLoss(tau=tau), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(h, y), comp_sum_loss(h, y, tau=tau))


def test_the_module_keeps_its_weights_in_its_state():
    first, second = CompSumLoss(weight=torch.rand(3)), CompSumLoss(weight=torch.ones(3), tau=1.2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.weight, first.weight) and "tau=1.2" in repr(second)


# --- the guarantee


@pytest.mark.parametrize(
    "tau, expected",
    [(0.0, 0.133975), (0.5, 0.125628), (1.0, 0.130812), (1.5, 0.166925), (2.0, 0.25)],
)
def test_two_classes_with_the_zero_score_have_exactly_this_regret(tau, expected):
    probs = torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    regret = comp_sum_loss(torch.zeros_like(probs), probs, tau=tau) - best_risk(probs, tau=tau)
    assert float(T(0.5, tau)) == pytest.approx(expected, abs=5e-7)
    assert float(regret) == pytest.approx(float(T(0.5, tau)), abs=1e-12)


def test_ten_classes_at_two():
    assert float(T(0.5, 2.0, 10)) == pytest.approx(0.05)


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0, 1.6, 1.99, 1.99999, 2.5])
def test_t_is_the_formula_in_forty_digits(tau):
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        for beta in (1e-7, 1e-3, 0.3, 0.9, 0.999999, 1.0):
            b, t, n = mpmath.mpf(beta), mpmath.mpf(tau), 7
            if tau == 1:
                terms = [(1 + s * b) * mpmath.log(1 + s * b) for s in (1, -1) if 1 + s * b > 0]
                exact = sum(terms) / 2
            elif tau >= 2:
                exact = b / ((t - 1) * mpmath.mpf(n) ** (t - 1))
            else:
                r = 1 / (2 - t)
                power = (((1 + b) ** r + (1 - b) ** r) / 2) ** (2 - t)
                base = 2 if tau < 1 else n
                exact = (power - 1) / ((t - 1) * mpmath.mpf(base) ** (t - 1))
            assert float(T(beta, tau, n)) == pytest.approx(float(exact), rel=1e-8)


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 4), st.integers(2, 1000), st.floats(1e-6, 1))
def test_gamma_undoes_t(tau, n, beta):
    assert float(gamma(T(beta, tau, n), tau, n)) == pytest.approx(beta, rel=1e-6)
    assert float(gamma(0.0, tau, n)) < 1e-15


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.floats(0, 3), st.integers(0, 10**6), st.floats(0.1, 6))
def test_the_bound_holds_for_any_scores_and_probabilities(k, tau, seed, scale):
    logits, probs = random(50, k, seed=seed), random(50, k, seed=seed + 1, scale=scale).softmax(1)
    zero_one, surrogate = conditional_regrets(logits, probs, tau=tau)
    assert (surrogate > -1e-10).all()
    assert (gamma(surrogate.clamp(min=0), tau, k) >= zero_one - 1e-7).all()


def least_regret(probs, wrong, tau):
    """Brute force: scipy moves the scores; the class ``wrong`` must have the highest one."""
    k = len(probs)

    def risk(h):
        c = np.logaddexp.reduce(h) - h
        return probs @ (c if tau == 1 else np.expm1((1 - tau) * c) / (1 - tau))

    above = {"type": "ineq", "fun": lambda h: h[wrong] - np.delete(h, wrong)}
    bounds = [(-30, 30)] * k
    constrained = [
        minimize(risk, start, constraints=[above], bounds=bounds, method="SLSQP",
                 options={"ftol": 1e-13, "maxiter": 300}).fun
        for start in (np.zeros(k), np.eye(k)[wrong])
    ]  # fmt: skip
    free = best_risk(torch.as_tensor(probs), tau=tau)
    return min(constrained) - float(free)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_up_to_one_two_heavy_classes_of_four_attain_the_bound_and_nothing_beats_it(tau):
    worst = np.array([0.7, 0.3, 0.0, 0.0])
    assert least_regret(worst, 1, tau) == pytest.approx(float(T(0.4, tau, 4)), abs=1e-5)
    for others in ([0.6, 0.2, 0.2, 0.0], [0.55, 0.15, 0.2, 0.1], [0.5, 0.1, 0.2, 0.2]):
        assert least_regret(np.array(others), 1, tau) > float(T(0.4, tau, 4)) - 1e-6


def test_above_one_the_bound_is_below_every_regret_of_three_classes_and_not_attained():
    tau, beta = 1.5, 0.25
    regrets = []
    for top in np.linspace((1 + beta) / 3, (1 + beta) / 2, 9):  # all p with p_0 - p_1 = beta
        probs = np.array([top, top - beta, max(0.0, 1 - 2 * top + beta)])
        regrets.append(least_regret(probs, 1, tau))
    bound = float(T(beta, tau, 3))
    assert 1.2 * bound < min(regrets) < 2 * bound
    pair = np.array([(1 + beta) / 2, (1 - beta) / 2])
    assert least_regret(pair, 1, tau) == pytest.approx(float(T(beta, tau, 2)), abs=1e-6)


def test_at_two_the_bound_is_attained_while_all_other_classes_tie_for_the_best():
    probs = np.array([0.22, 0.22, 0.22, 0.22, 0.12])
    assert least_regret(probs, 4, 2.0) == pytest.approx(float(T(0.10, 2.0, 5)), abs=1e-7)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
def test_the_best_risk_is_a_minimum_over_scores(tau):
    probs = random(3, 4, seed=5).softmax(1)
    h = probs.log() / (2 - tau) if tau < 2 else 60 * F.one_hot(probs.argmax(1), 4).double()
    found = comp_sum_loss(h, probs, tau=tau, reduction="none")
    torch.testing.assert_close(best_risk(probs, tau=tau), found, rtol=1e-7, atol=1e-9)
    moved = comp_sum_loss(h + random(3, 4, seed=6, scale=0.1), probs, tau=tau, reduction="none")
    assert (moved >= found - 1e-12).all()


# --- adversarial


def test_the_smooth_adversarial_loss_of_a_linear_model_is_known():
    """Scores change by W (x' - x): in the L2 ball the supremum is eps times a spectral norm."""
    model, x, y = linear(), random(4, 6, seed=2), torch.tensor([0, 1, 2, 0])
    w = model.weight.detach()
    sup = torch.stack([torch.linalg.matrix_norm(w[c] - w, ord=2) for c in y]) * 0.3
    clean = comp_sum_loss(model(x) / 0.7, y, tau=1.3, reduction="none")
    found = smooth_adv_loss(
        model, x, y, eps=0.3, tau=1.3, rho=0.7, nu=2.0, norm="l2", steps=60, step_size=0.1,
        reduction="none", generator=0,
    )  # fmt: skip
    torch.testing.assert_close(found, clean + 2 * sup, rtol=2e-3, atol=2e-3)
    penalty = 0.1 * sum(p.square().sum() for p in model.parameters())
    plain = smooth_adv_loss(model, x, y, eps=0.0, tau=1.3, rho=0.7, nu=0.0, lam=0.1)
    torch.testing.assert_close(plain, clean.mean() + penalty)


def test_enough_weight_makes_it_an_upper_bound_of_the_adversarial_zero_one_loss():
    model, x, rho = linear(d=4, k=3, seed=4), random(200, 4, seed=5), 0.5
    y = torch.randint(3, (200,), generator=torch.Generator().manual_seed(6))
    fooled = ~attacks.survives(model, x, y, eps=0.2, norm="linf", steps=20, generator=0)
    for tau in (0.0, 1.0, 1.5):
        loss = smooth_adv_loss(
            model, x, y, eps=0.2, tau=tau, rho=rho, nu=math.sqrt(2) / rho, reduction="none",
            steps=20, generator=0,
        )  # fmt: skip
        assert (loss[fooled] >= phi(1, tau)).all() and (loss >= 0).all()
    assert 0.1 < fooled.double().mean() < 1


def test_trades_of_a_linear_model_against_a_search_over_corners():
    model, x, y = linear(d=3), random(5, 3, seed=1), torch.tensor([0, 1, 2, 0, 1])
    corners = torch.tensor(np.stack(np.meshgrid(*[[-0.2, 0.2]] * 3), -1).reshape(-1, 3))
    p = model(x).log_softmax(1)
    kl = torch.stack([(p.exp() * (p - model(x + c).log_softmax(1))).sum(1) for c in corners])
    found = trades_loss(model, x, y, eps=0.2, beta=4.0, steps=30, reduction="none", generator=0)
    values = F.cross_entropy(model(x), y, reduction="none") + 4 * kl
    # the divergence is convex here, so ascent ends in a corner, if not always in the best one
    assert ((found - values).abs().amin(0) < 1e-6).all()
    torch.testing.assert_close(found, values.amax(0), rtol=0.02, atol=0)


@pytest.mark.parametrize("loss", [smooth_adv_loss, trades_loss])
def test_training_gets_gradients_and_the_attack_leaves_no_trace(loss):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = random(16, 6).float(), torch.arange(16) % 3
    value = loss(model, x, y, eps=0.1, generator=0)
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert int(model[1].num_batches_tracked) == 2  # at x and at the point found
    value.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert torch.equal(
        loss(model, x, y, eps=0.1, generator=3), loss(model, x, y, eps=0.1, generator=3)
    )


def test_several_networks_at_once_are_each_alone():
    w, x = random(2, 6, 3), random(2, 5, 6, seed=1)
    y, nu = torch.arange(10).view(2, 5) % 3, torch.tensor([[0.5], [2.0]])
    options = {"eps": 0.2, "norm": "l2", "steps": 60, "step_size": 0.1, "reduction": "none"}
    both = smooth_adv_loss(lambda x: x @ w, x, y, nu=nu, **options)
    for i in range(2):
        alone = smooth_adv_loss(lambda x, i=i: x @ w[i], x[i], y[i], nu=float(nu[i]), **options)
        torch.testing.assert_close(both[i], alone, rtol=1e-3, atol=1e-3)
    start = random(2, 5, 6, seed=2)

    def objective(w, y):
        return attacks.margin(lambda x: (x @ w).sin(), y)

    found = attacks.pgd(objective(w, y), x, eps=0.3, start=start)
    for i in range(2):
        alone = attacks.pgd(objective(w[i], y[i]), x[i], eps=0.3, start=start[i])
        torch.testing.assert_close(found[i], alone)


# --- attacks


@pytest.mark.parametrize("norm", attacks.NORMS)
def test_a_linear_objective_is_maximised_exactly(norm):
    g, x = random(4, 5, seed=3), random(4, 5, seed=4)
    found = attacks.pgd(
        lambda at: (at * g).sum(1), x, eps=0.5, norm=norm, steps=60, step_size=0.2, generator=0
    )
    dual = g.abs().sum(1) if norm == "linf" else g.norm(dim=1)
    torch.testing.assert_close(((found - x) * g).sum(1), 0.5 * dual, rtol=1e-4, atol=0)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(attacks.NORMS), st.floats(0, 1), st.integers(1, 5), st.integers(0, 99))
def test_points_stay_in_ball_and_box_and_never_get_worse(norm, eps, steps, seed):
    x, peak = random(6, 2, 3, seed=seed).sigmoid(), random(6, 2, 3, seed=seed + 1)

    def objective(at):
        return -((at - peak) ** 4).flatten(1).sum(1)

    found = attacks.pgd(
        objective, x, eps=eps, norm=norm, steps=steps, restarts=2, box=(0, 1), generator=seed
    )
    move = (found - x).flatten(1)
    size = move.abs().amax(1) if norm == "linf" else move.norm(dim=1)
    assert (size <= eps + 1e-9).all() and found.min() >= 0 and found.max() <= 1
    assert (objective(found) >= objective(x)).all()


def test_as_strong_as_the_librarys_attack():
    """Same steps, same start (none random): the two find points of the same loss."""
    evasion = pytest.importorskip("art.attacks.evasion")
    estimators = pytest.importorskip("art.estimators.classification")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    x, y = random(64, 6).sigmoid().float(), torch.arange(64) % 3
    objective = attacks.cross_entropy(model, y)
    # with L2 and a box the library clips before it projects, so its points differ a little
    for norm, order, box in (("linf", np.inf, (0.0, 1.0)), ("l2", 2, None)):
        wrapped = estimators.PyTorchClassifier(
            model, nn.CrossEntropyLoss(), input_shape=(6,), nb_classes=3, clip_values=box
        )
        theirs = evasion.ProjectedGradientDescentPyTorch(
            wrapped, norm=order, eps=0.2, eps_step=0.05, max_iter=10, batch_size=64, verbose=False
        ).generate(x.numpy(), F.one_hot(y, 3).numpy())
        ours = attacks.pgd(
            objective, x, eps=0.2, steps=10, step_size=0.05, norm=norm, start=x, box=box
        )
        gap = objective(ours) - objective(torch.from_numpy(theirs))
        assert (gap > -1e-5).all()  # the best point seen, never worse than the last one
        torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: comp_sum_loss(H, Y, tau=-0.1), "tau"),
        (lambda: comp_sum_loss(H, torch.tensor([4]), tau=2), "target"),
        (lambda: CompSumLoss(tau=-1), "tau"),
        (lambda: T(1.1, 1.0), "beta"),
        (lambda: T(0.5, 1.5, 1), "n: expected"),
        (lambda: gamma(-0.1, 1.0), "t: expected"),
        (lambda: best_risk(H.softmax(1), tau=-1), "tau"),
        (lambda: smooth_adv_loss(linear(), random(1, 6), Y, eps=-1), "eps"),
        (lambda: smooth_adv_loss(linear(), random(1, 6), Y, eps=0.1, rho=0.0), "rho"),
        (lambda: smooth_adv_loss(linear(), random(1, 6), Y, eps=0.1, nu=-1.0), "nu"),
        (lambda: trades_loss(linear(), random(1, 6), Y, eps=0.1, beta=-1.0), "beta"),
        (lambda: attacks.pgd(lambda x: x.sum(), H, eps=0.1), "objective"),
        (lambda: attacks.pgd(lambda x: x.sum(1), H, eps=0.1, norm="l1"), "norm"),
        (lambda: attacks.pgd(lambda x: x.sum(1), H, eps=0.1, start=H[:, :2]), "start"),
        (lambda: attacks.pgd(lambda x: x.sum(1), H, eps=0.1, steps=0), "steps"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types_name_the_argument():
    with pytest.raises(TypeError, match="model"):
        smooth_adv_loss(lambda x: x, random(1, 6), Y, eps=0.1, lam=0.1)
    with pytest.raises(TypeError, match="x: expected"):
        attacks.pgd(lambda x: x.sum(1), Y[:, None], eps=0.1)


# --- explorer and experiments


def test_the_exported_formula_is_the_family():
    explorer = figures_comp_sum.explore_comp_sum(n=100)
    assert js.check_formula(explorer, rtol=1e-6) == 64
    explorer.result()
    assert explorer.seconds < 0.05


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5, 1.9])
def test_the_search_finds_no_more_than_scipy_and_no_random_distribution_less(tau):
    beta, n = 0.3, 4
    least = study.least_regret(beta, tau, n)
    assert least >= float(T(beta, tau, n)) - 1e-12
    rng = np.random.default_rng(0)
    for _ in range(200):
        top = rng.uniform((1 + beta) / n, (1 + beta) / 2)
        rest = rng.dirichlet(np.full(n - 2, rng.uniform(0.2, 5))) * (1 - 2 * top + beta)
        if top >= beta and rest.max() <= top:
            probs = torch.tensor([[top - beta, top, *rest]])
            found = best_risk(study._pooled(probs), tau=tau) - best_risk(probs, tau=tau)
            assert float(found) >= least - 1e-9
    assert least_regret(np.array([0.6, 0.3, 0.05, 0.05]), 1, tau) > least - 1e-6
    pooled = best_risk(study._pooled(torch.tensor([[0.2, 0.5, 0.25, 0.05]]).double()), tau=tau)
    free = best_risk(torch.tensor([0.2, 0.5, 0.25, 0.05]).double(), tau=tau)
    brute = least_regret(np.array([0.5, 0.2, 0.25, 0.05]), 1, tau)
    assert float(pooled - free) == pytest.approx(brute, abs=1e-5)


def test_pairs_share_no_digit_between_training_and_test():
    parts, classes = study._parts("pairs", 0, 300, "cpu")
    halves = [{tuple(row) for row in x.reshape(-1, 64).tolist()} for x, _ in parts]
    assert classes == 100 and not halves[0] & halves[1] and not halves[0] & halves[2]
    assert [len(x) for x, _ in parts] == [300, 100, 1500]


def test_a_learning_rate_as_a_factor_of_the_loss_is_a_learning_rate():
    x, y = random(60, 5).float(), torch.arange(60) % 3
    lrs, seeds = torch.tensor([0.05, 0.2]), [3, 3]
    model, states = members.start(lambda: MLP([5, 6, 3]), seeds)

    def loss(out, target, index):
        return F.cross_entropy(out.flatten(0, 1), target.flatten(), reduction="none").view(
            target.shape
        ).mean(1)  # fmt: skip

    expected = members.train(
        model, states, x, y, loss, seeds=seeds, epochs=3, batch_size=25, lr=lrs, optimizer="sgd",
        schedule="cosine",
    )  # fmt: skip
    for name in ("plain", "smooth", "trades"):  # with weight 0 the robust losses are plain ones
        found = study._train_robustly(
            model, states, x, y, name=name, settings=[(0.0, float(lr)) for lr in lrs], seed=3,
            eps=0.1, epochs=3, batch_size=25, steps=1,
        )  # fmt: skip
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def test_the_experiments_tune_each_side_on_held_out_rows():
    row = study.clean(0, taus=(1.0, 2.0), lrs=(1e-5, 0.1), epochs=8, size=300, rate=0.2)
    assert row["lr_1"] == 0.1 and row["acc_1"] > 0.3
    assert row["lr_2"] == 1.0  # ten times the pull at ten classes
    row = study.robust(
        0, factors=(0.3,), lrs=(0.0, 0.2), epochs=5, size=300, steps=2, restarts=1, width=32
    )
    for name in ("smooth", "trades", "plain"):
        assert row[f"lr_{name}"] == 0.2
        assert row[f"robust_{name}"] <= row[f"clean_{name}"]
    with pytest.raises(ValueError, match="task"):
        study.clean(0, task="letters")
    with pytest.raises(ValueError, match="tau"):
        study.least_regret(0.1, 2.5, 3)
