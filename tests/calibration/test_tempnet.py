"""TempNet and its robust losses against the primal problem, closed forms, loops and autograd."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize, minimize_scalar

from workbench.calibration.experiments import tempnet as study
from workbench.calibration.tempnet import (
    ContrastiveTempNet,
    RobustContrastiveLoss,
    TempNet,
    fit_tempnet,
    optimal_tau,
    robust_loss,
    tempnet_loss,
)

H = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
spread_rows = arrays(np.float64, (4, 5), elements=st.floats(-6, 6, width=32)).filter(
    lambda rows: (np.sort(rows)[:, -1] - np.sort(rows)[:, -2] > 0.05).all()
)


def random_case(n=12, k=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, k, generator=generator, dtype=dtype) * 2
    return logits, torch.randint(k, (n,), generator=generator)


def kl_to_uniform(logits, tau):
    p = (logits / tau[:, None]).softmax(1)
    return (p * (p * p.shape[1]).log()).sum(1)


@pytest.mark.parametrize("rho, expected", [(0.1, 2.4135), (0.5, 0.90869), (1.0, 0.45195)])
def test_optimal_tau_at_published_points(rho, expected):
    assert float(optimal_tau(H, rho)) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("label", range(4))
def test_optimal_tau_minimises_the_loss_whatever_the_label(label):
    found = minimize_scalar(
        lambda t: float(robust_loss(H, [label], torch.tensor(t), 0.5)),
        bounds=(0.05, 20),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert found.x == pytest.approx(float(optimal_tau(H, 0.5)), rel=1e-5)


def test_the_dual_minimum_is_the_maximum_of_the_constrained_primal():
    rho, label, h = 0.5, 1, H[0].numpy()

    def kl(p):
        return float((p * np.log(4 * p)).sum())

    primal = minimize(
        lambda p: -float(p @ (h - h[label])),
        np.full(4, 0.25),
        bounds=[(1e-9, 1)] * 4,
        constraints=[
            {"type": "eq", "fun": lambda p: p.sum() - 1},
            {"type": "ineq", "fun": lambda p: rho - kl(p)},
        ],
        options={"ftol": 1e-12, "maxiter": 500},
    )
    tau = optimal_tau(H, rho)[:, None]
    assert -primal.fun == pytest.approx(float(robust_loss(H, [label], tau, rho)), abs=1e-6)
    assert np.allclose(primal.x, (H / tau).softmax(1)[0].numpy(), atol=1e-4)


def test_a_budget_of_log_k_or_more_gives_the_smallest_temperature():
    for rho in (math.log(4), 2.0):
        assert float(optimal_tau(H, rho, tau_min=0.02)) == 0.02
    ties = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert float(optimal_tau(ties, math.log(2) + 1e-6, tau_min=0.02)) == pytest.approx(0.02)
    assert float(optimal_tau(ties, math.log(2) - 1e-2)) > 0.02
    assert float(optimal_tau(torch.zeros(1, 4), 0.5, tau_min=0.02)) == pytest.approx(0.02)
    assert float(optimal_tau(H, 1e-9, tau_max=7.0)) == 7.0


@settings(max_examples=50, deadline=None)
@given(spread_rows, st.floats(0.05, 0.95))
def test_the_optimal_temperature_spends_the_whole_budget(rows, share):
    h, rho = torch.from_numpy(rows), share * math.log(5)
    tau = optimal_tau(h, rho, tau_min=1e-6, tau_max=1e6)
    assert torch.allclose(kl_to_uniform(h, tau), torch.full((4,), rho).double(), atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    spread_rows,
    st.floats(0.1, 0.9),
    st.floats(0.2, 5),
    st.floats(-5, 5),
    st.permutations(range(5)),
)
def test_optimal_tau_scales_with_the_logits_and_ignores_shift_and_order(
    rows, share, scale, shift, order
):
    h, rho = torch.from_numpy(rows), share * math.log(5)
    tau = optimal_tau(h, rho, tau_min=1e-6, tau_max=1e6)
    moved = optimal_tau(scale * h[:, order] + shift, rho, tau_min=1e-6, tau_max=1e6)
    assert torch.allclose(moved, scale * tau, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(spread_rows, st.floats(0.05, 0.4), st.floats(0.45, 0.9))
def test_a_larger_budget_cools(rows, low, high):
    h = torch.from_numpy(rows)
    assert bool((optimal_tau(h, high * math.log(5)) <= optimal_tau(h, low * math.log(5))).all())


def test_options_warm_the_optimum_under_a_small_budget_and_cool_it_under_a_large_one():
    rows = torch.zeros(4, 50)
    for i, ties in enumerate((1, 2, 4, 8)):
        rows[i, :ties] = 5.0
    small = optimal_tau(rows, 0.1 * math.log(50))
    large = optimal_tau(rows, 0.8 * math.log(50), tau_min=0.01)
    assert bool((small.diff() > 0).all())
    assert large[0] > large[1] > 0.01
    # 4 options and more cannot reach this KL at all: log(50 / 4) < 0.8 log 50.
    assert large[2:].tolist() == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tau_one_gives_cross_entropy_and_a_constant(dtype):
    logits, labels = random_case(dtype=dtype)
    found = robust_loss(logits, labels, torch.ones(12, 1, dtype=dtype), 1.3)
    expected = F.cross_entropy(logits, labels) + 1.3 - math.log(6)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_robust_loss_equals_a_loop_over_the_dual():
    logits, labels = random_case()
    tau = torch.rand(12, 1, dtype=torch.float64) + 0.3
    total = 0.0
    for h, y, t in zip(logits.numpy(), labels.numpy(), tau.numpy()[:, 0], strict=True):
        total += t * np.log(np.mean(np.exp((h - h[y]) / t))) + t * 0.7
    assert float(robust_loss(logits, labels, tau, 0.7)) == pytest.approx(total / 12, rel=1e-10)


def test_labels_leave_the_slope_in_tau_unchanged():
    logits, _ = random_case()
    slopes = []
    for label in range(6):
        tau = torch.full((12, 1), 0.8, dtype=torch.float64, requires_grad=True)
        loss = robust_loss(logits, torch.full((12,), label), tau, 0.7)
        slopes.append(torch.autograd.grad(loss, tau)[0])
    expected = (0.7 - kl_to_uniform(logits, torch.full((12,), 0.8)))[:, None] / 12
    assert all(torch.allclose(slope, expected, atol=1e-12) for slope in slopes)


def test_gradcheck():
    logits, labels = random_case(n=4)
    torch.manual_seed(0)
    tempnet = TempNet(6, hidden=8).double().eval()
    tau = torch.rand(4, 1, dtype=torch.float64) + 0.5
    inputs = (logits.requires_grad_(), tau.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, t: robust_loss(h, labels, t, 0.7), inputs)
    assert torch.autograd.gradcheck(tempnet, (logits,))
    contrastive = ContrastiveTempNet(3, prototypes=5).double().eval()
    points = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(contrastive, (points,))


def test_tempnet_computes_the_published_expression():
    torch.manual_seed(0)
    tempnet = TempNet(6, hidden=4, tau_min=0.5, tau_max=5.0).double().eval()
    h = np.linspace(-1, 2, 6)
    state = {name: value.numpy() for name, value in tempnet.state_dict().items()}
    inner = state["proj.0.weight"] @ (h / np.linalg.norm(h)) + state["proj.0.bias"]
    x = state["proj.3.weight"] @ (1 / (1 + np.exp(-inner))) + state["proj.3.bias"]
    attention = np.exp(x) / np.exp(x).sum()
    z = ((attention - 0.25) * x).sum()
    expected = 0.5 + 4.5 / (1 + np.exp(-z))
    assert tempnet(torch.from_numpy(h)).item() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(arrays(np.float64, (3, 6), elements=st.floats(-50, 50)), st.floats(0.1, 10))
def test_tempnet_stays_in_its_range_and_ignores_scale(rows, scale):
    torch.manual_seed(0)
    tempnet = TempNet(6, hidden=8, tau_min=0.1, tau_max=1.2).double().eval()
    h = torch.from_numpy(rows)
    h = torch.where(h.norm(dim=1, keepdim=True) > 1, h, 1.0)
    tau = tempnet(h)
    assert tau.shape == (3, 1) and bool(((tau >= 0.1) & (tau <= 1.2)).all())
    assert torch.allclose(tempnet(scale * h), tau)


def test_leading_dimensions_are_kept():
    tempnet = TempNet(6, hidden=8).eval()
    h = torch.randn(2, 3, 6)
    assert torch.allclose(tempnet(h).reshape(6, 1), tempnet(h.reshape(6, 6)))


def test_frozen_mode_leaves_the_base_alone_and_joint_mode_trains_both():
    base, tempnet = torch.nn.Linear(5, 6), TempNet(6, hidden=8).eval()
    x, labels = torch.randn(12, 5), torch.arange(12) % 6
    tempnet_loss(tempnet, base(x).detach(), labels, 1.0).backward()
    assert base.weight.grad is None and tempnet.last.weight.grad is not None
    tempnet.zero_grad()
    tempnet_loss(tempnet, base(x), labels, 1.0).backward()
    logits = base(x).detach().requires_grad_()
    tau = tempnet(logits.detach()).detach()
    # (softmax - onehot) / n: the multiplier tau undoes the division inside.
    expected = ((logits / tau).softmax(1) - F.one_hot(labels, 6)) / 12
    (found,) = torch.autograd.grad(tempnet_loss(tempnet, logits, labels, 1.0), logits)
    assert base.weight.grad is not None
    assert torch.allclose(found, expected, atol=1e-6)


def test_training_on_one_context_reaches_the_optimal_temperature():
    torch.manual_seed(0)
    logits = H.float().expand(64, 4)
    labels = torch.arange(64) % 4
    tempnet = TempNet(4, hidden=16)
    fit_tempnet(tempnet, logits, labels, 0.5, lr=0.02, steps=400, batch_size=64)
    tau = tempnet(logits).detach()
    assert not tempnet.training
    assert float(tau[0]) == pytest.approx(float(optimal_tau(H, 0.5)), rel=0.03)


def test_labels_do_not_change_what_a_frozen_tempnet_learns():
    logits, labels = random_case(dtype=torch.float32)
    found = []
    for y in (labels, (labels + 1) % 6):
        torch.manual_seed(0)
        tempnet = TempNet(6, hidden=8, dropout=0.0)
        fit_tempnet(tempnet, logits, y, 0.7, lr=0.01, steps=20, seed=1)
        found.append(tempnet(logits).detach())
    assert torch.allclose(*found, atol=1e-4)


def unit(n, d, seed):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def contrastive(n=10, d=4, rho=1.5, gamma=0.8, low=0.2, high=1.0):
    torch.manual_seed(0)
    loss = RobustContrastiveLoss(n, d, rho=rho, gamma=gamma)
    loss.image_tempnet = ContrastiveTempNet(d, 6, tau_min=low, tau_max=high)
    loss.text_tempnet = ContrastiveTempNet(d, 6, tau_min=low, tau_max=high)
    return loss.double().eval()


def test_first_visit_is_the_plain_robust_contrastive_loss():
    loss = contrastive(rho=1.5)
    images, texts = (unit(5, 4, s).double().requires_grad_() for s in (1, 2))
    encoder, temperature = loss(images, texts, torch.arange(5))
    sim = images @ texts.T
    total, slopes = 0.0, 0.0
    off = ~torch.eye(5, dtype=torch.bool)
    for s, net, x in ((sim, loss.image_tempnet, images), (sim.T, loss.text_tempnet, texts)):
        tau = net(x.detach())
        free = tau.detach().requires_grad_()
        margins = (s - s.diagonal()[:, None])[off].reshape(5, 4)
        mean_exp = (margins / free[:, None]).logsumexp(1) - math.log(4)
        value = (free * mean_exp + 1.5 * free).mean()
        (slope,) = torch.autograd.grad(value, free, retain_graph=True)
        slopes = slopes + (slope * tau).sum()
        total = total + value
    expected = torch.autograd.grad(total, (images, texts), retain_graph=True)
    found = torch.autograd.grad(encoder, (images, texts), retain_graph=True)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, expected, strict=True))
    weights = [loss.image_tempnet.last.weight, loss.text_tempnet.last.weight]
    expected = torch.autograd.grad(slopes, weights)
    found = torch.autograd.grad(temperature, weights)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, expected, strict=True))


def test_later_visits_average_the_normaliser_of_every_sample():
    loss = contrastive(gamma=0.3)
    running = {}
    for visit, ids in enumerate(([0, 3, 5], [3, 0, 7], [5, 3, 1])):
        images, texts = unit(3, 4, 10 + visit).double(), unit(3, 4, 20 + visit).double()
        encoder, temperature = (v.item() for v in loss(images, texts, torch.tensor(ids)))
        tau_i, tau_t = (
            net(x).tolist() for net, x in ((loss.image_tempnet, images), (loss.text_tempnet, texts))
        )
        sim = (images @ texts.T).tolist()
        value = slope = 0.0
        for side, taus in (("image", tau_i), ("text", tau_t)):
            for i, key in enumerate(ids):
                others = [j for j in range(3) if j != i]
                scores = [sim[i][j] if side == "image" else sim[j][i] for j in others]
                margins = [score - sim[i][i] for score in scores]
                now = sum(math.exp(m / taus[i]) for m in margins)
                old = running.get((side, key))
                s = now if old is None else 0.7 * old + 0.3 * now
                running[side, key] = s
                pull = sum(math.exp(m / taus[i]) / s * m for m in margins)
                value += pull / 3
                slope += taus[i] * (math.log(s / 2) + 1.5 - pull / taus[i]) / 3
        assert encoder == pytest.approx(value, rel=1e-9)
        assert temperature == pytest.approx(slope, rel=1e-9)


def test_tiny_temperatures_do_not_overflow():
    loss = contrastive(low=1e-4, high=2e-4).float()
    for seed in (1, 2):
        values = loss(unit(5, 4, seed), unit(5, 4, seed + 5), torch.arange(5))
        assert all(bool(value.isfinite()) for value in values)


def test_state_dict_carries_the_moving_averages():
    first = contrastive()
    first(unit(5, 4, 1).double(), unit(5, 4, 2).double(), torch.arange(5))
    second = contrastive()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    batch = unit(5, 4, 3).double(), unit(5, 4, 4).double(), torch.arange(5)
    assert first(*batch)[1].item() == second(*batch)[1].item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu():
    logits, labels = random_case(dtype=torch.float32)
    tau = optimal_tau(logits.cuda(), 0.7)
    assert tau.device.type == "cuda"
    assert torch.allclose(tau.cpu(), optimal_tau(logits, 0.7), rtol=1e-5)
    tempnet = TempNet(6, hidden=8).eval()
    expected = tempnet_loss(tempnet, logits, labels, 0.7)
    found = tempnet_loss(tempnet.cuda(), logits.cuda(), labels.cuda(), 0.7)
    assert float(found.cpu()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: robust_loss(torch.randn(3, 4), [0, 1, 4], torch.tensor(1.0), 1.0), "labels"),
        (lambda: robust_loss(torch.randn(3, 4), [0, 1], torch.tensor(1.0), 1.0), "labels"),
        (lambda: robust_loss(torch.randn(3, 4), [0, 1, 2], torch.ones(3), 1.0), "tau"),
        (lambda: robust_loss(torch.randn(3, 4), [0, 1, 2], torch.zeros(3, 1), 1.0), "tau"),
        (lambda: robust_loss(torch.randn(3, 4), [0, 1, 2], torch.tensor(1.0), -1.0), "rho"),
        (lambda: optimal_tau(torch.full((2, 3), torch.nan), 0.5), "logits"),
        (lambda: optimal_tau(torch.randn(3), 0.5), "logits"),
        (lambda: optimal_tau(torch.randn(2, 3), 0.0), "rho"),
        (lambda: optimal_tau(torch.randn(2, 3), 0.5, tau_min=2.0, tau_max=1.0), "tau_max"),
        (lambda: TempNet(1), "K"),
        (lambda: TempNet(5, tau_min=0.0), "tau_min"),
        (lambda: TempNet(5)(torch.randn(2, 4)), "logits"),
        (lambda: ContrastiveTempNet(4).init_prototypes(torch.randn(3, 4)), "embeddings"),
        (lambda: RobustContrastiveLoss(5, 4, gamma=0.0), "gamma"),
        (lambda: contrastive()(unit(3, 4, 1), unit(2, 4, 1), torch.arange(3)), "images"),
        (lambda: contrastive()(unit(3, 4, 1), unit(3, 4, 1), torch.tensor([0, 1, 10])), "ids"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_ngram_entropy_equals_a_loop_over_contexts():
    blocks = np.random.default_rng(0).integers(0, 4, (3, study.BLOCK))
    contexts = np.random.default_rng(1).integers(0, 5, (20, 6))
    found = study.ngram_entropy(blocks, contexts, order=2)
    for context, entropy in zip(contexts, found, strict=True):
        probs = np.full(study.VOCAB, 1 / study.VOCAB)
        for j in range(3):
            counts = np.zeros(study.VOCAB)
            for block in blocks.tolist():
                for i in range(2, study.BLOCK):
                    if block[i - j : i] == context[len(context) - j :].tolist():
                        counts[block[i]] += 1
            if counts.any():
                kinds = (counts > 0).sum()
                probs = (counts + kinds * probs) / (counts.sum() + kinds)
        assert entropy == pytest.approx(-(probs * np.log(probs)).sum(), rel=1e-9)


def test_predictions_line_up_with_the_text():
    class Echo(torch.nn.Module):
        def forward(self, tokens):
            return F.one_hot(tokens, study.VOCAB).float()

    blocks = np.random.default_rng(0).integers(0, study.VOCAB, (2, study.BLOCK))
    logits, labels, contexts = study.predictions(Echo(), blocks, 8, 4000, "cpu")
    assert logits.argmax(1).tolist() == contexts[:, -1].tolist()
    whole = blocks[0].tolist()
    for i in (0, 1, 5, 37):
        assert contexts[i].tolist() == whole[i + 1 : i + 5] and labels[i] == whole[i + 5]


def test_both_experiments_run_at_a_tiny_size():
    small = {"d": 16, "layers": 1, "ctx": 16, "lm_steps": 3, "positions": 2100}
    frozen = study.frozen_study(0, tempnet_steps=2, oracle_chars=20_000, **small)
    assert frozen["ppl_single"] <= frozen["ppl_base"] * 1.05
    assert all(np.isfinite(v) for k, v in frozen.items() if k.startswith(("ppl", "rank")))
    assert len(study.characters(frozen["codes"])) == len(frozen["tau"]) == 64
    joint = study.joint_study(0, fixed=(1.0,), **small)
    assert 0.5 <= joint["tau_mean"] <= 5 and joint["ppl_joint"] > 1 < joint["ppl_fixed_1"]


@settings(max_examples=20, deadline=None)
@given(spread_rows, st.floats(0.1, 0.9), st.floats(0.2, 5))
def test_the_loss_scales_with_logits_and_temperature_together(rows, share, scale):
    h, labels = torch.from_numpy(rows), torch.arange(4)
    tau, rho = torch.full((4, 1), 0.7, dtype=torch.float64), share * math.log(5)
    scaled = robust_loss(scale * h, labels, scale * tau, rho)
    assert float(scaled) == pytest.approx(scale * float(robust_loss(h, labels, tau, rho)), rel=1e-9)
