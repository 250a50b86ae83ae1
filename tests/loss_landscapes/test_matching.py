"""Matching of hidden units: what was shuffled is put back, and functions stay what they are."""

from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench import lab
from workbench.lab.models import CNN, MLP, ResNet, ViT
from workbench.lab.train import fit
from workbench.loss_landscapes.geometry import Objective, match_units
from workbench.loss_landscapes.geometry.matching import (
    activation_permutations,
    chain_spec,
    permute,
    weight_permutations,
)
from workbench.loss_landscapes.geometry.units import sizes


def convolutional():
    """Everything a chain may hold: convolutions to a flattened axis, depthwise, norms, pools."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.PReLU(6), nn.Conv2d(6, 5, 1)),
        nn.Dropout(0.2), nn.Flatten(), nn.BatchNorm1d(45), nn.Linear(45, 8, bias=False),
        nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3),
    )  # fmt: skip


MODELS = {
    "mlp": (lambda: MLP([6, 12, 9, 7, 3], act="gelu"), (10, 6)),
    "cnn": (lambda: CNN((5, 7, 6), inputs=2), (10, 2, 9, 9)),
    "chain": (convolutional, (10, 2, 6, 6)),
    "one layer": (lambda: nn.Linear(4, 3), (10, 4)),
}


def made(name, seed=0):
    make, shape = MODELS[name]
    with lab.seeded(seed):
        model, x = make(), torch.randn(shape)
        for module in model.modules():  # running statistics that tell channels apart
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval(), x


def shuffled(model, spec, seed=1):
    rng = torch.Generator().manual_seed(seed)
    orders = {
        group: torch.randperm(n, generator=rng)
        for group, n in sizes(spec, model.state_dict()).items()
    }
    return orders, permute(model.state_dict(), spec, orders)


@pytest.mark.parametrize("name", MODELS)
def test_renumbered_units_compute_the_same_function(name):
    model, x = made(name)
    expected = model(x)
    _, state = shuffled(model, chain_spec(model))
    if name != "one layer":
        assert any(not torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    model.load_state_dict(state)
    assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_shuffled_copy_is_put_back(name, dtype):
    model, _ = made(name)
    other, _ = made(name, seed=5)
    model, other = model.to(dtype), other.to(dtype)
    orders, state = shuffled(model, chain_spec(model))
    other.load_state_dict(state)
    found = match_units(model, other, starts=5, generator=0)
    assert list(found) == list(model.state_dict())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in found.items())
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())  # untouched
    for group, order in weight_permutations(model, other, starts=5, generator=0).items():
        assert torch.equal(orders[group][order], torch.arange(len(order)))


@pytest.mark.parametrize("name", ["mlp", "cnn", "chain"])
def test_activations_put_a_shuffled_copy_back(name):
    model, x = made(name)
    other, _ = made(name, seed=5)
    orders, state = shuffled(model, chain_spec(model))
    other.load_state_dict(state)
    other.train()
    found = activation_permutations(model, other, x, batch_size=4)
    for group, order in found.items():
        assert torch.equal(orders[group][order], torch.arange(len(order)))
    assert other.training and all(module.training for module in other.modules())
    assert not any(module._forward_hooks for module in other.modules())


def test_one_layer_is_matched_to_the_best_of_all_orders():
    with lab.seeded(0):
        a, b = MLP([3, 5, 2]), MLP([3, 5, 2])
    found = weight_permutations(a, b)["body.1"]

    def distance(order):
        moved = permute(b.state_dict(), chain_spec(b), {"body.1": torch.tensor(order)})
        return sum(float(((moved[k] - v) ** 2).sum()) for k, v in a.state_dict().items())

    best = min(permutations(range(5)), key=distance)
    assert found.tolist() == list(best)


@pytest.mark.parametrize("seed", range(5))
def test_two_layers_end_where_no_single_group_gains_and_starts_help(seed):
    with lab.seeded(seed):
        a, b = MLP([2, 4, 4, 2]), MLP([2, 4, 4, 2])
    spec = chain_spec(a)

    def score(orders):
        moved = permute(b.state_dict(), spec, orders)
        return sum(float((moved[k] * v).sum()) for k, v in a.state_dict().items())

    orders = [torch.tensor(o) for o in permutations(range(4))]
    every = [score({"body.1": p, "body.3": q}) for p, q in product(orders, orders)]
    one = weight_permutations(a, b, generator=0)
    for group in one:
        assert score(one) >= max(score(one | {group: o}) for o in orders) - 1e-6
    assert score(weight_permutations(a, b, starts=30, generator=0)) == pytest.approx(max(every))


def barrier(obj, start, end):
    """Highest excess over the chord, on 11 points."""
    t = np.linspace(0, 1, 11)
    values = np.array([obj(start + float(s) * (end - start)) for s in t])
    return float(np.max(values - (1 - t) * values[0] - t * values[-1]))


def test_the_straight_barrier_between_copies_goes_away():
    source = lab.data.digits()
    x, y = torch.as_tensor(source.x)[:800].float(), torch.as_tensor(source.y)[:800]
    with lab.seeded(0):
        model, other = MLP([64, 32, 32, 10]), MLP([64, 32, 32, 10])
    fit(model, F.cross_entropy, (x, y), epochs=10, batch_size=50, lr=3e-3)
    _, state = shuffled(model, chain_spec(model))
    other.load_state_dict(state)
    obj = Objective(model, F.cross_entropy, (x, y))
    start, end = obj.theta, obj.flatten(state)
    assert obj(end) == pytest.approx(obj(start), rel=1e-5)
    assert barrier(obj, start, end) > 0.3
    matched = obj.flatten(match_units(model, other, generator=0))
    assert torch.equal(matched, start) and barrier(obj, start, matched) == pytest.approx(
        0, abs=1e-6
    )


def test_two_trainings_come_nearer_by_matching():
    source = lab.data.digits()
    x, y = torch.as_tensor(source.x)[:800].float(), torch.as_tensor(source.y)[:800]
    models = []
    for seed in (0, 1):
        with lab.seeded(seed):
            models.append(MLP([64, 128, 10]))
        fit(models[-1], F.cross_entropy, (x, y), epochs=15, batch_size=50, lr=3e-3, seed=seed)
    a, b = models
    obj = Objective(a, F.cross_entropy, (x, y))
    ends = [obj.flatten(b)]
    ends.append(obj.flatten(match_units(a, b, generator=0)))
    ends.append(obj.flatten(permute(
        b.state_dict(), chain_spec(b), activation_permutations(a, b, x)
    )))  # fmt: skip
    before, *after = [barrier(obj, obj.theta, end) for end in ends]
    distance = [float((end - obj.theta).norm()) for end in ends]
    assert min(distance) == distance[1]  # weights: nearest by construction
    assert max(after) < 0.6 * before


def test_a_residual_network_by_a_specification_of_ones_own():
    def spec_of(model):
        spec = {}
        for name in model.state_dict():
            if name.startswith(("body.0.", "body.1.")):
                out, into = "stream", None
            elif ".path.0." in name or ".path.1." in name:
                out, into = name.split(".path")[0], "stream"
            elif ".path." in name:
                out, into = "stream", name.split(".path")[0]
            else:
                out, into = None, "stream"
            ndim = model.state_dict()[name].ndim
            spec[name] = (out, into, None, None)[:ndim] if ndim != 2 else (out, into)
        return spec

    with lab.seeded(0):
        model, other = ResNet((2,), width=6), ResNet((2,), width=6)
        x = torch.randn(4, 1, 8, 8)
    spec = spec_of(model)
    model.eval(), other.eval()
    expected = model(x)
    _, state = shuffled(model, spec)
    other.load_state_dict(state)
    assert torch.allclose(other(x), expected, atol=1e-5)
    found = match_units(model, other, spec, starts=5, generator=0)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in found.items())


class Twice(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x


def tied():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


@pytest.mark.parametrize(
    "model, message",
    [
        (ResNet((1,)), "model: ResNet; expected a chain"),
        (ViT(), "model: ViT"),
        (CNN((8,), norm="group"), "body.1 is GroupNorm"),
        (nn.Sequential(nn.Linear(3, 4), nn.Softmax(1)), "1 is Softmax"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "0 is a convolution in 2 groups"),
        (Twice(nn.Linear(3, 3)), "Twice has a forward of its own"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 4)), "Linear without nn.Flatten"),
        (nn.Sequential(nn.Linear(4, 4), nn.MaxPool1d(2)), "MaxPool1d without a convolution"),
        (nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(2)), "1 is Flatten"),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
            "0.parametrizations.weight.original0 is no weight or bias",
        ),
        (tied(), "2.weight is also 0.weight"),
        (nn.Sequential(nn.ReLU()), "no layer with weights"),
    ],
)
def test_other_architectures_are_refused_by_name(model, message):
    with pytest.raises((TypeError, ValueError), match=message):
        match_units(model, model)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: match_units(m, MLP([3, 5, 2])), r"model_b: body.1.weight has shape \(5, 3\)"),
        (lambda m: match_units(m, MLP([3, 4, 4, 2])), "model_b: body.3.weight is in one model"),
        (lambda m: match_units(m, m, starts=0), "starts: expected"),
        (lambda m: weight_permutations(m, m, sweeps=0), "sweeps: expected"),
        (lambda m: match_units(m, m, {"none": ("a",)}), "spec: none is not in the models"),
        (lambda m: match_units(m, m, {"head.weight": ("a",)}), "spec: head.weight has 1 axes"),
        (
            lambda m: match_units(m, m, {"head.weight": (None, "a"), "body.1.weight": (None, "a")}),
            "spec: head.weight has 4 entries for the 3 units of a",
        ),
        (lambda m: activation_permutations(m, m, torch.ones(2, 3), batch_size=0), "batch_size"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(MLP([3, 4, 2]))
