"""Partial programs with a guarantee: the optimiser, the nesting, the calibration, the trees."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from workbench.calibration.code_trees import Tree
from workbench.calibration.experiments import pac_code_sets as study
from workbench.calibration.figures_pac import explore_code_sets, tinted
from workbench.calibration.pac_code_sets import (
    TAUS,
    PartialProgram,
    aligned,
    binom_k,
    calibrate,
    greedy_holes,
    nested_holes,
    optimal_holes,
)


def random_tree(rng, n):
    return np.array([-1] + [rng.integers(0, v) for v in range(1, n)])


def masks(parent, m):
    """Every mask that removes whole subtrees and leaves at most m holes, by trying all of them."""
    n = len(parent)
    for bits in itertools.product([True, False], repeat=n):
        kept = np.array(bits)
        up = np.array([p < 0 or kept[p] for p in parent])
        if (kept <= up).all() and (~kept & up).sum() <= m:
            yield kept


def best(parent, costs, budget, m):
    feasible = [k for k in masks(parent, m) if costs[k].sum() <= budget]
    return max(k.sum() for k in feasible), feasible


# the number of errors allowed


@pytest.mark.parametrize(
    ("n", "eps", "delta", "k"),
    [(100, 0.1, 0.05, 4), (200, 0.1, 0.05, 12), (500, 0.1, 0.01, 34), (50, 0.1, 0.01, 0),
     (28, 0.1, 0.05, None), (29, 0.1, 0.05, 0)],
)  # fmt: skip
def test_allowed_errors_of_the_card(n, eps, delta, k):
    assert binom_k(n, eps, delta) == k


@given(st.integers(1, 400), st.floats(0.01, 0.9), st.floats(0.001, 0.5))
def test_allowed_errors_are_the_binomial_tail(n, eps, delta):
    # ppf is the smallest k with cdf(k) >= delta: one more than ours unless equality is hit
    above = int(stats.binom.ppf(delta, n, eps))
    ours = -1 if (k := binom_k(n, eps, delta)) is None else k
    assert ours in (above - 1, above)
    assert stats.binom.cdf(ours, n, eps) <= delta < stats.binom.cdf(ours + 1, n, eps)


# one threshold


@pytest.mark.parametrize("m", [1, 2, 3])
def test_optimal_holes_equal_brute_force(m):
    rng = np.random.default_rng(m)
    for n in (1, 2, 5, 8, 10, 12):
        parent, costs = random_tree(rng, n), rng.exponential(1.0, n) * (rng.random(n) < 0.8)
        for budget in (0.0, *rng.uniform(0, costs.sum() + 0.1, 3)):
            most, feasible = best(parent, costs, budget, m)
            found = optimal_holes(parent, costs, budget, m)
            assert found.sum() == most
            assert any((found == k).all() for k in feasible)
            same = [costs[k].sum() for k in feasible if k.sum() == most]
            assert costs[found].sum() == pytest.approx(min(same))


def integer_program(parent, costs, budgets, m):
    """Most nodes kept over all budgets with nested masks, by HiGHS.

    Per budget one variable a node (kept) and one a node (hole: parent kept, node not).
    """
    n, t = len(parent), len(budgets)
    rows, low, high = [], [], []

    def add(terms, most):
        row = np.zeros(2 * n * t)
        for index, weight in terms:
            row[index] += weight
        rows.append(row)
        low.append(-np.inf)
        high.append(most)

    for j, budget in enumerate(budgets):
        kept, hole = 2 * n * j + np.arange(n), 2 * n * j + n + np.arange(n)
        add(zip(kept, costs, strict=True), budget)
        add(zip(hole, np.ones(n), strict=True), m)
        for v, up in enumerate(parent):
            if up < 0:
                add([(kept[v], -1), (hole[v], -1)], -1)  # hole >= 1 - kept
            else:
                add([(kept[v], 1), (kept[up], -1)], 0)
                add([(kept[up], 1), (kept[v], -1), (hole[v], -1)], 0)
            if j:  # budgets fall: kept here only if kept before
                add([(kept[v], 1), (kept[v] - 2 * n, -1)], 0)
    gain = np.tile(np.repeat([-1.0, 0.0], n), t)
    found = optimize.milp(
        gain, integrality=np.ones_like(gain), bounds=optimize.Bounds(0, 1),
        constraints=optimize.LinearConstraint(np.array(rows), low, high),
    )  # fmt: skip
    assert found.success
    return round(-found.fun)


@pytest.mark.parametrize("m", [1, 3])
def test_optimal_holes_equal_an_integer_program(m):
    rng = np.random.default_rng(m)
    for n in (15, 30):
        parent, costs = random_tree(rng, n), rng.exponential(1.0, n)
        for budget in np.array([0.2, 0.6]) * costs.sum():
            most = integer_program(parent, costs, [budget], m)
            assert optimal_holes(parent, costs, budget, m).sum() == most


@pytest.mark.parametrize(("n", "m"), [(12, 1), (12, 2), (10, 3)])
def test_nested_holes_equal_an_integer_program(n, m):
    rng = np.random.default_rng(n + m)
    parent, costs = random_tree(rng, n), rng.exponential(1.0, n)
    taus = np.array([0.001, 0.01, 0.1, 0.3, 0.6, 0.9])
    most = integer_program(parent, costs, -np.log(taus), m)
    assert nested_holes(parent, costs, taus, m).sum() == most


def test_the_order_of_nodes_does_not_matter():
    rng = np.random.default_rng(5)
    parent, costs = random_tree(rng, 11), rng.exponential(1.0, 11)
    new = rng.permutation(11)  # new[v] is the new index of node v
    moved, price = np.empty(11, int), np.empty(11)
    moved[new] = np.where(parent < 0, -1, new[parent])
    price[new] = costs
    for budget in (1.0, 3.0, 6.0):
        kept = optimal_holes(parent, costs, budget, 2)
        assert (optimal_holes(moved, price, budget, 2)[new] == kept).all()


@given(st.integers(0, 10_000), st.integers(2, 25))
@settings(max_examples=30, deadline=None)
def test_more_holes_and_more_budget_never_keep_less_and_greedy_never_keeps_more(seed, n):
    rng = np.random.default_rng(seed)
    parent, costs = random_tree(rng, n), rng.exponential(1.0, n)
    budget = rng.uniform(0, costs.sum())
    kept = [optimal_holes(parent, costs, budget, m).sum() for m in (1, 2, 3)]
    assert kept == sorted(kept)
    assert optimal_holes(parent, costs, 0.5 * budget, 2).sum() <= kept[1]
    for rule in ("leaf", "ratio"):
        mask = greedy_holes(parent, costs, budget, 2, rule=rule)
        partial = PartialProgram(Tree.from_parents(parent), mask)
        assert costs[mask].sum() <= budget + 1e-9
        assert len(partial.holes) <= 2
        assert mask.sum() <= kept[1]


def test_many_budgets_at_once_are_the_same_as_one_by_one():
    rng = np.random.default_rng(8)
    parent, costs = random_tree(rng, 14), rng.exponential(1.0, 14)
    budgets = np.array([9.0, 0.3, 2.0, 2.0, 50.0])
    for solve in (optimal_holes, greedy_holes):
        rows = solve(parent, costs, budgets, 2)
        for row, budget in zip(rows, budgets, strict=True):
            assert (row == solve(parent, costs, budget, 2)).all()


def test_greedy_rows_are_nested_and_separate_optima_need_not_be():
    rng = np.random.default_rng(1)
    broken = 0
    for _ in range(60):
        parent, costs = random_tree(rng, 10), rng.exponential(1.0, 10)
        budgets = -np.log(TAUS[::3])
        for rule in ("leaf", "ratio"):
            rows = greedy_holes(parent, costs, budgets, 2, rule=rule)
            assert (rows[1:] <= rows[:-1]).all()
        rows = optimal_holes(parent, costs, budgets, 2)
        broken += (rows[1:] > rows[:-1]).any()
    assert broken > 0


def test_limits_of_the_budget():
    parent, costs = np.array([-1, 0, 0, 2]), np.array([0.5, 1.0, 0.0, 2.0])
    assert optimal_holes(parent, costs, 3.5, 1).all()
    assert not optimal_holes(parent, costs, 0.0, 3).any()  # the root costs something
    assert optimal_holes(parent, 0 * costs, 0.0, 1).all()


def test_leaf_greedy_by_hand():
    # root with children 1 (cost 3) and 2 (cost 1), 3 (cost 2) below 2
    parent, costs = np.array([-1, 0, 0, 2]), np.array([0.1, 3.0, 1.0, 2.0])
    assert greedy_holes(parent, costs, 3.5, 2).tolist() == [True, False, True, True]
    assert greedy_holes(parent, costs, 1.5, 2).tolist() == [True, False, True, False]
    # with one hole in use the parent that lost a child goes next: here the root
    assert not greedy_holes(parent, costs, 1.5, 1).any()
    # the ratio rule sees that the subtree of 1 costs 3 a node, that of 2 only 1.5
    assert greedy_holes(parent, costs, 3.5, 1, rule="ratio").tolist() == [True, False, True, True]


# all thresholds together


@pytest.mark.parametrize("m", [1, 2])
def test_nested_holes_equal_brute_force_over_chains(m):
    rng = np.random.default_rng(10 + m)
    taus = np.array([0.01, 0.1, 0.4, 0.8])
    for n in (3, 6, 7):
        parent, costs = random_tree(rng, n), rng.exponential(1.2, n)
        options = [best(parent, costs, b, m)[1] for b in -np.log(taus)]
        chains = {k.tobytes(): k.sum() for k in options[0]}
        for row in options[1:]:  # best total of a chain that ends in each mask
            chains = {
                k.tobytes(): k.sum()
                + max(total for b, total in chains.items() if (k <= np.frombuffer(b, bool)).all())
                for k in row
                if any((k <= np.frombuffer(b, bool)).all() for b in chains)
            }
        assert nested_holes(parent, costs, taus, m).sum() == max(chains.values())


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 3), st.sampled_from([1, 2000]))
@settings(max_examples=30, deadline=None)
def test_nested_holes_are_nested_feasible_and_below_the_single_optimum(seed, n, m, max_sets):
    rng = np.random.default_rng(seed)
    tree, costs = Tree.from_parents(random_tree(rng, n)), rng.exponential(1.0, n)
    kept = nested_holes(tree, costs, TAUS, m, max_sets=max_sets)
    assert (kept[1:] <= kept[:-1]).all()
    for row, tau in list(zip(kept, TAUS, strict=True))[::20]:
        assert costs[row].sum() <= -np.log(tau) + 1e-9
        assert len(PartialProgram(tree, row).holes) <= m
        assert row.sum() <= optimal_holes(tree, costs, -np.log(tau), m).sum()
    if max_sets == 1:
        assert kept.sum() <= nested_holes(tree, costs, TAUS, m).sum()


# calibration


def test_calibrate_takes_the_least_conservative_threshold():
    taus = np.array([0.1, 0.5, 0.9])
    errors = np.zeros((100, 3), bool)
    errors[:20, 0] = errors[:4, 1] = errors[:2, 2] = True
    assert calibrate(errors, taus, 0.1, 0.05) == 0.5  # four errors are allowed
    errors[:5, 1] = True
    assert calibrate(torch.tensor(errors), taus, 0.1, 0.05) == 0.9
    errors[:5, 2] = True
    assert calibrate(errors, taus, 0.1, 0.05) is None
    assert calibrate(errors[:20], taus, 0.1, 0.05) is None  # too few pairs


def test_calibrate_stops_at_the_first_failure_when_sets_are_not_nested():
    errors = np.zeros((100, 3), bool)
    errors[:, 1] = True
    assert calibrate(errors, [0.1, 0.5, 0.9], 0.1, 0.05) == 0.9


def test_guarantee_holds_over_draws():
    # one number decides: the set at tau misses the target when u > tau; error(tau) = 1 - tau
    rng = np.random.default_rng(0)
    taus = np.linspace(0.005, 0.995, 199)
    wrong = 0
    for _ in range(400):
        errors = rng.random((200, 1)) > taus
        tau = calibrate(errors, taus, 0.1, 0.05)
        wrong += 1 - tau > 0.1
    assert wrong <= stats.binom.ppf(0.999, 400, 0.05)
    assert wrong > 0  # not needlessly conservative either


# the experiment


def test_threshold_baseline_by_hand():
    # 0 has children 1 and 4; 2 and 3 hang on 1; nodes 2, 3 and 4 cost more than the budget of 1
    tree = Tree.from_parents([-1, 0, 1, 1, 0])
    costs, taus = np.array([0.0, 0.5, 2.0, 2.0, 3.0]), np.exp([-1.0])
    free, two, one = (study.threshold_holes(tree, costs, taus, m)[0] for m in (None, 2, 1))
    assert free.tolist() == [True, True, False, False, False]
    assert two.tolist() == [True, False, False, False, False]  # 2 and 3 meet in 1
    assert not one.any()


def test_the_released_reading_is_blind_to_attribute_names():
    tree, costs = Tree.from_ast("self.attrib.get(k)"), np.arange(1.0, 6.0)
    read, priced = study.released_reading(tree, costs)
    for target, equal in [("self.attrib.items(k)", True), ("self.other.get(k)", True),
                          ("cls.attrib.get(k)", False), ("self.attrib.get(j)", False)]:  # fmt: skip
        goal, _ = study.released_reading(Tree.from_ast(target))
        assert aligned(read, goal).all() == equal
        assert not aligned(tree, target).all()
    assert priced.tolist() == [1.0, 0.0, 0.0, 4.0, 5.0]
    assert study.released_reading(Tree.from_ast("f()"), np.ones(2))[1].tolist() == [0.0, 1.0]


def test_vocabulary_numbers_names_of_the_context_and_hides_first_mentions():
    words = study.Vocabulary(("<pad>", "\n", *(f"<{i}>" for i in range(study.SLOTS)), "(", ")"), 7)
    row, names = words.encode((["foo", "(", "bar"], ["bar", "(", "new", ")", "new"]))
    assert names == ["foo", "bar", "new"]
    shown = [words.words[i] for i in row[study.CONTEXT - 3 : study.CONTEXT + 6]]
    assert shown == ["<0>", "(", "<1>", "<1>", "(", "<15>", ")", "<2>", "\n"]


def test_completion_costs_are_the_models_own_log_probabilities():
    words = study.Vocabulary(("<pad>", "\n", *(f"<{i}>" for i in range(study.SLOTS)), *"abcd"), 9)
    torch.manual_seed(0)
    model = study.lab.models.GPT(len(words.words), 16, 1, 2, ctx=study.CONTEXT + study.LENGTH)
    rows = torch.randint(2 + study.SLOTS, len(words.words), (3, study.CONTEXT + study.LENGTH))
    given = torch.tensor([0, 2, 5])
    tokens, nll = study.complete(model, rows, given, words)
    whole = torch.cat([rows[:, : study.CONTEXT], tokens], 1)
    logits = model(whole).detach()
    logits[..., 0] = logits[..., 2 : 1 + study.SLOTS] = -torch.inf  # no name was ever seen
    logp = logits.log_softmax(2)
    logp[..., 1 + study.SLOTS] -= np.log(9)
    for r in range(3):
        assert (tokens[r, : given[r]] == rows[r, study.CONTEXT :][: given[r]]).all()
        for t in range(study.LENGTH):
            at = logp[r, study.CONTEXT + t - 1]
            if t < given[r]:
                assert nll[r, t] == 0
            else:
                assert at.argmax() == tokens[r, t]
                assert nll[r, t].item() == pytest.approx(-at.max().item(), abs=1e-5)


def test_resplits_meet_the_guarantee_of_a_made_up_model():
    rng = np.random.default_rng(0)
    texts, truth, starts, nll, counts = [], [], [], [], []
    for _ in range(120):
        cost = rng.exponential(1.0, 2)
        texts.append("f(a, b)")
        truth.append(f"f({'a' if rng.random() < np.exp(-cost[0]) else 'c'}, b)")
        starts += [0, 2, 5, 7]
        nll += [0.0, *cost, 0.0]
        counts.append(4)
    found = study.resplit_study(
        0, predictions="\0".join(texts), targets="\0".join(truth), starts=np.array(starts),
        nll=np.array(nll), counts=np.array(counts), parts=1, pairs=100, draws=60,
    )  # fmt: skip
    assert found["violation_optimal1"] <= 0.15
    assert found["kept_optimal1"] >= found["kept_all"]
    assert found["kept_optimal1"] == pytest.approx(found["kept_separate1"], abs=0.05)


# the explorer


@pytest.fixture(scope="module")
def explorer():
    rng = np.random.default_rng(0)
    trees = [Tree.from_ast(t) for t in ["f(a, b)", "g(x)[0] + h", "'<b>' + a", "a.b.c(d)"] * 12]
    costs = [rng.exponential(1.0, len(t)) for t in trees]
    targets = [t.source.replace("a", "z") if i % 3 == 0 else t.source for i, t in enumerate(trees)]
    return explore_code_sets(trees, costs, targets, shown=4)


def test_explorer_answers_quickly_at_every_position_of_its_grid(explorer):
    for m in (1, 2, 3):
        explorer.result(m=m)  # masks are made once
    for state in itertools.product(*explorer.grid.values()):
        result = explorer.result(**dict(zip(explorer.grid, state, strict=True)))
        assert explorer.seconds < 0.05
        kept = len(result["kept_x"])
        assert kept == round(
            result["fraction"] * (kept + len(result["hole_x"]) + len(result["gone_x"]))
        )
        assert "".join(result["tokens"]).count("??") == result["holes"]
    assert set(explorer.export()["grid"]) and explorer.figure() is not None
    assert "explore_code_sets(trees, costs, targets, program=0" in explorer.restore()


def test_explorer_shows_what_the_method_says(explorer):
    result = explorer.result(program=3, eps=0.5, delta=0.2, m=2)
    assert result["errors_allowed"] == f"{binom_k(44, 0.5, 0.2)} of 44"
    tree = Tree.from_ast("f(a, b)")
    pieces, shade = tinted(tree, np.array([1.0, 2.0, 3.0, 4.0]), [2])
    assert pieces.tolist() == ["f", "(", "??", ", ", "b", ")"]
    np.testing.assert_array_equal(shade, [2.0, 1.0, np.nan, 1.0, 4.0, 1.0])


def test_explorer_names_bad_input():
    tree = Tree.from_ast("a")
    with pytest.raises(ValueError, match="trees and costs and targets"):
        explore_code_sets([tree], [[1.0]], [])
    with pytest.raises(ValueError, match="shown: leaves none"):
        explore_code_sets([tree] * 3, [[1.0]] * 3, ["a"] * 3, shown=3)


# bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimal_holes([0, 0], [1, 1], 1, 1), "parent: expected one -1"),
        (lambda: optimal_holes([-1, 2, 1], [1, 1, 1], 1, 1), "cycle"),
        (lambda: optimal_holes([-1, 0], [1], 1, 1), "costs: expected one for each of 2"),
        (lambda: optimal_holes([-1, 0], [1, -1], 1, 1), "costs: node 1 is negative"),
        (lambda: optimal_holes([-1, 0], [1, np.nan], 1, 1), "costs: row 1"),
        (lambda: optimal_holes([-1, 0], [1, 1], -1, 1), "budget"),
        (lambda: optimal_holes([-1, 0], [1, 1], 1, 0), "m: expected"),
        (lambda: nested_holes([-1], [1], [0.5, 0.1]), "taus: expected rising"),
        (lambda: nested_holes([-1], [1], [0.0, 0.1]), "taus"),
        (lambda: greedy_holes([-1], [1], 0.5, 1, rule="best"), "rule: expected"),
        (lambda: binom_k(0, 0.1, 0.1), "n: expected"),
        (lambda: binom_k(10, 0.0, 0.1), "eps: expected"),
        (lambda: binom_k(10, 0.1, 1.0), "delta: expected"),
        (lambda: calibrate(np.zeros((3, 2)), [0.1], 0.1, 0.1), "errors: expected a column"),
        (lambda: calibrate(np.zeros((0, 2)), [0.1, 0.2], 0.1, 0.1), "errors: is empty"),
        (lambda: Tree.from_ast("1 +"), "code: expected Python"),
        (lambda: Tree.from_ast(""), "code: is empty"),
        (lambda: Tree.from_parents([-1], ("a", "b")), "labels"),
        (lambda: Tree.from_parents([-1]).costs([0], [1.0]), "tree: has no text"),
        (lambda: Tree.from_ast("x").costs([-1], [1.0]), "starts: row 0"),
        (lambda: PartialProgram(Tree.from_ast("f(x)"), np.array([True])), "kept: expected 3"),
        (
            lambda: PartialProgram(Tree.from_ast("f(x)"), np.array([False, True, False])),
            "kept: node 1",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
