"""TempNet on a small language model: frozen against the best single temperature, and joint."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from scipy.stats import spearmanr
from torch import Tensor, nn

from workbench import lab
from workbench.calibration.temperature import fit_temperature
from workbench.calibration.tempnet import TempNet, fit_tempnet, optimal_tau, tempnet_loss

SHARES = (0.3, 0.4, 0.5, 0.6, 0.75)
"""Grid of rho / log K, chosen by perplexity on calibration text that TempNet did not see."""

JOINT_SHARE = 0.75
"""rho / log K of joint training: the authors' 8 nats for GPT-2's vocabulary. Not tuned."""

VOCAB = 97  # newline, the 95 printable ASCII characters, everything else
BLOCK = 2048


def frozen_study(
    seed: int,
    *,
    d: int = 64,
    layers: int = 2,
    ctx: int = 64,
    lm_steps: int = 400,
    tempnet_steps: int = 400,
    lr: float = 1e-2,
    train_blocks: int = 400,
    positions: int = 16_000,
    oracle_chars: int = 500_000,
    order: int = 5,
    device: str = "cpu",
) -> dict:
    """Frozen mode: a character model of Python's library, with temperatures learned on top.

    The model is trained, temperatures are learned on other text and tested on a third. Perplexities
    there: `ppl_base` (temperature 1), `ppl_single` (best single temperature on the calibration
    text), `ppl_tempnet`, `ppl_exact` (the minimiser of the robust loss at every position, which
    TempNet approximates), `ppl_released` (TempNet fed logits minus their largest, as the released
    inference code does), `ppl_nll` (the same network and budget trained on plain cross-entropy,
    which does see labels).

    `rank_{...}` are Spearman correlations with the entropy of an n-gram model of much more text;
    `codes`, `tau`, `tau_exact` and `oracle` describe the first positions of the test text.
    """
    text = code_blocks(seed)
    train, rest = text[:train_blocks], text[train_blocks:]
    calibration, test, more = rest[:40], rest[40:80], rest[80:]
    shape = {"d": d, "layers": layers, "ctx": ctx}
    model = train_model(train, shape, lm_steps, seed, device)
    logits, labels, _ = predictions(model, calibration, ctx, positions, device)
    test_logits, test_labels, contexts = predictions(model, test, ctx, positions, device)
    entropy = ngram_entropy(more[: oracle_chars // BLOCK], contexts, order)

    def learn(rho: float | None) -> TempNet:
        fit = slice(0, 3 * len(labels) // 4)
        return train_tempnet(logits[fit], labels[fit], rho, tempnet_steps, lr, seed, device)

    held = slice(3 * len(labels) // 4, None)

    def best(taus: dict[float, Tensor]) -> float:
        return min(SHARES, key=lambda s: perplexity(logits[held] / taus[s], labels[held]))

    rhos = {share: share * math.log(VOCAB) for share in SHARES}
    nets = {share: learn(rho) for share, rho in rhos.items()}
    share = best({s: temperatures(net, logits[held]) for s, net in nets.items()})
    exact = best({s: optimal_tau(logits[held], rho)[:, None] for s, rho in rhos.items()})
    found = {
        "tempnet": temperatures(nets[share], test_logits),
        "exact": optimal_tau(test_logits, rhos[exact])[:, None],
        "released": temperatures(nets[share], test_logits - test_logits.amax(1, keepdim=True)),
        "nll": temperatures(learn(None), test_logits),
    }
    single = fit_temperature(logits, labels)
    return {
        "ppl_base": perplexity(test_logits, test_labels),
        "ppl_single": perplexity(test_logits / single, test_labels),
        **{f"ppl_{k}": perplexity(test_logits / tau, test_labels) for k, tau in found.items()},
        **{f"rank_{name}": rank(tau, entropy) for name, tau in found.items()},
        **{f"sd_{name}": float(tau.std()) for name, tau in found.items()},
        "rank_model": rank(entropies(test_logits), entropy),
        "rank_exact_to_model": rank(found["exact"], entropies(test_logits)),
        "single": single,
        "share": share,
        "share_exact": exact,
        "tau_mean": float(found["tempnet"].mean()),
        "codes": test_labels[: 4 * ctx].numpy(),
        "tau": found["tempnet"][: 4 * ctx, 0].numpy(),
        "tau_exact": found["exact"][: 4 * ctx, 0].numpy(),
        "oracle": entropy[: 4 * ctx],
    }


def joint_study(
    seed: int,
    *,
    d: int = 256,
    layers: int = 6,
    ctx: int = 256,
    lm_steps: int = 3000,
    joint_lr: float = 1e-2,
    fixed: tuple[float, ...] = (0.7, 1.0, 1.3),
    positions: int = 60_000,
    device: str = "cpu",
) -> dict:
    """Joint mode: a model trained together with TempNet, and models trained at fixed temperatures.

    All start from the same weights and see the same batches. Returns `ppl_joint`, the perplexity at
    TempNet's temperatures, their mean and spread, and `ppl_fixed_{t}`, each at its temperature.
    """
    text, shape = code_blocks(seed), {"d": d, "layers": layers, "ctx": ctx}
    train, test = text[:4000], text[4000:4200]
    with lab.seeded(seed + 1):
        tempnet = TempNet(VOCAB, tau_min=0.5, tau_max=5.0).to(device)
    rho = JOINT_SHARE * math.log(VOCAB)

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return tempnet_loss(tempnet, logits.flatten(0, 1).float(), tokens.flatten(), rho)

    group = {"params": list(tempnet.parameters()), "lr": joint_lr, "weight_decay": 0.0}
    model = train_model(train, shape, lm_steps, seed, device, loss, [group])
    logits, labels, _ = predictions(model, test, ctx, positions, device)
    tau = temperatures(tempnet.eval().cpu(), logits)
    return {
        "ppl_joint": perplexity(logits / tau, labels),
        "tau_mean": float(tau.mean()),
        "tau_sd": float(tau.std()),
        **{
            f"ppl_fixed_{t:g}": fixed_perplexity(
                t, train, test, shape, lm_steps, seed, device, positions
            )
            for t in fixed
        },
    }


def fixed_perplexity(t, train, test, shape, lm_steps, seed, device, positions) -> float:
    """Perplexity of a model trained and used at the fixed temperature t."""

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1) / t, tokens.flatten())

    model = train_model(train, shape, lm_steps, seed, device, loss)
    logits, labels, _ = predictions(model, test, shape["ctx"], positions, device)
    return perplexity(logits / t, labels)


def perplexity(logits: Tensor, labels: Tensor) -> float:
    """Exponential of the mean negative log-likelihood."""
    return math.exp(float(F.cross_entropy(logits, labels)))


def entropies(logits: Tensor) -> Tensor:
    """Entropy of every prediction in nats."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def code_blocks(seed: int) -> np.ndarray:
    """Python's standard library as blocks of character codes (n, BLOCK), in a seeded order."""
    codes = library_codes()
    blocks = codes[: len(codes) // BLOCK * BLOCK].reshape(-1, BLOCK)
    return blocks[np.random.default_rng(seed).permutation(len(blocks))]


@lru_cache(maxsize=1)
def library_codes() -> np.ndarray:
    """Codes of all characters of Python's standard library, one byte each."""
    table = np.full(256, VOCAB - 1, dtype=np.uint8)
    table[ord("\n")] = 0
    table[32:127] = np.arange(1, 96)
    raw = lab.data.text("stdlib").encode("latin-1", "replace")
    return table[np.frombuffer(raw, dtype=np.uint8)]


def characters(codes: np.ndarray) -> list[str]:
    """Codes as characters; what is outside ASCII becomes a question mark."""
    alphabet = "\n" + "".join(map(chr, range(32, 127))) + "?"
    return [alphabet[code] for code in codes]


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """The usual loss of a language model."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def train_model(
    blocks: np.ndarray,
    shape: dict[str, int],
    steps: int,
    seed: int,
    device: str,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    groups: Sequence[dict] = (),
) -> nn.Module:
    """A GPT trained on random windows: AdamW, cosine schedule, batches of 16 windows.

    `groups` are further parameters that learn by the same loss (TempNet's, in joint mode).
    """
    ctx, text = shape["ctx"], torch.from_numpy(blocks.astype(np.int64))

    def epoch(number: int):
        generator = torch.Generator().manual_seed(seed + 7919 * number)
        for _ in range(100):
            rows = torch.randint(len(text), (16, 1), generator=generator)
            starts = torch.randint(BLOCK - ctx, (16, 1), generator=generator)
            windows = text[rows, starts + torch.arange(ctx + 1)]
            yield windows[:, :-1], windows[:, 1:]

    def optimizer(parameters) -> torch.optim.Optimizer:
        everything = [{"params": list(parameters)}, *groups]
        return torch.optim.AdamW(everything, lr=3e-3, weight_decay=0.01)

    with lab.seeded(seed):
        model = lab.models.GPT(VOCAB, heads=4, **shape)
    lab.train.fit(
        model, loss, epoch, steps=steps, optimizer=optimizer, schedule="cosine",
        warmup=min(50, steps // 4), clip=1.0, seed=seed, device=device,
    )  # fmt: skip
    return model


def predictions(
    model: nn.Module, blocks: np.ndarray, ctx: int, positions: int, device: str
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Logits, next characters and preceding characters (n, ctx / 2) of about `positions` places.

    Windows overlap by half, and only their second half is used: every prediction has at least
    ctx / 2 characters before it.
    """
    half = ctx // 2
    per_block = (BLOCK - 1 - half) // half
    blocks = blocks[: max(1, positions // (per_block * half))].astype(np.int64)
    starts = np.arange(per_block) * half
    windows = blocks[:, starts[:, None] + np.arange(ctx + 1)].reshape(-1, ctx + 1)
    windows = torch.from_numpy(windows)
    logits = lab.train.predict(model, windows[:, :-1], batch_size=64, device=device)
    before = windows.unfold(1, half, 1)[:, 1 : half + 1].flatten(0, 1).numpy()
    return logits[:, half:].flatten(0, 1), windows[:, half + 1 :].flatten(), before


def ngram_entropy(blocks: np.ndarray, contexts: np.ndarray, order: int) -> np.ndarray:
    """Entropy in nats of the next character under an n-gram model, for each context.

    Witten-Bell: counts after the last j characters, j = 0 to `order`, are mixed with the shorter
    context's distribution, whose weight is the number of different characters seen there.
    """
    blocks = blocks.astype(np.int64)
    probs = np.full((len(contexts), VOCAB), 1 / VOCAB)
    following = blocks[:, order:].ravel()
    for j in range(order + 1):
        powers = VOCAB ** np.arange(j, dtype=np.int64)
        seen = np.zeros_like(blocks[:, order:])
        for i in range(j):
            seen += powers[i] * blocks[:, order - 1 - i : BLOCK - 1 - i]
        keys, rows = np.unique(seen, return_inverse=True)
        counts = csr_matrix(
            (np.ones(len(following)), (rows.ravel(), following)), (len(keys), VOCAB)
        )
        asked = contexts[:, ::-1][:, :j] @ powers
        place = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
        known = keys[place] == asked
        found = counts[place[known]].toarray()
        distinct = (found > 0).sum(1, keepdims=True)
        total = found.sum(1, keepdims=True)
        probs[known] = (found + distinct * probs[known]) / (total + distinct)
    return -(probs * np.log(probs)).sum(1)


def train_tempnet(logits, labels, rho, steps, lr, seed, device) -> TempNet:
    """TempNet by the robust loss, or by plain cross-entropy when `rho` is None."""
    with lab.seeded(seed):
        tempnet = TempNet(logits.shape[1]).to(device)
    if rho is None:
        lab.train.fit(
            tempnet, lambda tau, h, y: F.cross_entropy(h / tau, y), (logits, logits, labels),
            steps=steps, batch_size=256, lr=lr, optimizer="adam", seed=seed, bf16=False,
        )  # fmt: skip
    else:
        fit_tempnet(tempnet, logits, labels, rho, lr=lr, steps=steps, seed=seed)
    return tempnet.cpu()


@torch.no_grad()
def temperatures(tempnet: TempNet, logits: Tensor) -> Tensor:
    """TempNet's temperatures (n, 1) in evaluation mode."""
    return tempnet(logits)


def rank(values: Tensor, entropy) -> float:
    """Spearman's correlation."""
    return float(spearmanr(np.asarray(values).ravel(), np.asarray(entropy).ravel()).statistic)
