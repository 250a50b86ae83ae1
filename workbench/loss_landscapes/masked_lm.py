"""A small masked language model, its training on fresh sentences, and twins that predict alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import checks
from workbench.lab.models import Block
from workbench.loss_landscapes.hmm_language import HMMLanguage


class MaskedLM(nn.Module):
    """Bidirectional pre-norm transformer that answers at one hidden word of each sentence.

    Heads are 8 wide at any width, so that a small model is exactly a large one (`enlarge`).

    Args:
        vocab: words; the table holds one more row, for hidden ones.
        length: longest sentence.
        d: width, a multiple of 8.
        layers: blocks.
    """

    def __init__(self, vocab: int, length: int, d: int = 16, layers: int = 1) -> None:
        super().__init__()
        if checks.count(d, "d") % 8:
            raise ValueError(f"d: expected a multiple of 8 (heads are 8 wide), got {d}")
        self.vocab, self.length, self.d = vocab, length, d
        self.embed = nn.Embedding(vocab + 1, d)
        self.positions = nn.Embedding(length, d)
        self.blocks = nn.ModuleList(Block(d, d // 8, causal=False) for _ in range(layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab)

    def features(
        self, tokens: Int[Tensor, "b t"], positions: Int[Tensor, " b"]
    ) -> Float[Tensor, "b d"]:
        """What the output layer reads at the hidden word: the representation that is transferred.

        The MLP of the last block is applied at that word only; elsewhere nobody reads it.
        """
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        *inner, last = self.blocks
        for block in inner:
            x = block(x)
        x = x + last.attention(last.norm1(x))  # type: ignore[operator]
        x = x.gather(1, positions[:, None, None].expand(-1, 1, self.d))[:, 0]
        out: Tensor = self.norm(x + last.mlp(last.norm2(x)))  # type: ignore[operator]
        return out

    def forward(
        self, tokens: Int[Tensor, "b t"], positions: Int[Tensor, " b"]
    ) -> Float[Tensor, "b v"]:
        """Logits of the hidden word."""
        out: Tensor = self.head(self.features(tokens, positions))
        return out


def pretrain(
    model: nn.Module,
    language: HMMLanguage,
    *,
    length: int,
    steps: int,
    checkpoints: Sequence[int],
    batch: int = 128,
    lr: float = 1e-2,
    decays: Mapping[float, float] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    generator: torch.Generator | int | None = None,
) -> dict[int, dict[str, Tensor]]:
    """Masked-word training on sentences that are drawn once and never seen again.

    Args:
        model: ``model(tokens, positions)`` gives logits of the hidden word; trained in place.
        language: draws the sentences.
        length: words a sentence; one is hidden, at a uniformly drawn place.
        steps: optimiser steps.
        checkpoints: steps after which the weights are kept.
        batch: sentences a step.
        lr: learning rate.
        decays: share of the steps -> factor of ``lr`` from there on; default 0.3 from three tenths
            (the released recipe also falls in steps). Between falls it is constant.
        optimizer: called with the parameters and ``lr``.
        generator: of the sentences.

    Returns:
        The weights at each checkpoint.

    Reference: Liu et al. (2022), arXiv 2210.14199, section on generated data.
    """
    checks.count(steps, "steps")
    if not checkpoints or not all(0 < step <= steps for step in checkpoints):
        raise ValueError(f"checkpoints: expected steps from 1 to {steps}, got {list(checkpoints)}")
    g = checks.as_generator(generator)
    device = next(model.parameters()).device
    factors = {0.0: 1.0, **({0.3: 0.3} if decays is None else decays)}
    starts = {round(share * steps): factor * lr for share, factor in factors.items()}
    chosen, kept = optimizer(model.parameters(), lr=lr), {}
    block = max(1, 50_000 // batch)
    for step in range(steps):
        if step % block == 0:
            tokens = language.sample(block * batch, length, generator=g)[0]
            positions = torch.randint(length, (len(tokens),), generator=g)
            words = tokens.gather(1, positions[:, None])[:, 0]
            tokens = tokens.scatter(1, positions[:, None], language.vocab)
            tokens, positions, words = (x.to(device) for x in (tokens, positions, words))
        if step in starts:
            for group in chosen.param_groups:
                group["lr"] = starts[step]
        rows = slice(step % block * batch, (step % block + 1) * batch)
        loss = F.cross_entropy(model(tokens[rows], positions[rows]), words[rows])
        chosen.zero_grad()
        loss.backward()
        chosen.step()
        if step + 1 in checkpoints:
            kept[step + 1] = {q: v.detach().clone() for q, v in model.state_dict().items()}
    return kept


def enlarge(model: MaskedLM, times: int) -> MaskedLM:
    """The same function as a model ``times`` as wide: every feature is there ``times`` over.

    Traces of models of different widths are compared in one space of parameters, so the paper
    writes small transformers as large ones first.

    Reference: Liu et al. (2022), arXiv 2210.14199; released code, ``enlarge.py``. There embeddings
    are divided by the factor as well, which changes the function unless a layer norm follows them.
    """
    t = checks.count(times, "times")
    large = MaskedLM(model.vocab, model.length, t * model.d, len(model.blocks))
    state = {}
    for name, value in model.state_dict().items():
        if name == "head.weight":
            state[name] = value.repeat(1, t) / t
        elif name == "head.bias":
            state[name] = value
        elif "qkv" in name:
            split = value.reshape(3, model.d, -1)
            wide = split.repeat(1, t, t) / t if is_matrix(name) else split.repeat(1, t, 1)
            state[name] = wide.reshape(3 * t * model.d, -1).squeeze(-1)
        elif is_matrix(name):
            state[name] = value.repeat(t, t) / t
        else:
            state[name] = value.repeat(*[1] * (value.ndim - 1), t)
    large.load_state_dict(state)
    return large


def rescale_features(model: MaskedLM, scale: float | Float[Tensor, " d"]) -> MaskedLM:
    r"""A twin with the same predictions: features times ``scale``, output weights divided by it.

    The last layer norm and the output layer are in the position of $u$ and $v$ in $p=\sigma(uv)$.
    """
    s = torch.as_tensor(scale, dtype=model.norm.weight.dtype)
    if not bool((s > 0).all()):
        raise ValueError("scale: expected positive numbers")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.norm.weight.mul_(s)
        twin.norm.bias.mul_(s)
        twin.head.weight.div_(s)
    return twin


def is_matrix(name: str) -> bool:
    """Whether a parameter of `MaskedLM` is a matrix between features, not a table or vector."""
    return name.endswith("weight") and ("attention" in name or "mlp" in name)
