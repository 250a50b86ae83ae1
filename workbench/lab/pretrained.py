"""Pretrained networks as plain torch modules, from files that ``workbench data get`` brings.

``smollm2`` (language model), ``minilm`` (sentence encoder) and ``efficientnet_lite0`` (ImageNet
classifier). No model library is needed, only ``gguf`` to read SmolLM2's file and ``tokenizers``
for text. Files come checked from ``lab.data``; torch reads the last one without running its pickle.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lab import data
from workbench.lab.models import generate


def _optional(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"reading this model needs the package {module}: pip install {module}"
        ) from None


# --- SmolLM2: a Llama ---------------------------------------------------------------------------


class LlamaLayer(nn.Module):
    """RMS norm, grouped-query attention with rotary positions, RMS norm, SwiGLU."""

    def __init__(self, d: int, wide: int, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, d // heads
        self.attn_norm, self.ffn_norm = nn.RMSNorm(d, eps), nn.RMSNorm(d, eps)
        self.attn_q = nn.Linear(d, d, bias=False)
        self.attn_k = nn.Linear(d, kv_heads * self.size, bias=False)
        self.attn_v = nn.Linear(d, kv_heads * self.size, bias=False)
        self.attn_output = nn.Linear(d, d, bias=False)
        self.ffn_gate, self.ffn_up = nn.Linear(d, wide, bias=False), nn.Linear(d, wide, bias=False)
        self.ffn_down = nn.Linear(wide, d, bias=False)

    def forward(self, x: Float[Tensor, "b t d"], rotation: Tensor) -> Float[Tensor, "b t d"]:
        """One layer of the residual stream; ``rotation`` holds e^{i m theta}, (t, size / 2)."""
        b, t, d = x.shape
        h = self.attn_norm(x)
        q = _rotate(self.attn_q(h).view(b, t, self.heads, self.size).transpose(1, 2), rotation)
        k = _rotate(self.attn_k(h).view(b, t, self.kv_heads, self.size).transpose(1, 2), rotation)
        v = self.attn_v(h).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        k, v = (a.repeat_interleave(self.heads // self.kv_heads, 1) for a in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(b, t, d))
        h = self.ffn_norm(x)
        out: Tensor = x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))
        return out


def _rotate(x: Float[Tensor, "b h t s"], rotation: Tensor) -> Float[Tensor, "b h t s"]:
    """Turn neighbouring pairs of coordinates by their position's angle (Su et al. 2021)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


class Llama(nn.Module):
    """Decoder of the Llama architecture with a tied output layer."""

    def __init__(
        self,
        vocab: int,
        d: int,
        layers: int,
        wide: int,
        heads: int,
        kv_heads: int,
        *,
        theta: float = 10_000.0,
        eps: float = 1e-5,
        ctx: int = 2048,
    ) -> None:
        super().__init__()
        self.ctx, self.theta, self.size = ctx, theta, d // heads
        self.token_embd = nn.Embedding(vocab, d)
        self.blk = nn.ModuleList(LlamaLayer(d, wide, heads, kv_heads, eps) for _ in range(layers))
        self.output_norm = nn.RMSNorm(d, eps)

    def features(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """The normalised residual stream after the last layer."""
        x = self.token_embd(tokens)
        speed = self.theta ** -(torch.arange(0, self.size, 2, device=x.device) / self.size)
        angle = torch.outer(torch.arange(x.shape[1], device=x.device), speed)
        rotation = torch.polar(torch.ones_like(angle), angle)
        for layer in self.blk:
            x = layer(x, rotation)
        out: Tensor = self.output_norm(x)
        return out

    def forward(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t vocab"]:
        """Logits of the next token at every position."""
        return F.linear(self.features(tokens), self.token_embd.weight)


@dataclass
class LanguageModel:
    """A model with its tokenizer."""

    model: Llama
    tokenizer: Any  # tokenizers.Tokenizer

    def encode(self, text: str) -> Int[Tensor, "1 t"]:
        """Token indices of a text; special tokens such as <|im_start|> are recognised."""
        return torch.tensor([self.tokenizer.encode(text).ids], device=self._device())

    def complete(self, text: str, n: int = 32, **options: Any) -> str:
        """The text continued by n tokens (``options`` as of ``lab.models.generate``)."""
        options = {"temperature": 0.0, "ctx": self.model.ctx} | options
        tokens = generate(self.model, self.encode(text), n, **options)
        return str(self.tokenizer.decode(tokens[0].tolist(), skip_special_tokens=False))

    def answer(self, question: str, n: int = 32, **options: Any) -> str:
        """Reply of the instruction-tuned model, up to the end of its turn."""
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        reply = self.complete(prompt, n, **options).split("<|im_start|>assistant\n", 1)[1]
        return reply.split("<|im_end|>", 1)[0]

    def _device(self) -> torch.device:
        return self.model.token_embd.weight.device


def smollm2(folder: Path | None = None) -> LanguageModel:
    """SmolLM2-135M-Instruct (Apache-2.0) in float32; its weights were stored in four bits."""
    gguf, tk = _optional("gguf"), _optional("tokenizers")
    (path,) = (folder or data.require("smollm2")).glob("*.gguf")
    reader = gguf.GGUFReader(path)

    def read(key: str) -> Any:
        return reader.get_field(key).contents()

    weights = {}
    for t in reader.tensors:  # plain float32 tensors are views of the read-only file: copy those
        values = np.require(gguf.dequantize(t.data, t.tensor_type), requirements="W")
        weights[t.name] = torch.from_numpy(values)
    vocab = read("tokenizer.ggml.tokens")
    with torch.device("meta"):
        model = Llama(
            len(vocab),
            read("llama.embedding_length"),
            read("llama.block_count"),
            read("llama.feed_forward_length"),
            read("llama.attention.head_count"),
            read("llama.attention.head_count_kv"),
            theta=read("llama.rope.freq_base"),
            eps=read("llama.attention.layer_norm_rms_epsilon"),
            ctx=read("llama.context_length"),
        )
    model.load_state_dict(weights, assign=True)
    merges = [tuple(pair.split(" ")) for pair in read("tokenizer.ggml.merges")]
    tokenizer = tk.Tokenizer(tk.models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    split, byte = tk.pre_tokenizers.Digits(individual_digits=True), tk.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Sequence([split, byte(add_prefix_space=False)])
    tokenizer.decoder = tk.decoders.ByteLevel()
    kinds = read("tokenizer.ggml.token_type")
    control = 3  # GGUF's mark of special tokens
    tokenizer.add_special_tokens(
        [v for v, kind in zip(vocab, kinds, strict=True) if kind == control]
    )
    return LanguageModel(model.eval(), tokenizer)


# --- MiniLM: a BERT encoder of sentences --------------------------------------------------------


class EncoderLayer(nn.Module):
    """Attention and MLP, each added to its input and normalised afterwards (post-norm)."""

    def __init__(self, d: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.mix = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d, eps), nn.LayerNorm(d, eps)

    def forward(self, x: Float[Tensor, "b t d"], mask: Tensor) -> Float[Tensor, "b t d"]:
        """One layer; ``mask`` is True at tokens, False at padding."""
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = self.norm1(x + self.mix(mixed.transpose(1, 2).flatten(2)))
        out: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return out


class SentenceEncoder(nn.Module):
    """Mean of a BERT encoder's token vectors, of length one (all-MiniLM-L6-v2: 384 numbers)."""

    def __init__(
        self, vocab: int = 30_522, d: int = 384, layers: int = 6, heads: int = 12, ctx: int = 512
    ) -> None:
        super().__init__()
        eps = 1e-12
        self.words, self.positions = nn.Embedding(vocab, d), nn.Embedding(ctx, d)
        self.kinds, self.norm = nn.Embedding(2, d), nn.LayerNorm(d, eps)
        self.layers = nn.ModuleList(EncoderLayer(d, heads, eps) for _ in range(layers))
        self.tokenizer: Any = None

    def forward(self, tokens: Int[Tensor, "b t"], mask: Tensor) -> Float[Tensor, "b d"]:
        """Sentence vectors of tokens; ``mask`` is True at tokens, False at padding."""
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.kinds.weight[0]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(mean, dim=1)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Float[Tensor, "n d"]:
        """Sentence vectors of texts; the tokenizer cuts each after 128 tokens."""
        place, parts = self.words.weight.device, []
        for start in range(0, len(texts), batch_size):
            found = self.tokenizer.encode_batch(list(texts[start : start + batch_size]))
            longest = max(sum(item.attention_mask) for item in found)
            tokens = torch.tensor([item.ids[:longest] for item in found], device=place)
            mask = torch.tensor([item.attention_mask[:longest] for item in found], device=place)
            parts.append(self(tokens, mask.bool()))
        return torch.cat(parts)


def minilm(folder: Path | None = None) -> SentenceEncoder:
    """all-MiniLM-L6-v2 (Apache-2.0) with its tokenizer."""
    from safetensors.torch import load_file

    folder = folder or data.require("minilm")
    names = {
        "embeddings.word_embeddings": "words", "embeddings.position_embeddings": "positions",
        "embeddings.token_type_embeddings": "kinds", "embeddings.LayerNorm": "norm",
        "encoder.layer": "layers", "attention.self.": "", "attention.output.dense": "mix",
        "attention.output.LayerNorm": "norm1", "intermediate.dense": "up",
        "output.dense": "down", "output.LayerNorm": "norm2",
    }  # fmt: skip
    weights = {}
    for key, value in load_file(folder / "model.safetensors").items():
        for old, new in names.items():
            key = key.replace(old, new)
        weights[key] = value
    model = SentenceEncoder()
    model.load_state_dict({key: weights[key] for key in model.state_dict()})
    model.tokenizer = _optional("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    return model.eval()


# --- EfficientNet-Lite0 -------------------------------------------------------------------------


class SameConv(nn.Conv2d):
    """Convolution whose output has ceil(side / stride) pixels, padded unevenly as in TensorFlow."""

    def forward(self, x: Tensor) -> Tensor:
        """Pad right and bottom by one more where the padding is odd."""
        (size, _), (stride, _) = self.kernel_size, self.stride
        pads = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in (x.shape[3], x.shape[2])]
        return super().forward(F.pad(x, [side for p in pads for side in (p // 2, p - p // 2)]))


class InvertedBlock(nn.Module):
    """1 x 1 expansion, depthwise convolution, 1 x 1 projection; added to x where shapes agree."""

    def __init__(self, d_in: int, d_out: int, expand: int, size: int, stride: int) -> None:
        super().__init__()
        d = d_in * expand
        wider = [*_unit(d_in, d), nn.ReLU6()] if expand > 1 else []
        depthwise = [*_unit(d, d, size, stride, d), nn.ReLU6()]
        self.path = nn.Sequential(*wider, *depthwise, *_unit(d, d_out))
        self.same = stride == 1 and d_in == d_out

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        out: Tensor = self.path(x)
        return x + out if self.same else out


def _unit(
    d_in: int, d_out: int, size: int = 1, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    conv = SameConv(d_in, d_out, size, stride, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(d_out, eps=1e-3)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: no squeeze-and-excitation, ReLU6; input (b, 3, 224, 224) in [0, 1]."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        channels = [32, 16, 24, 40, 80, 112, 192, 320]
        shape = zip(
            itertools.pairwise(channels), [1, 2, 2, 3, 3, 4, 1], [3, 3, 5, 3, 5, 5, 3],
            [1, 2, 2, 2, 1, 2, 1], strict=True,
        )  # fmt: skip
        blocks = [
            InvertedBlock(
                d_out if i else d_in, d_out, 1 if d_in == 32 else 6, size, 1 if i else stride
            )
            for (d_in, d_out), repeats, size, stride in shape
            for i in range(repeats)
        ]
        self.body = nn.Sequential(
            *_unit(3, 32, 3, 2), nn.ReLU6(), *blocks, *_unit(320, 1280), nn.ReLU6(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(1280, classes)

    def features(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1280"]:
        """The vector the last layer sees."""
        out: Tensor = self.body((255 * x - 127) / 128)
        return out

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        """Logits of the ImageNet classes."""
        out: Tensor = self.head(self.features(x))
        return out


def efficientnet_lite0(folder: Path | None = None) -> EfficientNetLite0:
    """EfficientNet-Lite0 trained on ImageNet (Apache-2.0)."""
    (path,) = (folder or data.require("efficientnet_lite0")).glob("*.pth")
    weights = torch.load(path, weights_only=True, map_location="cpu")
    model = EfficientNetLite0()
    names = list(model.state_dict())  # both list their layers from the input to the output
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    return model.eval()
