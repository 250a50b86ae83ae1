"""The losses that the papers are compared with, against torch, closed forms and loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from workbench.losses import baselines

SMOOTH = {
    "gce": baselines.gce, "mae": baselines.mae, "sce": baselines.sce,
    "nce_rce": baselines.nce_rce, "focal": baselines.focal,
}  # fmt: skip
HINGES = {
    "crammer_singer": baselines.crammer_singer, "weston_watkins": baselines.weston_watkins,
}  # fmt: skip
MODULES = {
    "gce": baselines.GCE, "mae": baselines.MAE, "sce": baselines.SCE, "nce_rce": baselines.NCERCE,
    "focal": baselines.Focal, "crammer_singer": baselines.CrammerSinger,
    "weston_watkins": baselines.WestonWatkins,
}  # fmt: skip
ALL = SMOOTH | HINGES


def draw(n=6, k=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, k, generator=g, dtype=torch.float64),
        torch.randint(0, k, (n,), generator=g),
    )


def by_hand(name, h, y):
    """One row, in plain Python."""
    p = [math.exp(v) for v in h]
    p = [v / sum(p) for v in p]
    nll = -math.log(p[y])
    others = [h[k] - h[y] + 1 for k in range(len(h)) if k != y]
    return {
        "gce": (1 - p[y] ** 0.7) / 0.7,
        "mae": sum(abs(p[k] - (k == y)) for k in range(len(h))),
        "sce": 0.1 * nll - sum(p[k] * (0 if k == y else -4) for k in range(len(h))),
        "nce_rce": nll / -sum(map(math.log, p)) + 4 * (1 - p[y]),
        "focal": (1 - p[y]) ** 2 * nll,
        "crammer_singer": max(0, *others),
        "weston_watkins": sum(max(0, v) for v in others),
    }[name]


@pytest.mark.parametrize("name", ALL)
def test_values_are_the_formula(name):
    logits, y = draw()
    found = ALL[name](logits, y, reduction="none")
    expected = [by_hand(name, h, int(c)) for h, c in zip(logits.tolist(), y, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(MODULES[name](reduction="none")(logits, y), found)


def test_limits_of_generalised_cross_entropy():
    logits, y = draw()
    torch.testing.assert_close(
        baselines.gce(logits, y, q=1e-9), F.cross_entropy(logits, y), rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(2 * baselines.gce(logits, y, q=1.0), baselines.mae(logits, y))
    torch.testing.assert_close(baselines.focal(logits, y, gamma=0), F.cross_entropy(logits, y))


def test_crammer_singer_is_torchs_margin_of_the_largest_rival():
    logits, y = draw(k=2)
    expected = 2 * F.multi_margin_loss(logits, y)  # torch divides by the number of classes
    torch.testing.assert_close(baselines.weston_watkins(logits, y), expected)
    torch.testing.assert_close(baselines.crammer_singer(logits, y), expected)


@pytest.mark.parametrize("name", ["gce", "mae", "focal"])
def test_soft_labels_are_the_expectation(name):
    logits, _ = draw()
    q = draw(seed=1)[0].softmax(1)
    expected = sum(
        q[:, k] * ALL[name](logits, torch.full((6,), k), reduction="none") for k in range(4)
    )
    torch.testing.assert_close(ALL[name](logits, q, reduction="none"), expected)


@given(shift=st.floats(-50, 50), seed=st.integers(0, 20))
def test_a_shift_of_all_logits_changes_nothing(shift, seed):
    logits, y = draw(seed=seed)
    for loss in ALL.values():
        torch.testing.assert_close(loss(logits + shift, y), loss(logits, y))


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_of_both_orders(name):
    logits, y = draw(n=3)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: ALL[name](h, y), logits)
    assert torch.autograd.gradgradcheck(lambda h: ALL[name](h, y), logits)


@pytest.mark.parametrize("name", HINGES)
def test_gradients_of_the_hinges(name):
    logits, y = draw(n=3, seed=3)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: ALL[name](h, y), logits)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite(name, dtype):
    logits = (torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])).to(dtype).requires_grad_()
    for y in (torch.tensor([0, 0]), torch.tensor([1, 2])):
        loss = ALL[name](logits, y)
        (slope,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and slope.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_each_compiles_as_one_graph(name):
    logits, y = draw()
    compiled = torch.compile(ALL[name], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, y), ALL[name](logits, y))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, y: baselines.gce(h, y, q=0), "q"),
        (lambda h, y: baselines.gce(h, y, q=1.5), "q"),
        (lambda h, y: baselines.sce(h, y, alpha=-1), "alpha"),
        (lambda h, y: baselines.nce_rce(h, y, log_zero=1), "log_zero"),
        (lambda h, y: baselines.focal(h, y, gamma=-1), "gamma"),
        (lambda h, y: baselines.crammer_singer(h, y, margin=-1), "margin"),
        (lambda h, y: baselines.sce(h, h.softmax(1)), "soft labels"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*draw())
