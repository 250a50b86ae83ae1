"""Sharpness and SAM against quadratics, where everything has a closed form."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench import lab
from workbench.lab.models import MLP
from workbench.lab.train import fit
from workbench.loss_landscapes.geometry import Objective
from workbench.loss_landscapes.geometry.sharpness import (
    SAM,
    sharpness_average,
    sharpness_sam,
    sharpness_worst,
    worst_direction,
)

VALUES = torch.tensor([-0.5, 0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 5.0], dtype=torch.float64)


class Weights(nn.Module):
    def __init__(self, theta):
        super().__init__()
        self.w = nn.Parameter(theta.clone())


def rotated(values, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(2 * values.shape, generator=rng, dtype=torch.float64)).Q
    return ((Q * values) @ Q.T).to(dtype)


def quadratic(H, at, slope=None):
    """An objective w^T H w / 2 + slope^T w at the given w."""
    model = Weights(at)
    linear = torch.zeros_like(at) if slope is None else slope

    def loss():
        return 0.5 * model.w @ H @ model.w + linear @ model.w

    return Objective(model, loss)


def relu_network(dtype=torch.float64):
    with lab.seeded(0):
        model = MLP([4, 8, 3], bias=False).to(dtype)
        x, y = torch.randn(30, 4, dtype=dtype), torch.randint(3, (30,))
    return model, (x, y)


# --- the measures


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_worst_case_from_a_minimum_is_half_rho2_lambda_max(dtype):
    H = rotated(VALUES.abs(), dtype)
    obj = quadratic(H, torch.zeros(8, dtype=dtype))
    for rho in (1e-2, 0.3):
        found, epsilon = worst_direction(obj, rho, 20, generator=0)
        assert found == pytest.approx(0.5 * rho**2 * 5, rel=1e-4)
        top = torch.linalg.eigh(H)[1][:, -1]
        assert float(epsilon.norm()) == pytest.approx(rho, rel=1e-5)
        assert abs(float(epsilon @ top)) == pytest.approx(rho, rel=1e-3)


def test_adaptive_worst_case_scales_the_ball_by_the_weights():
    H, at = rotated(VALUES.abs()), torch.linspace(-2, 2, 8, dtype=torch.float64)
    obj = quadratic(H, at, slope=-H @ at)  # a minimum at these weights
    expected = 0.5 * 0.1**2 * float(torch.linalg.eigvalsh(at * H * at[:, None])[-1])
    found = sharpness_worst(obj, 0.1, 40, adaptive=True, generator=0)
    assert found == pytest.approx(expected, rel=1e-4)


def test_sam_sharpness_is_the_closed_form():
    H, at = rotated(VALUES), torch.linspace(-1, 2, 8, dtype=torch.float64)
    obj, g = quadratic(H, at), H @ at
    for adaptive, T in ((False, torch.ones_like(at)), (True, at.abs())):
        e = 0.05 * T * T * g / (T * g).norm()
        expected = float(g @ e + 0.5 * e @ H @ e)
        assert sharpness_sam(obj, 0.05, adaptive) == pytest.approx(expected, rel=1e-9)
        elsewhere = quadratic(H, torch.zeros_like(at))
        assert sharpness_sam(elsewhere, 0.05, adaptive, theta=at) == pytest.approx(expected)


def test_a_linear_loss_is_as_sharp_as_its_slope():
    slope = torch.linspace(-1, 3, 8, dtype=torch.float64)
    obj = quadratic(torch.zeros(8, 8, dtype=torch.float64), torch.ones_like(slope), slope)
    expected = 0.2 * float(slope.norm())
    assert sharpness_sam(obj, 0.2) == pytest.approx(expected)
    assert sharpness_worst(obj, 0.2, generator=0) == pytest.approx(expected)
    noisy = sharpness_average(obj, 0.2, 10, 0)
    assert abs(noisy.value) < 1e-12 and noisy.error < 1e-12  # the slope cancels in pairs


def test_flat_and_concave_places():
    zero = torch.zeros(8, dtype=torch.float64)
    for H in (torch.zeros(8, 8, dtype=torch.float64), rotated(-VALUES.abs())):
        obj = quadratic(H, zero)
        assert sharpness_sam(obj) == 0
        assert sharpness_worst(obj, 0.5, generator=0) == 0
    saddle = sharpness_worst(quadratic(rotated(VALUES), zero), 0.5, generator=0)
    assert saddle == pytest.approx(0.5 * 0.25 * 5, rel=1e-3)


def test_a_peak_inside_the_ball_is_found():
    peak = torch.full((8,), 0.2, dtype=torch.float64)
    eye = torch.eye(8, dtype=torch.float64)
    obj = quadratic(-2 * eye, torch.zeros_like(peak), slope=2 * peak)  # -|w - peak|^2
    found, where = worst_direction(obj, 3.0, 60, generator=0)
    assert found == pytest.approx(float(peak @ peak), rel=1e-2)
    assert torch.allclose(where, peak, atol=0.05)


def test_worst_is_at_least_sam_and_grows_with_the_ball():
    model, data = relu_network()
    obj = Objective(model, F.cross_entropy, data)
    for adaptive in (False, True):
        found = [
            (sharpness_sam(obj, r, adaptive), sharpness_worst(obj, r, 20, adaptive, generator=0))
            for r in (0.01, 0.1, 1.0)
        ]
        assert all(0 < sam <= worst * (1 + 1e-12) for sam, worst in found)
        assert found[0][1] < found[1][1] < found[2][1]


@pytest.mark.parametrize("adaptive", [False, True])
def test_average_is_half_sigma2_trace(adaptive):
    H, at = rotated(VALUES), torch.linspace(-1, 2, 8, dtype=torch.float64)
    T = at.abs() if adaptive else torch.ones_like(at)
    found = sharpness_average(quadratic(H, at), 0.1, 2000, 0, adaptive=adaptive)
    exact = 0.5 * 0.01 * float((T * H * T[:, None]).trace())
    assert abs(found.value - exact) < 4 * found.error and found.draws == 2000
    # the variance of half a Gaussian form: sigma^4 ||T H T||_F^2 / 2
    spread = 0.5 * 1e-4 * float(((T * H * T[:, None]) ** 2).sum())
    assert found.error**2 * 2000 == pytest.approx(spread, rel=0.2)


def test_adaptive_versions_do_not_see_a_rescaling_between_layers():
    model, data = relu_network()
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled.body[1].weight.mul_(4.0)
        scaled.head.weight.div_(4.0)
    one, other = (Objective(m, F.cross_entropy, data) for m in (model, scaled))
    assert one() == pytest.approx(other())
    measures = [
        lambda o, a: sharpness_sam(o, 0.1, a),
        lambda o, a: sharpness_worst(o, 0.1, 10, a, generator=0),
        lambda o, a: float(sharpness_average(o, 0.1, 5, 0, adaptive=a)),
    ]
    for measure in measures:
        assert measure(one, True) == pytest.approx(measure(other, True), rel=1e-9)
        assert measure(one, False) != pytest.approx(measure(other, False), rel=0.1)


def test_the_model_is_left_as_it_was_also_by_ctrl_c():
    model, (x, y) = relu_network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    left = [10**9]

    def loss(out, target):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return F.cross_entropy(out, target)

    obj = Objective(model, loss, (x, y))
    whole = sharpness_worst(obj, 0.5, 20, generator=0)
    for calls in (6, 9, 14):
        left[0] = calls
        part = sharpness_worst(obj, 0.5, 20, generator=0)
        assert 0 < part <= whole
    left[0] = 8
    noisy = sharpness_average(obj, 0.1, 50, 0)
    assert noisy.draws == 3 and not noisy.complete
    left[0] = 1
    with pytest.raises(KeyboardInterrupt):
        sharpness_sam(obj)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda o: sharpness_sam(o, 0), "rho: expected a number > 0"),
        (lambda o: sharpness_worst(o, -1), "rho: expected a number > 0"),
        (lambda o: sharpness_worst(o, 0.1, 0), "steps: expected"),
        (lambda o: sharpness_average(o, 0.0), "sigma: expected a number > 0"),
        (lambda o: sharpness_average(o, 0.1, 0), "draws: expected"),
        (lambda o: sharpness_average(o, 0.1, 5, "seed"), "generator: expected"),
        (lambda o: sharpness_sam(o, theta=torch.zeros(3)), r"expected shape \(8,\)"),
        (lambda o: sharpness_sam(o.model), "obj: expected an Objective"),
    ],
)
def test_bad_input_is_named(call, message):
    obj = quadratic(rotated(VALUES), torch.ones(8, dtype=torch.float64))
    with pytest.raises((TypeError, ValueError), match=message):
        call(obj)


# --- the optimizer


def closure_of(model, H, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = 0.5 * model.w @ H @ model.w
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_step_is_the_closed_form(adaptive, dtype):
    H, at = rotated(VALUES, dtype), torch.linspace(-1, 2, 8, dtype=dtype)
    model = Weights(at)
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.3, adaptive=adaptive)
    loss = optimizer.step(closure_of(model, H, optimizer))
    T, g = at.abs() if adaptive else torch.ones_like(at), H @ at
    expected = at - 0.1 * H @ (at + 0.3 * T * T * g / (T * g).norm())
    assert torch.allclose(model.w, expected, rtol=1e-5)
    assert loss.item() == pytest.approx(float(0.5 * at @ H @ at), rel=1e-5)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_radius_zero_is_the_base_optimizer(base):
    H = rotated(VALUES)
    one, other = Weights(torch.ones_like(VALUES)), Weights(torch.ones_like(VALUES))
    ours, plain = SAM(one.parameters(), base, rho=0, lr=0.05), base(other.parameters(), lr=0.05)
    for _ in range(5):
        ours.step(closure_of(one, H, ours))
        plain.step(closure_of(other, H, plain))
    assert torch.equal(one.w, other.w)


@pytest.mark.parametrize(
    "base, options",
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"weight_decay": 0.1})],
)
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_run_goes_on_from_its_state(base, options, how):
    H = rotated(VALUES)

    def start():
        model = Weights(torch.ones_like(VALUES))
        return model, SAM(model.parameters(), base, rho=0.1, adaptive=True, lr=0.05, **options)

    whole, optimizer = start()
    for _ in range(6):
        optimizer.step(closure_of(whole, H, optimizer))
    model, optimizer = start()
    for _ in range(3):
        optimizer.step(closure_of(model, H, optimizer))
    if how == "state_dict":
        state = copy.deepcopy(optimizer.state_dict())
        fresh, optimizer = start()
        fresh.load_state_dict(model.state_dict())
        optimizer.load_state_dict(state)
    else:
        turn = copy.deepcopy if how == "deepcopy" else lambda o: pickle.loads(pickle.dumps(o))
        fresh, optimizer = turn((model, optimizer))
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    for _ in range(3):
        optimizer.step(closure_of(fresh, H, optimizer))
    assert torch.equal(fresh.w, whole.w)


def test_groups_have_radii_and_rates_of_their_own():
    a, b = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([4.0]))
    idle = nn.Parameter(torch.tensor([1.0]))
    optimizer = SAM([{"params": [a, idle], "rho": 0.5}, {"params": [b], "lr": 0.2}], lr=0.1, rho=0)

    def closure():
        optimizer.zero_grad()
        loss = (a**2 + b**2).sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    assert a.item() == pytest.approx(3 - 0.1 * (3 + 0.5 * 3 / 5))
    assert b.item() == pytest.approx(4 - 0.2 * 4) and idle.item() == 1
    late = nn.Parameter(torch.tensor([2.0]))
    optimizer.add_param_group({"params": [late], "lr": 1.0})
    assert [g["rho"] for g in optimizer.base.param_groups] == [0.5, 0, 0]
    rate = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    optimizer.step(closure)
    rate.step()
    assert [g["lr"] for g in optimizer.base.param_groups] == pytest.approx([0.01, 0.02, 0.1])


def test_weights_are_put_back_bit_by_bit_when_the_second_pass_fails():
    model = Weights(torch.linspace(-1, 1.7, 8))
    before = model.w.detach().clone()
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.3)
    calls = []

    def closure():
        calls.append(model.w.detach().clone())
        if len(calls) == 2:
            raise KeyboardInterrupt
        optimizer.zero_grad()
        loss = (model.w**3).sum()
        loss.backward()
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert not torch.equal(calls[1], before) and torch.equal(model.w.detach(), before)


def test_a_zero_gradient_moves_nothing():
    model = Weights(torch.zeros(3))
    optimizer = SAM(model.parameters(), lr=0.1)
    optimizer.step(closure_of(model, torch.eye(3), optimizer))
    assert torch.equal(model.w.detach(), torch.zeros(3))


def test_the_training_loop_takes_it_and_ends_flatter():
    source = lab.data.digits()
    x, y = torch.as_tensor(source.x)[:600].float(), torch.as_tensor(source.y)[:600]
    found = {}
    for rho in (1e-9, 0.2):
        with lab.seeded(0):
            model = MLP([x[0].numel(), 32, 10])
        history = fit(
            model, F.cross_entropy, (x, y), epochs=8, batch_size=50, seed=0,
            optimizer=lambda p, rho=rho: SAM(p, rho=rho, lr=0.1, momentum=0.9),
        )  # fmt: skip
        obj = Objective(model, F.cross_entropy, (x, y))
        found[rho] = sharpness_worst(obj, 0.2, generator=0)
        assert history.stopped == "done"
    assert found[0.2] < 0.8 * found[1e-9]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda p: SAM(p, rho=-1, lr=0.1), ValueError, "rho: expected a number >= 0"),
        (lambda p: SAM([{"params": p, "rho": -1}], lr=0.1), ValueError, "rho: expected"),
        (lambda p: SAM(p, torch.optim.LBFGS), TypeError, "base: expected the class"),
        (lambda p: SAM(p, "sgd"), TypeError, "base: expected the class"),
        (lambda p: SAM(p, lambda groups: None), TypeError, "base: expected an optimizer"),
        (lambda p: SAM(p, lr=-1), ValueError, "learning rate"),
        (lambda p: SAM(p, lr=0.1).step(), TypeError, "closure: SAM needs one"),
    ],
)
def test_what_the_optimizer_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call([nn.Parameter(torch.ones(2))])


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = SAM(table.parameters(), lr=0.1)

    def closure():
        loss = table(torch.tensor([1])).sum()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match="sparse"):
        optimizer.step(closure)
