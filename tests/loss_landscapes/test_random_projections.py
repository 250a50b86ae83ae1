"""Random projections against explicit matrices, scipy's Hadamard matrix and their statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from workbench.loss_landscapes.random_projections import KINDS, Fastfood, fwht, projection


def made(kind, D=60, d=23, seed=0, dtype=torch.float64):
    return projection(D, D if kind == "full" else d, kind, seed, dtype=dtype)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- Walsh-Hadamard


@pytest.mark.parametrize("bits", [0, 1, 4, 5, 6, 9, 10, 11])
def test_the_transform_is_scipys_matrix(bits):
    x = normal(3, 2**bits)
    torch.testing.assert_close(fwht(x), x @ torch.tensor(hadamard(2**bits), dtype=x.dtype))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 14), st.integers(0, 10**6))
def test_twice_the_transform_is_the_length(bits, seed):
    x = normal(2, 2**bits, seed=seed)
    torch.testing.assert_close(fwht(fwht(x)), x * 2**bits)


def test_the_transform_passes_gradcheck_twice():
    x = normal(2, 3, 8).requires_grad_()
    assert torch.autograd.gradcheck(fwht, (x,)) and torch.autograd.gradgradcheck(fwht, (x,))


@pytest.mark.parametrize("shape", [(3,), (2, 0), ()])
def test_lengths_that_are_no_power_of_two_are_refused(shape):
    with pytest.raises(ValueError, match="power of two"):
        fwht(torch.zeros(shape))


# --- projections


def explicit_fastfood(D, d, seed):
    """The authors' formula with every factor as a matrix of size L."""
    generator, L = torch.Generator().manual_seed(seed), 2 ** math.ceil(math.log2(D))
    B = torch.randint(2, (L,), generator=generator, dtype=torch.int8) * 2.0 - 1
    order = torch.randperm(L, generator=generator)
    G = torch.randn(L, generator=generator, dtype=torch.float64)
    H = torch.tensor(hadamard(L), dtype=torch.float64)
    whole = H @ torch.diag(G) @ torch.eye(L, dtype=H.dtype)[order] @ H @ torch.diag(B.double())
    return (whole / (math.sqrt(L * G.square().sum()) * math.sqrt(D / L)))[:D, :d]


@pytest.mark.parametrize("D, d", [(60, 23), (64, 64), (65, 1), (200, 17), (1, 1)])
def test_fastfood_is_the_authors_product_of_matrices(D, d):
    P = Fastfood(D, d, torch.Generator().manual_seed(3), torch.float64)
    torch.testing.assert_close(P.matrix(), explicit_fastfood(D, d, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_adjoint_is_the_transpose_with_any_leading_axes(kind, dtype):
    P = made(kind, dtype=dtype)
    x, g = normal(2, 3, P.d, dtype=dtype), normal(2, 3, P.D, dtype=dtype)
    matrix = P.matrix().to(dtype)
    torch.testing.assert_close(P(x), x @ matrix.T)
    torch.testing.assert_close(P.adjoint(g), g @ matrix)
    torch.testing.assert_close(P(x[0, 0]), matrix @ x[0, 0])
    torch.testing.assert_close(torch.vmap(P)(x), P(x))


@pytest.mark.parametrize("kind", KINDS)
def test_projections_pass_gradcheck_twice(kind):
    P = made(kind, D=12, d=5)
    x = normal(2, P.d).requires_grad_()
    assert torch.autograd.gradcheck(P, (x,)) and torch.autograd.gradgradcheck(P, (x,))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_columns_have_unit_length(kind):
    torch.testing.assert_close(made(kind, 3000, 50).matrix().norm(dim=0), torch.ones(50).double())


def test_fastfood_columns_have_unit_length_at_a_power_of_two_and_nearly_otherwise():
    torch.testing.assert_close(
        made("fastfood", 1024, 50).matrix().norm(dim=0), torch.ones(50).double()
    )
    lengths = torch.cat([made("fastfood", 700, 50, s).matrix().square().sum(0) for s in range(40)])
    assert float(lengths.mean()) == pytest.approx(1, abs=5e-3)
    assert float(lengths.std()) < 0.05


@pytest.mark.parametrize("kind, D, expected", [
    ("dense", 400, 1 / 400), ("sparse", 400, 1 / 400),
    ("fastfood", 256, 2 / 256), ("fastfood", 400, 1 / 400 + 1 / 512),
])  # fmt: skip
def test_columns_are_about_orthogonal(kind, D, expected):
    """Mean square of an entry of P'P off the diagonal: 1/D; fastfood's Gaussians add 1/L."""
    squares = []
    for seed in range(30):
        P = made(kind, D, 40, seed).matrix()
        gram = P.T @ P
        squares.append((gram - gram.diag().diag()).square().sum() / (40 * 39))
    assert float(torch.stack(squares).mean()) == pytest.approx(expected, rel=0.12)


def test_sparse_entries_are_signs_at_one_over_root_d():
    P = made("sparse", 2500, 200).matrix()
    assert float((P != 0).double().mean()) == pytest.approx(1 / 50, rel=0.05)
    assert float((P > 0).double().sum() / (P != 0).sum()) == pytest.approx(0.5, abs=0.03)
    for column in P.T[:10]:
        assert len(column[column != 0].abs().unique()) == 1


@pytest.mark.parametrize("kind", ["fastfood", "dense"])
def test_subspaces_of_one_seed_are_nested(kind):
    wide, narrow = made(kind, 300, 200).matrix(), made(kind, 300, 40).matrix()
    torch.testing.assert_close(wide[:, :40], narrow, rtol=0, atol=1e-15)
    assert not torch.equal(narrow, made(kind, 300, 40, seed=1).matrix())


def test_fastfood_holds_three_vectors_whatever_d_is():
    L = 8192
    for d in (10, 5000):
        P = projection(5000, d)
        held = sum(b.numel() * b.element_size() for b in P.buffers())
        assert held == 12 * L + 4 * d


@pytest.mark.parametrize("kind", ["fastfood", "dense", "sparse"])
def test_p_does_not_lie_along_weights_drawn_with_the_same_seed(kind):
    for seed in range(3):
        P, weights = made(kind, 2000, 20, seed).matrix(), normal(2000, seed=seed)
        cosine = P.T @ weights / weights.norm()
        assert float(cosine.abs().max()) < 5 / math.sqrt(2000)


# --- wrong input


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: projection(10, 11), "d: expected at most D = 10"),
        (lambda: projection(10, 3, "gaussian"), "kind: expected one of"),
        (lambda: projection(10, 3, "full"), "'full' needs d = D"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
