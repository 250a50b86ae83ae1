"""EnsLoss: drawn slopes are those of calibrated convex losses, and the gradient is theirs."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from tests.plots import js
from workbench.losses import ensloss as E
from workbench.losses import figures_ensloss as figures
from workbench.losses import margins
from workbench.losses.experiments import ensloss as study


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n=64, seed=0, spread=2.0, **kind):
    source = seeded(seed)
    scores = spread * torch.randn(n, generator=source, dtype=torch.float64)
    return scores.to(**kind), torch.randint(0, 2, (n,), generator=source)


# --- the slopes


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    lam=st.floats(-1, 1),
    spread=st.floats(0.01, 1e4),
)
def test_slopes_are_negative_bounded_and_do_not_fall(n, seed, lam, spread):
    z = spread * torch.randn(3, n, generator=seeded(seed), dtype=torch.float64)
    g = E.random_derivatives(z, lam, seeded(seed + 1))
    assert g.shape == z.shape
    assert bool(((g >= -1 - E.FLOOR) & (g <= -E.FLOOR)).all())
    assert bool((g.gather(1, z.argsort(1)).diff(dim=1) >= 0).all())


@pytest.mark.parametrize("lam", [-1.0, -0.3, 0.0, 1e-7, 0.5, 1.0])
def test_the_algorithm_written_out_row_by_row(lam):
    rng = np.random.default_rng(3)
    z, xi = rng.normal(0.5, 2, 30), rng.normal(size=30)
    drawn = []
    for value in xi:
        base = 1 + lam * value
        if lam == 0:
            raw = math.exp(value)
        elif base > 0:
            raw = base ** (1 / lam)
        else:
            raw = 0.0 if lam > 0 else math.inf
        drawn.append(-min(raw, 1.0))
    drawn.sort()
    expected = np.empty(30)
    for place, row in enumerate(sorted(range(30), key=lambda i: z[i])):
        tail = 1 / z[row] if z[row] > 1 else 1.0
        expected[row] = drawn[place] * tail - 1e-6
    found = E.staircase(torch.tensor(z), torch.tensor(xi), lam)
    np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.parametrize("lam", [-0.9, -0.2, 0.0, 0.4, 1.0])
def test_mean_slope_is_the_integral_over_the_draws(lam):
    def steepness(xi):
        base = 1 + lam * xi
        if lam == 0:
            return min(math.exp(xi), 1)
        return min(base ** (1 / lam), 1) if base > 0 else float(lam < 0)

    edge = [-1 / lam] if lam else []
    expected = -integrate.quad(
        lambda t: steepness(t) * math.exp(-t * t / 2), -9, 9, points=[0.0, *edge], limit=200
    )[0] / math.sqrt(2 * math.pi)
    if lam == 0:
        assert expected == pytest.approx(-(0.5 + math.exp(0.5) * stats.norm.cdf(-1)), abs=1e-9)
    z = torch.full((150_000,), 0.5)
    assert float(E.random_derivatives(z, lam, seeded()).mean()) == pytest.approx(expected, abs=4e-3)
    assert float(E.average_derivatives(z, lam).mean()) == pytest.approx(expected, abs=1e-4)


def test_small_lambda_is_continuous_in_single_precision():
    xi = torch.linspace(-4, 4, 101)
    at_zero = E.magnitude(xi, 0.0)
    for lam in (1e-4, -1e-5, 1e-8):
        wide = E.magnitude(xi.double(), lam).float()
        torch.testing.assert_close(E.magnitude(xi, lam), wide, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(E.magnitude(xi, 1e-9), at_zero)


def test_sets_are_independent_and_may_have_a_lambda_each():
    z, xi = torch.randn(2, 4, 9, generator=seeded(), dtype=torch.float64)
    lam = torch.tensor([-1.0, 0.0, 0.3, 1.0])
    together = E.staircase(z, xi, lam)
    for i in range(4):
        torch.testing.assert_close(together[i], E.staircase(z[i], xi[i], float(lam[i])))


def test_every_drawn_loss_has_the_right_sign_at_its_minimum():
    """Calibration: with P(y=1) = eta the risk's slope at 0 has the sign of 1 - 2 eta."""
    z = torch.linspace(-3, 3, 64, dtype=torch.float64)
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)
    for seed in range(20):
        slopes = E.random_derivatives(z, 2 * (seed / 19) - 1, seeded(seed))
        loss = lambda f, g=slopes: E.implied(z, g, f)  # noqa: E731
        for eta in (0.1, 0.45, 0.55, 0.9):
            risk = eta * loss(grid) + (1 - eta) * loss(-grid)
            assert bool(torch.sign(grid[risk.argmin()]) == math.copysign(1, eta - 0.5))
        if seed % 7 == 0:
            assert float(margins.calibration(loss, 0.1, reach=3.0)) > 0


def test_implied_loss_has_the_slopes_at_the_margins():
    z, _ = batch(12, seed=4)
    slopes = E.random_derivatives(z, generator=seeded())
    at = z.clone().requires_grad_()
    (found,) = torch.autograd.grad(E.implied(z, slopes, at).sum(), at)
    torch.testing.assert_close(found, slopes, rtol=1e-6, atol=1e-9)
    x = torch.linspace(-9, 9, 400, dtype=torch.float64)
    value = E.implied(z, slopes, x)
    assert float(E.implied(z, slopes, torch.zeros(1).double())) == pytest.approx(1)
    assert bool((value.diff() < 0).all()) and bool((value.diff().diff() > -1e-9).all())
    one = E.implied(z[:1], slopes[:1], x)  # a single margin: a straight line
    torch.testing.assert_close(one, 1 + slopes[0] * x)


# --- the loss


@pytest.mark.parametrize("lam", [0.0, -0.7, 0.7])
def test_gradient_is_label_times_slope(lam):
    scores, y = batch()
    scores.requires_grad_()
    E.ensloss(scores, y, lam=lam, generator=seeded(5)).backward()
    sign = 2 * y - 1
    slopes = E.random_derivatives(scores.detach() * sign, lam, seeded(5))
    torch.testing.assert_close(scores.grad, sign * slopes / len(y), rtol=1e-12, atol=0)


def test_gradient_is_that_of_the_implied_loss():
    scores, y = batch(16)
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    E.ensloss(ours, y, generator=seeded(7)).backward()
    z = E.margins_of(scores, y)
    slopes = E.random_derivatives(z, generator=seeded(7))
    E.implied(z, slopes, E.margins_of(theirs, y)).mean().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-12)


def test_gradcheck_where_slopes_are_locally_constant():
    scores, y = batch(7, spread=0.2)  # all margins below 1: the reciprocal tail is not reached
    call = lambda s: E.ensloss(s, y, generator=seeded(1))  # noqa: E731
    assert torch.autograd.gradcheck(call, scores.requires_grad_())


def test_the_limit_of_constant_slopes_is_the_linear_loss(monkeypatch):
    scores, y = batch(20, spread=0.1)
    monkeypatch.setattr(E, "_normal", lambda z, generator: torch.full_like(z, 9.0))
    expected = (-(1 + 1e-6) * E.margins_of(scores, y)).mean()
    torch.testing.assert_close(E.ensloss(scores, y), expected)


def test_reductions_and_sets():
    scores, y = batch(30)
    sets, labels = scores.view(3, 10), y.view(3, 10)
    each = E.ensloss(sets, labels, generator=seeded(2), reduction="none")
    assert each.shape == (3, 10)
    torch.testing.assert_close(E.ensloss(sets, labels, generator=seeded(2)), each.mean(1))
    total = E.ensloss(sets, labels, generator=seeded(2), reduction="sum")
    torch.testing.assert_close(total, each.sum(1))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_computed_in_float32(kind):
    scores, y = batch(50, dtype=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = E.ensloss(scores.requires_grad_(), y, generator=seeded(3))
    found.backward()
    assert found.dtype == torch.float32 and scores.grad.dtype == kind
    expected = E.ensloss(scores.detach().float(), y, generator=seeded(3))
    torch.testing.assert_close(found.detach(), expected)
    huge = torch.tensor([1e4, -1e4, 0.0], dtype=kind, requires_grad=True)
    value = E.ensloss(huge, torch.tensor([1, 1, 0]), lam=-1.0)
    value.backward()
    assert bool(value.isfinite()) and bool(huge.grad.isfinite().all())


# --- several classes


def test_one_vs_rest_is_the_sum_of_binary_problems():
    source = seeded(6)
    logits = torch.randn(2, 25, 4, generator=source, dtype=torch.float64)
    y = torch.randint(0, 4, (2, 25), generator=source)
    found = E.one_vs_rest(logits, y, lam=0.2, generator=seeded(8))
    hot = torch.nn.functional.one_hot(y, 4)
    binary = E.ensloss(logits.mT, hot.mT, lam=0.2, generator=seeded(8))  # (sets, classes)
    torch.testing.assert_close(found, binary.sum(1))


def test_one_vs_rest_weights_and_ignored_rows():
    source = seeded(9)
    logits = torch.randn(12, 3, generator=source, dtype=torch.float64)
    y = torch.randint(0, 3, (12,), generator=source)
    weight = torch.tensor([1.0, 2.0, 0.5])
    each = E.one_vs_rest(logits, y, generator=seeded(1), reduction="none")
    weighted = E.one_vs_rest(logits, y, generator=seeded(1), weight=weight)
    torch.testing.assert_close(weighted, (each * weight[y]).sum() / weight[y].sum().double())
    dropped = y.clone()
    dropped[3:5] = -100
    logits.requires_grad_()
    found = E.one_vs_rest(logits, dropped, generator=seeded(1))
    found.backward()
    assert bool((logits.grad[3:5] == 0).all()) and bool((logits.grad[:3] != 0).all())
    kept = dropped >= 0
    slopes = logits.grad[kept] * (2 * torch.nn.functional.one_hot(y[kept], 3) - 1) * kept.sum()
    z = E.margins_of(logits.detach(), torch.nn.functional.one_hot(y, 3)).mT
    draws = torch.randn(3, 12, generator=seeded(1), dtype=torch.float64)[:, :10]
    torch.testing.assert_close(slopes.mT, E.staircase(z[:, kept], draws), rtol=1e-9, atol=1e-12)


# --- the module


def test_module_redraws_lambda_every_period_and_resumes():
    loss = E.EnsLoss(period=3, generator=seeded(4))
    seen = [loss.next_epoch() for _ in range(9)]
    assert seen[:2] == [0, 0] and seen[2] == seen[3] == seen[4] != seen[5]
    assert all(-1 <= lam <= 1 for lam in seen)
    copy = E.EnsLoss(period=3)
    copy.load_state_dict(loss.state_dict())
    assert float(copy.lam) == seen[-1] and int(copy.epoch) == 9
    scores, y = batch(8)
    copy.generator = seeded(1)
    expected = E.ensloss(scores, y, lam=seen[-1], generator=seeded(1))
    torch.testing.assert_close(copy(scores, y), expected)
    assert {E.EnsLoss(0.5).next_epoch() for _ in range(5)} == {0.5}
    assert "period=3" in repr(loss)


def test_compiles_in_one_graph():
    scores, y = batch(16)
    logits, classes = torch.randn(6, 3), torch.tensor([0, 1, 2, -100, 1, 0])
    module = E.EnsLoss(0.3)

    def both(scores):
        return module(scores, y), E.one_vs_rest(logits, classes)

    torch.manual_seed(0)
    found = torch.compile(both, fullgraph=True, backend="eager")(scores.requires_grad_())
    torch.manual_seed(0)
    expected = both(scores.detach())
    torch.testing.assert_close([v.detach() for v in found], list(expected))
    found[0].backward()
    assert bool((scores.grad != 0).all())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: E.ensloss([1.0], torch.ones(1)), TypeError, "scores"),
        (lambda: E.ensloss(torch.ones(2).long(), torch.ones(2)), TypeError, "scores"),
        (lambda: E.ensloss(torch.ones(2), torch.ones(3)), ValueError, "y01: expected shape"),
        (lambda: E.ensloss(torch.ones(2), torch.tensor([-1, 1])), ValueError, "labels 0 and 1"),
        (lambda: E.ensloss(torch.ones(0), torch.ones(0)), ValueError, "empty"),
        (lambda: E.ensloss(torch.ones(1), torch.ones(1), reduction="x"), ValueError, "reduction"),
        (lambda: E.staircase(torch.ones(2), torch.ones(3)), ValueError, "xi"),
        (lambda: E.one_vs_rest(torch.ones(2), torch.ones(2)), ValueError, "y: expected"),
        (lambda: E.one_vs_rest(torch.ones(1, 2), torch.tensor([2])), ValueError, "y"),
        (lambda: E.EnsLoss(period=0), ValueError, "period"),
        (lambda: E.EnsLoss(math.nan), ValueError, "lam"),
        (lambda: E.implied(torch.arange(2.0), torch.tensor([-0.1, -0.2]), torch.ones(1)),
         ValueError, "slopes"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- explorer and experiment


def test_the_exported_formula_draws_the_same_loss():
    explorer = figures.explore_drawn_losses()
    states = [s for i, s in enumerate(js.corners(explorer)) if i % 5 == 0]
    assert js.check_formula(explorer, states, rtol=1e-6, atol=1e-7) > 20
    explorer.result()
    assert explorer.seconds < 0.05


def test_problems_flip_training_labels_only():
    task = study.problems(1, [(0, 1), (3, 8)], train=60, val=60, test=50, flips=0.25)
    again = study.problems(1, [(0, 1), (3, 8)], train=60, val=60, test=50, flips=0.0)
    assert task.x.shape == (2, 120, 64) and task.test_y.shape == (2, 100)
    truth = torch.arange(2).repeat_interleave(60)
    wrong = (task.y != truth).double().mean()
    assert 0.15 < float(wrong) < 0.35
    assert bool((task.test_y == torch.arange(2).repeat_interleave(50)).all())
    assert bool((again.y == truth).all())


def test_a_variant_in_a_group_trains_as_alone():
    task = study.problems(0, [(0, 1), (2, 3)])
    options = {"hidden": (4,), "epochs": 2, "batch_size": 30}
    plan = [study.Variant("hinge", 0.1), study.Variant("bce", 0.2, 0.1)]
    _, together = study.fit(plan, task, 0, **options)
    _, alone = study.fit(plan[1:], task, 0, **options)
    for name, values in alone.items():
        torch.testing.assert_close(together[name][2:], values)


def test_a_short_run_learns_and_counts():
    small = {"pairs": [(0, 1), (2, 3)], "hidden": (8,), "epochs": 10, "flips": 0.0}
    tuned = pd.DataFrame([study.tune(0, rates=(1e-4, 0.3), **small)])
    rates = study.best_rates(tuned)
    assert set(rates) == set(study.LOSSES) and rates["bce"] == 0.3
    assert tuned.train_bce[0].shape == (2,)
    frame = pd.DataFrame([study.compare(s, rates=rates, every=5, **small) for s in range(1)])
    assert frame.acc_ensloss.min() > 90 and len(frame.curve_bce[0]) == 2
    assert frame.curve_bce[0][-1] == pytest.approx(frame.acc_bce[0])
    assert frame.pairs_exponential[0].mean() == pytest.approx(frame.acc_exponential[0])
    assert {
        f"acc_{a}_{b}" for a in ("ensloss", "bce") for b in ("wd", "dropout", "shared", "reg")
    } <= set(frame)
    made = pd.DataFrame(
        {
            "pairs_ensloss": [np.array([90.0, 80, 70]) + s for s in (0, 0.1, 0.3, 0.2)],
            "pairs_bce": [np.array([80.0, 80 + 2 * (-1) ** s, 75]) for s in range(4)],
            "pairs_hinge": [np.array([90.0, 80, 70]) + s for s in (0, 0.1, 0.3, 0.2)],
            "pairs_exponential": [np.zeros(3)] * 4,
        }
    )
    table = study.verdicts(made)
    assert table.loc["bce", ["better", "tie", "worse"]].tolist() == [1, 1, 1]
    assert table.loc["hinge", ["better", "tie", "worse"]].tolist() == [0, 3, 0]
    assert table.loc["exponential", "better"] == 3


LOG = """#### CIFAR01 - model: VGG16 ####
|                      |    BCE |    EXP |   Hinge |   ensLoss |
|:---------------------|-------:|-------:|--------:|----------:|
| ('test_acc', 'mean') | 0.9586 | 0.9309 |  0.9641 |    0.9653 |
|  3 | BCE   | ensLoss |   0.2166 | -0.8705 | less          |
|  6 | Hinge | ensLoss |   2e-05  | -0.1486 | less          |
|  9 | EXP   | ensLoss |   0      | -4.9699 | less          |
|  3 | BCE   | ensLoss |   0.7834 | -0.8705 | greater       |
|  6 | Hinge | ensLoss |   0.5555 | -0.1486 | greater       |
|  9 | EXP   | ensLoss |   0.9962 | -4.9699 | greater       |
|  3 | BCE   | ensLoss |   0.9999 | -0.0538 | less          |
"""


def test_the_authors_log_is_read(tmp_path, monkeypatch):
    table = study.read_log(LOG).set_index("fixed")
    assert table.better.to_dict() == {"BCE": 0.2166, "EXP": 0.0, "Hinge": 2e-5}
    assert table.gap["BCE"] == pytest.approx(0.67) and table.worse["Hinge"] == 0.5555
    monkeypatch.setattr(study.data, "authors", lambda name: None)
    assert study.released() is None
    monkeypatch.setattr(study.data, "authors", lambda name: tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "out_cifar.md").write_text(LOG, encoding="utf8")
    assert len(study.released()) == 3
