"""The interaction basis against closed forms, explicit loops, folded nets, dense Hessians."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from sklearn.metrics import adjusted_rand_score
from torch import nn

from tests.plots import js
from workbench import lab
from workbench.loss_landscapes import figures_interaction_basis as figures
from workbench.loss_landscapes import interaction_basis as ib
from workbench.loss_landscapes.experiments import interaction_basis as study

F64 = torch.float64


def data(n=200, d=5, seed=0):
    """Correlated inputs whose mean is not zero."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=F64)
    return torch.randn(n, d, generator=g, dtype=F64) @ mix + 0.5


def mlp(*sizes, act=nn.Tanh, seed=0, bias=True):
    with lab.seeded(seed):
        layers = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            layers += [nn.Linear(a, b, bias=bias, dtype=F64)]
            layers += [act()] if i < len(sizes) - 2 else []
    return nn.Sequential(*layers)


def tail(net, start):
    """What follows the input of module ``start`` of a Sequential."""
    return nn.Sequential(*list(net)[start:])


def explicit(f, after, turn=None):
    """Lambda as the eigenvalues of G E[J^T J], one sample and one autograd call at a time."""
    g = np.cov(f.numpy().T, bias=True)
    total = np.zeros_like(g)
    for row in f:
        J = torch.autograd.functional.jacobian(after, row).numpy()
        J = J if turn is None else turn.T @ J
        total += J.T @ J / len(f)
    return np.sort(linalg.eigvals(g @ total).real)[::-1]


# --- the basis


def test_lambda_of_a_linear_network_are_squared_singular_values():
    x = data()
    net = mlp(5, 4, 3, act=nn.Identity)
    cov = torch.cov(x.T, correction=0)
    root = torch.as_tensor(linalg.sqrtm(cov.numpy()).real)
    expected = torch.linalg.svdvals(net[2].weight @ net[0].weight @ root).square()
    for basis in ib.interaction_basis(ib.cut(net, x))[:-1]:
        torch.testing.assert_close(basis.values, expected.detach())


def test_with_the_constant_unit_mixed_in_they_are_those_of_the_outputs_second_moment():
    x = data()
    chain = ib.cut(mlp(5, 4, 3, act=nn.Identity), x)
    y = chain.outputs
    expected = torch.linalg.eigvalsh(y.T @ y / len(y)).flip(0)
    for basis in ib.interaction_basis(chain, center=False)[:-1]:
        torch.testing.assert_close(basis.values, expected)


@pytest.mark.parametrize("target", ["output", "next"])
def test_lambda_agree_with_an_explicit_loop(target):
    x, net = data(60, 4), mlp(4, 5, 4, 3)
    bases = ib.interaction_basis(ib.cut(net, x), target=target)
    hidden = net[:2](x).detach()
    after, turn = tail(net, 2), None
    if target == "next":  # to the features of the layer behind, in its own basis
        after, turn = nn.Sequential(net[2], net[3]), bases[2].C[:-1].numpy()
    expected = explicit(hidden, after, turn)[: len(bases[1].values)]
    np.testing.assert_allclose(bases[1].values, expected, rtol=1e-8)


@pytest.mark.parametrize("target", ["output", "next"])
def test_features_are_uncorrelated_and_equally_felt(target):
    chain = ib.cut(mlp(5, 6, 4), data())
    bases = ib.interaction_basis(chain, target=target)
    for i, basis in enumerate(bases[:-1]):
        features = basis.features(chain.activations[i])
        k = len(basis.values)
        moment = features.T @ features / len(features)
        torch.testing.assert_close(moment, basis.values.diag(), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(features.mean(0), torch.zeros(k, dtype=F64))
        ahead = bases[i + 1] if target == "next" else bases[-1]
        J = torch.cat(
            list(
                chain.jacobians(i, chain.position(ahead.layer), chain.activations[i], ahead.C[:-1])
            )
        )
        J = J @ basis.inverse[:, :-1].T
        felt = torch.einsum("nki,nkj->ij", J, J) / len(J)
        torch.testing.assert_close(felt, torch.eye(k, dtype=F64), atol=1e-8, rtol=1e-8)


def folded(net, x):
    """The bias-free network whose last unit is constant, as the authors fold biases."""
    layers = [m for m in net if isinstance(m, nn.Linear)]
    new = []
    for i, m in enumerate(layers):
        last = i == len(layers) - 1
        weight = torch.zeros(m.out_features + (not last), m.in_features + 1, dtype=F64)
        weight[: m.out_features] = torch.cat([m.weight, m.bias[:, None]], 1)
        if not last:
            weight[-1, -1] = 1
        linear = nn.Linear(*weight.T.shape, bias=False, dtype=F64)
        linear.weight.data = weight.detach()
        new += [linear] + ([nn.ReLU()] if not last else [])
    return nn.Sequential(*new), torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)


@pytest.mark.parametrize("target", ["output", "next"])
def test_mixed_biases_give_the_basis_of_the_folded_network(target):
    x, net = data(80, 3), mlp(3, 4, 3, 2, act=nn.ReLU, seed=1)
    bases = ib.interaction_basis(ib.cut(net, x), target=target, center=False)
    plain, xx = folded(net, x)
    f = [xx, plain[:2](xx), plain[:4](xx), plain(xx)]
    ahead = torch.linalg.eigh(torch.cov(f[3].detach().T, correction=0))[1].numpy()
    for i in (2, 1, 0):
        a = f[i].detach()
        g = (a.T @ a / len(a)).numpy()
        total = np.zeros_like(g)
        stop = len(plain) if target == "output" or i == 2 else 2 * i + 2
        for row in a:
            J = torch.autograd.functional.jacobian(plain[2 * i : stop], row).numpy()
            J = J if target == "output" else ahead.T @ J
            total += J.T @ J / len(a)
        expected = np.sort(linalg.eigvals(g @ total).real)[::-1]
        np.testing.assert_allclose(bases[i].values, expected[: len(bases[i].values)], rtol=1e-7)
        ahead = bases[i].C.numpy()


mixings = st.integers(0, 10**6)


@settings(max_examples=6, deadline=None)
@given(mixings, st.sampled_from(["output", "next"]))
def test_linear_reparametrisation_changes_nothing(seed, target):
    x = data(80, 4)
    net = nn.Sequential(*mlp(4, 6, 3), *mlp(3, 6, 2, seed=1))  # 3 features between two Linear
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(2, 3, 3, generator=g, dtype=F64))[0]
    A = q[0] @ (0.2 + 3 * torch.rand(3, generator=g, dtype=F64)).diag() @ q[1]
    other = nn.Sequential(*mlp(4, 6, 3), *mlp(3, 6, 2, seed=1))
    other[2].weight.data = A @ net[2].weight.data
    other[2].bias.data = A @ net[2].bias.data
    other[3].weight.data = net[3].weight.data @ torch.linalg.inv(A)
    one, two = ib.cut(net, x), ib.cut(other, x)
    torch.testing.assert_close(one.outputs, two.outputs)
    for a, b in zip(
        ib.interaction_basis(one, target=target),
        ib.interaction_basis(two, target=target),
        strict=True,
    ):
        torch.testing.assert_close(a.values, b.values, rtol=1e-6, atol=1e-10)
        i = one.position(a.layer)
        fa, fb = a.features(one.activations[i]), b.features(two.activations[i])
        gaps = a.values[:-1] / a.values[1:] > 1.01  # ties turn freely
        clear = torch.ones(len(a.values), dtype=torch.bool)
        clear[1:] &= gaps
        clear[:-1] &= gaps
        torch.testing.assert_close(
            fa[:, clear].abs(), fb[:, clear].abs(), rtol=1e-4, atol=1e-5 * float(fa.abs().max())
        )


def test_rescaled_and_permuted_relu_units_change_nothing():
    x, net = data(100, 4), mlp(4, 6, 3, act=nn.ReLU)
    other = mlp(4, 6, 3, act=nn.ReLU)
    c, order = torch.tensor([0.1, 2, 5, 1, 0.7, 3], dtype=F64), torch.randperm(6)
    other[0].weight.data = (c[:, None] * net[0].weight.data)[order]
    other[0].bias.data = (c * net[0].bias.data)[order]
    other[2].weight.data = (net[2].weight.data / c)[:, order]
    for a, b in zip(
        ib.interaction_basis(ib.cut(net, x)), ib.interaction_basis(ib.cut(other, x)), strict=True
    ):
        torch.testing.assert_close(a.values, b.values)


def test_the_way_back_restores_activations_and_leaves_the_model_alone():
    x, net = data().float(), mlp(5, 4, 3).float().train()
    before = [p.clone() for p in net.parameters()]
    chain = ib.cut(net, x)
    for bases in (ib.neuron_basis(chain), ib.pca_basis(chain)):
        for basis, f in zip(bases, chain.activations, strict=True):
            torch.testing.assert_close(basis.activations(basis.features(f)), f)
            moment = basis.features(f).square().mean(0)
            torch.testing.assert_close(moment, basis.values)
    assert net.training and net[0].weight.dtype == torch.float32
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))
    assert chain.outputs.dtype == F64


# --- interactions


@pytest.mark.parametrize("make", [ib.neuron_basis, ib.pca_basis, ib.interaction_basis])
def test_edges_agree_with_an_explicit_loop(make):
    x, net = data(40, 4), mlp(4, 5, 3)
    chain = ib.cut(net, x)
    bases = make(chain)
    found = ib.edges(chain, bases)
    a, b = bases[0], bases[1]
    expected = torch.zeros_like(found[0])
    for row in x:
        features = a.features(row)
        J = torch.autograd.functional.jacobian(
            lambda q: b.features(net[:2](a.activations(q))), features
        )
        expected += (J * features).square() / len(x)
    torch.testing.assert_close(found[0], expected)
    assert [tuple(e.shape) for e in found] == [
        (len(q.values), len(p.values)) for p, q in pairwise(bases)
    ]


@pytest.mark.parametrize("center", [True, False])
def test_edges_of_a_linear_network_sum_to_lambda(center):
    chain = ib.cut(mlp(5, 4, 3, act=nn.Identity), data())
    for kind in ("jacobian", "integrated"):
        bases = ib.interaction_basis(chain, target="next", center=center)
        for basis, e in zip(bases, ib.edges(chain, bases, kind=kind), strict=False):
            torch.testing.assert_close(e.sum(0), basis.values)


def test_integrated_edges_account_for_the_whole_change():
    x, net = data(50, 1), mlp(1, 4, 2)  # one input feature: its edge carries everything
    chain = ib.cut(net, x)
    bases = ib.neuron_basis(chain)
    (far,) = ib.edges(chain, [bases[0], bases[-1]], kind="integrated", points=60)
    change = net(x) - net(x.mean(0, keepdim=True))
    torch.testing.assert_close(far[:, 0], change.detach().square().mean(0), rtol=1e-8, atol=0)


def test_keeping_all_edges_keeps_the_outputs_and_none_leaves_the_mean():
    x, net = data(30, 4), mlp(4, 5, 3)
    chain = ib.cut(net, x)
    for bases in (ib.neuron_basis(chain), ib.interaction_basis(chain, target="next")):
        strengths = ib.edges(chain, bases)
        full = [torch.ones_like(e, dtype=torch.bool) for e in strengths]
        torch.testing.assert_close(ib.ablate(chain, bases, full), chain.outputs)
        none = [None, torch.zeros_like(full[1])]
        expected = net[2](net[:2](x).mean(0)).detach().expand_as(chain.outputs)
        torch.testing.assert_close(ib.ablate(chain, bases, none), expected)


def test_ablation_agrees_with_a_loop_over_features():
    x, net = data(30, 4), mlp(4, 5, 3)
    chain = ib.cut(net, x)
    bases = ib.pca_basis(chain)
    g = torch.Generator().manual_seed(0)
    masks = [torch.rand(e.shape, generator=g) < 0.6 for e in ib.edges(chain, bases)]
    f = x
    for (a, b), mask, part in zip(pairwise(bases), masks, (net[:2], net[2:]), strict=True):
        q = a.features(f)
        columns = [b.features(part(a.activations(q * mask[i])))[:, i] for i in range(len(mask))]
        f = b.activations(torch.stack(columns, 1))
    torch.testing.assert_close(ib.ablate(chain, bases, masks), f.detach())


def test_edges_needed_counts_the_weights_of_a_sparse_layer():
    net = nn.Sequential(nn.Linear(4, 3, dtype=F64))
    net[0].weight.data = torch.tensor([[1.0, 0, 0, 2], [0, 3, 0, 0], [0, -1, 4, 0]], dtype=F64)
    chain = ib.cut(net, data(50, 4))
    bases = ib.neuron_basis(chain)
    strengths = ib.edges(chain, bases)
    wrong = lambda y: -float((y - chain.outputs).abs().max())  # noqa: E731
    assert ib.edges_needed(chain, bases, strengths, wrong, allowed=1e-9) == [5]
    assert ib.strongest(strengths[0], 5).equal(net[0].weight.detach() != 0)
    assert ib.edges_needed(chain, bases, strengths, lambda y: 0.0) == [0]


# --- degeneracy and rank


def test_a_duplicated_unit_adds_one_zero_eigenvalue():
    x, net = data(60, 4), mlp(4, 5, 3)
    twice = mlp(4, 6, 3)
    for own, new in ((net[0].weight, twice[0].weight), (net[0].bias, twice[0].bias)):
        new.data = torch.cat([own.data, own.data[:1]])
    twice[2].weight.data = torch.cat([net[2].weight.data, net[2].weight.data[:, :1] / 2], 1)
    one, two = ib.degeneracy(ib.cut(net, x)), ib.degeneracy(ib.cut(twice, x))
    assert (one.activation["2"], two.activation["2"]) == (0, 1)
    assert (one.jacobian["0"], two.jacobian["0"]) == (0, 1)  # the twins get the same gradient
    assert two.parameters["2"] == 7 * 3 - 6 * 3
    assert len(ib.interaction_basis(ib.cut(twice, x))[1].values) == len(
        ib.interaction_basis(ib.cut(net, x))[1].values
    )


@pytest.mark.parametrize("d, h, e", [(4, 2, 3), (3, 3, 2), (5, 1, 2)])
def test_rank_of_the_hessian_of_a_linear_network(d, h, e):
    net = mlp(d, h, e, act=nn.Identity, bias=False)
    r = min(d, h, e)
    assert ib.effective_rank(ib.behavioral_loss(net, data(50, d))) == r * (d + e - r)


def hessian_block(net, x, name):
    """Of the behavioural loss in the parameters of one layer, by explicit Jacobians."""
    params = {f"{name}.{k}": v for k, v in net[int(name)].named_parameters()}
    flat = torch.cat([v.detach().flatten() for v in params.values()])

    def run(theta):
        parts, at = {}, 0
        for k, v in params.items():
            parts[k], at = theta[at : at + v.numel()].view_as(v), at + v.numel()
        return torch.func.functional_call(net, parts, x).flatten()

    J = torch.autograd.functional.jacobian(run, flat)
    return J.T @ J


@pytest.mark.parametrize("act", [nn.Identity, nn.ReLU])
def test_parameter_count_bounds_the_zero_eigenvalues_of_a_layers_hessian(act):
    x = data(100, 4)
    x[:, 3] = x[:, 0] + x[:, 1]  # inputs that are linearly dependent
    net = mlp(4, 5, 2, act=act, seed=2)
    found = ib.degeneracy(ib.cut(net, x))
    for name in ("0", "2"):
        values = torch.linalg.eigvalsh(hessian_block(net, x, name))
        zeros = int((values < 1e-9 * values.max()).sum())
        assert zeros >= found.parameters[name]
        if act is nn.Identity or name == "2":  # one gradient for all data: the bound is reached
            assert zeros == found.parameters[name]
    assert found.parameters["0"] >= 5
    assert found.activation["0"] == 1


def test_relus_that_fire_together_have_free_directions():
    x = data(100, 4)
    net = mlp(4, 3, 2, act=nn.ReLU, seed=3)
    alone = ib.effective_rank(ib.behavioral_loss(net, x))
    size = sum(p.numel() for p in net.parameters())
    assert ib.degeneracy(ib.cut(net, x)).relu["1"] == [1, 1, 1]
    assert size - alone == 3  # a rescaling for each unit
    near = net[0].weight.data[0] + 1e-4 * torch.tensor([1.0, -1, 2, 0.5], dtype=F64)
    net[0].weight.data[1], net[0].bias.data[1] = near, net[0].bias.data[0] + 1e-4
    assert ib.degeneracy(ib.cut(net, x)).relu["1"] == [2, 1]
    together = ib.effective_rank(ib.behavioral_loss(net, x), tol=1e-14)
    assert size - together == 2**2 + 1


# --- modules


def test_planted_modules_are_recovered_and_weak_edges_ignored():
    g = torch.Generator().manual_seed(0)
    block = torch.block_diag(torch.ones(4, 3), torch.ones(3, 4)).bool()
    strengths = []
    for mask in (block, block.T):
        strong = torch.rand(mask.shape, generator=g) + 1
        strengths.append(torch.where(mask, strong, 1e-6 * strong))
    found = ib.modularity(strengths, eps=1e-5)
    for labels, planted in zip(found.labels, ([0] * 3 + [1] * 4, [0] * 4 + [1] * 3), strict=False):
        assert adjusted_rand_score(planted, labels) == 1
    assert found.count == 2 and found.score > 0.4
    assert ib.modularity(strengths, eps=10.0).count == 0
    assert ib.modularity(strengths, eps=[1e-5, 1e-5]).score == found.score


# --- what is refused


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: ib.interaction_basis(ib.cut(mlp(3, 2), x), target="all"), "target"),
        (lambda x: ib.interaction_basis(ib.cut(mlp(3, 2), x), tol=0), "tol"),
        (lambda x: ib.interaction_basis(
            ib.cut(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), x), center=False), "LayerNorm"),
        (lambda x: ib.interaction_basis(ib.cut(mlp(3, 2), x * 0)), "constant on the data"),
        (lambda x: ib.edges(ib.cut(mlp(3, 2), x), ib.neuron_basis(ib.cut(mlp(3, 2), x)),
                            kind="all"), "kind"),
        (lambda x: ib.ablate(ib.cut(mlp(3, 2), x), ib.interaction_basis(
            ib.cut(mlp(3, 2), x), center=False), [None]), "constant unit"),
        (lambda x: ib.ablate(ib.cut(mlp(3, 2), x), ib.neuron_basis(ib.cut(mlp(3, 2), x)), []),
         "masks"),
        (lambda x: ib.degeneracy(ib.cut(mlp(3, 3, 2), x, ["1"])), "'1' is a Tanh"),
        (lambda x: ib.modularity([torch.ones(2, 2)], eps=0), "eps"),
        (lambda x: ib.effective_rank(ib.behavioral_loss(mlp(3, 2), x), tol=-1), "tol"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(data(20, 3))


def test_a_layer_may_be_any_module_and_models_may_take_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.join, self.norm, self.head = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, a, b):
            return self.head(torch.relu(self.norm(self.join(torch.cat([a, b], 1)))))

    a, b = data(60, 2), data(60, 3, seed=1)
    net = Two()
    chain = ib.cut(net, (a, b), ["norm", "head"])
    assert chain.names == ("norm", "head", "output")
    hidden = net.eval().double().join(torch.cat([a, b], 1)).detach()
    after = lambda f: net.head(torch.relu(net.norm(f[None])))[0]  # noqa: E731
    expected = explicit(hidden, after)
    values = ib.interaction_basis(chain)[0].values
    np.testing.assert_allclose(values, expected[: len(values)], rtol=1e-7)


# --- experiments and explorer


def test_a_split_network_answers_as_its_halves_and_as_its_disguise():
    plain = study.split(0, steps=20, rows=40)
    hidden = study.disguised(plain, 0, 3.0)
    out = plain.model(plain.X)
    torch.testing.assert_close(hidden.model(plain.X.double()), out.double(), rtol=1e-4, atol=1e-4)
    moved = plain.X.clone()
    moved[:, 16:] += 1
    again = plain.model(moved)
    assert torch.equal(again[:, :10], out[:, :10]) and not torch.equal(again, out)
    spread = torch.linalg.svdvals(
        hidden.model[2].weight @ plain.model[2].weight.pinverse().double()
    )
    assert spread.max() / spread.min() > 2  # the mixing is no rotation
    net = ib.cut(hidden.model, hidden.X, hidden.layers)
    shares = study.first_half(plain, net, {"neurons": ib.neuron_basis(net)})["neurons"]
    assert (shares[4][:10] > 0.5).all() and (shares[4][10:] < 0.5).all()
    assert ((shares[2] > 0.1) & (shares[2] < 0.9)).any()


@pytest.mark.parametrize("task", study.TASKS)
def test_an_experiment_counts_edges_in_the_same_unit_for_all_bases(task):
    options = {} if task == "addition" else {"rows": 30}
    row = study.sparsity(0, task=task, steps=5, **options)
    assert 0 <= row["accuracy"] <= 1
    for name in (*study.BASES, "turned", "scaled"):
        expected = 100 * row[f"needed_{name}"].sum() / row["possible"]
        assert row[f"edges_{name}"] == pytest.approx(expected)


def test_turned_and_scaled_bases_span_what_they_came_from():
    chain = ib.cut(mlp(5, 6, 4), data())
    pca, own = ib.pca_basis(chain), ib.interaction_basis(chain)
    for found, origin in ((study.turned(own, 0), own), (study.scaled(chain, pca), pca)):
        for a, b, f in zip(found, origin, chain.activations, strict=True):
            torch.testing.assert_close(a.activations(a.features(f)), b.activations(b.features(f)))
            torch.testing.assert_close(a.features(f).square().mean(0), a.values)
    for start, basis in enumerate(study.scaled(chain, pca)[:-1]):
        turn = torch.eye(4, dtype=F64)
        J = torch.cat(list(chain.jacobians(start, 2, chain.activations[start], turn)))
        effect = (J @ basis.inverse[:, :-1].T).square().sum(1).mean(0)
        torch.testing.assert_close(effect, torch.ones_like(effect))


def test_released_counts_are_five_pairs():
    assert {name: np.sum(rows) for name, rows in study.RELEASED.items()} == {
        "pca": 4326, "next": 3974,
    }  # fmt: skip


def test_the_exported_graph_is_that_of_python():
    x, net = data(50, 4), mlp(4, 6, 3)
    chain = ib.cut(net, x)
    bases = {"pca": ib.pca_basis(chain), "output": ib.interaction_basis(chain)}
    sides = {
        name: [np.linspace(0, 1, len(b.values)) for b in chosen] for name, chosen in bases.items()
    }
    score = lambda y: float((y.argmax(1) == chain.outputs.argmax(1)).double().mean())  # noqa: E731
    explorer = figures.explore_interactions(chain, bases, score, sides=sides, kept=(1, 3, 99))
    assert js.check_formula(explorer) == 6
    explorer.set(basis="output", keep=99)
    result = explorer.result()
    assert explorer.seconds < 0.05
    assert result["score"] == result["full"] == 100
    assert result["total"] == sum(e.numel() for e in ib.edges(chain, bases["output"]))
    assert figures.explore_interactions(chain, bases, score, kept=(1,)).result()["total"] == 2
