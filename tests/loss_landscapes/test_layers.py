"""Cutting a network into layers: what is carried, what is refused, Jacobians sample by sample."""

import pytest
import torch
from torch import nn

from workbench import lab
from workbench.loss_landscapes.layers import cut, rows_jacobian

F64 = torch.float64


def mlp(*, act=nn.Tanh, seed=0):
    with lab.seeded(seed):
        return nn.Sequential(nn.Linear(3, 4), act(), nn.Linear(4, 5), act(), nn.Linear(5, 2))


def rows(n=20, d=3):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=F64)


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x):
        return self.a(self.a(x))


def test_running_between_layers_gives_what_the_network_computes():
    chain = cut(mlp(), rows())
    assert chain.names == ("0", "2", "4", "output") and chain.last == 3
    for start in range(3):
        for stop in range(start + 1, 4):
            f = chain.run(start, stop, chain.activations[start])
            torch.testing.assert_close(f, chain.activations[stop])
    more = torch.cat([chain.activations[1]] * 3)  # any number of rows
    assert chain.run(1, 2, more).shape == (60, 5)


def test_the_model_is_left_as_it_was():
    net = mlp().train()
    before = [p.clone() for p in net.parameters()]
    chain = cut(net, rows().float())
    chain.run(0, 3, chain.activations[0])
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    assert chain.outputs.dtype == F64


def test_jacobians_are_blocked_without_a_seam():
    chain = cut(mlp(), rows(700))
    f = chain.activations[1].requires_grad_()
    whole = rows_jacobian(chain.run(1, 3, f), f)
    blocks = torch.cat(list(chain.jacobians(1, 3, f, torch.eye(2, dtype=F64))))
    torch.testing.assert_close(blocks, whole)
    one = torch.autograd.functional.jacobian(lambda row: chain.run(1, 3, row[None])[0], f[650])
    torch.testing.assert_close(blocks[650], one)


def test_the_constant_unit_is_a_scale_of_all_biases():
    chain, h = cut(mlp(), rows()), 1e-6
    turn = torch.eye(2, dtype=F64)
    (found,) = chain.by_constant(1, 3, chain.activations[1], turn, 0.7)
    ends = [
        chain.run(1, 3, chain.activations[1], constant=torch.tensor(0.7 + s * h, dtype=F64))
        for s in (1, -1)
    ]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: cut(Skip(), x), "path goes around it"),
        (lambda x: cut(Shared(), x), "'a' is called 2 times"),
        (lambda x: cut(mlp(), x, ["9"]), "no module '9'"),
        (lambda x: cut(nn.Identity(), x), "no nn.Linear"),
        (lambda x: cut(nn.Bilinear(3, 3, 2), (x, x), [""]), "expected one tensor"),
        (lambda x: cut(nn.Bilinear(3, 3, 2), (x, x[:5])), r"X\[1\]"),
        (lambda x: cut(nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Linear(3, 2)), x), "shape"),
        (lambda x: cut(mlp(), x * torch.nan), "NaN"),
        (lambda x: cut(mlp(), x).position("9"), "layer"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(rows())
