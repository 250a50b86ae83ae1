"""Same minimal loss, different flatness and transfer: checkpoints, sizes, and a look-up table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from workbench.lab import seeded
from workbench.loss_landscapes.implicit_bias_lm import (
    Contexts,
    HMMLanguage,
    MaskedLM,
    flatten_sgd,
    hessian_trace_fisher,
    pretrain,
    probe,
    toy_flow,
    toy_logits,
)

CURVES = ("step", "excess", "trace", "trace_error", "trace_wide", "accuracy")
REFERENCE = 96  # width at which traces of different widths are compared


def language(
    seed: int, n_states: int = 4, vocab: int = 8, length: int = 3, concentration: float = 0.4
) -> tuple[HMMLanguage, Contexts]:
    """The first random language whose context matters and whose task is no majority vote.

    The exact minimum must lie 0.08 nats under the loss that ignores the context, and no hidden
    state may be the answer in more than half of the contexts.
    """
    rng = np.random.default_rng(seed)
    while True:
        found = HMMLanguage.random(n_states, vocab, concentration=concentration, random_state=rng)
        contexts = found.contexts(length)
        largest = torch.bincount(contexts.labels, weights=contexts.weights).max()
        if blind_loss(contexts) - contexts.minimal_loss > 0.08 and largest <= 0.5:
            return found, contexts


def blind_loss(contexts: Contexts) -> float:
    """Entropy of the hidden word when nothing is seen, nats."""
    return float(torch.special.entr(contexts.weights @ contexts.targets).sum())


def solutions(
    seed: int,
    *,
    d: int,
    steps: int = 1200,
    batch: int = 400,
    checkpoints: Sequence[float] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    labels: int = 50,
    repeats: int = 20,
    n_states: int = 4,
    vocab: int = 8,
    length: int = 3,
    layers: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Pre-train one model and measure every checkpoint, exactly where the language allows it.

    Returns:
        Per checkpoint ``step``, ``excess`` (nats above the minimum, exact), ``trace`` with its
        standard error, ``trace_wide`` (of the same function at width 96) and ``accuracy`` of the
        probe; of the language ``minimal_loss`` and ``blind_loss``; ``lookup`` and ``lookup_log``,
        the probe's accuracy on a table of the true conditionals and of their logarithms.
    """
    words, contexts = language(seed, n_states, vocab, length)
    inputs = contexts.tokens.to(device), contexts.positions.to(device)
    with seeded(seed):
        model = MaskedLM(vocab, length, d, layers).to(device)
    kept = pretrain(
        model, words, length=length, steps=steps, batch=batch, generator=seed,
        checkpoints=[round(share * steps) for share in checkpoints],
    )  # fmt: skip

    def task(features: torch.Tensor) -> float:
        return probe(
            features, contexts.labels, weights=contexts.weights, count=labels, repeats=repeats,
            random_state=seed,
        )  # fmt: skip

    rows = []
    for step, state in kept.items():
        model.load_state_dict(state)
        with torch.no_grad():
            excess, features = contexts.excess(model(*inputs)), model.features(*inputs)
        found = hessian_trace_fisher(model, inputs, weights=contexts.weights, generator=seed)
        wide = found.enlarged(REFERENCE / d)
        rows.append((step, excess, found.value, found.error, wide, task(features)))
    return {
        **dict(zip(CURVES, np.array(rows).T, strict=True)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "minimal_loss": contexts.minimal_loss,
        "blind_loss": blind_loss(contexts),
        "lookup": task(contexts.targets),
        "lookup_log": task(contexts.targets.log()),
        "majority": float(torch.bincount(contexts.labels, weights=contexts.weights).max()),
    }


def by_checkpoint(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a checkpoint out of the rows of `solutions`."""
    return frame[["seed", "d", *CURVES]].explode([*CURVES], ignore_index=True).astype(float)


def correlations(frame: pd.DataFrame, within: float = 0.01) -> pd.DataFrame:
    """Per seed: how well trace and loss rank the checkpoints of equal loss.

    Args:
        frame: rows of `solutions`.
        within: nats above the minimum up to which a checkpoint counts.

    Returns:
        One row a seed: Spearman correlations with the probe's accuracy of the trace at one width
        (``rho_trace``), of the trace as it is (``rho_own``) and of the excess loss (``rho_loss``),
        each with the sign turned as ``by_trace``, ``by_own``, ``by_loss`` (higher: lower values go
        with better transfer); how many checkpoints counted; the best, worst, last accuracies.
        Seeds with fewer than six are left out.
    """
    rows = []
    for seed, group in by_checkpoint(frame).groupby("seed"):
        equal = group[group.excess <= within]
        if len(equal) < 6:
            continue
        named = {"trace": "trace_wide", "own": "trace", "loss": "excess"}
        rho = {q: float(spearmanr(equal[c], equal.accuracy)[0]) for q, c in named.items()}
        top = frame[frame.seed == seed].sort_values("d").iloc[-1]
        rows.append(
            {
                "seed": int(top.seed),
                **{f"rho_{q}": value for q, value in rho.items()},
                **{f"by_{q}": -value for q, value in rho.items()},
                "checkpoints": len(equal),
                "worst": float(equal.accuracy.min()),
                "best": float(equal.accuracy.max()),
                "last": float(top.accuracy[-1]),
                "lookup": float(top["lookup"]),
                "lookup_log": float(top["lookup_log"]),
            }
        )
    return pd.DataFrame(rows)


def drift(
    seed: int,
    *,
    lr: float = 0.1,
    steps: int = 1200,
    runs: int = 200,
    batch: int = 1,
    u: float = 2.5,
    v: float = 0.4,
    every: int = 40,
) -> dict[str, Any]:
    """SGD on drawn words in the two-parameter model, from its minimum, against the flow.

    Returns:
        ``rate`` measured from the mean of u^2 - v^2 over the first half (per unit of
        lr^2 steps / batch), ``theory`` = p(1 - p), their ``ratio``; mean paths of u and v and their
        standard deviations at ``step``, and the flow's u and v.
    """
    p = torch.sigmoid(torch.tensor(u * v, dtype=torch.float64))
    start = torch.tensor([[u, v]], dtype=torch.float64).expand(runs, 2)
    truth = torch.stack([1 - p, p])[None]
    path = flatten_sgd(
        toy_logits, start, truth, lr=lr, steps=steps, batch=batch, every=every, generator=seed
    )
    gap = (path[..., 0] ** 2 - path[..., 1] ** 2).mean(1)
    half = len(gap) // 2
    time = half * every * lr**2 / batch
    rate = -float((gap[half] / gap[0]).log()) / time
    at = np.arange(len(path)) * every
    flow = torch.stack(toy_flow(u, v, lr, at, batch=batch), 1)
    return {
        "rate": rate,
        "theory": float(p * (1 - p)),
        "ratio": rate / float(p * (1 - p)),
        "product": float(path[-1].prod(1).mean()),
        "step": at,
        **{f"{q}_mean": path[..., i].mean(1).numpy() for i, q in enumerate("uv")},
        **{f"{q}_sd": path[..., i].std(1).numpy() for i, q in enumerate("uv")},
        **{f"{q}_flow": flow[:, i].numpy() for i, q in enumerate("uv")},
    }
