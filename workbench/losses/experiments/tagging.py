"""A tagging task with few entities: the names that Python's own source code defines.

The words ``def`` and ``class`` are taken out, identifiers are cut into pieces (``_parse_header`` is
``_``, ``parse``, ``_``, ``header``), and each piece is tagged in the BIO scheme as a part of a
function's name, of a class's name, or of neither. Without its keyword a definition looks much like
a call or a branch, so that the task is ambiguous by itself, with no noise added. Strings and
comments are one token each. About one token in twenty belongs to an entity.

A tagger sees a window of tokens around each position. The source changes with the Python version.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from workbench.lab import checks, data

Array = np.ndarray

TAGS = ("O", "B-def", "I-def", "B-class", "I-class")
_FIRST = {"def": 1, "class": 3}
_DEFINITION = re.compile(r"^(?:def|class) ", re.MULTILINE)
_TOKEN = re.compile(
    r"""
    (?P<string>[rbuf]{0,2}(?:\"{3}[\s\S]*?\"{3}|'{3}[\s\S]*?'{3}
        |"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))
    |(?P<comment>\#[^\n]*)
    |(?P<name>[^\W\d]\w*)
    |(?P<number>\d[\w.]*)
    |(?P<line>\n\s*)
    |(?P<sign>[^\s\w])
    """,
    re.VERBOSE | re.IGNORECASE,
)
_PIECE = re.compile(r"_+|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[A-Z]|\d+|\w")
_PLAIN = {"string": '""', "comment": "#", "number": "0", "line": "\n"}
_RARE = ("<word>", "<Word>", "<WORD>", "<other>")


@dataclass(frozen=True)
class Tokens:
    """A stretch of tagged tokens: what the tagger sees of each, and its tag (index in `TAGS`)."""

    windows: Array
    tags: Array

    def take(self, rows: Array) -> Tokens:
        """The tokens at ``rows``."""
        return Tokens(self.windows[rows], self.tags[rows])


@dataclass(frozen=True)
class Corpus:
    """Training, validation and test tokens from different definitions, and the vocabulary."""

    train: Tokens
    validation: Tokens
    test: Tokens
    vocabulary: tuple[str, ...]


def tagged(source: str) -> list[tuple[str, int]]:
    """Tokens of Python source with their tags; ``def`` and ``class`` are left out."""
    found, first = [], 0
    for match in _TOKEN.finditer(source):
        kind, text = match.lastgroup, match[0]
        if kind != "name":
            found.append((_PLAIN.get(str(kind), text), 0))
        elif text in _FIRST:
            first = _FIRST[text]
            continue
        else:
            for i, piece in enumerate(_PIECE.findall(text)):
                found.append((piece, first + (i > 0) if first else 0))
        first = 0
    return found


def corpus(
    seed: int, *, train: int, held: int, half: int = 4, words: int = 500, head: int = 1200
) -> Corpus:
    """Tokens of the standard library, whole top-level definitions to one part each.

    Args:
        seed: which definitions go where.
        train: tokens to train on.
        held: tokens of the validation part, and as many of the test part.
        half: tokens seen on each side.
        words: size of the vocabulary, from the training part; rarer words keep their case only.
        head: characters read of each definition.
    """
    checks.count(train, "train")
    checks.count(held, "held")
    definitions = _definitions()
    order = iter(np.random.default_rng(seed).permutation(len(definitions)))
    parts = []
    for wanted in (train, held, held):
        tokens: list[tuple[str, int]] = []
        while len(tokens) < wanted:
            tokens += [*tagged(definitions[next(order)][:head]), ("\n", 0)]
        parts.append(tokens[:wanted])
    text, count = np.unique([token for token, _ in parts[0]], return_counts=True)
    common = [str(w) for w in text[np.argsort(-count, kind="stable")][: words - len(_RARE)]]
    vocabulary = (*_RARE, *common)
    index = {word: i for i, word in enumerate(vocabulary)}
    first, second, third = (_windows(tokens, index, half) for tokens in parts)
    return Corpus(first, second, third, vocabulary)


def with_share(tokens: Tokens, size: int, share: float, seed: int) -> Tokens:
    """``size`` tokens drawn at random, ``share`` of them parts of entities; windows stay whole.

    Raises:
        ValueError: there are not so many tokens of one kind.
    """
    rng = np.random.default_rng(seed)
    entity = np.flatnonzero(tokens.tags > 0)
    other = np.flatnonzero(tokens.tags == 0)
    wanted = round(checks.fraction(share, "share") * size)
    if wanted > len(entity) or size - wanted > len(other):
        raise ValueError(
            f"size: {size} tokens with {wanted} of entities are more than the "
            f"{len(entity)} of entities and {len(other)} others there are"
        )
    rows = [rng.choice(entity, wanted, False), rng.choice(other, size - wanted, False)]
    return tokens.take(np.sort(np.concatenate(rows)))


def spans(tags: Array) -> Array:
    """Entities as rows (start, stop, kind); an I that continues nothing begins one.

    Args:
        tags: (n,) indices in `TAGS`, in the order of the text.
    """
    tags = np.asarray(tags)
    kind = (tags + 1) // 2  # 0, 1 (def), 2 (class)
    before = np.concatenate([[0], kind[:-1]])
    begins = (kind > 0) & ((tags % 2 == 1) | (before != kind))
    after = np.concatenate([begins[1:], [True]]) | (np.concatenate([kind[1:], [0]]) != kind)
    ends = (kind > 0) & after
    return np.stack([np.flatnonzero(begins), np.flatnonzero(ends) + 1, kind[begins]], 1)


def span_f1(gold: Array, guess: Array) -> float:
    """F1 of entities that agree in both ends and in kind; 0 where none does."""
    a, b = ({tuple(row) for row in spans(tags).tolist()} for tags in (gold, guess))
    return 2 * len(a & b) / max(1, len(a) + len(b))


def token_f1(gold: Array, guess: Array) -> float:
    """F1 of tokens tagged as part of an entity with the right tag (micro average without O)."""
    right = int(((gold == guess) & (gold > 0)).sum())
    return 2 * right / max(1, int((gold > 0).sum() + (guess > 0).sum()))


def precision_at(gold: Array, score: Array, recall: Array) -> Array:
    """Highest precision of "part of an entity" at no less than each recall.

    Args:
        gold: (n,) tags.
        score: (n,) of being part of an entity.
        recall: levels in [0, 1].
    """
    hits = np.cumsum((gold > 0)[np.argsort(-score, kind="stable")])
    precision = hits / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(hits, np.ceil(np.asarray(recall) * hits[-1]).clip(1))
    return best[at]


@cache
def _definitions() -> list[str]:
    text = data.text("stdlib")
    cuts = [match.start() for match in _DEFINITION.finditer(text)]
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _windows(tokens: list[tuple[str, int]], index: dict[str, int], half: int) -> Tokens:
    ids = [index[word] if word in index else _rare(word) for word, _ in tokens]
    padded = np.pad(np.array(ids), half, constant_values=index["\n"])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    return Tokens(np.ascontiguousarray(windows), np.array([tag for _, tag in tokens]))


def _rare(word: str) -> int:
    return 0 if word.islower() else 1 if word[1:].islower() else 2 if word.isupper() else 3
