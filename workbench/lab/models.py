"""Small models to read and to train in seconds.

Classifiers (``MLP``, ``CNN``, ``ResNet``, ``ViT``) share one convention: ``model.features(x)`` is
the vector before the last layer, ``model.head`` is that layer, and calling the model gives logits.
Sequence models (``GPT``, ``RNN``) take token indices (b, t), or vectors (b, t, d) in place of the
embedded tokens, and answer at every position. Initialise them under ``lab.seeded(seed)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab.checks import count, one_of, positive

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}
_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(math.gcd(8, channels), channels),
    "none": lambda channels: nn.Identity(),
}


def _activation(act: str | Callable[[], nn.Module]) -> nn.Module:
    return _ACTIVATIONS[one_of(act, _ACTIVATIONS, "act")]() if isinstance(act, str) else act()


class Classifier(nn.Module):
    """Base of the image and vector models: ``forward`` is ``head`` of ``features``."""

    body: nn.Module
    head: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees, shape (b, d)."""
        out: Tensor = self.body(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (b, k)."""
        out: Tensor = self.head(self.features(x))
        return out


class MLP(Classifier):
    """Fully connected layers of the given sizes, input and output included; flattens its input.

    ``act`` is "relu", "gelu", "silu", "tanh", "identity", or a callable that makes a module.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        act: str | Callable[[], nn.Module] = "relu",
        *,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes: expected an input and an output size, got {list(sizes)}")
        layers: list[nn.Module] = [nn.Flatten()]
        for d_in, d_out in pairwise(sizes[:-1]):
            layers += [nn.Linear(d_in, d_out, bias=bias), _activation(act)]
            layers += [nn.Dropout(dropout)] if dropout else []
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-2], sizes[-1], bias=bias)


def _conv(d_in: int, d_out: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(d_in, d_out, size, stride, padding=size // 2, bias=False)


class CNN(Classifier):
    """Per entry of ``channels`` a convolution 3 x 3, norm, ReLU, pooling by 2; then the mean."""

    def __init__(
        self,
        channels: Sequence[int] = (16, 32, 64),
        classes: int = 10,
        *,
        inputs: int = 1,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        make_norm = _NORMS[one_of(norm, _NORMS, "norm")]
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise([inputs, *channels]):
            layers += [_conv(d_in, d_out), make_norm(d_out), nn.ReLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels[-1], classes)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (1 x 1 convolution where the shape changes)."""

    def __init__(
        self, d_in: int, d_out: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.path = nn.Sequential(
            _conv(d_in, d_out, 3, stride), norm(d_out), nn.ReLU(), _conv(d_out, d_out), norm(d_out)
        )
        same = stride == 1 and d_in == d_out
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(_conv(d_in, d_out, 1, stride), norm(d_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of shortcut plus path."""
        return F.relu(self.shortcut(x) + self.path(x))


class ResNet(Classifier):
    """Residual network for small images (He et al. 2016, arXiv:1512.03385, section 4.2).

    ``blocks`` per stage; each stage after the first halves the side and doubles ``width``.
    ``ResNet((3, 3, 3))`` is their ResNet-20, with projections in place of padded shortcuts.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (1, 1, 1),
        width: int = 16,
        classes: int = 10,
        *,
        inputs: int = 1,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        make_norm = _NORMS[one_of(norm, _NORMS, "norm")]
        layers: list[nn.Module] = [_conv(inputs, width), make_norm(width), nn.ReLU()]
        d = width
        for stage, repeats in enumerate(blocks):
            for i in range(repeats):
                stride = 2 if stage and i == 0 else 1
                layers.append(ResidualBlock(d, width << stage, stride, make_norm))
                d = width << stage
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(d, classes)


class Attention(nn.Module):
    """Multi-head self-attention; ``causal`` hides the future."""

    def __init__(self, d: int, heads: int, *, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        if d % heads:
            raise ValueError(f"heads: expected a divisor of d = {d}, got {heads}")
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Softmax of q k^T / sqrt(d / heads), times v."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.causal)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return out


class Block(nn.Module):
    """Pre-norm transformer layer: attention, then an MLP four times as wide, each added to x."""

    def __init__(self, d: int, heads: int, *, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(d, heads, causal=causal, dropout=dropout)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """One layer of the residual stream."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


def _initialise(model: nn.Module, layers: int) -> None:
    """Normal(0, 0.02), narrower by sqrt(2 layers) where a layer writes to the residual stream."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            writes = name.endswith(("attention.out", "mlp.2"))
            nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if writes else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class ViT(Classifier):
    """Vision transformer: patches, a class token, learned positions, pre-norm layers."""

    def __init__(
        self,
        image: int = 28,
        patch: int = 7,
        classes: int = 10,
        *,
        d: int = 64,
        layers: int = 4,
        heads: int = 4,
        inputs: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if image % patch:
            raise ValueError(f"patch: expected a divisor of the side {image}, got {patch}")
        self.patches = nn.Conv2d(inputs, d, patch, stride=patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, d))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, d))
        self.body = nn.Sequential(
            *(Block(d, heads, causal=False, dropout=dropout) for _ in range(layers)),
            nn.LayerNorm(d),
        )
        self.head = nn.Linear(d, classes)
        _initialise(self, layers)

    def tokens(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t d"]:
        """All tokens after the last layer, the class token first."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        out: Tensor = self.body(x)
        return out

    def features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """The class token after the last layer."""
        return self.tokens(x)[:, 0]


class GPT(nn.Module):
    """Pre-norm causal transformer; ``tie`` shares the token table with the output layer."""

    def __init__(
        self,
        vocab: int,
        d: int = 64,
        layers: int = 2,
        heads: int = 4,
        ctx: int = 128,
        *,
        tie: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.ctx = ctx
        self.embed = nn.Embedding(vocab, d)
        self.positions = nn.Embedding(ctx, d)
        self.blocks = nn.ModuleList(
            Block(d, heads, causal=True, dropout=dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)
        if tie:
            self.head.weight = self.embed.weight
        _initialise(self, layers)

    def features(self, tokens: Int[Tensor, "b t"] | Float[Tensor, "b t d"]) -> Tensor:
        """The normalised residual stream (b, t, d) that the output layer reads."""
        t = tokens.shape[1]
        if t > self.ctx:
            raise ValueError(f"tokens: expected at most ctx = {self.ctx} positions, got {t}")
        x = tokens if tokens.is_floating_point() else self.embed(tokens)
        x = x + self.positions.weight[:t]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def forward(self, tokens: Int[Tensor, "b t"] | Float[Tensor, "b t d"]) -> Tensor:
        """Logits (b, t, vocab); position i predicts token i + 1."""
        out: Tensor = self.head(self.features(tokens))
        return out

    def generate(
        self,
        tokens: Int[Tensor, "b t"],
        n: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "b t_plus_n"]:
        """The tokens continued by n more; see ``generate``."""
        return generate(
            self, tokens, n, temperature=temperature, top_k=top_k, generator=generator, ctx=self.ctx
        )


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    tokens: Int[Tensor, "b t"],
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    ctx: int | None = None,
) -> Int[Tensor, "b t_plus_n"]:
    """Continue token sequences with any model that maps tokens (b, t) to logits (b, t, vocab).

    ``temperature=0`` takes the likeliest token; ``top_k`` draws among the k likeliest; only the
    last ``ctx`` tokens are shown to the model. Dropout is off while generating.
    """
    positive(temperature, "temperature", zero=True)
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    for _ in range(count(n, "n")):
        logits = model(tokens if ctx is None else tokens[:, -ctx:])[:, -1].float()
        if top_k is not None:
            least = logits.topk(min(count(top_k, "top_k"), logits.shape[1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if temperature == 0:
            chosen = logits.argmax(1, keepdim=True)
        else:
            probs = (logits / temperature).softmax(1)
            chosen = torch.multinomial(probs, 1, generator=generator)
        tokens = torch.cat([tokens, chosen], 1)
    if isinstance(model, nn.Module):
        model.train(training)
    return tokens


class RNN(nn.Module):
    """Embedding, recurrent layers ("gru", "lstm" or "rnn"), and a linear output at each step.

    ``outputs`` defaults to ``vocab`` (language model); with ``bidirectional`` it tags sequences.
    """

    def __init__(
        self,
        vocab: int,
        d: int = 64,
        layers: int = 1,
        *,
        cell: str = "gru",
        outputs: int | None = None,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        cells = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
        make = cells[one_of(cell, cells, "cell")]
        self.embed = nn.Embedding(vocab, d)
        self.recurrent = make(
            d, d, layers, batch_first=True, dropout=dropout, bidirectional=bidirectional
        )
        self.head = nn.Linear(d * (2 if bidirectional else 1), outputs or vocab)

    def features(self, tokens: Int[Tensor, "b t"] | Float[Tensor, "b t d"]) -> Tensor:
        """Hidden states of the last layer at each step."""
        x = tokens if tokens.is_floating_point() else self.embed(tokens)
        out: Tensor = self.recurrent(x)[0]
        return out

    def forward(self, tokens: Int[Tensor, "b t"] | Float[Tensor, "b t d"]) -> Tensor:
        """Logits (b, t, outputs)."""
        out: Tensor = self.head(self.features(tokens))
        return out
