"""Rooted trees whose subtrees can be cut out, and Python programs as such trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workbench.lab import checks

Mask = NDArray[np.bool_]
_LEAVES = (ast.JoinedStr,)  # positions inside f-strings are not reliable before Python 3.12
_NO_CODE = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop)


@dataclass(frozen=True)
class Tree:
    """A rooted, ordered tree, with the text it came from where there is one.

    Attributes:
        parent: (n,) parent of each node, -1 for the root.
        labels: n texts; two programs are equal when their trees agree in shape and labels.
        spans: (n, 2) first character of each node and the one behind its last, or None.
        source: the program's text.
    """

    parent: NDArray[np.int64] = field(repr=False)
    labels: tuple[str, ...] = field(repr=False)
    spans: NDArray[np.int64] | None = field(default=None, repr=False)
    source: str = ""

    def __len__(self) -> int:
        return len(self.parent)

    @classmethod
    def from_parents(cls, parent: ArrayLike, labels: tuple[str, ...] | None = None) -> Tree:
        """A tree without text: (n,) parents, -1 for the one root; children in index order."""
        parent = checks.as_array(parent, "parent", ndim=1)
        parent = np.asarray(checks.to_numpy(parent), np.int64)
        n = len(parent)
        labels = tuple(map(str, range(n))) if labels is None else tuple(labels)
        if len(labels) != n:
            raise ValueError(f"labels: expected {n}, one a node, got {len(labels)}")
        tree = cls(parent, labels)
        if ((parent < -1) | (parent >= n)).any() or (parent == -1).sum() != 1:
            raise ValueError("parent: expected one -1 (the root) and otherwise indices of nodes")
        if len(tree.order) != n:
            raise ValueError("parent: holds a cycle; expected a tree")
        return tree

    @classmethod
    def from_ast(cls, code: str | ast.AST) -> Tree:
        """Python's syntax tree of an expression, a statement or a module.

        Names, attributes, constants and operators belong to their node's label; what has no text
        of its own (contexts, operators, empty argument lists) is no node.
        """
        source = code if isinstance(code, str) else ast.unparse(code)
        try:
            root = ast.parse(source.strip(), mode="eval").body
        except SyntaxError:
            try:
                body = ast.parse(source.strip())
            except (SyntaxError, ValueError) as error:
                raise ValueError(f"code: expected Python, got {source[:60]!r} ({error})") from None
            if not body.body:
                raise ValueError("code: is empty; expected an expression or statement") from None
            root = body.body[0] if len(body.body) == 1 else body
        except ValueError as error:
            raise ValueError(f"code: expected Python, got {source[:60]!r} ({error})") from None
        source = source.strip()
        nodes: list[tuple[int, str, tuple[int, int]]] = []
        _add_node(root, -1, _Offsets(source), nodes)
        parent, labels, spans = zip(*nodes, strict=True)
        return cls(np.array(parent), labels, np.array(spans), source)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The children of each node, in order."""
        found: list[list[int]] = [[] for _ in self.parent]
        for v, up in enumerate(self.parent):
            if up >= 0:
                found[up].append(v)
        return tuple(map(tuple, found))

    @cached_property
    def rank(self) -> NDArray[np.int64]:
        """Position of each node among its siblings."""
        rank = np.zeros(len(self), int)
        for siblings in self.children:
            rank[list(siblings)] = np.arange(len(siblings))
        return rank

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Nodes in preorder."""
        stack, order = [int(v) for v in np.flatnonzero(self.parent < 0)], []
        while stack:
            order.append(stack.pop())
            stack += self.children[order[-1]][::-1]
        return np.array(order)

    @cached_property
    def below(self) -> Mask:
        """(n, n) bool: row v marks the subtree of v, itself included."""
        below = np.eye(len(self), dtype=bool)
        for v in self.order[:0:-1]:
            below[self.parent[v]] |= below[v]
        return below

    @cached_property
    def size(self) -> NDArray[np.int64]:
        """Number of nodes in each subtree."""
        return self.below.sum(1)

    @cached_property
    def owner(self) -> NDArray[np.int64]:
        """Node that each character of the source belongs to: the deepest that spans it, or -1."""
        owner = np.full(len(self.source), -1)
        for v in self.order:
            owner[slice(*self.spans[v])] = v
        return owner

    def costs(self, starts: ArrayLike, nll: ArrayLike, *, clip: float = 10.0) -> NDArray:
        """Node costs out of token costs: each node has the tokens of its own text.

        Args:
            starts: (t,) offset of each token's first visible character in the source.
            nll: (t,) negative log-likelihood of each token, nats.
            clip: node costs are clipped to [0, clip]; the paper's 10.

        Returns:
            (n,) costs; a token outside every node counts for the root.
        """
        if self.spans is None:
            raise ValueError("tree: has no text; expected one made by Tree.from_ast")
        starts = np.asarray(checks.to_numpy(checks.as_array(starts, "starts", ndim=1)), int)
        nll = np.asarray(checks.to_numpy(checks.as_floats(nll, "nll", ndim=1)), float)
        checks.same_length(starts=starts, nll=nll)
        if (starts < 0).any():
            raise ValueError(f"starts: row {int((starts < 0).argmax())} is negative; expected >= 0")
        owner = np.append(self.owner, -1)[np.minimum(starts, len(self.source))]
        owner = np.where(owner < 0, self.order[0], owner)
        return np.clip(np.bincount(owner, nll, minlength=len(self)), 0.0, clip)

    def render(self, holes: ArrayLike = (), hole: str = "??") -> str:
        """Text with the subtrees at the given nodes replaced by a sign."""
        holes = [int(v) for v in np.atleast_1d(np.asarray(holes, int))]
        if self.spans is None:
            return self._nested(int(self.order[0]), set(holes), hole)
        text = self.source
        for start, stop in sorted((tuple(self.spans[v]) for v in holes), reverse=True):
            text = text[:start] + hole + text[stop:]
        return text

    def _nested(self, v: int, holes: set[int], hole: str) -> str:
        if v in holes:
            return hole
        inner = ", ".join(self._nested(c, holes, hole) for c in self.children[v])
        return f"{self.labels[v]}({inner})" if inner else self.labels[v]


class _Offsets:
    """Character offsets of Python's line numbers and UTF-8 columns."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines(keepends=True) or [""]
        self.starts = np.cumsum([0, *map(len, self.lines)])

    def __call__(self, line: int, column: int) -> int:
        before = self.lines[line - 1].encode()[:column].decode()
        return int(self.starts[line - 1]) + len(before)


def _parts(node: ast.AST) -> Iterator[tuple[str, object]]:
    """Fields of a syntax node that matter, lists taken apart."""
    for name, value in ast.iter_fields(node):
        if name in ("ctx", "kind", "type_comment", "type_ignores"):
            continue
        for item in value if isinstance(value, list) else [value]:
            yield name, item


def _add_node(
    node: ast.AST, parent: int, at: _Offsets, nodes: list[tuple[int, str, tuple[int, int]]]
) -> bool:
    """Append a node and its subtree in preorder; False when it has no text of its own."""
    index = len(nodes)
    nodes.append((parent, "", (0, 0)))
    found, span = [], []
    if isinstance(node, _LEAVES):
        found.append(ast.dump(node))
    else:
        for name, part in _parts(node):
            if isinstance(part, ast.AST) and not isinstance(part, _NO_CODE):
                first = len(nodes)
                text = "" if _add_node(part, index, at, nodes) else ast.dump(part)
                found.append(f"{name}{text}")
                span += [offset for _, _, s in nodes[first:] for offset in s]
            else:
                text = type(part).__name__ if isinstance(part, ast.AST) else repr(part)
                found.append(f"{name}={text}")
    if hasattr(node, "lineno"):
        span += [at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)]
    if not span:
        del nodes[index:]
        return False
    label = f"{type(node).__name__}({', '.join(found)})"
    nodes[index] = (parent, label, (min(span), max(span)))
    return True
