"""LDR-KL and ALDR-KL against stated numbers, explicit maximisation, limits and a loop over rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from torch.nn import functional as F

from tests.plots import js
from workbench.losses import figures_ldr_loss as figures
from workbench.losses import streaming
from workbench.losses.experiments import ldr_loss as study
from workbench.losses.ldr_loss import (
    ALDR,
    LDRLoss,
    aldr_kl,
    aldr_lambda,
    ldr_kl,
    normalised,
    worst_case,
)

CARD = torch.tensor([[1.0, 0.0, -1.0, 0.5]], dtype=torch.float64)
ZERO = torch.tensor([0])


def draw(n, k, seed=0, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    h = 2 * torch.randn(n, k, generator=source, dtype=torch.float64)
    return h.to(dtype), torch.randint(0, k, (n,), generator=source)


def violations(h, y, margin):
    """h_k - h_y + c for the others, 0 for the label: one row, by a loop."""
    return np.array([float(h[k] - h[y]) + margin * (k != y) for k in range(len(h))])


# --- LDR-KL


@pytest.mark.parametrize("lam, expected", [(0.1, 1.362042), (1.0, 0.832906), (10.0, 0.646179)])
def test_stated_values(lam, expected):
    value = ldr_kl(CARD, ZERO, lam=lam, margin=2.0, normalize=False)
    assert float(value) == pytest.approx(expected, abs=5e-7)


def test_limits_are_the_largest_and_the_mean_violation():
    assert float(ldr_kl(CARD, ZERO, lam=1e-4, margin=2.0, normalize=False)) == pytest.approx(
        1.5, abs=2e-4
    )
    assert float(ldr_kl(CARD, ZERO, lam=1e6, margin=2.0, normalize=False)) == pytest.approx(
        0.625, abs=1e-6
    )


def test_without_margin_it_is_cross_entropy_minus_log_k():
    h, y = draw(50, 7)
    found = ldr_kl(h, y, lam=1.0, margin=0.0, normalize=False)
    torch.testing.assert_close(found, F.cross_entropy(h, y) - math.log(7))
    card = ldr_kl(CARD, ZERO, lam=1.0, margin=0.0, normalize=False)
    assert float(card) == pytest.approx(-0.639727, abs=5e-7)


@pytest.mark.parametrize("lam", [0.2, 1.0, 5.0])
def test_the_loss_is_the_worst_case_found_by_a_solver(lam):
    h, y = draw(5, 4, seed=1)
    for row in range(5):
        d = violations(h[row], int(y[row]), 0.7)

        def cost(p, d=d):
            p = np.clip(p, 1e-12, None)
            return -(p @ d - lam * (p * np.log(4 * p)).sum())

        best = minimize(
            cost, np.full(4, 0.25), method="SLSQP", bounds=[(0, 1)] * 4, tol=1e-12,
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
        )  # fmt: skip
        value = ldr_kl(h[row : row + 1], y[row : row + 1], lam=lam, margin=0.7, normalize=False)
        assert float(value) == pytest.approx(-best.fun, abs=1e-6)
        p = worst_case(h[row], y[row], lam=lam, margin=0.7)
        each = torch.full((1,), lam, dtype=torch.float64)
        torch.testing.assert_close(
            worst_case(h[row : row + 1], y[row : row + 1], lam=each, margin=0.7)[0], p
        )
        np.testing.assert_allclose(p, best.x, atol=2e-3)
        assert -cost(p.numpy()) == pytest.approx(float(value), abs=1e-9)


def test_normalised_scores_have_mean_absolute_value_one_whatever_their_scale():
    h, _ = draw(20, 6)
    plain = normalised(h, softplus=False)
    torch.testing.assert_close(plain.abs().mean(1), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(normalised(1e3 * h, softplus=False), plain)
    soft = normalised(h)
    expected = torch.stack([6 * F.softplus(r) / F.softplus(r).sum() for r in h])
    torch.testing.assert_close(soft, expected)
    assert normalised(torch.zeros(2, 3), softplus=False).eq(0).all()


def test_soft_labels_are_the_expectation_over_labels():
    h, _ = draw(30, 5, seed=2)
    q = torch.rand(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    q = q / q.sum(1, keepdim=True)
    for normalize in (True, False):
        options = {"lam": 0.6, "margin": 0.4, "normalize": normalize}
        each = torch.stack(
            [ldr_kl(h, torch.full((30,), k), reduction="none", **options) for k in range(5)], 1
        )
        found = ldr_kl(h, q, reduction="none", **options)
        torch.testing.assert_close(found, (q * each).sum(1))


def test_soft_labels_do_not_cancel_where_one_score_dominates():
    h = torch.tensor([[40.0, 0.0, 0.0], [0.0, 0.0, 40.0]])
    y = torch.tensor([0, 2])
    options = {"lam": 0.1, "margin": 2.0, "normalize": False, "reduction": "none"}
    soft = ldr_kl(h, F.one_hot(y, 3).float(), **options)
    torch.testing.assert_close(soft, ldr_kl(h, y, **options))


def test_the_minimiser_orders_classes_by_their_probability():
    q = torch.tensor([[0.4, 0.1, 0.3, 0.2]], dtype=torch.float64)
    for lam in (0.3, 1.0, 4.0):
        h = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
        descent = torch.optim.LBFGS([h], max_iter=200, tolerance_grad=1e-12)

        def closure(h=h, lam=lam, descent=descent):
            descent.zero_grad()
            loss = ldr_kl(h, q, lam=lam, margin=0.0, normalize=False)
            loss.backward()
            return loss

        descent.step(closure)
        expected = lam * q.log()
        torch.testing.assert_close(h - h.mean(), expected - expected.mean(), atol=1e-4, rtol=0)


def test_only_in_the_large_lambda_limit_is_it_symmetric():
    h, _ = draw(8, 5, seed=4)

    def spread(lam):
        options = {"lam": lam, "normalize": False, "reduction": "none"}
        total = sum(ldr_kl(h, torch.full((8,), k), **options) for k in range(5))
        return float(total.max() - total.min())

    assert spread(1e7) < 1e-5 and spread(1.0) > 1


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.floats(0.05, 20), st.floats(1.01, 5), st.floats(0, 3))
def test_it_falls_with_lambda_between_the_limits_and_ignores_a_shift(k, lam, factor, margin):
    h, y = draw(6, k, seed=k)
    options = {"margin": margin, "normalize": False, "reduction": "none"}
    low, high = (ldr_kl(h, y, lam=v, **options) for v in (lam, lam * factor))
    d = torch.tensor(np.array([violations(h[i], int(y[i]), margin) for i in range(6)]))
    assert (high <= low + 1e-9).all() and (low <= d.amax(1) + 1e-9).all()
    assert (high >= d.mean(1) - 1e-9).all()
    torch.testing.assert_close(ldr_kl(h + 5, y, lam=lam, **options), low)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients(normalize):
    h, y = draw(4, 3, seed=5)
    h.requires_grad_()
    q = F.one_hot(y, 3).double() * 0.7 + 0.1
    for target in (y, q):

        def loss(h, target=target):
            return ldr_kl(h, target, lam=0.8, margin=0.5, normalize=normalize, reduction="none")

        assert torch.autograd.gradcheck(loss, (h,))
        assert torch.autograd.gradgradcheck(loss, (h,))
    (found,) = torch.autograd.grad(ldr_kl(h, y, lam=2.0, normalize=False, reduction="sum"), h)
    p = worst_case(h.detach(), y, lam=2.0)
    torch.testing.assert_close(found, p - F.one_hot(y, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precision_and_huge_scores(dtype):
    h, y = draw(12, 6, seed=6, dtype=dtype)
    single = ldr_kl(h, y)
    assert single.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(single.double(), ldr_kl(h.double(), y), atol=1e-5, rtol=1e-5)
    huge = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    for normalize in (True, False):
        for label in (0, 1):
            value = ldr_kl(huge, torch.tensor([label]), lam=0.1, normalize=normalize)
            (slope,) = torch.autograd.grad(value, huge)
            assert value.isfinite() and slope.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ldr_kl(h, y), single)


def test_conventions_and_module():
    h, y = draw(12, 4, seed=7, dtype=torch.float32)
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0])
    y[3] = -1
    module = LDRLoss(lam=2.0, weight=weight, ignore_index=-1)
    each = ldr_kl(h, y.clamp(min=0), lam=2.0, reduction="none")
    kept = y >= 0
    expected = (each * weight[y])[kept].sum() / weight[y][kept].sum()
    torch.testing.assert_close(module(h, y), expected)
    other = LDRLoss(lam=2.0, weight=torch.ones(4), ignore_index=-1)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(h, y), expected)
    images = h.view(3, 2, 2, 4).movedim(-1, 1)
    assert ldr_kl(images, y.clamp(min=0).view(3, 2, 2), reduction="none").shape == (3, 2, 2)
    compiled = torch.compile(ldr_kl, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(h, y.clamp(min=0)), each_mean(h, y.clamp(min=0)))


def each_mean(h, y):
    return ldr_kl(h, y, reduction="none").mean()


def test_blocks_of_rows_change_nothing(monkeypatch):
    h, y = draw(300, 5, seed=8)
    h.requires_grad_()
    lam = torch.linspace(0.5, 10, 300, dtype=torch.float64)
    whole = [ldr_kl(h, y), aldr_kl(h, y, lam).sum()]
    slopes = [torch.autograd.grad(v, h)[0] for v in whole]
    monkeypatch.setattr(streaming, "LARGE", 100)
    monkeypatch.setattr(streaming, "BLOCK", 64)
    again = [ldr_kl(h, y), aldr_kl(h, y, lam).sum()]
    for value, slope, new in zip(whole, slopes, again, strict=True):
        torch.testing.assert_close(new, value)
        torch.testing.assert_close(torch.autograd.grad(new, h)[0], slope)


# --- ALDR-KL


def loop(h, y, lam, lam0, alpha, margin):
    """Loss and new lambda of one row, by the formulas, term by term."""
    k = len(h)
    p = np.exp(h / lam) / np.exp(h / lam).sum()
    new = lam0 - lam0 / (alpha * math.log(k)) * sum(v * math.log(k * v) for v in p)
    psi = new * math.log(np.mean(np.exp(violations(h, y, margin) / new)))
    return psi - alpha * math.log(k) / (2 * lam0) * (new - lam0) ** 2, new


def test_aldr_is_the_loop_over_rows_and_remembers():
    h, y = draw(6, 5, seed=9)
    idx = torch.tensor([8, 1, 0, 5, 3, 9])
    loss = ALDR(10, 5, lam0=1.5, alpha=1.7, margin=0.2, reduction="none").double()
    lam = np.full(10, 1.5)
    scores = [5 * r / np.abs(r).sum() for r in h.numpy()]
    for _ in range(3):
        found = loss(h, y, idx)
        each = [loop(s, int(y[r]), lam[idx[r]], 1.5, 1.7, 0.2) for r, s in enumerate(scores)]
        lam[idx] = [new for _, new in each]
        np.testing.assert_allclose(found, [value for value, _ in each], rtol=1e-10)
        np.testing.assert_allclose(loss.lambdas, lam, rtol=1e-10)
    assert (loss.lambdas[[2, 4, 6, 7]] == 1.5).all()


@pytest.mark.parametrize("exact", [True, False])
def test_the_updates_settle_where_the_derivative_vanishes(exact):
    h, y = draw(5, 4, seed=10)
    loss = ALDR(5, 4, lam0=2.0, margin=0.5, normalize=False, exact=exact).double()
    for _ in range(200):
        loss(h, y, torch.arange(5))
    for row in range(5):
        d = violations(h[row], int(y[row]), 0.5 if exact else 0.0)

        def slope(lam, d=d):  # of the objective, by central differences
            def value(v):
                shifted = d / v - (d / v).max()
                psi = v * (math.log(np.exp(shifted).mean()) + (d / v).max())
                return psi - 2 * math.log(4) / (2 * 2.0) * (v - 2.0) ** 2

            return (value(lam + 1e-5) - value(lam - 1e-5)) / 2e-5

        assert float(loss.lambdas[row]) == pytest.approx(brentq(slope, 0.9, 2.0), abs=1e-6)


def test_flat_scores_keep_lambda_and_peaked_ones_lower_it_to_its_bound():
    lam = torch.full((3,), 4.0)
    scores = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [1e4, 0, 0]])
    found = aldr_lambda(scores, lam, lam0=4.0, alpha=2.0)
    assert found[0] == pytest.approx(4.0) and found[2] == pytest.approx(2.0)
    assert 2.0 < found[1] < 4.0


def test_lambdas_are_constants_of_the_gradient():
    h, y = draw(4, 3, seed=11)
    h.requires_grad_()
    loss = ALDR(4, 3, lam0=1.0, normalize=False, reduction="sum").double()
    (found,) = torch.autograd.grad(loss(h, y, torch.arange(4)), h)
    shifted = [
        worst_case(h.detach()[i : i + 1], y[i : i + 1], lam=float(loss.lambdas[i]))
        for i in range(4)
    ]
    torch.testing.assert_close(found, torch.cat(shifted) - F.one_hot(y, 3))
    assert not loss.lambdas.requires_grad


def test_many_memories_at_once_are_the_same_as_one_by_one():
    h = torch.stack([draw(6, 4, seed=s)[0] for s in range(3)])
    y = torch.stack([draw(6, 4, seed=s)[1] for s in range(3)])
    lam = torch.rand(3, 6, dtype=torch.float64) + 0.5
    lams, values = aldr_lambda(h, lam, lam0=2.0), aldr_kl(h, y, lam, lam0=2.0)
    for i in range(3):
        torch.testing.assert_close(lams[i], aldr_lambda(h[i], lam[i], lam0=2.0))
        torch.testing.assert_close(values[i], aldr_kl(h[i], y[i], lam[i], lam0=2.0))


def test_evaluation_state_precision_and_compilation():
    h, y = draw(6, 4, seed=12, dtype=torch.float32)
    idx = torch.arange(6)
    loss = ALDR(8, 4, lam0=1.0)
    loss(h, y, idx)
    before = loss.lambdas.clone()
    loss.eval()(3 * h.flip(1), y, idx)
    assert loss.lambdas.equal(before)
    other = ALDR(8, 4, lam0=1.0).eval()
    other.load_state_dict(loss.state_dict())
    assert other(h, y, idx) == loss(h, y, idx)
    half = other(h.bfloat16(), y, idx)
    assert half.dtype is torch.float32 and half.isfinite()
    fresh, compiled = ALDR(8, 4), torch.compile(ALDR(8, 4), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(h, y, idx), fresh(h, y, idx))
    torch.testing.assert_close(compiled.lambdas, fresh.lambdas)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ldr_kl(CARD, ZERO, lam=0), "lam: expected"),
        (lambda: ldr_kl(CARD, ZERO, margin=-1), "margin: expected"),
        (lambda: ldr_kl(CARD, torch.tensor([4])), "classes 0..3"),
        (lambda: LDRLoss(lam=-1.0), "lam: expected"),
        (lambda: ALDR(10, 1), "K: expected"),
        (lambda: ALDR(0, 3), "n_train: expected"),
        (lambda: ALDR(10, 3, alpha=1.0), "alpha: expected"),
        (lambda: ALDR(10, 3)(CARD, ZERO, ZERO), r"expected \(n, 3\)"),
        (lambda: ALDR(10, 4)(CARD, ZERO, torch.tensor([10])), "idx: expected"),
        (lambda: ALDR(10, 4)(CARD, ZERO, torch.tensor([1, 2])), "idx: expected shape"),
        (lambda: ALDR(10, 4)(CARD, torch.tensor([4]), ZERO), "y: expected classes"),
        (lambda: worst_case(CARD, torch.tensor([0, 1])), "y: expected one class"),
        (lambda: aldr_lambda(CARD, torch.ones(1), alpha=0.5), "alpha: expected"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_whole_numbers_are_no_scores():
    with pytest.raises(TypeError, match="logits"):
        worst_case(torch.ones(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match="idx"):
        ALDR(10, 4)(CARD, ZERO, torch.tensor([1.0]))


# --- experiment and explorer


def test_the_experiment_trains_every_loss_and_reads_its_memories():
    row = study.compare_losses(0, size=300, epochs=2, rates=(0.1, 0.3))
    names, ranked = list(row["names"]), len(study.RANKED)
    assert row["top"].shape == (len(names), len(study.SETTINGS), study.TOP)
    assert set(np.unique(row["rate"])) <= {0.1, 0.3}
    assert (np.diff(row["top"], axis=2) >= -1e-4).all()
    first = row["top"][:ranked, :, 0]
    rank = [1 + (c > c[0]).sum() + ((c == c[0]).sum() - 1) / 2 for c in first.T]
    assert row["rank_CE"] == pytest.approx(np.mean(rank))
    assert row["acc_CE"] == pytest.approx(first[0, 1:].mean())
    np.testing.assert_allclose(row["hist_1"].sum(-1), 1)
    assert 0.5 <= row["least_1"] <= 1 and 5 <= row["least_10"] <= 10


def test_labels_are_as_noisy_as_the_settings_say():
    y = torch.arange(10).repeat(400)
    flipped = (study.noisy(y, 10, 0) != y[:, None]).double().mean(0)
    np.testing.assert_allclose(flipped, [0, 0.27, 0.54, 0.81, 0.3], atol=0.03)


def test_the_exported_formula_is_the_loss():
    source = np.random.default_rng(0)
    lam, bad = source.uniform(0.5, 1, (20, 50)), source.random(50) < 0.3
    shares = study.shares(lam, bad, 1.0)
    np.testing.assert_allclose(shares.sum(2), 1)
    explorer = figures.explore_ldr({"some": shares, "more": shares[::-1]})
    states = list(js.corners(explorer))
    assert js.check_formula(explorer, states[::37], rtol=1e-6) > 20
    explorer.result()
    assert explorer.seconds < 0.05
    alone = figures.explore_ldr(lam=3.0)
    assert js.check_formula(alone, list(js.corners(alone))[::9]) > 20
