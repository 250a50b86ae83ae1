"""Two made-up languages whose translation entropy is known exactly.

Words of both languages are grouped into meanings; a translator keeps the meaning and chooses among
its words by the word and the one before it, with slips. Sentences are written in reverse order in
the other language. Text is natural on one side (a Markov chain of words) and translated on the
other: source-original pairs are p(x) T(y | x), target-original pairs q(y) T'(x | y). Both, and the
mixture of both that a web crawl would hold, have exact probabilities: the first is a product, the
second sums over the Markov chain of y by the forward algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from workbench.lab import checks


@dataclass(frozen=True)
class Languages:
    """Probabilities of two languages and of translators between them.

    The first axis of each table is the previous word, with one more row for a sentence's beginning.

    Attributes:
        source, target: (v + 1, v) next word of natural text.
        forth: (v + 1, v, v) from (previous, present) source word to target word.
        back: (v + 1, v, v) from (previous, present) target word to source word.
    """

    source: Float[Tensor, "v_plus_1 v"]
    target: Float[Tensor, "v_plus_1 v"]
    forth: Float[Tensor, "v_plus_1 v v"]
    back: Float[Tensor, "v_plus_1 v v"]

    @property
    def v(self) -> int:
        """Words in each language."""
        return self.source.shape[1]

    def source_original(
        self, n: int, length: int, rng: np.random.Generator
    ) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"]]:
        """Natural source sentences and their translations."""
        x = _sentences(self.source, n, length, rng)
        return x, _translate(self.forth, x, rng).flip(1)

    def target_original(
        self, n: int, length: int, rng: np.random.Generator
    ) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"]]:
        """Translations into the source language, and the natural target sentences behind them."""
        y = _sentences(self.target, n, length, rng)
        return _translate(self.back, y, rng).flip(1), y

    def log_probs(
        self, x: Int[Tensor, "n t"], y: Int[Tensor, "n t"], natural: float = 0.5
    ) -> Float[Tensor, " n"]:
        r"""Exact $\ln p(y \mid x)$ of a web crawl, in nats a sentence.

        $p(y|x) = \frac{(1-w)\,p(x)T(y|x) + w\,q(y)T'(x|y)}{(1-w)\,p(x) + w\sum_y q(y)T'(x|y)}$.

        Args:
            x: source words.
            y: target words.
            natural: share w of target-original pairs in the crawl; 0 and 1 are the two directions.
        """
        share = checks.fraction(natural, "natural")
        w = torch.tensor([1 - share, share], dtype=torch.float64).log()[:, None]
        px = _chain(self.source, x)
        joint = torch.stack(
            [
                px + _emitted(self.forth, x, y.flip(1)),
                _chain(self.target, y) + _emitted(self.back, y, x.flip(1)),
            ]
        )
        marginal = torch.stack([px, self._forward(x.flip(1))])
        return (joint + w).logsumexp(0) - (marginal + w).logsumexp(0)

    def _forward(self, x: Int[Tensor, "n t"]) -> Float[Tensor, " n"]:
        """ln of sum over y of q(y) T'(x | y), x in the target's order."""
        step = self.target[:, :, None] * self.back  # (previous y, y, x)
        message = step[-1][:, x[:, 0]].T
        total = x.new_zeros(len(x), dtype=torch.float64)
        for t in range(1, x.shape[1]):
            scale = message.sum(1)
            total += scale.log()
            kernel = step[:-1, :, x[:, t]]  # (previous y, y, n)
            message = torch.einsum("np,pyn->ny", message / scale[:, None], kernel)
        return total + message.sum(1).log()


def make_languages(
    seed: int, meanings: int = 4, words: int = 4, slip: float = 0.15, spread: float = 1.5
) -> Languages:
    """Draw two languages.

    Args:
        seed: of all tables.
        meanings: groups of words that translate each other.
        words: words of a meaning in each language.
        slip: chance that a translator picks among a meaning's words at random.
        spread: standard deviation of the natural chains' log-weights; larger is more regular.
    """
    rng = np.random.default_rng(checks.count(seed, "seed", minimum=0))
    v = checks.count(meanings, "meanings") * checks.count(words, "words")
    checks.fraction(slip, "slip")

    def chain() -> Tensor:
        return torch.tensor(spread * rng.standard_normal((v + 1, v))).softmax(-1)

    def translator() -> Tensor:
        favourite = torch.tensor(rng.integers(words, size=(v + 1, v)))
        meaning = torch.arange(v) // words
        same = meaning[:, None] == meaning
        chosen = F.one_hot(meaning * words + favourite, v).double()
        return (1 - slip) * chosen + slip * same.double() / words

    return Languages(chain(), chain(), translator(), translator())


def _draw(probs: Tensor, rng: np.random.Generator) -> Int[Tensor, " n"]:
    """One word from each row."""
    u = torch.tensor(rng.random(len(probs)))[:, None]
    return (probs.cumsum(1) < u).sum(1).clamp(max=probs.shape[1] - 1)


def _sentences(chain: Tensor, n: int, length: int, rng: np.random.Generator) -> Tensor:
    words = [_draw(chain[-1].expand(n, -1), rng)]
    for _ in range(1, length):
        words.append(_draw(chain[words[-1]], rng))
    return torch.stack(words, 1)


def _previous(words: Tensor, start: int) -> Tensor:
    return F.pad(words[:, :-1], (1, 0), value=start)


def _translate(table: Tensor, words: Tensor, rng: np.random.Generator) -> Tensor:
    probs = table[_previous(words, len(table) - 1), words]
    return _draw(probs.flatten(0, 1), rng).view(words.shape)


def _chain(chain: Tensor, words: Tensor) -> Tensor:
    return chain[_previous(words, len(chain) - 1), words].log().sum(1)


def _emitted(table: Tensor, words: Tensor, out: Tensor) -> Tensor:
    return table[_previous(words, len(table) - 1), words, out].log().sum(1)
