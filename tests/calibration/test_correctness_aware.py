"""Correctness-aware calibration against hand-computed values, loops and autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize_scalar

from workbench.calibration.correctness_aware import (
    CAcalibrator,
    balanced_objective,
    ca_loss,
    ca_objective,
    fit_calibrator,
    temperature_gradients,
    view_features,
)
from workbench.calibration.experiments import correctness_aware as study

NARROW = torch.log(torch.tensor([[0.5, 0.4, 0.1]], dtype=torch.float64))
logit_rows = arrays(np.float64, (6, 4), elements=st.floats(-8, 8, width=32))


def random_case(n=40, k=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, k, generator=generator, dtype=dtype) * 2
    labels = torch.randint(k, (n,), generator=generator)
    return logits, labels


def test_a_narrow_mistake_lowers_ca_and_raises_confidence_under_ce():
    def ce(t):
        return float(-(NARROW / t).log_softmax(1)[0, 1])

    best = minimize_scalar(ce, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9}).x
    assert best == pytest.approx(0.8811, abs=5e-5)
    assert float((NARROW / best).softmax(1).max()) == pytest.approx(0.5162, abs=5e-5)
    at = {t: float(ca_loss((NARROW / t).softmax(1), [0], [1])) for t in (1, 2, 10, 1e6)}
    assert at[1] == pytest.approx(0.25)
    assert at[2] == pytest.approx(0.1824, abs=5e-5)
    assert at[10] == pytest.approx(0.1249, abs=5e-5)
    assert at[1e6] == pytest.approx(1 / 9, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_equals_a_loop_over_samples(dtype):
    logits, labels = random_case(dtype=dtype)
    probs, pred = logits.softmax(1), logits.argmax(1)
    errors = {True: [], False: []}
    for row, guess, label in zip(probs.tolist(), pred.tolist(), labels.tolist(), strict=True):
        right = guess == label
        errors[right].append((max(row) - right) ** 2)
    both = errors[True] + errors[False]
    plain, balanced = ca_loss(probs, pred, labels), ca_loss(probs, pred, labels, balance=True)
    assert plain.dtype == dtype
    assert float(plain) == pytest.approx(np.mean(both), rel=1e-5)
    assert float(balanced) == pytest.approx(
        (np.mean(errors[True]) + np.mean(errors[False])) / 2, rel=1e-5
    )


@pytest.mark.parametrize("right", [True, False])
def test_balanced_loss_of_one_group_is_the_plain_loss(right):
    logits, _ = random_case()
    pred = logits.argmax(1)
    labels = pred if right else (pred + 1) % 5
    expected = ca_loss(logits.softmax(1), pred, labels)
    assert float(ca_loss(logits.softmax(1), pred, labels, balance=True)) == float(expected)


def test_without_information_the_plain_loss_wants_accuracy_and_the_balanced_one_half():
    correct = torch.arange(100) < 80
    labels = (~correct).long()
    pred = torch.zeros(100, dtype=torch.long)

    def best(balance):
        def loss(c):
            probs = torch.tensor([[c, 1 - c]], dtype=torch.float64).expand(100, 2)
            return float(ca_loss(probs, pred, labels, balance=balance))

        return minimize_scalar(loss, bounds=(0.5, 1), method="bounded").x

    assert best(False) == pytest.approx(0.8, abs=1e-4)
    assert best(True) == pytest.approx(0.5, abs=1e-4)


def test_gradcheck():
    logits, labels = random_case(n=6, k=4)
    pred = logits.argmax(1)
    z = logits.clone().requires_grad_()
    for balance in (False, True):
        assert torch.autograd.gradcheck(
            lambda z, b=balance: ca_loss(z.softmax(1), pred, labels, balance=b), (z,)
        )


@settings(max_examples=40, deadline=None)
@given(logit_rows, st.lists(st.integers(0, 3), min_size=6, max_size=6), st.floats(0.1, 10))
def test_temperature_gradients_equal_autograd(rows, labels, temperature):
    z, y = torch.from_numpy(rows), torch.tensor(labels)
    t = torch.full((6,), temperature, dtype=torch.float64, requires_grad=True)
    scaled = z / t[:, None]
    ce = torch.nn.functional.cross_entropy(scaled, y, reduction="sum")
    right = (z.argmax(1) == y).double()
    ca = (scaled.softmax(1).gather(1, z.argmax(1, keepdim=True))[:, 0] - right).square().sum()
    ours = temperature_gradients(z, y, t.detach())
    for loss, found in zip((ce, ca), ours, strict=True):
        (expected,) = torch.autograd.grad(loss, t, retain_graph=True)
        assert torch.allclose(found, expected, atol=1e-9, rtol=1e-7)


@settings(max_examples=40, deadline=None)
@given(logit_rows, st.lists(st.integers(0, 3), min_size=6, max_size=6), st.floats(0.1, 10))
def test_ca_never_pulls_a_wrong_confidence_up(rows, labels, temperature):
    z, y = torch.from_numpy(rows), torch.tensor(labels)
    _, ca = temperature_gradients(z, y, temperature)
    right = z.argmax(1) == y
    assert bool((ca[right] >= -1e-12).all()) and bool((ca[~right] <= 1e-12).all())


@settings(max_examples=30, deadline=None)
@given(logit_rows, st.integers(0, 2**31 - 1))
def test_the_calibrator_never_changes_the_prediction(rows, seed):
    torch.manual_seed(seed)
    calibrator = CAcalibrator(3).double()
    z = torch.from_numpy(rows)
    features = torch.rand(6, 3, dtype=torch.float64)
    scaled = calibrator.scale(z, features)
    top = z.amax(1)
    assert torch.equal(z.gather(1, scaled.argmax(1, keepdim=True))[:, 0], top)
    temperature = calibrator(features)
    assert bool(((temperature >= 0.1) & (temperature <= 10)).all())


@settings(max_examples=30, deadline=None)
@given(logit_rows, st.permutations(range(4)))
def test_ca_loss_ignores_the_names_of_classes(rows, order):
    z, order = torch.from_numpy(rows), torch.tensor(order)
    labels = torch.arange(6) % 4
    inverse = order.argsort()
    plain = ca_loss(z.softmax(1), z.argmax(1), labels)
    renamed = ca_loss(z[:, order].softmax(1), inverse[z.argmax(1)], inverse[labels])
    assert float(plain) == pytest.approx(float(renamed), abs=1e-12)


def test_features_read_every_view_where_the_original_has_its_top_classes():
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(3, 7, 6, generator=generator)
    found = view_features(views, topk=2)
    probs = views.double().softmax(2).numpy()
    for i in range(7):
        best = np.argsort(-views[0, i].numpy())[:2]
        expected = np.concatenate([probs[v, i, best] for v in range(3)])
        assert np.allclose(found[i].numpy(), expected, atol=1e-6)
    apart = view_features(views[1:], original=views[0], topk=2)
    assert torch.equal(apart, found[:, 2:])


def test_one_scalar_temperature_fitted_by_ca_equals_a_grid_search():
    logits, labels = random_case(n=300, seed=3)
    labels = torch.where(torch.arange(300) % 4 == 0, labels, logits.argmax(1))
    calibrator = CAcalibrator(1).double()
    features = torch.zeros(300, 1, dtype=torch.float64)
    fit_calibrator(calibrator, logits, features, labels, lr=0.05, epochs=400)
    grid = np.linspace(0.1, 10, 4001)
    values = [float(ca_objective(logits / t, logits.argmax(1), labels)) for t in grid]
    assert float(calibrator(features)[0].detach()) == pytest.approx(
        grid[int(np.argmin(values))], abs=0.01
    )


@pytest.mark.parametrize("objective", [ca_objective, balanced_objective])
def test_training_separates_right_from_wrong_when_a_feature_tells(objective):
    logits, labels = random_case(n=400, seed=5)
    labels = torch.where(torch.arange(400) % 2 == 0, logits.argmax(1), (logits.argmax(1) + 1) % 5)
    features = (torch.arange(400) % 2).double()[:, None]
    torch.manual_seed(0)
    calibrator = CAcalibrator(1).double()
    history = fit_calibrator(
        calibrator, logits, features, labels, objective=objective, lr=0.05, epochs=200
    )
    temperature = calibrator(features).detach()
    assert history.frame.loss.iloc[-1] < history.frame.loss.iloc[0]
    assert temperature[1] > 5 * temperature[0]


def test_a_start_below_the_clamp_never_moves_and_the_default_start_does():
    logits, labels = random_case(n=50)
    features = torch.zeros(50, 2, dtype=torch.float64)
    for start, moves in ((-1.0, False), (1.0, True)):
        calibrator = CAcalibrator(2, t_init=start).double()
        before = calibrator(features).detach()
        fit_calibrator(calibrator, logits, features, labels, lr=0.05, epochs=5)
        assert bool((calibrator(features).detach() != before).any()) is moves


def test_state_dict_round_trip():
    first, second = CAcalibrator(8), CAcalibrator(8)
    second.load_state_dict(first.state_dict())
    features = torch.rand(3, 8)
    assert torch.equal(first(features), second(features))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu():
    logits, labels = random_case(dtype=torch.float32)
    found = ca_loss(logits.cuda().softmax(1), logits.argmax(1).cuda(), labels.cuda(), balance=True)
    assert found.device.type == "cuda"
    assert float(found) == pytest.approx(
        float(ca_loss(logits.softmax(1), logits.argmax(1), labels, balance=True)), rel=1e-5
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ca_loss(torch.randn(3, 4) - 5, [0, 1, 2], [0, 1, 2]), "probs"),
        (lambda: ca_loss(torch.full((2, 2), 0.5), [0, 1], [0, 2]), "labels"),
        (lambda: ca_loss(torch.full((2, 2), 0.5), [0, -1], [0, 1]), "pred"),
        (lambda: ca_loss(torch.full((2, 2), 0.5), [0, 1, 1], [0, 1]), "pred"),
        (lambda: view_features(torch.randn(3, 4)), "views"),
        (lambda: view_features(torch.randn(2, 3, 3), topk=4), "topk"),
        (lambda: view_features(torch.randn(2, 3, 5), original=torch.randn(4, 5)), "original"),
        (lambda: view_features(torch.full((2, 3, 5), torch.nan)), "views"),
        (lambda: CAcalibrator(0), "d_in"),
        (lambda: CAcalibrator(2, t_min=2.0, t_max=1.0), "t_max"),
        (lambda: CAcalibrator(2)(torch.rand(3, 5)), "features"),
        (lambda: temperature_gradients(torch.randn(2, 3), [0, 1], 0.0), "temperature"),
        (
            lambda: fit_calibrator(CAcalibrator(2), torch.randn(4, 3), torch.rand(3, 2), [0] * 4),
            "features",
        ),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_transforms_keep_what_they_should():
    images = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(study.affine(images, degrees=0), images, atol=1e-5)
    quarter = study.affine(images, degrees=90)
    assert torch.allclose(quarter, torch.rot90(images, 1, (2, 3)), atol=1e-4)
    moved = study.affine(images, right=1 / 12)
    assert torch.allclose(moved[..., 1:], images[..., :-1], atol=1e-4)
    flat = torch.ones(1, 1, 12, 12)
    assert torch.allclose(study.blur(flat, 0.5)[..., 3:-3, 3:-3], flat[..., 3:-3, 3:-3], atol=1e-6)
    assert torch.allclose(study.contrast(images, 0.3).mean((2, 3)), images.mean((2, 3)), atol=1e-6)


def test_the_experiment_runs_at_a_tiny_size():
    found = study.shift_study(0, data="digits", pool=1, net_epochs=2, calibrator_epochs=2)
    assert 0.3 < found["accuracy_clean"] <= 1
    names = ["raw", "ts", *study.METHODS]
    for metric in ("ece", "brier", "auroc"):
        for name in names:
            for where in ("clean", "shift"):
                assert 0 <= found[f"{metric}_{name}_{where}"] <= 2
