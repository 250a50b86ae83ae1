"""Dice losses where few tokens count, at other shares of them, and where accuracy counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import data, members, models
from workbench.losses import baselines
from workbench.losses.dice_loss import batch_dice, dsc_loss, softmax_dice, softmax_dsc
from workbench.losses.experiments import tagging

Row = Callable[[Tensor, Tensor], Tensor]

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
"""Adam's learning rates; each loss takes the best of them on the validation part."""
RECALL = np.linspace(0.02, 1, 50)

RELEASED: dict[str, Any] = {"smooth": 1.0, "alpha": 0.01, "ohem_ratio": 0.3, "squared": True}
"""Settings of the released script for OntoNotes 5.0."""


def _rows(loss: Callable[..., Tensor], **settings: Any) -> Row:
    """A loss of rows for members: (m, b, k) and (m, b) -> (m,), the mean of each member."""

    def of(logits: Tensor, y: Tensor) -> Tensor:
        flat = loss(logits.flatten(0, 1), y.flatten(), reduction="none", **settings)
        weight = settings.get("weight")
        if weight is None:
            return flat.view(y.shape).mean(1)
        return flat.view(y.shape).sum(1) / weight[y].sum(1)

    return of


def _own(logits: Tensor, y: Tensor) -> Tensor:
    p = logits.softmax(-1).gather(-1, y[..., None])[..., 0]
    return dsc_loss(p, torch.ones_like(p), reduction="none").mean(-1)


def losses(y: Tensor, classes: int) -> dict[str, Row]:
    """The losses compared, by name; class weights come from the labels ``y``.

    ``dl`` and ``dsc`` are the paper's losses of one example, each class against the rest;
    ``detached`` is DSC with its weight out of the gradient, ``own`` DSC of the label's probability
    alone, so that there are no negatives; ``batch`` is the dice of the minibatch's sums with the
    released defaults, ``released`` the same with the settings of the released scripts (`RELEASED`),
    ``coded`` these without any negative, which is what the released code makes of them;
    ``weighted`` is cross-entropy with weights log(1 + n / n_k), ``focal`` focal loss with power 2.
    """
    weight = torch.log1p(len(y) / torch.bincount(y, minlength=classes).clamp_min(1))
    return {
        "ce": _rows(F.cross_entropy),
        "focal": _rows(baselines.focal),
        "weighted": _rows(F.cross_entropy, weight=weight),
        "dl": _rows(softmax_dice),
        "dsc": _rows(softmax_dsc),
        "detached": _rows(softmax_dsc, detach_weight=True),
        "own": _own,
        "batch": batch_dice,
        "released": partial(batch_dice, **RELEASED),
        "coded": partial(batch_dice, **RELEASED | {"ohem_ratio": 1e-9}),
    }


def _train(
    seed: int,
    factory: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    chosen: dict[str, Row],
    rates: tuple[float, ...],
    steps: int,
    batch_size: int,
    trained: dict[str, Tensor] | None = None,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """One network a loss and learning rate, losses outermost; same start and minibatches.

    The start is random, or the one member ``trained``.
    """
    seeds = [seed] * (len(chosen) * len(rates))
    model, states = members.start(factory, seeds)
    if trained is not None:
        states = {
            name: values.expand(len(seeds), *values.shape[1:]) for name, values in trained.items()
        }

    def loss(logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        parts = zip(
            chosen.values(), logits.split(len(rates)), labels.split(len(rates)), strict=True
        )
        return torch.cat([row(h, c) for row, h, c in parts])

    epochs = max(1, round(steps * batch_size / len(x)))
    states = members.train(
        model, states, x, y, loss, seeds=seeds, epochs=epochs, batch_size=batch_size,
        lr=torch.tensor(rates).repeat(len(chosen)),
    )  # fmt: skip
    return model, states


def _best(
    model: nn.Module,
    states: dict[str, Tensor],
    x: Tensor,
    score: Callable[[np.ndarray], float],
    names: list[str],
    rates: tuple[float, ...],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Of each loss the member with the best validation score, and its learning rate."""
    guesses = members.outputs(model, states, x).argmax(-1).numpy()
    table = np.array([score(guess) for guess in guesses]).reshape(len(names), len(rates))
    best = table.argmax(1)
    rows = torch.as_tensor(best + len(rates) * np.arange(len(names)))
    kept = {name: values[rows] for name, values in states.items()}
    return kept, {name: rates[i] for name, i in zip(names, best, strict=True)}


def _tagger(words: int, seen: int, hidden: int, d: int = 12) -> nn.Module:
    return nn.Sequential(nn.Embedding(words, d), models.MLP([seen * d, hidden, len(tagging.TAGS)]))


def tag(
    seed: int,
    *,
    train: int = 40_000,
    held: int = 15_000,
    steps: int = 300,
    batch_size: int = 256,
    hidden: int = 48,
    rates: tuple[float, ...] = RATES,
) -> dict[str, Any]:
    """Span F1 of a window tagger trained with each loss on text in its natural proportions.

    Args:
        seed: of the split into definitions, the start and the minibatches.
        train, held: tokens of the training part, and of validation and test.
        steps, batch_size: of Adam, about; rounded to whole epochs.
        hidden: units of the tagger.
        rates: learning rates tried for each loss.

    Returns:
        ``f1_<loss>`` span F1 in per cent on the test part with the learning rate best on
        validation, ``lr_<loss>``, ``entropy_<loss>`` (nats a token), ``sure_<loss>`` the mean
        probability of the right tag where it is not O, ``precision_<loss>`` at `RECALL` for "part
        of an entity", and ``share`` of such tokens in training (%).
    """
    text = tagging.corpus(seed, train=train, held=held)
    x, y = torch.from_numpy(text.train.windows), torch.from_numpy(text.train.tags)
    chosen = losses(y, len(tagging.TAGS))
    factory = partial(_tagger, len(text.vocabulary), x.shape[1], hidden)
    model, states = _train(seed, factory, x, y, chosen, rates, steps, batch_size)
    states, lr = _best(
        model, states, torch.from_numpy(text.validation.windows),
        lambda guess: tagging.span_f1(text.validation.tags, guess), list(chosen), rates,
    )  # fmt: skip
    logits = members.outputs(model, states, torch.from_numpy(text.test.windows))
    gold = text.test.tags
    row: dict[str, Any] = {"share": 100 * float((text.train.tags > 0).mean())}
    for name, h in zip(chosen, logits, strict=True):
        row[f"f1_{name}"] = 100 * tagging.span_f1(gold, h.argmax(-1).numpy())
        row[f"lr_{name}"] = lr[name]
        row[f"entropy_{name}"] = float(F.cross_entropy(h, torch.from_numpy(gold)))
        p = h.softmax(-1).numpy()
        row[f"sure_{name}"] = float(p[gold > 0, gold[gold > 0]].mean())
        row[f"precision_{name}"] = tagging.precision_at(gold, 1 - p[:, 0], RECALL)
    return row


def finetune(
    seed: int,
    *,
    train: int = 40_000,
    held: int = 15_000,
    first: int = 300,
    steps: int = 150,
    batch_size: int = 256,
    hidden: int = 48,
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3),
    names: tuple[str, ...] = ("ce", "dl", "dsc", "detached", "own", "batch"),
) -> dict[str, Any]:
    """The task of `tag`, where every loss continues from one tagger trained with cross-entropy.

    That tagger has had ``first`` steps at learning rate 0.01; then each loss has ``steps`` at the
    rate of ``rates`` best on validation, cross-entropy too. Returns ``f1_start`` and
    ``f1_<loss>`` in per cent; other arguments as of `tag`.
    """
    text = tagging.corpus(seed, train=train, held=held)
    x, y = torch.from_numpy(text.train.windows), torch.from_numpy(text.train.tags)
    every = losses(y, len(tagging.TAGS))
    factory = partial(_tagger, len(text.vocabulary), x.shape[1], hidden)
    only = {"ce": every["ce"]}
    model, trained = _train(seed, factory, x, y, only, (1e-2,), first, batch_size)
    chosen = {name: every[name] for name in names}
    model, states = _train(seed + 1, factory, x, y, chosen, rates, steps, batch_size, trained)
    states, _ = _best(
        model, states, torch.from_numpy(text.validation.windows),
        lambda guess: tagging.span_f1(text.validation.tags, guess), list(chosen), rates,
    )  # fmt: skip
    test = torch.from_numpy(text.test.windows)
    both = zip(
        ("start", *chosen),
        [*members.outputs(model, trained, test), *members.outputs(model, states, test)],
        strict=True,
    )
    return {
        f"f1_{name}": 100 * tagging.span_f1(text.test.tags, h.argmax(-1).numpy())
        for name, h in both
    }


def shares(
    seed: int,
    *,
    share: float = 0.05,
    train: int = 8000,
    held: int = 6000,
    steps: int = 100,
    batch_size: int = 256,
    hidden: int = 48,
    rates: tuple[float, ...] = RATES,
    names: tuple[str, ...] = ("ce", "dl", "dsc", "batch"),
) -> dict[str, Any]:
    """Token F1 where ``share`` of the tokens, in training and in test, belongs to entities.

    Tokens are drawn from the text at random, each with its whole window; spans are lost, so the
    score is the F1 of tokens (micro average without O), in per cent. Arguments as of `tag`;
    ``names`` are the losses compared.
    """
    text = tagging.corpus(seed, train=16 * train, held=16 * held)
    part = {
        name: tagging.with_share(getattr(text, name), size, share, seed)
        for name, size in (("train", train), ("validation", held), ("test", held))
    }
    x, y = torch.from_numpy(part["train"].windows), torch.from_numpy(part["train"].tags)
    every = losses(y, len(tagging.TAGS))
    chosen = {name: every[name] for name in names}
    factory = partial(_tagger, len(text.vocabulary), x.shape[1], hidden)
    model, states = _train(seed, factory, x, y, chosen, rates, steps, batch_size)
    states, _ = _best(
        model, states, torch.from_numpy(part["validation"].windows),
        lambda guess: tagging.token_f1(part["validation"].tags, guess), list(chosen), rates,
    )  # fmt: skip
    logits = members.outputs(model, states, torch.from_numpy(part["test"].windows))
    return {
        f"f1_{name}": 100 * tagging.token_f1(part["test"].tags, h.argmax(-1).numpy())
        for name, h in zip(chosen, logits, strict=True)
    }


def accuracy(
    seed: int,
    *,
    steps: int = 300,
    batch_size: int = 64,
    hidden: int = 32,
    rates: tuple[float, ...] = RATES,
    names: tuple[str, ...] = ("ce", "dl", "dsc", "own", "batch"),
) -> dict[str, Any]:
    """Accuracy (%) on balanced digits with each loss; the learning rate is chosen by accuracy."""
    split = data.digits().split(seed, train=0.5, val=0.25, test=0.25)
    x, y = torch.from_numpy(split["train"].x), torch.from_numpy(split["train"].y)
    every = losses(y, 10)
    chosen = {name: every[name] for name in names}
    factory = partial(models.MLP, [x[0].numel(), hidden, 10])
    model, states = _train(seed, factory, x, y, chosen, rates, steps, batch_size)
    labels = split["val"].y
    states, _ = _best(
        model, states, torch.from_numpy(split["val"].x),
        lambda guess: float((guess == labels).mean()), list(chosen), rates,
    )  # fmt: skip
    guesses = members.outputs(model, states, torch.from_numpy(split["test"].x)).argmax(-1).numpy()
    return {
        f"accuracy_{name}": 100 * float((guess == split["test"].y).mean())
        for name, guess in zip(chosen, guesses, strict=True)
    }
