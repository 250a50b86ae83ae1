"""Soups of networks fine-tuned from one start on handwritten digits, and the released 72 models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from workbench.lab import data, models, seeded
from workbench.loss_landscapes.model_soups import (
    GreedySoup,
    angles,
    average,
    greedy_soup,
    learned_soup,
    soup_gap,
    uniform_soup,
)

SHIFTS = ("rotated", "noisy", "moved", "shrunk", "covered")
RELEASED = ("ImageNet", "ImageNetV2", "ImageNetR", "ImageNetSketch", "ObjectNet", "ImageNetA")
PARTS = {"broad": 0.3, "tune": 0.2, "held_out": 0.16, "test": 0.34}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)

Stack = dict[str, Tensor]


# --- data ----------------------------------------------------------------------------------------


def distort(
    x: Tensor,
    *,
    turn: Tensor,
    move: Tensor,
    scale: Tensor,
    noise: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Images (n, 1, s, s) turned (radians), moved (n, 2; in half sides), scaled, with noise."""
    side = x.shape[-1]
    line = (2 * torch.arange(side, device=x.device, dtype=x.dtype) + 1) / side - 1
    cos, sin = ((t / scale)[:, None, None] for t in (turn.cos(), turn.sin()))
    across = cos * line - sin * line[:, None] + move[:, 0, None, None]
    down = sin * line + cos * line[:, None] + move[:, 1, None, None]
    at = torch.stack([across, down], -1)
    x = F.grid_sample(x, at, align_corners=False)
    grain = torch.randn(x.shape, generator=generator, device=x.device)
    return x + noise[:, None, None, None] * grain


def vary(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Random distortions of training images; pretraining has strength 0.7."""

    def draw(*shape: int) -> Tensor:
        return 2 * torch.rand(len(x), *shape, generator=generator, device=x.device) - 1

    return distort(
        x,
        turn=0.8 * strength * draw(),
        move=0.3 * strength[:, None] * draw(2),
        scale=torch.exp(0.3 * strength * draw()),
        noise=0.4 * strength * draw().abs(),
        generator=generator,
    )


def shifted(x: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Test images under one of `SHIFTS`."""
    n, side = len(x), x.shape[-1]
    zero, one = torch.zeros(n, device=x.device), torch.ones(n, device=x.device)
    sign = torch.randint(0, 2, (n, 2), generator=generator, device=x.device) * 2.0 - 1
    if kind == "covered":
        width = round(0.36 * side)
        corner = torch.randint(0, side - width, (n, 2), generator=generator, device=x.device)
        line = torch.arange(side, device=x.device)
        inside = (line >= corner[..., None]) & (line < corner[..., None] + width)
        return x.masked_fill((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], 0.0)
    settings = {"turn": zero, "move": torch.zeros_like(sign), "scale": one, "noise": zero}
    settings |= {
        "rotated": {"turn": 0.52 * sign[:, 0]},
        "noisy": {"noise": 0.4 * one},
        "moved": {"move": 0.25 * sign},
        "shrunk": {"scale": 0.7 * one},
    }[kind]
    return distort(x, **settings, generator=generator)


@dataclass
class Kitchen:
    """What soups are made of and tasted with.

    Attributes:
        model: the architecture; its weights mean nothing.
        start: state that all members began from.
        states: of the members.
        settings: their hyper-parameters, a row each.
        tune, held_out: images and classes.
        tests: by name, "test" and the shifts.
        others: starts pretrained from other random initialisations, with the shared one.
    """

    model: nn.Module
    start: Stack
    states: list[Stack]
    settings: pd.DataFrame
    tune: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    tests: dict[str, tuple[Tensor, Tensor]]
    others: list[Stack] = field(default_factory=list)


# --- training ------------------------------------------------------------------------------------


def train_together(
    model: nn.Module,
    starts: Stack,
    x: Tensor,
    y: Tensor,
    settings: pd.DataFrame,
    *,
    batch: int,
    generator: torch.Generator,
    clip: float = 1.0,
) -> Stack:
    """Train as many copies of a model as `settings` has rows, all in one batched pass a step.

    AdamW with linear warm-up over a tenth of the steps, a cosine to zero and gradients clipped, as
    the authors fine-tune; every member has its own order of rows, distortions and mixing.

    Args:
        model: the architecture, without batch norm.
        starts: parameters with a leading axis of members.
        x: images (n, 1, s, s).
        y: classes.
        settings: columns ``lr``, ``weight_decay``, ``epochs``, ``smoothing``, ``mixup`` and
            ``augment``.
        batch: rows a step.
        generator: of everything random.
        clip: largest norm of a member's gradient.
    """
    members, n = len(settings), len(y)
    column = {
        name: torch.tensor(settings[name].to_numpy(float), dtype=x.dtype, device=x.device)
        for name in settings
    }
    per_epoch = n // batch
    total = column["epochs"] * per_epoch
    classes = int(y.max()) + 1
    theta = {name: tensor.clone() for name, tensor in starts.items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}

    def loss(weights: Stack, images: Tensor, target: Tensor) -> Tensor:
        scores = functional_call(model, weights, (images,))
        return -(target * scores.log_softmax(-1)).sum(-1).mean()

    slope = vmap(grad(loss))
    for step in range(int(total.max())):
        if step % per_epoch == 0:
            keys = torch.rand(members, n, generator=generator, device=x.device)
            orders = keys.argsort(1)
        rows = orders[:, step % per_epoch * batch :][:, :batch]
        images = vary(x[rows].flatten(0, 1), column["augment"].repeat_interleave(batch), generator)
        images = images.view(members, batch, *x.shape[1:])
        target = F.one_hot(y[rows], classes).to(x.dtype)
        eps = column["smoothing"][:, None, None]
        target = (1 - eps) * target + eps / classes
        share = torch.rand(members, generator=generator, device=x.device) * column["mixup"] / 2
        images = torch.lerp(images, images.flip(1), share[:, None, None, None, None])
        target = torch.lerp(target, target.flip(1), share[:, None, None])
        g = slope(theta, images, target)
        length = torch.stack([t.flatten(1).square().sum(1) for t in g.values()]).sum(0).sqrt()
        factor = (clip / length).clamp(max=1)
        done = (step + 1) / total
        rate = torch.where(
            done < 0.1, 10 * done, 0.5 * (1 + torch.cos(torch.pi * done.clamp(max=1)))
        )
        rate = rate * column["lr"]
        for name, w in theta.items():
            shape = (members,) + (1,) * (w.ndim - 1)
            slant = g[name] * factor.view(shape)
            first[name].lerp_(slant, 0.1)
            second[name].lerp_(slant.square(), 0.001)
            root = (second[name] / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
            move = first[name] / (1 - 0.9 ** (step + 1)) / root
            w.sub_(rate.view(shape) * (move + column["weight_decay"].view(shape) * w))
    return theta


def draw_settings(members: int, epochs: Sequence[int], seed: int) -> pd.DataFrame:
    """Random search over the paper's space; learning rates are about 300 times its own.

    Two decades about the best rate of single models on held-out images, as in the paper.
    """
    rng = np.random.default_rng(seed)
    some = rng.random((2, members)) < 0.5
    return pd.DataFrame(
        {
            "lr": 10 ** rng.uniform(-3.5, -1.5, members),
            "weight_decay": 10 ** rng.uniform(-4, -0.2, members),
            "epochs": rng.integers(epochs[0], epochs[1], members, endpoint=True),
            "smoothing": np.where(some[0], rng.uniform(0, 0.25, members), 0),
            "mixup": np.where(some[1], rng.uniform(0, 0.9, members), 0),
            "augment": rng.uniform(0, 0.5, members),
        }
    )


def plain_settings(lr: Sequence[float], epochs: int, augment: float) -> pd.DataFrame:
    """Members that differ in learning rate alone."""
    return pd.DataFrame(
        {
            "lr": lr, "weight_decay": 0.01, "epochs": epochs, "smoothing": 0.0, "mixup": 0.0,
            "augment": augment,
        }
    )  # fmt: skip


def network(kind: str, side: int, width: int) -> nn.Module:
    """An MLP with smooth activations, or a small vision transformer."""
    if kind == "vit":
        return models.ViT(image=side, patch=side // 4, d=width, layers=4, heads=4)
    return models.MLP([side * side, width, width, 10], act="gelu")


def open_kitchen(
    seed: int,
    *,
    members: int = 16,
    starts: int = 4,
    epochs: Sequence[int] = (4, 16),
    pretrain: int = 30,
    side: int = 14,
    width: int = 128,
    kind: str = "mlp",
    device: str = "cpu",
) -> Kitchen:
    """Pretrain `starts` networks on widely distorted digits, fine-tune the first on upright ones.

    Args:
        seed: of split, initialisations, settings and training.
        members: fine-tunings.
        starts: networks pretrained from different random initialisations.
        epochs: range of the fine-tunings' lengths.
        pretrain: epochs of pretraining.
        side: pixels a side, by averaging from 28.
        width: of the network.
        kind: "mlp" or "vit".
        device: where to train.
    """
    source = torch.Generator(device).manual_seed(seed)
    parts = {}
    for name, part in data.mnist5000().split(seed, **PARTS).items():
        x, y = part.tensors(device)
        parts[name] = F.adaptive_avg_pool2d(x, side), y
    with seeded(seed):
        fresh = [network(kind, side, width).to(device) for _ in range(starts)]
    stacked = {k: v.detach() for k, v in stack_module_state(fresh)[0].items()}
    broad = plain_settings([1e-2] * starts, pretrain, 0.7)
    model = fresh[0].eval()
    pretrained = train_together(model, stacked, *parts["broad"], broad, batch=64, generator=source)
    begun = unstack(pretrained)
    settings = draw_settings(members, epochs, seed)
    same = {k: v[:1].expand(members, *v.shape[1:]) for k, v in pretrained.items()}
    tuned = train_together(model, same, *parts["tune"], settings, batch=50, generator=source)
    x, y = parts["test"]
    tests = {"test": (x, y)} | {kind: (shifted(x, kind, source), y) for kind in SHIFTS}
    return Kitchen(
        model, begun[0], unstack(tuned), settings, parts["tune"], parts["held_out"], tests, begun
    )


def unstack(stacked: Stack) -> list[Stack]:
    """The states of which a stack is made."""
    count = len(next(iter(stacked.values())))
    return [{name: tensor[i] for name, tensor in stacked.items()} for i in range(count)]


# --- soups ---------------------------------------------------------------------------------------


@torch.no_grad()
def all_logits(model: nn.Module, states: Sequence[Stack], x: Tensor) -> Tensor:
    """Logits (k, n, c) of every state."""
    stacked = {name: torch.stack([s[name] for s in states]) for name in states[0]}
    return vmap(lambda weights: functional_call(model, weights, (x,)))(stacked)


def right(logits: Tensor, y: Tensor) -> Tensor:
    """Accuracy in percent over the last axis but one."""
    return 100 * (logits.argmax(-1) == y).float().mean(-1)


def pour(kitchen: Kitchen) -> tuple[dict[str, Stack], dict[str, GreedySoup]]:
    """Every soup of a kitchen by name, and how the greedy ones went.

    "ties" also adds what leaves the accuracy as it is; "smooth" decides by held-out likelihood.
    """
    model, states = kitchen.model, kitchen.states
    x, y = kitchen.held_out

    def score(state: Stack) -> float:
        return float(right(all_logits(model, [state], x)[0], y))

    def likelihood(state: Stack) -> float:
        return -float(F.cross_entropy(all_logits(model, [state], x)[0], y))

    greedy = greedy_soup(states, score)
    ties = greedy_soup(states, score, ties=True)
    smooth = greedy_soup(states, likelihood)
    logits = [{"logits": f} for f in all_logits(model, states, x)]
    ensemble = greedy_soup(logits, lambda s: float(right(s["logits"], y)))
    soups = {
        "start": kitchen.start,
        "best": states[greedy.order[0]],
        "best_smooth": states[smooth.order[0]],
        "greedy": greedy.state,
        "ties": ties.state,
        "smooth": smooth.state,
        "uniform": uniform_soup(states),
        "learned": learned_soup(model, states, x, y).state,
        "by_layer": learned_soup(model, states, x, y, by_layer=True).state,
    }
    return soups, {"greedy": greedy, "ties": ties, "smooth": smooth, "ensemble": ensemble}


def cook(
    seed: int,
    *,
    rates: Sequence[float] = RATES,
    twins: int = 3,
    control: int = 4,
    tune_epochs: int = 8,
    device: str = "cpu",
    **settings: Any,
) -> dict[str, Any]:
    """One kitchen: accuracies of all soups and of what they compete with, in percent.

    Args:
        seed: of everything.
        rates: learning rates of the study of why.
        twins: members at each of them.
        control: members of the soup of different starts.
        tune_epochs: of the study and the control.
        device: where to train.
        settings: of `open_kitchen`.

    Returns:
        ``<soup>_test``, ``<soup>_shift`` (mean over `SHIFTS`) and ``<soup>_<shift>`` for every
        soup, the mean member and the ensembles; sizes and scores of the greedy soups; arrays over
        pairs of members (``angle``, ``gain``) and over pairs of twins (``rate``, ``gap_*``).
    """
    kitchen = open_kitchen(seed, starts=control, device=device, **settings)
    model, states, tests = kitchen.model, kitchen.states, kitchen.tests
    soups, made = pour(kitchen)
    row: dict[str, Any] = {}
    for name, (x, y) in tests.items():
        own = right(all_logits(model, list(soups.values()), x), y).tolist()
        row |= {f"{soup}_{name}": value for soup, value in zip(soups, own, strict=True)}
        logits = all_logits(model, states, x)
        single = right(logits, y)
        row[f"mean_{name}"] = float(single.mean())
        row[f"oracle_{name}"] = float(single.max())
        row[f"ensemble_{name}"] = float(right(logits.mean(0), y))
        kept = list(made["ensemble"].kept)
        row[f"greedy_ensemble_{name}"] = float(right(logits[kept].mean(0), y))
    for soup in {key.removesuffix("_test") for key in row if key.endswith("_test")}:
        row[f"{soup}_shift"] = float(np.mean([row[f"{soup}_{kind}"] for kind in SHIFTS]))
    greedy = made["greedy"]
    row |= {
        "kept": len(greedy.kept),
        "kept_ties": len(made["ties"].kept),
        "kept_smooth": len(made["smooth"].kept),
        "held_out_best": greedy.scores[0],
        "held_out_greedy": greedy.scores[-1],
    }
    row |= pairs(kitchen) | different_starts(kitchen, tune_epochs, seed)
    row |= why(kitchen, rates, twins, tune_epochs, seed)
    return row


def pairs(kitchen: Kitchen) -> dict[str, Any]:
    """Angle of every pair of members, and what their mean gains over the mean of their scores."""
    (x, y), states = kitchen.tests["test"], kitchen.states
    single = right(all_logits(kitchen.model, states, x), y)
    both = list(combinations(range(len(states)), 2))
    middle = all_logits(kitchen.model, [average([states[i], states[j]]) for i, j in both], x)
    angle = angles(states, kitchen.start)
    gain = [
        float(m - (single[i] + single[j]) / 2)
        for m, (i, j) in zip(right(middle, y), both, strict=True)
    ]
    turned = [float(angle[i, j]) for i, j in both]
    rate = np.log10(kitchen.settings.lr.to_numpy())
    return {
        "angle": np.array(turned),
        "gain": np.array(gain),
        "lr_of_pair": np.array([(rate[i] + rate[j]) / 2 for i, j in both]),
        "angle_rank": float(stats.spearmanr(turned, gain).statistic),
    }


def different_starts(kitchen: Kitchen, epochs: int, seed: int) -> dict[str, float]:
    """Soups of members from one start and from different ones, and of the starts themselves."""
    count = len(kitchen.others)
    source = torch.Generator(kitchen.tune[0].device).manual_seed(seed + 1)
    settings = plain_settings([3e-3] * count, epochs, 0.25)
    own = {name: torch.stack([s[name] for s in kitchen.others]) for name in kitchen.start}
    shared = {name: t[:1].expand_as(t) for name, t in own.items()}
    both = {name: torch.cat([own[name], shared[name]]) for name in own}
    tuned = unstack(
        train_together(
            kitchen.model, both, *kitchen.tune, pd.concat([settings, settings]), batch=50,
            generator=source,
        )
    )  # fmt: skip
    x, y = kitchen.tests["test"]
    groups = {"apart": tuned[:count], "shared": tuned[count:], "random": kitchen.others}
    out = {}
    for name, group in groups.items():
        out[f"{name}_members"] = float(right(all_logits(kitchen.model, group, x), y).mean())
        out[f"{name}_soup"] = float(right(all_logits(kitchen.model, [average(group)], x)[0], y))
    return out


def why(
    kitchen: Kitchen, rates: Sequence[float], twins: int, epochs: int, seed: int
) -> dict[str, Any]:
    """Soup against ensemble of two members of one learning rate: true gap and approximation."""
    source = torch.Generator(kitchen.tune[0].device).manual_seed(seed + 2)
    settings = plain_settings(np.repeat(rates, twins).tolist(), epochs, 0.25)
    same = {k: v.expand(len(settings), *v.shape) for k, v in kitchen.start.items()}
    tuned = unstack(
        train_together(kitchen.model, same, *kitchen.tune, settings, batch=50, generator=source)
    )
    x, y = kitchen.tests["test"]
    rows = []
    for g, rate in enumerate(rates):
        group = tuned[g * twins : (g + 1) * twins]
        angle = angles(group, kitchen.start)
        for i, j in combinations(range(twins), 2):
            gap = soup_gap(kitchen.model, group[i], group[j], x, y)
            f = all_logits(kitchen.model, [group[i], group[j], average([group[i], group[j]])], x)
            score = right(f, y)
            rows.append(
                {
                    "rate": rate, "gap_true": gap.true, "gap_approx": gap.approx,
                    "pair_angle": float(angle[i, j]),
                    "soup_gain": float(score[2] - score[:2].mean()),
                    "soup_minus_ensemble": float(score[2] - right(f[:2].mean(0), y)),
                }
            )  # fmt: skip
    table = pd.DataFrame(rows)
    rank = stats.spearmanr(table.gap_true, table.gap_approx).statistic
    arrays: dict[str, Any] = {str(name): table[name].to_numpy() for name in table}
    return arrays | {"gap_rank": float(rank)}


# --- the released models -------------------------------------------------------------------------


def released() -> pd.DataFrame | None:
    """The authors' 72 fine-tuned CLIP ViT-B/32, their greedy and their uniform soup, in percent.

    Returns:
        A row a model, by falling held-out accuracy, soups last: ``model``, ``held_out``, the six
        test sets of `RELEASED`, ``shift`` (mean of the last five) and the hyper-parameters; None
        where the files are not on this machine.
    """
    folder = data.authors("model_soups")
    if folder is None:
        return None
    parts = [
        pd.read_json(folder / f"{name}_results.jsonl", lines=True)
        for name in ("individual_model", "uniform_soup", "greedy_soup")
    ]
    parts[0] = parts[0].sort_values("ImageNet2p", ascending=False, kind="stable")
    table = pd.concat(parts, ignore_index=True)
    table = table.rename(columns={"model_name": "model", "ImageNet2p": "held_out"})
    table[["held_out", *RELEASED]] *= 100
    table["shift"] = table[list(RELEASED[1:])].mean(axis=1)
    settings = json.loads((folder / "hparam_info.json").read_text(encoding="utf8"))
    known = pd.DataFrame(settings).T.rename_axis("model").reset_index()
    numbers = ["lr", "wd", "epochs", "smoothing", "mix"]
    known[numbers] = known[numbers].apply(pd.to_numeric)
    return table.merge(known[["model", "aug", *numbers]], on="model", how="left")
