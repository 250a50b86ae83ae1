"""Small models: sizes by formula, causality, sampling; pretrained ones against known answers."""

from __future__ import annotations

import importlib.util
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from workbench import lab
from workbench.lab import models, pretrained


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=5))
def test_mlp_has_the_parameters_of_its_formula(sizes: list[int]) -> None:
    model = models.MLP(sizes)
    assert size(model) == sum(a * b + b for a, b in pairwise(sizes))
    assert model(torch.zeros(3, sizes[0])).shape == (3, sizes[-1])


def test_mlp_with_identity_is_a_product_of_matrices() -> None:
    model = models.MLP([4, 5, 3], "identity", bias=False)
    first, second = (p.detach() for p in model.parameters())
    x = torch.randn(6, 4)
    torch.testing.assert_close(model(x), x @ first.T @ second.T)


def test_cnn_has_the_parameters_of_its_formula() -> None:
    channels, classes = (8, 12, 20), 7
    convolutions = sum(9 * a * b for a, b in zip((3, 8, 12), channels, strict=True))
    norms = sum(2 * c for c in channels)
    model = models.CNN(channels, classes, inputs=3)
    assert size(model) == convolutions + norms + 20 * classes + classes
    assert model(torch.zeros(2, 3, 13, 9)).shape == (2, 7)


def test_resnet_20_has_the_published_number_of_parameters() -> None:
    """He et al. 2016, table 6: 0.27 M; here with 1 x 1 shortcuts and colour input."""
    model = models.ResNet((3, 3, 3), 16, 10, inputs=3)
    shortcuts = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert size(model) - shortcuts == 269_722
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_resnet_block_is_the_identity_when_its_path_is_zero() -> None:
    block = models.ResidualBlock(4, 4, 1, nn.BatchNorm2d)
    nn.init.zeros_(block.path[-1].weight)
    x = torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x)


def layer_size(d: int) -> int:
    norms = 4 * d
    attention = 3 * d * d + 3 * d + d * d + d
    mlp = 4 * d * d + 4 * d + 4 * d * d + d
    return norms + attention + mlp


def test_transformers_have_the_parameters_of_their_formulas() -> None:
    d, layers, vocab, ctx = 24, 3, 50, 16
    gpt = vocab * d + ctx * d + layers * layer_size(d) + 2 * d
    assert size(models.GPT(vocab, d, layers, 4, ctx)) == gpt
    assert size(models.GPT(vocab, d, layers, 4, ctx, tie=False)) == gpt + vocab * d
    patches = 7 * 7 * 3 * d + d
    vit = patches + d + (16 + 1) * d + layers * layer_size(d) + 2 * d + d * 5 + 5
    model = models.ViT(28, 7, 5, d=d, layers=layers, heads=4, inputs=3)
    assert size(model) == vit
    assert model.tokens(torch.zeros(2, 3, 28, 28)).shape == (2, 17, d)


def test_the_future_does_not_reach_the_past() -> None:
    with lab.seeded(0):
        model = models.GPT(30, 16, 2, 4, 12).eval()
        tokens = torch.randint(30, (2, 12))
    for cut in (1, 5, 11):
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 7) % 30
        before, after = model(tokens), model(changed)
        torch.testing.assert_close(before[:, :cut], after[:, :cut])
        assert not torch.allclose(before[:, cut:], after[:, cut:])


def test_attention_is_softmax_of_scaled_products() -> None:
    layer = models.Attention(8, 2, causal=True)
    x = torch.randn(1, 5, 8)
    q, k, v = (a.view(5, 2, 4) for a in layer.qkv(x)[0].split(8, dim=1))
    mixed = torch.zeros(5, 2, 4)
    for head in range(2):
        for i in range(5):
            scores = torch.stack([q[i, head] @ k[j, head] / math.sqrt(4) for j in range(i + 1)])
            for weight, j in zip(scores.softmax(0), range(i + 1), strict=True):
                mixed[i, head] += weight * v[j, head]
    torch.testing.assert_close(layer(x)[0], layer.out(mixed.view(5, 8)))


def test_vit_without_positions_does_not_see_the_order_of_patches() -> None:
    model = models.ViT(8, 4, 3, d=16, layers=2, heads=2).eval()
    x = torch.rand(2, 1, 8, 8)
    swapped = torch.cat([x[..., 4:], x[..., :4]], -1)
    assert not torch.allclose(model(x), model(swapped), atol=1e-5)
    nn.init.zeros_(model.positions)
    torch.testing.assert_close(model(x), model(swapped), atol=1e-5, rtol=1e-4)


def test_embedded_tokens_may_be_given_in_place_of_tokens() -> None:
    tokens = torch.randint(9, (2, 5))
    for model in (models.GPT(9, 8, 1, 2, 5), models.RNN(9, 8)):
        torch.testing.assert_close(model(tokens), model(model.embed(tokens)))


@pytest.mark.parametrize(("cell", "gates"), [("gru", 3), ("lstm", 4), ("rnn", 1)])
def test_rnn_has_the_parameters_of_its_formula(cell: str, gates: int) -> None:
    d = 12
    recurrent = gates * (2 * d * d + 2 * d)
    model = models.RNN(20, d, cell=cell, outputs=4, bidirectional=True)
    assert size(model) == 20 * d + 2 * recurrent + 2 * d * 4 + 4
    assert model(torch.zeros(3, 7, dtype=torch.long)).shape == (3, 7, 4)


def test_one_direction_reads_only_the_past_and_two_read_everything() -> None:
    tokens = torch.randint(9, (1, 6))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 9
    for both in (False, True):
        model = models.RNN(9, 8, bidirectional=both)
        assert torch.allclose(model(tokens)[:, :5], model(changed)[:, :5]) is not both


class Ladder(nn.Module):
    """Always gives token + 1 the odds 3 : 1 against token + 2."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        one, two = F.one_hot((tokens + 1) % 10, 10), F.one_hot((tokens + 2) % 10, 10)
        return (0.75 * one + 0.25 * two).log()


def test_greedy_generation_follows_the_likeliest_token() -> None:
    start = torch.tensor([[0], [5]])
    for options in ({"temperature": 0.0}, {"top_k": 1}):
        out = models.generate(Ladder(), start, 4, **options)
        assert out.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.75), (0.5, 0.9), (1e6, 0.5)])
def test_sampling_has_the_tempered_frequencies(temperature: float, share: float) -> None:
    start = torch.zeros(4000, 1, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    out = models.generate(Ladder(), start, 1, temperature=temperature, top_k=2, generator=generator)
    found = (out[:, 1] == 1).double().mean().item()
    assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_generation_is_longer_than_the_context_and_leaves_the_mode_alone() -> None:
    model = models.GPT(9, 8, 1, 2, 4, dropout=0.5).train()
    out = model.generate(torch.zeros(1, 3, dtype=torch.long), 6, temperature=0.0)
    assert out.shape == (1, 9) and model.training


def test_an_untrained_gpt_is_near_the_uniform_loss() -> None:
    with lab.seeded(0):
        model, tokens = models.GPT(200, 32, 4, 4, 16), torch.randint(200, (8, 16))
        targets = torch.randint(200, (8 * 16,))
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets)
    assert abs(loss.item() - math.log(200)) < 0.2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: models.MLP([3]), "^sizes: "),
        (lambda: models.MLP([3, 3, 3], "swoosh"), "^act: expected one of 'relu'"),
        (lambda: models.CNN(norm="layer"), "^norm: "),
        (lambda: models.GPT(5, 10, 1, 4), "^heads: expected a divisor of d = 10, got 4"),
        (lambda: models.ViT(28, 5), "^patch: expected a divisor of the side 28, got 5"),
        (lambda: models.RNN(5, cell="mamba"), "^cell: "),
        (lambda: models.GPT(5, ctx=4)(torch.zeros(1, 5, dtype=torch.long)), "^tokens: .* ctx = 4"),
        (lambda: models.generate(Ladder(), torch.zeros(1, 1), 1, temperature=-1), "^temperature: "),
    ],
)
def test_bad_settings(make: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()  # type: ignore[operator]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_models_agree_on_cpu_and_cuda() -> None:
    model, tokens = models.GPT(30, 16, 2, 4, 12).eval(), torch.randint(30, (2, 12))
    expected = model(tokens)
    found = model.cuda()(tokens.cuda()).cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


# --- pretrained ---------------------------------------------------------------------------------


def test_same_convolution_pads_like_tensorflow() -> None:
    """SAME: ceil(n / s) outputs; of an odd number of padded pixels the extra one is at the end."""
    layer = pretrained.SameConv(1, 1, 3, 2, bias=False)
    nn.init.ones_(layer.weight)
    out = layer(torch.ones(1, 1, 6, 6))[0, 0]
    assert out.tolist() == [[9, 9, 6], [9, 9, 6], [6, 6, 4]]


def test_rotary_products_depend_on_distance_only() -> None:
    angle = torch.outer(torch.arange(9), torch.tensor([1.0, 0.1]))
    rotation = torch.polar(torch.ones_like(angle), angle)
    q, k = (pretrained._rotate(torch.randn(4).expand(1, 1, 9, 4), rotation)[0, 0] for _ in "qk")
    products = q @ k.T
    for distance in range(-8, 9):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand(len(along)), atol=1e-4, rtol=1e-4)


def test_a_small_llama_is_causal_and_efficientnet_has_its_published_size() -> None:
    model = pretrained.Llama(20, 16, 2, 24, 4, 2)
    tokens = torch.randint(20, (1, 6))
    changed = tokens.clone()
    changed[0, 4:] = (changed[0, 4:] + 3) % 20
    torch.testing.assert_close(model(tokens)[:, :4], model(changed)[:, :4])
    assert size(pretrained.EfficientNetLite0()) == 4_652_008  # "4.7 M"


def needs(name: str, *modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs the package {module}")
    if lab.data.find(name) is None:
        pytest.skip(f"needs: workbench data get {name}")


def test_smollm2_knows_a_capital() -> None:
    needs("smollm2", "gguf", "tokenizers")
    language = pretrained.smollm2()
    assert size(language.model) == 134_515_008
    assert (
        language.answer("What is the capital of France?", 10) == "The capital of France is Paris."
    )


def test_minilm_finds_the_related_sentence() -> None:
    needs("minilm", "tokenizers")
    first, second, third = pretrained.minilm().encode(
        [
            "A man is eating food.",
            "A man is eating a piece of bread.",
            "The girl is carrying a baby.",
        ]
    )
    assert abs(float(first @ second) - 0.7553) < 2e-3  # published beside the model
    assert float(first @ third) < 0.1


def test_efficientnet_sees_a_flower() -> None:
    needs("efficientnet_lite0")
    from sklearn.datasets import load_sample_image

    photo = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)[None, :, :, 100:527]
    x = F.interpolate(photo / 255, (224, 224), mode="bilinear", antialias=True)
    daisy = 985
    assert pretrained.efficientnet_lite0()(x).argmax().item() == daisy
