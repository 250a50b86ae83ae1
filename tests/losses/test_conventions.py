"""What is built on `labelled` behaves as torch's own losses do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from workbench.losses import conventions, streaming
from workbench.losses.conventions import Loss, labelled


def nll(h, y):
    return -F.log_softmax(h, 1).gather(1, y[:, None])[:, 0]


def soft_nll(h, q):
    return -(q * F.log_softmax(h, 1)).sum(1)


def ours(logits, target, **options):
    return labelled(logits, target, nll, soft_nll, **options)


class NLL(Loss):
    function = staticmethod(ours)


def draw(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), g


@given(
    shape=st.sampled_from([(5, 3), (4, 6, 2), (2, 3, 4, 2), (7, 2)]),
    weighted=st.booleans(),
    ignore=st.booleans(),
    reduction=st.sampled_from(conventions.REDUCTIONS),
    seed=st.integers(0, 99),
)
def test_class_indices_follow_cross_entropy(shape, weighted, ignore, reduction, seed):
    logits, g = draw(shape, seed)
    y = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=g)
    if ignore:
        y[0] = -100
    weight = torch.rand(shape[1], generator=g) + 0.1 if weighted else None
    options = {"weight": weight, "reduction": reduction}
    torch.testing.assert_close(ours(logits, y, **options), F.cross_entropy(logits, y, **options))


@given(
    shape=st.sampled_from([(5, 3), (4, 6, 2), (7, 2)]),
    weighted=st.booleans(),
    reduction=st.sampled_from(conventions.REDUCTIONS),
)
def test_probabilities_follow_cross_entropy(shape, weighted, reduction):
    logits, g = draw(shape)
    q = torch.rand(shape, generator=g).softmax(1)
    weight = torch.rand(shape[1], generator=g) + 0.1 if weighted else None
    options = {"weight": weight, "reduction": reduction}
    found = ours(logits, q, **options)
    if reduction == "mean":  # torch divides by the number of rows, all of them
        rows = logits.numel() / shape[1]
        expected = F.cross_entropy(logits, q, weight=weight, reduction="sum") / rows
    else:
        expected = F.cross_entropy(logits, q, **options)
    torch.testing.assert_close(found, expected)


def test_one_row_without_an_axis_of_rows():
    logits, _ = draw((4,))
    y = torch.tensor(2)
    torch.testing.assert_close(ours(logits, y), F.cross_entropy(logits, y))
    assert ours(logits, y, reduction="none").shape == ()


def test_another_index_can_be_ignored_and_all_of_them():
    logits, _ = draw((4, 3))
    y = torch.tensor([0, 2, 2, 1])
    torch.testing.assert_close(
        ours(logits, y, ignore_index=2), F.cross_entropy(logits, y, ignore_index=2)
    )
    assert ours(logits, torch.full((4,), -100)).isnan()  # as torch: the mean of nothing
    assert ours(logits, torch.full((4,), -100), reduction="sum") == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(dtype):
    logits, g = draw((6, 4))
    y = torch.randint(0, 4, (6,), generator=g)
    half = (1e3 * logits).to(dtype).requires_grad_()
    found = ours(half, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.cross_entropy(half.float(), y))
    found.backward()
    assert half.grad.dtype == dtype and half.grad.isfinite().all()


def test_autocast_is_off_inside():
    logits, g = draw((6, 4))
    y = torch.randint(0, 4, (6,), generator=g)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(logits @ torch.eye(4), y)
    assert found.dtype == torch.float32


def test_gradients_flow_to_the_logits_twice():
    logits, g = draw((5, 3))
    y = torch.randint(0, 3, (5,), generator=g)
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: ours(h, y), logits)
    assert torch.autograd.gradgradcheck(lambda h: ours(h, y), logits)


def test_it_compiles_as_one_graph():
    logits, g = draw((6, 4))
    y = torch.randint(0, 4, (6,), generator=g)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, y), ours(logits, y))


def test_it_runs_under_vmap_and_grad():
    logits, g = draw((3, 6, 4))
    y = torch.randint(0, 4, (3, 6), generator=g)
    slopes = torch.func.vmap(torch.func.grad(ours))(logits, y)
    for i in range(3):
        torch.testing.assert_close(slopes[i], torch.func.grad(ours)(logits[i], y[i]))


def test_a_module_keeps_its_settings_and_its_state():
    weight = torch.tensor([1.0, 2.0, 3.0])
    loss = NLL(weight=weight, reduction="sum")
    logits, g = draw((6, 3))
    y = torch.randint(0, 3, (6,), generator=g)
    torch.testing.assert_close(
        loss(logits, y), F.cross_entropy(logits, y, weight=weight, reduction="sum")
    )
    other = NLL(weight=torch.ones(3))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.weight, weight)
    assert loss.double().weight.dtype == torch.float64
    assert "reduction='sum'" in repr(loss)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "logits"),
        ({"logits": [[0.0]]}, TypeError, "logits"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits"),
        ({"target": [0, 1]}, TypeError, "target"),
        ({"target": torch.tensor([0, 3])}, ValueError, "target: expected classes 0..2, got 3"),
        ({"target": torch.tensor([0, -1])}, ValueError, "got -1"),
        ({"target": torch.tensor([0])}, ValueError, "target: expected shape"),
        ({"target": torch.rand(2, 2)}, ValueError, "target: expected probabilities"),
        ({"weight": torch.ones(2)}, ValueError, "weight"),
        ({"reduction": "median"}, ValueError, "reduction"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    given_ = {"logits": torch.zeros(2, 3), "target": torch.tensor([0, 1]), **change}
    with pytest.raises(error, match=message):
        ours(given_.pop("logits"), given_.pop("target"), **given_)


def test_soft_labels_are_refused_where_they_mean_nothing():
    with pytest.raises(ValueError, match="soft labels have no meaning"):
        labelled(torch.zeros(2, 3), torch.full((2, 3), 1 / 3), nll)


def test_numbers_outside_a_range_are_refused():
    conventions.within(torch.tensor([0.0, 1.0]), 0, 1, "p")
    for wrong in (torch.tensor([0.5, 1.1]), torch.tensor([float("nan"), 0.5])):
        with pytest.raises(ValueError, match="p: expected numbers"):
            conventions.within(wrong, 0, 1, "p")


# --- large inputs, block by block -----------------------------------------------------------------


ROUNDING = 1e-12  # the second time a gradient is asked for, sums are taken in another order


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 12)
    monkeypatch.setattr(streaming, "LARGE", 1)


def plain_dice(h, y):
    p = h.softmax(1)
    return (p * p).sum(0), torch.zeros_like(h[0]).index_add(0, y, p.gather(1, y[:, None])[:, 0])


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 3.0, 0.5, 2.0])])
def test_blocks_give_the_same_values_and_gradients(small_blocks, weight):
    logits, g = draw((23, 4))
    y = torch.randint(0, 4, (23,), generator=g)
    y[3] = -100
    a, b = (logits.clone().requires_grad_() for _ in range(2))
    found, expected = ours(a, y, weight=weight), F.cross_entropy(b, y, weight=weight)
    torch.testing.assert_close(found, expected)
    found.backward(retain_graph=True)
    expected.backward()
    torch.testing.assert_close(a.grad, b.grad)
    found.backward()  # a second time, added to the first
    torch.testing.assert_close(a.grad, 2 * b.grad)


def test_blocks_allow_second_derivatives(small_blocks):
    logits, g = draw((7, 4))
    y = torch.randint(0, 4, (7,), generator=g)
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: ours(h, y), logits, nondet_tol=ROUNDING)
    assert torch.autograd.gradgradcheck(lambda h: ours(h, y), logits, nondet_tol=ROUNDING)

    def through_sums(h):
        squares, hits = streaming.sums(plain_dice, h, y)
        return (hits / (squares + 1)).sum()

    assert torch.autograd.gradcheck(through_sums, logits, nondet_tol=ROUNDING)
    assert torch.autograd.gradgradcheck(through_sums, logits, nondet_tol=ROUNDING)


def test_sums_add_up_over_blocks(small_blocks):
    logits, g = draw((23, 4))
    y = torch.randint(0, 4, (23,), generator=g)
    for found, expected in zip(
        streaming.sums(plain_dice, logits, y), plain_dice(logits, y), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_a_slope_in_closed_form_is_used_and_second_derivatives_still_work(small_blocks):
    logits, g = draw((23, 4))
    y = torch.randint(0, 4, (23,), generator=g)
    seen = []

    def slope(h, grads, c):
        seen.append(len(h))
        p = h.softmax(1)
        steep = 2 * p * grads[0]
        return streaming.through_softmax(p, steep.scatter_add(1, c[:, None], grads[1][c][:, None]))

    def score(h, **options):
        squares, hits = streaming.sums(plain_dice, h, y, **options)
        return (hits / (squares + 1)).sum()

    logits = logits.double().requires_grad_()
    (closed,) = torch.autograd.grad(score(logits, slope=slope), logits)
    (plain,) = torch.autograd.grad(score(logits), logits)
    assert seen == [3] * 7 + [2]
    torch.testing.assert_close(closed, plain)
    assert torch.autograd.gradgradcheck(lambda h: score(h, slope=slope), logits)


def test_targets_that_need_gradients_get_them(small_blocks):
    logits, g = draw((7, 4))
    q = torch.rand(7, 4, generator=g).softmax(1).requires_grad_()
    ours(logits, q).backward()
    torch.testing.assert_close(q.grad, -F.log_softmax(logits, 1) / 7)


def test_half_precision_in_blocks(small_blocks):
    logits, g = draw((23, 4))
    y = torch.randint(0, 4, (23,), generator=g)
    half = logits.bfloat16().requires_grad_()
    ours(half, y).backward()
    again = half.detach().float().requires_grad_()
    F.cross_entropy(again, y).backward()
    torch.testing.assert_close(half.grad.float(), again.grad, rtol=1e-2, atol=1e-3)
