"""Label noise has the stated rate, imbalance the stated ratio."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.losses import noise

Y = torch.arange(40_000) % 4


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 1.0])
def test_symmetric_noise_goes_to_all_other_classes_alike(rate):
    found = noise.symmetric(Y, 4, rate, 0)
    table = torch.zeros(4, 4).index_put((Y, found), torch.ones(()), accumulate=True) / 10_000
    expected = torch.full((4, 4), rate / 3).fill_diagonal_(1 - rate)
    torch.testing.assert_close(table, expected, atol=0.015, rtol=0)


def test_class_dependent_noise_goes_to_the_next_class():
    found = noise.class_dependent(Y, 4, 0.3, 0)
    wrong = found != Y
    assert ((found - Y) % 4)[wrong].unique().tolist() == [1]
    assert wrong.double().mean() == pytest.approx(0.3, abs=0.01)


def test_a_matrix_of_your_own():
    transition = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.0, 0.5]])
    found = noise.flip(torch.tensor([0, 1, 2] * 1000), transition, 0).view(-1, 3)
    assert (found[:, 0] == 1).all() and (found[:, 1] == 2).all()
    assert set(found[:, 2].tolist()) == {0, 2}


@given(ratio=st.floats(1, 100), k=st.integers(2, 6))
def test_class_sizes_fall_geometrically(ratio, k):
    y = torch.arange(600 * k) % k
    sizes = torch.bincount(y[noise.imbalanced(y, ratio, 0)])
    expected = [max(2, round(600 * ratio ** (-c / (k - 1)))) for c in range(k)]
    assert sizes.tolist() == expected


def test_the_larger_class_stays_whole_and_labels_need_not_be_contiguous():
    y = torch.tensor([7] * 10 + [2] * 100)
    rows = noise.imbalanced(y, 20, 0)
    assert (y[rows] == 2).sum() == 100 and (y[rows] == 7).sum() == 5
    assert torch.equal(rows, rows.sort().values)


def test_a_seed_repeats_and_a_generator_goes_on():
    assert torch.equal(noise.symmetric(Y, 4, 0.5, 3), noise.symmetric(Y, 4, 0.5, 3))
    source = torch.Generator().manual_seed(3)
    first, second = (noise.symmetric(Y, 4, 0.5, source) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise.symmetric(Y, 4, 1.2), "rate"),
        (lambda: noise.symmetric(Y, 1, 0.2), "classes"),
        (lambda: noise.symmetric(Y, 3, 0.2), "y: row"),
        (lambda: noise.flip(Y, torch.zeros(4, 3)), "transition: expected"),
        (lambda: noise.flip(Y, torch.zeros(4, 4)), "transition: expected probabilities"),
        (lambda: noise.imbalanced(Y, 0.5), "ratio"),
        (lambda: noise.imbalanced(torch.zeros(5, dtype=torch.long), 2), "y: holds 1 class"),
        (lambda: noise.imbalanced(torch.tensor([0, 0, 0, 1]), 2), "fewer than"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
