"""A generated language whose every conditional is known: hidden Markov sentences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from workbench.lab import checks

LARGEST = 200_000  # masked sentences that `HMMLanguage.contexts` lists


@dataclass(frozen=True)
class Contexts:
    """Masked sentences with one hidden word each, and all that is true about it.

    Attributes:
        tokens: (m, t) words; the hidden one is the index ``vocab``.
        positions: (m,) where it is.
        weights: (m,) probability of each context; they sum to one.
        targets: (m, v) exact conditional of the hidden word.
        posterior: (m, k) exact posterior of the hidden state behind it.
    """

    tokens: Int[Tensor, "m t"]
    positions: Int[Tensor, " m"]
    weights: Float[Tensor, " m"]
    targets: Float[Tensor, "m v"]
    posterior: Float[Tensor, "m k"]

    @property
    def minimal_loss(self) -> float:
        """Mean entropy of the true conditionals, nats a word: no model is below."""
        return float(self.weights @ torch.special.entr(self.targets).sum(1))

    @property
    def labels(self) -> Int[Tensor, " m"]:
        """Likeliest hidden state given the context: the downstream task."""
        return self.posterior.argmax(1)

    def excess(self, logits: Float[Tensor, "m v"]) -> float:
        r"""Loss above the minimum, $E_x KL(p^*(\cdot\mid x)\,\|\,p_\theta(\cdot\mid x))$, nats."""
        log_probs = logits.double().cpu().log_softmax(1)
        gap = torch.xlogy(self.targets, self.targets) - self.targets * log_probs
        return float(self.weights @ gap.sum(1))


@dataclass(frozen=True)
class HMMLanguage:
    """Sentences whose words are emitted by a hidden Markov chain; every conditional is known.

    Attributes:
        initial: (k,) probabilities of the first state.
        transition: (k, k), rows sum to one.
        emission: (k, v), rows sum to one.
    """

    initial: Float[Tensor, " k"]
    transition: Float[Tensor, "k k"]
    emission: Float[Tensor, "k v"]

    def __post_init__(self) -> None:
        rows = {"initial": self.initial[None], **{q: getattr(self, q) for q in _MATRICES}}
        for name, value in rows.items():
            checks.as_probs(value, name, tol=1e-9)
        k = len(self.initial)
        if self.transition.shape != (k, k) or len(self.emission) != k:
            raise ValueError(
                f"transition, emission: expected {k} states, got shapes "
                f"{tuple(self.transition.shape)} and {tuple(self.emission.shape)}"
            )

    @classmethod
    def random(
        cls,
        n_states: int = 8,
        vocab: int = 30,
        *,
        concentration: float = 0.3,
        random_state: np.random.Generator | int | None = None,
    ) -> HMMLanguage:
        """Rows drawn from symmetric Dirichlet distributions; the chain starts uniformly.

        Args:
            n_states: k, at least 2.
            vocab: v, at least 2.
            concentration: of the Dirichlet; small makes rows that favour few entries.
            random_state: seed or generator.
        """
        k, v = (
            checks.count(n, q, minimum=2) for n, q in ((n_states, "n_states"), (vocab, "vocab"))
        )
        alpha = checks.positive(concentration, "concentration")
        rng = checks.as_rng(random_state)
        rows = [rng.dirichlet(np.full(size, alpha), k) + 1e-6 for size in (k, v)]
        transition, emission = (torch.from_numpy(r / r.sum(1, keepdims=True)) for r in rows)
        return cls(torch.full((k,), 1 / k, dtype=torch.float64), transition, emission)

    @property
    def vocab(self) -> int:
        """Number of words; also the index that stands for a hidden word."""
        return self.emission.shape[1]

    def sample(
        self, count: int, length: int, *, generator: torch.Generator | int | None = None
    ) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"]]:
        """``count`` sentences of ``length`` words and the states behind them."""
        n, t = checks.count(count, "count"), checks.count(length, "length")
        g = checks.as_generator(generator)
        uniform = torch.rand(2, t, n, 1, dtype=torch.float64, generator=g)
        move, emit = self.transition.cumsum(1), self.emission.cumsum(1)
        states = [_drawn(self.initial.cumsum(0).expand(n, -1), uniform[0, 0])]
        for i in range(1, t):
            states.append(_drawn(move[states[-1]], uniform[0, i]))
        z = torch.stack(states, 1)
        return _drawn(emit[z], uniform[1].transpose(0, 1)), z

    def messages(
        self, tokens: Int[Tensor, "n t"]
    ) -> tuple[Float[Tensor, "n t k"], Float[Tensor, "n t k"], Float[Tensor, " n"]]:
        r"""Forward-backward: $p(z_t\mid x_{<t})$, the message from the right, $\log p(x)$.

        Words that equal ``vocab`` are hidden: they are summed over.
        """
        tokens = self._words(tokens)
        seen = F.pad(self.emission, (0, 1), value=1.0).T[tokens]  # (n, t, k), 1 where hidden
        p, logp = self.initial.expand(len(tokens), -1), torch.zeros(len(tokens), dtype=seen.dtype)
        ahead, behind = [], []
        for here in seen.unbind(1):
            ahead.append(p)
            joint = p * here
            total = joint.sum(1, keepdim=True)
            logp, p = logp + total[:, 0].log(), joint / total @ self.transition
        r = torch.ones_like(p)
        for here in reversed(seen.unbind(1)):
            behind.append(r)
            r = (r * here) @ self.transition.T
            r = r / r.sum(1, keepdim=True)
        return torch.stack(ahead, 1), torch.stack(behind[::-1], 1), logp

    def posterior(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t k"]:
        r"""$p(z_t\mid\text{all visible words but the one at }t)$; hidden words equal ``vocab``."""
        ahead, behind, _ = self.messages(tokens)
        joint = ahead * behind
        return joint / joint.sum(-1, keepdim=True)

    def conditional(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t v"]:
        """The true distribution of each word given all other visible ones: what a masked LM learns.

        Args:
            tokens: (n, t) words; an entry equal to ``vocab`` is hidden from all others.

        Returns:
            (n, t, v), rows sum to one. At a visible word the word itself is left out.

        Raises:
            ValueError: a token is no word of the language.
        """
        return self.posterior(tokens) @ self.emission

    def next_token(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t v"]:
        """The true distribution of word t + 1 given words up to t: what a causal LM learns."""
        tokens = F.pad(self._words(tokens), (0, 1), value=self.vocab)
        return self.messages(tokens)[0][:, 1:] @ self.emission

    def contexts(
        self,
        length: int,
        *,
        count: int | None = None,
        generator: torch.Generator | int | None = None,
    ) -> Contexts:
        """Sentences with one hidden word at a uniformly drawn place.

        Args:
            length: words a sentence.
            count: draw so many, of equal weight; None lists all ``length * vocab**(length - 1)``
                with their probabilities, which makes every mean over them exact.
            generator: of the draws.

        Raises:
            ValueError: there are more than 200,000 to list.
        """
        t, v = checks.count(length, "length", minimum=2), self.vocab
        if count is not None:
            g = checks.as_generator(generator)
            tokens = self.sample(count, t, generator=g)[0]
            positions = torch.randint(t, (len(tokens),), generator=g)
            weights = torch.full((len(tokens),), 1 / len(tokens), dtype=torch.float64)
        elif t * v ** (t - 1) > LARGEST:
            raise ValueError(f"length: {t * v ** (t - 1):,} contexts to list; give a count to draw")
        else:
            rest = torch.cartesian_prod(*[torch.arange(v)] * (t - 1)).reshape(-1, t - 1)
            rows = [torch.cat([rest[:, :i], rest[:, :1] * 0, rest[:, i:]], 1) for i in range(t)]
            tokens = torch.cat(rows)
            positions = torch.arange(t).repeat_interleave(len(rest))
            weights = torch.empty(0)
        tokens = tokens.scatter(1, positions[:, None], v)
        ahead, behind, logp = self.messages(tokens)
        here = torch.arange(len(tokens)), positions
        joint = ahead[here] * behind[here]
        posterior = joint / joint.sum(1, keepdim=True)
        weights = weights if count is not None else logp.exp() / t
        return Contexts(tokens, positions, weights, posterior @ self.emission, posterior)

    def _words(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens: expected integers (n, t), got {tuple(tokens.shape)}")
        if tokens.numel() == 0 or not 0 <= int(tokens.min()) <= int(tokens.max()) <= self.vocab:
            raise ValueError(f"tokens: expected words 0..{self.vocab - 1}, {self.vocab} if hidden")
        return tokens


_MATRICES = ("transition", "emission")


def _drawn(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Indices by inversion of a distribution function whose last axis ends near one."""
    return (uniform > cumulative[..., :-1]).sum(-1)
