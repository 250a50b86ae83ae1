"""The Z-loss against its closed form, and the factored layer against autograd's dense steps."""

import json
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from scipy.stats import zscore
from torch.nn import functional as F

from tests.plots import js
from workbench.losses import figures_z_loss as figures
from workbench.losses.experiments import z_loss as study
from workbench.losses.spherical import FactoredOutput, squared_form, taylor_form, z_form
from workbench.losses.z_loss import (
    SphericalMSELoss,
    TaylorSoftmaxLoss,
    ZLoss,
    spherical_mse_loss,
    taylor_softmax_loss,
    z_loss,
    z_scores,
)
from workbench.plots import export

O = torch.tensor([[2.0, 0.5, -1.0, 0.0]], dtype=torch.float64)  # noqa: E741  (the paper's symbol)
Y = torch.tensor([0])
LOSSES = (z_loss, taylor_softmax_loss, spherical_mse_loss)
MODULES = (ZLoss, TaylorSoftmaxLoss, SphericalMSELoss)
FORMS = {
    "z": partial(z_form, a=0.7, b=3.0),
    "taylor": taylor_form,
    "squared": squared_form,
}


def draw(n, k, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, k, generator=generator, dtype=dtype)
    return logits, torch.randint(k, (n,), generator=generator)


def dense_loss(form, H, W, y):
    """The mean loss from all outputs."""
    o = H @ W.T
    return form(o.gather(1, y[:, None])[:, 0], o.sum(1), o.square().sum(1), len(W)).mean()


# --- the losses


@pytest.mark.parametrize(
    "a, b, expected", [(1, 1, 0.473658), (0.1, 10, 12.057873), (1, 2, 0.973386)]
)
def test_values_from_the_definition_blind_to_shift_and_scale(a, b, expected):
    for o in (O, 3 * O + 7):
        assert float(z_loss(o, Y, a=a, b=b)) == pytest.approx(expected, abs=5e-7)


def test_scores_are_those_of_scipy():
    o, y = draw(20, 9)
    np.testing.assert_allclose(z_scores(o), zscore(o.numpy(), axis=1))
    rows = np.log1p(np.exp(0.4 * (3 - zscore(o.numpy(), axis=1)[np.arange(20), y]))) / 0.4
    np.testing.assert_allclose(z_loss(o, y, a=0.4, b=3, reduction="none"), rows)


def test_rivals_are_their_formulas():
    o, y = draw(12, 7)
    terms = 1 + o + o**2 / 2
    expected = -torch.log(terms[range(12), y] / terms.sum(1))
    torch.testing.assert_close(taylor_softmax_loss(o, y, reduction="none"), expected)
    expected = (o - F.one_hot(y, 7)).square().sum(1)
    torch.testing.assert_close(spherical_mse_loss(o, y, reduction="none"), expected)


def test_to_second_order_the_taylor_softmax_is_the_softmax():
    o, y = draw(5, 6)
    gap = {}
    for scale in (1e-1, 1e-2):
        ours = taylor_softmax_loss(scale * o, y, reduction="none").numpy()
        gap[scale] = np.abs(ours + log_softmax(scale * o, axis=1)[range(5), y]).max()
    assert gap[1e-2] < 2e-3 * gap[1e-1] and gap[1e-1] < 1e-2


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(0, 100), st.floats(0.05, 20), st.floats(0.1, 30))
def test_gradient_has_no_part_along_shift_or_scale(k, seed, a, b):
    o, y = draw(3, k, seed)
    o.requires_grad_()
    (grad,) = torch.autograd.grad(z_loss(o, y, a=a, b=b, reduction="sum"), o)
    size = 1 / o.detach().std(1, correction=0)  # of the slope of z
    assert (grad.sum(1).abs() < 1e-11 * size).all()
    assert ((grad * o).sum(1).abs() < 1e-10 * size).all()


def test_no_score_exceeds_the_root_of_the_number_of_classes_less_one():
    for k in (2, 5, 100):
        top = z_scores(F.one_hot(torch.tensor([0]), k).double())[0, 0]
        assert float(top) == pytest.approx(math.sqrt(k - 1))
        assert (z_scores(draw(50, k)[0]) <= top + 1e-12).all()


def test_limits_in_a_are_a_hinge_and_a_straight_line():
    o, y = draw(30, 11)
    z = z_scores(o).gather(1, y[:, None])[:, 0]
    hinge = (1.5 - z).clamp(min=0)
    torch.testing.assert_close(
        z_loss(o, y, a=1e4, b=1.5, reduction="none"), hinge, atol=1e-4, rtol=0
    )
    a, line = 1e-4, (1.5 - z) / 2
    rows = z_loss(o, y, a=a, b=1.5, reduction="none") - math.log(2) / a
    torch.testing.assert_close(rows, line, atol=1e-3, rtol=0)


def test_a_row_of_equal_outputs_has_a_value_and_no_gradient():
    for value in (0.0, 0.1, -3e4):
        o = torch.full((2, 7), value, requires_grad=True)
        loss = z_loss(o, torch.tensor([0, 3]), a=0.5, b=2)
        assert loss.item() == pytest.approx(math.log1p(math.e) / 0.5)
        (grad,) = torch.autograd.grad(loss, o)
        assert (grad == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_first_and_second_order(loss):
    o, y = draw(4, 6)
    o.requires_grad_()
    assert torch.autograd.gradcheck(lambda o: loss(o, y), o)
    assert torch.autograd.gradgradcheck(lambda o: loss(o, y), o)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_hot_probabilities_are_the_label_and_mixtures_the_mean(loss):
    o, y = draw(6, 5)
    rows = torch.stack([loss(o, torch.full((6,), k), reduction="none") for k in range(5)], 1)
    torch.testing.assert_close(loss(o, F.one_hot(y, 5).double(), reduction="none"),
                               rows.gather(1, y[:, None])[:, 0])  # fmt: skip
    q = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(loss(o, q, reduction="none"), (q * rows).sum(1))


@pytest.mark.parametrize("loss, module", list(zip(LOSSES, MODULES, strict=True)))
def test_modules_follow_torch(loss, module):
    o, y = draw(6, 5)
    weight = torch.rand(5, dtype=torch.float64) + 0.5
    y[1] = -100
    made = module(weight=weight)
    rows = loss(o, y, reduction="none", weight=weight)
    expected = rows.sum() / weight[y[y >= 0]].sum()
    torch.testing.assert_close(made(o, y), expected)
    torch.testing.assert_close(
        made(o[..., None].expand(6, 5, 2), y[:, None].expand(6, 2)), expected
    )
    again = module(weight=torch.ones(5, dtype=torch.float64))
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(again(o, y), expected)
    assert rows[1] == 0 and "reduction='mean'" in repr(made)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_and_large_outputs_stay_finite(loss, dtype):
    o, y = draw(4, 30, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss(o.to(dtype), y)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(o.to(dtype).float(), y))
    o = (1e4 * o.sign()).to(dtype).requires_grad_()
    value = loss(o, y)
    value.backward()
    assert value.isfinite() and o.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_in_one_graph(loss):
    o, y = draw(5, 8)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(o, y), loss(o, y))


# --- the factored layer


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("n", [1, 5, 16])  # one row, a Woodbury solve, more rows than features
def test_factored_steps_are_the_dense_steps_of_autograd(name, n):
    form, generator = FORMS[name], torch.Generator().manual_seed(n)
    W = 0.3 * torch.randn(40, 9, generator=generator, dtype=torch.float64)
    layer = FactoredOutput.from_weight(W, loss=form)
    for _ in range(25):
        H = torch.randn(n, 9, generator=generator, dtype=torch.float64).requires_grad_()
        y = torch.randint(40, (n,), generator=generator)  # with 16 rows some classes repeat
        W.requires_grad_()
        expected = dense_loss(form, H, W, y)
        expected.backward()
        loss, grad = layer.step(H, y, lr=0.05)
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grad, H.grad, atol=1e-9, rtol=1e-7)
        W = (W - 0.05 * W.grad).detach()
    torch.testing.assert_close(layer.weight(), W, atol=1e-8, rtol=0)
    torch.testing.assert_close(layer.Q, W.T @ W, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(layer.w_bar, W.sum(0), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(layer.U @ layer.U_inv, torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(layer.logits(H), H.detach() @ W.T, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", FORMS)
def test_values_from_moments_are_those_from_outputs(name):
    o, y = draw(6, 20)
    loss = {"z": partial(z_loss, a=0.7, b=3.0), "taylor": taylor_softmax_loss,
            "squared": spherical_mse_loss}[name]  # fmt: skip
    moments = o.gather(1, y[:, None])[:, 0], o.sum(1), o.square().sum(1), 20
    torch.testing.assert_close(FORMS[name](*moments), loss(o, y, reduction="none"))


def test_only_rows_of_the_batch_are_written():
    layer = FactoredOutput(1000, 8, generator=torch.Generator().manual_seed(0))
    before = layer.V.clone()
    layer.step(torch.randn(3, 8), torch.tensor([5, 7, 5]), lr=0.5)
    changed = (before != layer.V).any(1).nonzero()[:, 0]
    assert layer.folds == 0 and changed.tolist() == [5, 7]
    assert (layer.weight() != before).any(1).all()  # while every row of W has moved


def test_the_z_loss_keeps_the_sum_of_the_weights_and_never_shrinks_their_norm():
    layer = FactoredOutput(60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start, norms = layer.w_bar.clone(), [float(layer.Q.trace())]
    for i in range(30):
        h, y = draw(4, 8, i)
        layer.step(h, y, lr=0.5)
        norms.append(float(layer.Q.trace()))
    torch.testing.assert_close(layer.w_bar, start)
    assert (np.diff(norms) > 0).all()


def test_float32_rows_stay_near_the_float64_layer_through_folds():
    wide = FactoredOutput(200, 8, loss=squared_form, dtype=torch.float64)
    narrow = FactoredOutput.from_weight(wide.V.float(), loss=squared_form)
    wide = FactoredOutput.from_weight(narrow.V.double(), loss=squared_form)
    for i in range(300):
        h, y = draw(4, 8, i)
        y = y * 25
        wide.step(h, y, lr=0.02)
        narrow.step(h.float(), y, lr=0.02)
    assert narrow.folds > wide.folds
    torch.testing.assert_close(narrow.weight().double(), wide.weight(), atol=2e-5, rtol=0)
    torch.testing.assert_close(narrow.Q, narrow.weight().double().T @ narrow.weight().double(),
                               atol=1e-4, rtol=1e-4)  # fmt: skip


def test_a_step_that_makes_the_factor_singular_is_still_exact():
    W, h = draw(30, 4)[0], torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    layer = FactoredOutput.from_weight(W, loss=squared_form)
    y = torch.tensor([3])
    W.requires_grad_()
    dense_loss(squared_form, h, W, y).backward()
    layer.step(h, y, lr=0.5)  # I - 2 lr h'h has a zero eigenvalue
    assert layer.folds == 1
    torch.testing.assert_close(layer.weight(), W.detach() - 0.5 * W.grad)


def test_as_the_last_layer_of_a_network():
    """Gradients reach the body, several batches add up, evaluation leaves no trace."""
    body = torch.nn.Linear(6, 5)
    layer = FactoredOutput(20, 5, dtype=torch.float64)
    W = layer.weight().requires_grad_()
    x, y = draw(8, 6, dtype=torch.float32)[0], torch.arange(8)
    dense = dense_loss(z_form, body(x).double(), W, y)
    dense.backward()
    expected = body.weight.grad.clone()
    body.zero_grad()
    for rows in (slice(0, 3), slice(3, 8)):
        (layer(body(x[rows]), y[rows], reduction="sum") / 8).backward()
    torch.testing.assert_close(body.weight.grad, expected)
    layer.eval()(body(x), y).backward()
    layer.train().update(lr=0.3)
    torch.testing.assert_close(layer.weight(), W.detach() - 0.3 * W.grad)
    with pytest.raises(RuntimeError, match="no gradient"):
        layer.update(lr=0.3)


def test_scaling_refactoring_and_saving_keep_the_weights():
    layer = FactoredOutput(50, 6, dtype=torch.float64)
    for i in range(5):
        h, y = draw(4, 6, i)
        layer.step(h, y, lr=0.4)
    W, Q = layer.weight(), layer.Q.clone()
    layer.refactor()
    torch.testing.assert_close(layer.weight(), W)
    torch.testing.assert_close(layer.Q, Q)
    torch.testing.assert_close(layer.U, torch.eye(6, dtype=torch.float64))
    layer.scale_(0.5)
    torch.testing.assert_close(layer.weight(), W / 2)
    layer.scale_(1e-6)  # beyond the stretch: taken into V
    torch.testing.assert_close(layer.weight(), W / 2e6)
    torch.testing.assert_close(layer.Q, Q / 4e12)
    other = FactoredOutput(50, 6, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    h, y = draw(4, 6, 9)
    torch.testing.assert_close(other.step(h, y, 0.1)[1], layer.step(h, y, 0.1)[1])
    torch.testing.assert_close(other.weight(), layer.weight())


def test_a_batch_of_an_older_layer_is_refused():
    layer = FactoredOutput(10, 4)
    h = torch.randn(2, 4, requires_grad=True)
    late = layer(h, torch.tensor([1, 2]))
    layer(h, torch.tensor([1, 2])).backward()
    layer.update(0.1)
    with pytest.raises(RuntimeError, match="updated since"):
        late.backward()


LAYER = FactoredOutput(10, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: z_loss(O, Y, a=0), ValueError, "a: expected"),
        (lambda: z_loss(O, Y, b=-1), ValueError, "b: expected"),
        (lambda: ZLoss(a=math.nan), ValueError, "a: expected"),
        (lambda: z_loss(O, torch.tensor([4])), ValueError, "target: expected classes"),
        (lambda: z_loss(O.long(), Y), TypeError, "logits: expected floating"),
        (lambda: FactoredOutput(1, 4), ValueError, "classes"),
        (lambda: FactoredOutput(10, 4, stretch=0.5), ValueError, "stretch"),
        (lambda: FactoredOutput(10, 4, dtype=torch.float16), ValueError, "dtype"),
        (lambda: FactoredOutput.from_weight(torch.ones(3)), ValueError, "weight"),
        (lambda: LAYER(torch.ones(2, 3), torch.tensor([0, 1])), ValueError, "h and y"),
        (lambda: LAYER(torch.ones(2, 4), torch.tensor([0])), ValueError, "h and y"),
        (lambda: LAYER(torch.full((1, 4), math.nan), Y), ValueError, "h: row 0"),
        (lambda: LAYER(torch.ones(1, 4), torch.tensor([10])), ValueError, "y: expected"),
        (lambda: LAYER(torch.ones(1, 4), torch.tensor([0.0])), TypeError, "y: expected"),
        (lambda: LAYER.step(torch.ones(1, 4), Y, lr=0), ValueError, "lr"),
        (lambda: LAYER.scale_(-1), ValueError, "factor"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- experiments


def test_every_seed_has_the_same_test_words_and_deals_the_rest():
    tokens = torch.arange(30_000)
    one, two = (study.deal(seed, tokens, 3) for seed in (0, 1))
    assert (one["test"] == two["test"]).all()
    assert set(one["validation"][:, -1].tolist()) != set(two["validation"][:, -1].tolist())
    for part in (one, two):
        ends = [set(part[name][:, -1].tolist()) for name in ("train", "validation", "test")]
        assert sum(map(len, ends)) == len(set.union(*ends)) == len(tokens) - 3
    half = study.deal(0, tokens, 3, share=0.5)
    assert 0.45 < len(half["train"]) / len(one["train"]) < 0.55
    assert (half["validation"] == one["validation"]).all()


def test_rank_counts_ties_against_the_word():
    class Fixed(torch.nn.Module):
        def logits(self, h):
            return h

    outputs = torch.zeros(2, 60)
    outputs[0, :4] = torch.tensor([4.0, 3, 2, 2])
    windows = torch.tensor([[0, 2], [1, 5]])
    found = study.top_k(lambda seen: outputs[seen[:, 0]], Fixed(), windows)
    assert found == {"top1": 0, "top5": 50, "top10": 50, "top20": 50, "top50": 50}


def test_a_tuned_comparison_at_a_tenth_of_its_size():
    sizes = {"features": 8, "epochs": 1, "share": 0.02, "vocabulary": 300}
    rows = [{"loss": name, "setting": i, **study.tune(0, loss=name, setting=i, **sizes)}
            for name in study.SETTINGS for i in (1, 3)]  # fmt: skip
    frame = pd.DataFrame(rows)
    chosen = study.best(frame)
    assert set(chosen) == set(study.SETTINGS) and set(chosen.values()) <= {1, 3}
    for name, i in chosen.items():
        mine = frame[frame.loss == name].set_index("setting").top10
        assert mine[i] == mine.max()
    row = study.compare(0, settings=chosen, **sizes)
    assert len(row) == 30 and row["top1_z"] <= row["top50_z"] <= 100
    assert len({len(s) for s in study.SETTINGS.values()}) == 1  # the same number of settings


def test_times_are_measured_for_three_ways():
    row = study.update_time(0, classes=1000, features=16, batch=4, repeat=1)
    assert set(row) == {"z", "fold", "adaptive", "softmax"} and min(row.values()) > 0


@pytest.mark.parametrize("own", [True, False])
def test_the_exported_formula_is_the_loss(own):
    logits, target = draw(40, 30, seed=3, dtype=torch.float32)
    explorer = figures.explore_z_loss(logits, target, b=4) if own else figures.explore_z_loss()
    assert js.check_formula(explorer, rtol=1e-6) >= 16
    result = explorer.result()
    assert explorer.seconds < 0.05
    assert len(json.dumps(export.payload(explorer, explorer.state))) < 40_000
    if own:
        assert result["mean"] == pytest.approx(float(z_loss(logits, target, b=4)), abs=1e-4)
        order = logits.argsort(1, descending=True)
        assert (result["rank"] == (order == target[:, None]).nonzero()[:, 1].numpy() + 1).all()


def test_the_explorer_wants_outputs_and_targets_together():
    with pytest.raises(ValueError, match="both or neither"):
        figures.explore_z_loss(O)
