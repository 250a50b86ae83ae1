"""Every loss of the family that takes logits and labels follows torch, whoever wrote the paper."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from workbench.losses import (
    aggregate_responses,
    anyloss,
    baselines,
    comp_sum,
    conventions,
    dice_loss,
    ensloss,
    ldr_loss,
    z_loss,
)

# A module for each of three values of a hyper-parameter: a second one must not break what was
# compiled for the first.
BY_ROW: dict[str, Callable[..., nn.Module]] = {
    "comp-sum": lambda v, **o: comp_sum.CompSumLoss(tau=v, **o),
    "LDR-KL": lambda v, **o: ldr_loss.LDRLoss(lam=v, **o),
    "Z-loss": lambda v, **o: z_loss.ZLoss(a=v, **o),
    "GCE": lambda v, **o: baselines.GCE(q=min(v, 1.0), **o),
    "SCE": lambda v, **o: baselines.SCE(alpha=v, **o),
    "NCE+RCE": lambda v, **o: baselines.NCERCE(alpha=v, **o),
    "focal": lambda v, **o: baselines.Focal(gamma=v, **o),
    "Crammer-Singer": lambda v, **o: baselines.CrammerSinger(margin=v, **o),
    "Weston-Watkins": lambda v, **o: baselines.WestonWatkins(margin=v, **o),
}
OTHERS: dict[str, Callable[[float], Callable[..., torch.Tensor]]] = {
    "batch dice": lambda v: dice_loss.BatchDice(alpha=v),
    "AnyLoss, one against rest": lambda v: lambda h, y: anyloss.one_vs_rest(h, y, L=10 * v),
    "EnsLoss, one against rest": lambda v: lambda h, y: ensloss.one_vs_rest(h, y, lam=v),
    "bag means": lambda v: bag_means(aggregate_responses.AggregateLoss(rho=v / 2)),
}
VALUES = (0.5, 1.5, 0.8)


def bag_means(loss):
    """Logits as predictions of bags of two, whose mean responses are the labels' means."""

    def of(logits, y):
        return loss(logits.view(4, 2, 5).movedim(-1, 0), y.view(4, 2).float().mean(1).expand(5, 4))

    return of


def draw(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(8, 5, generator=g), torch.randint(0, 5, (8,), generator=g)


@pytest.mark.parametrize("name", [*BY_ROW, *OTHERS])
def test_it_compiles_whatever_the_hyper_parameter(name):
    torch.compiler.reset()
    logits, y = draw()
    for value in VALUES:
        loss = (BY_ROW | OTHERS)[name](value)
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        found = [None, None]
        for i, run in enumerate((compiled, loss)):
            torch.manual_seed(0)  # for the one that draws
            found[i] = run(logits, y)
        torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", BY_ROW)
def test_half_precision_and_autocast_give_single(name):
    logits, y = draw()
    loss = BY_ROW[name](0.5)
    for dtype in (torch.float16, torch.bfloat16):
        half = logits.to(dtype)
        torch.testing.assert_close(loss(half, y), loss(half.float(), y))
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(logits, y).dtype == torch.float32
        torch.testing.assert_close(loss(logits, y), loss.double()(logits, y))


@pytest.mark.parametrize("name", BY_ROW)
def test_extreme_logits_are_finite(name):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]]).requires_grad_()
    loss = BY_ROW[name](0.5)(logits, torch.tensor([0, 0, 1]))
    (slope,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and slope.isfinite().all()


@pytest.mark.parametrize("name", BY_ROW)
def test_weight_ignore_index_and_reductions(name):
    logits, y = draw()
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    each = BY_ROW[name](0.5, reduction="none")(logits, y)
    scaled = BY_ROW[name](0.5, weight=weight, reduction="none")(logits, y)
    torch.testing.assert_close(scaled, weight[y] * each)
    torch.testing.assert_close(
        BY_ROW[name](0.5, weight=weight)(logits, y), scaled.sum() / weight[y].sum()
    )
    some = torch.where(torch.arange(8) < 3, -100, y)
    torch.testing.assert_close(BY_ROW[name](0.5)(logits, some), each[3:].mean())
    torch.testing.assert_close(BY_ROW[name](0.5, reduction="sum")(logits, some), each[3:].sum())


@pytest.mark.parametrize("name", BY_ROW)
def test_a_module_has_a_state_and_says_what_it_is(name):
    loss = BY_ROW[name](0.5, weight=torch.arange(5.0))
    other = BY_ROW[name](0.5, weight=torch.ones(5))
    other.load_state_dict(loss.state_dict())
    logits, y = draw()
    torch.testing.assert_close(other(logits, y), loss(logits, y))
    assert isinstance(loss, conventions.Loss) and "0.5" in repr(loss)


@pytest.mark.parametrize("name", BY_ROW)
def test_images_of_labels(name):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, 4, generator=g)
    y = torch.randint(0, 5, (2, 3, 4), generator=g)
    loss = BY_ROW[name](0.5, reduction="none")
    flat = loss(logits.movedim(1, -1).reshape(-1, 5), y.flatten())
    torch.testing.assert_close(loss(logits, y), flat.view(2, 3, 4))
