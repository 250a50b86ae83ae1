"""Networks trained together are the networks that torch trains one by one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench.lab import members, models
from workbench.lab.seeding import seeded


def make() -> nn.Module:
    return models.MLP([5, 8, 3]).double()


def data(n: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, dtype=torch.float64, generator=g)
    return x, torch.randint(0, 3, (n,), generator=g)


def mean_ce(out: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    each = F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none")
    return each.view(y.shape).mean(1)


def one_by_one(seed, x, y, optimizer, epochs, batch_size, clip=None, schedule=None):
    with seeded(seed):
        model = make()
    opt = optimizer(model.parameters())
    plan = schedule(opt) if schedule else None
    for epoch in range(epochs):
        for (rows,) in ((r[0],) for r in members.minibatches(len(x), [seed], batch_size, epoch)):
            opt.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            if plan:
                plan.step()
    return model


@pytest.mark.parametrize(
    ("name", "options", "torch_options"),
    [
        ("adam", {}, {}),
        ("adam", {"weight_decay": 0.1}, {"weight_decay": 0.1}),
        ("sgd", {}, {"momentum": 0.9}),
        ("sgd", {"weight_decay": 0.1, "momentum": 0.0}, {"weight_decay": 0.1}),
    ],
)
def test_members_are_trained_as_torch_trains_them(name, options, torch_options):
    x, y = data()
    seeds, rates = [3, 3, 7], torch.tensor([0.01, 0.05, 0.01], dtype=torch.float64)
    model, states = members.start(make, seeds)
    found = members.train(
        model, states, x, y, mean_ce, seeds=seeds, epochs=3, batch_size=16, lr=rates,
        optimizer=name, **options,
    )  # fmt: skip
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    for i, (seed, rate) in enumerate(zip(seeds, [0.01, 0.05, 0.01], strict=True)):
        alone = one_by_one(
            seed, x, y, lambda p, rate=rate: kind(p, lr=rate, **torch_options), 3, 16
        )
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(found[key][i], value, rtol=1e-7, atol=1e-9)


def test_clipping_and_cosine_follow_torch():
    x, y = data()
    model, states = members.start(make, [1])
    found = members.train(
        model, states, x, y, mean_ce, seeds=[1], epochs=2, batch_size=20, lr=0.5,
        optimizer="sgd", schedule="cosine", clip=0.3,
    )  # fmt: skip
    alone = one_by_one(
        1, x, y, lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), 2, 20, clip=0.3,
        schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
    )  # fmt: skip
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(found[key][0], value, rtol=1e-6, atol=1e-8)


def test_milestones_divide_the_rate():
    assert members._factor(((0.5, 0.75), 0.1), 0.4) == 1
    assert members._factor(((0.5, 0.75), 0.1), 0.8) == pytest.approx(0.01)


def test_rows_restrict_each_member_to_its_own():
    x, y = data()
    rows = torch.stack([torch.arange(20), torch.arange(20, 40)])
    seen: list[set[int]] = [set(), set()]

    def loss(out, labels, index):
        for i in (0, 1):
            seen[i] |= set(index[i].tolist())
            assert (labels[i] == y[index[i]]).all()
        return mean_ce(out, labels, index)

    model, states = members.start(make, [0, 0])
    members.train(model, states, x, y, loss, seeds=[0, 0], rows=rows, epochs=1, batch_size=6)
    assert seen == [set(range(20)), set(range(20, 40))]


def test_each_gives_members_data_of_their_own():
    (x0, y0), (x1, y1) = data(seed=1), data(seed=2)
    x, y = torch.stack([x0, x1]), torch.stack([y0, y1])
    model, states = members.start(make, [5, 5])
    both = members.train(
        model, states, x, y, mean_ce, seeds=[5, 5], each=True, epochs=2, batch_size=16
    )
    out = members.outputs(model, both, x, each=True)
    for i, (xi, yi) in enumerate([(x0, y0), (x1, y1)]):
        model, one = members.start(make, [5])
        one = members.train(model, one, xi, yi, mean_ce, seeds=[5], epochs=2, batch_size=16)
        torch.testing.assert_close(members.outputs(model, one, xi)[0], out[i])


def test_nothing_that_was_given_is_changed():
    x, y = data()
    model, states = members.start(make, [0, 1])
    before = {k: v.clone() for k, v in states.items()}
    own = {k: v.clone() for k, v in model.state_dict().items()}
    epochs = []
    members.train(
        model, states, x, y, mean_ce, seeds=[0, 1], epochs=2,
        after_epoch=lambda done, held: epochs.append(done),
    )  # fmt: skip
    assert epochs == [1, 2]
    assert all(torch.equal(before[k], states[k]) for k in before)
    assert all(torch.equal(own[k], v) for k, v in model.state_dict().items())


def test_batch_norm_statistics_belong_to_each_member():
    x, y = data()
    model, states = members.start(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double(), [0, 1]
    )
    found = members.train(model, states, x, y, mean_ce, seeds=[0, 1], epochs=1, batch_size=20)
    means = found["1.running_mean"]
    assert not torch.allclose(means[0], means[1])
    assert found["1.num_batches_tracked"].tolist() == [2, 2]
    loaded = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().eval()
    loaded.load_state_dict(members.member(found, 1))
    torch.testing.assert_close(loaded(x), members.outputs(model, found, x)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0]}, "seeds: expected one"),
        ({"rows": torch.zeros(3, 4, dtype=torch.long)}, "rows: expected"),
        ({"lr": torch.zeros(3)}, "lr: expected"),
        ({"lr": -1.0}, "lr: expected numbers >= 0"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"epochs": 0}, "epochs"),
        ({"schedule": "linear"}, "schedule"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    x, y = data()
    model, states = members.start(make, [0, 1])
    options = {"seeds": [0, 1], "epochs": 1, **change}
    with pytest.raises(ValueError, match=message):
        members.train(model, states, x, y, mean_ce, **options)


def test_targets_and_losses_of_a_wrong_shape_are_refused():
    x, y = data()
    model, states = members.start(make, [0, 1])
    with pytest.raises(ValueError, match="y: expected"):
        members.train(model, states, x, y[:-1], mean_ce, seeds=[0, 1], epochs=1)
    with pytest.raises(ValueError, match="loss: expected"):
        members.train(model, states, x, y, lambda o, t, i: o.mean(), seeds=[0, 1], epochs=1)
    with pytest.raises(ValueError, match="seeds"):
        members.start(make, [])
