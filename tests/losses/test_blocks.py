"""Large inputs go through in blocks of rows; each loss is the same number with and without."""

import pytest
import torch

from workbench.losses import anyloss, comp_sum, dice_loss, ldr_loss, streaming

LOSSES = {
    "comp-sum": lambda h, y: comp_sum.comp_sum_loss(h, y, tau=1.5),
    "LDR-KL": lambda h, y: ldr_loss.ldr_kl(h, y, lam=2.0),
    "AnyLoss": lambda h, y: anyloss.one_vs_rest(h, y, metric="gmean", L=9.0),
    "dice": dice_loss.batch_dice,
    "dice, squared": lambda h, y: dice_loss.batch_dice(h, y, squared=True),
    "dice, adjusted": lambda h, y: dice_loss.batch_dice(h, y, alpha=0.5),
}


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_blocks_change_neither_value_nor_gradient(name, dtype, threads, monkeypatch):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(50, 6, generator=g, dtype=torch.float64)).to(dtype)
    y = torch.randint(0, 6, (50,), generator=g)
    y[::7] = -100
    found = []
    for large in (1, 1 << 30):
        monkeypatch.setattr(streaming, "LARGE", large)
        monkeypatch.setattr(streaming, "BLOCK", 50)
        at = logits.clone().requires_grad_()
        loss = LOSSES[name](at, y)
        (slope,) = torch.autograd.grad(loss, at)
        found.append((loss.double(), slope.double()))
    tight = (
        {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 1e-4}
    )
    torch.testing.assert_close(found[0], found[1], **tight)
    assert not found[0][1][::7].any()


def test_an_error_in_a_block_reaches_the_caller(threads, monkeypatch):
    monkeypatch.setattr(streaming, "LARGE", 1)

    def wrong(h):
        raise ValueError("no such loss")

    with pytest.raises(ValueError, match="no such loss"):
        streaming.rows(wrong, torch.zeros(4, 3))


def test_the_same_bits_with_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(streaming, "LARGE", 1)
    monkeypatch.setattr(streaming, "BLOCK", 30)
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(50, 6, generator=g), torch.randint(0, 6, (50,), generator=g)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        at = logits.clone().requires_grad_()
        loss = dice_loss.batch_dice(at, y)
        found.append((loss, *torch.autograd.grad(loss, at)))
    torch.set_num_threads(before)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )
