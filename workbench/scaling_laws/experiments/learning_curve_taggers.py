"""Taggers of Python source: which part does each name play? Learned on growing samples of code.

A token is a word, a logical line a sentence. The tag of an operator, keyword or literal is known
from its form; that of a name is the part it plays, read off the syntax tree: called function,
called method, attribute read or written, parameter, keyword of a call, variable read or written.
Only names count in the accuracy. The same word plays several parts, as in English.
"""

import ast
import io
import keyword
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from workbench import lab

PARTS = (
    "call", "method", "attribute", "attribute set", "parameter", "keyword argument", "variable",
    "variable set", "definition", "other name",
)  # fmt: skip
FORMS = ("(", ")", "[", "]", "{", "}", ",", ":", ".", "=", "*", "operator", "number", "string")
WORDS = ("def", "for", "in", "import", "as", "return", "lambda", "if", "keyword")
TAGS = {tag: i for i, tag in enumerate((*PARTS, *FORMS, *WORDS))}
NAMES = len(PARTS)


@dataclass(frozen=True)
class Corpus:
    """Tokens of a training and a test text, with features as numbers.

    Args:
        word, tag: `(n,)` numbers of the tokens' words and tags.
        line: `(n,)` number of the logical line.
        features: `(n, 5)` rows of one table: word, word before, word after, last three characters,
            shape.
        train: how many of the tokens are for training; the others are for testing.
        rows: number of rows of the feature table.
    """

    word: np.ndarray
    tag: np.ndarray
    line: np.ndarray
    features: np.ndarray
    train: int
    rows: int

    @property
    def named(self) -> np.ndarray:
        """Which tokens are names, the ones that are scored."""
        return self.tag < NAMES


def corpus(seed: int, train: int, test: int) -> Corpus:
    """Functions of the standard library in a seeded order, `train` tokens and `test` tokens."""
    functions = lab.data.stdlib_functions()
    words: list[str] = []
    tags: list[int] = []
    lines: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(functions)):
        for token, part, first in tagged(functions[number].source):
            words.append(token)
            tags.append(TAGS[part])
            lines.append(len(words) if first else lines[-1])
        if len(words) >= train + test:
            break
    n = train + test
    words = words[:n]
    before, after = [words[-1], *words[:-1]], [*words[1:], words[0]]
    columns = [words, before, after, [w[-3:] for w in words], [_shape(w) for w in words]]
    table: dict[tuple[int, str], int] = {}
    features = [
        [table.setdefault((j, w), len(table)) for w in column] for j, column in enumerate(columns)
    ]
    vocabulary: dict[str, int] = {}
    numbers = np.array([vocabulary.setdefault(w, len(vocabulary)) for w in words])
    return Corpus(
        numbers, np.array(tags[:n]), np.array(lines[:n]), np.array(features).T, train, len(table)
    )


def tagged(source: str) -> list[tuple[str, str, bool]]:
    """(word, tag, starts a logical line) of the tokens of a definition."""
    return list(_tagged(source))


def _parts(source: str) -> dict[tuple[int, int], str]:
    """The part that the name at each (line, byte) plays."""
    found: dict[tuple[int, int], str] = {}
    tree = ast.parse(source)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            place = node.lineno, node.col_offset
            if id(node) in called:
                found[place] = "call"
            else:
                found[place] = "variable" if isinstance(node.ctx, ast.Load) else "variable set"
        elif isinstance(node, ast.Attribute):
            assert node.end_lineno is not None and node.end_col_offset is not None
            place = node.end_lineno, node.end_col_offset - len(node.attr.encode())
            if id(node) in called:
                found[place] = "method"
            else:
                found[place] = "attribute" if isinstance(node.ctx, ast.Load) else "attribute set"
        elif isinstance(node, ast.arg):
            found[node.lineno, node.col_offset] = "parameter"
        elif isinstance(node, ast.keyword) and node.arg is not None:
            found[node.lineno, node.col_offset] = "keyword argument"
    return found


def _tagged(source: str) -> Iterator[tuple[str, str, bool]]:
    parts, first, last = _parts(source), True, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        word, (row, column) = token.string, token.start
        if token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            first = True
            continue
        if token.type in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
            continue
        if token.type == tokenize.NUMBER:
            word, tag = "0", "number"
        elif token.type == tokenize.STRING:
            word, tag = '""', "string"
        elif token.type == tokenize.OP:
            tag = word if word in FORMS else "operator"
        elif keyword.iskeyword(word):
            tag = word if word in WORDS else "keyword"
        else:
            place = row, len(token.line[:column].encode())
            tag = "definition" if last in ("def", "class") else parts.get(place, "other name")
        yield word, tag, first
        first, last = False, word


def _shape(word: str) -> str:
    """Letters as x and X, digits as 0, runs shortened."""
    kinds = [
        "X" if c.isupper() else "x" if c.isalpha() else "0" if c.isdigit() else c for c in word
    ]
    return "".join(c for c, before in zip(kinds, ["", *kinds], strict=False) if c != before)


def frequent_tag(text: Corpus, sizes: np.ndarray) -> np.ndarray:
    """Accuracy of each word's most frequent tag, at every size, in percent."""
    counts = np.zeros((text.word.max() + 1, NAMES))
    test, word, truth = _test(text)

    def learn(part: slice) -> None:
        kept = text.named[part]
        np.add.at(counts, (text.word[part][kept], text.tag[part][kept]), 1)

    def predict() -> np.ndarray:
        return (counts[word[test]] + 1e-3 * counts.sum(0) / counts.sum()).argmax(1)

    return _curve(sizes, learn, predict, truth)


def naive_bayes(text: Corpus, sizes: np.ndarray) -> np.ndarray:
    """Accuracy of multinomial naive Bayes on the five features, with add-0.1 smoothing."""
    counts, prior = np.zeros((text.rows, NAMES)), np.zeros(NAMES)
    test, _, truth = _test(text)
    width = np.array([len(np.unique(column)) for column in text.features.T])
    asked = text.features[text.train :][test]

    def learn(part: slice) -> None:
        kept = text.named[part]
        tags = text.tag[part][kept]
        np.add.at(counts, (text.features[part][kept], tags[:, None]), 1)
        np.add.at(prior, tags, 1)

    def predict() -> np.ndarray:
        score = np.log(counts[asked] + 0.1).sum(1)
        return (score - np.log(prior + 0.1 * width[:, None]).sum(0) + np.log(prior + 1)).argmax(1)

    return _curve(sizes, learn, predict, truth)


def hidden_markov(text: Corpus, sizes: np.ndarray) -> np.ndarray:
    """Accuracy of a bigram hidden Markov model, decoded line by line with Viterbi's recursion.

    Words not seen in training have the probability of words seen once.
    """
    k = len(TAGS)
    words, moves, start = np.zeros((text.word.max() + 1, k)), np.zeros((k, k)), np.zeros(k)
    begins = np.flatnonzero(np.diff(text.line, prepend=-1))
    first = np.zeros(len(text.line), bool)
    first[begins] = True
    test, word, truth = _test(text)
    tags, line = text.tag[text.train :], text.line[text.train :]
    fixed = np.where(tags < NAMES, -1, tags)
    opening = np.flatnonzero(np.diff(line, prepend=-1))
    lengths = np.diff([*opening, len(line)])
    order = np.argsort(-lengths, kind="stable")
    opening, lengths = opening[order], lengths[order]

    def learn(part: slice) -> None:
        here = text.tag[part]
        np.add.at(words, (text.word[part], here), 1)
        np.add.at(start, here[first[part]], 1)
        inner = ~first[part][1:]
        np.add.at(moves, (here[:-1][inner], here[1:][inner]), 1)

    def predict() -> np.ndarray:
        once = (words * (words.sum(1, keepdims=True) == 1)).sum(0) + 0.1
        shown = np.where(words[word].sum(1, keepdims=True) > 0, words[word] + 1e-3, once)
        emit = np.log(shown) - np.log(words.sum(0) + once)
        known = fixed >= 0
        emit[known] = -1e9
        emit[known, fixed[known]] = 0
        emit[~known, NAMES:] = -1e9
        step = np.log(moves + 0.1) - np.log((moves + 0.1).sum(1, keepdims=True))
        step = np.ascontiguousarray(step.T)  # to, from
        best = np.zeros(len(word), int)
        score = np.log(start + 0.1) + emit[opening]
        back = []
        for t in range(1, lengths.max()):
            active = int((lengths > t).sum())
            reach = score[:active, None] + step
            back.append(reach.argmax(2))
            score[:active] = reach.max(2) + emit[opening[:active] + t]
        state = score.argmax(1)
        for t in range(lengths.max() - 1, -1, -1):
            active = int((lengths > t).sum())
            best[opening[:active] + t] = state[:active]
            if t:
                state[:active] = back[t - 1][np.arange(active), state[:active]]
        return best[test]

    return _curve(sizes, learn, predict, truth)


def averaged_perceptron(text: Corpus, sizes: np.ndarray) -> np.ndarray:
    """Accuracy of a greedy averaged perceptron after one pass: five features and the tags before.

    One pass over the first x tokens is the training on x tokens from scratch.
    """
    k = len(TAGS)
    base = text.rows
    weights = np.zeros((base + k + k * k + k * (text.word.max() + 1), NAMES))
    credit = np.zeros_like(weights)  # step times change: the average is weights - credit / steps
    steps = 0
    rows = np.empty(text.features.shape[1] + 3, int)
    _, _, truth = _test(text)

    def tag(part: slice, table: np.ndarray, answers: np.ndarray | None) -> list[int]:
        nonlocal steps
        found, one, two, last = [], 0, 0, -1
        for i in range(part.start, part.stop):
            here = text.tag[i]
            if text.line[i] != last:
                one, two, last = k - 1, k - 1, text.line[i]
            if here < NAMES:
                rows[:-3] = text.features[i]
                rows[-3] = base + one
                rows[-2] = base + k + k * two + one
                rows[-1] = base + k + k * k + k * text.word[i] + one
                guess = int(table[rows].sum(0).argmax())
                if answers is not None:
                    steps += 1
                    if guess != here:
                        table[rows, here] += 1
                        table[rows, guess] -= 1
                        credit[rows, here] += steps
                        credit[rows, guess] -= steps
                found.append(guess)
                here = guess
            two, one = one, int(here)
        return found

    def learn(part: slice) -> None:
        tag(part, weights, text.tag)

    def predict() -> np.ndarray:
        average = weights - credit / max(steps, 1)
        return np.array(tag(slice(text.train, len(text.tag)), average, None))

    return _curve(sizes, learn, predict, truth)


TAGGERS: dict[str, Callable[[Corpus, np.ndarray], np.ndarray]] = {
    "frequent tag": frequent_tag,
    "naive Bayes tagger": naive_bayes,
    "hidden Markov": hidden_markov,
    "averaged perceptron": averaged_perceptron,
}


def _test(text: Corpus) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which test tokens are names, the words of all test tokens, and the names' true tags."""
    named = text.named[text.train :]
    return named, text.word[text.train :], text.tag[text.train :][named]


def _curve(
    sizes: np.ndarray,
    learn: Callable[[slice], None],
    predict: Callable[[], np.ndarray],
    truth: np.ndarray,
) -> np.ndarray:
    """Percent of right answers after each size; `learn` is given what is new."""
    found, seen = [], 0
    for size in sizes:
        learn(slice(seen, int(size)))
        found.append(100 * float((predict() == truth).mean()))
        seen = int(size)
    return np.array(found)
