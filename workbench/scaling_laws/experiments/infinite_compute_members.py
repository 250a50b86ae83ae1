"""Many small GPTs of one shape trained side by side, each with its own data, seed and recipe.

A step of one tiny model costs more in calls than in arithmetic. So the weights of all members are
stacked, and every matrix product of `lab.models.GPT` becomes one batched product. The members never
meet: each has its own initialisation, order of batches, learning rate and weight decay.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from workbench import lab
from workbench.lab import models

State = dict[str, Tensor]  # a GPT's state, with a leading dimension of members
BETAS = (0.9, 0.95)
COOL_DOWN = 0.2  # share of a run over which the learning rate falls to zero


@dataclass(frozen=True)
class Shape:
    """Of a GPT: width, layers, heads, context, vocabulary."""

    d: int
    layers: int = 1
    heads: int = 1
    ctx: int = 32
    vocab: int = 96

    def make(self) -> models.GPT:
        """One model, initialised from torch's global generator."""
        return models.GPT(self.vocab, self.d, self.layers, self.heads, self.ctx)

    @property
    def N(self) -> int:
        """Parameters without embeddings and output layer."""
        return self.layers * (12 * self.d**2 + 13 * self.d)


def stack(shape: Shape, seeds: Sequence[int]) -> State:
    """Initial weights, a member a seed."""
    states = []
    for seed in seeds:
        with lab.seeded(seed):
            states.append(shape.make().state_dict())
    names = [name for name in states[0] if name != "head.weight"]  # tied to the token table
    return {name: torch.stack([state[name] for state in states]) for name in names}


def logits(shape: Shape, state: Mapping[str, Tensor], tokens: Int[Tensor, "m b t"]) -> Tensor:
    """What `lab.models.GPT` answers with each member's weights, (m, b, t, vocab)."""
    m, b, t = tokens.shape
    d, heads = shape.d, shape.heads

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.baddbmm(state[f"{name}.bias"][:, None], x, state[f"{name}.weight"].mT)

    def norm(x: Tensor, name: str) -> Tensor:
        scale, shift = state[f"{name}.weight"][:, None], state[f"{name}.bias"][:, None]
        return torch.addcmul(shift, F.layer_norm(x, (d,)), scale)

    table = state["embed.weight"]
    offset = torch.arange(m, device=tokens.device)[:, None] * shape.vocab
    x = F.embedding(tokens.reshape(m, -1) + offset, table.reshape(-1, d))
    x = (x.view(m, b, t, d) + state["positions.weight"][:, None, :t]).view(m, b * t, d)
    for i in range(shape.layers):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attention.qkv")
        q, k, v = qkv.view(m * b, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(mixed.transpose(1, 2).reshape(m, b * t, d), f"{block}.attention.out")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.0"))
        x = x + linear(hidden, f"{block}.mlp.2")
    return torch.bmm(norm(x, "norm"), table.mT).view(m, b, t, shape.vocab)


class _AdamW:
    """AdamW whose weight decay differs between members and spares biases and norms."""

    def __init__(self, state: State, decay: Sequence[float]) -> None:
        self.names = list(state)
        self.leaves = [state[k].clone().requires_grad_() for k in self.names]
        self.first = [torch.zeros_like(p) for p in self.leaves]
        self.second = [torch.zeros_like(p) for p in self.leaves]
        self.decay = self.leaves[0].new_tensor(decay).view(-1, 1, 1)
        self.steps = 0

    def branch(self) -> _AdamW:
        """A copy that goes its own way."""
        other = copy.copy(self)
        other.leaves = [p.detach().clone().requires_grad_() for p in self.leaves]
        other.first = [p.clone() for p in self.first]
        other.second = [p.clone() for p in self.second]
        return other

    @property
    def state(self) -> State:
        return dict(zip(self.names, self.leaves, strict=True))

    @torch.no_grad()
    def step(self, loss: Tensor, lr: float) -> None:
        with torch.enable_grad():
            grads = torch.autograd.grad(loss, self.leaves)
        self.steps += 1
        torch._foreach_lerp_(self.first, grads, 1 - BETAS[0])
        torch._foreach_mul_(self.second, BETAS[1])
        torch._foreach_addcmul_(self.second, grads, grads, 1 - BETAS[1])
        scale = torch._foreach_sqrt(self.second)
        torch._foreach_div_(scale, (1 - BETAS[1] ** self.steps) ** 0.5)
        torch._foreach_add_(scale, 1e-8)
        matrices = [p for p in self.leaves if p.ndim == 3]
        torch._foreach_mul_(matrices, [(1 - lr * self.decay).clamp(min=0)] * len(matrices))
        torch._foreach_addcdiv_(self.leaves, self.first, scale, -lr / (1 - BETAS[0] ** self.steps))


def train(
    shape: Shape,
    data: Int[Tensor, "m n l"],
    *,
    seeds: Sequence[int],
    budgets: Sequence[int],
    decay: Sequence[float],
    lr: float,
    batch: int = 8,
    drawn: Int[Tensor, "m n_drawn l"] | None = None,
    share: float = 0.0,
) -> list[State]:
    """Train each member for several numbers of epochs; one run serves them all.

    The learning rate is constant after a short warm-up. For every budget a cool-down branches off
    the run, over whose last fifth the learning rate falls linearly to zero.

    Args:
        shape: of all members.
        data: sequences of context + 1 tokens; n a multiple of the real sequences in a batch.
        seeds: of initialisation and order, one a member.
        budgets: epochs, rising.
        decay: decoupled weight decay of matrices, one a member.
        lr: learning rate.
        batch: sequences a step.
        drawn: a teacher's sequences, of which every batch holds a share.
        share: that share; the rest of the batch is real, and epochs count passes over real data.

    Returns:
        For each budget the members' weights.
    """
    m, n = data.shape[:2]
    extra = 0 if drawn is None else round(batch * share)
    real = batch - extra
    steps = [n // real * epochs for epochs in budgets]
    orders = [np.random.default_rng(seed) for seed in seeds]
    rows = torch.arange(m, device=data.device)[:, None]
    own = _batches([[g.permutation(n) for _ in range(budgets[-1])] for g in orders], real).to(data)
    if drawn is not None:
        many = drawn.shape[1], (steps[-1], extra)
        taught = torch.from_numpy(np.stack([g.integers(0, *many) for g in orders])).to(data)

    def advance(optimizer: _AdamW, step: int, rate: float) -> None:
        x = data[rows, own[:, step]]
        if drawn is not None:
            x = torch.cat([x, drawn[rows, taught[:, step]]], 1)
        out = logits(shape, optimizer.state, x[:, :, :-1])
        loss = F.cross_entropy(out.flatten(0, 2), x[:, :, 1:].flatten())
        optimizer.step(loss * m, rate)

    initial = {k: v.to(data.device) for k, v in stack(shape, seeds).items()}
    run = _AdamW(initial, decay)
    warmup = max(2, steps[0] // 10)
    forks = {total - round(COOL_DOWN * total): total for total in steps}
    ends = []
    for step in range(max(forks) + 1):
        if step in forks:
            total, tail = forks[step], run.branch()
            for later in range(step, total):
                advance(tail, later, lr * (total - later) / (total - step))
            ends.append({k: p.detach() for k, p in tail.state.items()})
        advance(run, step, lr * min(1.0, (step + 1) / warmup))
    return ends


def _batches(orders: list[list[np.ndarray]], size: int) -> Int[Tensor, "m steps size"]:
    """Whole batches of every epoch, in order."""
    epochs = np.array(orders)
    kept = epochs[:, :, : epochs.shape[2] // size * size]
    return torch.from_numpy(kept.reshape(len(orders), -1, size))


def unstack(shape: Shape, state: State) -> list[models.GPT]:
    """The members as models of their own."""
    members = []
    for i in range(len(state["embed.weight"])):
        model = shape.make().to(state["embed.weight"].device)
        own = {name: values[i] for name, values in state.items()}
        model.load_state_dict({**own, "head.weight": own["embed.weight"]})
        members.append(model.eval())
    return members


@torch.no_grad()
def log_probs(
    shape: Shape, state: State, test: Int[Tensor, "n l"]
) -> tuple[Float[Tensor, "m n v"], Int[Tensor, " n"]]:
    """Members' log probabilities at every held-out position, and the bytes that came."""
    many = test[:, :-1].expand(len(state["embed.weight"]), -1, -1)
    return logits(shape, state, many).flatten(1, 2).log_softmax(-1), test[:, 1:].flatten()
