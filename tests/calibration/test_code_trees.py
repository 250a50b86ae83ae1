"""Programs as trees: own text, equality, holes, rendering."""

import ast
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.calibration.code_trees import Tree
from workbench.calibration.pac_code_sets import PartialProgram, aligned, contains

CODE = "f(a, b + 1)[0]"


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
