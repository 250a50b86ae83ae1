"""Every loss of the family in one calling convention: values, groups of members, bags, your own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench.losses import baselines, zoo

M, B = 3, 16
ROWWISE = [name for name, e in zoo.ZOO.items() if e.per == "row" and not e.memory]


def batch(classes: int, seed: int = 0):  # type: ignore[no-untyped-def]
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(M, B, classes, generator=source, dtype=torch.float64)
    y = torch.randint(classes, (M, B), generator=source)
    y[:, :classes] = torch.arange(classes)
    index = torch.stack([torch.randperm(B, generator=source) for _ in range(M)])
    return logits, y, index


def setting(classes: int) -> zoo.Setting:
    return zoo.Setting(classes, B, M, seed=1)


@pytest.mark.parametrize("name", [n for n, e in zoo.ZOO.items() if not e.bag])
@pytest.mark.parametrize("classes", [2, 4])
def test_each_loss_gives_one_number_a_member_and_a_descent_direction(
    name: str, classes: int
) -> None:
    if zoo.ZOO[name].least > classes:
        with pytest.raises(ValueError, match="classes"):
            zoo.member_loss(name, setting(classes))
        return
    logits, y, index = batch(classes)
    leaf = (0.3 * logits).requires_grad_()
    loss = zoo.member_loss(name, setting(classes))
    values = loss(leaf, y, index)
    assert values.shape == (M,) and bool(values.isfinite().all())
    (slope,) = torch.autograd.grad(values.sum(), leaf)
    assert bool(slope.isfinite().all()) and bool((slope.flatten(1).norm(dim=1) > 0).all())
    # a step against the gradient raises the true class's share of what all classes move
    gain = -slope.gather(-1, y[..., None])[..., 0] + slope.mean(-1)
    assert float(gain.mean()) > 0 or name == "dsc"  # as printed, DSC turns back beyond p = 1/2


@pytest.mark.parametrize("name", sorted(n for n, entry in zoo.ZOO.items() if not entry.bag))
def test_members_do_not_mix(name: str) -> None:
    """Changing one member's logits changes that member's loss alone; bags are tested below."""
    logits, y, index = batch(4)
    other = logits.clone()
    other[1] += torch.randn(B, 4, dtype=torch.float64)
    a = zoo.member_loss(name, setting(4))(logits, y, index)
    b = zoo.member_loss(name, setting(4))(other, y, index)
    assert torch.equal(a[[0, 2]], b[[0, 2]]) and not torch.equal(a[1], b[1])


def test_values_by_hand() -> None:
    logits, y, index = batch(4)
    p = logits.softmax(-1).gather(-1, y[..., None])[..., 0]
    u = 1 / p - 1
    expected = {
        "cross_entropy": -p.log(),
        "sum_exponential": u,
        "comp_sum_05": 2 * ((1 + u).sqrt() - 1),
        "comp_sum_15": 2 * (1 - p.sqrt()),
        "mae": 1 - p,
        "gce": (1 - p**0.7) / 0.7,
        "focal": -((1 - p) ** 2) * p.log(),
    }
    for name, values in expected.items():
        found = zoo.member_loss(name, setting(4))(logits, y, index)
        assert torch.allclose(found, values.mean(1)), name


def test_aldr_remembers_rows_of_each_member() -> None:
    from workbench.losses.ldr_loss import ALDR

    logits, y, index = batch(4)
    loss = zoo.member_loss("aldr_kl", setting(4))
    first, second = loss(logits, y, index), loss(logits, y, index + B)  # numbers wrap at the rows
    for m in range(M):
        alone = ALDR(B, 4)
        assert float(first[m]) == pytest.approx(float(alone(logits[m], y[m], index[m])), abs=1e-6)
        assert float(second[m]) == pytest.approx(float(alone(logits[m], y[m], index[m])), abs=1e-6)
    assert not torch.equal(first, second)


def test_two_standardised_outputs_carry_no_gradient() -> None:
    """Why Z-loss needs three classes: with two, z is 1 and -1 whatever the outputs are."""
    from workbench.losses.z_loss import z_loss

    leaf = torch.tensor([[0.3, -2.0], [5.0, 1.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(z_loss(leaf, torch.tensor([0, 1])), leaf)
    assert float(slope.abs().max()) < 1e-12


def test_bags_see_means_only() -> None:
    x = torch.arange(10.0)[:, None]
    y = torch.tensor([0, 1, 1, 1, 2, 2, 0, 0, 1, 1])
    inputs, means = zoo.bags(x, y, 3, 4)
    assert inputs.shape == (2, 4, 1) and torch.equal(inputs[1, :, 0], x[4:8, 0])
    assert means.tolist() == [[0.25, 0.75, 0.0], [0.5, 0.0, 0.5]]
    net = nn.Linear(1, 3).requires_grad_(False)
    bagged = zoo.Bagged(net)(inputs)
    assert torch.allclose(bagged.view(2, 4, 3), net(inputs))
    # loss by hand: bag + rho times the variance within bags, classes added
    p = net(inputs).softmax(-1)
    bag = (p.mean(1) - means).square().sum(-1).mean()
    within = (p - p.mean(1, keepdim=True)).square().sum(-1).mean()
    loss = zoo.member_loss("bag_means", zoo.Setting(3, 2, 1))
    found = loss(bagged[None], means[None], torch.arange(2)[None])
    assert float(found) == pytest.approx(float(bag + zoo.RHO * within), abs=1e-6)
    with pytest.raises(ValueError, match="x: expected at least"):
        zoo.bags(x[:3], y[:3], 3, 4)


def test_your_own_losses_count_alike_however_they_are_called() -> None:
    logits, y, index = batch(4)
    expected = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(M, B)
    for given in (
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        lambda h, t: F.cross_entropy(h, t),
        nn.CrossEntropyLoss(weight=torch.ones(4).double()),
    ):
        found = zoo.member_loss(given, setting(4))(logits, y, index)
        assert torch.allclose(found, expected.mean(1))
    weight = torch.tensor([1.0, 5.0, 1.0, 1.0]).double()
    found = zoo.member_loss(nn.CrossEntropyLoss(weight=weight), setting(4))(logits, y, index)
    for m in range(M):
        assert torch.allclose(found[m], F.cross_entropy(logits[m], y[m], weight=weight))


def test_groups_of_members_are_cut_where_they_should_be() -> None:
    logits, y, index = batch(4)
    ce = zoo.member_loss("cross_entropy", zoo.Setting(4, B, 2))
    gce = zoo.member_loss(baselines.GCE(), zoo.Setting(4, B, 1))
    found = zoo.together([(ce, 2), (gce, 1)])(logits, y, index)
    assert torch.allclose(found[:2], ce(logits[:2], y[:2], index[:2]))
    assert torch.allclose(found[2:], gce(logits[2:], y[2:], index[2:]))


def test_names() -> None:
    found = zoo.entries(["gce", F.cross_entropy])
    assert [e.label for e in found.values()] == ["GCE", "cross_entropy"]
    named = zoo.entries({"mine": "gce", "yours": F.cross_entropy})
    assert [e.label for e in named.values()] == ["mine", "yours"]
    table = zoo.table(["aldr_kl", "bag_means"])
    assert table.loc["aldr_kl", "memory of each row"] and len(zoo.table()) == len(zoo.ZOO)
    slugs = {e.paper for e in zoo.ZOO.values()} - {""}
    assert slugs >= {"comp_sum", "ldr_loss", "ensloss", "z_loss", "anyloss", "dice_loss"}


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (["gcee"], KeyError, "no loss is named 'gcee'"),
        (["gce", "gce"], ValueError, "different names"),
        ({"a": "gce", "b": 3}, TypeError, "name, a function or a module"),
        ([], ValueError, "at least one"),
        ([nn.CrossEntropyLoss], TypeError, "a function or a module"),
    ],
)
def test_bad_losses_are_named(given, kind, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(kind, match=message):
        zoo.entries(given)


def test_a_loss_that_is_no_number() -> None:
    logits, y, index = batch(4)
    with pytest.raises(ValueError, match="scalar"):
        zoo.member_loss(lambda h, t: h.sum(1), setting(4))(logits, y, index)
