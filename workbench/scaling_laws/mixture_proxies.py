"""Many tiny language models at once, each trained on its own mixture of a few texts.

A model sees the last ``context`` symbols and predicts the next: embeddings, one hidden layer,
softmax (Bengio et al., 2003). All models are one batch: `torch.func.vmap` over stacked parameters.
They start from the same weights and share their random numbers, so that two mixtures differ by
what they are and not by luck.

Used by `regmix`; works on any texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from workbench.lab import checks

SYMBOLS = 96
"""New line and the printable ASCII characters; other characters count as a question mark."""

_SCALE = 1e9
"""Of loss and Adam's eps together, which changes no step: squares of the gradients of symbols that
a pure mixture never shows would be subnormal numbers, and those are several times slower."""


class WindowLM(nn.Module):
    """Next symbol from the last few: embeddings side by side, one GELU layer, softmax.

    Args:
        context: symbols seen.
        embed: width of a symbol's embedding.
        hidden: width of the hidden layer.
    """

    def __init__(self, context: int = 3, embed: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.context = context
        self.symbols = nn.Embedding(SYMBOLS, embed)
        self.inner = nn.Linear(context * embed, hidden)
        self.outer = nn.Linear(hidden, SYMBOLS)

    def forward(self, windows: Int[Tensor, "n c"]) -> Float[Tensor, "n v"]:
        """Logits of the symbol after each window."""
        return self.outer(F.gelu(self.inner(self.symbols(windows).flatten(1))))


def encode(text: str) -> Int[Tensor, " n"]:
    """Symbols 0 (new line) to 95 of a text."""
    plain = re.sub(r"[^\n -~]", "?", text)
    codes = np.frombuffer(plain.encode("ascii"), dtype=np.uint8).astype(np.int64)
    return torch.from_numpy(np.where(codes == 10, 0, codes - 31))


def train_proxies(
    mixtures: pd.DataFrame,
    texts: Mapping[str, str],
    tests: Mapping[str, str],
    *,
    context: int = 3,
    embed: int = 8,
    hidden: int = 16,
    steps: int = 120,
    batch: int = 256,
    lr: float = 0.02,
    windows: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Train one model per mixture; held-out loss on every test text.

    Each position of a batch draws its domain from the model's mixture and then a place in that
    text. Adam; the learning rate falls linearly to zero.

    Args:
        mixtures: (m, k) weights of the domains, columns named as ``texts``.
        texts: training text per domain.
        tests: held-out text per target; targets need not be domains.
        context, embed, hidden: size of the models; see `WindowLM`.
        steps: of the optimiser.
        batch: symbols predicted a step, by each model.
        lr: learning rate at the beginning.
        windows: symbols of each test text that are predicted, evenly spaced.
        seed: of weights and batches.

    Returns:
        Frame (m, targets) of losses in nats a symbol.

    Raises:
        ValueError: a domain has no text, or a text is not longer than the context.
    """
    checks.as_probs(mixtures.to_numpy(float), "mixtures", tol=0.01)
    if missing := [name for name in mixtures if name not in texts]:
        raise ValueError(f"texts: no text for the domain {missing[0]!r}")
    corpora = [encode(texts[str(name)]) for name in mixtures]
    held = {name: encode(text) for name, text in tests.items()}
    for name, symbols in [*zip(mixtures, corpora, strict=True), *held.items()]:
        if len(symbols) <= context:
            raise ValueError(f"texts: {name!r} is not longer than {context} symbols")
    generator = torch.Generator().manual_seed(checks.count(seed, "seed", minimum=0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        net = WindowLM(context, embed, hidden)
    m = len(mixtures)
    weights = {
        name: value.detach().expand(m, *value.shape).clone().requires_grad_()
        for name, value in net.named_parameters()
    }

    def loss(own: dict[str, Tensor], seen: Tensor, following: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, own, (seen,)), following)

    losses = vmap(loss)
    optimizer = torch.optim.Adam(weights.values(), lr=lr, eps=1e-8 * _SCALE)
    stream = batches(mixtures, corpora, context, steps, batch, generator)
    for step, (seen, following) in enumerate(stream):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        (_SCALE * losses(weights, seen, following).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        found = {
            name: vmap(loss, in_dims=(0, None, None))(weights, *_spread(symbols, context, windows))
            for name, symbols in held.items()
        }
    return pd.DataFrame({q: value.double().numpy() for q, value in found.items()}, mixtures.index)


def batches(
    mixtures: pd.DataFrame,
    corpora: list[Tensor],
    context: int,
    steps: int,
    batch: int,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (m, batch, context) windows and (m, batch) next symbols, a pair per step.

    One uniform number picks the domain (by the model's cumulated weights), another the place: both
    are common to all models.
    """
    joined = torch.cat(corpora)
    lengths = torch.tensor([len(c) - context for c in corpora])
    starts = torch.tensor([0, *[len(c) for c in corpora[:-1]]]).cumsum(0)
    shares = torch.tensor(mixtures.to_numpy(float))
    upper = (shares.cumsum(1) / shares.sum(1, keepdim=True)).contiguous()
    offsets = torch.arange(context + 1)
    for _ in range(steps):
        which, place = torch.rand(2, batch, dtype=torch.float64, generator=generator)
        domain = torch.searchsorted(upper, which.expand(len(upper), batch).contiguous(), right=True)
        domain = domain.clamp(max=len(corpora) - 1)
        first = starts[domain] + (place * lengths[domain]).long()
        taken = joined[first[..., None] + offsets]
        yield taken[..., :-1], taken[..., -1]


def _spread(symbols: Tensor, context: int, windows: int) -> tuple[Tensor, Tensor]:
    count = min(windows, len(symbols) - context)
    first = torch.linspace(0, len(symbols) - context - 1, count).long()
    taken = symbols[first[:, None] + torch.arange(context + 1)]
    return taken[:, :-1], taken[:, -1]
