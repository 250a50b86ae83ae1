"""Calibration sets: ranking and contrast losses, the strategies, the statistics, the pool."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from workbench.calibration import calibration_sets as cs
from workbench.calibration.experiments import calibration_sets as study
from workbench.calibration.experiments.calibration_sets import diverse_beam
from workbench.calibration.figures_calibration_sets import explore_strategies

SEEDS = st.integers(0, 10_000)


def random_pool(seed: int = 0, n: int = 6, c: int = 9, ties: bool = False) -> cs.Pool:
    rng = np.random.default_rng(seed)
    metric = rng.random((n, c))
    overlap = rng.random((n, c, c))
    return cs.Pool(
        metric=np.round(metric * 3) / 3 if ties else metric,
        beam=rng.permuted(np.tile(np.arange(c), (n, 1)), axis=1),
        length=rng.permuted(np.tile(np.arange(3, 3 + c), (n, 1)), axis=1),
        overlap=(overlap + overlap.transpose(0, 2, 1)) / 2,
        positive=rng.permuted(np.tile(np.arange(c) < c // 2, (n, 1)), axis=1),
        likelihood=rng.normal(size=(n, c)),
        density=rng.random((n, c)),
    )


# ---- ranking loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 2), (3, 4), (5, 7)])
def test_rank_loss_is_a_margin_ranking_loss_for_every_gap(shape, dtype):
    generator = torch.Generator().manual_seed(shape[1])
    logp = -torch.rand(shape, generator=generator, dtype=dtype) * 20
    lengths = torch.randint(1, 9, shape, generator=generator)
    got = cs.rank_loss(logp, lengths, margin=0.01, scale=0.3, length_penalty=1.5)
    scores = 0.3 * logp / lengths.to(dtype) ** 1.5
    want = torch.zeros((), dtype=dtype)
    for gap in range(1, shape[1]):
        better, worse = scores[:, :-gap].flatten(), scores[:, gap:].flatten()
        want += torch.nn.MarginRankingLoss(0.01 * gap)(better, worse, torch.ones_like(better))
    assert got.dtype == dtype
    tolerance = 1e-6 if dtype is torch.float32 else 1e-14
    torch.testing.assert_close(got, want, rtol=10 * tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), SEEDS, st.floats(-0.01, 0.02))
def test_rank_loss_is_zero_exactly_when_all_gaps_suffice(c, seed, slack):
    """Neighbouring gaps of at least m imply gaps of at least g m between all pairs."""
    m = 0.01
    gaps = np.full(c - 1, m + abs(slack))
    gaps[np.random.default_rng(seed).integers(c - 1)] = m + slack
    scores = -1 - np.concatenate([[0], gaps.cumsum()])
    loss = cs.rank_loss(
        torch.tensor(scores)[None], torch.ones(1, c, dtype=torch.long), margin=m, scale=1.0
    )
    assert loss == 0 if slack > 1e-12 else loss >= 0
    if slack < -1e-12:
        assert loss > 0


def test_length_enters_through_its_power():
    logp, lengths = torch.tensor([[-4.0, -4.0]]), torch.tensor([[2, 4]])
    # scores -4 / 4 = -1 and -4 / 16 = -1/4: the longer one scores higher, wrongly ordered by 3/4
    assert cs.rank_loss(logp, lengths, margin=0, scale=1).item() == pytest.approx(0.75)
    assert cs.rank_loss(logp, lengths, margin=0, scale=1, length_penalty=0) == 0


def test_rank_loss_gradient():
    generator = torch.Generator().manual_seed(0)
    logp = (-10 * torch.rand(3, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    lengths = torch.randint(2, 6, (3, 4), generator=generator)
    assert torch.autograd.gradcheck(lambda x: cs.rank_loss(x, lengths, scale=1.0), (logp,))
    cs.rank_loss(logp, lengths).backward()
    assert (logp.grad[:, 0] <= 0).all() and (logp.grad[:, -1] >= 0).all()


# ---- contrast loss


def contrast_by_hand(states: np.ndarray, n_pos: int, both_ways: bool) -> float:
    pairs = itertools.permutations if both_ways else itertools.combinations
    terms = []
    for one in states:
        unit = one / np.linalg.norm(one, axis=1, keepdims=True)
        for a, b in pairs(range(n_pos), 2):
            others = [math.exp(unit[a] @ unit[j]) for j in range(len(unit)) if j != a]
            terms.append(-math.log(math.exp(unit[a] @ unit[b]) / sum(others)))
    return float(np.mean(terms))


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("shape", "n_pos"), [((2, 4, 3), 2), ((3, 6, 5), 3), ((1, 3, 2), 3)])
def test_contrast_loss_against_loops(shape, n_pos, both_ways):
    states = np.random.default_rng(1).normal(size=shape)
    got = cs.contrast_loss(torch.tensor(states), n_pos, both_ways=both_ways)
    assert got.item() == pytest.approx(contrast_by_hand(states, n_pos, both_ways), abs=1e-12)


def test_orthogonal_states_give_log_of_the_others():
    states = torch.eye(4)[None] * torch.tensor([1.0, 5.0, 0.1, 2.0])[:, None]
    assert cs.contrast_loss(states, 2).item() == pytest.approx(math.log(3), abs=1e-6)
    assert math.log(3) == pytest.approx(1.0986, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0.1, 10))
def test_contrast_ignores_length_of_states_and_order_of_positives(seed, factor):
    states = torch.tensor(np.random.default_rng(seed).normal(size=(2, 5, 4)))
    loss = cs.contrast_loss(states, 3)
    torch.testing.assert_close(cs.contrast_loss(states * factor, 3), loss)
    torch.testing.assert_close(cs.contrast_loss(states[:, [2, 0, 1, 4, 3]], 3), loss)


def test_contrast_gradient_and_head():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cs.contrast_loss(x, 2), (states,))
    head = cs.ContrastHead(3).double()
    hidden = torch.randn(2, 4, 6, 3, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 4, 6, generator=generator) < 0.6
    mask[..., 0] = True
    want = torch.stack(
        [
            torch.stack([head.projection(h[m]).mean(0) for h, m in zip(hs, ms, strict=True)])
            for hs, ms in zip(hidden, mask, strict=True)
        ]
    )
    torch.testing.assert_close(head(hidden, mask), want)


def test_contrast_tuning_tells_faithful_from_swapped_records():
    """Positives are field-by-field reorderings of a record, negatives its entity swaps."""
    rng = np.random.default_rng(0)
    fields, values = 4, 5  # token 5 f + v: value v of field f, an entity of kind f
    kind = lambda token: token // values  # noqa: E731
    head = cs.ContrastHead(fields * values)
    sets = []
    for _ in range(64):
        record = [int(values * f + rng.integers(values)) for f in range(fields)]
        source = record + [int(values * f + rng.integers(values)) for f in range(fields)]
        swaps = [cs.swap_entities(record, source, kind, rate=0.5, rng=rng) for _ in range(2)]
        sets.append([record, list(rng.permutation(record)), *swaps])
    hidden = torch.nn.functional.one_hot(torch.tensor(sets), fields * values).float()
    mask = torch.ones(hidden.shape[:3], dtype=torch.bool)
    changed = torch.tensor([any(s != g[0] for s in g[2:]) for g in sets])
    optimiser = torch.optim.Adam(head.parameters(), 0.02)
    first = cs.contrast_loss(head(hidden, mask), 2).item()
    for _ in range(60):
        optimiser.zero_grad()
        loss = cs.contrast_loss(head(hidden, mask), 2)
        loss.backward()
        optimiser.step()
    assert loss.item() < first - 0.02
    unit = torch.nn.functional.normalize(head(hidden, mask), dim=-1)[changed]
    assert (unit[:, 0] * unit[:, 1]).sum(-1).min() > (unit[:, 0] * unit[:, 2]).sum(-1).mean()


# ---- selection


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(cs.RANK_STRATEGIES), st.booleans())
def test_every_strategy_chooses_distinct_candidates_best_first(seed, strategy, ties):
    pool = random_pool(seed, ties=ties)
    idx = cs.select(pool, strategy, rng=seed)
    assert idx.shape == (6, 4)
    assert all(len(set(row)) == 4 for row in idx.tolist())
    chosen = np.take_along_axis(pool.metric, idx, 1)
    assert (np.diff(chosen, axis=1) <= 0).all()
    assert (idx == cs.select(pool, strategy, rng=seed)).all()


BY_RANK = {  # positions in the order of the key
    "extremes": ("metric", -1, [0, 1, 7, 8]), "average": ("metric", -1, [2, 3, 4, 5]),
    "max_metric": ("metric", -1, [0, 1, 2, 3]), "min_metric": ("metric", -1, [5, 6, 7, 8]),
    "top_beam": ("beam", 1, [0, 1, 2, 3]), "bottom_beam": ("beam", 1, [5, 6, 7, 8]),
    "wide_beam": ("beam", 1, [0, 1, 7, 8]), "long": ("length", -1, [0, 1, 2, 3]),
    "short": ("length", 1, [0, 1, 2, 3]),
}  # fmt: skip


@pytest.mark.parametrize("strategy", BY_RANK)
def test_strategies_by_rank(strategy):
    pool = random_pool(3)
    field, sign, places = BY_RANK[strategy]
    order = np.argsort(sign * getattr(pool, field), axis=1)
    for row, got in zip(order, cs.select(pool, strategy, rng=0), strict=True):
        assert set(row[places]) == set(got)


def statistic(pool: cs.Pool, row: int, subset: tuple[int, ...], kind: str) -> float:
    """Independent of the module: loops, and scipy for the correlation."""
    s = list(subset)
    if kind == "margin":
        metric = sorted(pool.metric[row, s])
        return float(np.mean(np.diff(metric)))
    if kind == "diversity":
        return 1 - float(np.mean([pool.overlap[row, i, j] for i in s for j in s if i != j]))
    return -float(scipy_stats.spearmanr(pool.metric[row, s], -pool.beam[row, s])[0])


@pytest.mark.parametrize("kind", ["margin", "diversity", "surprise"])
@pytest.mark.parametrize("side", ["max", "min"])
def test_strategies_by_subset_find_the_extreme_of_all_subsets(kind, side):
    pool = random_pool(5, n=3, c=8)  # 70 subsets of four: below every limit
    idx = cs.select(pool, f"{side}_{kind}", rng=0)
    for row in range(3):
        every = [statistic(pool, row, s, kind) for s in itertools.combinations(range(8), 4)]
        got = statistic(pool, row, tuple(idx[row]), kind)
        assert got == pytest.approx(max(every) if side == "max" else min(every), abs=1e-9)


def test_surprise_is_sought_among_the_models_own_candidates():
    pool = random_pool(6, n=40, c=12)
    own = np.zeros((40, 12), bool)
    own[:, ::2] = True
    pool = cs.Pool(metric=pool.metric, beam=pool.beam, own=own)
    for strategy in ("max_surprise", "min_surprise"):
        assert np.take_along_axis(own, cs.select(pool, strategy, rng=0), 1).all()


def test_with_too_many_subsets_random_ones_stand_in():
    pool = random_pool(7, n=30, c=20)  # 4,845 subsets; surprise looks at 100 of them
    most = cs.set_stats(pool.take(cs.select(pool, "max_surprise", rng=0)))["surprise"]
    least = cs.set_stats(pool.take(cs.select(pool, "min_surprise", rng=0)))["surprise"]
    assert most.mean() > 0.8 and least.mean() < -0.8


def test_ties_are_broken_at_random():
    pool = cs.Pool(metric=np.zeros((4000, 6)))
    for strategy in ("extremes", "max_margin", "random"):
        share = np.bincount(cs.select(pool, strategy, rng=1).ravel(), minlength=6) / 4000
        np.testing.assert_allclose(share, 4 / 6, atol=0.04)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(cs.CONTRAST_STRATEGIES))
def test_contrast_sets_hold_positives_then_negatives(seed, strategy):
    pool = random_pool(seed, c=10)
    idx = cs.select_contrast(pool, strategy, rng=seed)
    signs = np.take_along_axis(pool.positive, idx, 1)
    assert signs[:, :2].all() and not signs[:, 2:].any()
    assert all(len(set(row)) == 4 for row in idx.tolist())


CONTRAST = {  # description, whether positives take the largest values
    "max_margin": ("metric", True), "min_margin": ("metric", False),
    "easy": ("likelihood", True), "hard": ("likelihood", False),
    "max_extractive_gap": ("density", True),
}  # fmt: skip


@pytest.mark.parametrize("strategy", CONTRAST)
def test_contrast_strategies_take_the_extremes_of_either_side(strategy):
    pool = random_pool(9, c=10)
    field, largest = CONTRAST[strategy]
    value = getattr(pool, field)
    for row, got in enumerate(cs.select_contrast(pool, strategy, rng=0)):
        for chosen, side, top in ((got[:2], True, largest), (got[2:], False, not largest)):
            members = np.sort(value[row][pool.positive[row] == side])
            want = members[-2:] if top else members[:2]
            assert sorted(value[row, chosen]) == pytest.approx(want)


# ---- statistics


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(2, 6))
def test_statistics_against_loops_and_scipy(seed, k):
    pool = random_pool(seed, n=3, c=k)
    stats = cs.set_stats(pool)
    for row in range(3):
        for kind in ("margin", "diversity", "surprise"):
            want = statistic(pool, row, tuple(range(k)), kind)
            assert stats[kind][row] == pytest.approx(want, abs=1e-9)
        positive = pool.positive[row]
        want = pool.metric[row, positive].mean() - pool.metric[row, ~positive].mean()
        assert stats["faithful_gap"][row] == pytest.approx(want)


def test_surprise_at_its_ends():
    metric = np.array([[0.9, 0.7, 0.4, 0.1]])
    beams = np.array([[0, 1, 2, 3]])
    for beam, want in ((beams, -1), (beams[:, ::-1], 1), (np.zeros((1, 4)), 0)):
        assert cs.set_stats(cs.Pool(metric=metric, beam=beam))["surprise"] == pytest.approx(want)


# ---- metric, swaps, scoring, pool


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), max_size=8), st.lists(st.integers(1, 5), max_size=8))
def test_token_f1_is_the_multiset_overlap(a, b):
    padded = [torch.tensor(x + [0] * (9 - len(x))) for x in (a, b)]
    overlap = sum((Counter(a) & Counter(b)).values())
    want = 2 * overlap / (len(a) + len(b)) if a or b else 0.0
    assert cs.token_f1(*padded, pad=0).item() == pytest.approx(want)
    assert cs.token_f1(*padded[::-1], pad=0).item() == pytest.approx(want)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0.05, 1))
def test_swaps_keep_kinds_and_use_the_source(seed, rate):
    rng = np.random.default_rng(seed)
    summary, source = rng.integers(0, 30, 8).tolist(), rng.integers(0, 30, 20).tolist()
    kind = lambda t: t // 10 if t % 10 else None  # noqa: E731  (0, 10 and 20 are no entities)
    out = cs.swap_entities(summary, source, kind, rate=rate, rng=rng)
    changed = [(a, b) for a, b in zip(summary, out, strict=True) if a != b]
    assert len(out) == len(summary)
    assert all(kind(a) == kind(b) is not None and b in source for a, b in changed)
    entities = sum(kind(t) is not None for t in summary)
    possible = sum(
        kind(t) is not None and any(kind(s) == kind(t) and s != t for s in source) for t in summary
    )
    assert len(changed) == min(possible, max(1, round(rate * entities)))


class Table:
    """P(next | last token), with chosen probabilities."""

    def __init__(self, table: list[list[float]] | np.ndarray) -> None:
        self.log = torch.tensor(np.asarray(table)).log()

    def __call__(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.log[ids])


def test_sequence_log_probability_against_products():
    table = np.random.default_rng(0).dirichlet(np.ones(5), size=5)
    ids = torch.tensor([[1, 2, 3, 4, 0], [4, 3, 2, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    logp, lengths = cs.sequence_logp(Table(table), ids, mask)
    want = [table[2, 3] * table[3, 4] * table[4, 0], table[4, 3] * table[3, 2]]
    torch.testing.assert_close(logp, torch.tensor(want).log())
    assert lengths.tolist() == [3, 2]


def strings(table: np.ndarray, start: int, eos: int, longest: int) -> dict[tuple[int, ...], float]:
    """Every output of up to ``longest`` tokens that ends, or is cut, with its probability."""
    out, open_ = {}, {(): 1.0}
    for _ in range(longest):
        grown = {
            (*s, t): p * table[(s or (start,))[-1], t]
            for s, p in open_.items()
            for t in range(len(table))
            if table[(s or (start,))[-1], t] > 0
        }
        out |= {s: p for s, p in grown.items() if s[-1] == eos}
        open_ = {s: p for s, p in grown.items() if s[-1] != eos}
    return out | open_


def test_one_wide_group_is_exact_search():
    pad, eos, v = 0, 1, 5
    table = np.zeros((v, v))
    table[:, 1:] = np.random.default_rng(2).dirichlet(np.ones(v - 1), size=v)
    found, logp = diverse_beam(
        Table(table), torch.tensor([[2], [3]]), groups=1, width=80, max_new=3, eos=eos, pad=pad
    )
    for row, start in enumerate((2, 3)):
        want = sorted(strings(table, start, eos, 3).items(), key=lambda item: -item[1])[:10]
        for (tokens, p), got, value in zip(want, found[row], logp[row], strict=False):
            assert value.item() == pytest.approx(math.log(p))
            assert tuple(t for t in got.tolist() if t != pad) == tokens


def test_groups_of_one_are_penalised_greedy_searches():
    pad, eos, v, groups, penalty = 0, 1, 6, 4, 0.7
    table = np.zeros((v, v))
    table[:, 1:] = np.random.default_rng(5).dirichlet(np.ones(v - 1), size=v)
    found, logp = diverse_beam(
        Table(table),
        torch.tensor([[2]]),
        groups=groups,
        penalty=penalty,
        max_new=5,
        eos=eos,
        pad=pad,
    )
    beams, totals = [[2] for _ in range(groups)], [0.0] * groups
    for _ in range(5):
        used = Counter()
        for g, beam in enumerate(beams):
            if beam[-1] == eos:
                continue
            row = np.log(table[beam[-1], 1:])
            token = 1 + int(np.argmax(row - penalty * np.array([used[t] for t in range(1, v)])))
            totals[g] += row[token - 1]
            used[token] += 1
            beam.append(token)
    assert [[t for t in row if t != pad] for row in found[0].tolist()] == [b[1:] for b in beams]
    torch.testing.assert_close(logp[0], torch.tensor(totals, dtype=logp.dtype))
    assert len({tuple(b) for b in beams}) > 1


# ---- bad input

OK = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: cs.rank_loss(OK[0], OK[1][:, :2]), "lengths"),
        (lambda: cs.rank_loss(OK[0], 0 * OK[1]), "lengths"),
        (lambda: cs.rank_loss(OK[0][:, :1], OK[1][:, :1]), "logp"),
        (lambda: cs.rank_loss(OK[0] * torch.nan, OK[1]), "logp"),
        (lambda: cs.rank_loss(OK[0][0], OK[1][0]), "logp"),
        (lambda: cs.contrast_loss(torch.ones(1, 3, 2), 1), "n_pos"),
        (lambda: cs.contrast_loss(torch.ones(1, 3, 2), 4), "n_pos"),
        (lambda: cs.contrast_loss(torch.zeros(1, 3, 2), 2), "states"),
        (lambda: cs.ContrastHead(2)(torch.ones(1, 1, 3, 2), torch.zeros(1, 1, 3).bool()), "mask"),
        (lambda: cs.sequence_logp(Table(np.eye(3)), OK[1], OK[1].bool()), "mask"),
        (lambda: cs.select(random_pool(), "best"), "strategy"),
        (lambda: cs.select(random_pool(), "random", 10), "k"),
        (lambda: cs.select(random_pool(), "random", 1), "k"),
        (lambda: cs.select(random_pool(), "extremes", 3), "k"),
        (lambda: cs.select(cs.Pool(metric=np.ones((2, 5))), "top_beam"), "beam"),
        (lambda: cs.select(cs.Pool(metric=np.ones((2, 5))), "max_diversity"), "overlap"),
        (lambda: cs.select_contrast(cs.Pool(metric=np.ones((2, 5))), "random"), "positive"),
        (lambda: cs.select_contrast(random_pool(), "random", 8), "positive"),
        (lambda: cs.select_contrast(random_pool(), "long"), "strategy"),
        (lambda: cs.Pool(metric=np.ones(3)), "metric"),
        (lambda: cs.Pool(metric=np.full((2, 3), np.nan)), "metric"),
        (lambda: cs.Pool(metric=np.ones((2, 3)), beam=np.ones((3, 2))), "beam"),
        (lambda: cs.swap_entities([1], [2], lambda t: 0, rate=0), "rate"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# ---- the experiment and its explorer


def test_references_hold_what_matters():
    source, reference = study.records(400, np.random.default_rng(0))
    kept = {study.HIGH: [], study.MIDDLE: [], study.LOW: []}
    for src, ref in zip(source.tolist(), reference.tolist(), strict=True):
        levels = dict(zip(src[1:-1:2], src[:-1:2], strict=True))
        words = ref[: ref.index(study.EOS)]
        assert [t for t in src if t in words] == words  # in the order of the source
        assert set(ref[len(words) + 1 :]) <= {study.PAD} and words
        for token, level in levels.items():
            kept[level].append(token in words)
    assert all(kept[study.HIGH]) and not any(kept[study.LOW])
    assert np.mean(kept[study.MIDDLE]) == pytest.approx(0.55, abs=0.05)
    assert (study.score(reference[:, None], reference) == 1).all()


def test_the_loss_is_its_two_parts():
    generator = torch.Generator().manual_seed(0)
    source, reference = study.records(6, np.random.default_rng(1))
    outputs = reference[torch.randperm(6, generator=generator)][:, None].repeat(1, 4, 1)
    outputs = torch.cat([outputs, reference[:, None]], 1)
    ids = torch.cat([source[:, None].expand(-1, 5, -1), outputs], 2)
    logits = torch.randn(6, 5, ids.shape[2] - 1, study.VOCABULARY, generator=generator)
    logp = torch.zeros(6, 5)
    for i, j in itertools.product(range(6), range(5)):
        for t in range(study.SOURCE, ids.shape[2]):
            if ids[i, j, t] != study.PAD:
                logp[i, j] += logits[i, j, t - 1].log_softmax(-1)[ids[i, j, t]]
    lengths = (outputs != study.PAD).sum(-1)
    mle = -(logp[:, 4] / lengths[:, 4]).mean()
    want = 0.1 * mle + cs.rank_loss(logp[:, :4], lengths[:, :4])
    torch.testing.assert_close(study.calibration_loss(logits, ids), want)


def test_a_tiny_run_fills_the_table_and_the_explorer():
    names = ("random", "max_margin", "min_surprise")
    sizes = {"steps": 2, "inputs": 8, "held_out": 6, "each": 5, "d": 8}
    out = study.measure(0, strategies=names, **sizes)
    assert out["margin"][1] >= out["margin"][0]
    assert out["surprise"][2] <= out["surprise"][0]
    assert -1 <= out["rho_margin"] <= 1 or math.isnan(out["rho_margin"])
    table = study.strategy_table(study.pd.DataFrame([{"seed": 0, **out}]), names)
    explorer = explore_strategies(table, "surprise")
    np.testing.assert_allclose(explorer.result()["x"], out["surprise"])
    np.testing.assert_allclose(explorer.result(statistic="margin")["y"], out["gain"])
    explorer.export()
    with pytest.raises(ValueError, match="strategy"):
        explore_strategies(table.drop(columns="strategy"))
