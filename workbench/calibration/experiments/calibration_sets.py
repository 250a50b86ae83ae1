"""Calibration sets on records: copy what matters, guess what may.

An input is a record of fields, each with a level and a value; its reference "summary" holds the
values of all high fields, some of the middle ones and no low one. Two transformers are trained on
references, diverse beam search with both fills a pool of candidates, each strategy picks four for
every input, and the first model is tuned on them with 0.1 MLE + ranking loss. The metric is
unigram F1 (ROUGE-1) with the reference; the gain is its rise on held-out records.

All sizes were fixed on seeds of their own (1000 to 1002), looking at random sets only: training
stops where the pool's best candidates still beat the model clearly, tuning passes once over its
inputs, and its learning rate is one at which the ranking loss falls by about a tenth.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench import lab
from workbench.calibration import calibration_sets as cs
from workbench.calibration.experiments.attentiveness import small_gpt, token_loss

PAD, EOS, SEP, HIGH, MIDDLE, LOW = range(6)
FIELDS, VALUES = 6, 12
VOCABULARY = 6 + FIELDS * VALUES
SOURCE, LONGEST = 2 * FIELDS + 1, FIELDS + 1
LEVELS = (0.4, 0.35, 0.25)  # shares of high, middle and low
KEPT = (0.8, 0.3)  # how often a reference keeps a middle field with an even, an odd value
STATISTICS = ("margin", "surprise", "diversity", "metric", "length", "beam")


def records(n: int, rng: np.random.Generator) -> tuple[Int[Tensor, "n s"], Int[Tensor, "n t"]]:
    """Sources (level and value of each field in random order, then SEP) and references."""
    field = rng.permuted(np.tile(np.arange(FIELDS), (n, 1)), axis=1)
    value = rng.integers(VALUES, size=(n, FIELDS))
    level = rng.choice([HIGH, MIDDLE, LOW], p=LEVELS, size=(n, FIELDS))
    level[:, 0] = np.where((level == HIGH).any(1), level[:, 0], HIGH)
    token = 6 + VALUES * field + value
    source = np.stack([level, token], 2).reshape(n, -1)
    chance = np.where(value % 2 == 0, *KEPT)
    kept = (level == HIGH) | ((level == MIDDLE) & (rng.random((n, FIELDS)) < chance))
    order = np.argsort(~kept, axis=1, kind="stable")
    reference = np.full((n, LONGEST), PAD)
    reference[:, :-1] = np.where(
        np.take_along_axis(kept, order, 1), np.take_along_axis(token, order, 1), PAD
    )
    np.put_along_axis(reference, kept.sum(1, keepdims=True), EOS, 1)
    source = np.concatenate([source, np.full((n, 1), SEP)], 1)
    return torch.tensor(source), torch.tensor(reference)


def score(found: Int[Tensor, "n c t"], reference: Int[Tensor, "n t"]) -> Float[Tensor, "n c"]:
    """Unigram F1 of candidates with their reference; the end token is no word."""
    words = (x.masked_fill(x == EOS, PAD) for x in (found, reference[:, None]))
    return cs.token_f1(*words, pad=PAD)


@torch.no_grad()
def diverse_beam(
    model: Callable[[Tensor], Any],
    prefix: Int[Tensor, "b t"],
    *,
    groups: int,
    width: int = 1,
    penalty: float = 1.0,
    max_new: int,
    eos: int,
    pad: int,
) -> tuple[Int[Tensor, "b c max_new"], Float[Tensor, "b c"]]:
    """Diverse beam search: groups take turns and avoid the tokens chosen before them at this step.

    The penalty steers the choice of tokens; the log-probability that orders a group's beams and is
    returned is the model's own. With one group it is beam search. The paper takes as many groups
    as candidates, each of width one, and a penalty of 1.

    Args:
        model: maps ids (b, t) to logits (b, t, V), or to an object with ``.logits``.
        prefix: inputs, all of one length.
        groups, width: number of groups and of beams in each; c = groups * width candidates.
        penalty: taken off a token's log-probability for every beam that has just chosen it.
        max_new: longest output in tokens.
        eos, pad: end token (kept in the output) and filler after it.

    Returns:
        Candidates in the order of groups (best first within a group) and their log-probabilities.
    """
    b, start = prefix.shape
    c, device = groups * width, prefix.device
    ids = prefix[:, None].expand(b, c, start)
    logp = torch.full((b, groups, width), -math.inf, device=device)
    logp[..., 0] = 0.0  # the beams of a group are equal at first: one of them speaks
    done = torch.zeros(b, c, dtype=torch.bool, device=device)
    for _ in range(max_new):
        out = model(ids.reshape(b * c, -1))
        step = getattr(out, "logits", out)[:, -1].log_softmax(-1).view(b, groups, width, -1)
        vocabulary = step.shape[-1]
        frozen = torch.full((vocabulary,), -math.inf, device=device)
        frozen[pad] = 0.0
        step = torch.where(done.view(b, groups, width, 1), frozen, step)
        used = torch.zeros(b, 1, vocabulary, device=device)
        origin, token = [], []
        for g in range(groups):
            total = logp[:, g, :, None] + step[:, g]
            free = ~done.view(b, groups, width)[:, g, :, None]
            chosen = (total - penalty * used * free).flatten(1).topk(width, dim=1).indices
            logp[:, g] = total.flatten(1).gather(1, chosen)
            origin.append(g * width + chosen // vocabulary)
            token.append(chosen % vocabulary)
            used[:, 0].scatter_add_(1, token[-1], (token[-1] != pad).float())
        beam, new = torch.cat(origin, 1), torch.cat(token, 1)
        ids = torch.cat([ids.gather(1, beam[..., None].expand_as(ids)), new[..., None]], -1)
        done = done.gather(1, beam) | (new == eos)
        if done.all():
            break
    found = torch.nn.functional.pad(
        ids[..., start:], (0, max_new - ids.shape[-1] + start), value=pad
    )
    return found, logp.flatten(1)


def train(seed: int, d: int, steps: int, device: str) -> torch.nn.Module:
    """A transformer trained on references by maximum likelihood."""
    source, reference = records(32 * steps, np.random.default_rng([seed, d]))
    ids = torch.cat([source, reference], 1)
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == PAD, -100)
    targets[:, : SOURCE - 1] = -100
    model = small_gpt(VOCABULARY, d, 2, ids.shape[1], seed=seed)
    lab.train.fit(
        model, token_loss, (ids[:, :-1], targets), steps=steps, batch_size=32, lr=4e-3,
        schedule="cosine", warmup=10, weight_decay=0.01, clip=1.0, seed=seed, device=device,
    )  # fmt: skip
    return model


def make_pool(
    models: list[torch.nn.Module], source: Tensor, reference: Tensor, each: int
) -> tuple[Tensor, cs.Pool]:
    """Candidates of all models, ``each`` from a model, and what the strategies look at."""
    beams = [
        diverse_beam(model, source, groups=each, max_new=LONGEST, eos=EOS, pad=PAD)[0]
        for model in models
    ]
    found = torch.cat(beams, 1)
    n, c = found.shape[:2]
    words = found.masked_fill(found == EOS, PAD)
    pool = cs.Pool(
        metric=score(found, reference),
        beam=np.tile(np.arange(c) % each, (n, 1)),
        length=(found != PAD).sum(-1),
        overlap=cs.token_f1(words[:, :, None], words[:, None], pad=PAD),
        own=np.tile(np.arange(c) < each, (n, 1)),
    )
    return found, pool


class Sets(torch.nn.Module):
    """A model applied to several sequences of each input: ids (b, c, t) to logits (b, c, t, V)."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of every sequence."""
        return self.model(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])


def calibration_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """0.1 MLE on the reference, which stands last, plus the ranking loss on the candidates."""
    mask = ids != PAD
    mask[..., :SOURCE] = False
    logp, lengths = cs.sequence_logp(
        lambda _: logits.flatten(0, 1), ids.flatten(0, 1), mask.flatten(0, 1)
    )
    logp, lengths = (x.view(ids.shape[:2]) for x in (logp, lengths))
    mle = -(logp[:, -1] / lengths[:, -1]).mean()
    return 0.1 * mle + cs.rank_loss(logp[:, :-1], lengths[:, :-1])


def tune(
    model: torch.nn.Module,
    source: Tensor,
    chosen: Tensor,
    reference: Tensor,
    *,
    lr: float,
    seed: int,
) -> torch.nn.Module:
    """A copy of the model, tuned once over calibration sets (n, k, t), best candidate first."""
    tuned = copy.deepcopy(model)
    outputs = torch.cat([chosen, reference[:, None]], 1)
    ids = torch.cat([source[:, None].expand(-1, outputs.shape[1], -1), outputs], 2)
    lab.train.fit(
        Sets(tuned), calibration_loss, (ids[..., :-1], ids), epochs=1, batch_size=8, lr=lr,
        clip=1.0, seed=seed, device=source.device,
    )  # fmt: skip
    return tuned


def measure(
    seed: int,
    steps: int = 300,
    inputs: int = 288,
    held_out: int = 384,
    each: int = 10,
    d: int = 64,
    lr: float = 1e-4,
    strategies: tuple[str, ...] = cs.RANK_STRATEGIES,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train, fill the pool, tune with every strategy.

    Returns:
        ``gain`` and each of ``STATISTICS`` as arrays over the strategies, ``gain_<strategy>``, F1
        ``before`` and of the pool's best candidates (``oracle``), and Spearman's correlations over
        strategies ``rho_margin`` and ``rho_surprise``.
    """
    models = [train(seed, d, steps, device), train(seed, d // 2, steps, device)]
    rng = np.random.default_rng([seed, 0])
    source, reference, fresh, wanted = (
        x.to(device) for x in (*records(inputs, rng), *records(held_out, rng))
    )
    found, pool = make_pool(models, source, reference, each)

    def held_out_f1(model: torch.nn.Module) -> float:
        out = diverse_beam(model, fresh, groups=1, max_new=LONGEST, eos=EOS, pad=PAD)[0]
        return score(out, wanted).mean().item()

    before = held_out_f1(models[0])
    out: dict[str, Any] = {"before": before, "oracle": float(pool.metric.max(1).mean())}
    table = []
    for i, strategy in enumerate(strategies):
        idx = cs.select(pool, strategy, rng=np.random.default_rng([seed, 1, i]))
        places = torch.as_tensor(idx, device=found.device)[..., None].expand(-1, -1, LONGEST)
        tuned = tune(models[0], source, found.gather(1, places), reference, lr=lr, seed=seed)
        stats = cs.set_stats(pool.take(idx))
        gain = held_out_f1(tuned) - before
        table.append({"gain": gain, **{name: float(stats[name].mean()) for name in STATISTICS}})
        out[f"gain_{strategy}"] = gain
    frame = pd.DataFrame(table)
    for name in STATISTICS[:2]:
        out[f"rho_{name}"] = float(cs.spearman(frame["gain"].to_numpy(), frame[name].to_numpy()))
    return out | {name: frame[name].to_numpy() for name in frame}


def strategy_table(
    frame: pd.DataFrame, strategies: tuple[str, ...] = cs.RANK_STRATEGIES
) -> pd.DataFrame:
    """The frame of ``measure``, one row a seed and strategy."""
    return pd.DataFrame(
        [
            {"seed": row["seed"], "strategy": name}
            | {column: float(row[column][i]) for column in ("gain", *STATISTICS)}
            for row in frame.to_dict("records")
            for i, name in enumerate(strategies)
        ]
    )
