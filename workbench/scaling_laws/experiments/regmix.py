"""Mixtures chosen by tiny proxies and judged on larger models; the authors' table of 1,088 runs."""

from __future__ import annotations

import gzip
import re
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from workbench.lab import data
from workbench.scaling_laws.mixture_proxies import train_proxies
from workbench.scaling_laws.regmix import (
    best_mixture,
    fit_mixture,
    sample_mixtures,
    score,
    simulate,
)
from workbench.scaling_laws.tiny_lm import tiny_lm_grid

PILE = {
    "arxiv": 0.113285273, "freelaw": 0.079608651, "nih_exporter": 0.003913491,
    "pubmed_central": 0.185375901, "wikipedia_en": 0.051081359, "dm_mathematics": 0.015962925,
    "github": 0.101750772, "philpapers": 0.003707518, "stackexchange": 0.066529351,
    "enron_emails": 0.001750772, "gutenberg_pg_19": 0.027085479, "pile_cc": 0.236869207,
    "ubuntu_irc": 0.01184346, "europarl": 0.007929969, "hackernews": 0.008032956,
    "pubmed_abstracts": 0.038825953, "uspto_backgrounds": 0.046446962,
}  # fmt: skip
"""Shares of tokens of the 17 domains that the paper uses."""

NOTEBOOK = {
    "arxiv": 99.6, "freelaw": 99.71, "pubmed_central": 99.08, "wikipedia_en": 99.45,
    "dm_mathematics": 97.2, "github": 99.77, "stackexchange": 99.73, "gutenberg_pg_19": 99.18,
    "pile_cc": 98.92, "ubuntu_irc": 96.87, "hackernews": 98.51, "pubmed_abstracts": 99.19,
    "uspto_backgrounds": 99.12,
}  # fmt: skip
"""Spearman correlation (x 100) per target at 1M that the authors' notebook printed."""

PUBLISHED = {
    ("linear", "1m"): 90.08, ("lightgbm", "1m"): 98.45, ("lightgbm", "60m"): 98.64,
    ("lightgbm", "1B"): 97.12,
}  # fmt: skip
"""Spearman correlation (x 100) on Pile-CC in the paper's table."""

CHOSEN = 0.8701
"""Weight of Pile-CC in the mixture the authors trained their 1B model on."""

SCALES = ("1m", "60m", "1B")
LIMIT = 400_000  # characters of training text a domain has at most
HELD = 40_000  # characters of held-out text, cut off the end of each domain

SMALL = {"context": 3, "embed": 8, "hidden": 16}
LARGE = {"context": 8, "embed": 16, "hidden": 128}


# --- the authors' runs ---------------------------------------------------------------------------


def released_tables() -> dict[str, tuple[pd.DataFrame, pd.DataFrame]] | None:
    """(mixtures, losses) of "train" and of the test mixtures at "1m", "60m", "1B"; None if absent.

    1M and 60M models saw 1B tokens, 1B models 25B. Losses are in nats a token.
    """
    folder = data.authors("regmix")
    if folder is None:
        return None
    found = {}
    for key, name in (("train", "train_{}_1m"), *((s, f"test_{{}}_{s}") for s in SCALES)):
        mixtures, losses = (
            pd.read_csv(folder / "data" / (name.format(kind) + ".csv"), index_col="index")
            for kind in ("mixture", "pile_loss")
        )
        mixtures.columns = mixtures.columns.str.removeprefix("train_the_pile_")
        cut = losses.columns.str.removeprefix("metric/the_pile_").str.removesuffix("_val_loss")
        losses.columns = cut
        found[key] = (mixtures, losses)
    return found


def released_fit(
    seed: int, *, target: str, model: str, runs: int = 512, stop: bool = False, rounds: int = 1000
) -> dict[str, Any]:
    """One regression on the authors' 1M runs: order of unseen mixtures at all three sizes.

    Args:
        seed: of the boosting and of the subset of runs.
        target: which of the 13 losses.
        model: see `regmix.fit_mixture`.
        runs: how many of the 512 are used.
        stop: stop early on the 1M test mixtures, as the released notebook does.
        rounds: trees.

    Returns:
        Per size ``rho_<size>`` (x 100), ``regret_<size>`` (nats a token) and ``spread_<size>``.
    """
    tables = _require()
    mixtures, losses = tables["train"]
    if runs < len(mixtures):
        kept = np.random.default_rng(seed).choice(len(mixtures), runs, replace=False)
        mixtures, losses = mixtures.iloc[kept], losses.iloc[kept]
    options: dict[str, Any] = {"rounds": rounds, "random_state": 42 + seed}
    if stop:
        options["stop"] = (tables["1m"][0], tables["1m"][1][[target]])
    fit = fit_mixture(mixtures, losses[[target]], model, **options)
    out: dict[str, Any] = {}
    for size in SCALES:
        row = fit.score(tables[size][0], tables[size][1][[target]]).loc[target]
        out[f"rho_{size}"] = 100 * row.rho
        out[f"regret_{size}"], out[f"spread_{size}"] = row.regret, row.spread
        if size == "1B":
            out["predicted"] = fit.predict(tables[size][0])[target].to_numpy()
            out["measured"] = tables[size][1][target].to_numpy()
    return out


def released_choice(
    seed: int, *, model: str = "lightgbm", target: str = "pile_cc", candidates: int = 100_000,
    top: int = 128, rounds: int = 1000,
) -> dict[str, Any]:  # fmt: skip
    """The mixture chosen from the authors' 1M runs, beside their shares of tokens.

    Args:
        seed: of the simulated mixtures and the boosting.
        model: see `regmix.fit_mixture`.
        target: the loss to be low.
        candidates: simulated mixtures.
        top: how many of them are averaged.
        rounds: trees.
    """
    mixtures, losses = _require()["train"]
    fit = fit_mixture(mixtures, losses[[target]], model, rounds=rounds, random_state=42 + seed)
    shares = pd.Series(PILE)
    choice = best_mixture(fit, simulate(shares, candidates, random_state=seed), top=top)
    single = best_mixture(fit, shares.to_frame().T, top=1).predicted
    return {
        "weight": float(choice.mixture[target]),
        "predicted": choice.predicted,
        "predicted_shares": single,
        "lowest_measured": float(losses[target].min()),
        "mixture": choice.mixture.to_numpy(),
    }


def invariance() -> pd.DataFrame:
    """Spearman correlation (x 100) of the authors' own losses at 1M and 60M, same 256 mixtures."""
    tables = _require()
    small, large = tables["1m"][1], tables["60m"][1]
    return pd.DataFrame(
        {"rho": {q: 100 * float(spearmanr(small[q], large[q]).statistic) for q in small}}
    )


def _require() -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    tables = released_tables()
    if tables is None:
        raise ValueError("the released runs are not on this machine; bring them first")
    return tables


# --- our own proxies -----------------------------------------------------------------------------


@lru_cache(maxsize=1)
def corpora() -> tuple[dict[str, str], dict[str, str]]:
    """Training text of five domains, and held-out text of them and of a target of its own.

    "source" (Python's library), "manual" (Python's language reference), "descriptions" (English
    about data sets, from scikit-learn), "tables" (numbers as text, from scikit-learn), "brackets"
    (drawn here, well nested). The target "docstrings" is no domain: it comes from the other half of
    the library than "source".
    """
    library = data.text("stdlib")
    ours, others = library[: len(library) // 2], library[len(library) // 2 :]
    folder = files("sklearn.datasets")
    tables = [
        entry.read_bytes() for entry in sorted((folder / "data").iterdir(), key=lambda e: e.name)
        if entry.name in ("breast_cancer.csv", "digits.csv.gz", "diabetes_data_raw.csv.gz")
    ]  # fmt: skip
    plain = [gzip.decompress(b) if b[:2] == b"\x1f\x8b" else b for b in tables]
    texts = {
        "source": _thin(re.findall(r"(?s).{1,4000}", ours)),
        "manual": data.text("topics"),
        "descriptions": "\n".join(
            entry.read_text("utf8")
            for entry in sorted((folder / "descr").iterdir(), key=lambda e: e.name)
            if entry.name.endswith(".rst")
        ),
        "tables": "\n".join(b[: LIMIT // 2].decode() for b in plain),
        "brackets": _brackets(150_000),
    }
    held = {name: text[-min(HELD, len(text) // 5) :] for name, text in texts.items()}
    train = {name: text[: len(text) - len(held[name])][:LIMIT] for name, text in texts.items()}
    quoted = re.findall(r'(?s)"""(.{40,2000}?)"""', others)
    held["docstrings"] = _thin([text for text in quoted if "\n" in text])[:HELD]
    return train, held


def token_shares() -> pd.Series:
    """Shares of the training text, the counterpart of the paper's shares of tokens."""
    lengths = pd.Series({name: len(text) for name, text in corpora()[0].items()}, dtype=float)
    return lengths / lengths.sum()


def _thin(parts: list[str]) -> str:
    """Every so many parts, so that all of the library is touched within the limit."""
    step = max(1, sum(map(len, parts)) // (LIMIT + HELD))
    return "\n\n".join(parts[::step])


def _brackets(length: int) -> str:
    """Well-nested brackets of three kinds in lines; the depth follows a random walk."""
    rng = np.random.default_rng(0)
    out: list[str] = []
    stack: list[str] = []
    opens, closes = "([{", ")]}"
    for u, kind in zip(rng.random(length), rng.integers(0, 3, length), strict=True):
        if stack and (u < 0.5 or len(stack) > 12):
            out.append(stack.pop())
        else:
            out.append(opens[kind])
            stack.append(closes[kind])
        if not stack:
            out.append("\n")
    return "".join(out)[:length]


def proxies(
    seed: int,
    *,
    trained: int = 80,
    tests: int = 16,
    steps: tuple[int, ...] = (100, 300),
    large_steps: int = 160,
    candidates: int = 10_000,
    top: int = 128,
    rounds: int = 1000,
    windows: int = 1000,
    model: str = "lightgbm",
    target: str = "docstrings",
) -> dict[str, Any]:
    """The whole method, once per training budget of the proxies; larger models judge the choices.

    Args:
        seed: of mixtures, weights, batches and simulated mixtures.
        trained: mixtures that train a small model and the regressions.
        tests: further mixtures that train a small and a large one.
        steps: budgets of the small models, each a run of its own.
        large_steps: of the large models.
        candidates: simulated mixtures.
        top: candidates averaged.
        rounds: trees.
        windows: symbols of each held-out text that are predicted.
        model: the regression beside the linear one; see `regmix.fit_mixture`.
        target: held-out text whose loss is to be low.

    Returns:
        Losses of large models on ``target``: under ``shares``, ``uniform``, the lower of these two
        (``plain``), the ``best`` of the test mixtures. Per budget s the loss under the mixture
        chosen by ``model`` (``chosen_s``) and by linear regression (``linear_s``), and Spearman
        correlations (x 100) with the large models' losses over the test mixtures: of the two
        regressions (``rho_s``, ``rho_linear_s``) and of the small models' own losses
        (``rho_small_s``); with ``all_`` in front the mean over all held-out texts.
    """
    texts, held = corpora()
    shares = token_shares()
    drawn = sample_mixtures(shares, trained + tests, random_state=seed)
    first, second = drawn.iloc[:trained], drawn.iloc[trained:]
    simulated = simulate(shares, candidates, random_state=seed)
    trials = {
        "shares": shares,
        "uniform": pd.Series(1 / len(shares), shares.index),
    }
    small, fits, options = {}, {}, {"windows": windows}
    for s in steps:
        small[s] = train_proxies(drawn, texts, held, **SMALL, **options, steps=s, seed=seed)
        for key, kind in ((f"chosen_{s}", model), (f"linear_{s}", "linear")):
            fits[key] = fit_mixture(first, small[s].iloc[:trained], kind, rounds=rounds)
            trials[key] = best_mixture(fits[key], simulated, target=target, top=top).mixture
    grown = pd.concat([second, pd.DataFrame(trials).T])
    losses = train_proxies(
        grown, texts, held, **LARGE, **options, steps=large_steps, seed=seed + 1000
    )
    unseen, ends = losses.iloc[:tests], losses.loc[list(trials), target]
    out: dict[str, Any] = {str(name): float(value) for name, value in ends.items()}
    for s in steps:
        orders = {
            "rho": fits[f"chosen_{s}"].score(second, unseen),
            "rho_linear": fits[f"linear_{s}"].score(second, unseen),
            "rho_small": score(small[s].iloc[trained:], unseen),
        }
        for name, table in orders.items():
            out[f"{name}_{s}"] = 100 * float(table.rho[target])
            out[f"all_{name}_{s}"] = 100 * float(table.rho.mean())
    last = f"chosen_{steps[-1]}"
    return out | {
        "plain": float(min(ends["shares"], ends["uniform"])),
        "best": float(unseen[target].min()),
        "mixtures": pd.DataFrame(trials).T.to_numpy(),
        "trials": list(trials),
        "predicted": fits[last].predict(second)[target].to_numpy(),
        "measured": unseen[target].to_numpy(),
    }


def proxy_table(
    seed: int, *, n: int = 80, steps: int = 300, windows: int = 1000
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(mixtures, losses) of small proxies, as a user's own table would be."""
    texts, held = corpora()
    drawn = sample_mixtures(token_shares(), n, random_state=seed)
    return drawn, train_proxies(
        drawn, texts, held, **SMALL, steps=steps, windows=windows, seed=seed
    )


# --- recipes on the shared grid ------------------------------------------------------------------


def recipe_invariance(made: str = "laptop") -> pd.DataFrame:
    """Do tiny models order *recipes* as larger ones do? Spearman (x 100) with the smallest size.

    A recipe is a budget and a batch size of the finished runs in the shared grid, averaged over
    seeds; all of them train on one and the same text, so that mixtures are not tested by it.

    Returns:
        Row per size: ``rho`` over all recipes, and ``alike``, the share (in per cent) of pairs of
        batch sizes at one budget that both sizes put in the same order.
    """
    runs = tiny_lm_grid(made).query("phase == 'decayed'")
    losses = runs.pivot_table(index=["budget", "batch"], columns="N", values="loss").dropna()
    smallest = losses.columns.min()
    rows = []
    for size in losses.columns[1:]:
        signs = [
            np.sign([part.iloc[i][q] - part.iloc[j][q] for q in (smallest, size)])
            for _, part in losses.groupby("budget")
            for i in range(len(part))
            for j in range(i)
        ]
        rho = float(spearmanr(losses[smallest], losses[size]).statistic)
        alike = 100 * float(np.mean([a == b for a, b in signs]))
        rows.append({"N": int(size), "rho": 100 * rho, "alike": alike, "pairs": len(signs)})
    return pd.DataFrame(rows)
