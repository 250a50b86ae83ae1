"""Partial programs with a guarantee: the optimiser, the nesting, the calibration, the trees."""

import ast
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from workbench.calibration.code_trees import Tree
from workbench.calibration.pac_code_sets import (
    TAUS,
    PartialProgram,
    aligned,
    binom_k,
    calibrate,
    contains,
    greedy_holes,
    nested_holes,
    optimal_holes,
)

CODE = "f(a, b + 1)[0]"


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


# trees of programs


def test_nodes_own_their_text():
    tree = Tree.from_ast(CODE)
    kinds = [label.split("(")[0] for label in tree.labels]
    assert kinds[:5] == ["Subscript", "Call", "Name", "Name", "BinOp"]
    assert kinds[5:] == ["Name", "Constant", "Constant"]
    own = ["".join(np.array(list(CODE))[tree.owner == v]).replace(" ", "") for v in range(8)]
    assert own == ["[]", "(,)", "f", "a", "+", "b", "1", "0"]


def test_costs_sum_the_tokens_of_each_node_and_are_clipped():
    tree = Tree.from_ast("a + b1")
    costs = tree.costs([0, 2, 4, 5, 6], [0.5, 1.0, 2.0, 3.0, 20.0])
    # "a", "+", "b", "1" and what follows the expression: that and "+" are the root's
    assert costs.tolist() == [10.0, 0.5, 5.0]
    assert tree.costs([0], [3.0], clip=2.0).max() == 2.0


def test_offsets_count_characters_not_bytes():
    tree = Tree.from_ast("f('äöü', x)")
    assert tree.source[slice(*tree.spans[-1])] == "x"
    assert Tree.from_ast("(a,\n 'ü', b)").render([3]) == "(a,\n 'ü', ??)"


@pytest.mark.parametrize(
    ("prediction", "target", "inside"),
    [
        (CODE, CODE, True),
        (CODE, "f(a,b+1)[0]", True),  # trees, not text
        (CODE, "f(a, (b) + 1)[(0)]", True),
        (CODE, "f(a, b + 2)[0]", False),
        (CODE, "f(a, b - 1)[0]", False),
        (CODE, "f(a, b + 1, c)[0]", False),
        (CODE, "f(a, b + True)[0]", False),
        ("x[1:]", "x[:1]", False),
        ("f(a=1)", "f(b=1)", False),
        ("lambda x: x", "lambda: x", False),
    ],
)
def test_the_whole_program_contains_equal_trees_only(prediction, target, inside):
    tree = Tree.from_ast(prediction)
    assert contains(PartialProgram(tree, np.ones(len(tree), bool)), target) is inside
    same = ast.dump(ast.parse(prediction)) == ast.dump(ast.parse(target))
    assert same is inside
    assert contains(PartialProgram(tree, np.zeros(len(tree), bool)), target)


def test_a_hole_stands_for_any_subtree_but_no_other_place():
    tree = Tree.from_ast(CODE)
    partial = PartialProgram(tree, ~tree.below[4])  # b + 1
    assert partial.render() == "f(a, ??)[0]"
    assert partial.fraction == 5 / 8
    assert partial.contains("f(a, [x for x in y])[0]")
    assert not partial.contains("f(c, b + 1)[0]")
    assert not partial.contains("f(a, b + 1)[1]")


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_contains_is_what_alignment_says(seed):
    rng = np.random.default_rng(seed)
    tree, target = Tree.from_ast("g(a.b, [c, 1], d=e)"), "g(a.c, [c, 2], d=e)"
    drop = rng.random(len(tree)) < 0.2
    kept = ~(tree.below[drop].any(0) if drop.any() else np.zeros(len(tree), bool))
    # by text: fill each hole with what the target has there and compare
    other = Tree.from_ast(target)
    filled = tree.source
    partial = PartialProgram(tree, kept)
    for v in sorted(partial.holes, reverse=True):
        start, stop = tree.spans[v]
        filled = filled[:start] + other.source[slice(*other.spans[v])] + filled[stop:]
    same = ast.dump(ast.parse(filled)) == ast.dump(ast.parse(target))
    assert partial.contains(target) == same
    assert same == (not (kept & ~aligned(tree, other)).any())


def test_statements_modules_and_plain_trees():
    assert Tree.from_ast("return x").labels[0].startswith("Return")
    assert Tree.from_ast("x = 1\ny = 2").labels[0].startswith("Module")
    assert Tree.from_ast(ast.parse("f(x)", mode="eval")).labels[0].startswith("Call")
    tree = Tree.from_parents([-1, 0, 0, 1], ("S", "NP", "VP", "N"))
    assert PartialProgram(tree, np.array([True, False, True, False])).render("*") == "S(*, VP)"


def test_spans_of_a_whole_module_lie_in_their_parents():
    tree = Tree.from_ast(Path(__file__).read_text(encoding="utf8"))
    assert (tree.spans[:, 0] <= tree.spans[:, 1]).all()
    inside = tree.spans[1:] - tree.spans[tree.parent[1:]]
    assert (inside[:, 0] >= 0).all()
    assert (inside[:, 1] <= 0).all()
    assert tree.size[0] == len(tree)


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
