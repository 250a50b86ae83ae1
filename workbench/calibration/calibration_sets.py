r"""Calibration sets: which candidate summaries teach a model to rank summaries.

After maximum-likelihood training, a model is tuned further on small sets of candidate outputs y_i
of the same input x, so that likelihood orders them as a metric does. With the candidates sorted
best first,

.. math::
    s_i = \alpha\,\frac{\log P(y_i \mid x)}{|y_i|^{\lambda}}, \qquad
    L_{rank} = \sum_{g \ge 1} \operatorname{mean}_i \max(0,\; s_{i+g} - s_i + g\,m), \qquad
    L = 0.1\,L_{MLE} + L_{rank}

for relevance, and for faithfulness, with cosine similarities of pooled decoder states and for every
pair (a, b) of positives,

.. math::
    L_{contrast} = -\operatorname{mean}_{a \ne b} \log
        \frac{e^{sim(a, b)}}{\sum_{j \ne a} e^{sim(a, j)}}, \qquad L = L_{MLE} + L_{contrast}.

The paper's question is which subset of a large pool of candidates should form the set: ``select``
and ``select_contrast`` hold its strategies, ``set_stats`` what it correlates with the gain.

Reference: Adams, Nguyen, Smith, Xia, Xie, Ostropolets, Deb, Chen, Naumann and Elhadad (2023),
arXiv 2305.07615, sections 4 (objectives), 5 (pools and strategies) and 6 (correlates). The ranking
loss is BRIO's (Liu et al. 2022), the contrast loss CLIFF's (Cao and Wang 2021).

Not included: mask-and-fill negatives and paraphrased positives (they need two further pretrained
models; any candidate enters the pool the same way), the decoder that fills the pool (diverse beam
search; the experiment has one), the unlikelihood objective (used only in an ablation), and
self-BLEU: diversity is measured by pairwise unigram overlap, which has a closed form over subsets.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.lab import checks

RANK_STRATEGIES = (
    "random", "extremes", "average", "max_metric", "min_metric", "max_margin", "min_margin",
    "max_diversity", "min_diversity", "top_beam", "bottom_beam", "wide_beam", "long", "short",
    "max_surprise", "min_surprise",
)  # fmt: skip
CONTRAST_STRATEGIES = (
    "random", "max_margin", "min_margin", "average", "max_diversity", "min_diversity",
    "easy", "hard", "max_extractive_gap",
)  # fmt: skip
SUBSETS = {"margin": 5000, "diversity": 200, "surprise": 100}  # subsets looked at for one input


def rank_loss(
    logp: Float[Tensor, "b c"],
    lengths: Int[Tensor, "b c"],
    *,
    margin: float = 1e-3,
    scale: float = 0.1,
    length_penalty: float = 2.0,
) -> Float[Tensor, ""]:
    """Margin ranking loss over all pairs of candidates; the margin grows with the rank gap.

    Args:
        logp: log-probabilities of the candidates, summed over tokens, best candidate first.
        lengths: their numbers of tokens.
        margin: m; between neighbours in rank.
        scale: alpha. The scripts of the paper use 0.1.
        length_penalty: lambda, 2 in the paper except for clinical notes, where it is 1.

    Returns:
        The loss; 0 exactly when every pair is ordered with a gap of at least g m.

    Raises:
        ValueError: shapes differ, fewer than two candidates, NaN, or a length below one.
    """
    logp = checks.as_floats(torch.as_tensor(logp), "logp", ndim=2)
    lengths = torch.as_tensor(lengths, device=logp.device)
    if lengths.shape != logp.shape:
        raise ValueError(f"lengths: expected shape {tuple(logp.shape)}, got {tuple(lengths.shape)}")
    if (lengths < 1).any():
        raise ValueError("lengths: expected at least one token in every candidate")
    b, c = logp.shape
    if c < 2:
        raise ValueError("logp: expected at least two candidates")
    scores = scale * logp / lengths.to(logp.dtype) ** length_penalty
    i, j = torch.triu_indices(c, c, offset=1, device=logp.device)
    gap = (j - i).to(scores.dtype)
    hinge = (scores[:, j] - scores[:, i] + margin * gap).clamp(min=0)
    return (hinge / (b * (c - gap))).sum()


def contrast_loss(
    states: Float[Tensor, "b c d"], n_pos: int, *, both_ways: bool = True
) -> Float[Tensor, ""]:
    """Pull the positives of a set together, away from its negatives.

    Args:
        states: one vector a candidate (``ContrastHead``), positives first.
        n_pos: number of positives, at least two.
        both_ways: each pair of positives counts with either one as the anchor, so that their order
            does not matter. The released code anchors only at the first one (False).

    Returns:
        Mean over inputs and pairs. Orthogonal states give log(c - 1).

    Raises:
        ValueError: fewer than two positives, more positives than candidates, or a zero vector.
    """
    states = checks.as_floats(torch.as_tensor(states), "states", ndim=3)
    n_pos, c = checks.count(n_pos, "n_pos", minimum=2), states.shape[1]
    if n_pos > c:
        raise ValueError(f"n_pos: expected at most {c} (the candidates), got {n_pos}")
    norms = states.norm(dim=-1, keepdim=True)
    if (norms == 0).any():
        raise ValueError("states: holds a zero vector; its direction is undefined")
    unit = states / norms
    sim = unit @ unit.transpose(1, 2)
    itself = torch.eye(c, dtype=torch.bool, device=sim.device)
    log_share = sim - sim.masked_fill(itself, -math.inf).logsumexp(-1, keepdim=True)
    a, b = torch.triu_indices(n_pos, n_pos, offset=1, device=sim.device)
    pairs = log_share[:, a, b]
    return -(torch.cat([pairs, log_share[:, b, a]], 1) if both_ways else pairs).mean()


class ContrastHead(torch.nn.Module):
    """Linear projection of decoder states, then their mean over a candidate's tokens.

    Args:
        d: width of the decoder.
        out: width of the projection; the paper keeps d.
    """

    def __init__(self, d: int, out: int | None = None) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(d, out or d)

    def forward(
        self, states: Float[Tensor, "b c t d"], mask: Bool[Tensor, "b c t"]
    ) -> Float[Tensor, "b c o"]:
        """Pooled vectors; ``mask`` is True at the candidate's own tokens."""
        if not mask.any(-1).all():
            raise ValueError("mask: a candidate has no token")
        weight = mask.unsqueeze(-1).to(states.dtype)
        return (self.projection(states) * weight).sum(2) / weight.sum(2)


def sequence_logp(
    model: Callable[[Tensor], Any], ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]
) -> tuple[Float[Tensor, " b"], Int[Tensor, " b"]]:
    """Log-probability of the masked tokens given all before them, and their number.

    Differentiable; dropout is as the model has it, so score candidates in evaluation mode.

    Args:
        model: maps ids (b, t) to logits (b, t, V), or to an object with ``.logits``.
        ids: input, output and padding in one row.
        mask: True at the output's tokens (end token included), never at the first position.
    """
    if mask[:, 0].any():
        raise ValueError("mask: the first token has nothing before it and cannot be scored")
    out = model(ids[:, :-1])
    logp = getattr(out, "logits", out).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (logp * mask[:, 1:]).sum(1), mask.sum(1)


def token_f1(a: Int[Tensor, "*n s"], b: Int[Tensor, "*n t"], *, pad: int) -> Float[Tensor, " *n"]:
    """Unigram F1 (ROUGE-1 without stemming): twice the multiset overlap over both lengths.

    The leading dimensions broadcast, so ``token_f1(x[:, :, None], x[:, None])`` gives all pairs.
    The k-th occurrence of a token in one text matches the k-th in the other: no vocabulary needed.

    Args:
        a, b: token ids; ``pad`` marks what is not text. Two empty texts score 0.
    """
    (ka, na), (kb, nb) = (_occurrences(x, pad) for x in (a, b))
    match = (a.unsqueeze(-1) == b.unsqueeze(-2)) & (ka.unsqueeze(-1) == kb.unsqueeze(-2))
    overlap = (match & (a != pad).unsqueeze(-1)).sum((-1, -2))
    return 2 * overlap / (na + nb).clamp(min=1)


def _occurrences(ids: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """How often each token has occurred before, and the number of tokens."""
    same = (ids.unsqueeze(-1) == ids.unsqueeze(-2)).tril(-1)
    return same.sum(-1), (ids != pad).sum(-1)


@dataclass(frozen=True)
class Pool:
    """Candidates of n inputs, c each, described by numbers.

    Attributes:
        metric: (n, c) what calibration is to improve; higher is better.
        beam: (n, c) rank that the candidate's model gives it (0: the model's favourite).
        length: (n, c) tokens.
        overlap: (n, c, c) pairwise lexical overlap in [0, 1]; needed for diversity.
        own: (n, c) True for candidates of the model to be calibrated; surprise is selected among
            them. None: all.
        positive: (n, c) True for faithful candidates; needed by ``select_contrast``.
        likelihood: (n, c) model score; needed by its strategies easy and hard.
        density: (n, c) how extractive a candidate is; needed by ``max_extractive_gap``.
    """

    metric: np.ndarray
    beam: np.ndarray | None = None
    length: np.ndarray | None = None
    overlap: np.ndarray | None = None
    own: np.ndarray | None = None
    positive: np.ndarray | None = None
    likelihood: np.ndarray | None = None
    density: np.ndarray | None = None

    def __post_init__(self) -> None:
        metric = checks.to_numpy(checks.as_floats(self.metric, "metric", ndim=2))
        object.__setattr__(self, "metric", metric)
        n, c = metric.shape
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value is None:
                continue
            value = checks.to_numpy(checks.as_array(value, field.name))
            expected = (n, c, c) if field.name == "overlap" else (n, c)
            if value.shape != expected:
                raise ValueError(f"{field.name}: expected shape {expected}, got {value.shape}")
            object.__setattr__(self, field.name, value)

    def need(self, name: str) -> np.ndarray:
        """One of the descriptions, or an error that says it is missing."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"pool: this strategy needs {name!r}, which the pool does not have")
        return value

    def take(self, idx: np.ndarray) -> Pool:
        """The pool that holds, for each input, the candidates ``idx`` (n, k)."""
        rows = np.arange(len(idx))[:, None]
        taken = {
            f.name: None if getattr(self, f.name) is None else getattr(self, f.name)[rows, idx]
            for f in dataclasses.fields(self)
            if f.name != "overlap"
        }
        if self.overlap is not None:
            taken["overlap"] = self.overlap[rows[..., None], idx[:, :, None], idx[:, None]]
        return Pool(**taken)


def select(
    pool: Pool, strategy: str, k: int = 4, *, rng: np.random.Generator | int | None = None
) -> Int[np.ndarray, "n k"]:
    """Choose k candidates of every input for the ranking loss.

    Strategies: ``random``; by metric rank: ``extremes`` (half best, half worst), ``average`` (the
    middle), ``max_metric``, ``min_metric``; by subset: ``max_margin`` and ``min_margin`` (mean
    metric gap between neighbours), ``max_diversity`` and ``min_diversity``, ``max_surprise`` and
    ``min_surprise`` (disagreement of metric and model rank); by model rank: ``top_beam``,
    ``bottom_beam``, ``wide_beam`` (half, half); ``long`` and ``short``. Subset strategies look at
    all subsets or, where these are many, at random ones: 5,000 for margin, 200 for diversity, 100
    for surprise. Ties are broken at random.

    Args:
        pool: the candidates.
        strategy: one of ``RANK_STRATEGIES``.
        k: size of the set, even for strategies made of two halves.
        rng: generator or seed.

    Returns:
        (n, k) column indices, best metric first.
    """
    checks.one_of(strategy, RANK_STRATEGIES, "strategy")
    rng = checks.as_rng(rng, "rng")
    n, c = pool.metric.shape
    k = checks.count(k, "k", minimum=2)
    if k > c:
        raise ValueError(f"k: expected at most {c} (the candidates of an input), got {k}")
    if k % 2 and strategy in ("extremes", "wide_beam"):
        raise ValueError(f"k: {strategy!r} needs an even size, got {k}")

    kind = strategy.removeprefix("max_").removeprefix("min_")
    if kind in SUBSETS:
        allowed = None
        if kind == "surprise" and pool.own is not None:
            allowed = pool.own.astype(bool)
            if (allowed.sum(1) < k).any():
                raise ValueError(f"own: expected at least {k} candidates of the model itself")
        idx = _best_subset(pool, kind, strategy[:3] == "max", k, rng, allowed)
    else:
        key = {
            "random": lambda: np.zeros((n, c)), "top_beam": lambda: pool.need("beam"),
            "bottom_beam": lambda: -pool.need("beam"), "wide_beam": lambda: pool.need("beam"),
            "long": lambda: -pool.need("length"), "short": lambda: pool.need("length"),
            "min_metric": lambda: pool.metric,
        }.get(strategy, lambda: -pool.metric)()  # fmt: skip
        order = _argsort(key, rng)
        half = k // 2
        if strategy in ("extremes", "wide_beam"):
            idx = np.concatenate([order[:, :half], order[:, c - half :]], 1)
        elif strategy == "average":
            idx = order[:, (c - k) // 2 : (c - k) // 2 + k]
        else:
            idx = order[:, :k]
    best_first = np.argsort(-np.take_along_axis(pool.metric, idx, 1), axis=1, kind="stable")
    return np.take_along_axis(idx, best_first, 1)


def select_contrast(
    pool: Pool,
    strategy: str,
    n_pos: int = 2,
    n_neg: int = 2,
    *,
    rng: np.random.Generator | int | None = None,
) -> Int[np.ndarray, "n k"]:
    """Choose positives and negatives of every input for the contrast loss.

    Strategies: ``random``; ``max_margin`` (most faithful positives, least faithful negatives),
    ``min_margin`` (the reverse), ``average`` (the middle of both); ``max_diversity`` and
    ``min_diversity`` within either group; ``easy`` (likely positives, unlikely negatives),
    ``hard`` (the reverse); ``max_extractive_gap`` (extractive positives, abstractive negatives).

    Returns:
        (n, n_pos + n_neg) column indices, positives first.
    """
    checks.one_of(strategy, CONTRAST_STRATEGIES, "strategy")
    rng = checks.as_rng(rng, "rng")
    positive = pool.need("positive").astype(bool)
    sides = []
    groups = ((1, positive, n_pos, "n_pos"), (-1, ~positive, n_neg, "n_neg"))
    for sign, allowed, size, name in groups:
        size = checks.count(size, name)
        if (allowed.sum(1) < size).any():
            row = int((allowed.sum(1) < size).argmax())
            raise ValueError(f"positive: row {row} has fewer than {name} = {size} such candidates")
        if strategy.endswith("diversity"):
            sides.append(_best_subset(pool, "diversity", strategy[:3] == "max", size, rng, allowed))
            continue
        key = {
            "random": lambda: np.zeros(positive.shape),
            "easy": lambda s=sign: -s * pool.need("likelihood"),
            "hard": lambda s=sign: s * pool.need("likelihood"),
            "max_extractive_gap": lambda s=sign: -s * pool.need("density"),
            "min_margin": lambda s=sign: s * pool.metric,
        }.get(strategy, lambda s=sign: -s * pool.metric)()
        order = _argsort(np.where(allowed, key, np.inf), rng)
        first = (allowed.sum(1) - size) // 2 if strategy == "average" else np.zeros(len(order), int)
        sides.append(np.take_along_axis(order, first[:, None] + np.arange(size), 1))
    return np.concatenate(sides, 1)


def set_stats(subset: Pool) -> dict[str, np.ndarray]:
    """What the paper correlates with the gain, for each input: arrays of shape (n,).

    ``metric`` (mean), ``margin`` (mean gap between neighbours in metric, that is, range / (k - 1)),
    and, where the pool knows them: ``surprise`` (minus Spearman's correlation of metric and model
    rank, -1 when they agree, 0 when either is constant), ``beam``, ``length``, ``diversity``
    (1 - mean pairwise overlap); with positives: ``faithful_gap``, ``likelihood_gap`` and
    ``extractive_gap`` (mean over positives minus mean over negatives; NaN without both).
    """
    k = subset.metric.shape[1]
    stats = {
        "metric": subset.metric.mean(1),
        "margin": np.ptp(subset.metric, axis=1) / max(1, k - 1),
    }
    if subset.beam is not None:
        stats["surprise"] = -spearman(subset.metric, -subset.beam)
        stats["beam"] = subset.beam.mean(1)
    if subset.length is not None:
        stats["length"] = subset.length.mean(1)
    if subset.overlap is not None:
        stats["diversity"] = _diversity(subset.overlap)
    if subset.positive is not None:
        positive = subset.positive.astype(bool)
        named = {"faithful": "metric", "likelihood": "likelihood", "extractive": "density"}
        for name, field in named.items():
            if (value := getattr(subset, field)) is not None:
                stats[f"{name}_gap"] = _mean(value, positive) - _mean(value, ~positive)
    return stats


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation along the last axis (ties at mean rank), 0 for a constant."""
    a, b = (
        np.sign(v[..., :, None] - v[..., None, :]).sum(-1, dtype=float) for v in (x, y)
    )  # twice the centred rank, ties at their mean rank
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.where(scale > 0, (a * b).sum(-1) / np.where(scale > 0, scale, 1), 0.0)


def swap_entities(
    summary: Sequence[Hashable],
    source: Sequence[Hashable],
    kind: Callable[[Hashable], Hashable | None],
    *,
    rate: float = 0.5,
    rng: np.random.Generator | int | None = None,
) -> list[Hashable]:
    """An unfaithful summary: some entities replaced by others of the same kind from the source.

    Args:
        summary, source: tokens (words or ids).
        kind: category of a token, or None where it names no entity.
        rate: share of the summary's entities to replace; at least one where that is possible.
        rng: generator or seed.

    Returns:
        The changed tokens; equal to the summary when the source offers no other entity.
    """
    checks.fraction(rate, "rate", zero=False)
    rng = checks.as_rng(rng, "rng")
    offers: dict[Hashable, list[Hashable]] = {}
    for token in dict.fromkeys(source):
        if (category := kind(token)) is not None:
            offers.setdefault(category, []).append(token)
    others = {
        i: [t for t in offers.get(kind(token), []) if t != token]
        for i, token in enumerate(summary)
        if kind(token) is not None
    }
    places = [i for i, options in others.items() if options]
    swaps = min(len(places), max(1, round(rate * len(others))))
    out = list(summary)
    for i in rng.permutation(len(places))[:swaps]:
        options = others[places[i]]
        out[places[i]] = options[int(rng.integers(len(options)))]
    return out


def _argsort(key: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ascending order along rows, equal keys in random order."""
    return np.lexsort((rng.random(key.shape), key), axis=1)


def _best_subset(
    pool: Pool,
    kind: str,
    largest: bool,
    k: int,
    rng: np.random.Generator,
    allowed: np.ndarray | None,
) -> np.ndarray:
    """For each input, the subset of ``allowed`` candidates with the extreme statistic."""
    n, c = pool.metric.shape
    limit = SUBSETS[kind]
    size = c if allowed is None else int(allowed.sum(1).min())
    if math.comb(size, k) <= limit and (allowed is None or (allowed.sum(1) == size).all()):
        places = np.array(list(itertools.combinations(range(size), k)))[None]
    else:  # random subsets, drawn for each input
        draw = rng.random((n, limit, c))
        if allowed is not None:
            # Places count allowed candidates only; an input may have more than the fewest.
            draw = np.where(np.arange(c) < allowed.sum(1)[:, None, None], draw, np.inf)
        places = np.argsort(draw, axis=2)[..., :k]
    if allowed is None:
        subsets = np.broadcast_to(places, (n, *places.shape[1:]))
    else:
        subsets = np.argsort(~allowed, axis=1, kind="stable")[np.arange(n)[:, None, None], places]
    rows = np.arange(n)[:, None, None]
    if kind == "diversity":
        pairs = pool.need("overlap")[rows[..., None], subsets[..., :, None], subsets[..., None, :]]
        value = _diversity(pairs)
    elif kind == "margin":
        value = np.ptp(pool.metric[rows, subsets], axis=2)
    else:
        value = -spearman(pool.metric[rows, subsets], -pool.need("beam")[rows, subsets])
    value = value if largest else -value
    best = value >= value.max(1, keepdims=True) - 1e-12
    chosen = np.where(best, rng.random(value.shape), -1.0).argmax(1)
    return subsets[np.arange(n), chosen]


def _mean(value: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Mean of the chosen entries of each row; NaN where there is none."""
    count = where.sum(1)
    total = (value * where).sum(1)
    return np.divide(total, count, out=np.full(len(value), np.nan), where=count > 0)


def _diversity(overlap: np.ndarray) -> np.ndarray:
    """One minus the mean overlap of different members, for overlaps (..., k, k)."""
    k = overlap.shape[-1]
    if k < 2:
        return np.zeros(overlap.shape[:-2])
    trace = np.trace(overlap, axis1=-2, axis2=-1)
    return 1 - (overlap.sum((-2, -1)) - trace) / (k * (k - 1))
