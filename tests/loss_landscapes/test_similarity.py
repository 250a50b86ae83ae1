"""Linear CKA: against its definition through Gram matrices, and what it must not see."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.loss_landscapes.geometry import linear_cka, similarity


def features(n, p, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, p, generator=rng, dtype=torch.float64).to(dtype)


def by_definition(X, Y):
    """HSIC with explicit centring matrices."""
    n = len(X)
    C = np.eye(n) - 1 / n
    K, L = (C @ np.asarray(Z, float) @ np.asarray(Z, float).T @ C for Z in (X, Y))
    return (K * L).sum() / np.sqrt((K * K).sum() * (L * L).sum())


def unbiased_by_loops(X, Y):
    """The estimator of Song et al. (2012) on Gram matrices without diagonals."""

    def hsic(K, L):
        n = len(K)
        K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
        one = np.ones(n)
        far = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        return (np.trace(K @ L) + far - 2 / (n - 2) * one @ K @ L @ one) / (n * (n - 3))

    K, L = (np.asarray(Z, float) @ np.asarray(Z, float).T for Z in (X, Y))
    return hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))


SHAPES = st.tuples(st.integers(5, 30), st.integers(1, 40), st.integers(1, 40))


@given(shape=SHAPES, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_both_sides_are_the_definition(shape, seed):
    n, p, q = shape
    X = features(n, p, seed) + 3
    Y = X @ features(p, q, seed + 1) + 0.5 * features(n, q, seed + 2)
    assert linear_cka(X, Y) == pytest.approx(by_definition(X, Y), rel=1e-9)
    expected = unbiased_by_loops(X, Y)
    assert linear_cka(X, Y, unbiased=True) == pytest.approx(expected, rel=1e-7, abs=1e-9)


@given(shape=SHAPES, seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3), shift=st.floats(-9, 9))
@settings(max_examples=30, deadline=None)
def test_rotations_scales_and_shifts_are_not_seen(shape, seed, scale, shift):
    n, p, q = shape
    X, Y = features(n, p, seed), features(n, q, seed + 1)
    Q = torch.linalg.qr(features(p, p, seed + 2)).Q
    moved = scale * X @ Q + shift
    for unbiased in (False, True):
        assert linear_cka(X, moved, unbiased=unbiased) == pytest.approx(1, rel=1e-6)
        one = linear_cka(X, Y, unbiased=unbiased)
        assert linear_cka(moved, Y, unbiased=unbiased) == pytest.approx(one, rel=1e-6, abs=1e-8)
        assert linear_cka(Y, X, unbiased=unbiased) == pytest.approx(one, rel=1e-9, abs=1e-12)
    assert 0 <= linear_cka(X, Y) <= 1 + 1e-12


def test_a_general_linear_map_is_seen():
    X = features(50, 6)
    assert linear_cka(X, X * torch.tensor([9.0, 1, 1, 1, 1, 1])) < 0.8


def test_rows_must_be_paired():
    X = features(100, 10)
    assert linear_cka(X, X.flip(0)) < 0.4


def test_many_features_of_few_rows_look_alike_unless_unbiased():
    X, Y = features(30, 3000, 1), features(30, 3000, 2)
    assert linear_cka(X, Y) > 0.9
    assert abs(linear_cka(X, Y, unbiased=True)) < 0.1


def test_blocks_add_up(monkeypatch):
    wide, tall = (features(20, 300, 1), features(20, 200, 2)), (features(300, 4), features(300, 7))
    expected = [linear_cka(*pair) for pair in (wide, tall)]
    monkeypatch.setattr(similarity, "_NUMBERS", 100)
    assert [linear_cka(*pair) for pair in (wide, tall)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_precisions_arrays_and_lists(dtype):
    X, Y = features(200, 5), features(200, 5) + 0.5 * features(200, 5, 1)
    expected = by_definition(X, Y)
    tol = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    assert linear_cka(X.to(dtype), Y.to(dtype)) == pytest.approx(expected, rel=tol)
    if dtype == torch.float64:
        assert linear_cka(X.numpy(), Y.tolist()) == pytest.approx(expected)
        assert linear_cka(X.requires_grad_(), Y) == pytest.approx(expected)


def test_a_large_mean_costs_no_digits():
    X, Y = features(300, 8), features(300, 8, 1)
    shifted = (X + 1000).float()
    assert linear_cka(shifted, Y.float()) == pytest.approx(by_definition(shifted, Y), rel=1e-4)


@pytest.mark.parametrize(
    "X, Y, message",
    [
        (torch.ones(5, 2), features(5, 2), "X: does not vary"),
        (features(5, 2), torch.full((5, 3), 0.1), "Y: does not vary"),
        (features(5, 2), features(6, 2), "X and Y: expected the same number of rows"),
        (features(5, 2)[:, :, None], features(5, 2), r"X: expected 2 dimension"),
        (features(1, 2), features(1, 2), r"X: has 1 row"),
        (features(5, 2) / 0, features(5, 2), "X: row 0 holds NaN or infinity"),
        (features(5, 2).to(torch.complex64), features(5, 2), "X: expected real numbers"),
    ],
)
def test_bad_input_is_named(X, Y, message):
    with pytest.raises((TypeError, ValueError), match=message):
        linear_cka(X, Y)


def test_the_unbiased_form_needs_four_rows():
    with pytest.raises(ValueError, match="expected at least 4"):
        linear_cka(features(3, 2), features(3, 2), unbiased=True)
