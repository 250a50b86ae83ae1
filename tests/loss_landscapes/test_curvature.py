"""Eigenpairs, trace and spectrum against dense Hessians, ARPACK, and matrices made to measure."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.nn import functional as F

from workbench import lab
from workbench.lab.models import MLP
from workbench.loss_landscapes.geometry import Objective, curvature
from workbench.loss_landscapes.geometry.lanczos import Lanczos
from workbench.loss_landscapes.geometry.operators import Operator

INSTRUMENTS = [
    curvature.top_eigs, curvature.spectral_density, curvature.spectrum, curvature.trace,
    curvature.trace_hutchpp,
]  # fmt: skip


def matrix(values, seed=0, dtype=torch.float64):
    """A symmetric matrix with these eigenvalues, and the instrument's view of it."""
    values = torch.as_tensor(values, dtype=torch.float64)
    rng = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(2 * values.shape, generator=rng, dtype=torch.float64)).Q
    H = ((Q * values) @ Q.T).to(dtype)
    return H, Operator(lambda v: H @ v, len(H), dtype)


def spiky(n=500):
    """A bulk near zero and ten outliers, as networks have."""
    return np.concatenate([np.linspace(-0.2, 1, n - 10) ** 3, np.linspace(2, 40, 10)])


class Interrupted:
    """An operator at which the reader presses Ctrl-C."""

    def __init__(self, H, after):
        self.H, self.size, self.dtype, self.left = H, len(H), H.dtype, after

    def hvp(self, v):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.H @ v


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=str)
def network(request):
    """An objective of 83 parameters and its dense Hessian."""
    with lab.seeded(0):
        model = MLP([5, 7, 4, 2], act="tanh").to(request.param)
        x = torch.randn(40, 5, dtype=request.param)
        y = torch.randint(2, (40,))
    obj = Objective(model, F.cross_entropy, (x, y))
    shapes = dict(zip(obj.names, obj.shapes, strict=True))

    def loss(theta):
        parts = theta.split([int(np.prod(s)) for s in shapes.values()])
        weights = {k: p.view(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

    return obj, torch.func.hessian(loss)(obj.theta).detach(), loss


# --- against the dense Hessian of a network


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_leading_pairs_are_those_of_the_dense_hessian(network, which):
    obj, H, _ = network
    values = torch.linalg.eigvalsh(H.double()).numpy()
    rank = {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}[which]
    expected = values[np.argsort(rank)[:4]]
    tol = 1e-4 if obj.theta.dtype == torch.float32 else 1e-8
    found = curvature.top_eigs(obj, 4, which=which, tol=tol, generator=0)
    assert found.complete and found.products < obj.size
    assert np.allclose(found.values, expected, atol=2e-6)
    wrong = obj.hvp(found.vectors) - torch.tensor(found.values)[:, None] * found.vectors
    assert np.allclose(wrong.norm(dim=1), found.residuals, atol=1e-6)
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(4, dtype=H.dtype), atol=1e-5)
    assert found.vectors.dtype == obj.theta.dtype


def test_traces_are_within_their_error_of_the_dense_one(network):
    obj, H, _ = network
    exact = float(H.trace())
    for estimate in (
        curvature.trace(obj, 200, tol=0, generator=1),
        curvature.trace_hutchpp(obj, 90, generator=1),
    ):
        assert abs(estimate.value - exact) < 4 * estimate.error
        assert estimate.complete and estimate.draws == len(estimate.samples)


def test_density_of_a_network_has_the_moments_of_its_spectrum(network):
    obj, H, _ = network
    values = np.linalg.eigvalsh(H.double().numpy())
    found = curvature.spectral_density(obj, steps=30, draws=12, generator=0)
    assert abs(found.moment(1) - values.mean()) < 0.1 * values.std()
    assert found.moment(2) == pytest.approx((values**2).mean(), rel=0.2)
    half = values[-1] / 2
    assert found.mass(low=half) == pytest.approx((values > half).mean(), abs=0.05)


def test_curvature_elsewhere_than_at_the_present_parameters(network):
    obj, _, loss = network
    theta = obj.theta + 0.1
    H = torch.func.hessian(loss)(theta)
    top = curvature.top_eigs(obj, theta=theta, generator=0, tol=1e-4).values[0]
    assert top == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-4)
    both = curvature.spectrum(obj, 1, 40, theta=theta, generator=0)
    assert both.eigs.values[0] == pytest.approx(top, rel=1e-3)
    for one in (curvature.trace(obj, 64, theta=theta), curvature.trace_hutchpp(obj, theta=theta)):
        assert abs(one.value - float(H.trace())) < 6 * one.error


# --- matrices made to measure


@settings(max_examples=30, deadline=None)
@given(
    levels=st.lists(st.integers(-3, 3), min_size=1, max_size=4, unique=True),
    copies=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    k=st.integers(1, 5),
    which=st.sampled_from(["largest", "smallest", "magnitude"]),
    seed=st.integers(0, 99),
)
def test_repeated_eigenvalues_keep_their_multiplicity(levels, copies, k, which, seed):
    values = np.repeat(np.array(levels, float), copies[: len(levels)])
    k = min(k, len(values))
    key = {"largest": values, "smallest": -values, "magnitude": np.abs(values)}[which]
    expected = np.sort(key)[::-1][:k]
    _, H = matrix(values, seed)
    found = curvature.top_eigs(H, k, which=which, tol=0, generator=seed)
    got = {"largest": 1, "smallest": -1, "magnitude": np.sign(found.values)}[which] * found.values
    assert found.complete and np.allclose(got, expected, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    levels=st.lists(st.integers(-3, 3), min_size=1, max_size=4, unique=True),
    copies=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_as_many_nodes_as_distinct_eigenvalues_and_no_more(levels, copies, seed):
    dense, H = matrix(np.repeat(np.array(levels, float), copies), seed)
    found = curvature.spectral_density(H, steps=50, generator=seed)
    assert np.allclose(found.nodes, np.sort(levels), atol=1e-9)
    v = H.signs(torch.Generator().manual_seed(seed)) / len(dense) ** 0.5
    for power in (1, 2, 5, 9):
        expected = float(v @ torch.linalg.matrix_power(dense, power) @ v)
        scale = float(max(1, np.abs(levels).max())) ** power
        assert found.moment(power) == pytest.approx(expected, abs=1e-10 * scale)


def test_quadrature_of_m_nodes_is_exact_up_to_degree_2m_minus_1():
    dense, H = matrix(np.linspace(-1, 2, 40))
    m = 6
    found = curvature.spectral_density(H, steps=m, generator=3)
    v = H.signs(torch.Generator().manual_seed(3)) / len(dense) ** 0.5
    moments = [float(v @ torch.linalg.matrix_power(dense, p) @ v) for p in range(2 * m + 1)]
    differences = [abs(found.moment(p) - exact) for p, exact in enumerate(moments)]
    assert len(found.nodes) == m
    assert max(differences[: 2 * m]) < 1e-12 < differences[2 * m] / 10


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 20))
@settings(max_examples=15, deadline=None)
def test_density_has_mass_one_and_scales_with_the_loss(scale, seed):
    values = np.linspace(-1, 3, 30)
    one = curvature.spectral_density(matrix(values)[1], 12, 2, generator=seed)
    other = curvature.spectral_density(matrix(scale * values)[1], 12, 2, generator=seed)
    assert np.trapezoid(one.density, one.grid) == pytest.approx(1, abs=1e-8)
    assert one.weights.sum() == pytest.approx(1)
    assert np.allclose(other.grid, scale * one.grid, rtol=1e-9, atol=1e-12 * scale)
    assert np.allclose(scale * other.density, one.density, rtol=1e-6, atol=1e-9)
    assert np.allclose(scale * other.error, one.error, rtol=1e-6, atol=1e-9)


def test_density_of_one_node_is_the_gaussian():
    found = curvature.spectral_density(matrix([2.0] * 6)[1], sigma2=1e-2, grid=[1.9, 2.0, 2.3])
    normal = torch.distributions.Normal(torch.tensor(2.0), torch.tensor(0.2))
    expected = normal.log_prob(torch.tensor([1.9, 2.0, 2.3])).exp()
    assert np.allclose(found.density, expected, rtol=1e-5)
    assert found.error.tolist() == [0, 0, 0] and found.sigma == pytest.approx(0.2)


def test_a_zero_hessian_has_a_flat_everything():
    H = Operator(torch.zeros_like, 50)
    assert curvature.top_eigs(H, 3).values.tolist() == [0, 0, 0]
    assert curvature.trace(H).value == 0 and curvature.trace_hutchpp(H).value == 0
    assert np.trapezoid(*(lambda d: (d.density, d.grid))(curvature.spectral_density(H))) > 0.999


@pytest.mark.parametrize("room", [None, 40, 16])
@pytest.mark.parametrize("which, arpack", [("largest", "LA"), ("smallest", "SA")])
def test_restarted_lanczos_agrees_with_arpack(room, which, arpack):
    dense, H = matrix(np.concatenate([np.linspace(-1, 1, 390), np.linspace(1.01, 1.1, 10)]))
    linear = LinearOperator(dense.shape, matvec=lambda v: dense.numpy() @ v, dtype=float)
    expected = np.sort(eigsh(linear, 4, which=arpack, tol=1e-12)[0])
    found = curvature.top_eigs(H, 4, which=which, room=room, tol=1e-7, generator=0)
    assert found.complete and np.allclose(np.sort(found.values), expected, atol=1e-10)
    if room == 16:
        assert found.products > 3 * room


@pytest.mark.parametrize("tol", [0, 1e-3, 3e-2])
def test_a_closed_space_is_left_also_after_restarts(tol):
    _, H = matrix(np.concatenate([[9.0] * 3, np.tile(np.arange(1.0, 6), 8)]))
    found = curvature.top_eigs(H, 4, room=11, tol=tol, generator=0)
    assert np.allclose(found.values, [9, 9, 9, 5], atol=max(tol, 1e-8)) and found.products > 11


def test_the_basis_stays_orthonormal():
    dense, H = matrix(spiky(), dtype=torch.float32)
    run = Lanczos(H, H.signs(torch.Generator().manual_seed(0)), 120)
    for _ in range(120):
        run.step()
    Q = run.basis[: run.used]
    assert float((Q @ Q.T - torch.eye(120)).abs().max()) < 1e-5
    assert np.allclose(run.T, (Q @ dense @ Q.T).numpy(), atol=1e-4)
    assert np.allclose(run.T, np.tril(np.triu(run.T, -1), 1))


def test_one_run_gives_pairs_and_density():
    _, H = matrix(spiky())
    exact = np.sort(spiky())[::-1][:5]
    both = curvature.spectrum(H, 5, 80, generator=0)
    alone = curvature.spectral_density(H, 80, generator=0)
    assert both.eigs.products == 80 and both.eigs.complete and both.density.complete
    assert np.allclose(both.eigs.values, exact, rtol=1e-6)
    assert np.array_equal(both.density.density, alone.density)
    longer = curvature.spectrum(H, 5, 6, 3, generator=0)  # too few steps for the pairs
    assert longer.eigs.complete and longer.eigs.products > 6
    assert len(longer.density.nodes) == 18 and longer.density.draws == 3
    assert np.array_equal(longer.density.nodes, curvature.spectral_density(H, 6, 3, generator=0)
                          .nodes)  # fmt: skip


# --- traces


def test_the_error_of_hutchinson_is_the_one_theory_gives():
    dense, H = matrix(np.linspace(-1, 3, 30))
    exact = 2 * float((dense**2).sum() - (dense.diagonal() ** 2).sum())
    found = curvature.trace(H, 4000, tol=0, generator=0)
    assert found.error**2 * found.draws == pytest.approx(exact, rel=0.1)
    assert abs(found.value - 30) < 4 * found.error


def test_hutchinson_is_exact_on_a_diagonal_and_stops_there():
    diagonal = torch.linspace(-1, 2, 50)
    found = curvature.trace(lambda v: diagonal * v, size=50, generator=0)
    assert found.value == pytest.approx(25, rel=1e-5) and found.draws == 16 and found.complete
    assert np.isnan(curvature.trace(lambda v: diagonal * v, 1, size=50).error)


def test_hutchpp_is_exact_for_low_rank_and_better_for_spikes():
    low = np.concatenate([np.zeros(90), np.arange(1.0, 11)])
    found = curvature.trace_hutchpp(matrix(low)[1], 60, generator=0)
    assert found.value == pytest.approx(55) and found.error < 1e-9
    whole = curvature.trace_hutchpp(matrix(np.arange(5.0))[1], 60)
    assert whole.value == pytest.approx(10) and whole.error == 0
    values = spiky(600)
    for estimate in (curvature.trace, curvature.trace_hutchpp):
        found = estimate(matrix(values)[1], 90, generator=0)
        assert abs(found.value - values.sum()) < 4 * found.error
    plain = curvature.trace(matrix(values)[1], 90, generator=0)
    assert found.error < plain.error / 3


# --- interruption, dtypes, bad input


@pytest.mark.parametrize("after", [1, 3, 9, 16])
def test_ctrl_c_returns_what_is_known(after):
    dense, _ = matrix(spiky(200))
    found = curvature.top_eigs(Interrupted(dense, after), 5, tol=0, generator=0)
    assert not found.complete and found.products == after
    assert len(found.values) == min(5, after) == len(found.vectors)
    wrong = dense @ found.vectors.T - found.vectors.T * torch.tensor(found.values)
    assert np.allclose(wrong.norm(dim=0), found.residuals, atol=1e-10)
    density = curvature.spectral_density(Interrupted(dense, after), 10, 3, generator=0)
    assert not density.complete and density.draws == max(1, after // 10)
    assert density.weights.sum() == pytest.approx(1)
    both = curvature.spectrum(Interrupted(dense, after), 5, 10, 3, generator=0)
    assert not both.density.complete and len(both.eigs.values) == min(5, after)
    if after > 8:
        found = curvature.trace(Interrupted(dense, after), generator=0)
        assert not found.complete and found.draws == after // 8 * 8


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_ctrl_c_before_anything_is_known_goes_on(instrument):
    with pytest.raises(KeyboardInterrupt):
        instrument(Interrupted(torch.eye(30), 0))


def test_a_model_is_unchanged_after_ctrl_c():
    with lab.seeded(0):
        model = nn.Linear(4, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = []

    def loss(out, y):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return F.cross_entropy(out, y)

    batches = [(torch.randn(6, 4), torch.arange(6) % 3)] * 2
    found = curvature.top_eigs(Objective(model, loss, batches), 3, generator=0)
    assert not found.complete and found.products == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_products_may_run_out():
    found = curvature.top_eigs(matrix(np.linspace(0, 1, 300))[1], 3, steps=7, generator=0)
    assert not found.complete and found.products == 7 and found.residuals.max() > 1e-3


def test_the_same_seed_gives_the_same_numbers_in_both_precisions():
    narrow, wide = (matrix(spiky(80), dtype=d)[1] for d in (torch.float32, torch.float64))
    for one, other in [
        (f(narrow, generator=4), f(wide, generator=4))
        for f in (curvature.trace, curvature.trace_hutchpp)
    ]:
        assert one.value == pytest.approx(other.value, rel=1e-4)
    assert np.allclose(
        curvature.top_eigs(narrow, 3, generator=4).values,
        curvature.top_eigs(wide, 3, generator=4).values, rtol=1e-5,
    )  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    dense, _ = matrix(spiky(300))
    place = dense.cuda()
    H = Operator(lambda v: place @ v, 300, torch.float64, "cuda")
    found = curvature.top_eigs(H, 3, generator=0)
    assert found.vectors.is_cuda and np.allclose(found.values[0], 40)
    assert curvature.spectral_density(H, 50, generator=0).complete


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda H: curvature.top_eigs(H, 0), "k: expected a whole number >= 1"),
        (lambda H: curvature.top_eigs(H, 11), "k: expected at most 10"),
        (lambda H: curvature.top_eigs(H, which="top"), "which: expected one of 'largest'"),
        (lambda H: curvature.top_eigs(H, tol=-1), "tol: expected a number >= 0"),
        (lambda H: curvature.top_eigs(H, 3, room=8), "room: expected a whole number >= 9"),
        (lambda H: curvature.spectral_density(H, 0), "steps: expected"),
        (lambda H: curvature.spectral_density(H, draws=0), "draws: expected"),
        (lambda H: curvature.spectral_density(H, sigma2=0), "sigma2: expected a number > 0"),
        (lambda H: curvature.spectral_density(H, points=1), "points: expected"),
        (lambda H: curvature.trace(H, draws=0), "draws: expected"),
        (lambda H: curvature.trace_hutchpp(H, 5), "products: expected a whole number >= 6"),
        (lambda H: curvature.trace(H, generator="a"), "generator: expected a torch.Generator"),
        (lambda H: curvature.trace(H.product), "size: is needed"),
        (lambda H: curvature.trace(torch.eye(3)), "obj: expected an Objective"),
        (lambda H: curvature.trace(None), "obj: expected an Objective"),
        (lambda H: curvature.trace(H.product, theta=torch.ones(10), size=10), "theta: only an"),
        (lambda H: curvature.trace(lambda v: v[:-1], size=10), r"H v has shape \(9,\)"),
        (lambda H: curvature.top_eigs(lambda v: v / 0, size=10), "obj: H v holds NaN"),
    ],
)
def test_bad_input_is_named(call, message):
    _, H = matrix(np.arange(10.0))
    with pytest.raises((TypeError, ValueError), match=message):
        call(H)
