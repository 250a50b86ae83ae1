"""Dice losses against monai, scikit-learn, explicit loops and the values of the formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_recall_curve
from torch.nn import functional as F

from tests.plots import js
from workbench.losses import figures_dice_loss as figures
from workbench.losses import streaming
from workbench.losses.dice_loss import (
    BatchDice,
    DiceLoss,
    DSCLoss,
    TverskyLoss,
    batch_dice,
    dice_loss,
    dsc_loss,
    softmax_dice,
    softmax_dsc,
    softmax_tversky,
    tversky_loss,
)
from workbench.losses.experiments import dice_loss as study
from workbench.losses.experiments import tagging

P, Y = torch.tensor([0.9, 0.2, 0.6, 0.1]), torch.tensor([1, 0, 1, 0])
FOUR = tagging.Tokens(np.zeros((4, 3)), np.array([0, 1, 0, 2]))
OF_ROWS = (softmax_dice, softmax_tversky, softmax_dsc)
SETS = (
    {},
    {"alpha": 1.0},
    {"alpha": 0.3, "squared": True, "smooth": 1.0},
    {"ohem_ratio": 1.5},
    {"ohem_ratio": 0.7, "squared": True, "alpha": 0.5},
)


def problem(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    *sets, n, k = shape
    logits = 2 * torch.randn(*shape, generator=g, dtype=dtype)
    return logits, torch.randint(k, (*sets, n), generator=g)


def looped(logits, y, *, smooth=1e-4, alpha=0.0, ohem_ratio=0.0, squared=False):
    """Class by class and row by row, in Python's own numbers."""
    losses = []
    for k in range(logits.shape[1]):
        rows = [(float(q), int(c) == k) for q, c in zip(logits.softmax(1)[:, k], y, strict=True)]
        own, others = [q for q, is_k in rows if is_k], [q for q, is_k in rows if not is_k]
        if ohem_ratio:
            others = sorted(others, reverse=True)[: int(ohem_ratio * len(own))]
        power = 2 if squared else 1
        both = sum((1 - q) ** alpha * q for q in own)
        predicted = sum(((1 - q) ** alpha * q) ** power for q in own + others)
        losses.append(1 - (2 * both + smooth) / (predicted + len(own) + smooth))
    return losses


# --- values


def test_values_of_four_examples():
    assert dice_loss(P, Y).item() == pytest.approx(0.029929, abs=1e-6)
    assert tversky_loss(P, Y).item() == pytest.approx(0.068820, abs=1e-6)
    assert dsc_loss(P, Y).item() == pytest.approx(0.248799, abs=1e-6)
    column = P.logit()[:, None]
    assert batch_dice(column, Y).item() == pytest.approx(0.210521, abs=1e-6)
    assert batch_dice(column, Y, alpha=1.0).item() == pytest.approx(0.744157, abs=1e-6)


def test_each_example_is_its_fraction():
    p, y, g = 0.3, 1.0, 0.5
    at = torch.tensor([p], dtype=torch.float64), torch.tensor([y])
    assert dice_loss(*at, gamma=g).item() == pytest.approx(1 - (2 * p + g) / (p * p + 1 + g))
    plain = dice_loss(*at, gamma=g, squared=False)
    assert plain.item() == pytest.approx(1 - (2 * p + g) / (p + 1 + g))
    tversky = 1 - (p + g) / (p + 0.7 * (1 - p) + g)
    assert tversky_loss(*at, 0.2, 0.7, gamma=g).item() == pytest.approx(tversky)
    w = (1 - p) ** 2
    assert dsc_loss(*at, 2, g).item() == pytest.approx(1 - (2 * w * p + g) / (w * p + 1 + g))
    assert dsc_loss(P, Y, reduce="none").shape == (4,)
    assert dsc_loss(P, Y, reduction="sum") == pytest.approx(4 * dsc_loss(P, Y).item())


@pytest.mark.parametrize("options", SETS)
def test_a_set_is_a_loop_over_classes_and_rows(options):
    logits, y = problem(40, 5)
    y[y == 3] = 2  # a class without rows
    expected = torch.tensor(looped(logits, y, **options), dtype=torch.float64)
    torch.testing.assert_close(batch_dice(logits, y, reduction="none", **options), expected)
    assert batch_dice(logits, y, **options).item() == pytest.approx(float(expected.sum()))


def test_of_hard_predictions_a_set_is_one_minus_f1_of_each_class():
    logits, y = problem(200, 4)
    hard = 1e4 * F.one_hot(logits.argmax(1), 4)
    f1 = f1_score(y, logits.argmax(1), average=None)
    found = batch_dice(hard.double(), y, smooth=0, reduction="none")
    np.testing.assert_allclose(found, 1 - f1, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 7, 2), (3, 11, 5), (2, 30, 9)])
@pytest.mark.parametrize("squared", [False, True])
def test_monai_agrees_on_sets(shape, squared):
    from monai.losses import DiceLoss as MonaiDice

    logits, y = problem(*shape, seed=shape[1], dtype=torch.float32)
    peer = MonaiDice(softmax=True, to_onehot_y=True, squared_pred=squared, reduction="none",
                     smooth_nr=1e-4, smooth_dr=1e-4)  # fmt: skip
    expected = peer(logits.movedim(-1, 1), y[:, None])[..., 0]
    found = batch_dice(logits, y, squared=squared, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("alpha, beta, gamma", [(0.5, 0.5, 1.0), (0.2, 0.9, 0.3)])
def test_monai_agrees_on_tversky_of_examples(alpha, beta, gamma):
    from monai.losses import TverskyLoss as MonaiTversky

    p, y = torch.rand(50, generator=torch.manual_seed(1)), torch.arange(50) % 2
    peer = MonaiTversky(alpha=alpha, beta=beta, smooth_nr=gamma, smooth_dr=gamma, reduction="none")
    expected = peer(p.view(-1, 1, 1), y.view(-1, 1, 1).float()).flatten()
    found = tversky_loss(p, y, alpha, beta, gamma=gamma, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --- the formulas among each other


unit = st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(unit, st.sampled_from([0.0, 1.0]), st.floats(0.05, 3), st.floats(0, 3))
def test_losses_lie_in_the_unit_interval_and_meet_at_their_limits(p, y, gamma, alpha):
    p, y = torch.tensor([p], dtype=torch.float64), torch.tensor([y])
    plain = dice_loss(p, y, gamma=gamma, squared=False)
    for value in (dice_loss(p, y, gamma=gamma), dsc_loss(p, y, alpha, gamma), plain):
        assert -1e-12 <= value.item() <= 1
    torch.testing.assert_close(dsc_loss(p, y, 0, gamma), plain)
    torch.testing.assert_close(tversky_loss(p, y, gamma=gamma / 2), plain)


@pytest.mark.parametrize("alpha", [0.01, 0.5, 1.0, 2.0])
def test_as_printed_dsc_turns_at_one_over_one_plus_alpha(alpha):
    p = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64, requires_grad=True)
    turn = 1 / (1 + alpha)
    for y, sign in ((1, -1), (0, 1)):
        slope = torch.autograd.grad(dsc_loss(p, torch.tensor(y), alpha, reduction="sum"), p)[0]
        clear = (p - turn).abs() > 1e-3
        assert ((slope * sign > 0) == (p < turn))[clear].all()
    positive = dsc_loss(torch.tensor([0.0, 1.0]), torch.tensor(1), alpha, reduction="none")
    negative = dsc_loss(torch.tensor([0.0, 1.0]), torch.tensor(0), alpha, reduction="none")
    assert positive[0] == positive[1] > 0 and negative[0] == negative[1] == 0


def test_with_the_weight_detached_every_step_goes_towards_the_label():
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    for y, sign in ((1, -1), (0, 1)):
        loss = dsc_loss(p, torch.tensor(y), detach_weight=True, reduction="none")
        torch.testing.assert_close(loss, dsc_loss(p, torch.tensor(y), reduction="none"))
        assert (sign * torch.autograd.grad(loss.sum(), p)[0] > 0).all()


@pytest.mark.parametrize("fn, each", [
    (softmax_dice, lambda p, y: dice_loss(p, y, reduction="none")),
    (softmax_tversky, lambda p, y: tversky_loss(p, y, reduction="none")),
    (softmax_dsc, lambda p, y: dsc_loss(p, y, reduction="none")),
])  # fmt: skip
def test_of_logits_is_every_class_against_the_rest(fn, each):
    logits, y = problem(30, 4)
    hot = F.one_hot(y, 4).double()
    expected = each(logits.softmax(1), hot).sum(1)
    torch.testing.assert_close(fn(logits, y, reduction="none"), expected)
    torch.testing.assert_close(fn(logits, hot, reduction="none"), expected)  # soft labels
    mixed = fn(logits, 0.3 * hot + 0.7 * hot.roll(1, 1), reduction="none")
    other = fn(logits, (y + 1) % 4, reduction="none")
    torch.testing.assert_close(mixed, 0.3 * expected + 0.7 * other)
    weight, ignored = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), y.clone()
    ignored[:7] = -100
    w = weight[y[7:]]
    torch.testing.assert_close(
        fn(logits, ignored, weight=weight), (w * expected[7:]).sum() / w.sum()
    )
    images = logits.view(5, 6, 4).movedim(-1, 1)
    torch.testing.assert_close(fn(images, y.view(5, 6)), expected.mean())


# --- sets


@pytest.mark.parametrize("options", SETS)
def test_leading_dimensions_are_independent_sets(options):
    logits, y = problem(2, 3, 20, 4)
    found = batch_dice(logits, y, **options)
    assert found.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(found[i, j], batch_dice(logits[i, j], y[i, j], **options))


@pytest.mark.parametrize("options", SETS)
@pytest.mark.parametrize("classes", [1, 4])
def test_rows_that_do_not_count_might_as_well_be_missing(options, classes):
    logits, y = problem(30, 4)
    logits, y = logits[:, :classes], y % max(2, classes)
    ignored = torch.where(torch.arange(30) % 3 == 0, -1, y)
    kept = ignored >= 0
    found = batch_dice(logits, ignored, ignore_index=-1, **options)
    torch.testing.assert_close(found, batch_dice(logits[kept], y[kept], **options))


def test_soft_labels_weights_and_reductions_of_a_set():
    logits, y = problem(25, 3)
    hot = F.one_hot(y, 3).double()
    for options in SETS[:3]:
        torch.testing.assert_close(
            batch_dice(logits, hot, **options), batch_dice(logits, y, **options)
        )
    each = batch_dice(logits, y, reduction="none")
    weight = torch.tensor([0.0, 1.0, 3.0]).double()
    torch.testing.assert_close(batch_dice(logits, y, weight=weight), (weight * each).sum())
    mean = batch_dice(logits, y, weight=weight, reduction="mean")
    torch.testing.assert_close(mean, (weight * each).sum() / 4)
    two = torch.stack([torch.zeros(25), logits[:, 0]], 1)
    one = batch_dice(logits[:, :1], (y > 0).long())  # a sigmoid is the second of two classes
    torch.testing.assert_close(one, batch_dice(two, (y > 0).long(), reduction="none")[1])


def test_a_class_without_rows_costs_one_but_nothing_with_hard_negatives():
    logits, _ = problem(25, 3)
    y = torch.zeros(25, dtype=torch.long)
    assert batch_dice(logits, y, reduction="none")[1:].min() > 0.99
    assert batch_dice(logits, y, ohem_ratio=1.0, reduction="none")[1:].tolist() == [0, 0]


@pytest.mark.parametrize("options", [*SETS[:3], {"soft": True}])
def test_blocks_of_rows_add_up_to_the_whole(monkeypatch, options):
    logits, y = problem(300, 6, dtype=torch.float32)
    y[::7] = -100
    options = dict(options)
    if options.pop("soft", False):
        y = torch.rand(300, 6).softmax(1)
    at = logits.clone().requires_grad_()
    whole = batch_dice(at, y, **options)
    (slope,) = torch.autograd.grad(whole, at)
    monkeypatch.setattr(streaming, "LARGE", 1)
    monkeypatch.setattr(streaming, "BLOCK", 6 * 32)
    cut = batch_dice(at, y, **options)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(cut, at)[0], slope, rtol=1e-4, atol=1e-7)


# --- gradients, precision, torch's conventions


@pytest.mark.parametrize("options", SETS)
def test_gradients_of_sets(options):
    logits, y = problem(7, 3)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: batch_dice(h, y, **options), logits)
    assert torch.autograd.gradgradcheck(lambda h: batch_dice(h, y, **options), logits)


@pytest.mark.parametrize("fn", OF_ROWS)
def test_gradients_of_rows(fn):
    logits, y = problem(6, 3)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: fn(h, y), logits)
    assert torch.autograd.gradgradcheck(lambda h: fn(h, y), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fn", [*OF_ROWS, batch_dice])
def test_half_precision_is_computed_in_single(fn, dtype):
    logits, y = problem(20, 5, dtype=torch.float32)
    low = logits.to(dtype).requires_grad_()
    found = fn(low, y)
    assert found.dtype == torch.float32 and torch.autograd.grad(found, low)[0].dtype == dtype
    torch.testing.assert_close(found, fn(low.float(), y))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fn(logits, y), fn(logits, y).float())
        assert fn(logits, y).dtype == torch.float32
        torch.testing.assert_close(fn(low, y), found)
    assert dsc_loss(P.to(dtype), Y).dtype == torch.float32


@pytest.mark.parametrize("alpha", [0.0, 0.01, 1.0, 2.0])
def test_sure_logits_have_finite_losses_and_slopes(alpha):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    for y in (torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2])):
        for value in (batch_dice(logits, y, alpha=alpha), softmax_dsc(logits, y, alpha=alpha)):
            assert value.isfinite() and torch.autograd.grad(value, logits)[0].isfinite().all()


def test_the_weight_of_sure_rows_is_not_lost_in_rounding():
    gap = torch.tensor([5.0, 20.0, 40.0, 300.0])  # from 17 on, p is 1 in single precision
    s = (0.01 * F.logsigmoid(-gap.double())).exp() * gap.double().sigmoid()
    expected = 1 - (2 * s.sum() + 1) / (s.sum() + 4 + 1)
    ones = torch.ones(4, dtype=torch.long)
    column = batch_dice(gap[:, None], ones, smooth=1.0, alpha=0.01)
    assert column.item() == pytest.approx(expected.item(), rel=1e-5)
    two = torch.stack([torch.zeros(4), gap], 1)
    second = batch_dice(two, ones, smooth=1.0, alpha=0.01, reduction="none")[1]
    assert second.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("module", [
    DiceLoss(gamma=0.5, squared=False), TverskyLoss(alpha=0.2), DSCLoss(detach_weight=True),
    BatchDice(alpha=0.01, smooth=1.0, squared=True), BatchDice(ohem_ratio=0.5),
])  # fmt: skip
def test_modules_are_the_functions_and_compile_to_one_graph(module):
    logits, y = problem(20, 4, dtype=torch.float32)
    settings = {name: getattr(module, name) for name in module.hyper}
    expected = type(module).function(logits, y, reduction=module.reduction, **settings)
    torch.testing.assert_close(module(logits, y), expected)
    torch.testing.assert_close(
        torch.compile(module, fullgraph=True, backend="eager")(logits, y), expected
    )


def test_state_dicts_carry_the_class_weights():
    first = BatchDice(weight=torch.tensor([0.0, 1.0, 1.0]), reduction="mean")
    second = BatchDice(weight=torch.ones(3))
    second.load_state_dict(first.state_dict())
    assert second.weight.tolist() == [0, 1, 1] and "alpha=0.0" in repr(second)


def test_members_of_a_vmap_have_their_own_loss():
    logits, y = problem(4, 10, 3)
    found = torch.vmap(batch_dice)(logits, y)
    torch.testing.assert_close(found, batch_dice(logits, y))
    rows = torch.vmap(softmax_dsc)(logits, y)
    torch.testing.assert_close(rows[2], softmax_dsc(logits[2], y[2]))


@pytest.mark.parametrize("call, error, message", [
    (lambda: dice_loss(P + 1, Y), ValueError, "p: expected numbers"),
    (lambda: dice_loss(P, -Y), ValueError, "y: expected numbers"),
    (lambda: dice_loss(P * math.nan, Y), ValueError, "p: expected numbers"),
    (lambda: dice_loss(Y, Y), TypeError, "p: expected floating"),
    (lambda: dice_loss(P, Y, gamma=-1), ValueError, "gamma"),
    (lambda: tversky_loss(P, Y, beta=-1), ValueError, "beta"),
    (lambda: dsc_loss(P, Y, -1), ValueError, "alpha"),
    (lambda: dsc_loss(P, Y, reduction="max"), ValueError, "reduction"),
    (lambda: softmax_dice(P[:, None], Y), ValueError, "logits: expected two"),
    (lambda: batch_dice(P, Y), ValueError, "logits: expected"),
    (lambda: batch_dice([[1.0]], Y), TypeError, "logits"),
    (lambda: batch_dice(torch.ones(4, 3), Y[:3]), ValueError, "y: expected shape"),
    (lambda: batch_dice(torch.ones(4, 2), Y + 1), ValueError, "y: expected classes"),
    (lambda: batch_dice(torch.ones(4, 3), torch.ones(4, 2)), ValueError, "y: expected prob"),
    (lambda: batch_dice(torch.ones(4, 3), 2 * torch.ones(4, 3)), ValueError, "y: expected numbers"),
    (lambda: batch_dice(torch.ones(4, 3), [0, 1, 2, 0]), TypeError, "y: expected a tensor"),
    (lambda: batch_dice(torch.ones(4, 3), torch.ones(4, 3), ohem_ratio=1), ValueError, "ohem"),
    (lambda: batch_dice(torch.ones(4, 3), Y, weight=torch.ones(2)), ValueError, "weight"),
    (lambda: batch_dice(torch.ones(4, 3), Y, smooth=-1), ValueError, "smooth"),
    (lambda: batch_dice(torch.ones(0, 3), Y[:0]), ValueError, "not empty"),
    (lambda: tagging.with_share(FOUR, 4, 0.9, 0), ValueError, "size"),
    (lambda: figures.explore_dice(P, Y[:2]), ValueError, "p and y"),
])  # fmt: skip
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- tagging, experiments, explorer


def test_names_that_source_code_defines_are_tagged_and_their_keywords_left_out():
    source = "class _FooBar(X):\n    def a_1(self):  # def x\n        'class y'; f\"def\"\n"
    tokens = tagging.tagged(source)
    entity = [(text, tagging.TAGS[tag]) for text, tag in tokens if tag]
    assert entity == [
        ("_", "B-class"), ("Foo", "I-class"), ("Bar", "I-class"),
        ("a", "B-def"), ("_", "I-def"), ("1", "I-def"),
    ]  # fmt: skip
    words = [text for text, _ in tokens]
    assert words == ["_", "Foo", "Bar", "(", "X", ")", ":", "\n", "a", "_", "1", "(", "self", ")",
                     ":", "#", "\n", '""', ";", '""', "\n"]  # fmt: skip


def test_spans_end_where_a_tag_does_not_continue_them():
    tags = np.array([2, 2, 0, 1, 1, 2, 4, 4, 3, 4, 0, 0, 1])
    assert tagging.spans(tags).tolist() == [
        [0, 2, 1], [3, 4, 1], [4, 6, 1], [6, 8, 2], [8, 10, 2], [12, 13, 1],
    ]  # fmt: skip
    guess = tags.copy()
    guess[1], guess[12] = 0, 3  # one span too short, one of the wrong kind
    assert tagging.span_f1(tags, guess) == pytest.approx(4 / 6)
    assert tagging.span_f1(tags, 0 * tags) == 0 and tagging.span_f1(tags, tags) == 1
    assert tagging.token_f1(tags, guess) == pytest.approx(2 * 8 / (10 + 9))


def test_precision_at_a_recall_is_that_of_scikit_learns_curve():
    rng = np.random.default_rng(0)
    gold, score = rng.integers(0, 2, 300), rng.random(300)
    precision, recall, _ = precision_recall_curve(gold, score)
    levels = np.array([0.0, 0.11, 0.5, 1.0])
    expected = [precision[:-1][recall[:-1] >= max(r, 1e-9)].max() for r in levels]
    np.testing.assert_allclose(tagging.precision_at(gold, score, levels), expected)


def test_parts_of_a_corpus_share_no_definition_and_a_share_is_met():
    text = tagging.corpus(0, train=4000, held=1500, half=2, words=100)
    assert text.train.windows.shape == (4000, 5) and len(text.test.tags) == 1500
    assert len(text.vocabulary) == 100 and text.train.windows.max() == 99
    np.testing.assert_array_equal(text.train.windows[1:-2, 3], text.train.windows[2:-1, 2])
    part = tagging.with_share(text.train, 200, 0.25, 0)
    assert (part.tags > 0).sum() == 50


def test_experiments_return_a_score_for_each_loss():
    small = {"steps": 6, "hidden": 8, "rates": (1e-2,), "batch_size": 64}
    row = study.tag(0, train=1500, held=600, **small)
    for name in study.losses(Y, 2):
        assert 0 <= row[f"f1_{name}"] <= 100 and row[f"precision_{name}"].shape == (50,)
    row = study.shares(0, share=0.2, train=300, held=200, **small)
    assert set(row) == {f"f1_{name}" for name in ("ce", "dl", "dsc", "batch")}
    row = study.finetune(0, train=1500, held=600, first=6, **small)
    assert set(row) >= {"f1_start", "f1_ce", "f1_own", "f1_batch"}
    assert study.accuracy(0, **small)["accuracy_ce"] > 5


def test_the_exported_formula_is_the_explorers():
    for explorer in (figures.explore_dice(), figures.explore_dice(P, Y)):
        assert js.check_formula(explorer) >= 16
        explorer.result()
        assert explorer.seconds < 0.05
